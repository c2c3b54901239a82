"""Features of merges: what each would do to each of its members, before anything is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.engine.sets import set_statistics
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_tables import MergeTables, merge_tables
from mergeprobe_fast.merging.merge import merge
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.recorded import open_recorded
from mergeprobe_fast.sets import member_sets
from mergeprobe_fast.table import MergeTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

NAMED_WEIGHTS = ("one", "mean", "reweighted", "minimax")
_FOUND = NAMED_WEIGHTS[2:]  # by optimising


@dataclass(frozen=True)
class Merge:
    """A merge that could be made.

    Attributes:
        members: names or indices of adapters of a zoo.
        method: a name in ``mergeprobe_fast.MERGE_METHODS``; "cat" is the weighted sum itself.
        weights: one number per member; "one", "mean" (1/k each), "reweighted" or "minimax" (of
            :func:`mergeprobe_fast.set_features`, both need a calibration); None: the method's own.
        rank, arguments: as :func:`mergeprobe_fast.merge` takes them.
    """

    members: Sequence[str | int]
    method: str = "cat"
    weights: str | Sequence[float] | None = None
    rank: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_sum(self) -> bool:
        """Whether it is a weighted sum and nothing else."""
        return self.method == "cat" and self.rank is None and not self.arguments


def merge_features(
    zoo: Zoo | Paths,
    merges: Iterable[Merge | Sequence[str | int]],
    *,
    calibration: Calibration | Any = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = "cpu",
) -> MergeTable:
    """One row per merge and member: what the merge would do to it.

    With M the merge and W_i the update of member i, D = M - W_i is what the merge adds to it.
    Columns are of D, M and W_i (``mergeprobe_fast.features.merge_columns.MERGE_FEATURES`` has the
    definitions) and mean the same for every method, number of members and weights. Sums with
    weights are read from inner products of the adapters; other methods are run, in memory.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes; for what is known at 5 % of
            training, ``mergeprobe_fast.probes.find_probes(folder).zoo(0.05)``.
        merges: each a :class:`Merge`, or its members alone for their plain sum.
        calibration: from :func:`mergeprobe_fast.open_calibration`, or its folder: adds what happens
            on the inputs of each member's domain, and with points, to its loss. Methods that learn
            from data get it too.
        domains: the calibration domain of every adapter, in order or by name; by default what
            their names begin with.
        progress: called with the number of modules done since the last call, then of merges run.
        device: "cpu", "cuda", "cuda:1" or "auto", as :func:`mergeprobe_fast.pair_features` has it.

    Raises:
        InputError: an unknown adapter, method or name of weights, an adapter twice in one merge,
            weights that do not fit or need a calibration; and as ``merge`` does.
        BackendError: the device cannot be used here.
    """
    opened = open_device(device)
    zoo = as_zoo(zoo)
    recorded = open_recorded(zoo, calibration, domains)
    wanted = [m if isinstance(m, Merge) else Merge(m, weights="one") for m in merges]
    members = member_sets(zoo, [m.members for m in wanted])
    for row, m in enumerate(wanted):
        _check(m, f"merges[{row}]", recorded.calibration is None)
    with computing_on(opened):
        tables = merge_tables(zoo, recorded, threads=threads, progress=progress, device=opened)
    weights = _all_weights(tables, wanted, members)
    sums = np.array([m.is_sum for m in wanted])
    columns = tables.features(members, np.where(np.isnan(weights), 0.0, weights))
    others = np.flatnonzero(~sums)
    if len(others):
        found = []
        for row in others:
            found.append(_run(tables, wanted[row], members[row], weights[row]))
            if progress:
                progress(1)
        there = members[others] >= 0
        with computing_on(opened):
            judged = tables.of_merged(found)
        for name, values in judged.items():
            wide = np.full(there.shape, np.nan)
            wide[:, : values.shape[1]] = values
            columns[name][others] = wide
    methods = [m.method for m in wanted]
    return MergeTable(
        zoo.names, members, methods, weights, columns, tables.level, tables.base_model,
        tables.fingerprint,
    )  # fmt: skip


def _check(m: Merge, key: str, without_calibration: bool) -> None:
    if m.method not in MERGE_METHODS:
        raise InputError(f"no method {m.method!r}; there are: {', '.join(MERGE_METHODS)}", key=key)
    if isinstance(m.weights, str):
        if m.weights not in NAMED_WEIGHTS:
            known = ", ".join(NAMED_WEIGHTS)
            raise InputError(f"weights {m.weights!r} are none of {known}", key=key)
        if m.weights in _FOUND and without_calibration:
            raise InputError(f"{m.weights} weights need a calibration", key=key)


def _all_weights(
    tables: MergeTables, wanted: Sequence[Merge], members: np.ndarray
) -> np.ndarray:
    """(merges, widest); NaN beyond the members, and where the method takes its own."""
    out = np.full(members.shape, np.nan)
    for row, m in enumerate(wanted):
        k = int(np.count_nonzero(members[row] >= 0))
        given = m.weights
        if given is None:
            if not m.is_sum:
                continue
            given = "mean"
        if isinstance(given, str):
            if given in _FOUND:
                continue
            out[row, :k] = 1.0 if given == "one" else 1 / k
            continue
        try:
            own = np.asarray(given, np.float64)
        except (TypeError, ValueError):
            own = np.zeros(0)
        if own.shape != (k,) or not np.isfinite(own).all():
            raise InputError(f"expected {k} finite weights", key=f"merges[{row}]")
        out[row, :k] = own
    for name in _FOUND:
        rows = np.flatnonzero([isinstance(m.weights, str) and m.weights == name for m in wanted])
        if len(rows):
            out[rows] = best_weights(tables, members[rows], name)
    return out


def best_weights(tables: MergeTables, members: np.ndarray, which: str) -> np.ndarray:
    """Weights (sets, widest) that make the mean ("reweighted") or worst ("minimax") error least.

    NaN beyond a set, and where a member is zero on its own inputs.
    """
    found = set_statistics(
        tables.totals, members, np.where(members >= 0, 1.0, 0.0), tables.domain_of,
        which=[which], threads=tables.threads,
    )  # fmt: skip
    return found[f"{which}_weights"]


def _run(tables: MergeTables, m: Merge, members: np.ndarray, weights: np.ndarray):
    own = [int(i) for i in members if i >= 0]
    zoo = Zoo([tables.zoo[i] for i in own], same_base=True)
    recorded: dict[str, Any] = {}
    if tables.recorded.calibration is not None and MERGE_METHODS[m.method].data:
        recorded = {"calibration": tables.recorded.calibration,
                    "domains": [tables.recorded.domains[i] for i in own]}  # fmt: skip
    given = None if m.weights is None else weights[: len(own)].tolist()
    return own, merge(zoo, m.method, given, m.rank, dtype="F32", threads=tables.threads,
                      device=tables.device, **recorded, **m.arguments)  # fmt: skip
