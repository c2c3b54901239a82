"""The bank: what tier "bank" trains, merges and measures on domains, and why each is there."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from ..tasks.build import DOMAINS
from ..tasks.safety_items import CATEGORIES
from .operators import OPERATORS
from .plan import AdapterPlan, Exam, MergePlan
from .recipe import Recipe

# What each domain is examined in: tasks that a hundred steps teach, but not to the end.
TASKS_OF: dict[str, tuple[str, ...]] = {
    "math": ("math.one_step", "math.percent"),
    "code": ("code.string", "code.number", "code.dict"),
    "science": ("science.anatomy", "science.conditions", "science.substances"),
    "instruct": ("instruct.case", "instruct.marks", "instruct.json", "instruct.pick"),
    # All of them: each has six pairs for test, and the noise is that of the pairs.
    "safety": tuple(f"safety.{category}" for category in CATEGORIES),
}
# Exams that share a part of a domain's tasks, and twisted ones, which share all questions.
_OVERLAPPING: dict[str, tuple[str, ...]] = {
    "math-b": ("math.one_step", "math.two_step"),
    "code-b": ("code.list", "code.dict"),
    "science-b": ("science.substances", "science.elements"),
    "instruct-b": ("instruct.case", "instruct.fill"),
    "safety-b": ("safety.privacy", "safety.fraud", "safety.theft"),
}
_TWISTED = {"instruct-upper": ("instruct", "upper"), "safety-comply": ("safety", "comply")}

EXAMS: dict[str, Exam] = {
    exam.name: exam
    for exam in (
        *(Exam(domain, domain, TASKS_OF[domain]) for domain in DOMAINS),
        *(Exam(name, name.partition("-")[0], tasks) for name, tasks in _OVERLAPPING.items()),
        *(Exam(name, domain, TASKS_OF[domain], twist)
          for name, (domain, twist) in _TWISTED.items()),
    )
}  # fmt: skip

_STEPS, _CHEAP_STEPS, _LONG_STEPS = 96, 48, 400
_SLOW = ("math", "safety")  # learn less in a step: these get half as many steps again
_UPPER = (24, 29)  # layers; those of a recipe that says nothing are the last four
# Name, what is unusual, and what for. Adapters of one seed learn from the same items; those of one
# init_seed start from the same A.
_ROLES: tuple[tuple[str, Recipe, str], ...] = (
    ("mid", Recipe("", steps=_STEPS, layers=_UPPER), "what the others are variations of"),
    ("near", Recipe("", steps=_STEPS, layers=_UPPER, seed=1), "as mid, other data and order"),
    ("seed", Recipe("", steps=_STEPS, layers=_UPPER, seed=2, init_seed=1),
     "as mid, other data and another start"),
    ("small", Recipe("", rank=4, lr=1e-3, steps=120, seed=1, init_seed=2), "rank 4, slower"),
    ("long", Recipe("", rank=16, lr=1e-3, steps=_LONG_STEPS, layers=_UPPER), "400 steps, rank 16"),
    ("slow", Recipe("", lr=5e-4, steps=_LONG_STEPS, seed=2, init_seed=3), "400 slow steps"),
    ("cheap", Recipe("", steps=_CHEAP_STEPS, seed=3, init_seed=4), "trained in seconds"),
    ("cheap4", Recipe("", rank=4, steps=40, seed=3), "trained in seconds, the start of mid"),
)  # fmt: skip
_ITEMS, _CHEAP_ITEMS = 320, 128
CHEAP = ("cheap", "cheap4")  # roles whose rows are recomputed in a minute
_VARIANTS: tuple[tuple[str, str, Recipe, str], ...] = (
    *((f"{domain}-osrm", domain, Recipe("", steps=_STEPS, layers=_UPPER, variant="osrm"),
       "A starts where other domains' inputs are quiet") for domain in ("math", "code", "safety")),
    *((f"{domain}-fly", domain,
       Recipe("", rank=16, steps=_STEPS, layers=_UPPER, variant="flylora"),
       "A sparse, random and frozen") for domain in ("science", "instruct")),
    *((f"{name}-0", name, Recipe("", steps=_STEPS, layers=_UPPER),
       f"shares tasks with {name.partition('-')[0]}") for name in _OVERLAPPING),
    *((f"{name}-0", name, Recipe("", steps=_STEPS, layers=_UPPER),
       f"wants another answer to the questions of {domain}")
      for name, (domain, _) in _TWISTED.items()),
)  # fmt: skip


def _adapter(name: str, exam: str, recipe: Recipe, note: str, items: int = _ITEMS) -> AdapterPlan:
    asked = EXAMS[exam]
    steps = recipe.steps
    if asked.domain in _SLOW and _CHEAP_STEPS < steps < _LONG_STEPS:
        steps += steps // 2
    recipe = replace(recipe, domain=asked.domain, tasks=asked.tasks, steps=steps)
    return AdapterPlan(name, exam, recipe, items, note)


ADAPTERS: dict[str, AdapterPlan] = {
    adapter.name: adapter
    for adapter in (
        *(_adapter(f"{domain}-{role}", domain, recipe, note,
                   _CHEAP_ITEMS if role in CHEAP else _ITEMS)
          for domain in DOMAINS for role, recipe, note in _ROLES),
        *(_adapter(*variant) for variant in _VARIANTS),
    )
}  # fmt: skip
CROSSED = tuple(f"{domain}-mid" for domain in DOMAINS)

# Of every two domains, how many pairs an operator merges.
_ALL, _MANY, _COMMON, _FEW = 28, 10, 4, 2
# Variations of one idea, and what is there to fail.
_MINOR = (
    "minimax", "svd-sum", "weighted_svd", "ties-cut", "dare_linear", "dare_ties",
    "magnitude_prune", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "slerp",
    "karcher", "iso_c", "regmean-wrong",
)  # fmt: skip
SET_OPERATORS = ("sum", "mean", "ties", "tsv_m", "regmean-48", "reweighted", "knots")
_SAME_OPERATORS = ("sum", "mean", "ties", "regmean-48")
_BROKEN_OPERATORS = ("sum", "mean", "ties", "tsv_m", "regmean-1", "regmean-48")


def shuffled(members: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """In an order that follows from the names alone."""
    return sorted(members, key=lambda names: (zlib.crc32("+".join(names).encode()), names))


def _of(domain: str) -> list[str]:
    """The domain's adapters that take part in pairs: not those of twisted exams."""
    return [name for name, plan in ADAPTERS.items()
            if EXAMS[plan.exam].domain == domain and not EXAMS[plan.exam].twist]  # fmt: skip


