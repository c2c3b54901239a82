"""What the features of merges say of those that a run has measured, beside its labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import mergeprobe_fast
from mergeprobe_fast import __version__, _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.merge_columns import level_columns
from mergeprobe_fast.features.merge_declare import Level
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.merge_tables import MergeTables, merge_tables
from mergeprobe_fast.probes import find_probes
from mergeprobe_fast.recorded import Recorded, open_recorded
from mergeprobe_fast.zoo import Zoo

from ..stages.calibrations import calibration_folder
from ..stages.combine import adapter_folder, calibration_domains, combine
from ..tiers.plan import MergePlan, Operator, Tier
from .features import FINAL, largest_calibration, phase, snapshots_at
from .labels import ROUTING, read_labels
from .merge_feature_file import NAME, FeatureFile

EARLY = (0.05, 0.1)  # of training
_FIXED = ("one", "mean")  # weights that are known before anything is trained
_DEFINED_IN = ("merge_tables.py", "features/merge_columns.py", "features/merge_declare.py",
               "merging/span.py")  # fmt: skip


@_env.one_blas_thread()
def write_merge_features(
    run_dir: Path, tier: Tier, *, threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:  # fmt: skip
    """Write ``merge-features.parquet``: a row per row of labels.parquet that is of a merge.

    Columns: ``row`` as in the labels, ``made_from``, then float32, null where undefined:
    "final:error", of the trained weights, all columns of the richest level that the run's largest
    calibration allows (:func:`mergeprobe_fast.merge_features` has what they mean); and
    "at5%:error", "at10%:error", without points, of the snapshots of all members, for sums whose
    weights are known so early. Sums are read from inner products, with the weights that the labels
    have; every other merge is made again with them, as :func:`..stages.combine.combine` made it.
    The domain of an adapter is its exam, whatever its operator learnt from.

    What is there already is not computed again: rows whose ``made_from`` (a digest of the members'
    factors, their snapshots, the weights and the method) is the same, in a file whose metadata have
    the same ``digest`` (of the calibration, the columns, what defines them, and versions). The
    metadata also say the ``level`` and, as those of features.parquet, what is ``left_out``. Rows
    are written every two minutes and when anything interrupts, so that a file may have fewer than
    the labels; then call this again.

    Args:
        threads: the values are the same for any number.
        progress: called with the key of each merge that has been computed.

    Raises:
        InputError: labels that cannot be read, or of adapters or operators that the tier does not
            have; as ``merge_features`` and ``merge`` do.
    """
    run_dir, threads = Path(run_dir), _env.threads_or_default(threads)
    merges = _measured(run_dir / "labels.parquet", tier)
    names = sorted({name for m in merges for name in m.plan.members})
    run = _Run(run_dir, tier, names)
    file = FeatureFile(
        run_dir / NAME, run.columns, {row: run.made_from(m) for m in merges for row in m.rows},
        {"level": run.level, "digest": run.digest, "left_out": json.dumps(run.left_out)},
    )  # fmt: skip
    todo = [m for m in merges if not all(row in file.values for row in m.rows)]
    try:
        if todo:
            _compute(run, todo, file, threads, progress or (lambda key: None))
    finally:
        if file.values or not todo:
            file.write()
    return file.path


@dataclass(frozen=True)
class _Measured:
    """A merge that has labels."""

    plan: MergePlan
    operator: Operator
    weights: tuple[float, ...]
    rows: dict[str, int] = field(default_factory=dict)  # of labels, and the place of its member

    @property
    def is_early(self) -> bool:
        """Whether it could be known before the end of training."""
        return self.operator.is_sum and self.operator.weights in _FIXED


def _measured(labels: Path, tier: Tier) -> list[_Measured]:
    """The merges that have rows, sorted by the first of them."""
    found: dict[str, _Measured] = {}
    for row in sorted(read_labels(labels), key=lambda row: row["row"]):
        if row["study"] == ROUTING:  # adapters side by side, nothing was merged
            continue
        operator = tier.operators.get(row["operator"])
        said = row["method"], row["rank"], row["calibration"]
        if operator is None or said != (operator.method, operator.rank, operator.calibration):
            reason = f"tier {tier.name} has no such operator {row['operator']!r}"
            raise InputError(reason, path=labels, key=row["row"])
        plan = MergePlan(row["operator"], tuple(row["members"]), row["study"])
        for name in plan.members:
            if name not in tier.adapters:
                raise InputError(f"tier {tier.name} has no such adapter", path=labels, key=name)
        given = tuple(row["weights"] or ())
        m = found.setdefault(plan.key, _Measured(plan, operator, given))
        if len(given) != len(plan.members) or given != m.weights:
            reason = f"expected {len(plan.members)} weights, the same in all its rows"
            raise InputError(reason, path=labels, key=row["row"])
        m.rows[row["row"]] = plan.members.index(row["member"])
    return list(found.values())


class _Run:
    """What the adapters of a run are described from, and what that depends on."""

    def __init__(self, folder: Path, tier: Tier, names: Sequence[str]) -> None:
        self.folder, self.tier, self._names = folder, tier, names
        self.zoo = Zoo([open_adapter(adapter_folder(folder, name), name=name) for name in names])
        self._domains = {name: tier.adapters[name].exam for name in names}
        self._digests: dict[Path, str] = {}
        largest = largest_calibration(folder / "calibration") if names else None
        self.recorded = open_recorded(self.zoo, largest, self._domains if largest else None)
        self.level: Level = "weights"
        if largest:
            self.level = "calibration" if self.recorded.points is None else "points"
        self.early: dict[str, tuple[Zoo, Recorded]] = {}
        self.left_out: dict[str, dict[str, int]] = {}
        if names and (folder / "probes").is_dir():
            self._find_snapshots()
        early: Level = "calibration" if largest else "weights"
        self.columns = (
            *(f"{FINAL}:{name}" for name in level_columns(self.level)),
            *(f"{prefix}:{name}" for prefix in self.early for name in level_columns(early)),
        )
        recorded = largest and self._bytes(largest)
        self.digest = _digest([__version__, _sources(), self.columns, recorded])

    def _find_snapshots(self) -> None:
        probes = find_probes(self.folder / "probes")
        for fraction in EARLY:
            chosen, self.left_out[phase(fraction)] = snapshots_at(probes, self._names, fraction)
            if chosen:
                # The points of a calibration are of trained weights, which nobody knows so early.
                calibration = self.recorded.calibration
                domains = tuple(self._domains[name] for name in chosen) if calibration else ()
                zoo = Zoo([snapshot.adapter for snapshot in chosen.values()])
                self.early[phase(fraction)] = zoo, Recorded(calibration, domains)

    def made_from(self, m: _Measured) -> str:
        """A digest of what the rows of a merge follow from, besides what ``digest`` has."""
        operator, members = m.operator, m.plan.members
        facts: dict[str, Any] = {
            "members": [[name, self._domains[name], self._factors[name]] for name in members],
            "weights": m.weights,
        }
        if m.is_early:
            facts["early"] = [[of.get(name) for name in members] for of in self._snapshots]
        if not m.operator.is_sum:
            facts |= {"method": operator.method, "rank": operator.rank,
                      "arguments": {**operator.arguments}}  # fmt: skip
            if operator.calibration:
                learnt = self._bytes(calibration_folder(self.folder, operator.calibration))
                facts["learnt"] = learnt, calibration_domains(self.tier, m.plan)
        return _digest(facts)[:32]

    @cached_property
    def _factors(self) -> dict[str, str]:
        return {adapter.name: fingerprint(adapter) for adapter in self.zoo}

    @cached_property
    def _snapshots(self) -> list[dict[str, str]]:
        return [{a.name: fingerprint(a) for a in zoo} for zoo, _ in self.early.values()]

    def _bytes(self, folder: Path) -> str:
        """A digest of all files of a calibration."""
        if folder not in self._digests:
            found = []
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                with path.open("rb") as stream:
                    of = hashlib.file_digest(stream, "sha256").hexdigest()
                found.append([path.relative_to(folder).as_posix(), of])
            self._digests[folder] = _digest(found)
        return self._digests[folder]


def _sources() -> list[str]:
    """Digests of what defines the columns: what their names mean must be the same, too."""
    package = Path(mergeprobe_fast.__file__).parent
    return [hashlib.sha256((package / name).read_bytes()).hexdigest() for name in _DEFINED_IN]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compute(
    run: _Run, todo: Sequence[_Measured], file: FeatureFile, threads: int,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    tables = merge_tables(run.zoo, run.recorded, threads=threads)
    assert tables.level == run.level, tables.level
    sums = [m for m in todo if m.operator.is_sum]
    if sums:
        found = {FINAL: _sums(tables, sums)}
        if any(m.is_early for m in sums):
            for prefix, (zoo, recorded) in run.early.items():
                known = merge_tables(zoo, recorded, threads=threads)
                found[prefix] = _sums(known, sums, lambda m: m.is_early)
        for at, m in enumerate(sums):
            file.add(m.rows, found, at)
            progress(m.plan.key)
    place = {name: i for i, name in enumerate(run.zoo.names)}
    for m in todo:
        if m.operator.is_sum:
            continue
        merged, _ = combine(run.tier, run.folder, m.plan, m.weights, threads=threads)
        members = [place[name] for name in m.plan.members]
        file.add(m.rows, {FINAL: tables.of_merged([(members, merged)])})
        file.write_now_and_then()
        progress(m.plan.key)


def _sums(
    tables: MergeTables, sums: Sequence[_Measured],
    wanted: Callable[[_Measured], bool] = lambda m: True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Columns (sums, widest); NaN for those that are not wanted, or of adapters that it lacks."""
    place = {name: i for i, name in enumerate(tables.zoo.names)}
    shape = len(sums), max(len(m.weights) for m in sums)
    members, weights = np.full(shape, -1, np.int32), np.zeros(shape)
    known = np.array([wanted(m) and place.keys() >= {*m.plan.members} for m in sums])
    for row in np.flatnonzero(known):
        m = sums[row]
        members[row, : len(m.weights)] = [place[name] for name in m.plan.members]
        weights[row, : len(m.weights)] = m.weights
    columns = {}
    for name, found in tables.features(members[known], weights[known]).items():
        columns[name] = np.full(shape, np.nan)
        columns[name][known] = found
    return columns
