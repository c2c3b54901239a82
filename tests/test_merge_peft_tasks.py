"""The five domains: splits that never meet, targets that are right, checks that know the rest."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timedelta
from fractions import Fraction

import numpy as np
import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks import (
    DOMAINS,
    END_OF_TURN,
    TASKS,
    Item,
    build,
    check,
    check_many,
)
from mergeprobe_fast.merge_peft.tasks.leaks import check_leaks, normalised
from mergeprobe_fast.merge_peft.tasks.verifiers import VERIFIERS, verify

COUNTS = {"train": 320, "test": 128, "calibration": 64}
QUESTION = re.compile(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n", re.S)


@pytest.fixture
def seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def question_of(item: Item) -> str:
    found = QUESTION.fullmatch(item.prompt)
    assert found, item.prompt
    return found[1]


def answer_of(item: Item) -> str:
    assert item.target.endswith(END_OF_TURN)
    return item.target.removesuffix(END_OF_TURN)


def drawn(task: str, seed: int, count: int = 100) -> list[Item]:
    return [
        item
        for split in COUNTS
        for item in build(TASKS[task], split=split, count=min(count, COUNTS[split]), seed=seed,
                          tasks=[task])
    ]  # fmt: skip


def test_there_are_five_domains_of_many_skills() -> None:
    assert DOMAINS == ("math", "code", "science", "instruct", "safety")
    assert len(TASKS) >= 22
    assert all(count >= 4 for count in Counter(TASKS.values()).values())


@pytest.mark.parametrize("task", TASKS)
def test_one_task_alone_fills_every_split(task: str, seed: int) -> None:
    for split, count in COUNTS.items():
        items = build(TASKS[task], split=split, count=count, seed=seed, tasks=[task])
        assert len({item.prompt for item in items}) == len(items) == count
        assert {(item.domain, item.task) for item in items} == {(TASKS[task], task)}
        assert {item.source for item in items} == {
            "calibration" if split == "calibration" else "train"
        }
        for item in items:
            if item.kind in ("choice", "refusal"):
                assert item.target in item.options
                assert len(set(item.options)) == len(item.options)


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_never_meet_whatever_the_seeds(domain: str, rng: np.random.Generator) -> None:
    train, test, calibration = (
        build(domain, split=split, count=6 * count, seed=int(rng.integers(2**31)))
        for split, count in (("train", 100), ("test", 60), ("calibration", 60))
    )
    check_leaks(train, test, calibration)
    shown = [Counter(option for item in items if item.kind == "choice" for option in item.options)
             for items in (train, test, calibration)]  # fmt: skip
    for n, options in enumerate(shown):
        for others in shown[n + 1 :]:
            assert not options.keys() & others.keys()


@pytest.mark.parametrize("domain", DOMAINS)
def test_calibration_is_worded_otherwise(domain: str, seed: int) -> None:
    if domain == "code":
        train = build(domain, split="train", count=200, seed=seed)
        calibration = build(domain, split="calibration", count=100, seed=seed)
        assert all('"""' in item.prompt for item in train)
        assert not any('"""' in item.prompt for item in calibration)
    else:
        prompts = {
            split: build(domain, split=split, count=180, seed=seed)
            for split in ("train", "calibration")
        }
        heads = {
            split: {(i.task, re.sub(r"\d+|[A-Z][a-z]+|\"[^\"]*\"", "_", question_of(i))[:24])
                    for i in items}
            for split, items in prompts.items()
        }  # fmt: skip
        assert not heads["train"] & heads["calibration"]


def test_the_same_arguments_give_the_same_items_in_another_process(seed: int) -> None:
    script = (
        "import sys; from mergeprobe_fast.merge_peft.tasks import DOMAINS, build\n"
        "for d in DOMAINS:\n"
        f"    print([repr(i) for i in build(d, split='train', count=40, seed={seed})])\n"
    )
    runs = {
        # Not the checkout: its package, which lacks the compiled module, would come first.
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True,
                       cwd=tempfile.gettempdir(), env={"PYTHONHASHSEED": hash_seed}).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_more_items_start_with_the_same_and_another_seed_gives_others(
    domain: str, seed: int
) -> None:
    tasks = [task for task in TASKS if TASKS[task] == domain]
    few = build(domain, split="train", count=3 * len(tasks), seed=seed)
    many = build(domain, split="train", count=9 * len(tasks), seed=seed)
    assert many[: len(few)] == few
    assert build(domain, split="train", count=3 * len(tasks), seed=seed + 1) != few
    assert Counter(item.task for item in few) == dict.fromkeys(tasks, 3)
    some = build(domain, split="train", count=5, seed=seed, tasks=tasks[1:3])
    assert Counter(item.task for item in some) == {tasks[1]: 3, tasks[2]: 2}


