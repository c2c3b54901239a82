"""The sizes of the benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from mergeprobe_fast.errors import InputError

from ..tasks.build import DOMAINS
from . import bank, capacity
from .operators import CAPACITY_OPERATORS, OPERATORS
from .plan import AdapterPlan, MergePlan, Tier
from .recipe import Recipe

_SMALL_OPERATORS = ("sum", "mean", "ties", "regmean-8")


def _adapters(roles: Sequence[tuple[str, Recipe]], items: int) -> dict[str, AdapterPlan]:
    """One of every domain's own exam for each role."""
    found = {}
    for domain in DOMAINS:
        for role, recipe in roles:
            name = f"{domain}-{role}"
            recipe = replace(recipe, domain=domain, tasks=bank.TASKS_OF[domain])
            found[name] = AdapterPlan(name, domain, recipe, items)
    return found


def _across(adapters: Iterable[AdapterPlan]) -> list[tuple[str, str]]:
    """All pairs of adapters of different domains."""
    return [(a.name, b.name) for a, b in combinations(adapters, 2)
            if a.recipe.domain != b.recipe.domain]  # fmt: skip


def _plans(
    operators: Iterable[str], members: Iterable[tuple[str, ...]], study: str
) -> list[MergePlan]:
    return [MergePlan(operator, names, study) for names in members for operator in operators]


def _used(merges: Iterable[MergePlan]) -> dict[str, MergePlan]:
    return {merge.key: merge for merge in merges}


def _ci(seed: int) -> Tier:
    adapters = _adapters([("cheap", Recipe("", steps=50))], items=128)
    return Tier(
        "ci", "2.5 minutes on two cores", seed,
        exams={domain: bank.EXAMS[domain] for domain in DOMAINS},
        adapters=adapters,
        operators={name: OPERATORS[name] for name in _SMALL_OPERATORS},
        merges=_used(_plans(_SMALL_OPERATORS, _across(adapters.values()), "pairs")),
        crossed=tuple(adapters), test_items=48, calibration_items=8,
    )  # fmt: skip


def _tiny(seed: int) -> Tier:
    adapters = _adapters(
        [("mid", Recipe("", steps=120)),
         ("small", Recipe("", rank=4, lr=1e-3, steps=120, seed=1, init_seed=1))], items=192,
    )  # fmt: skip
    fives = [tuple(f"{domain}-{role}" for domain in DOMAINS) for role in ("mid", "small")]
    return Tier(
        "tiny", "15 minutes on two cores (estimated)", seed,
        exams={domain: bank.EXAMS[domain] for domain in DOMAINS},
        adapters=adapters,
        operators={name: OPERATORS[name] for name in _SMALL_OPERATORS},
        merges=_used([*_plans(_SMALL_OPERATORS, _across(adapters.values()), "pairs"),
                      *_plans(_SMALL_OPERATORS, fives, "sets")]),
        crossed=fives[0], test_items=128, calibration_items=8,
    )  # fmt: skip


def _bank(seed: int) -> Tier:
    return Tier(
        "bank", "2 hours on two cores (estimated)", seed,
        exams=bank.EXAMS, adapters=bank.ADAPTERS, operators=OPERATORS, merges=bank.merges(),
        crossed=bank.CROSSED, gradients=True,
    )  # fmt: skip


def _capacity(seed: int) -> Tier:
    return Tier(
        "capacity", "half an hour on two cores (estimated)", seed,
        exams=capacity.EXAMS, adapters=capacity.ADAPTERS, operators=CAPACITY_OPERATORS,
        merges=capacity.merges(), test_items=64,
    )  # fmt: skip


def _small(seed: int) -> Tier:
    """Four adapters a domain in all layers of the base, three times as many steps."""
    roles = ("mid", "seed", "small", "long")
    adapters = {
        name: replace(plan, recipe=replace(plan.recipe, layers=(0, 29),
                                           steps=3 * plan.recipe.steps), items=640)
        for name, plan in bank.ADAPTERS.items()
        if plan.exam in DOMAINS and name.rpartition("-")[2] in roles
    }  # fmt: skip
    pairs = bank.shuffled(_across(adapters.values()))
    sets = [tuple(f"{domain}-{role}" for domain in DOMAINS) for role in roles]
    several = ("mean", "ties", "tsv_m", "regmean-48")
    merges = [*_plans(["sum"], pairs, "pairs"), *_plans(several, pairs[:40], "pairs"),
              *_plans(("sum", *several), sets, "sets")]  # fmt: skip
    return Tier(
        "small", "one GPU (not measured)", seed,
        exams={domain: bank.EXAMS[domain] for domain in DOMAINS}, adapters=adapters,
        operators={name: OPERATORS[name] for name in ("sum", *several)}, merges=_used(merges),
        crossed=sets[0], test_items=256,
    )  # fmt: skip


TIERS: dict[str, Callable[[int], Tier]] = {
    "ci": _ci, "tiny": _tiny, "bank": _bank, "capacity": _capacity, "small": _small,
}  # fmt: skip


def tier(name: str, *, seed: int = 0) -> Tier:
    """A size of the benchmark; ``seed`` draws its test items and calibration texts.

    Raises:
        InputError: no such size, a seed that is not an integer from 0.
    """
    if name not in TIERS:
        raise InputError(f"{name!r} is none of {', '.join(TIERS)}", key="tier")
    if type(seed) is not int or seed < 0:
        raise InputError(f"expected an integer from 0, got {seed!r}", key="seed")
    return TIERS[name](seed)
