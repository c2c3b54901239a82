"""Local files in the layouts of public sets: read exactly, refused by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.public.local import read_local
from mergeprobe_fast.merge_peft.tasks import chat, check, closed

SOLUTION = "He has 3*4=<<3*4=12>>12 pens.\nSo 1,200+12=<<1200+12=1212>>1212.\n#### 1,212"


def written(folder: Path, *rows: object, name: str = "set.jsonl") -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_gsm8k_lines_become_items(tmp_path: Path, name: str) -> None:
    rows = ({"question": "How many pens? ", "answer": SOLUTION},
            {"question": "Left\u2028over?", "answer": "None.\n#### -3"})  # fmt: skip
    path = written(tmp_path, *rows, name=name)
    first, second = read_local(path, domain="math", task="gsm8k", split="train", layout="gsm8k")
    assert (first.prompt, first.target) == (chat("How many pens?"), closed("1212"))
    assert first.kind == "exact" and (first.domain, first.task) == ("math", "gsm8k")
    assert first.source == second.source == "train"
    assert check(first, "That makes 1212.") and check(first, "#### 1,212")
    assert not check(first, "12") and check(second, "-3") and not check(second, "3")
    worked = read_local(
        path, domain="math", task="gsm8k", split="calibration", layout="gsm8k", worked=True
    )
    assert worked[0].target == closed("He has 3*4=12 pens.\nSo 1,200+12=1212.\n#### 1,212")
    assert worked[0].source == "calibration" and check(worked[0], worked[0].target)


def test_pairs_and_choices_become_items(tmp_path: Path) -> None:
    pairs = written(tmp_path, {"id": 7, "prompt": "Say hi.", "target": " hi there "})
    (item,) = read_local(pairs, domain="instruct", task="own", split="test", layout="pairs")
    assert (item.prompt, item.target) == (chat("Say hi."), closed("hi there"))
    assert check(item, " hi  there") and not check(item, "Hi there")
    answers = ("y", 1, "B")
    rows = [
        {"question": f"{n}?", "choices": ["x", "y"], "answer": a} for n, a in enumerate(answers)
    ]
    choices = written(tmp_path, *rows)
    items = read_local(choices, domain="science", task="own", split="test", layout="choices")
    for n, item in enumerate(items):
        assert item.prompt == chat(f"{n}?\n- x\n- y")
        assert item.options == (closed("x"), closed("y")) and item.target == closed("y")
        assert check(item, "y") and not check(item, "x")


GSM8K, PAIRS, CHOICES = "gsm8k", "pairs", "choices"


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        (PAIRS, "{", "not JSON"),
        (PAIRS, "", "not JSON"),
        (PAIRS, "[" * 10**5, "not JSON"),
        (PAIRS, [1], "not a JSON object"),
        (PAIRS, {"prompt": "a"}, "has the fields"),
        (PAIRS, {"prompt": "a", "target": "b", "label": 1}, "has the fields"),
        (PAIRS, {"prompt": "a", "target": 3}, "target is a int"),
        (PAIRS, {"prompt": " ", "target": "b"}, "prompt is empty"),
        (GSM8K, {"question": "a", "answer": "12"}, "####"),
        (GSM8K, {"question": "a", "answer": "so\n#### twelve"}, "####"),
        (GSM8K, {"question": "a", "answer": "so\n#### 12\nor 13"}, "####"),
        (CHOICES, {"question": "a", "choices": "xy", "answer": 0}, "choices is a str"),
        (CHOICES, {"question": "a", "choices": ["x"], "answer": 0}, "2 to 26"),
        (CHOICES, {"question": "a", "choices": ["x", "x"], "answer": 0}, "2 to 26"),
        (CHOICES, {"question": "a", "choices": ["x", 2], "answer": 0}, "other than texts"),
        (CHOICES, {"question": "a", "choices": ["x", "y"], "answer": 2}, "not a position"),
        (CHOICES, {"question": "a", "choices": ["x", "y"], "answer": -1}, "not a position"),
        (CHOICES, {"question": "a", "choices": ["x", "y"], "answer": True}, "answer is a bool"),
        (CHOICES, {"question": "a", "choices": ["x", "y"], "answer": "C"}, "neither"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, layout: str, row: object, reason: str) -> None:
    good = {
        PAIRS: {"prompt": "p", "target": "t"},
        GSM8K: {"question": "q", "answer": "so\n#### 1"},
        CHOICES: {"question": "q", "choices": ["x", "y"], "answer": 0},
    }[layout]
    path = written(tmp_path, good, row)
    with pytest.raises(InputError) as caught:
        read_local(path, domain="d", task="t", split="train", layout=layout)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert reason in caught.value.reason


def test_a_question_twice_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    arguments = {"domain": "d", "task": "t", "split": "train", "layout": "pairs"}
    twice = written(tmp_path, *({"prompt": "p", "target": t} for t in "ab"))
    with pytest.raises(InputError, match="line 2: the same question as line 1"):
        read_local(twice, **arguments)
    with pytest.raises(InputError, match="has no lines"):
        read_local(written(tmp_path), **arguments)
    with pytest.raises(InputError, match="cannot be read"):
        read_local(tmp_path / "absent.jsonl", **arguments)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "not text"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, {"prompt": "p", "target": "t"}, name="set.jsonl.gz")
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[:-9], "not gzip": b"plain", "not text": gzip.compress(b"\xff\xfe\n")}[damage]
    )
    with pytest.raises(InputError, match="cannot be read"):
        read_local(path, domain="d", task="t", split="train", layout="pairs")


@pytest.mark.parametrize(
    "change", [{"layout": "csv"}, {"split": "dev"}, {"worked": True, "layout": "pairs"}]
)
def test_a_wrong_argument_is_named(tmp_path: Path, change: dict) -> None:
    path = written(tmp_path, {"prompt": "p", "target": "t"})
    arguments = {"domain": "d", "task": "t", "split": "train", "layout": "pairs", **change}
    with pytest.raises(InputError, match=r"pairs|train, test"):
        read_local(path, **arguments)
