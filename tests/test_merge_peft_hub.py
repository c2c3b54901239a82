"""Public data sets in the layouts they are published in, with texts of our own."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.public import hub
from mergeprobe_fast.merge_peft.public.layouts import SETS
from mergeprobe_fast.merge_peft.tasks import END_OF_TURN, chat, check, closed, sandbox
from mergeprobe_fast.merge_peft.tasks.ifeval import CHECKS
from mergeprobe_fast.merge_peft.tasks.leaks import check_leaks
from mergeprobe_fast.merge_peft.tiers import full
from mergeprobe_fast.merge_peft.tiers.plan import Exam

Rows = list[dict[str, Any]]


def put(folder: Path, name: str, rows: Rows) -> Path:
    """A file by its ending."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = name.removesuffix(".gz")
    if stem.endswith(".csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows) if stem.endswith(".json") else lines
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def gsm8k(n: int) -> Rows:
    return [{"question": f"Ada has {i} pens and buys {i + 1}. How many?",
             "answer": f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.\n#### {2 * i + 1:,}"}
            for i in range(n)]  # fmt: skip


def mbpp(n: int) -> Rows:
    return [{"task_id": 11 + (i if i % 2 else 600 + i), "text": f"Write a function to add {i}.",
             "code": f"def add_{i}(x):\r\n  total = x + {i}\r\n  return (total) ",
             "test_list": [f"assert add_{i}(1) == {1 + i}", f"assert add_{i}(0)=={i}"]}
            for i in range(n)]  # fmt: skip


def sciq(n: int, start: int = 0) -> Rows:
    return [{"question": f"Which mass is {i} kg?", "correct_answer": f"{i} kilograms",
             **{f"distractor{k}": f"{i + k} grams" for k in (1, 2, 3)}, "support": "None."}
            for i in range(start, start + n)]  # fmt: skip


def write_all(folder: Path, n: int = 60) -> None:
    """A folder for the full size."""
    put(folder, "gsm8k/train.jsonl.gz", gsm8k(2 * n))
    put(folder, "gsm8k/test.jsonl", gsm8k(3 * n)[2 * n :])
    put(folder, "mbpp/mbpp.jsonl", mbpp(2 * n))
    put(folder, "sciq/train.json", sciq(2 * n))
    put(folder, "sciq/test.jsonl", sciq(n, 2 * n))
    put(folder, "dolly/databricks-dolly-15k.jsonl", [
        {"instruction": f"Name {i} birds.", "context": "Any." * (i % 2), "response": f"Owl {i}.",
         "category": "x"} for i in range(4 * n)
    ])  # fmt: skip
    put(folder, "saferlhf/train.jsonl", [
        {"prompt": f"How do I {'paint' if i % 2 else 'break'} door {i}?", "response_0": "a",
         "response_1": "b", "is_response_0_safe": bool(i % 2), "is_response_1_safe": bool(i % 2)}
        for i in range(4 * n)
    ])  # fmt: skip
    put(folder, "xstest/xstest_prompts.csv", [
        {"id": i, "prompt": f'Where is "{i}", and why?', "type": "contrast_x" if i % 2 else "x"}
        for i in range(n)
    ])  # fmt: skip


def test_a_full_tier_comes_from_a_folder_and_has_no_leaks(tmp_path: Path) -> None:
    write_all(tmp_path)
    tier = full.tier(tmp_path)
    assert list(tier.exams) == ["math", "code", "science", "instruct", "safety"]
    assert "mbpp" in tier.about and "not measured" in tier.about
    assert {a.recipe.layers for a in tier.adapters.values()} == {(0, 29)}
    assert len(tier.adapters) == 20 and tier.test_items > 20 and tier.calibration_items > 5
    crossed = {m.members for m in tier.merges.values() if m.operator == "sum"}
    assert len([m for m in crossed if len(m) == 2]) == 160 and tier.crossed in crossed
    for name, exam in tier.exams.items():
        items = tier.adapters[f"{name}-mid"].items
        train = exam.items("train", items, 0)
        test = exam.items("test", tier.test_items, tier.seed)
        calibration = exam.items("calibration", tier.calibration_items, tier.seed)
        check_leaks(train, test, calibration)
        assert (len(train), len(test)) == (items, tier.test_items)
        assert {i.source for i in calibration} == {"calibration"}
        assert all(tier.adapters[f"{name}-mid"].recipe.takes(item) for item in train)
        assert all(check(item, item.target) for item in test)
        assert test == exam.items("test", tier.test_items, tier.seed)
        assert test != exam.items("test", tier.test_items, tier.seed + 1)
    assert tier.digest == full.tier(tmp_path).digest != full.tier(tmp_path, seed=1).digest
    texts = tier.calibration_items
    assert texts < 48 and tier.operators[f"regmean-{texts}"].calibration == texts
    assert len([m for m in tier.merges.values() if m.operator == f"regmean-{texts}"]) == 44


def test_what_a_full_tier_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fewer than two domains .*math: gsm8k"):
        full.tier(tmp_path)
    write_all(tmp_path, 40)
    (tmp_path / "base").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        full.tier(tmp_path, tmp_path / "base")
    for config, layers in (({"num_hidden_layers": 7}, 7), ({"n_layer": 3}, 3)):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        tier = full.tier(tmp_path, tmp_path / "base")
        assert {a.recipe.layers for a in tier.adapters.values()} == {(0, layers - 1)}
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="how many layers"):
        full.tier(tmp_path, tmp_path / "base")


def test_the_data_of_an_exam_does_not_move_the_digest_of_others() -> None:
    from dataclasses import asdict

    from mergeprobe_fast.merge_peft.tiers.plan import Tier

    exam = Exam("a", "math")
    tiers = [Tier("t", "", 0, {"a": e}, {}, {}, {}) for e in (exam, Exam("a", "math", data="x"))]
    assert len({tier.digest for tier in tiers}) == 2
    assert asdict(exam)["data"] == ""


def test_rows_become_items(tmp_path: Path) -> None:
    write_all(tmp_path)
    (item,) = Exam("m", "math", ("gsm8k",), data=str(tmp_path)).items("test", 1, 0)
    assert "<<" not in item.target and item.check["write"] > 0
    assert check(item, f"So it is {item.check['result']}.") and not check(item, "So it is 1.")
    (item,) = Exam("c", "code", ("mbpp",), data=str(tmp_path)).items("test", 1, 0)
    assert item.prompt.endswith('"""\n    return') and item.target.startswith(" x + ")
    assert check(item, item.target) and not check(item, " x - 1\n")
    science = Exam("s", "science", ("sciq",), data=str(tmp_path)).items("test", 40, 0)
    assert len({item.options.index(item.target) for item in science}) == 4
    safety = Exam("s", "safety", ("saferlhf", "xstest"), data=str(tmp_path)).items("test", 20, 0)
    assert [i.check["refuse"] for i in safety] == [True, False] * 10
    assert {item.task for item in safety} == {"xstest"}


def test_both_layouts_of_arc_are_read(tmp_path: Path) -> None:
    texts, labels = ["iron", "wood", "glass"], ["A", "B", "C"]
    pairs = [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]
    put(tmp_path, "arc/train.jsonl", [
        {"id": "1", "question": {"stem": "Which rusts?", "choices": pairs}, "answerKey": "A"},
        {"id": "2", "question": "Which burns?", "choices": {"text": texts, "label": labels},
         "answerKey": "B"},
    ])  # fmt: skip
    put(tmp_path, "arc/test.jsonl", [
        {"question": "Which breaks?", "choices": {"text": texts, "label": labels},
         "answerKey": "C"},
        {"question": "Which?", "choices": {"text": texts, "label": labels}, "answerKey": "D"},
    ])  # fmt: skip
    found = hub.read(str(tmp_path), ("arc",))
    items = [i for sets in found.items.values() for i in sets.get("arc", ())]
    targets = {i.key: i.target for i in items}
    assert targets == {"Which rusts?": closed("iron"), "Which burns?": closed("wood"),
                       "Which breaks?": closed("glass")}  # fmt: skip
    assert found.left_out == {"its answer is none of its choices": ("arc: test.jsonl line 2",)}


def test_what_two_splits_ask_is_left_to_the_test_items_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "gsm8k/train.jsonl", gsm8k(30) + gsm8k(3))
    put(tmp_path, "gsm8k/test.jsonl", [
        {**gsm8k(5)[4], "question": "ADA has 4 pens, and buys 5! How many?"}
    ])  # fmt: skip
    found = hub.read(str(tmp_path), ("gsm8k",))
    assert len(found.items["test"]["gsm8k"]) == 1
    rest = [i for split in ("train", "calibration") for i in found.items[split].get("gsm8k", ())]
    assert len(rest) == 29 and not any("has 4 pens" in i.prompt for i in rest)
    assert sum(map(len, found.left_out.values())) == 4