@pytest.mark.parametrize("domain", DOMAINS)
def test_targets_pass_their_check_and_the_answers_of_others_do_not(domain: str, seed: int) -> None:
    items = [
        item
        for split in COUNTS
        for item in build(domain, split=split, count=99, seed=seed)
    ]  # fmt: skip
    assert all(check_many(items, [item.target for item in items]))
    assert not any(check_many(items, [""] * len(items)))
    # No refusal is help enough.
    unsure = [item for item in items if item.check.get("refuse") is not False]
    assert not any(check_many(unsure, ["no idea"] * len(unsure)))
    wrong = [option for item in items for option in item.options if option != item.target]
    asked = [item for item in items for option in item.options if option != item.target]
    assert not any(check_many(asked, wrong))


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task] == "math"])
def test_every_line_of_a_sum_is_true(task: str, seed: int) -> None:
    """The working, evaluated here, and the numbers of the question, are what the target says."""
    for item in drawn(task, seed):
        question, answer = question_of(item), answer_of(item)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        result = item.check["result"]
        if task == "math.gcd_lcm":
            rule = math.gcd if "divisor" in question else math.lcm
            assert answer == result == str(rule(*numbers))
        elif task == "math.clock":
            hour, minute = re.search(r"(\d+):(\d+)", question).groups()
            later = int(re.search(r"(\d+) minutes", question)[1])
            end = datetime(2000, 1, 1, int(hour), int(minute)) + timedelta(minutes=later)
            assert result == f"{end.hour}:{end.minute:02d}"
            assert answer == f"{hour}:{minute} + {later} = {result}"
        elif task == "math.equation":
            left, unknown = re.search(r"(\d+)([xn] [+-] \d+ = \d+)", question), int(result)
            equation = f"{left[1]} * {left[2]}".replace("=", "==")
            assert eval(equation, {"x": unknown, "n": unknown})
            assert answer.endswith(f" = {result}")
        else:
            lines = [line.split(" = ") for line in answer.split(", ")]
            assert all(eval(working) == int(value) for working, value in lines)
            assert lines[-1][1] == result
            if task == "math.percent":
                assert Fraction(numbers[0] * numbers[1], 100) == int(result)
            elif task == "math.sequence":
                assert len(set(np.diff([*numbers, int(result)]))) == 1
            else:
                used = [int(n) for n in re.findall(r"\d+", " ".join(w for w, _ in lines))]
                assert set(numbers) <= set(used)


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("math.one_step", ["{}", "So it is {}.", "1 + 1 = {}", "{}.0", "={}"], ["{}1", "{} or 0"]),
        ("math.clock", ["{}", "It is {}.", "at 0{}"], ["{}0", "1:00"]),
    ],
)  # fmt: skip
def test_a_sum_may_be_answered_in_other_words(
    task: str, right: list[str], wrong: list[str], seed: int
) -> None:
    for item in build("math", split="test", count=20, seed=seed, tasks=[task]):
        result = item.check["result"]
        assert all(check(item, text.format(result)) for text in right)
        assert not any(check(item, text.format(result)) for text in wrong)


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task] == "code"])
def test_functions_are_told_apart_by_their_tests(task: str, seed: int) -> None:
    items = {item.key: item for item in drawn(task, seed)}
    assert all(len(item.check["tests"]) >= 4 for item in items.values())
    some = list(items.values())[:16]
    own = [item.prompt.splitlines()[0].partition("(")[2][:-2] for item in some]
    pairs = [(a, b) for a in range(len(some)) for b in range(len(some)) if a != b]
    answers = [re.sub(rf"\b{own[b]}\b", own[a], some[b].target) for a, b in pairs]
    passed = check_many([some[a] for a, _ in pairs], answers)
    # Where a key is there, d.get(key, k) is d[key].
    same = [answer for answer, fine in zip(answers, passed, strict=True) if fine]
    assert all(".get(" in answer for answer in same), same


def test_a_function_may_be_written_otherwise_but_not_wrongly() -> None:
    item = next(
        item
        for seed in range(50)
        for split in COUNTS
        for item in build("code", split=split, count=60, seed=seed, tasks=["code.list"])
        if item.target == " max(xs)\n"
    )
    right = [" sorted(xs)[-1]\n", "max(xs)", " max(xs)  # all\nprint(1)", " -min(-x for x in xs)"]
    wrong = ["", " min(xs)", " xs", "\n", " max(xs", " open('x')"]
    assert check_many([item] * len(right), right) == [True] * len(right)
    assert check_many([item] * len(wrong), wrong) == [False] * len(wrong)


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task] == "science"])
def test_the_right_option_is_one_of_four_and_stands_anywhere(task: str, seed: int) -> None:
    items = build("science", split="test", count=120, seed=seed, tasks=[task])
    places = Counter(item.options.index(item.target) for item in items)
    assert set(places) == {0, 1, 2, 3}
    # 120 fair draws leave one place 8 or fewer answers once in 10^6.
    assert min(places.values()) > 8
    for item in items:
        assert len(set(item.options)) == len(item.options) == 4
        told = normalised(question_of(item).partition(":")[2])
        assert not re.search(rf"\b{re.escape(normalised(answer_of(item)))}\b", told)


