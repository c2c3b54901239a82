"""From sums per module to columns per pair: of the concatenated deltas, and over modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergeprobe_fast.engine.declare import CHANNELS, DOT, Feature, Need, Sums, ratio
from mergeprobe_fast.engine.finishing import Finishing, host

_LARGEST = float(np.finfo(np.float32).max)
_SORTED = 1 << 17  # pairs whose modules a device sorts at a time: some 50 bytes a module and pair
AGGREGATES = ("mean", "max", "min", "p10", "p90")


class PairBlock:
    """Pairs (a, b) of adapters ``first`` x ``second``; a < b only when both are the same."""

    def __init__(
        self, first: np.ndarray, second: np.ndarray, features: list[Feature], needs: list[Need],
        modules: int, layers: int, device: Any = None,
    ) -> None:  # fmt: skip
        """``layers=0`` leaves the per-layer profile out. ``device``: where everything lies, from
        :func:`mergeprobe_fast.ops.open_device`; None: on the CPU."""
        self.first, self.second = first, second
        self.symmetric = first is second
        n1, n2 = len(first), len(second)
        if self.symmetric:
            self.i, self.j = np.triu_indices(n1, 1)
        else:
            self.i, self.j = (x.ravel() for x in np.indices((n1, n2)))
        pairs = len(self.i)
        self.there = None if device is None else (device.array(self.i), device.array(self.j))
        self._like = like = None if device is None else self.there[0]
        self._finish = Finishing(device)
        self.features, self.needs = features, needs
        self.local = [f for f in features if f.per_module and f.over_modules is None]
        self.means = [f for f in features if f.over_modules is not None]
        # NaN: the module is absent, or one of the deltas is zero there.
        self.values = np.full((len(self.local), modules, pairs), np.nan, np.float32, like=like)
        self.weighted = np.zeros((2, len(self.local), pairs), like=like)  # weight * value, weight
        self.mean_sums = np.zeros((2, len(self.means), pairs), like=like)  # the same of self.means
        self.total = _zero_sums(pairs, needs, like)
        self.layer_dot = np.zeros((layers, pairs), like=like) if layers else None
        self.layer_energy = np.zeros((2, layers, pairs), like=like)
        self.clipped = 0

    def add(self, first: int, last: int, layers: Sequence[int], sums: Sums) -> None:
        """Account for modules [first, last), of these layers. ``sums`` has the pairs of one after
        those of another, and zeros where an adapter lacks a module."""
        count = last - first

        def each(x: np.ndarray) -> np.ndarray:
            return x.reshape(*x.shape[:-1], count, -1)

        def over(x: np.ndarray) -> np.ndarray:
            return x if count == 1 else each(x).sum(-2)

        for name, value in vars(self.total).items():
            if isinstance(value, dict):
                for need in value:
                    _add(value[need], over(getattr(sums, name)[need]))
            else:
                _add(value, over(getattr(sums, name)))
        weight = np.sqrt(sums.energy_a) * np.sqrt(sums.energy_b)
        finished = self._finish.of(sums, count)
        for k, feature in enumerate(self.local):
            value = finished(feature.finish)
            if feature.bounded is not None:
                value = np.clip(value, *feature.bounded)
            # Ratios of updates of absurd sizes leave float32.
            self.values[k, first:last] = each(np.clip(value, -_LARGEST, _LARGEST))
            valid = ~np.isnan(value)
            _add(self.weighted[0, k], over(np.where(valid, weight * value, 0.0)))
            _add(self.weighted[1, k], over(np.where(valid, weight, 0.0)))
        for k, feature in enumerate(self.means):
            value = finished(feature.finish)
            own = np.where(np.isnan(value), 0.0, finished(feature.over_modules))
            _add(self.mean_sums[0, k], over(np.where(own > 0, own * value, 0.0)))
            _add(self.mean_sums[1, k], over(own))
        if self.layer_dot is not None:
            dot, a, b = (each(x) for x in (sums.need[DOT], sums.energy_a, sums.energy_b))
            for m, layer in enumerate(layers):
                _add(self.layer_dot[layer], dot[m])
                _add(self.layer_energy[0, layer], a[m])
                _add(self.layer_energy[1, layer], b[m])

    def profile(self) -> np.ndarray:
        """(pairs, layers) float32 cosine of each layer, NaN where one adapter has nothing there."""
        length = np.sqrt(self.layer_energy[0]) * np.sqrt(self.layer_energy[1])
        return host(np.clip(ratio(self.layer_dot, length), -1.0, 1.0)).T.astype(np.float32)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column: the feature of the concatenated deltas, then its aggregates over modules.

        Sums run over all modules of either adapter; an absent one has counted as zero.
        """
        out: dict[str, np.ndarray] = {}
        finished = self._finish.of(self.total)
        local = {f.name: k for k, f in enumerate(self.local)}
        means = {f.name: k for k, f in enumerate(self.means)}
        for f in self.features:
            if f.name in means:
                out[f.name] = self._clip(f, host(ratio(*self.mean_sums[:, means[f.name]])))
                continue
            out[f.name] = self._clip(f, host(finished(f.finish)))
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
        out = {f"{f.name}.mean": host(ratio(self.weighted[0, k], self.weighted[1, k]))}
        pairs = len(self.i)
        step = pairs if self._like is None else _SORTED
        parts: dict[str, list[np.ndarray]] = {x: [] for x in AGGREGATES[1:]}
        for at in range(0, max(1, pairs), max(1, step)):
            for name, values in _quantiles(self.values[k, :, at : at + step], self._like).items():
                parts[name].append(host(values))
        return out | {f"{f.name}.{x}": np.concatenate(found) for x, found in parts.items()}