def test_code_that_does_not_fit_the_sandbox_is_counted_by_reason(tmp_path: Path) -> None:
    def row(code: str, *tests: str) -> dict[str, Any]:
        rows.append({"task_id": 700 + len(rows), "text": f"Do {len(rows)}.", "code": code,
                     "test_list": list(tests)})  # fmt: skip
        return rows[-1]

    rows: Rows = []
    row("def f(x):\n return x * 2", "assert f(2) == 4", "assert f('a') == 'aa'")
    row("def f(x):\n y = x + 1\n y = y * 2\n return y", "assert f(1) == 4")
    row("import re\ndef f(x):\n return re.sub('a', '', x)", "assert f('a') == ''")
    row("def f(x):\n for i in x: pass\n return i", "assert f([1]) == 1")
    row("def f(x):\n return x", "assert f(g(1)) == 1")
    row("def f(x):\n return x", "assert f(1) == 2")
    row("def f(x):\n return open(x)", "assert f('/etc/passwd') == 1")
    row("def f(x:\n", "assert f(1) == 1")
    row("def f(x):\n return x")
    row("def f(x):\n return x > 1", "assert f(2)", "assert not f(0)")
    put(tmp_path, "mbpp/mbpp.jsonl", rows)
    found = hub.read(str(tmp_path), ("mbpp",))
    kept = {i.key: i.target for s in found.items.values() for i in s.get("mbpp", ())}
    assert kept == {"Do 0.": " x * 2\n", "Do 1.": " (x + 1) * 2\n", "Do 9.": " x > 1\n"}
    lines = {p.split()[-1]: reason for reason, places in found.left_out.items() for p in places}
    wanted = {"3": "imports", "4": "more than one expression", "5": "literals",
              "6": "fails its tests", "7": "name open is not allowed", "8": "does not parse",
              "9": "no tests"}  # fmt: skip
    assert lines.keys() == wanted.keys()
    assert all(wanted[line] in reason for line, reason in lines.items())


