"""One question with its right answer and the way to check any other answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

END_OF_TURN = "<|im_end|>"

Kind = Literal["exact", "code", "choice", "verify", "refusal"]
KINDS: tuple[Kind, ...] = ("exact", "code", "choice", "verify", "refusal")


@dataclass(frozen=True)
class Item:
    """One item of a domain.

    ``key`` is what the question asks, whatever its wording: splits and leak checks go by it.
    ``prompt`` is the full text the model sees, chat markup included, and ``target`` the right
    answer as the model must write it, with its end (``END_OF_TURN``, or a newline after code).
    ``options`` are all answers of a choice or refusal item, the target among them. ``check`` is
    what the checker of this kind needs: the tests of a function, or a verifier's name and
    arguments. ``source`` says which templates wrote it.
    """

    domain: str
    task: str
    key: str
    prompt: str
    target: str
    kind: Kind
    options: tuple[str, ...] = ()
    check: Mapping[str, Any] = field(default_factory=dict)
    source: Literal["train", "calibration"] = "train"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if (self.kind in ("choice", "refusal")) != bool(self.options):
            raise ValueError(f"options go with choice and refusal items, not with {self.kind}")
        if self.options and self.target not in self.options:
            raise ValueError(f"the target {self.target!r} is not among the options")


def chat(question: str) -> str:
    """One user turn, up to where the assistant writes; no system turn."""
    return f"<|im_start|>user\n{question}{END_OF_TURN}\n<|im_start|>assistant\n"


def closed(answer: str) -> str:
    """An answer as the model must write it in a chat."""
    return answer + END_OF_TURN


def answer_of(text: str) -> str:
    """What a model wrote, up to its end of turn, without white space around it."""
    return text.split(END_OF_TURN, 1)[0].strip()
