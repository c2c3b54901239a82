"""What MergeProbe plans for a zoo and a number of resident adapters, as a strategy."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast import planning
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.planning import Group, Plan, plan
from mergeprobe_fast.predict import RetentionPredictor
from mergeprobe_fast.predict.predictor import DEFAULT
from mergeprobe_fast.zoo import open_zoo

from ..stages.calibrations import calibration_folder
from ..stages.combine import adapter_folder, combine
from ..tiers.operators import CALIBRATION
from ..tiers.plan import MergePlan, Operator, Tier
from .partitions import Zoo, ordered
from .strategies import ALL, OURS, OWN, PLAN, REGMEAN, STUDY, Own, Resident, Strategy

PLAN_FILE = "plan.json"
_SAME = 1e-4  # of weights, relative: the calibrations have the same inputs, sums other last bits
_OPERATORS = {"merge": ("sum", "mean"), "reweight": ("minimax", "reweighted"),
              "prune": ("prune",), "regmean": (REGMEAN,)}  # fmt: skip


class Planner:
    """Plans of a model, each made once and kept as ``plans/MODEL-PLANNER/ZOO-K/plan.json``.

    PLANNER is a digest of its code: another planner makes other plans.

    Args:
        tier: of the run; the domain of an adapter is its exam.
        out: with adapters and a calibration.
        model: file of a predictor; None: the shipped one.
        make: make the plans that are not there.
        options: of :func:`mergeprobe_fast.planning.plan`, besides.
    """

    def __init__(
        self, tier: Tier, out: Path, model: Path | None, *, make: bool = True, **options: Any
    ) -> None:
        path = DEFAULT if model is None else model
        self.name = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self._folder = out / "plans" / f"{self.name}-{_planner_digest()}"
        self._tier, self._out, self._make, self._options = tier, out, make, options
        self._model = RetentionPredictor.load(path)
        self._operators = replace(tier, operators=ALL, merges={})
        self.refused: dict[tuple[str, int], str] = {}

    def strategies(self, zoos: Iterable[Zoo], tell: Callable[[str], None]) -> list[Strategy]:
        """Of every zoo and number of residents; ``refused`` says why there is none of others."""
        found = []
        for zoo in zoos:
            for allowed in zoo.residents:
                try:
                    made = self._plan(zoo, allowed, tell)
                except InputError as error:
                    self.refused[zoo.name, allowed] = str(error)
                    tell(f"{zoo.name}, {allowed} resident: {error}")
                    continue
                residents = [self._resident(group) for group in made.groups]
                at = {r.members: r for r in residents}
                groups = ordered(zoo.members, list(at))
                found.append(Strategy(zoo, allowed, OURS, PLAN, tuple(at[g] for g in groups)))
        return found

    def _plan(self, zoo: Zoo, allowed: int, tell: Callable[[str], None]) -> Plan:
        path = self._folder / f"{zoo.name}-{allowed}" / PLAN_FILE
        if path.is_file():
            made = Plan.load(path)
        elif not self._make:
            raise InputError("is not planned yet", path=path)
        else:
            started = time.perf_counter()
            made = plan(
                open_zoo([adapter_folder(self._out, name) for name in zoo.members]),
                calibration=calibration_folder(self._out, CALIBRATION),
                domains={name: self._tier.adapters[name].exam for name in zoo.members},
                model=self._model, resident=allowed, curve=False, threads=1, **self._options,
            )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
            tell(f"planned {zoo.name}, {allowed} resident: {time.perf_counter() - started:.0f} s")
        if {a.name for a in made.adapters} != {*zoo.members} or len(made.groups) > allowed:
            raise InputError(f"is no plan of zoo {zoo.name} for {allowed}", path=path)
        return made

    def _resident(self, group: Group) -> Resident:
        """The group with its members in the order of the run, as its own merges have them."""
        order = [n for n in self._tier.adapters if n in group.members]
        place = [group.members.index(name) for name in order]
        if not group.merged:
            return Resident(tuple(order))
        told = list(zip(group.retention, group.low, group.high, strict=True))
        weights = None if group.weights is None else tuple(group.weights[p] for p in place)
        name, own = self._operator(group, weights, order), None
        if not name:
            own = _own(group, weights or (1 / len(order),) * len(order))
            name = own.operator.name
        return Resident(tuple(order), name, tuple(told[p] for p in place), own)

    def _operator(
        self, group: Group, weights: tuple[float, ...] | None, order: Sequence[str]
    ) -> str:
        """The one of ``ALL`` that merges as the plan does; "" if none does."""
        if group.arguments:
            return ""
        for name in _OPERATORS[group.action]:
            operator = ALL[name]
            if weights is None:
                return name
            if operator.weights in ("one", "mean"):
                found = [1.0 if operator.weights == "one" else 1 / len(order)] * len(order)
            else:
                _, found = combine(self._operators, self._out,
                                   MergePlan(name, tuple(order), STUDY))  # fmt: skip
            if np.allclose(found, weights, rtol=_SAME, atol=_SAME):
                return name
        return ""


def _own(group: Group, weights: tuple[float, ...]) -> Own:
    """What a plan's group is merged with, by a name that no other has."""
    told = json.dumps([group.method, group.arguments, weights], sort_keys=True)
    name = f"{group.action}{OWN}{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    calibration = CALIBRATION if MERGE_METHODS[group.method].data else 0
    rank = group.arguments.get("rank")
    arguments = {key: value for key, value in group.arguments.items() if key != "rank"}
    operator = Operator(name, group.method, "mean", rank, arguments, calibration)
    return Own(operator, weights)


def _planner_digest() -> str:
    sources = sorted(Path(planning.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