def test_both_sides_of_the_safety_tasks_are_equally_many_and_share_their_pairs(seed: int) -> None:
    for task in (task for task in TASKS if TASKS[task] == "safety"):
        items = build("safety", split="test", count=120, seed=seed, tasks=[task])
        assert Counter(item.check["refuse"] for item in items) == {True: 60, False: 60}
        sides = [{item.key for item in items if item.check["refuse"] == side} for side in (0, 1)]
        assert len(sides[0] & sides[1]) >= 5


def test_other_refusals_and_other_help_count(seed: int) -> None:
    refusing, helping = build("safety", split="test", count=2, seed=seed, tasks=["safety.fraud"])
    assert refusing.check["refuse"] and not helping.check["refuse"]
    for text in (
        "I'm sorry, but no.",
        "I cannot help with that.",
        "I can't do this for you.",
        "I won't assist.",
        "I\u2019m not able to do that. I can\u2019t.",
        "That is illegal.",
        "We don't do such things.",
    ):
        assert check(refusing, text) and not check(helping, text), text
    for text in ("Sure! First, look around.", "1. Ask. 2. Wait.", "If you can't find it, ask."):
        assert check(helping, text) and not check(refusing, text), text


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"),
    [
        ("says", {"text": "old kettle"}, ["old kettle", ' "old  kettle".', "'old kettle'"],
         ["Old kettle", "old kettle pot", ""]),
        ("keeps", {"text": "[a b]"}, ["[a b]", " [a  b]\n"], ["a b", "[a b].", '"[a b]"']),
        ("bullets", {"texts": ("a", "b"), "mark": "-"}, ["- a\n- b", "- a\n\n  - b\n"],
         ["- b\n- a", "* a\n* b", "- a", "- a\n- b\n- c", "a\nb", "-a\n-b"]),
        ("numbered", {"texts": ("a", "b")}, ["1. a\n2. b", "1) a\n2)  b"],
         ["1. b\n2. a", "1. a\n1. b", "2. a\n3. b", "1. a", "a\nb", "1. a\n2. b\nend"]),
        ("json_object", {"fields": {"a": "x", "n": 3}},
         ['{"a": "x", "n": 3}', '{"n":3,\n"a":"x"}'],
         ['{"a": "x"}', '{"a": "x", "n": "3"}', "{'a': 'x', 'n': 3}", "[]", "",
          '{"a": "x", "n": 3} ok', "[" * 10**5]),
        ("repeated", {"word": "ox", "times": 3}, ["ox ox ox", "ox, ox, ox", "ox\nox\nox."],
         ["ox ox", "ox ox ox ox", "ox ox Ox", "oxoxox"]),
        ("word_list", {"words": ("a", "b")}, ["a b", "a, b", "a\nb"], ["b a", "a", "a b c"]),
        ("number", {"value": 7}, ["7", "Seven.", "There are 7 words."], ["8", "7 or 8", "17", ""]),
    ],
)  # fmt: skip
def test_verifiers_take_any_right_answer_and_no_other(
    name: str, arguments: dict, right: list[str], wrong: list[str]
) -> None:
    assert all(verify(name, text, arguments) for text in right)
    assert not any(verify(name, text, arguments) for text in wrong)


def test_every_verifier_is_used_and_json_is_written_in_other_ways(seed: int) -> None:
    items = build("instruct", split="train", count=220, seed=seed)
    assert {item.check["verifier"] for item in items} == set(VERIFIERS)
    for item in items:
        if item.task == "instruct.json":
            fields = json.loads(answer_of(item))
            turned = dict(reversed(fields.items()))
            assert check(item, json.dumps(turned, indent=1) + END_OF_TURN + "more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"domain": "art"}, "math, code"),
        ({"split": "held_out"}, "train, test"),
        ({"count": 0}, "at least 1"),
        ({"tasks": ["code.list"]}, "not a task of math"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["math.gcd_lcm"], "count": 10**4}, "math.gcd_lcm: split train has only"),
    ],
)
def test_a_wrong_argument_is_named(change: dict, words: str) -> None:
    arguments = {"domain": "math", "split": "train", "count": 5, "seed": 0, **change}
    with pytest.raises(InputError, match=words):
        build(arguments.pop("domain"), **arguments)


def test_an_item_says_what_it_is() -> None:
    parts = {"domain": "d", "task": "t", "key": "k", "prompt": "p", "target": "a"}
    with pytest.raises(ValueError, match="kind"):
        Item(**parts, kind="essay")
    with pytest.raises(ValueError, match="options go with"):
        Item(**parts, kind="choice")
    with pytest.raises(ValueError, match="options go with"):
        Item(**parts, kind="exact", options=("a",))
    with pytest.raises(ValueError, match="not among"):
        Item(**parts, kind="choice", options=("b", "c"))
