"""How many adapters fit into one: what tier "capacity" trains and merges, one adapter a task."""

from __future__ import annotations

import random
from collections.abc import Iterable

from ..tasks.build import DOMAINS, TASKS
from .operators import CAPACITY_NAMES, CAPACITY_OTHERS, CUTS, ENTRIES, cut_name
from .plan import AdapterPlan, Exam, MergePlan
from .recipe import Recipe

SIZES = (2, 5, 10, 20)  # and all; every set is a part of the next
ORDERS = (0, 1)
_RANK, _STEPS, _ITEMS = 8, 100, 192
_CALIBRATED_SIZE = 20  # where other calibrations are tried too

EXAMS: dict[str, Exam] = {task: Exam(task, domain, (task,)) for task, domain in TASKS.items()}
ADAPTERS: dict[str, AdapterPlan] = {
    task: AdapterPlan(
        task, task,
        Recipe(domain, (task,), rank=_RANK, steps=_STEPS, seed=n, init_seed=n), _ITEMS,
    )
    for n, (task, domain) in enumerate(TASKS.items())
}  # fmt: skip


def order(seed: int) -> list[str]:
    """All tasks, shuffled, the domains taking turns as long as they have any."""
    rng = random.Random(f"capacity/{seed}")
    left = {d: rng.sample(of, len(of)) for d in rng.sample(DOMAINS, len(DOMAINS))
            if (of := [task for task in ADAPTERS if TASKS[task] == d])}  # fmt: skip
    return [tasks[n] for n in range(max(map(len, left.values())))
            for tasks in left.values() if n < len(tasks)]  # fmt: skip


def sets() -> list[tuple[str, ...]]:
    """The nested sets of both orders, members in the order of ``TASKS``; that of all only once."""
    found: dict[tuple[str, ...], None] = {}
    for seed in ORDERS:
        shuffled = order(seed)
        for size in (*SIZES, len(shuffled)):
            found[tuple(task for task in ADAPTERS if task in shuffled[:size])] = None
    return list(found)


def _ranks(name: str, members: Iterable[str]) -> list[int | None]:
    """The method's own rank, and the cuts: those that change nothing are left out."""
    whole = sum(ADAPTERS[member].recipe.rank for member in members)
    if name == "ties":  # of full rank whatever goes in, and cut already
        return [None, *(cut for cut in CUTS if cut < ENTRIES)]
    return [None, *(cut for cut in CUTS if cut < whole)]


def merges() -> dict[str, MergePlan]:
    """All merges of the capacity study, by key."""
    plans = [
        MergePlan(cut_name(name, rank), members, "capacity")
        for members in sets() for name in CAPACITY_NAMES for rank in _ranks(name, members)
    ]  # fmt: skip
    plans += [
        MergePlan(name, members, "capacity")
        for members in sets() if len(members) == _CALIBRATED_SIZE for name in CAPACITY_OTHERS
    ]  # fmt: skip
    return {plan.key: plan for plan in plans}
