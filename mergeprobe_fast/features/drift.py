"""Per adapter: what its update does to the outputs of its modules, on calibration samples.

The drift of a module is the output W x that an update adds; C = X^T X / T as in
:mod:`.disturbance`. Medians over output channels are columns of pairs too: single channels of huge
outputs, which models have, do not decide them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.engine.device_views import chunk_rows
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.engine.sweep import Swept, sweep
from mergeprobe_fast.features.declare import AdapterColumn, Family, ratio
from mergeprobe_fast.features.twins import directed
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.recorded import Recorded, lacks_output_moments
from mergeprobe_fast.zoo import Zoo


@dataclass(frozen=True, eq=False)
class Drift:
    """Of N adapters: sums over their modules on their own domain, and medians on every domain.

    A delta that is zero everywhere has NaN.
    """

    of: np.ndarray  # (N,) each adapter's domain
    energy: np.ndarray  # (N,) mean ||W x||^2, summed
    relative: np.ndarray  # (N,) the same over mean ||W_0 x||^2, mean over modules
    rank: np.ndarray  # (N,) effective rank of W C W^T, mean over modules weighted by energy
    top: np.ndarray  # (N,) sum of the largest eigenvalues over the sum of all
    median: np.ndarray  # (N, D) median over channels of relative energies, mean over modules


class _Sums:
    """Sums over modules, by adapter."""

    def __init__(self, count: int, domains: int) -> None:
        self.energy, self.relative, self.modules = np.zeros((3, count))
        self.rank, self.top = np.zeros((2, count))
        self.median = np.zeros((count, domains))
        self.alive = np.zeros(count, bool)


def _compute(zoo: Zoo, recorded: Recorded, threads: int) -> Drift:
    samples, of = Samples.of_adapters(zoo, recorded, np.arange(len(zoo)))
    sums = _Sums(len(zoo), len(samples.domains))
    device = current_device()
    for chunk in sweep(zoo, threads, device=device):
        if device is not None:
            _add_on_device(sums, chunk, samples, of, device)
            continue
        for modules in samples.groups(chunk.modules):
            _add(sums, chunk, modules, samples, of)

    def per(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return ratio(values, np.where(sums.alive, weight, 0.0))

    one = np.ones(len(zoo))
    return Drift(
        of, per(sums.energy, one), per(sums.relative, sums.modules),
        per(sums.rank, sums.energy), per(sums.top, sums.energy),
        per(sums.median.T, sums.modules).T,
    )  # fmt: skip


def _add(
    sums: _Sums, chunk: Swept, modules: list[int], samples: Samples, of: np.ndarray
) -> None:  # fmt: skip
    """Account for modules with the same inputs."""
    everything = chunk.entries(modules)
    np.add.at(sums.modules, chunk.adapter[everything], 1.0)
    here = everything[chunk.rank[everything] > 0]
    if len(here) == 0:
        return
    stack = chunk.stack("v", here)
    bounds = np.concatenate([[0], np.cumsum(chunk.rank[here])])
    sigma = [chunk.sigma[i, : chunk.rank[i]] for i in here]
    # The second moments of S V^T x, with S the singular values: (ranks, ranks) per entry.
    inner: list[list[np.ndarray]] = [[] for _ in here]
    for d, count in enumerate(samples.counts):
        x, factor = samples.inputs(d, chunk.modules[modules[0]].name)
        seen = x @ stack
        for k, s in enumerate(sigma):
            part = seen[:, bounds[k] : bounds[k + 1]].astype(np.float64) * (s * factor)
            inner[k].append(part.T @ part / count)
    module_of = np.searchsorted(chunk.bounds, here, side="right") - 1
    base: dict[int, np.ndarray] = {
        k: np.array([samples.calibration.output_moment(d, chunk.modules[k].name)
                     for d in samples.domains])
        for k in dict.fromkeys(module_of.tolist())
    }  # fmt: skip
    for k, i in enumerate(here):
        adapter, moments = chunk.adapter[i], base[int(module_of[k])]
        d = of[adapter]
        values = np.maximum(np.linalg.eigvalsh(inner[k][d]), 0.0)
        energy = values.sum()
        sums.alive[adapter] = True
        sums.energy[adapter] += energy
        sums.top[adapter] += values[-1]
        sums.rank[adapter] += energy * _effective_rank(values)
        sums.relative[adapter] += _over(energy, moments[d].sum())
        u = chunk.vectors("u", i).astype(np.float64)
        moved = u @ np.concatenate(inner[k], axis=1)  # one product, for every domain
        channels = np.einsum("or,odr->do", u, moved.reshape(len(u), -1, u.shape[1]))
        sums.median[adapter] += [_median(*x) for x in zip(channels, moments, strict=True)]


def _add_on_device(
    sums: _Sums, chunk: Swept, samples: Samples, of: np.ndarray, device: Any
) -> None:  # fmt: skip
    """Account for a chunk."""
    from mergeprobe_fast.kernels.domain_views import SampleRows
    from mergeprobe_fast.kernels.sample_sums import drift

    np.add.at(sums.modules, chunk.adapter, 1.0)
    rows, staged = chunk_rows(chunk.form, chunk.bounds), SampleRows(device, samples.counts)
    domains, found = range(len(samples.domains)), []
    for modules in samples.groups(chunk.modules):
        alive = [k for k in modules if chunk.rank[slice(*chunk.bounds[k : k + 2])].any()]
        if not alive:
            continue
        values = [samples.inputs(d, chunk.modules[alive[0]].name) for d in domains]
        width = -(-chunk.modules[alive[0]].d_in // 16) * 16
        x = staged.upload([v.values for v in values], width)
        for k in alive:
            base = np.array([samples.calibration.output_moment(d, chunk.modules[k].name)
                             for d in samples.domains])  # fmt: skip
            here = slice(*chunk.bounds[k : k + 2])
            own = device.array(of[chunk.adapter[here]]).tensor
            made = drift(rows, k, x, staged.counts, staged.offsets, [v.factor for v in values],
                         own, base)  # fmt: skip
            found.append((here, base.sum(1), device.download(made)))
    for here, base, wait in found:
        for i, (energy, top, rank, *medians) in zip(range(here.start, here.stop), wait(),
                                                    strict=True):  # fmt: skip
            adapter = chunk.adapter[i]
            if chunk.rank[i]:
                sums.alive[adapter] = True
                sums.energy[adapter] += energy
                sums.top[adapter] += top
                sums.rank[adapter] += energy * rank
                sums.relative[adapter] += _over(energy, base[of[adapter]])
                sums.median[adapter] += medians


def _over(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else np.nan


def _median(energies: np.ndarray, base: np.ndarray) -> float:
    """Median over the channels that the base model uses."""
    used = base > 0
    return float(np.median(energies[used] / base[used])) if used.any() else np.nan


def _effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues over their sum; 0 where that is 0."""
    if not values.any():
        return 0.0
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _shifts(zoo: Zoo, recorded: Recorded, threads: int) -> np.ndarray:
    """(N, modules) 1 - CKA of base and adapted outputs on the own domain, NaN where undefined."""
    samples, of = Samples.of_adapters(zoo, recorded, np.arange(len(zoo)))
    found = np.full((len(zoo), len(zoo.modules)), np.nan)
    place = {m.name: k for k, m in enumerate(zoo.modules)}
    device = current_device()
    for chunk in sweep(zoo, threads, device=device):
        for k, module in enumerate(chunk.modules):
            here = chunk.entries([k])
            for d in dict.fromkeys(of[chunk.adapter[here]].tolist()):
                those = here[(of[chunk.adapter[here]] == d) & (chunk.rank[here] > 0)]
                base = _Base(samples, d, module.name, device)
                if device is not None:
                    shifts = base.on_device(chunk, k, those, device)
                    found[chunk.adapter[those], place[module.name]] = shifts
                    continue
                for i in those:
                    right = chunk.vectors("v", i) * chunk.sigma[i, : chunk.rank[i]]
                    found[chunk.adapter[i], place[module.name]] = base.shift(
                        chunk.vectors("u", i).astype(np.float64), right
                    )
    return found


