"""From sums per module to columns per pair: of the concatenated deltas, and over modules."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.engine.declare import CHANNELS, DOT, Feature, Need, Sums, ratio

_LARGEST = np.finfo(np.float32).max
AGGREGATES = ("mean", "max", "min", "p10", "p90")


class PairBlock:
    """Pairs (a, b) of adapters ``first`` x ``second``; a < b only when both are the same."""

    def __init__(
        self, first: np.ndarray, second: np.ndarray, features: list[Feature], needs: list[Need],
        modules: int, layers: int,
    ) -> None:  # fmt: skip
        """``layers=0`` leaves the per-layer profile out."""
        self.first, self.second = first, second
        self.symmetric = first is second
        n1, n2 = len(first), len(second)
        if self.symmetric:
            self.i, self.j = np.triu_indices(n1, 1)
        else:
            self.i, self.j = (x.ravel() for x in np.indices((n1, n2)))
        pairs = len(self.i)
        self.features, self.needs = features, needs
        self.local = [f for f in features if f.per_module and f.over_modules is None]
        self.means = [f for f in features if f.over_modules is not None]
        # NaN: the module is absent, or one of the deltas is zero there.
        self.values = np.full((len(self.local), modules, pairs), np.nan, np.float32)
        self.weighted = np.zeros((2, len(self.local), pairs))  # sums of weight * value, weight
        self.mean_sums = np.zeros((2, len(self.means), pairs))  # the same of self.means
        self.total = _zero_sums(pairs, needs)
        self.layer_dot = np.zeros((layers, pairs)) if layers else None
        self.layer_energy = np.zeros((2, layers, pairs))
        self.clipped = 0

    def add(self, module: int, layer: int, sums: Sums) -> None:
        """Account for one module. ``sums`` holds zeros where an adapter lacks it."""
        for name, value in vars(self.total).items():
            if isinstance(value, dict):
                for need in value:
                    value[need] += getattr(sums, name)[need]
            else:
                value += getattr(sums, name)
        weight = np.sqrt(sums.energy_a) * np.sqrt(sums.energy_b)
        for k, feature in enumerate(self.local):
            value = np.asarray(feature.finish(sums), np.float64)
            if feature.bounded is not None:
                value = np.clip(value, *feature.bounded)
            # Ratios of updates of absurd sizes leave float32.
            self.values[k, module] = np.clip(value, -_LARGEST, _LARGEST)
            valid = ~np.isnan(value)
            self.weighted[0, k] += np.where(valid, weight * value, 0.0)
            self.weighted[1, k] += np.where(valid, weight, 0.0)
        for k, feature in enumerate(self.means):
            value = np.asarray(feature.finish(sums), np.float64)
            own = np.where(np.isnan(value), 0.0, feature.over_modules(sums))
            self.mean_sums[0, k] += np.where(own > 0, own * value, 0.0)
            self.mean_sums[1, k] += own
        if self.layer_dot is not None:
            self.layer_dot[layer] += sums.need[DOT]
            self.layer_energy[0, layer] += sums.energy_a
            self.layer_energy[1, layer] += sums.energy_b

    def profile(self) -> np.ndarray:
        """(pairs, layers) float32 cosine of each layer, NaN where one adapter has nothing there."""
        length = np.sqrt(self.layer_energy[0]) * np.sqrt(self.layer_energy[1])
        return np.clip(ratio(self.layer_dot, length), -1.0, 1.0).T.astype(np.float32)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column: the feature of the concatenated deltas, then its aggregates over modules.

        Sums run over all modules of either adapter; an absent one has counted as zero.
        """
        out: dict[str, np.ndarray] = {}
        local = {f.name: k for k, f in enumerate(self.local)}
        means = {f.name: k for k, f in enumerate(self.means)}
        for f in self.features:
            if f.name in means:
                out[f.name] = self._clip(f, ratio(*self.mean_sums[:, means[f.name]]))
                continue
            out[f.name] = self._clip(f, np.asarray(f.finish(self.total), np.float64))
            if f.name in local:
                out.update(self._over_modules(f, local[f.name]))
        return out

    def _clip(self, f: Feature, values: np.ndarray) -> np.ndarray:
        if f.bounded is None:
            return values
        low, high = f.bounded
        self.clipped += int(np.count_nonzero((values < low) | (values > high)))
        return np.clip(values, low, high)

    def _over_modules(self, f: Feature, k: int) -> dict[str, np.ndarray]:
        ordered = np.sort(np.ascontiguousarray(self.values[k].T), axis=1)  # NaN last
        count = (~np.isnan(ordered)).sum(1)
        return {
            f"{f.name}.mean": ratio(self.weighted[0, k], self.weighted[1, k]),
            f"{f.name}.max": _at(ordered, count - 1.0, count),
            f"{f.name}.min": _at(ordered, np.zeros(len(count)), count),
            f"{f.name}.p10": _at(ordered, 0.1 * (count - 1.0), count),
            f"{f.name}.p90": _at(ordered, 0.9 * (count - 1.0), count),
        }


def _at(ordered: np.ndarray, position: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Linear interpolation between order statistics; NaN where there are none."""
    if ordered.shape[1] == 0:
        return np.full(len(ordered), np.nan)
    position = np.maximum(position, 0.0)
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    rows = np.arange(len(ordered))
    below = ordered[rows, low].astype(np.float64)
    # The fraction is 0 at the last value, and NaN * 0 must not leak in from beyond it.
    above = ordered[rows, high].astype(np.float64)
    return np.where(count > 0, below + (position - low) * (above - below), np.nan)


def _zero_sums(pairs: int, needs: list[Need]) -> Sums:
    def zeros() -> np.ndarray:
        return np.zeros(pairs)

    tiles = [n for n in needs if n.view == "weights"]
    channels = [n for n in needs if n.product in CHANNELS]
    return Sums(
        {n: zeros() for n in tiles}, {n: zeros() for n in tiles},
        *(zeros() for _ in range(11)),
        {n: np.zeros((6, pairs)) for n in needs if n.view != "weights"},
        {n: np.zeros((2, pairs)) for n in channels},
    )  # fmt: skip
