"""What is still to be done in a run, piece by piece, and about how long it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..outcome.journal import Journal
from ..stages import calibrations, routers
from ..tasks.item import Item
from ..tiers.plan import BASE, AdapterPlan, MergePlan, Tier, single_key
from .work import Unit

STAGES = ("train", "calibrate", "singles", "crossed", "routers", "merges")
FEATURES = "features"  # of merges, after all stages
# Seconds of one core (AVX-512, oneDNN), about, for SmolLM2-135M.
_LAYER = 0.002  # an item through a layer
_STEP = 0.0055  # forward and backward, an item of a step through a layer
_MERGE = 0.1  # a member
_DESCRIBE = 0.2  # a member of a merge that is made again for its features; sums are not
_SUM = 0.01
# Of an item of 50 tokens: answers beyond the first, and lines that are written token by token.
_KINDS = {"exact": 1.0, "verify": 1.0, "choice": 2.0, "refusal": 1.5, "code": 4.0}


@dataclass(frozen=True)
class RunPlan:
    """What a run is going to do: none of what is there already.

    Attributes:
        units: of the stages that workers do.
        calibrations: sequences an exam of each, and seconds.
        routed: the sets of adapters to route among, and seconds.
        described: merges whose features are to be written, and seconds.
        done: how many pieces of each stage are there.
    """

    units: dict[str, list[Unit]]
    calibrations: dict[int, float]
    routed: dict[tuple[str, ...], float]
    described: dict[str, float]
    done: dict[str, int]

    def seconds(self, stage: str | None = None) -> float:
        """Of one core, about; of all stages and features by default."""
        if stage is None:
            return sum(self.seconds(name) for name in (*STAGES, FEATURES))
        return sum(self._costs(stage))

    def count(self, stage: str) -> int:
        """Pieces that are left of a stage."""
        return len(self._costs(stage))

    def _costs(self, stage: str) -> list[float]:
        if stage == "calibrate":
            return list(self.calibrations.values())
        if stage == "routers":
            return list(self.routed.values())
        if stage == FEATURES:
            return list(self.described.values())
        return [unit.cost for unit in self.units[stage]]


def plan_run(
    tier: Tier, journal: Journal | None, items: dict[str, list[Item]], *,
    trained: Iterable[str] = (), calibrated: Iterable[int] = (),
    described: Iterable[str] | None = None, layers: int = 30,
) -> RunPlan:  # fmt: skip
    """What a journal does not have yet.

    ``items`` are the test items of each exam, ``trained`` the adapters and ``calibrated`` the
    calibrations whose folders are there, ``described`` the merges that have features (None: these
    are not to be written), ``layers`` those of the base model.
    """
    trained, scores = {*trained}, {} if journal is None else journal.scores
    merged = {} if journal is None else journal.merged
    known = {} if journal is None else journal.trained
    left = [a for name, a in tier.adapters.items() if name not in trained or name not in known]
    above = layers - tier.first_layer
    exam_cost = {
        name: sum(_KINDS[item.kind] for item in found) * above * _LAYER
        for name, found in items.items()
    }

    def score(key: str, exams: Iterable[str], adapter: str = "", members: int = 0) -> Unit | None:
        exams = tuple(e for e in dict.fromkeys(exams) if (key, e) not in scores)
        if not exams and (not members or key in merged):
            return None
        cost = sum(exam_cost[e] for e in exams) + members * _MERGE
        # Merges are not sorted by exam: their order is to be what it is.
        return Unit("score", key, exams, adapter, cost, "" if members else "+".join(exams))

    exams_of = {name: adapter.exam for name, adapter in tier.adapters.items()}
    singles = [score(BASE, [exam]) for exam in tier.exams]
    singles += [score(single_key(name), [exam], name) for name, exam in exams_of.items()]
    pairs = {(name, exams_of[other]): None for name in tier.crossed for other in tier.crossed}
    crossed = [
        score(single_key(name), [exam], name) for name, exam in pairs if exams_of[name] != exam
    ]
    merges = [
        score(key, [exams_of[name] for name in merge.members], members=len(merge.members))
        for key, merge in sorted(tier.merges.items(), key=lambda pair: _shuffled(pair[0]))
    ]
    recorded = calibrations.costs(tier, layers)
    routed = _routed(tier, journal)
    there = {*tier.merges} if described is None else {*tier.merges} & {*described}
    undescribed = {k: _describing(tier, m) for k, m in tier.merges.items() if k not in there}
    units = {
        "train": _by_texts(left, layers), "singles": _there(singles), "crossed": _there(crossed),
        "merges": _there(merges),
    }  # fmt: skip
    done = {
        "train": len(tier.adapters) - len(left),
        "calibrate": len({*recorded} & {*calibrated}),
        "singles": len(singles) - len(units["singles"]),
        "crossed": len(crossed) - len(units["crossed"]),
        "routers": len(routers.sets_of(tier)) - len(routed),
        "merges": len(merges) - len(units["merges"]),
        FEATURES: 0 if described is None else len(there),
    }
    still = {count: cost for count, cost in recorded.items() if count not in {*calibrated}}
    return RunPlan(units, still, routed, undescribed, done)


def _routed(tier: Tier, journal: Journal | None) -> dict[tuple[str, ...], float]:
    """The sets that routers have not chosen in, and what it takes to look at all prompts."""
    there = {} if journal is None else journal.routed
    left = [
        members for members in routers.sets_of(tier)
        if any((operator, members, tier.adapters[name].exam) not in there
               for operator in routers.ROUTERS for name in members)
    ]  # fmt: skip
    prompts = len(routers.exams_of(tier)) * (2 * tier.calibration_items + tier.test_items)
    return {members: prompts * tier.first_layer * _LAYER / len(left) for members in left}


def _describing(tier: Tier, merge: MergePlan) -> float:
    operator = tier.operators[merge.operator]
    return _SUM if operator.is_sum else _DESCRIBE * len(merge.members)


def _there(units: Iterable[Unit | None]) -> list[Unit]:
    return [unit for unit in units if unit is not None]


def _shuffled(key: str) -> bytes:
    """An order that has nothing to do with what is merged, so that any part is a fair sample."""
    return hashlib.sha256(key.encode()).digest()


def _by_texts(adapters: Sequence[AdapterPlan], layers: int) -> list[Unit]:
    """Trainings, those on the same texts one after the other, the longest such groups first."""
    groups: dict[tuple[Any, ...], list[Unit]] = {}
    for plan in adapters:
        recipe = plan.recipe
        texts = (plan.exam, plan.items, recipe.seed, recipe.layers[0])
        group = groups.setdefault(texts, [])
        cost = recipe.steps * recipe.batch * (layers - recipe.layers[0]) * _STEP
        if not group:  # what enters the layers is computed once
            cost += plan.items * recipe.layers[0] * _LAYER
        group.append(Unit("train", plan.name, cost=cost, shares=str(texts)))
    ordered = sorted(groups.values(), key=lambda group: -sum(unit.cost for unit in group))
    return [unit for group in ordered for unit in group]
