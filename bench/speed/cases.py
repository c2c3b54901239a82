"""What a suite declares: cases, variants to interleave, targets; and running one case."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from harness import Clock, Samples, interleave, threads

OURS = "mergeprobe_fast"
CORE = "the core"  # a ceiling, not a rival


@dataclass(frozen=True)
class Target:
    """A bound on a number, and whether it is reached from above or from below."""

    value: float
    at_least: bool = True

    def met(self, number: float) -> bool:
        """Whether the number satisfies the bound."""
        return number >= self.value if self.at_least else number <= self.value


@dataclass(frozen=True)
class Variant:
    """One thing that is timed in a case.

    ``ratio`` of a variant is time(variant) / time(case.ours): how many times as fast ours is. With
    ``work`` (flops of one call) it is rate(ours) / rate(variant) instead. ``target`` bounds the
    ratio, ``time_target`` the seconds. ``factor`` multiplies its samples. ``extrapolated``: so
    does this or the callable itself, and ``note`` says how. ``most`` caps its repetitions.
    Without ``compare`` it is a number beside ours, not a rival of it.
    """

    name: str
    peer: str = OURS
    target: Target | None = None
    time_target: Target | None = None
    work: float | None = None
    factor: float = 1.0
    extrapolated: bool = False
    compare: bool = True
    most: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """A measured number that is not a time: an error, bytes, an exponent, a ratio of sums."""

    name: str
    value: float
    unit: str
    target: Target | None = None
    peer: str = OURS
    note: str = ""


Finish = Callable[[Mapping[str, Any], Mapping[str, float]], list[Fact]]


@dataclass
class Work:
    """A prepared case: what to call, and what to check afterwards.

    ``finish(results, medians)`` gets what the timed calls returned; it raises AssertionError when
    they disagree, and then no row is written. It returns further facts.
    """

    run: Mapping[str, Callable[[], Any]]
    finish: Finish


@dataclass(frozen=True)
class Case:
    """Variants that are interleaved with each other; the first is ours, the base of all ratios."""

    suite: str
    name: str
    threads: int
    clock: Clock
    repetitions: int
    variants: tuple[Variant, ...]
    prepare: Callable[[], AbstractContextManager[Work]]

    @property
    def ours(self) -> Variant:
        """What ratios are relative to."""
        return self.variants[0]

    @property
    def id(self) -> str:
        """Unique within a run."""
        return f"{self.suite}: {self.name}, {self.threads}T"


@dataclass
class Measured:
    """A case after its run: samples (factor applied), medians, ratios, facts."""

    case: Case
    samples: dict[str, list[float]]
    medians: dict[str, float]
    ratios: dict[str, float]
    facts: list[Fact] = field(default_factory=list)


def measure(case: Case) -> Measured:
    """Prepare, interleave, check, and only then report."""
    with case.prepare() as work:
        names = [v.name for v in case.variants]
        if set(work.run) != set(names):
            raise ValueError(f"{case.id}: {sorted(work.run)} are not {sorted(names)}")
        most = {v.name: v.most for v in case.variants if v.most is not None}
        with threads(case.threads):
            got: Samples = interleave(
                {n: work.run[n] for n in names}, case.repetitions, case.clock, most=most
            )
        factor = {v.name: v.factor for v in case.variants}
        samples = {n: [s * factor[n] for s in got.seconds[n]] for n in names}
        medians = {n: statistics.median(s) for n, s in samples.items()}
        facts = work.finish(got.results, medians)
    return Measured(case, samples, medians, _ratios(case, medians), facts)


def _ratios(case: Case, medians: Mapping[str, float]) -> dict[str, float]:
    ours, base = case.ours, medians[case.ours.name]
    out = {}
    for v in case.variants:
        if v.work is not None and ours.work is not None:
            out[v.name] = (ours.work / base) / (v.work / medians[v.name])
        else:
            out[v.name] = medians[v.name] / base
    return out