class _Base:
    """The base module's inputs and outputs at the samples of a domain."""

    def __init__(self, samples: Samples, d: int, module: str, device: Any = None) -> None:
        x = samples.calibration.inputs(samples.domains[d], module)
        y = samples.calibration.outputs(samples.domains[d], module)
        if device is not None:
            self._x, self._y = x, y
            return
        self._x = x.astype(np.float64)
        self._y = y.astype(np.float64)
        self._y -= self._y.mean(0)
        self._gram = _u_centred(self._y @ self._y.T)

    def on_device(self, chunk: Swept, k: int, entries: np.ndarray, device: Any) -> np.ndarray:
        """``shift`` of some entries of a module; waits for the device."""
        if len(self._x) < 4 or not len(entries):
            return np.full(len(entries), np.nan)
        from mergeprobe_fast.kernels.domain_views import SampleRows
        from mergeprobe_fast.kernels.sample_sums import shifts

        staged = SampleRows(device, [len(self._x)])
        x, y = (staged.upload([v], -(-v.shape[1] // 16) * 16)[: len(v)]
                for v in (self._x, self._y))  # fmt: skip
        rows = chunk_rows(chunk.form, chunk.bounds)
        return device.download(shifts(rows, k, entries.tolist(), x, y))()

    def shift(self, left: np.ndarray, right: np.ndarray) -> float:
        """1 - CKA of Y and Y + X right left^T, without the difference of two nearly equal numbers.

        With K the U-centred Gram of Y and E what the update adds to it, it is 1 - cos(K, K + E):
        sin^2 / (1 + cos), where sin is the part of E across K.
        """
        if len(self._x) < 4:
            return np.nan  # the unbiased HSIC is not defined
        p = self._x @ right
        p -= p.mean(0)
        cross = (self._y @ left) @ p.T
        change = _u_centred(cross + cross.T + p @ p.T)
        square = np.square(self._gram).sum()
        size = np.square(self._gram + change).sum()
        if not (square > 0 and size > 0):
            return np.nan
        along = (self._gram * change).sum() / square
        cosine = (1 + along) * np.sqrt(square / size)
        if cosine <= 0:
            return float(1 - cosine)
        return float(np.square(change - along * self._gram).sum() / size / (1 + cosine))


def _u_centred(gram: np.ndarray) -> np.ndarray:
    """U-centred (Szekely and Rizzo 2014): inner products of these are unbiased HSIC, scaled."""
    n = len(gram)
    if n < 4:
        return np.zeros_like(gram)
    gram = gram.copy()
    np.fill_diagonal(gram, 0.0)
    rows = gram.sum(0) / (n - 2)
    gram += rows.sum() / (n - 1) - rows[:, None] - rows[None, :]
    np.fill_diagonal(gram, 0.0)
    return gram


def _outputs_missing(recorded: Recorded) -> str | None:
    if recorded.calibration is None or not recorded.calibration.has_outputs:
        return "a calibration with outputs"
    return None


def _over_modules(reduce: Callable[..., np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def finish(shifts: np.ndarray) -> np.ndarray:
        out = np.full(len(shifts), np.nan)
        some = ~np.isnan(shifts).all(1)
        out[some] = reduce(shifts[some], axis=1)
        return out

    return finish


FAMILY = Family(
    "drift", missing=lacks_output_moments, compute=_compute,
    title="Disturbance of typical channels", made_from="",
    pairs=directed(
        "disturbance_median", "Disturbance of {a} by {b}, median channel",
        "Root mean square over {b}'s modules of the median over output channels of how much {b} "
        "changes them on {a}'s domain, sqrt(mean (W_{b} x)_o^2 / mean (W_0 x)_o^2).",
        lambda data, victim, partner: np.sqrt(data.median[partner, data.of[victim]]),
        low=0.0, source="OSRM's interference, over base",
    ),
    adapters=(
        AdapterColumn(
            "drift", "Drift", "Root of mean ||W x||^2 on the adapter's own domain, over all "
            "modules.", lambda data: np.sqrt(data.energy), "standard",
        ),
        AdapterColumn(
            "self_disturbance", "Own disturbance", "Root mean square over modules of how much the "
            "update changes their outputs on its own domain, mean ||W x||^2 / mean ||W_0 x||^2.",
            lambda data: np.sqrt(data.relative), "OSRM's interference, over base",
        ),
        AdapterColumn(
            "self_disturbance_median", "Own disturbance, median channel",
            "The same of the median output channel of each module.",
            lambda data: np.sqrt(data.median[np.arange(len(data.of)), data.of]),
            "OSRM's interference, over base",
        ),
        AdapterColumn(
            "drift_effective_rank", "Effective rank of the drift",
            "exp of the entropy of the eigenvalues of W C W^T over their sum, on the own domain; "
            "mean over modules weighted by drift energy.", lambda data: data.rank,
            "Roy and Vetterli",
        ),
        AdapterColumn(
            "drift_top_share", "Top share of the drift",
            "Share of the drift's energy in the first principal direction of each module.",
            lambda data: data.top, "standard",
        ),
    ),
)  # fmt: skip

OUTPUT_FAMILY = Family(
    "output_shift", missing=_outputs_missing, compute=_shifts, title="Shift of representations",
    made_from="",
    adapters=(
        AdapterColumn(
            "output_shift", "Output shift",
            "1 - CKA of each module's outputs without and with the update, on its own domain, "
            "with the unbiased HSIC; mean over modules. 0: same up to rotation and scale.",
            _over_modules(np.nanmean), "CKA (Kornblith 2019) with the HSIC of Song 2012",
        ),
        AdapterColumn(
            "output_shift_max", "Largest output shift", "The largest of the modules' shifts.",
            _over_modules(np.nanmax), "CKA (Kornblith 2019) with the HSIC of Song 2012",
        ),
    ),
)  # fmt: skip
