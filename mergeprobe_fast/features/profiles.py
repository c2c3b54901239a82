"""Where an update lies: over layers, over channels, over singular values.

Columns from singular values alone read no file; those of channels go over the factors once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mergeprobe_fast.engine.channels import SIDE, energies
from mergeprobe_fast.engine.device_views import chunk_rows
from mergeprobe_fast.engine.kept_sums import sums_so_far
from mergeprobe_fast.engine.sweep import Swept, sweep
from mergeprobe_fast.engine.work import canonical_work, factor_work
from mergeprobe_fast.features.declare import AdapterColumn, Family, PairColumn, Spectra, ratio
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo


def _nothing_missing(recorded: Recorded) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Depths:
    """Squared norms of N deltas.

    ``modules`` (N, modules) and ``layers`` (N, layers), in the order of the zoo; ``relative`` the
    latter over their sums, NaN for a delta that is zero; ``sigma_dot`` (N, N): sum over modules of
    the inner products of the descending singular values; ``used`` (N,): mean over an adapter's
    modules of the stable rank over the rank it was trained with.
    """

    modules: np.ndarray
    layers: np.ndarray
    relative: np.ndarray
    sigma_dot: np.ndarray
    used: np.ndarray


def _depths(found: Spectra) -> Depths:
    zoo, entries = found.zoo, found.zoo.table.entries
    n = len(zoo)
    order = list(dict.fromkeys(m.layer for m in zoo.modules))
    layer = np.array([order.index(m.layer) for m in zoo.modules], np.intp)
    energy = np.square(found.sigma).sum(1)
    modules, layers = np.zeros((n, len(zoo.modules))), np.zeros((n, len(order)))
    np.add.at(modules, (entries["adapter"], entries["module"]), energy)
    np.add.at(layers, (entries["adapter"], layer[entries["module"]]), energy)
    sigma_dot = np.zeros((n, n))
    bounds = np.searchsorted(entries["module"], np.arange(len(zoo.modules) + 1))
    for first, last in pairwise(bounds):
        who, s = entries["adapter"][first:last], found.sigma[first:last]
        sigma_dot[np.ix_(who, who)] += s @ s.T
    top = found.sigma[:, 0] if found.sigma.shape[1] else np.zeros(len(entries))
    stable = ratio(energy, np.where(found.rank > 0, top**2, 0.0)) / entries["rank"]
    alive = ~np.isnan(stable)
    owner = entries["adapter"][alive]
    used = ratio(
        np.bincount(owner, stable[alive], n), np.bincount(owner, minlength=n).astype(np.float64)
    )
    return Depths(modules, layers, ratio(layers.T, layers.sum(1)).T, sigma_dot, used)


def _entropy_number(shares: np.ndarray) -> np.ndarray:
    """exp of the entropy of each row; NaN rows stay NaN."""
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.exp(-(shares * logs).sum(1))


def _centre(d: Depths) -> np.ndarray:
    count = d.relative.shape[1]
    return d.relative @ np.linspace(0.0, 1.0, count) if count > 1 else d.relative[:, 0] * np.nan


def _spread(d: Depths) -> np.ndarray:
    count = d.relative.shape[1]
    if count < 2:
        return d.relative[:, 0] * np.nan
    at = np.linspace(0.0, 1.0, count)
    centre = d.relative @ at
    return np.sqrt((d.relative * (at[None, :] - centre[:, None]) ** 2).sum(1))


def _profile_cosine(profile: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of rows, NaN where one is zero."""
    top = profile.max(1, initial=0.0)
    scaled = profile / np.where(top > 0, top, 1.0)[:, None]
    length = np.sqrt(np.square(scaled).sum(1))
    return ratio(np.einsum("pk,pk->p", scaled[a], scaled[b]), length[a] * length[b])


