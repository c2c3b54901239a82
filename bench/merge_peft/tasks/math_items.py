"""Seven kinds of sums with one right answer, written with its working where that helps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

from mergeprobe_fast.merge_peft.tasks.item import Item, chat, closed
from mergeprobe_fast.merge_peft.tasks.words import Split, words_of

# Sign of each step, and the story around it: {x}, {y}, {z} are numbers, {a}, {b} names, {t} things.
ONE_STEP = (
    ("+", "{a} has {x} {t} and buys {y} more. How many are there now?"),
    ("-", "{a} had {x} {t} and gave {y} to {b}. How many are left?"),
    ("*", "{a} has {y} boxes with {x} {t} in each. How many in total?"),
    ("-", "{a} has {x} {t}. {b} has {y} fewer. How many has {b}?"),
    ("/", "{a} shares {x} {t} among {y} friends. How many for each?"),
)
OTHER_ONE_STEP = (
    ("+", "There are {x} {t} on a table. {a} puts {y} more there. Count them."),
    ("-", "Out of {x} {t}, {a} loses {y}. What remains?"),
    ("*", "One bag holds {x} {t}. What do {y} such bags hold?"),
    ("/", "{x} {t} fill {y} equal bags. What is in one bag?"),
)
TWO_STEP = (
    ("+-", "{a} has {x} {t}, buys {y} more and gives {z} to {b}. How many are left?"),
    ("*+", "{a} has {y} boxes of {x} {t} and finds {z} more. How many in total?"),
    ("*-", "{a} buys {y} bags of {x} {t} and loses {z}. How many are left?"),
    ("/+", "{a} keeps one of {y} equal shares of {x} {t} and gets {z} more. How many has {a}?"),
    ("--", "{a} had {x} {t}, gave {y} to {b} and lost {z}. How many are left?"),
)
OTHER_TWO_STEP = (
    ("+-", "A shop stocks {x} {t}, receives {y} and sells {z}. What is in stock?"),
    ("*+", "{y} rows of {x} {t} and {z} extra lie on the floor. Count the {t}."),
    ("*-", "From {y} packs of {x} {t}, {a} takes {z} out. What remains?"),
    ("--", "Of {x} {t}, {a} takes {y} and {b} takes {z}. What remains?"),
)


def _item(task: str, key: str, question: str, answer: str, result: str, split: Split) -> Item:
    return Item(
        domain="math",
        task=f"math.{task}",
        key=key,
        prompt=chat(question),
        target=closed(answer),
        kind="exact",
        check={"result": result},
        source="calibration" if split == "calibration" else "train",
    )


def _apply(sign: str, left: int, right: int) -> int:
    return {
        "+": left + right,
        "-": left - right,
        "*": left * right,
        "/": left // right,
    }[sign]


def _story(rng: random.Random, split: Split, template: str, **numbers: int) -> str:
    words = words_of(split)
    a, b = rng.sample(words.names, 2)
    return template.format(a=a, b=b, t=rng.choice(words.things), **numbers)


def _operands(
    rng: random.Random, sign: str, split: Split, large: int = 20, small: int = 9
) -> tuple[int, int]:
    """A number of 10 to ``large``, and one of 2 to ``small``; products and quotients of 3 to 12.

    The first is above that for calibration.
    """
    low, high = (3, 12) if sign in "*/" else (10, large)
    if split == "calibration":
        low, high = high + 1, high + 15
    x, y = rng.randint(low, high), rng.randint(2, small)
    return (x * y, y) if sign == "/" else (x, y)


def one_step(rng: random.Random, split: Split) -> Item:
    sign, template = rng.choice(OTHER_ONE_STEP if split == "calibration" else ONE_STEP)
    x, y = _operands(rng, sign, split)
    result = _apply(sign, x, y)
    question = _story(rng, split, template, x=x, y=y)
    working = f"{x} {sign} {y}"
    return _item("one_step", working, question, f"{working} = {result}", str(result), split)


def two_step(rng: random.Random, split: Split) -> Item:
    signs, template = rng.choice(OTHER_TWO_STEP if split == "calibration" else TWO_STEP)
    x, y = _operands(rng, signs[0], split, large=20, small=4)
    middle = _apply(signs[0], x, y)
    z = rng.randint(2, min(middle - 1, 6))
    result = _apply(signs[1], middle, z)
    question = _story(rng, split, template, x=x, y=y, z=z)
    first, second = f"{x} {signs[0]} {y}", f"{signs[1]} {z}"
    answer = f"{first} = {middle}, {middle} {second} = {result}"
    return _item("two_step", f"{first} {second}", question, answer, str(result), split)


def percent(rng: random.Random, split: Split) -> Item:
    share = rng.randrange(10, 100, 10)
    if split == "calibration":
        whole = rng.randrange(160, 760, 10)
        template = "Compute {share} percent of {whole}."
    else:
        whole = rng.randrange(10, 151, 10)
        template = rng.choice(
            (
                "What is {share}% of {whole}?",
                "A tank of {whole} litres is {share}% full. How many litres are in it?",
                "{share}% of {whole} pupils walk to school. How many pupils walk?",
                "{a} has {whole} {t} and gives {share}% of them to {b}. How many does {b} get?",
            )
        )
    result = share * whole // 100
    answer = f"{whole} / 10 = {whole // 10}, {whole // 10} * {share // 10} = {result}"
    question = _story(rng, split, template, share=share, whole=whole)
    return _item("percent", f"{share}% of {whole}", question, answer, str(result), split)


def equation(rng: random.Random, split: Split) -> Item:
    factor, shift = rng.randint(2, 9), rng.randint(1, 9)
    if split == "calibration":
        unknown, letter = rng.randint(10, 20), "n"
        template = "Which number n fulfils {equation}?"
    else:
        unknown, letter = rng.randint(2, 9), "x"
        template = rng.choice(("Solve for x: {equation}", "Find x if {equation}."))
    sign = rng.choice("+-") if factor * unknown > shift else "+"
    right = _apply(sign, factor * unknown, shift)
    written = f"{factor}{letter} {sign} {shift} = {right}"
    answer = f"{factor}{letter} = {factor * unknown}, {letter} = {unknown}"
    key = f"{factor}x {sign} {shift} = {right}"
    question = template.format(equation=written)
    return _item("equation", key, question, answer, str(unknown), split)


def sequence(rng: random.Random, split: Split) -> Item:
    start, step = rng.randint(1, 60), rng.choice((2, 3, 4, 5, 10))
    if split == "calibration":
        start, step = rng.randint(61, 150), rng.choice((2, 3, 4, 5, 6, 10))
        template = "Continue with one number: {numbers}"
    else:
        template = rng.choice(("What comes next: {numbers}?", "Find the next number: {numbers}"))
    shown = ", ".join(str(start + step * place) for place in range(4))
    last = start + 3 * step
    question, result = template.format(numbers=shown), str(last + step)
    answer = f"{last} + {step} = {result}"
    return _item("sequence", shown, question, answer, result, split)


def gcd_lcm(rng: random.Random, split: Split) -> Item:
    common, (left, right) = rng.randint(2, 9), rng.sample(range(1, 8), 2)
    if split == "calibration":
        common, (left, right) = rng.randint(10, 20), rng.sample(range(2, 10), 2)
    left, right = left * common, right * common
    if rng.random() < 0.5:
        name, result = "greatest common divisor", math.gcd(left, right)
    else:
        name, result = "least common multiple", math.lcm(left, right)
    question = f"What is the {name} of {left} and {right}?"
    if split == "calibration":
        question = f"Give the {name}: {left}, {right}"
    key = f"{name} of {min(left, right)} and {max(left, right)}"
    return _item("gcd_lcm", key, question, str(result), str(result), split)


def clock(rng: random.Random, split: Split) -> Item:
    if split == "calibration":
        hour, minute = rng.randint(13, 20), rng.randint(1, 40)
        template = "A film starts at {time} and lasts {later} minutes. When does it end?"
    else:
        hour, minute = rng.randint(1, 12), rng.randrange(0, 50, 5)
        template = rng.choice(
            (
                "It is {time}. What time is it {later} minutes later?",
                "Add {later} minutes to {time}.",
            )
        )
    later = rng.randrange(5, 60 - minute, 1 if split == "calibration" else 5)
    time, result = f"{hour}:{minute:02d}", f"{hour}:{minute + later:02d}"
    question, working = template.format(time=time, later=later), f"{time} + {later}"
    return _item("clock", working, question, f"{working} = {result}", result, split)


DRAWS: dict[str, Callable[[random.Random, Split], Item]] = {
    "math.one_step": one_step,
    "math.two_step": two_step,
    "math.percent": percent,
    "math.equation": equation,
    "math.sequence": sequence,
    "math.gcd_lcm": gcd_lcm,
    "math.clock": clock,
}


def same_result(answer: str, result: str) -> bool:
    """Whether the last number or time of day in an answer is the result."""
    tokens = [token.strip(".,;!?()=$%").replace(",", "") for token in answer.split()]
    written = [token for token in tokens if any(character.isdigit() for character in token)]
    if not written:
        return False
    try:
        return Fraction(written[-1].rpartition("=")[2]) == Fraction(result)
    except (ValueError, ZeroDivisionError):
        return written[-1].rpartition("=")[2].lstrip("0") == result.lstrip("0")
