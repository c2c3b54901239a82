"""The library's view of a screen: features of adapters and of pairs, in one pass over the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import engine
from mergeprobe_fast.features import ADAPTER_FEATURES, Feature, select
from mergeprobe_fast.table import AdapterTable, PairTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo, text


@dataclass(frozen=True, eq=False)
class Screen:
    """Everything one pass gives."""

    zoo: Zoo
    features: list[Feature]
    adapters: AdapterTable
    pairs: PairTable
    layers: list[str]
    profile: np.ndarray  # (pairs, layers) cosine per layer
    adapter_profile: np.ndarray  # (adapters, layers) norm per layer


def screen(
    zoo: Zoo,
    features: str | Sequence[str | Feature] = "default",
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Screen:
    """Adapter and pair features and the per-layer profile of a zoo."""
    chosen = select(features)
    result = engine.run(zoo, chosen, profile=True, threads=threads, progress=progress)
    pairs = PairTable(zoo.names, result.a, result.b, result.columns, result.clipped)
    return Screen(
        zoo, chosen, _adapter_table(zoo, result), pairs, result.layers, result.profile,
        _adapter_profile(zoo, result),
    )  # fmt: skip


def pair_features(
    zoo: Zoo | Paths,
    features: str | Sequence[str | Feature] = "default",
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PairTable:
    """One row per pair of adapters of a zoo.

    Each feature is a column over the concatenated deltas of all modules, and ``<feature>.mean``,
    ``.max``, ``.min``, ``.p10``, ``.p90`` over the modules both adapters have (the mean weighted by
    the product of the two norms). NaN: undefined, because a delta is zero or a module is missing.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        features: "default", "all", names from ``mergeprobe_fast.FEATURES``, or declarations.

    Raises:
        InputError: an unknown feature, a file that changed, a factor that is not finite.
    """
    zoo, chosen = as_zoo(zoo), select(features)
    result = engine.run(zoo, chosen, threads=threads, progress=progress)
    return PairTable(zoo.names, result.a, result.b, result.columns, result.clipped)


def adapter_features(zoo: Zoo | Paths, *, threads: int | None = None) -> AdapterTable:
    """One row per adapter: size, norm and spectrum of its whole delta.

    Singular values of all modules together; ``<feature>.mean`` and ``.max`` are over modules.
    """
    zoo = as_zoo(zoo)
    return _adapter_table(zoo, engine.run(zoo, [], threads=threads))


def _adapter_table(zoo: Zoo, result: engine.PassResult) -> AdapterTable:
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
    per_module = {f.name: f.finish(result.sigma) for f in ADAPTER_FEATURES.values()}
    widest = result.sigma.shape[1] * int(np.bincount(owner, minlength=len(zoo)).max(initial=0))
    whole = np.zeros((len(zoo), widest))
    for i in range(len(zoo)):
        values = np.sort(result.sigma[owner == i].ravel())[::-1]
        whole[i, : len(values)] = values
    for name, f in ADAPTER_FEATURES.items():
        columns[name] = f.finish(whole)
        if name != "norm":
            columns[f"{name}.mean"], columns[f"{name}.max"] = _over_modules(
                per_module[name], owner, len(zoo)
            )
    zero = np.bincount(owner[result.rank == 0], minlength=len(zoo))
    columns["zero_modules"] = zero
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
