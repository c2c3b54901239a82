"""Public data sets: where their files are, and what item a row of each becomes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..tasks import ifeval
from ..tasks.item import Item, chat, closed
from ..tasks.safety_items import AGREEMENT, REFUSAL
from .code import LeftOut, humaneval, mbpp

Row = Mapping[str, Any]
Role = Literal["train", "test", "all"]

SOLUTION_TOKENS, ANSWER_TOKENS = 256, 512  # that a model may write: GSM8K, IFEval
_RESULT = re.compile(r"\n#### *(-?[\d,]*\.?\d+)\s*$")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class PublicSet:
    """A set as it is published.

    Attributes:
        domain: of its items.
        files: without their endings, and what each is for: "all" is cut into splits.
        fields: what a row must have, and of which type.
        item: what a row becomes; raises LeftOut where it cannot be one.
        hub, config, revision: where ``hub.fetch`` finds it, None: the newest.
        hub_splits: there, and the file that each becomes.
        role: of a single row, where the file alone does not say.
    """

    domain: str
    files: tuple[tuple[str, Role], ...]
    fields: Mapping[str, type]
    item: Callable[[Row], Item]
    hub: str
    hub_splits: tuple[tuple[str, str], ...]
    config: str | None = None
    revision: str | None = None
    role: Callable[[Row], Role | None] = lambda row: None


def _key(text: str) -> str:
    return " ".join(text.split())


def _gsm8k(row: Row) -> Item:
    """The solution in steps is the target; what the model writes is judged by its last number."""
    result = _RESULT.search(row["answer"])
    if result is None:
        raise LeftOut('answer does not end in a line "#### number"')
    return Item(
        domain="math", task="gsm8k", key=_key(row["question"]),
        prompt=chat(row["question"].strip()),
        target=closed(_CALCULATOR.sub("", row["answer"]).strip()), kind="exact",
        check={"result": result[1].replace(",", ""), "write": SOLUTION_TOKENS},
    )  # fmt: skip


def _choice(task: str, question: str, options: list[str], right: str) -> Item:
    """Options in an order of the question's own, so that no place is the right one."""
    if len({*options}) < len(options) or len(options) < 2 or not all(map(str.strip, options)):
        raise LeftOut("its options are not two or more different texts")
    options = sorted(options, key=lambda o: zlib.crc32(f"{question}/{o}".encode()))
    shown = "\n".join(f"- {option}" for option in options)
    return Item(
        domain="science", task=task, key=_key(question),
        prompt=chat(f"{question.strip()}\n{shown}"), target=closed(right), kind="choice",
        options=tuple(map(closed, options)),
    )  # fmt: skip


def _sciq(row: Row) -> Item:
    options = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
    return _choice("sciq", row["question"], options, row["correct_answer"])


def _arc(row: Row) -> Item:
    """Both layouts: of the authors (question.stem) and of the hub (choices beside it)."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
        pairs = [(c.get("label"), c.get("text")) for c in choices or ()]
    else:
        pairs = list(zip((choices or {})["label"], choices["text"], strict=True)) if choices else []
    if not isinstance(question, str) or not pairs:
        raise LeftOut("has no question with choices")
    by_label = dict(pairs)
    if row["answerKey"] not in by_label:
        raise LeftOut("its answer is none of its choices")
    return _choice("arc", question, [text for _, text in pairs], by_label[row["answerKey"]])


def _pair(task: str, question: str, more: str, answer: str) -> Item:
    """A free answer: its log-likelihood is what can be measured, hardly ever the very text."""
    if not question.strip() or not answer.strip():
        raise LeftOut("its question or its answer is empty")
    asked = f"{question.strip()}\n\n{more.strip()}".strip()
    return Item(
        domain="instruct", task=task, key=_key(asked), prompt=chat(asked),
        target=closed(answer.strip()), kind="exact",
    )  # fmt: skip


def _ifeval(row: Row) -> Item:
    """Nobody wrote right answers: the target is an empty one, whose log-likelihood says nothing.

    What the model writes is what is judged.
    """
    asked = []
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if name not in ifeval.CHECKS:
            raise LeftOut(f"{name} cannot be verified here")
        asked.append((name, {key: value for key, value in given.items() if value is not None}))
        try:
            ifeval.CHECKS[name]("A word.", **asked[-1][1])
        except (TypeError, re.error) as error:
            raise LeftOut(f"{name} has arguments that are not known") from error
    return Item(
        domain="instruct", task="ifeval", key=_key(row["prompt"]),
        prompt=chat(row["prompt"].strip()), target=closed(""), kind="verify",
        check={"verifier": "instructions", "arguments": {"asked": asked}, "write": ANSWER_TOKENS},
    )  # fmt: skip


def _refusal(task: str, prompt: str, refuse: bool) -> Item:
    return Item(
        domain="safety", task=task, key=_key(prompt), prompt=chat(prompt.strip()),
        target=closed(REFUSAL if refuse else AGREEMENT), kind="refusal",
        options=(closed(REFUSAL), closed(AGREEMENT)), check={"refuse": refuse},
    )  # fmt: skip


def _saferlhf(row: Row) -> Item:
    """To be refused where both answers were judged unsafe, to be met where both were safe."""
    if row["is_response_0_safe"] != row["is_response_1_safe"]:
        raise LeftOut("one of its answers is safe and one is not")
    return _refusal("saferlhf", row["prompt"], not row["is_response_0_safe"])


def _xstest(row: Row) -> Item:
    """Its contrasts are the unsafe ones; a label says the same where there is one."""
    label = row.get("label")
    if label not in (None, "safe", "unsafe"):
        raise LeftOut("its label is neither safe nor unsafe")
    refuse = row["type"].startswith("contrast") if label is None else label == "unsafe"
    return _refusal("xstest", row["prompt"], refuse)


def _mbpp_role(row: Row) -> Role | None:
    """Tasks 11 to 510 are the authors' test set; 1 to 10 are examples, the others for training."""
    return "test" if 11 <= row["task_id"] <= 510 else "train"


