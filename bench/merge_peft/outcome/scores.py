"""What the journal of a run measured, as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError

from .journal import Line, read_journal

_NEEDED = {
    "merged": ("study", "weights"),
    "routed": ("option_loglik", "accuracy", "seconds_per_prompt", "parameters"),
}


class Measured(NamedTuple):
    """One run over the n items of an exam, as ``stages.evaluate.Scores`` has them."""

    loglik: np.ndarray  # (n,) float64, nats a token
    option_loglik: np.ndarray  # (n,) float64
    correct: np.ndarray  # (n,) bool


@dataclass(frozen=True, eq=False)
class Asked:
    """The n test items of an exam: their domain, keys and which of them are to be refused."""

    domain: str
    twist: str
    keys: tuple[str, ...]
    refuse: np.ndarray


@dataclass(frozen=True, eq=False)
class RunScores:
    """The journal of a run.

    Attributes:
        facts: its first line: tier, seed, base, versions.
        exams: by name.
        trained: the line of each adapter.
        merged, failed: the line of each merge by key.
        scores: by (key, exam); the keys are "base", ``plan.single_key`` of adapters, and of merges.
        routed: lines of routers, each with its scores.
    """

    facts: Line
    exams: Mapping[str, Asked]
    trained: Mapping[str, Line]
    merged: Mapping[str, Line]
    failed: Mapping[str, Line]
    scores: Mapping[tuple[str, str], Measured]
    routed: tuple[tuple[Line, Measured], ...]


def read_scores(run_dir: str | os.PathLike[str]) -> RunScores:
    """All that the journal of a run says.

    Raises:
        InputError: there is none, a line cannot be used, or scores do not fit their exam.
    """
    journal = read_journal(run_dir)
    exams = {
        name: Asked(line["domain"], line["twist"], tuple(line["item_keys"]),
                    np.array(line["refuse"], np.int8))
        for name, line in journal.exams.items()
    }  # fmt: skip

    def measured(line: Line, told: str) -> Measured:
        if line["exam"] not in exams:
            raise InputError(f"{told}: no exam {line['exam']!r}", path=journal.path)
        n = len(exams[line["exam"]].keys)
        try:
            found = Measured(*(np.array(line[name], kind) for name, kind in
                               (("loglik", np.float64), ("option_loglik", np.float64),
                                ("correct", bool))))  # fmt: skip
        except (TypeError, ValueError) as error:
            raise InputError(f"{told}: {error}", path=journal.path) from None
        for name, values in found._asdict().items():
            if values.shape != (n,) or not np.isfinite(values).all():
                raise InputError(
                    f"{told}: expected {n} finite numbers, one an item", path=journal.path, key=name
                )
        return found

    routed = []
    for kind, lines in (("merged", journal.merged), ("routed", journal.routed)):
        for line in lines.values():
            _refuse_lacking(line, _NEEDED[kind], journal.path)
            if kind == "routed":
                routed.append((line, measured(line, f"{line['operator']} on {line['exam']}")))
    scores = {(key, exam): measured(line, f"{key} on {exam}")
              for (key, exam), line in journal.scores.items()}  # fmt: skip
    return RunScores(
        journal.run, exams, journal.trained, journal.merged, journal.failed, scores, tuple(routed)
    )


def _refuse_lacking(line: Mapping[str, Any], names: tuple[str, ...], path: Any) -> None:
    for name in names:
        if name not in line:
            raise InputError(f"a line of kind {line['kind']} has no {name}", path=path)