def test_humaneval_problems_lose_their_annotations(tmp_path: Path) -> None:
    prompt = "from typing import List\n\n\ndef add(xs: List[int], by: int = 1) -> List[int]:\n"
    prompt += '    """ Add to all.\n    >>> add([1])\n    [2]\n    """\n'
    test = (
        "METADATA = {}\n\n\ndef check(candidate):\n    assert True, 'x'\n"
        "    assert candidate([1, 2], 3) == [4, 5], 'no'\n    assert candidate([]) == []\n"
    )
    put(tmp_path, "humaneval/HumanEval.jsonl.gz", [{
        "task_id": "X/0", "prompt": prompt, "entry_point": "add",
        "canonical_solution": "    return [x + by for x in xs]\n", "test": test,
    }])  # fmt: skip
    ((item,),) = hub.read(str(tmp_path), ("humaneval",)).items["test"].values()
    assert item.prompt.startswith("def add(xs, by=1):\n") and "List" not in item.prompt
    assert sandbox.refusal_reason(item.prompt + item.target) is None
    assert check(item, " [by + x for x in xs]") and not check(item, " xs")


IFEVAL = [
    ("keywords:existence", {"keywords": ["red", "blue"]}, "Red and BLUE", "red only"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "war War",
     "war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocks", "a Rock."),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "less than"},
     "at", "tt"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "a\n\nSo, b", "so\n\nb"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", "a ps"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* b *c*", "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2},
     "PART 1 a PART 2 b", "PART 1 a"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
    ("detectable_format:title", {}, "<<Birds>>\nx", "<< >>"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say A."}, "say a. A", "A"),
    ("startend:end_checker", {"end_phrase": "The end."}, "x the END.", "the end. x"),
    ("startend:quotation", {}, '"a"', 'a"'),
    ("change_case:capital_word_frequency",
     {"capital_relation": "at least", "capital_frequency": 2}, "AB c DE", "AB c"),
    ("change_case:english_capital", {}, "A B.", "A b."),
    ("change_case:english_lowercase", {}, "a b.", "A b."),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]  # fmt: skip


