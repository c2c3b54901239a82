"""Planning a whole zoo: what to merge and how, what to route, what it costs, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from os.path import abspath
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import text
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.planning.book import Book, Set
from mergeprobe_fast.planning.costs import Costs, load_costs
from mergeprobe_fast.planning.curve import outcomes, with_curve
from mergeprobe_fast.planning.decision import refusals, unavailable
from mergeprobe_fast.planning.judge import METHODS, open_judge
from mergeprobe_fast.planning.judging import Judge
from mergeprobe_fast.planning.plan_types import ACTIONS, Group
from mergeprobe_fast.planning.planner import (
    COSTLY,
    EFFORT,
    Partition,
    Progress,
    check_actions,
    group_cost,
    partition,
)
from mergeprobe_fast.planning.result import Outcome, Plan, PlannedAdapter
from mergeprobe_fast.planning.unchanged import fingerprints
from mergeprobe_fast.planning.verdict import Verdict
from mergeprobe_fast.planning.words import group_reasons, list_of, poorer, routed_reasons
from mergeprobe_fast.table import PairTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

if TYPE_CHECKING:
    from mergeprobe_fast.predict import RetentionPredictor


def plan(
    zoo: Zoo | Paths,
    *,
    calibration: Any = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    probes: Any = None,
    at: float | None = None,
    model: RetentionPredictor | str | os.PathLike[str] | None = None,
    costs: Costs | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    actions: Sequence[str] = ACTIONS,
    measured: Any = None,
    curve: bool = True,
    effort: int = EFFORT,
    costly: int = COSTLY,
    resident: int | None = None,
    threads: int | None = None,
    reading: Callable[[int], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: Any = "cpu",
) -> Plan:
    """Which adapters of a zoo to merge, how, and which to route.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        calibration, domains: as :func:`mergeprobe_fast.merge` takes them; without one only plain
            merges can be judged.
        probes, at: judge every adapter by its snapshot at this share of training, by name.
        model: a predictor or its file; default: the shipped one.
        costs: :class:`.Costs`, their names and values, or a file of them.
        actions: those that may be used, of :data:`.ACTIONS`.
        measured: merges that were evaluated (:func:`.measure.read_measured`, or its file): what is
            predicted is fitted to them first.
        curve: plan at other floors, too.
        effort, costly, resident: as :func:`.partition` takes them.
        reading: called with the number of modules done since the last call.
        progress: called while planning.
        device: "cpu", "cuda", "cuda:1" or "auto", as :func:`mergeprobe_fast.pair_features` has it.

    Raises:
        InputError: what cannot be read, a cost or action that does not exist, too many adapters, an
            adapter without a snapshot, ``at`` without probes, no plan known to be allowed with so
            few ``resident``.
        BackendError: the device cannot be used here.
    """
    from mergeprobe_fast.recorded import open_recorded

    opened = open_device(device)
    check_actions(actions)
    if at is not None and probes is None:
        raise InputError("given without probes", key="at")
    zoo, chosen = as_zoo(zoo), as_costs(costs)
    chosen.shares(zoo.names)
    judged_zoo, early = (zoo, False) if probes is None else (_snapshots(zoo, probes, at), True)
    recorded = open_recorded(judged_zoo, calibration, domains)
    predictor = _predictor(model)
    with computing_on(opened):
        judge: Any = open_judge(judged_zoo, recorded, predictor, early=early,
                                threads=threads, progress=reading, device=opened)  # fmt: skip
    reason = judge.reason
    if measured is not None:
        from mergeprobe_fast.planning.fitted import fitted
        from mergeprobe_fast.planning.measure import Measured, read_measured

        known = measured if isinstance(measured, Measured) else read_measured(measured, zoo.names)
        judge = fitted(judge, known)
        reason = judge.reason
    where = None if recorded.calibration is None else text(abspath(recorded.calibration.path))
    domain_of = recorded.domains or (None,) * len(zoo)
    adapters = [
        PlannedAdapter(a.name, text(abspath(a.path)), domain, known)
        for a, domain, known in zip(zoo, domain_of, fingerprints(zoo, threads), strict=True)
    ]
    notes = (*(f"left out: {s.reason}" for s in zoo.skipped), *zoo.notes, *recorded.notes,
             *poorer(judge, recorded, predictor))  # fmt: skip
    with computing_on(opened):  # merges that learn from data are made to be judged
        return make_plan(
            judge, adapters, chosen, actions, base_model=zoo.base_model, calibration=where,
            reason=reason, early=early, notes=notes, curve=curve, effort=effort, costly=costly,
            resident=resident, progress=progress,
        )  # fmt: skip


def make_plan(
    judge: Judge,
    adapters: Sequence[PlannedAdapter],
    costs: Costs,
    actions: Sequence[str] = ACTIONS,
    *,
    base_model: str | None = None,
    calibration: str | None = None,
    reason: str = "",
    early: bool = False,
    notes: Iterable[str] = (),
    curve: bool = True,
    effort: int = EFFORT,
    costly: int = COSTLY,
    resident: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """A plan by any judge."""
    names = [a.name for a in adapters]
    highest = resident is not None and not costs.floor
    found = partition(judge, names, costs, actions=actions, effort=effort, costly=costly,
                      resident=resident, progress=progress)  # fmt: skip
    points: list[tuple[float, Partition]] = []
    if curve and len(names) > 1:
        at_floor, points = with_curve(found, names, costs, actions, resident, progress)
        found = at_floor or found
    book = found.book
    if costs.floor is None:
        # What a limit leaves is the floor that is kept to; no cost is negative.
        costs = replace(costs, floor=costs.least if resident is None else max(0.0, book.floor))
    groups = _groups(found, names, [names[i] for i in book.order])
    alone = [(i,) for i in range(len(names))]
    everyone = tuple(range(len(names)))
    one_sum = None
    if len(names) > 1 and "merge" not in judge.unavailable and "merge" in actions:
        one_sum = _one_sum(book, everyone)
    pairs, decided = _pairs(book, names), _decided(book)
    said = [*unavailable(book), *refusals(book, names)] if len(names) > 1 else []
    routed_cost = sum((group_cost(book, g) for g in alone), 0.0)
    kept = Outcome(len(names), routed_cost, 1.0, 1.0, 1.0)
    return Plan(
        tuple(adapters), base_model, calibration, costs, tuple(actions), groups, found.cost,
        routed_cost, one_sum, judge.level, judge.calibrated,
        judge.coverage, reason, early, found.proven, decided or len(names) < 2,
        dict(book.asked), (*notes, *said, *_unseen(found, groups)),
        outcomes(points, kept, one_sum) if points else (), pairs, book, resident, highest,
    )  # fmt: skip


def as_costs(costs: Any) -> Costs:
    """Costs as they are, from names and values, or from a file."""
    if costs is None or isinstance(costs, Costs):
        return costs or Costs()
    return load_costs(None, costs) if isinstance(costs, Mapping) else load_costs(costs)


def _predictor(model: Any) -> RetentionPredictor:
    from mergeprobe_fast.predict import RetentionPredictor

    if model is None:
        return RetentionPredictor.load_default()
    return model if hasattr(model, "predict") else RetentionPredictor.load(model)


def _snapshots(zoo: Zoo, probes: Any, at: float | None) -> Zoo:
    """The adapters of a zoo as they were early in their training."""
    from mergeprobe_fast.probes import Probes, find_probes

    runs = probes if isinstance(probes, Probes) else find_probes(probes)
    found = runs.match(zoo.names, at)
    for name, snapshot in zip(zoo.names, found, strict=True):
        if snapshot is None:
            raise InputError(f"none is named like {name!r}", key="probes")
    return Zoo([s.adapter for s in found], same_base=True, notes=zoo.notes)


def _groups(found: Partition, names: Sequence[str], ranked: Sequence[str]) -> tuple[Group, ...]:
    book = found.book
    labels, number = [], 0
    taken = set(names)
    for members in found.groups:
        if len(members) == 1:
            labels.append(names[members[0]])
            continue
        number += 1
        while f"merged-{number}" in taken:  # an adapter's own name
            number += 1
        labels.append(f"merged-{number}")
    groups = []
    for members, verdict, ranks, label in zip(
        found.groups, found.verdicts, found.ranks, labels, strict=True
    ):
        own = tuple(names[i] for i in members)
        cost = group_cost(book, ranks)
        if verdict is None:
            why = routed_reasons(book, ranks, found.ranks, labels, ranked)
            groups.append(Group(label, own, "route", retention=(1.0,), low=(1.0,), high=(1.0,),
                                cost=cost, reasons=why))  # fmt: skip
            continue
        groups.append(Group(
            label, own, verdict.action, METHODS[verdict.action], _weights(verdict), {},
            _numbers(verdict.retention), _numbers(verdict.low), _numbers(verdict.high), cost,
            group_reasons(book, ranks, ranked),
        ))  # fmt: skip
    return tuple(groups)


def _weights(verdict: Verdict) -> tuple[float, ...] | None:
    return _numbers(verdict.weights) if np.isfinite(verdict.weights).all() else None


def _numbers(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(v) if np.isfinite(v) else None for v in values)


def _one_sum(book: Book, everyone: Set) -> Outcome | None:
    """One plain merge of all, allowed or not."""
    book.effort = None  # one set more
    book.ask([everyone], ["merge"])
    verdict = book.verdict(everyone, "merge")
    if not verdict.known:
        return None
    lost = verdict.lost
    weighted = len(everyone) * float((book.shares * lost).sum())
    cost = book.costs.cost(1.0, weighted, float(lost.max()))
    return Outcome(1, cost, float(verdict.retention.mean()), verdict.worst, max(0.0, book.floor),
                   verdict.allowed)  # fmt: skip


def _decided(book: Book) -> bool:
    """Whether anything was predicted at all."""
    return any(v.known or v.allowed for s in book.known_sets() for v in book.verdicts(s))


def _unseen(found: Partition, groups: Sequence[Group]) -> list[str]:
    """A note where a floor of 0 let predictions count that are not to be relied on."""
    hit = [g.name for g, v in zip(groups, found.verdicts, strict=True) if v and v.outside.any()]
    if not hit:
        return []
    some = list_of(hit if len(hit) < 4 else [*hit[:3], f"{len(hit) - 3} more"])
    return [f"{some}: outside what the model has seen; the floor of 0 lets such predictions count"]


def _pairs(book: Book, names: Sequence[str]) -> PairTable:
    """What the best action leaves of both members of every pair."""
    rank = np.empty(len(names), np.int64)
    rank[book.order] = np.arange(len(names))
    both = list(combinations(range(len(names)), 2))
    out = {f"{what}_{side}": np.full(len(both), np.nan)
           for side in "ab" for what in ("retention", "low", "high")}  # fmt: skip
    action = np.full(len(both), None, object)
    allowed, outside = np.zeros(len(both), bool), np.zeros(len(both), bool)
    for row, (a, b) in enumerate(both):
        ranks = tuple(sorted((int(rank[a]), int(rank[b]))))
        verdict = book.closest(ranks)
        if verdict is None:
            continue
        action[row], allowed[row] = verdict.action, verdict.allowed
        outside[row] = verdict.outside.any()
        for side, adapter in (("a", a), ("b", b)):
            at = ranks.index(int(rank[adapter]))
            for what in ("retention", "low", "high"):
                out[f"{what}_{side}"][row] = getattr(verdict, what)[at]
    index = np.array(both, np.int64).reshape(-1, 2)
    features = {"action": action, "allowed": allowed, "outside": outside, **out}
    return PairTable(names, index[:, 0], index[:, 1], features)
