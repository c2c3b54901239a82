"""Whether an answer is right, by the kind of the item."""

from __future__ import annotations

from collections.abc import Sequence

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks import sandbox
from mergeprobe_fast.merge_peft.tasks.item import Item, answer_of
from mergeprobe_fast.merge_peft.tasks.math_items import same_result
from mergeprobe_fast.merge_peft.tasks.safety_items import refuses
from mergeprobe_fast.merge_peft.tasks.verifiers import verify


def candidate(item: Item, answer: str) -> str:
    """The function of a code item with the first line of an answer as its end."""
    lines = answer.strip().splitlines() or [""]
    return f"{item.prompt} {lines[0]}\n"


def _check_text(item: Item, answer: str) -> bool:
    text = answer_of(answer)
    if item.kind == "verify":
        return verify(item.check["verifier"], text, item.check["arguments"])
    if item.kind == "refusal":
        return bool(text) and refuses(text) == item.check["refuse"]
    if item.kind == "exact" and "result" in item.check:
        return same_result(text, item.check["result"])
    return " ".join(text.split()) == " ".join(answer_of(item.target).split())


def check(item: Item, answer: str) -> bool:
    """Whether ``answer`` is right, be it the target or another right answer.

    exact: the result at its end, or the very text. code: the first line, run in the sandbox.
    choice: the text of the right option. verify: its verifier. refusal: declines or not.
    """
    return check_many([item], [answer])[0]


def check_many(items: Sequence[Item], answers: Sequence[str]) -> list[bool]:
    """``check`` of every item with its answer; all code runs in one sandbox process."""
    if len(items) != len(answers):
        raise InputError(f"{len(items)} items but {len(answers)} answers")
    pairs = list(zip(items, answers, strict=True))
    code = [(candidate(item, answer), item.check["tests"]) for item, answer in pairs
            if item.kind == "code"]  # fmt: skip
    verdicts = iter(sandbox.run_many(code))
    return [
        next(verdicts) if item.kind == "code" else _check_text(item, answer)
        for item, answer in pairs
    ]