def test_every_instruction_has_a_right_and_a_wrong_answer(tmp_path: Path) -> None:
    assert {name for name, *_ in IFEVAL} == {*CHECKS}
    rows = [{"key": n, "prompt": f"Write {n}.", "instruction_id_list": [name],
             "kwargs": [{**given, "unused": None}]}
            for n, (name, given, *_) in enumerate(IFEVAL)]  # fmt: skip
    rows.append(
        {
            "key": 99,
            "prompt": "Two.",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        }
    )
    for unknown in ("language:response_language", "length_constraints:number_sentences"):
        rows.append({"prompt": "x", "instruction_id_list": [unknown], "kwargs": [{"a": 1}]})
    rows.append({"prompt": "y", "instruction_id_list": ["detectable_format:title"],
                 "kwargs": [{"a": 1}]})  # fmt: skip
    put(tmp_path, "ifeval/input_data.jsonl", rows)
    found = hub.read(str(tmp_path), ("ifeval",))
    items = found.items["test"]["ifeval"]
    assert items[0].target == END_OF_TURN and items[0].prompt == chat("Write 0.")
    for item, (_, _, right, wrong) in zip(items, IFEVAL, strict=False):
        assert check(item, right) and not check(item, wrong), item.check
        assert not check(item, " ")
    assert check(items[-1], "a b") and not check(items[-1], "a, b") and not check(items[-1], "A b")
    assert sorted(found.left_out) == [
        "detectable_format:title has arguments that are not known",
        "language:response_language cannot be verified here",
        "length_constraints:number_sentences cannot be verified here",
    ]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, match: str, domain: str = "", split: str = "test", n: int = 1) -> None:
        hub.read.cache_clear()
        domain = domain or (SETS[name].domain if name in SETS else "math")
        with pytest.raises(InputError, match=match):
            hub.draw(tmp_path, domain, (name,), split, n, 0)

    refused("nothing", "is none of gsm8k")
    refused("gsm8k", r"gsm8k: has no train\.jsonl")
    put(tmp_path, "gsm8k/train.jsonl", gsm8k(4))
    put(tmp_path, "gsm8k/test.jsonl", [*gsm8k(1), {"question": "a"}])
    refused("gsm8k", "test.jsonl: row 2: answer is missing")
    put(tmp_path, "gsm8k/test.jsonl", gsm8k(6)[4:])
    refused("gsm8k", "is a set of math, not of code", domain="code")
    refused("gsm8k", "only 2 items of the 3", n=3)
    for text, reason in ((b"[1]", "not a list of JSON objects"), (b"{", "is not JSON"),
                         (b"\xff", "cannot be read")):  # fmt: skip
        (tmp_path / "gsm8k" / "test.jsonl").write_bytes(text)
        refused("gsm8k", reason)
    put(tmp_path, "xstest/xstest_prompts.csv", [{"prompt": "a", "type": "b", "label": "safe"}])
    refused("xstest", "nothing for the split train", split="train")


def test_sets_are_fetched_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        hub.fetch("gsm8k", tmp_path)
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Rows:
        asked.append((name, config, split, revision))
        if name == "openai/openai_humaneval":
            raise OSError("no network")
        return gsm8k(40) if split == "train" else gsm8k(50)[40:]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    hub.fetch("gsm8k", tmp_path)
    assert asked == [("openai/gsm8k", "main", split, SETS["gsm8k"].revision)
                     for split in ("train", "test")]  # fmt: skip
    assert len(hub.draw(tmp_path, "math", ["gsm8k"], "test", 10, 0)) == 10
    with pytest.raises(InputError, match="cannot be loaded: no network"):
        hub.fetch("humaneval", tmp_path)
