"""The library's view of a screen: features of adapters and of pairs, in one pass over the zoo."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast import engine
from mergeprobe_fast.features import (
    Feature,
    PairColumn,
    Request,
    Selection,
    select,
    select_of_adapters,
)
from mergeprobe_fast.features.families import family_values
from mergeprobe_fast.ops.device import Precision, open_device
from mergeprobe_fast.recorded import NOTHING, Recorded, open_recorded
from mergeprobe_fast.table import AdapterTable, PairTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo, text

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration
    from mergeprobe_fast.probes import Probes

    Folder = str | os.PathLike[str]
    Domains = Mapping[str, str] | Sequence[str]


@dataclass(frozen=True, eq=False)
class Screen:
    """Everything one pass gives."""

    zoo: Zoo
    selection: Selection
    recorded: Recorded
    adapters: AdapterTable
    pairs: PairTable
    layers: list[str]
    profile: np.ndarray  # (pairs, layers) cosine per layer
    adapter_profile: np.ndarray  # (adapters, layers) norm per layer

    @property
    def features(self) -> list[Feature | PairColumn]:
        """Every declaration that was computed for pairs."""
        return list(self.selection)


def screen(
    zoo: Zoo,
    features: Request | Sequence[Request] = "default",
    *,
    recorded: Recorded = NOTHING,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Folder | None = None,
    device: str = "cpu",
    precision: Precision = "highest",
) -> Screen:
    """Adapter and pair features and the per-layer profile of a zoo.

    ``progress`` is called with the number of modules done since the last call; the total is
    :func:`steps`. ``keep``, ``device`` and ``precision`` are as in :func:`pair_features`.
    """
    opened = open_device(device, precision)
    chosen = select(features, recorded)
    result = engine.run(
        zoo, chosen.features, recorded=recorded, profile=True, threads=threads, progress=progress,
        keep=keep, device=opened,
    )  # fmt: skip
    found = family_values(
        zoo, chosen, recorded, result, of_pairs=True, of_adapters=True, threads=threads,
        progress=progress, keep=keep, device=opened,
    )  # fmt: skip
    adapters = _adapter_table(zoo, result, chosen, found.adapters)
    pairs = _pair_table(zoo, result, chosen, found.pairs)
    return Screen(
        zoo, chosen, recorded, adapters, pairs, result.layers, result.profile,
        _adapter_profile(zoo, result),
    )  # fmt: skip


def pair_features(
    zoo: Zoo | Paths,
    features: Request | Sequence[Request] = "default",
    *,
    calibration: Calibration | Folder | None = None,
    domains: Domains | None = None,
    probes: Probes | Folder | None = None,
    at: float | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Folder | None = None,
    device: str = "cpu",
    precision: Precision = "highest",
) -> PairTable:
    """One row per pair of adapters of a zoo.

    Each feature is a column over the concatenated deltas of all modules; features on tiles have
    ``<feature>.mean``, ``.max``, ``.min``, ``.p10``, ``.p90`` too, over the modules both adapters
    have (the mean weighted by the product of the two norms). NaN: undefined, because a delta is
    zero or a module is missing.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        features: "default"; "all"; "2601.22285" or "gradience" for the metrics of those, under
            their names (``mergeprobe_fast.CROSSWALK``); names from ``mergeprobe_fast.FEATURES``;
            declarations of your own; or a list of these. What needs a calibration or probes is
            among the groups only if these are given.
        calibration: folder that ``calibrate`` wrote: columns of what updates do to the inputs, the
            outputs and the loss of each adapter's domain.
        domains: of the calibration, per adapter; default: by the adapters' names.
        probes: folder of probe runs named like the adapters: columns of early training.
        at: the fraction of training at which to take the probes; default: the latest.
        progress: called with the number of modules done since the last call; the total is
            ``screening.steps``.
        keep: a folder for what is done: the blocks of pairs of a zoo of so many that they go in
            blocks, the columns of every family that takes more than a moment, and every half
            minute what the slowest of these (entries, angles, channels, those of other tools) have
            added up. The same call goes on from there when it was killed and gives the same to
            the bit; what another call left is not used. Of your own, a family is kept if it says
            ``made_from``, and blocks of pairs if every feature does. One process at a time. Yours
            to remove.
        device: "cpu", "cuda", "cuda:1" or "auto", a CUDA device if one can be used. Columns of
            probe runs are the CPU's all the same, and so are features of your own that do more
            than what numpy does with each pair by itself.
        precision: of float32 products there: "highest", or "high", which rounds to tf32.

    Raises:
        InputError: an unknown feature, one that needs what was not given, a file that changed, a
            factor that is not finite, other files in ``keep``.
        BackendError: the device cannot be used here.
    """
    opened = open_device(device, precision)
    zoo = as_zoo(zoo)
    recorded = open_recorded(zoo, calibration, domains, probes, at)
    chosen = select(features, recorded)
    result = engine.run(
        zoo, chosen.features, recorded=recorded, threads=threads, progress=progress, keep=keep,
        device=opened,
    )  # fmt: skip
    found = family_values(
        zoo, chosen, recorded, result, of_pairs=True, of_adapters=False, threads=threads,
        progress=progress, keep=keep, device=opened,
    )  # fmt: skip
    return _pair_table(zoo, result, chosen, found.pairs)


def adapter_features(
    zoo: Zoo | Paths,
    features: str | Sequence[str] = "default",
    *,
    calibration: Calibration | Folder | None = None,
    domains: Domains | None = None,
    probes: Probes | Folder | None = None,
    at: float | None = None,
    base: Folder | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> AdapterTable:
    """One row per adapter: size, norm and spectrum of its whole delta.

    Singular values of all modules together; ``<feature>.mean`` and ``.max`` are over modules. With
    a calibration and with probes, which are as in :func:`pair_features`, also what these say.

    Args:
        features: "default", "all", or names of statistics of adapters in
            ``mergeprobe_fast.FEATURES``.
        base: folder of the base model, for how large updates are beside its weights: reads them
            all once, one tensor at a time.
        device: as in :func:`pair_features`, for the canonical forms.
    """
    opened = open_device(device)
    zoo = as_zoo(zoo)
    recorded = open_recorded(zoo, calibration, domains, probes, at, base)
    chosen = select_of_adapters(features, recorded)
    return _of_adapters(zoo, recorded, chosen, threads, progress, opened)


def adapter_table(
    zoo: Zoo,
    recorded: Recorded,
    features: str | Sequence[str] = "default",
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = None,
) -> AdapterTable:
    """The same of an opened zoo, with what belongs to these features of pairs and no more.

    ``device``: from :func:`mergeprobe_fast.ops.open_device`; None: the CPU.
    """
    return _of_adapters(zoo, recorded, select(features, recorded), threads, progress, device)


def steps(zoo: Zoo, chosen: Selection, device: Any = None) -> int:
    """What ``progress`` adds up to: modules, once for every pass over the zoo.

    ``device``: from :func:`mergeprobe_fast.ops.open_device`; None: the CPU.
    """
    tiles = engine.passes.steps(zoo, chosen.features, device)
    return tiles + len(zoo.modules) * len(_that_read(chosen))


def _of_adapters(
    zoo: Zoo, recorded: Recorded, chosen: Selection, threads: int | None,
    progress: Callable[[int], None] | None, device: Any = None,
) -> AdapterTable:  # fmt: skip
    result = engine.run(
        zoo, [], threads=threads, progress=progress, device=device, pairs=False
    )
    found = family_values(
        zoo, chosen, recorded, result, of_pairs=False, of_adapters=True, threads=threads,
        progress=progress, device=device,
    )  # fmt: skip
    return _adapter_table(zoo, result, chosen, found.adapters)


def _that_read(chosen: Selection) -> list[str]:
    """The families that go over the zoo themselves; of two with one name, one is enough."""
    return list(dict.fromkeys(f.name for f in chosen.families if f.compute is not None))


def _pair_table(
    zoo: Zoo, result: engine.PassResult, chosen: Selection, found: Mapping[str, np.ndarray]
) -> PairTable:
    columns, clipped = dict(result.columns), result.clipped
    for family in chosen.families:
        for c in chosen.columns:
            if c in family.pairs:
                values = found[c.name]
                if c.bounded is not None:
                    low, high = c.bounded
                    clipped += int(np.count_nonzero((values < low) | (values > high)))
                    values = np.clip(values, low, high)
                columns[c.name] = values
    return PairTable(zoo.names, result.a, result.b, columns, clipped)


def _adapter_table(
    zoo: Zoo, result: engine.PassResult, chosen: Selection, found: Mapping[str, np.ndarray]
) -> AdapterTable:
    entries = zoo.table.entries
    columns: dict[str, list | np.ndarray] = {
        "name": np.array(zoo.names, dtype=object),
        "path": np.array([text(a.path) for a in zoo.adapters], dtype=object),
        "modules": np.array([len(a.modules) for a in zoo.adapters]),
        "rank": _ranks(entries, len(zoo)),
    }
    owner = entries["adapter"]
    sizes = np.array([m.d_out + m.d_in for m in zoo.modules])
    parameters = np.zeros(len(zoo), np.int64)
    np.add.at(parameters, owner, sizes[entries["module"]] * entries["rank"])
    columns["parameters"] = parameters
    widest = result.sigma.shape[1] * int(np.bincount(owner, minlength=len(zoo)).max(initial=0))
    spectra = {False: result.sigma}
    if any(f.numerical for f in chosen.adapters):
        kept = np.arange(result.sigma.shape[1])[None, :] < result.rank[:, None]
        spectra[True] = np.where(kept, result.sigma, 0.0)
    whole = {key: np.zeros((len(zoo), widest)) for key in spectra}
    for key, sigma in spectra.items():
        for i in range(len(zoo)):
            values = np.sort(sigma[owner == i].ravel())[::-1]
            whole[key][i, : len(values)] = values
    for f in chosen.adapters:
        columns[f.name] = f.finish(whole[f.numerical])
        if f.name != "norm":
            columns[f"{f.name}.mean"], columns[f"{f.name}.max"] = _over_modules(
                f.finish(spectra[f.numerical]), owner, len(zoo)
            )
    zero = np.bincount(owner[result.rank == 0], minlength=len(zoo))
    columns["zero_modules"] = zero
    for family in chosen.families:
        for c in family.adapters:
            if chosen.takes(c):
                columns[c.name] = found[c.name]
    return AdapterTable(columns)


def _ranks(entries: np.ndarray, count: int) -> np.ndarray:
    """Each adapter's rank, or its smallest and largest: "8", "4-8"."""
    low, high = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(low, entries["adapter"], entries["rank"])
    np.maximum.at(high, entries["adapter"], entries["rank"])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True)]
    return np.array(text, dtype=object)


def _over_modules(values: np.ndarray, owner: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Mean and largest over each adapter's modules, leaving out those that are zero (NaN)."""
    valid = ~np.isnan(values)
    number = np.bincount(owner[valid], minlength=count)
    total = np.bincount(owner[valid], weights=values[valid], minlength=count)
    largest = np.full(count, -np.inf)
    np.maximum.at(largest, owner[valid], values[valid])
    none = number == 0
    return (
        np.where(none, np.nan, total / np.where(none, 1, number)),
        np.where(none, np.nan, largest),
    )


def _adapter_profile(zoo: Zoo, result: engine.PassResult) -> np.ndarray:
    order = list(dict.fromkeys(m.layer for m in zoo.modules))
    layer = np.array([order.index(m.layer) for m in zoo.modules])
    entries = zoo.table.entries
    energy = np.zeros((len(zoo), len(result.layers)))
    np.add.at(
        energy, (entries["adapter"], layer[entries["module"]]), np.square(result.sigma).sum(1)
    )
    return np.sqrt(energy)