def _add(total: np.ndarray, values: np.ndarray) -> None:
    """In place; of a view of a device's array, `a[k] += b` would write it twice."""
    total += values


def _quantiles(values: np.ndarray, like: np.ndarray | None) -> dict[str, np.ndarray]:
    """Order statistics of (modules, pairs) over the modules, NaN left out."""
    if like is None:  # along rows that lie together
        ordered = np.sort(np.ascontiguousarray(values.T), axis=1).T
    else:
        ordered = np.sort(values, axis=0)
    count = (~np.isnan(ordered)).sum(0)  # NaN last
    return {
        "max": _at(ordered, count - 1.0, count, like),
        "min": _at(ordered, np.zeros_like(count, float), count, like),
        "p10": _at(ordered, 0.1 * (count - 1.0), count, like),
        "p90": _at(ordered, 0.9 * (count - 1.0), count, like),
    }


def _at(
    ordered: np.ndarray, position: np.ndarray, count: np.ndarray, like: np.ndarray | None
) -> np.ndarray:
    """Linear interpolation between order statistics; NaN where there are none."""
    modules, pairs = ordered.shape
    if modules == 0:
        return np.full(pairs, np.nan, like=like)
    position = np.maximum(position, 0.0)
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    columns = np.arange(pairs, like=like)
    below = ordered[low, columns].astype(np.float64)
    # The fraction is 0 at the last value, and NaN * 0 must not leak in from beyond it.
    above = ordered[high, columns].astype(np.float64)
    return np.where(count > 0, below + (position - low) * (above - below), np.nan)


def _zero_sums(pairs: int, needs: list[Need], like: np.ndarray | None) -> Sums:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((*shape, pairs), like=like)

    tiles = [n for n in needs if n.view == "weights"]
    channels = [n for n in needs if n.product in CHANNELS]
    return Sums(
        {n: zeros() for n in tiles}, {n: zeros() for n in tiles},
        *(zeros() for _ in range(11)),
        {n: zeros(6) for n in needs if n.view != "weights"},
        {n: zeros(2) for n in channels},
    )  # fmt: skip
