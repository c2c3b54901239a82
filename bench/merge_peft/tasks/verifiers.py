"""Verifiers of the instruct domain: whether an answer keeps to what was asked, however it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergeprobe_fast.merge_peft.tasks.ifeval import instructions

Verifier = Callable[..., bool]


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def _bare(answer: str) -> str:
    """Without the quotation marks or full stop that a person would forgive."""
    text = " ".join(answer.split()).removesuffix(".")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return text.removesuffix(".").strip()


def says(answer: str, text: str) -> bool:
    """The very text, capitals included; quotation marks around it and a full stop are forgiven."""
    return _bare(answer) == text


def keeps(answer: str, text: str) -> bool:
    """The very text with its marks: nothing is forgiven but white space."""
    return " ".join(answer.split()) == text


def bullets(answer: str, texts: Sequence[str], mark: str) -> bool:
    """One line a text, in order, each after the mark and a space."""
    return _lines(answer) == [f"{mark} {text}" for text in texts]


def numbered(answer: str, texts: Sequence[str]) -> bool:
    """Lines "1. text", "2. text", ... in order; "1)" is as good."""
    lines = [re.fullmatch(r"(\d+)[.)] +(.*)", line) for line in _lines(answer)]
    found = [(int(line[1]), line[2]) for line in lines if line]
    return len(found) == len(lines) and found == list(enumerate(texts, start=1))


def json_object(answer: str, fields: Mapping[str, Any]) -> bool:
    """A JSON object with exactly these fields, in any order and spacing."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found == dict(fields)


def repeated(answer: str, word: str, times: int) -> bool:
    """The word so many times and no other; commas or lines may stand between."""
    return _words(answer) == [word] * times


def word_list(answer: str, words: Sequence[str]) -> bool:
    """These words in this order; commas, spaces or lines may stand between."""
    return _words(answer) == list(words)


def number(answer: str, value: int) -> bool:
    """The number, in digits or as a word up to ten, and no other."""
    names = "zero one two three four five six seven eight nine ten".split()
    found = _words(answer.lower())
    values = [names.index(word) if word in names else int(word) for word in found
              if word in names or word.isdecimal()]  # fmt: skip
    return values == [value]


VERIFIERS: dict[str, Verifier] = {
    verifier.__name__: verifier
    for verifier in (
        says, keeps, bullets, numbered, json_object, repeated, word_list, number,
    )
}  # fmt: skip

_OF_PUBLIC_SETS: dict[str, Verifier] = {"instructions": instructions}


def verify(name: str, answer: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the verifier of this name accepts the answer."""
    return (VERIFIERS | _OF_PUBLIC_SETS)[name](answer, **arguments)
