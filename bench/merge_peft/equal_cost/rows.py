"""Rows of what was measured: one an adapter of every strategy whose merges are all there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.io.atomic_file import AtomicFile

from ..outcome.kept import kept
from ..outcome.noise import Bootstrap
from ..outcome.scores import Measured, RunScores
from ..report.operator_table import CLIP
from ..tiers.plan import BASE, Tier, single_key
from .strategies import Resident, Strategy

ROUTED = ("learned router", "learned router, training prompts")
NO_PLAN = (None, None, None)

UNREAD = "code"  # the domain whose answers were not run (:mod:`.measure`)
_ANSWERS = ("utility_base", "utility_single", "utility_merged", "retention", "retention_se",
            "accuracy_norm", "accuracy_norm_se")  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Found:
    """Strategies that were measured.

    Attributes:
        rows: zoo, adapters, allowed, partition, operator; resident, total_rank: of all residents;
            member, exam, domain, group: its number, group_size, merged_with: the operator, empty
            of a single one; predicted, low, high: of plans; and what ``outcome.kept`` finds, of an
            adapter that stays as it is of itself.
        draws: (rows, resamples): ll_norm within ``CLIP`` with items drawn anew, in the same way
            for an adapter wherever it is.
        failed: strategies with a merge that was refused, with the reason.
    """

    rows: list[Row]
    draws: np.ndarray
    failed: dict[tuple[str, int, str, str], str]


def collect(strategies: Iterable[Strategy], tier: Tier, run: RunScores) -> Found:
    """What the journals have of strategies; one that is not finished has no rows."""
    rows: list[Row] = []
    draws: list[np.ndarray] = []
    failed = {}
    judge = _Judge(tier, run)
    for s in strategies:
        keys = [merge.key for r in s.residents if (merge := r.merge)]
        refused = [run.failed[key]["reason"] for key in keys if key in run.failed]
        if refused:
            failed[s.zoo.name, s.allowed, s.partition, s.operator] = refused[0]
        if refused or not all(judge.has(r) for r in s.residents):
            continue
        rank = sum(run.merged[r.merge.key]["rank"] if r.merge else
                   run.trained[r.members[0]]["rank"] for r in s.residents)  # fmt: skip
        common = {"zoo": s.zoo.name, "adapters": len(s.zoo), "allowed": s.allowed,
                  "partition": s.partition, "operator": s.operator,
                  "resident": len(s.residents), "total_rank": rank}  # fmt: skip
        for number, resident in enumerate(s.residents):
            told = resident.predicted or (NO_PLAN,) * len(resident.members)
            for name, predicted in zip(resident.members, told, strict=True):
                numbers, drawn = judge.kept(name, resident)
                rows.append(common | {
                    "member": name, "exam": tier.adapters[name].exam,
                    "domain": tier.adapters[name].recipe.domain, "group": number,
                    "group_size": len(resident.members), "merged_with": resident.operator,
                    **dict(zip(("predicted", "low", "high"), predicted, strict=True)), **numbers,
                })  # fmt: skip
                draws.append(drawn)
    return Found(rows, np.array(draws), failed)


def routers(zoos: Mapping[str, Sequence[str]], run: RunScores, tier: Tier) -> list[Row]:
    """What routers keep with every adapter resident, of zoos that the run routed."""
    rows = []
    for line, scores in run.routed:
        for zoo, members in zoos.items():
            if line["operator"] not in ROUTED or {*line["members"]} != {*members}:
                continue
            name = next(m for m in members if tier.adapters[m].exam == line["exam"])
            found = kept(run.scores[BASE, line["exam"]], run.scores[single_key(name), line["exam"]],
                         scores, run.exams[line["exam"]], name, name)  # fmt: skip
            rows.append({"zoo": zoo, "operator": line["operator"], "member": name, **found})
    return rows


class _Judge:
    """What is left of each member; the same merge is looked at once."""

    def __init__(self, tier: Tier, run: RunScores) -> None:
        self._tier, self._run = tier, run
        self._known: dict[tuple[str, str], tuple[dict[str, Any], np.ndarray]] = {}

    def has(self, resident: Resident) -> bool:
        if resident.merge is None:
            return True
        key, exams = resident.merge.key, [self._tier.adapters[n].exam for n in resident.members]
        return key in self._run.merged and all((key, e) in self._run.scores for e in exams)

    def kept(self, name: str, resident: Resident) -> tuple[dict[str, Any], np.ndarray]:
        key = resident.merge.key if resident.merge else single_key(name)
        if (key, name) not in self._known:
            exam = self._tier.adapters[name].exam
            runs = [self._run.scores[of, exam] for of in (BASE, single_key(name), key)]
            asked = self._run.exams[exam]
            numbers = kept(*runs, asked, name, name)
            if asked.domain == UNREAD:
                numbers |= dict.fromkeys(_ANSWERS)
            draw = Bootstrap(asked.keys, asked.refuse, single_key(name))
            self._known[key, name] = numbers, np.clip(_draws(draw, *runs), *CLIP)
        return self._known[key, name]


def _draws(draw: Bootstrap, base: Measured, single: Measured, merged: Measured) -> np.ndarray:
    """ll_norm with other items: the ratio linearised, as its standard error has it."""
    low, high, left = (draw.mean(scores.loglik) for scores in (base, single, merged))
    ratio = (left - low).over(high - low)
    return np.full(len(low.draws), np.nan) if ratio is None else ratio.draws


def write(found: Found, path: Path) -> None:
    """The rows as a parquet; the same ones give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(found.rows)
    with AtomicFile(path, overwrite=True) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")
