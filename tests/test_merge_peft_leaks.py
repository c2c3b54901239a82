"""Leaks between splits are found and named; clean splits pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks import DOMAINS, Item, build, chat, closed
from mergeprobe_fast.merge_peft.tasks.leaks import check_leaks, normalised

SPLITS = ("train", "test", "calibration")


def item(key: str, question: str, **changes: object) -> Item:
    plain = Item(
        domain="d", task="t", key=key, prompt=chat(question), target=closed("a"), kind="exact"
    )
    return replace(plain, **changes)


def choice(key: str, options: tuple[str, ...], right: int = 0, question: str = "") -> Item:
    shown = tuple(closed(option) for option in options)
    return item(key, question or f"Which {key}?", kind="choice", options=shown, target=shown[right])


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_domains_have_no_leaks_and_a_planted_one_is_found(
    domain: str, rng: np.random.Generator
) -> None:
    seeds = rng.integers(2**31, size=3)
    parts = [
        build(domain, split=split, count=60, seed=int(seed))
        for split, seed in zip(SPLITS, seeds, strict=True)
    ]
    check_leaks(*parts)
    for source in range(3):
        for place in range(3):
            if source != place:
                planted = [list(part) for part in parts]
                planted[place].append(parts[source][int(rng.integers(60))])
                with pytest.raises(InputError, match="the same prompt"):
                    check_leaks(*planted)


@pytest.mark.parametrize(("one", "two"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (item("a", "How many?"), item("b", "How many?"), "the same prompt"),
        (item("a", "How many?"), item("a", "What number?"), "the same key"),
        (item("a", "How many, Tom?"), item("b", " how MANY -- tom "), "nearly the same prompt"),
        (item("a", "The café"), item("b", "the cafe\u0301."), "nearly the same prompt"),
        (
            choice("a", ("x", "y"), question="This?"),
            choice("b", ("Y", "x"), 1, question="That?"),
            "the same options and answer",
        ),
    ],
)
def test_a_leak_between_two_splits_names_both_items(
    first: Item, second: Item, reason: str, one: int, two: int
) -> None:
    parts: list[list[Item]] = [[item("x", "1?")], [item("y", "2?")], [item("z", "3?")]]
    check_leaks(*parts)
    parts[one].append(first)
    parts[two].append(second)
    with pytest.raises(InputError) as caught:
        check_leaks(*parts)
    assert reason in str(caught.value)
    assert f"{SPLITS[one]} and {SPLITS[two]}" in str(caught.value)
    assert repr(first.key) in str(caught.value) and repr(second.key) in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (item("a", "Tom has 3 pens."), item("b", "Tom has 4 pens.")),
        (item("a", "3 + 4"), item("b", "3 - 4")),
        (item("a", "-3 or so"), item("b", "3 or so")),
        (item("a", "At 1:23"), item("b", "At 12:3")),
        (item("a", "same key"), item("a", "other task", task="u")),
        (choice("a", ("x", "y")), choice("b", ("x", "y"), 1)),
        (choice("a", ("x", "y")), choice("b", ("x", "z"))),
    ],
)
def test_what_only_looks_alike_is_no_leak(first: Item, second: Item) -> None:
    check_leaks([first], [second], [])


def test_a_prompt_twice_or_an_option_twice_in_one_split_is_named() -> None:
    twice = [item("a", "How?"), item("b", "How?")]
    with pytest.raises(InputError, match="test: the same prompt twice"):
        check_leaks([], twice, [])
    with pytest.raises(InputError, match="train: the same option twice"):
        check_leaks([choice("a", ("x", "y", "X."))], [], [])


def test_right_answers_that_all_stand_in_one_place_are_named() -> None:
    same = [choice(f"k{n}", (f"a{n}", f"b{n}"), 1) for n in range(16)]
    with pytest.raises(InputError, match="all 16 right answers are option 2"):
        check_leaks([], [], same)
    check_leaks([], [], same[:15])
    check_leaks([], [], [*same, choice("other", ("a", "b"), 0)])


def test_normalising_keeps_words_numbers_and_signs() -> None:
    text = chat("Ünder 3,000 well-known  TERMS: x = -4.5 / 2 at 10:30?")
    assert normalised(text) == "under 3,000 well known terms x = - 4.5 / 2 at 10:30"