def _spectrum_cosine(d: Depths, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    own = np.sqrt(np.diagonal(d.sigma_dot))
    return ratio(d.sigma_dot[a, b], own[a] * own[b])


DEPTH = Family(
    "depth", _nothing_missing, from_spectra=_depths, title="Profiles over layers and spectra",
    by_default=False, cost="r, from the spectra that the pass found",
    pairs=(
        PairColumn(
            "spectrum_cosine", "Spectra",
            "Sum over modules and ranks of the products of the descending singular values of W_a "
            "and W_b, over |W_a| |W_b|: the largest cosine that rotating inputs and outputs of "
            "every module could give.",
            _spectrum_cosine, 0.0, 1.0, bounded=(0.0, 1.0),
            source="von Neumann's trace inequality; 2601.22285 by module",
        ),
        PairColumn(
            "layer_profile_cosine", "Profiles over layers",
            "Cosine of the two vectors of squared norms by layer.",
            lambda d, a, b: _profile_cosine(d.layers, a, b), 0.0, 1.0, bounded=(0.0, 1.0),
            source="standard",
        ),
        PairColumn(
            "module_profile_cosine", "Profiles over modules",
            "Cosine of the two vectors of squared norms by module.",
            lambda d, a, b: _profile_cosine(d.modules, a, b), 0.0, 1.0, bounded=(0.0, 1.0),
            source="standard",
        ),
    ),
    adapters=(
        AdapterColumn(
            "layers_used", "Layers used, effective number",
            "exp of the entropy of the layers' shares of the squared norm.",
            lambda d: _entropy_number(d.relative), "standard", 1.0, None,
        ),
        AdapterColumn(
            "modules_used", "Modules used, effective number",
            "exp of the entropy of the modules' shares of the squared norm.",
            lambda d: _entropy_number(ratio(d.modules.T, d.modules.sum(1)).T), "standard", 1.0,
        ),
        AdapterColumn(
            "layer_concentration", "Concentration over layers",
            "Sum of the squared shares of the squared norm by layer.",
            lambda d: np.square(d.relative).sum(1), "Herfindahl index; gradience", 0.0, 1.0,
            "1 / layers where all have the same",
        ),
        AdapterColumn(
            "layer_top_share", "Largest layer's share",
            "Share of the squared norm in the layer that has most of it.",
            lambda d: d.relative.max(1), "standard", 0.0, 1.0,
            "1 / layers where all have the same",
        ),
        AdapterColumn(
            "depth_centre", "Centre of depth",
            "Mean depth of the squared norm, 0 the first and 1 the last of the zoo's layers.",
            _centre, "standard", 0.0, 1.0, "1/2 where all layers have the same",
        ),
        AdapterColumn(
            "depth_spread", "Spread of depth",
            "Standard deviation of the depth of the squared norm, on the same scale.",
            _spread, "standard", 0.0, 0.5, "0.29 where all of many layers have the same",
        ),
        AdapterColumn(
            "rank_utilisation", "Rank utilisation",
            "Stable rank over the rank of the factors, mean over modules.",
            lambda d: d.used, "gradience (utilization)", 0.0, 1.0,
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Channels:
    """Of N deltas and two sides, "out" and "in", from the channels' squared norms p of all modules.

    ``total`` sum p, ``square`` sum p^2, ``flat`` sum over modules of (sum p)^2 / channels, ``peak``
    the largest p over the mean of its module.
    """

    total: dict[str, np.ndarray]
    square: dict[str, np.ndarray]
    flat: dict[str, np.ndarray]
    peak: dict[str, np.ndarray]


def _channels(zoo: Zoo, recorded: Recorded, threads: int) -> Channels:
    n = len(zoo)
    out, kept = Channels(*({side: np.zeros(n) for side in SIDE} for _ in range(4))), sums_so_far()
    arrays = {f"{name}:{side}": sums for name, of in vars(out).items() for side, sums in of.items()}
    kept.restore(arrays)
    device = current_device()
    for chunk in sweep(zoo, threads, kept.step, device):
        rows = None if device is None else chunk_rows(chunk.form, chunk.bounds)
        here = np.flatnonzero(chunk.rank > 0)
        for side in SIDE:
            top = chunk.sigma[here, 0] ** 2
            if device is None:
                made = (energies(chunk, side, int(i)) * t for i, t in zip(here, top, strict=True))
                found = np.array([(p.sum(), np.square(p).sum(), p.max()) for p in made])
            else:
                found = device.download(rows.profile(SIDE[side]))().T[here]
                found *= np.stack([top, top**2, top], axis=1)
            _add(out, side, chunk, here, found)
        kept.reached(chunk.first + len(chunk.modules), arrays)
    return out


def _add(
    out: Channels, side: str, chunk: Swept, here: np.ndarray, found: np.ndarray
) -> None:  # fmt: skip
    """Account for some entries: sum, sum of squares and largest of the channels' energies."""
    for i, (total, square, peak) in zip(here, found, strict=True):
        who = chunk.adapter[i]
        module = chunk.modules[int(np.searchsorted(chunk.bounds, i, side="right")) - 1]
        channels = module.d_out if side == "out" else module.d_in
        out.total[side][who] += total
        out.square[side][who] += square
        out.flat[side][who] += total**2 / channels
        out.peak[side][who] = max(out.peak[side][who], peak / total * channels)


def _share_used(side: str) -> Callable[[Channels], np.ndarray]:
    return lambda c: ratio(c.flat[side], c.square[side])


def _peak(side: str) -> Callable[[Channels], np.ndarray]:
    return lambda c: np.where(c.total[side] > 0, c.peak[side], np.nan)


def _side(side: str, word: str, rows: str) -> tuple[AdapterColumn, AdapterColumn]:
    return (
        AdapterColumn(
            f"{side}_channels_used", f"{word.capitalize()} channels used",
            f"(sum p)^2 / (channels sum p^2), p the squared norms of the {rows} of the update; "
            "both terms are summed over modules. 1: all channels alike.",
            _share_used(side), "inverse participation", 0.0, 1.0, "1 / (1 + 2 / participation)",
        ),
        AdapterColumn(
            f"{side}_channel_peak", f"Largest {word} channel",
            f"The largest squared norm of {'a row' if side == 'out' else 'a column'} over the mean "
            "of its module, largest over modules: outlier channels.",
            _peak(side), "standard", 1.0,
        ),
    )  # fmt: skip


CHANNELS = Family(
    "channels", _nothing_missing, _channels, title="Profiles over channels", by_default=False,
    adapters=(*_side("out", "output", "rows"), *_side("in", "input", "columns")),
    cost="r (d_out + d_in) per adapter and module",
    work=lambda zoo: canonical_work(zoo) + 100 * factor_work(zoo), made_from="",
)  # fmt: skip
FAMILIES = (DEPTH, CHANNELS)
