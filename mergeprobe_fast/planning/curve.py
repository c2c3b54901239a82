"""The plan at several floors: what is kept against how many adapters stay resident."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mergeprobe_fast.planning.costs import Costs
from mergeprobe_fast.planning.planner import Partition, Progress, finished, partition
from mergeprobe_fast.planning.result import Outcome

CURVE_FLOORS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
_CURVE_EFFORT = 6_000


def with_curve(
    found: Partition, names: Sequence[str], costs: Costs, actions: Sequence[str],
    resident: int | None, progress: Callable[[Progress], None] | None,
) -> tuple[Partition | None, list[tuple[float, Partition]]]:  # fmt: skip
    """The best plan of all floors that is allowed here, and one of every floor, high ones first.

    With a limit on ``resident`` adapters the plan is on no such line, and None comes back.
    """
    own = costs.least if resident is None else None
    floors = sorted({*CURVE_FLOORS, *([] if own is None else [own])}, reverse=True)
    points: list[tuple[float, Partition]] = []
    for floor in floors:
        at = found if floor == own else partition(
            found.book.judge, names, replace(costs, floor=floor), actions=actions, costly=0,
            effort=_CURVE_EFFORT, known=found, progress=progress,
        )  # fmt: skip
        # What a higher floor allows, a lower one does.
        if points and points[-1][1].cost < at.cost:
            before = points[-1][1]
            at = finished(at.book, before.ranks, at.proven)
        points.append((floor, at))
    return next((at for floor, at in points if floor == own), None), points


def outcomes(
    points: Sequence[tuple[float, Partition]], alone: Outcome, one_sum: Outcome | None
) -> tuple[Outcome, ...]:
    """What they keep and cost: all adapters resident, every floor's plan, one sum of all."""
    out = [alone]
    for floor, at in points:
        kept = np.concatenate([np.ones(1) if v is None else v.retention for v in at.verdicts])
        mean, worst = float(kept.mean()), float(kept.min())
        out.append(Outcome(len(at.groups), at.cost, mean, worst, floor))
    return (*out, *([] if one_sum is None else [one_sum]))
