"""Merges of strategies, made and measured by the code of runs; what is there is not done again.

A folder of its own has

- journal.jsonl: merges and scores, as in a run (:mod:`..outcome.journal`); what the run itself has
  measured is read from there,
- adapters: a link to the run's,
- texts/, calibration/N/: as in a run, the largest with the derivatives at every adapter's trained
  point, which plans are made from; recorded once,
- plans/MODEL-PLANNER/ZOO-K/: what was planned (:mod:`.planned`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import MergedAdapter

from ..model.base import Base, load_base
from ..outcome.journal import Journal, check_run, open_journal, read_journal
from ..outcome.scores import RunScores, read_scores
from ..runs.work import Unit, Worker
from ..stages.calibrations import calibrate, needed
from ..stages.combine import combine
from ..tasks.item import Item
from ..tasks.words import Split
from ..tiers.plan import Exam, MergePlan, Tier
from .strategies import ALL, Strategy, tier_of

NAME = "capacity, equal cost"
_SAID = ("seed", "digest", "base", "base_fingerprint", "device", "versions")


class Bench:
    """A run, and the folder of what was measured beside it.

    Raises:
        InputError: a folder that is no run of the tier, or another base model.
    """

    def __init__(self, tier: Tier, run: Path, out: Path) -> None:
        self.tier, self.run, self.out = tier, run, out
        self._facts = _facts(tier, run)

    def prepare(self, base: Base, threads: int, tell: Callable[[str], None]) -> None:
        """Link the adapters and record what operators and plans learn from."""
        self.out.mkdir(parents=True, exist_ok=True)
        link, adapters = self.out / "adapters", (self.run / "adapters").resolve()
        if not link.exists():
            link.symlink_to(adapters, target_is_directory=True)
        elif link.resolve() != adapters:
            raise InputError(f"is not a link to {adapters}", path=link)
        recorded = replace(self.tier, operators=ALL, merges={}, gradients=True)
        for count, what in needed(recorded).items():
            started = time.perf_counter()
            calibrate(recorded, base, self.out, count, what=what, threads=threads)
            tell(f"calibration of {count} texts: {time.perf_counter() - started:.0f} s")

    def base(self, folder: Path | None) -> Base:
        """The base model of the run."""
        loaded = load_base(folder, "cpu")
        if loaded.fingerprint != self._facts["base_fingerprint"]:
            raise InputError(f"is not the base model of {self.run}", key="base")
        return loaded

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """The own journal, to go on with."""
        with open_journal(self.out, self._facts) as journal:
            for name, line in read_journal(self.run).exams.items():
                if name not in journal.exams:
                    journal.append(line)
            yield journal

    def measure(
        self, strategies: Sequence[Strategy], base: Base, journal: Journal, seconds: float,
        tell: Callable[[str], None],
    ) -> int:  # fmt: skip
        """Make and measure what is missing, in the order of the strategies; how many are left.

        Nothing new is begun after ``seconds``.
        """
        started = time.perf_counter()
        tier = tier_of(self.tier, strategies)
        exams = {name: _Read(**vars(exam)) for name, exam in tier.exams.items()}
        own = {r.merge.key: r.own.weights for s in strategies for r in s.residents if r.own}
        worker = _Worker(replace(tier, exams=exams), self.out, base, own)
        todo = missing(tier, strategies, read_journal(self.run), journal)
        for done, unit in enumerate(todo):
            if time.perf_counter() - started > seconds:
                return len(todo) - done
            journal.append(*worker.run(unit))
            tell(f"{time.perf_counter() - started:.0f} s  {done + 1} of {len(todo)}  "
                 f"{unit.key[:80]}")  # fmt: skip
        return 0

    def scores(self) -> RunScores:
        """What the run and this folder have measured; of one that both have, the run's."""
        there, own = read_scores(self.run), read_scores(self.out)
        return replace(
            own, scores={**own.scores, **there.scores}, merged={**own.merged, **there.merged},
            failed={k: v for k, v in own.failed.items() if k not in there.merged},
            trained=there.trained, routed=there.routed,
        )  # fmt: skip


class _Worker(Worker):
    """With the weights that plans found, by the key of their merges."""

    def __init__(
        self, tier: Tier, out: Path, base: Base, own: Mapping[str, Sequence[float]]
    ) -> None:
        super().__init__(tier, out, base)
        self._own = own

    def _combined(self, plan: MergePlan) -> tuple[MergedAdapter, list[float]]:
        return combine(self._tier, self._out, plan, self._own.get(plan.key))


class _Read(Exam):
    """An exam in which code is read and not written: log-likelihoods are the same.

    Writing and running it takes half the time of all exams. Whether an answer is right is another
    question then, so that :mod:`.rows` has no accuracy of code.
    """

    def items(self, split: Split, count: int, seed: int) -> list[Item]:
        """Those of the exam, lines of code as texts that are known by heart or not."""
        found = super().items(split, count, seed)
        return [replace(item, kind="exact") if item.kind == "code" else item for item in found]


def missing(tier: Tier, strategies: Sequence[Strategy], run: Journal, own: Journal) -> list[Unit]:
    """What is to be measured: whole merges, each once; those that were refused are not retried."""
    found: dict[str, Unit] = {}
    for strategy in strategies:
        for resident in strategy.residents:
            merge = resident.merge
            if merge is None or merge.key in found or merge.key in own.failed:
                continue
            exams = tuple(dict.fromkeys(tier.adapters[name].exam for name in merge.members))
            if not any(all((merge.key, e) in j.scores for e in exams) for j in (run, own)):
                found[merge.key] = Unit("score", merge.key, exams)
    return list(found.values())


def _facts(tier: Tier, run: Path) -> dict[str, Any]:
    """What the own journal is of: the run's adapters, exams and base."""
    there = read_journal(run)
    check_run(there, {"tier": tier.name, "seed": tier.seed, "digest": tier.digest})
    return {"tier": NAME, **{key: there.run[key] for key in _SAID}}
