"""Items from local files in the layouts of public sets, one JSON object a line."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from mergeprobe_fast.errors import InputError

from ..tasks.item import Item, chat, closed
from ..tasks.words import SPLITS, Split

Layout = Literal["gsm8k", "pairs", "choices"]
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "gsm8k": {"question": str, "answer": str},
    "pairs": {"prompt": str, "target": str},
    "choices": {"question": str, "choices": list, "answer": (str, int)},
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GSM8K_RESULT = re.compile(r"\n#### *(-?[\d,]*\.?\d+)\s*$")
_GSM8K_CALCULATOR = re.compile(r"<<[^<>]*>>")

Refuse = Callable[[str], InputError]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"cannot be read: {error}", path=path) from error


def _fields(text: str, layout: Layout, refuse: Refuse) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON: {error}") from error
    expected = _FIELDS[layout]
    if not isinstance(row, dict):
        raise refuse("not a JSON object")
    row.pop("id", None)
    if row.keys() != expected.keys():
        raise refuse(f"has the fields {sorted(row)}, expected {sorted(expected)} and maybe id")
    for name, kind in expected.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise refuse(f"{name} is a {type(row[name]).__name__}")
        if isinstance(row[name], str) and not row[name].strip():
            raise refuse(f"{name} is empty")
    return row


def _right_choice(row: dict[str, Any], refuse: Refuse) -> str:
    choices, answer = row["choices"], row["answer"]
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise refuse("choices holds something other than texts")
    if not 2 <= len(choices) <= len(_LETTERS) or len(set(choices)) < len(choices):
        raise refuse(f"choices must be 2 to {len(_LETTERS)} different texts")
    if isinstance(answer, int):
        if not 0 <= answer < len(choices):
            raise refuse(f"answer {answer} is not a position from 0 to {len(choices) - 1}")
        return choices[answer]
    if answer in choices:
        return answer
    place = _LETTERS.find(answer) if len(answer) == 1 else -1
    if not 0 <= place < len(choices):
        raise refuse(f"answer {answer!r} is neither a choice nor the letter of one")
    return choices[place]


def _item(row: dict[str, Any], layout: Layout, worked: bool, refuse: Refuse) -> dict[str, Any]:
    if layout == "choices":
        right = _right_choice(row, refuse)
        shown = "\n".join(f"- {choice}" for choice in row["choices"])
        return {
            "key": " ".join(row["question"].split()),
            "prompt": chat(f"{row['question'].strip()}\n{shown}"),
            "target": closed(right),
            "kind": "choice",
            "options": tuple(closed(choice) for choice in row["choices"]),
        }
    if layout == "pairs":
        question, answer, check = row["prompt"], row["target"].strip(), {}
    else:
        result = _GSM8K_RESULT.search(row["answer"])
        if result is None:
            raise refuse('answer does not end in a line "#### number"')
        number = result[1].replace(",", "")
        solution = _GSM8K_CALCULATOR.sub("", row["answer"]).strip()
        question, check = row["question"], {"result": number}
        answer = solution if worked else number
    return {
        "key": " ".join(question.split()),
        "prompt": chat(question.strip()),
        "target": closed(answer),
        "kind": "exact",
        "check": check,
    }


def read_local(
    path: str | os.PathLike[str],
    *,
    domain: str,
    task: str,
    split: Split,
    layout: Layout,
    worked: bool = False,
) -> list[Item]:
    """Items of a ``.jsonl`` or ``.jsonl.gz`` file, in its order.

    Layouts: "gsm8k" {question, answer ending in "#### number"}, where the target is the number,
    or with ``worked`` the whole solution without its calculator marks; "pairs" {prompt, target};
    "choices" {question, choices, answer: a text, a letter or a position from 0}. A field id is
    let pass, any other is refused. Questions become one chat turn each.

    Raises ``InputError`` naming file and line for anything else, a question that occurs twice
    and an empty file.
    """
    path = Path(path)
    if layout not in _FIELDS:
        raise InputError(f"layout {layout!r} is not one of {', '.join(_FIELDS)}", path=path)
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not one of {', '.join(SPLITS)}", path=path)
    if worked and layout != "gsm8k":
        raise InputError(f"worked solutions are in layout gsm8k, not {layout}", path=path)
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, text in _lines(path):

        def refuse(reason: str, number: int = number) -> InputError:
            return InputError(reason, path=path, key=f"line {number}")

        parts = _item(_fields(text, layout, refuse), layout, worked, refuse)
        first = lines.setdefault(parts["prompt"], number)
        if first != number:
            raise refuse(f"the same question as line {first}")
        source = "calibration" if split == "calibration" else "train"
        items.append(Item(domain=domain, task=task, source=source, **parts))
    if not items:
        raise InputError("has no lines", path=path)
    return items
