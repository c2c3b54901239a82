"""Functions to finish in one line, judged by what they return."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial
from string import Template

from mergeprobe_fast.merge_peft.tasks import code_pool
from mergeprobe_fast.merge_peft.tasks.item import Item
from mergeprobe_fast.merge_peft.tasks.words import Split

POOLS = {
    "list": code_pool.LISTS,
    "string": code_pool.STRINGS,
    "number": code_pool.NUMBERS,
    "dict": code_pool.DICTS,
}
ARGUMENTS = {"list": "xs", "string": "s", "number": "n", "dict": "d"}
OTHER_ARGUMENTS = {
    "list": ("items", "values"),
    "string": ("text", "line"),
    "number": ("number", "amount"),
    "dict": ("table", "scores"),
}
FUNCTION_NAMES = ("f", "solve", "compute", "get", "calc", "run")
OTHER_FUNCTION_NAMES = ("helper", "answer", "make", "find_it")
HEADER = 'def {name}({argument}):\n    """Return {text}."""\n    return'
OTHER_HEADER = "def {name}({argument}):\n    # gives {text}\n    return"


@cache
def _tests(kind: str, body: str) -> tuple[tuple[str, str], ...]:
    """Arguments and result of the expression, a constant of code_pool, on every fitting input."""
    function = eval(f"lambda v: {Template(body).substitute(v='v')}")
    tests = []
    for source in code_pool.INPUTS[kind]:
        try:
            result = function(eval(source))
        except (LookupError, ValueError, ZeroDivisionError):
            # An empty list has no largest element, a table may lack a key.
            continue
        tests.append((f"({source},)", repr(result)))
    return tuple(tests)


def _function(kind: str, rng: random.Random, split: Split) -> Item:
    text, body = rng.choice(POOLS[kind])
    first, second = sorted(rng.sample(range(2, 10), 2))
    letter, other = rng.sample(code_pool.LETTERS, 2)
    # k is drawn from all of 2..9 where it stands alone.
    k = first if "$m" in text else rng.randint(2, 9)
    filled = {"k": k, "m": second, "c": letter, "e": other}
    text, body = (Template(part).safe_substitute(filled) for part in (text, body))
    if split == "calibration":
        argument = rng.choice(OTHER_ARGUMENTS[kind])
        header, name = OTHER_HEADER, rng.choice(OTHER_FUNCTION_NAMES)
    else:
        argument, header, name = ARGUMENTS[kind], HEADER, rng.choice(FUNCTION_NAMES)
    said, done = (Template(part).substitute(v=argument) for part in (text, body))
    return Item(
        domain="code",
        task=f"code.{kind}",
        key=text,
        prompt=header.format(name=name, argument=argument, text=said),
        target=f" {done}\n",
        kind="code",
        check={"tests": _tests(kind, body)},
        source="calibration" if split == "calibration" else "train",
    )


DRAWS: dict[str, Callable[[random.Random, Split], Item]] = {
    f"code.{kind}": partial(_function, kind) for kind in POOLS
}
