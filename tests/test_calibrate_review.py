"""Calibration passes: mishaps that a review found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import make_adapter
from calibrations import make_points
from command_line import assert_refused, runner
from tiny_bases import draw_sequences, load, make_base, save, write_ids
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.record import calibrate, plan_calibration
from mergeprobe_fast.record.texts import read_texts

Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
NAN = "the model's logits are NaN or too large for sequence"


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    return {"math": write_ids(tmp_path / "d.jsonl", draw_sequences(rng, (9, 3, 6)))}


def test_labels_without_gradients_are_refused(tmp_path, data, run):
    make_base(tmp_path / "base")
    for labels in ("model", "data", "both"):
        with pytest.raises(InputError, match=r"^labels: given without gradients$"):
            plan_calibration(tmp_path / "base", data, labels=labels)
    words = "calibrate", tmp_path / "base", "--data", f"math={data['math']}"
    ran = run(*words, "--labels", "both", "--out", tmp_path / "cal")
    assert_refused(ran, "labels: given without gradients")
    assert not (tmp_path / "cal").exists()
    made = calibrate(tmp_path / "base", data, tmp_path / "cal", gradients=True)
    assert made.labels == ("model",)  # the default


@pytest.mark.parametrize("words", [("--labels", "model"), ("--labels", "data"), ()])
def test_logits_that_are_not_numbers_name_the_text(tmp_path, data, run, words):
    """Nothing recorded shows it: the head is not among the modules."""
    model = make_base(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[3, 2] = float("nan")
    save(model, tmp_path / "base")
    zoo = make_adapter(tmp_path / "zoo" / "math-a", {Q0: (16, 16, 2)}).path.parent
    more = ("--gradients", *words) if words else ("--adapters", zoo)
    given = "--data", f"math={data['math']}", "--out", tmp_path / "cal"
    ran = run("calibrate", tmp_path / "base", *given, *more, "--json")
    assert_refused(ran, f"{NAN} 0 of domain 'math'")
    assert sorted(os.listdir(tmp_path)) == ["base", "d.jsonl", "zoo"]


def test_an_adapter_that_breaks_the_model_is_named(tmp_path, data):
    """Its queries and keys are numbers and so are derivatives at the base; products are none."""
    make_base(tmp_path / "base")
    sizes = {Q0: (16, 16, 2), K0: (8, 16, 2)}
    make_adapter(tmp_path / "zoo" / "math-a", sizes, magnitude=0.1)
    make_adapter(tmp_path / "zoo" / "math-b", sizes, magnitude=1e25)
    with pytest.raises(InputError) as caught:
        calibrate(tmp_path / "base", data, tmp_path / "cal", adapters=tmp_path / "zoo")
    assert caught.value.reason == f"{NAN} 0 of domain 'math' with math-b on the model"
    assert sorted(os.listdir(tmp_path)) == ["base", "d.jsonl", "zoo"]


def test_a_number_that_is_none_names_its_adapter(tmp_path, rng):
    adapters = [open_adapter(make_adapter(tmp_path / name, seed=i).path)
                for i, name in enumerate(("math-a", "math-b"))]  # fmt: skip
    bad = np.zeros((5, 2))
    bad[3, 1] = np.inf
    with pytest.raises(InputError) as caught:
        tensors = {"phi_model.base:math": bad}
        make_points(tmp_path / "cal", adapters, ["math", "math"], rng, tensors=tensors)
    assert str(caught.value) == "phi_model.base:math: is NaN or Inf along math-b"
    with pytest.raises(InputError) as caught:
        tensors = {"loss.trained:math-a": np.full(5, np.nan)}
        make_points(tmp_path / "cal", adapters, ["math", "math"], rng, tensors=tensors)
    assert str(caught.value) == "loss.trained:math-a: is NaN or Inf"


def test_names_that_are_no_unicode_are_escaped(tmp_path, data):
    """Of the base and of the data: what is written stays JSON that can be read again."""
    odd = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"n\xff")))
    odd.mkdir()
    make_base(tmp_path / "base")
    (tmp_path / "base").rename(odd / "base")  # the tokenizers library cannot write there
    source = odd / os.fsdecode(b"d\xfe.jsonl")
    source.write_bytes(data["math"].read_bytes())
    calibrate(odd / "base", {"math": source}, tmp_path / "cal")
    info = open_calibration(tmp_path / "cal").info
    assert info.domains["math"].source == "d\\xfe.jsonl"
    assert info.base_path == info.base_model == f"{tmp_path}/n\\xff/base"


def test_a_line_break_before_a_completion_is_the_prompts(tmp_path):
    """At the end of the prompt alone two are one token; before a word each is its own."""
    words = {word: i for i, word in enumerate(("<unk>", "a", "b", "\n", "\n\n"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pattern = Regex(r"\s+(?!\S)|\s|\w+")
    made.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert tokenizer("a\n\n")["input_ids"] == [1, 4]
    lines = [{"prompt": "a\n\n", "completion": "b"}, {"prompt": "a\n", "completion": "\n"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = read_texts(
        "math", path, lambda: tokenizer, 5, max_length=9, max_sequences=None, least=2, seed=0,
        labelled=True,
    )  # fmt: skip
    assert [ids.tolist() for ids in texts.sequences] == [[1, 3, 3, 2], [1, 4]]
    assert texts.starts == (3, 1)  # the second has one token across the border: a label


def test_the_memory_of_a_wide_model_is_not_understated(tmp_path, data):
    make_base(tmp_path / "base")
    beside = {}  # bytes of what goes through the model: the model itself is the caller's
    for dtype in (torch.float32, torch.float64):
        model = load(tmp_path / "base", dtype)
        plan = plan_calibration(model, data, gradients=True, threads=1)
        beside[dtype] = plan.peak_nbytes - 500_000_000
    assert beside[torch.float64] == 2 * beside[torch.float32]


def test_a_pass_within_inference_mode_is_the_same(tmp_path, data):
    """As in a function of an evaluation script that somebody decorated with it."""
    make_base(tmp_path / "base")
    zoo = make_adapter(tmp_path / "zoo" / "math-a", {Q0: (16, 16, 2)}).path.parent
    given = {"adapters": zoo, "gradients": True, "threads": 1}
    calibrate(tmp_path / "base", data, tmp_path / "plain", **given)
    with torch.inference_mode():
        calibrate(tmp_path / "base", data, tmp_path / "inside", **given)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "inside" / path.name).read_bytes() == path.read_bytes()