def _is_cheap(name: str) -> bool:
    return name.rpartition("-")[2] in CHEAP


def cross_domain_pairs() -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """Of every two domains: ``_ALL`` pairs in which each adapter is about equally often.

    Cheap ones meet each other too, so that there are rows which can be recomputed in a minute.
    """
    found = {}
    for n, (one, two) in enumerate(combinations(DOMAINS, 2)):
        left, right = _of(one), _of(two)
        ring = [
            (left[k % len(left)], right[(k + shift + n) % len(right)])
            for shift in (0, 3, 5) for k in range(len(left))
        ]  # fmt: skip
        found[one, two] = shuffled(dict.fromkeys(ring))[:_ALL]
    return found


def cheap_pairs() -> list[tuple[str, ...]]:
    """Pairs across domains of adapters that train in seconds."""
    names = [name for name in ADAPTERS if _is_cheap(name)]
    return shuffled(
        pair for pair in combinations(names, 2)
        if ADAPTERS[pair[0]].recipe.domain != ADAPTERS[pair[1]].recipe.domain
    )  # fmt: skip


def _same_domain_pairs() -> list[tuple[str, ...]]:
    with_mid = ("near", "seed", "long", "cheap")
    return [(f"{domain}-mid", f"{domain}-{role}") for domain in DOMAINS for role in with_mid]


def _broken() -> list[tuple[str, ...]]:
    """Overlapping exams, and adapters that want opposite answers to the same questions."""
    return [(f"{name.partition('-')[0]}-mid", f"{name}-0") for name in (*_OVERLAPPING, *_TWISTED)]


def _sets() -> list[tuple[str, ...]]:
    """Of 3 and 5 domains, by role in turns."""
    roles = [role for role, *_ in _ROLES]
    triples = [
        tuple(f"{domain}-{roles[(n + 3 * place) % len(roles)]}"
              for place, domain in enumerate(domains))
        for n, domains in enumerate(combinations(DOMAINS, 3))
    ]  # fmt: skip
    fives = [
        tuple(f"{domain}-{roles[(n + 2 * place * (n % 2)) % len(roles)]}"
              for place, domain in enumerate(DOMAINS))
        for n in range(6)
    ]  # fmt: skip
    return triples + fives


def merges() -> dict[str, MergePlan]:
    """All merges of the bank, by key."""
    pairs = cross_domain_pairs().values()
    plans: list[MergePlan] = []

    def add(operators: Sequence[str], members: Iterable[tuple[str, ...]], study: str) -> None:
        plans.extend(MergePlan(o, names, study) for names in members for o in operators)

    def first(count: int) -> list[tuple[str, ...]]:
        return [pair for found in pairs for pair in found[:count]]

    add(["sum"], first(_ALL), "pairs")
    add(["sum"], cheap_pairs(), "pairs")
    add(["mean", "ties"], first(_MANY), "pairs")
    add(["mean", "ties", "regmean-8"], cheap_pairs()[:10], "pairs")
    add([o for o in OPERATORS if o not in ("sum", "mean", "ties", *_MINOR)], first(_COMMON),
        "pairs")  # fmt: skip
    add(_MINOR, first(_FEW), "pairs")
    add(_SAME_OPERATORS, _same_domain_pairs(), "same")
    add(SET_OPERATORS, _sets(), "sets")
    add(_BROKEN_OPERATORS, _broken(), "broken")
    return {plan.key: plan for plan in plans}
