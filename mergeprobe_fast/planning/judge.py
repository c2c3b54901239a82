"""The judge of a real zoo: closed-form columns of merges, and a predictor of retention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merges import MergeTables, best_weights
from mergeprobe_fast.merging import MERGE_METHODS, merge
from mergeprobe_fast.planning.judging import Judged, padded
from mergeprobe_fast.predict.columns import score
from mergeprobe_fast.predict.predictor import UNCALIBRATED
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.merging.adapter import MergedAdapter
    from mergeprobe_fast.predict.predictor import Prediction, RetentionPredictor

# Weights that each action may take; of every set, those that leave most to the worst member.
WEIGHTS = {"merge": ("one", "mean"), "reweight": ("minimax", "reweighted")}
METHODS = {"merge": "linear", "reweight": "linear", "prune": "prune", "regmean": "regmean"}
_FOUND_BY_INPUTS = ("reweight", "prune", "regmean")
_AT_ONCE = 16  # merges whose factors are held at once


class PredictorJudge:
    """Judges sets of the adapters of a zoo.

    Args:
        tables: of :func:`mergeprobe_fast.merges.merge_tables`.
        predictor: of retention.
        early: the adapters are snapshots of unfinished training; then weights and merges that
            would have to be fitted to them are not available.
    """

    def __init__(
        self, tables: MergeTables, predictor: RetentionPredictor, *, early: bool = False
    ) -> None:
        self.tables, self.predictor, self.early = tables, predictor, early
        calibration = tables.recorded.calibration
        self._base: dict[str, Any] = {"base": tables.base_model, "fingerprint": tables.fingerprint}
        self.unavailable: dict[str, str] = {}
        for action in _FOUND_BY_INPUTS:
            if calibration is None:
                self.unavailable[action] = "a calibration"
            elif early:
                self.unavailable[action] = "finished adapters"
            elif METHODS[action] not in MERGE_METHODS:
                self.unavailable[action] = f"a merge method that does it ({METHODS[action]})"
        # Merges that cannot be made, by action and members: why.
        self.refused: dict[tuple[str, frozenset[int]], str] = {}
        # What mostly answers here, and how sure it is of itself: whatever does when every adapter
        # stands beside its neighbour.
        each = np.arange(len(tables.zoo), dtype=np.int32)
        ring = np.column_stack([each, np.roll(each, -1)])
        self._witness: dict[str, np.ndarray] = {}
        columns = tables.features(ring, np.ones(ring.shape))
        said = self._predict(columns)
        self.level, self.calibrated, self.reason = said.level, said.calibrated, said.reason
        self.coverage = float(said.coverage) if np.isfinite(said.coverage) else None
        self._witness = _witness(columns, said) if said.level == UNCALIBRATED else {}

    def judge(self, members: np.ndarray, action: str) -> Judged:
        """What ``action`` would leave of the members of sets, (sets, widest)."""
        if action in WEIGHTS:
            each = [_weights(self.tables, members, name) for name in WEIGHTS[action]]
            both = self.weighted(np.tile(members, (len(each), 1)), np.concatenate(each))
            parts = zip(*(np.split(getattr(both, f), len(each)) for f in _FIELDS), strict=True)
            return _better([Judged(*p) for p in parts], members)
        return self._merged(members, action)

    def weighted(self, members: np.ndarray, weights: np.ndarray) -> Judged:
        """What sums with these ``weights`` would leave of the members of sets, (sets, widest)."""
        # A member that is zero on its own inputs has no best weights: nothing is known then.
        known = (np.isfinite(weights) | (members < 0)).all(axis=1, keepdims=True)
        columns = self.tables.features(members, np.nan_to_num(weights))
        columns = {n: np.where(known, values, np.nan) for n, values in columns.items()}
        return self._judged(columns, weights)

    def _merged(self, members: np.ndarray, action: str) -> Judged:
        unknown = np.full(members.shape, np.nan)
        out = Judged(*(unknown.copy() for _ in range(3)), np.zeros(members.shape, bool), unknown)
        for at in range(0, len(members), _AT_ONCE):
            found, rows = [], []
            for row in range(at, min(at + _AT_ONCE, len(members))):
                own = members[row][members[row] >= 0].tolist()
                merged = self._made(own, action)
                if merged is not None:
                    found.append((own, merged))
                    rows.append(row)
            if found:
                wide = {n: _widened(v, members.shape[1])
                        for n, v in self.tables.of_merged(found).items()}  # fmt: skip
                said = self._judged(wide, unknown[rows])
                for f in _FIELDS:
                    getattr(out, f)[rows] = getattr(said, f)
        return out

    def _made(self, members: Sequence[int], action: str) -> MergedAdapter | None:
        """The merge, or None where it is refused: of these members, nothing can be said then.

        A file of one of the adapters that cannot be read, or that changed, is no such refusal.
        """
        try:
            return self._run(members, action)
        except InputError as error:
            place = Path(error.path or "")
            if any(a.path == place or a.path in place.parents for a in self.tables.zoo):
                raise
            said = ": ".join(part for part in (error.key, error.reason) if part)
            self.refused[action, frozenset(members)] = said
            return None

    def _run(self, members: Sequence[int], action: str) -> MergedAdapter:
        recorded = self.tables.recorded
        zoo = Zoo([self.tables.zoo[i] for i in members], same_base=True)
        return merge(
            zoo, METHODS[action], dtype="F32", calibration=recorded.calibration,
            domains=[recorded.domains[i] for i in members], threads=self.tables.threads,
            device=self.tables.device,
        )  # fmt: skip

    def _judged(self, columns: dict[str, np.ndarray], weights: np.ndarray) -> Judged:
        said = self._predict(columns)
        count, shape = weights.size, weights.shape
        return Judged(*(getattr(said, f)[:count].reshape(shape) for f in _FIELDS[:4]), weights)

    def _predict(self, columns: dict[str, np.ndarray]) -> Prediction:
        asked = columns
        if self._witness:
            asked = {n: np.append(columns[n].ravel(), v) for n, v in self._witness.items()}
        return self.predictor.predict(asked, early=self.early, **self._base)


_FIELDS = ("retention", "low", "high", "outside", "weights")


def _witness(columns: dict[str, np.ndarray], said: Prediction) -> dict[str, np.ndarray]:
    """The column of the closed form that answers, with one row where it is known, to ask along.

    Of the closed forms the one that is known of most rows of a batch answers for all of it: sets
    without, judged by themselves, would get another scale than the rest. Fitted levels need none of
    this: they are chosen row by row.
    """
    form = next(n for n in columns if (w := score({n: columns[n]})[1]) and w in said.reason)
    known = columns[form][np.isfinite(columns[form])]
    return {form: known[:1] if known.size else np.full(1, np.nan)}


def _weights(tables: MergeTables, members: np.ndarray, name: str) -> np.ndarray:
    """(sets, widest) by the name of ``WEIGHTS``; NaN beyond a set."""
    there = members >= 0
    if name in ("one", "mean"):
        size = there.sum(axis=1, keepdims=True) if name == "mean" else 1
        return np.where(there, 1.0 / size, np.nan)
    return np.where(there, best_weights(tables, members, name), np.nan)


def _better(both: Sequence[Judged], members: np.ndarray) -> Judged:
    """Of every set the one that leaves most to the worst member; the first of equals."""
    there = members >= 0

    def rank(j: Judged) -> tuple[np.ndarray, np.ndarray]:
        known = np.where(there, np.isfinite(j.retention) & ~j.outside, True).all(axis=1)
        kept = np.where(there, np.nan_to_num(j.retention, nan=-np.inf), np.inf)
        return known, kept.min(axis=1)

    out = both[0]
    for other in both[1:]:
        (known, worst), (too, its) = rank(out), rank(other)
        takes = (too & ~known) | ((too == known) & (its > worst))
        fields = (np.where(takes[:, None], getattr(other, f), getattr(out, f)) for f in _FIELDS)
        out = Judged(*fields)
    return out


def _widened(values: np.ndarray, widest: int) -> np.ndarray:
    out = np.full((len(values), widest), np.nan)
    out[:, : values.shape[1]] = values
    return out


def open_judge(
    zoo: Zoo,
    recorded: Any,
    predictor: RetentionPredictor,
    *,
    early: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = None,
) -> PredictorJudge:
    """Read a zoo once and be ready to judge it; ``progress`` counts modules.

    ``device``: from :func:`mergeprobe_fast.ops.open_device`; None: the CPU.
    """
    from mergeprobe_fast.merges import merge_tables

    tables = merge_tables(zoo, recorded, threads=threads, progress=progress, device=device)
    return PredictorJudge(tables, predictor, early=early)


class ErrorJudge:
    """Retention taken to be 1 - e_i, the closed-form errors of CATALOGUE section 5; no predictor.

    E6 of the plain merge, E7 and E8 of weights, E9 of pruned atoms, and RegMean's, of the zoo and
    calibration of ``recorded``, which is needed. What the deterministic rule looks at.
    """

    level, calibrated, coverage = "calibration", False, None

    def __init__(self, tables: MergeTables) -> None:
        if tables.recorded.calibration is None:
            raise InputError("the errors of merges need one", key="calibration")
        self.tables, self.unavailable = tables, {}

    def judge(self, members: np.ndarray, action: str) -> Judged:
        """``1 - e_i`` of the members of sets."""
        if action in WEIGHTS:
            return _better([self._weighted(members, n) for n in WEIGHTS[action]], members)
        name = "pruned_retention" if action == "prune" else "regmean_retention"
        group = "pruned_retention_worst" if action == "prune" else "regmean_retention_worst"
        nothing = np.full(members.shape, np.nan)
        return self._judged(self._table(members, group).per_member(name), nothing)

    def leverage(self, members: Sequence[int]) -> np.ndarray:
        """How much of each member is a linear combination of the others, (members,)."""
        table = self._table(padded([tuple(members)]), "leverage_max")
        return table.per_member("leverage")[0]

    def _weighted(self, members: np.ndarray, name: str) -> Judged:
        from mergeprobe_fast.engine.sets import set_statistics

        weights, there = _weights(self.tables, members, name), members >= 0
        error = set_statistics(
            self.tables.totals, members, np.nan_to_num(weights), self.tables.domain_of,
            which=["retention"], threads=self.tables.threads,
        )["error"]  # fmt: skip
        known = (np.isfinite(weights) | ~there).all(axis=1, keepdims=True)
        return self._judged(np.where(known, 1 - error, np.nan), weights)

    def _table(self, members: np.ndarray, feature: str) -> Any:
        from mergeprobe_fast.sets import set_features

        recorded = self.tables.recorded
        return set_features(
            self.tables.zoo, [row[row >= 0].tolist() for row in members], features=[feature],
            calibration=recorded.calibration, domains=list(recorded.domains),
            threads=self.tables.threads, device=self.tables.device,
        )  # fmt: skip

    def _judged(self, retention: np.ndarray, weights: np.ndarray) -> Judged:
        none = np.full(retention.shape, np.nan)
        return Judged(retention, none, none, np.zeros(retention.shape, bool), weights)
