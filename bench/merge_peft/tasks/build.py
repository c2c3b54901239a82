"""Items of a domain, drawn deterministically from one split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks import (
    code_items,
    instruct_items,
    math_items,
    safety_items,
    science_items,
)
from mergeprobe_fast.merge_peft.tasks.item import Item
from mergeprobe_fast.merge_peft.tasks.splits import split_of
from mergeprobe_fast.merge_peft.tasks.words import SPLITS, Split

_DRAWS: dict[str, Callable[[random.Random, Split], Item]] = {
    **math_items.DRAWS,
    **code_items.DRAWS,
    **science_items.DRAWS,
    **instruct_items.DRAWS,
    **safety_items.DRAWS,
}
# Their draws keep to the split's share of a data file by themselves.
_POOLED = frozenset(science_items.DRAWS) | frozenset(safety_items.DRAWS)
TASKS: dict[str, str] = {task: task.partition(".")[0] for task in _DRAWS}
DOMAINS: tuple[str, ...] = tuple(dict.fromkeys(TASKS.values()))
# So many draws without a new prompt mean that there is none.
_PATIENCE = 20_000


def _draw(task: str, split: Split, count: int, seed: int) -> list[Item]:
    """The first ``count`` prompts of a task; a longer draw starts with the same items.

    The two sides of a refusal task take turns.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    chosen: dict[str, Item] = {}
    waited = 0
    while len(chosen) < count and waited < _PATIENCE:
        waited += 1
        item = _DRAWS[task](rng, split)
        if task not in _POOLED and split_of(task, item.key) != split:
            continue
        if item.kind == "refusal" and item.check["refuse"] != (len(chosen) % 2 == 0):
            continue
        if chosen.setdefault(item.prompt, item) is item:
            waited = 0
    if len(chosen) < count:
        reason = f"split {split} has only {len(chosen)} prompts of the {count} asked for"
        raise InputError(reason, key=task)
    return list(chosen.values())


def build(
    domain: str, *, split: Split, count: int, seed: int, tasks: Sequence[str] | None = None
) -> list[Item]:
    """``count`` items of a domain, its ``tasks`` (all by default) taking turns.

    The same arguments give the same items. Which split a question belongs to depends on the
    question alone, so splits never meet whatever the seeds; calibration items are also worded
    otherwise, with other words and ranges of numbers. No prompt occurs twice.

    Raises ``InputError`` for an unknown domain, split or task, a count that is not positive, and
    where a task has fewer prompts than asked for.
    """
    if domain not in DOMAINS:
        raise InputError(f"domain {domain!r} is not one of {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    known = [task for task, its_domain in TASKS.items() if its_domain == domain]
    wanted = known if tasks is None else list(dict.fromkeys(tasks))
    for task in wanted:
        if task not in known:
            raise InputError(f"not a task of {domain}: {', '.join(known)}", key=task)
    if not wanted:
        raise InputError("tasks is empty", key=domain)
    share, extra = divmod(count, len(wanted))
    drawn = [
        _draw(task, split, share + (place < extra), seed)
        for place, task in enumerate(wanted)
        if share + (place < extra)
    ]
    return [item for item in chain.from_iterable(zip_longest(*drawn)) if item is not None]