SETS: Mapping[str, PublicSet] = {
    "gsm8k": PublicSet(
        "math", (("train", "train"), ("test", "test")), {"question": str, "answer": str}, _gsm8k,
        "openai/gsm8k", (("train", "train"), ("test", "test")), "main",
        "cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
    ),
    "mbpp": PublicSet(
        "code", (("mbpp", "train"),),
        {"text": str, "code": str, "test_list": list, "task_id": int}, mbpp,
        "google-research-datasets/mbpp", (("train+validation+test", "mbpp"),), "full",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c", _mbpp_role,
    ),
    "humaneval": PublicSet(
        "code", (("HumanEval", "test"),),
        {"prompt": str, "canonical_solution": str, "test": str, "entry_point": str}, humaneval,
        "openai/openai_humaneval", (("test", "HumanEval"),),
    ),
    "sciq": PublicSet(
        "science", (("train", "train"), ("test", "test")),
        {"question": str, "correct_answer": str, "distractor1": str, "distractor2": str,
         "distractor3": str},
        _sciq, "allenai/sciq", (("train", "train"), ("test", "test")),
    ),
    "arc": PublicSet(
        "science", (("train", "train"), ("test", "test")), {"answerKey": str}, _arc,
        "allenai/ai2_arc", (("train", "train"), ("test", "test")), "ARC-Easy",
    ),
    "alpaca": PublicSet(
        "instruct", (("alpaca_data", "all"),), {"instruction": str, "input": str, "output": str},
        lambda row: _pair("alpaca", row["instruction"], row["input"], row["output"]),
        "tatsu-lab/alpaca", (("train", "alpaca_data"),),
    ),
    "dolly": PublicSet(
        "instruct", (("databricks-dolly-15k", "all"),),
        {"instruction": str, "context": str, "response": str},
        lambda row: _pair("dolly", row["instruction"], row["context"], row["response"]),
        "databricks/databricks-dolly-15k", (("train", "databricks-dolly-15k"),),
    ),
    "ifeval": PublicSet(
        "instruct", (("input_data", "test"),),
        {"prompt": str, "instruction_id_list": list, "kwargs": list}, _ifeval,
        "google/IFEval", (("train", "input_data"),), None,
        "966cd89545d6b6acfd7638bc708b98261ca58e84",
    ),
    "saferlhf": PublicSet(
        "safety", (("train", "train"),),
        {"prompt": str, "is_response_0_safe": bool, "is_response_1_safe": bool}, _saferlhf,
        "PKU-Alignment/PKU-SafeRLHF", (("train", "train"),),
    ),
    "xstest": PublicSet(
        "safety", (("xstest_prompts", "test"),), {"prompt": str, "type": str}, _xstest,
        "walledai/XSTest", (("test", "xstest_prompts"),), None,
        "f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
    ),
}  # fmt: skip
