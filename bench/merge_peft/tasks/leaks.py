"""Leaks between the splits of a benchmark, and answers that their options give away."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import combinations

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks.item import Item

# So many right answers in one place are a coincidence less than once in 10^9 at four options.
_SAME_PLACE = 16
_MARKUP = re.compile(r"<\|[^|>]*\|>(user|assistant|system)?")
_SHOWN = 100


def normalised(text: str) -> str:
    """Lower case words, numbers and signs of sums: no chat markup, accents or punctuation.

    A sign counts only before a digit, so "well-known" is two words and -3 is not 3.
    """
    plain = unicodedata.normalize("NFKD", _MARKUP.sub(" ", text)).casefold()
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+|[-+*/=<>](?=\s*-?\d)|(?<=\d)%", plain))


def _told(item: Item) -> str:
    prompt = item.prompt if len(item.prompt) <= _SHOWN else item.prompt[:_SHOWN] + "..."
    return f"{item.task} {item.key!r} ({prompt!r})"


def _options(item: Item) -> frozenset[str]:
    return frozenset(normalised(option) or option for option in item.options)


def _refuse_within(name: str, items: Sequence[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        twin = seen.setdefault(item.prompt, item)
        if twin is not item:
            raise InputError(f"the same prompt twice: {_told(item)}", key=name)
        if item.kind == "choice" and len(_options(item)) < len(item.options):
            raise InputError(f"the same option twice: {_told(item)}", key=name)
    for task in dict.fromkeys(item.task for item in items if item.kind == "choice"):
        asked = [item for item in items if item.task == task and item.kind == "choice"]
        places = {item.options.index(item.target) for item in asked}
        if len(asked) >= _SAME_PLACE and len(places) == 1:
            reason = f"{task}: all {len(asked)} right answers are option {places.pop() + 1}"
            raise InputError(reason, key=name)


def _refuse_shared(
    names: str, reason: str, one: Iterable[tuple[object, Item]], two: Iterable[tuple[object, Item]]
) -> None:
    first = dict(one)
    for identity, item in two:
        if identity in first:
            raise InputError(f"{reason}: {_told(first[identity])} and {_told(item)}", key=names)


def check_leaks(train: Sequence[Item], test: Sequence[Item], calibration: Sequence[Item]) -> None:
    """Raises ``InputError`` naming the items of the first leak, if there is one.

    Between any two splits: the same prompt, the same key of a task, prompts that are the same
    once case, punctuation and markup are gone (numbers are kept), and a choice among the same
    options with the same answer. Within a split: a prompt twice, an option twice in one item,
    and a task whose right answers (16 or more) all stand in the same place.
    """
    splits = {"train": train, "test": test, "calibration": calibration}
    for name, items in splits.items():
        _refuse_within(name, items)
    for (name, one), (other, two) in combinations(splits.items(), 2):
        names = f"{name} and {other}"
        for reason, identity in (
            ("the same prompt", lambda item: item.prompt),
            ("the same key", lambda item: (item.task, item.key)),
            ("nearly the same prompt", lambda item: normalised(item.prompt)),
        ):
            _refuse_shared(
                names, reason, ((identity(i), i) for i in one), ((identity(i), i) for i in two)
            )
        _refuse_shared(
            names,
            "the same options and answer",
            (((_options(i), i.target), i) for i in one if i.kind == "choice"),
            (((_options(i), i.target), i) for i in two if i.kind == "choice"),
        )
