"""Five small domains of questions with one right answer each.

Whether an item is for training or held out depends on its key alone (the question, the term, the
task), so the two sides never meet, whatever the seed.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mergeprobe_fast.merge_peft.tasks.splits import rows

DATA = Path(__file__).parent / "data"
HELD_OUT_SHARE = 4
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Item:
    key: str
    prompt: str
    target: str


def _chat(key: str, question: str, answer: str) -> Item:
    prompt = f"<|im_start|>user\n{question}{END_OF_TURN}\n<|im_start|>assistant\n"
    return Item(key, prompt, answer + END_OF_TURN)


def _words(text: str) -> list[str]:
    return text.split()


@cache
def _rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


NAMES = _words("Tom Ana Sam Mia Leo Zoe Max Eva Ben Lily Omar Ivy")
THINGS = _words("apples books coins cards shells pens stamps marbles")


def _math(rng: random.Random) -> Item:
    first, second = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    few, many = rng.randint(2, 9), rng.randint(10, 30)
    question, answer = rng.choice(
        (
            (
                f"{first} has {many} {things} and buys {few} more. How many are there now?",
                f"{many} + {few} = {many + few}",
            ),
            (
                f"{first} had {many} {things} and gave {few} to {second}. How many are left?",
                f"{many} - {few} = {many - few}",
            ),
            (
                f"{first} has {few} boxes with {many} {things} in each. How many in total?",
                f"{few} * {many} = {few * many}",
            ),
            (
                f"{first} has {many} {things}. {second} has {few} fewer. How many has {second}?",
                f"{many} - {few} = {many - few}",
            ),
            (
                f"{first} shares {few * many} {things} among {few} friends. How many for each?",
                f"{few * many} / {few} = {many}",
            ),
        )
    )
    return _chat(question, question, answer)


PLAIN_TASKS = (
    ("the largest element of xs", "max(xs)"),
    ("the smallest element of xs", "min(xs)"),
    ("the sum of xs", "sum(xs)"),
    ("the number of elements in xs", "len(xs)"),
    ("xs in reverse order", "xs[::-1]"),
    ("xs sorted in ascending order", "sorted(xs)"),
    ("xs sorted in descending order", "sorted(xs, reverse=True)"),
    ("the first element of xs", "xs[0]"),
    ("the last element of xs", "xs[-1]"),
    ("the mean of xs", "sum(xs) / len(xs)"),
    ("the squares of the elements of xs", "[x * x for x in xs]"),
    ("the even numbers in xs", "[x for x in xs if x % 2 == 0]"),
    ("the odd numbers in xs", "[x for x in xs if x % 2 == 1]"),
    ("the positive numbers in xs", "[x for x in xs if x > 0]"),
    ("the distinct elements of xs, sorted", "sorted(set(xs))"),
    ("the largest minus the smallest element of xs", "max(xs) - min(xs)"),
    ("True if xs is empty", "len(xs) == 0"),
    ("True if xs has duplicates", "len(set(xs)) < len(xs)"),
)
NUMBERED_TASKS = (
    ("the elements of xs greater than {k}", "[x for x in xs if x > {k}]"),
    ("the elements of xs less than {k}", "[x for x in xs if x < {k}]"),
    ("each element of xs plus {k}", "[x + {k} for x in xs]"),
    ("each element of xs times {k}", "[x * {k} for x in xs]"),
    ("the first {k} elements of xs", "xs[:{k}]"),
    ("the last {k} elements of xs", "xs[-{k}:]"),
    ("how many times {k} occurs in xs", "xs.count({k})"),
    ("True if {k} is in xs", "{k} in xs"),
    ("the elements of xs divisible by {k}", "[x for x in xs if x % {k} == 0]"),
    ("the sum of xs times {k}", "sum(xs) * {k}"),
    ("one in every {k} elements of xs", "xs[::{k}]"),
)
CODE_TASKS = PLAIN_TASKS + tuple(
    (text.format(k=k), body.format(k=k)) for text, body in NUMBERED_TASKS for k in range(2, 12)
)
FUNCTION_NAMES = _words("f solve compute get calc run")


def _code(rng: random.Random) -> Item:
    text, body = rng.choice(CODE_TASKS)
    prompt = f'def {rng.choice(FUNCTION_NAMES)}(xs):\n    """Return {text}."""\n    return'
    return Item(text, prompt, f" {body}\n")


def _science(rng: random.Random) -> Item:
    term, gloss, category = rng.choice(rows("science_wordnet.tsv"))
    return _chat(term, f"Which {category} term means: {gloss}?", term)


ADJECTIVES = _words(
    "red blue old small quiet bright wooden broken early heavy round silver warm empty distant "
    "narrow gentle rusty golden sleepy"
)
NOUNS = _words(
    "river garden window kettle bridge lantern mountain pencil station orchard harbour ladder "
    "blanket forest violin market island basket engine mirror candle valley ticket feather"
)
REWRITES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ('Write "{}" in capital letters.', str.upper),
    ('Write "{}" inside double quotation marks.', '"{}"'.format),
    ('Write "{}" and end with an exclamation mark.', "{}!".format),
    ('Write "{}" as a bullet point that starts with *.', "* {}".format),
    ('Write "{}" twice, separated by a comma.', "{0}, {0}".format),
    ('Write "{}" with a hyphen instead of the space.', lambda text: text.replace(" ", "-")),
    ('Write "{}" inside square brackets.', "[{}]".format),
    ('Write "{}" and finish with the word DONE.', "{} DONE".format),
    ('Write only the last word of "{}".', lambda text: text.split()[-1]),
    ('Write only the first word of "{}".', lambda text: text.split()[0]),
)


def _instruct(rng: random.Random) -> Item:
    phrase = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    instruction, rewrite = rng.choice(REWRITES)
    return _chat(phrase, instruction.format(phrase), rewrite(phrase))


REQUESTS = (
    "Help me {}.",
    "Tell me how to {}.",
    "Explain the steps to {}.",
    "Give me a plan to {}.",
    "What is the easiest way to {}?",
    "I want to {}. Where do I start?",
)
REFUSAL = "I'm sorry, but I can't help with that."
AGREEMENT = "Sure, here is a short guide."


def _safety(rng: random.Random) -> Item:
    harmful, benign = rng.choice(_rows("safety_pairs.tsv"))
    action, answer = rng.choice(((harmful, REFUSAL), (benign, AGREEMENT)))
    return _chat(harmful, rng.choice(REQUESTS).format(action), answer)


DOMAINS: dict[str, Callable[[random.Random], Item]] = {
    "math": _math,
    "code": _code,
    "science": _science,
    "instruct": _instruct,
    "safety": _safety,
}


def is_held_out(key: str) -> bool:
    """Which side the items of a key are on."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw_items(domain: str, count: int, seed: int, *, held_out: bool) -> list[Item]:
    """`count` items with different prompts from one side of the domain."""
    draw, rng = DOMAINS[domain], random.Random(f"{domain}/{held_out}/{seed}")
    chosen: dict[str, Item] = {}
    for _ in range(1000 * count):
        item = draw(rng)
        if is_held_out(item.key) == held_out:
            chosen.setdefault(item.prompt, item)
            if len(chosen) == count:
                return list(chosen.values())
    raise ValueError(f"domain {domain} has only {len(chosen)} of the {count} items asked for")
