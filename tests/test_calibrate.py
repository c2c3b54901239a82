"""The calibration pass against plain hooks on the whole model."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bases import (
    CONFIGS,
    draw_sequences,
    hooked_inputs,
    load,
    make_base,
    make_tokenizer,
    save,
    write_ids,
)
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import calibration_writer
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.record import calibrate, plan_calibration
from mergeprobe_fast.record.texts import Texts
from mergeprobe_fast.record.tokens import draw_tokens

LENGTHS = (9, 2, 14, 9)
ALL = 10**6
STREAMED = {"Llama", "GPT2", "Gemma3Text", "GPTNeoX"}
WHY_NOT = {
    "OPT": "model.decoder.project_out is outside its layers",
    "Bloom": "its layers return more than the hidden states",
    "Mixtral": "its files do not have model.layers.0.mlp",
}


@pytest.fixture
def llama(tmp_path: Path) -> torch.nn.Module:
    return make_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    return {
        name: write_ids(tmp_path / f"{name}.jsonl", draw_sequences(rng, LENGTHS))
        for name in ("math", "code")
    }


def ids_of(path: Path) -> list[np.ndarray]:
    return [np.array(json.loads(line)["input_ids"]) for line in path.read_text().splitlines()]


def rounded(rows: np.ndarray) -> np.ndarray:
    return bf16_to_f32(f32_to_bf16(rows))


def same_tensors(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) and names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", CONFIGS)
def test_samples_are_what_hooks_see(tmp_path, rng, kind, data):
    """To the bit, streamed or not: every row, at every sampled token, of every module."""
    model = make_base(tmp_path / "base", kind)
    plan = plan_calibration(tmp_path / "base", data, samples=11)
    assert plan.streamed == (kind in STREAMED)
    calibration = plan.record(tmp_path / "cal")
    if not plan.streamed:
        assert any(WHY_NOT[kind] in note for note in calibration.notes)
        assert "with the whole model in memory" in plan.summary()
    for domain in data:
        seen = hooked_inputs(model, ids_of(data[domain]))
        sequence, position = calibration.sampled_tokens(domain)
        assert len(sequence) == 11 and (position >= 1).all()
        for name, module in calibration.modules.items():
            rows = np.array([seen[name][s][p] for s, p in zip(sequence, position, strict=True)])
            np.testing.assert_array_equal(calibration.inputs(domain, name), rounded(rows))
            squares = np.concatenate([x[1:].astype(np.float64) ** 2 for x in seen[name]])
            moment = calibration.moment(domain, name)
            np.testing.assert_allclose(moment, squares.mean(0), rtol=1e-13)
            assert module.d_in == rows.shape[1] and module.d_out == width(model, name)
    # A model object in memory gives the same files.
    calibrate(model, data, tmp_path / "object", samples=11)
    assert same_tensors(tmp_path / "cal", tmp_path / "object")


def width(model: torch.nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    return module(torch.zeros(1, hooked_width(module))).shape[1]


def hooked_width(module: torch.nn.Module) -> int:
    return getattr(module, "in_features", None) or module.weight.shape[0]


@pytest.mark.parametrize("skip_first", [0, 1, 3])
def test_all_tokens_give_the_second_moment(tmp_path, llama, rng, skip_first):
    sequences = draw_sequences(rng, (30, 17, 4))
    data = {"math": write_ids(tmp_path / "d.jsonl", sequences)}
    calibration = calibrate(
        tmp_path / "base", data, tmp_path / "cal", samples=ALL, skip_first=skip_first
    )
    tokens = sum(len(ids) - skip_first for ids in sequences)
    assert calibration.domains["math"].tokens == calibration.domains["math"].samples == tokens
    assert any("all its" in note for note in calibration.notes)
    for name, seen in hooked_inputs(llama, sequences).items():
        if name == "lm_head":
            continue
        x = np.concatenate([rows[skip_first:] for rows in seen]).astype(np.float64)
        stored = calibration.inputs("math", name).astype(np.float64)
        error = np.abs(stored.T @ stored - x.T @ x) / len(x)
        allowed = bound("bf16_gram") * (np.abs(x).T @ np.abs(x)) / len(x)
        assert (error <= allowed).all()
        shifted = np.roll(x, 1, axis=0) * np.sign(x)  # rows of other tokens would be noticed
        assert (np.abs(shifted.T @ shifted - x.T @ x) / len(x) > allowed).any()


def test_modules_fed_the_same_tensor_share_it(tmp_path, llama, data):
    calibration = calibrate(tmp_path / "base", data, tmp_path / "cal")
    for layer in range(3):
        stem = f"model.layers.{layer}."
        q = f"{stem}self_attn.q_proj"
        assert [calibration.input_key(f"{stem}self_attn.{p}_proj") for p in "qkv"] == [q] * 3
        gate = f"{stem}mlp.gate_proj"
        assert calibration.input_key(f"{stem}mlp.up_proj") == gate
        assert calibration.input_key(gate) == gate
    assert "lm_head" not in calibration.modules and len(calibration.modules) == 21


def test_a_shared_key_survives_leaving_out_its_first_module(tmp_path, llama, data):
    globs = ["*.k_proj", "*.v_proj"]
    calibration = calibrate(tmp_path / "base", data, tmp_path / "cal", modules=globs)
    assert {calibration.input_key(name)[-6:] for name in calibration.modules} == {"k_proj"}
    whole = calibrate(tmp_path / "base", data, tmp_path / "whole")
    for name in calibration.modules:
        np.testing.assert_array_equal(calibration.inputs("math", name), whole.inputs("math", name))


def test_equal_tensors_that_are_not_the_same_are_not_shared(tmp_path, llama, data):
    """Identity decides, not names and not values."""
    model = llama
    for layer in model.model.layers:
        layer.self_attn.v_proj.forward = lambda x, m=layer.self_attn.v_proj: (
            torch.nn.functional.linear(x, m.weight)
        )
        layer.mlp.up_proj.register_forward_pre_hook(lambda m, args: (args[0].clone(),))
    calibration = calibrate(model, data, tmp_path / "cal")
    up = "model.layers.0.mlp.up_proj"
    assert calibration.input_key(up) == up
    assert calibration.input_key("model.layers.0.self_attn.v_proj").endswith("q_proj")


def test_sharing_that_ends_with_longer_texts_is_an_error(tmp_path, llama, data):
    up = llama.model.layers[1].mlp.up_proj
    up.register_forward_pre_hook(lambda m, args: args if args[0].shape[1] < 8 else (args[0] + 0,))
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj: does not share the input of "):
        calibrate(llama, data, tmp_path / "cal")


def test_the_head_is_recorded_when_asked_for(tmp_path, llama, data):
    calibration = calibrate(tmp_path / "base", data, tmp_path / "cal", modules=["lm_head"])
    assert list(calibration.modules) == ["lm_head"]
    seen = hooked_inputs(llama, ids_of(data["math"]))["lm_head"]
    sequence, position = calibration.sampled_tokens("math")
    rows = np.array([seen[s][p] for s, p in zip(sequence, position, strict=True)])
    np.testing.assert_array_equal(calibration.inputs("math", "lm_head"), rounded(rows))
    assert any("lm_head is outside its layers" in note for note in calibration.notes)


def test_tokens_are_drawn_evenly_and_once(tmp_path, llama, rng):
    """Each of 40 tokens comes up in 10 of 40 draws: within 5 sigma over 200 seeds."""
    texts = Texts("math", "d", "", tuple(np.zeros(n, np.int64) for n in (11, 2, 30)), 0, "all",
                  (1, 1, 1))  # fmt: skip
    counts = np.zeros((3, 30))
    for seed in rng.integers(0, 2**31, 200):
        sequence, position = draw_tokens(texts, 10, 1, int(seed))
        assert len(set(zip(sequence.tolist(), position.tolist(), strict=True))) == 10
        np.add.at(counts, (sequence, position), 1)
    allowed = np.array([[0 < p < n for p in range(30)] for n in (11, 2, 30)])
    assert allowed.sum() == 40 and (counts[~allowed] == 0).all()
    sigma = np.sqrt(200 * 0.25 * 0.75)
    assert (np.abs(counts[allowed] - 50) < 5 * sigma).all()


def test_the_same_input_gives_the_same_bytes(tmp_path, llama, data):
    for name, threads in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(tmp_path / "base", data, tmp_path / name, samples=7, threads=threads)
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    json_bytes = [(tmp_path / name / "calibration.json").read_bytes() for name in "abc"]
    assert len(set(json_bytes)) == 1
    calibrate(tmp_path / "base", data, tmp_path / "other", samples=7, seed=1)
    assert not same_tensors(tmp_path / "a", tmp_path / "other")


def test_a_domain_does_not_depend_on_the_others(tmp_path, llama, data):
    calibrate(tmp_path / "base", data, tmp_path / "both", samples=7)
    calibrate(tmp_path / "base", {"code": data["code"]}, tmp_path / "one", samples=7)
    one, both = (tmp_path / folder / "code.safetensors" for folder in ("one", "both"))
    assert one.read_bytes() == both.read_bytes()
    drawn = [open_calibration(tmp_path / "both").sampled_tokens(name) for name in data]
    assert not all(np.array_equal(*parts) for parts in zip(*drawn, strict=True))


def test_a_plan_states_the_size_and_runs_twice(tmp_path, llama, data):
    plan = plan_calibration(tmp_path / "base", data, samples=8)
    said = plan.summary()
    assert said.startswith("2 domains, 8 sequences, 60 tokens: 8 samples a domain of 21 modules "
                           "(12 distinct inputs); writes ")  # fmt: skip
    assert said.endswith("of memory, layer by layer") and plan.peak_nbytes > 0
    steps: list[int] = []
    plan.record(tmp_path / "a", progress=steps.append)
    assert sum(steps) == plan.steps == 8 * 3
    written = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert written <= plan.nbytes + 4096
    plan.record(tmp_path / "b")
    assert same_tensors(tmp_path / "a", tmp_path / "b")


def test_layers_behind_the_last_recorded_one_do_not_run(tmp_path, llama, data):
    plan = plan_calibration(tmp_path / "base", data, modules=["model.layers.1.*"])
    assert plan.steps == 8 * 2
    assert len(plan.record(tmp_path / "cal").modules) == 7


def test_one_layer_and_one_sequence_are_in_memory(tmp_path, llama, data, monkeypatch):
    plan = plan_calibration(tmp_path / "base", data, samples=20, threads=1)
    rows: list[weakref.ref] = []
    put = calibration_writer.CalibrationWriter._put

    def noted(self, domain, key, tensor, first=0):
        put(self, domain, key, tensor, first)
        if key.startswith("input."):
            rows.append(weakref.ref(tensor))

    def look(steps: int) -> None:
        layers = plan._layers.layers
        loaded = [any(not p.is_meta for p in layer.parameters()) for layer in layers]
        assert sum(loaded) == 1
        assert all(p.is_meta for p in plan._model.model.embed_tokens.parameters())
        assert sum(row() is not None for row in rows) <= 1  # the worker is at the next one

    monkeypatch.setattr(calibration_writer.CalibrationWriter, "_put", noted)
    plan.record(tmp_path / "cal", progress=look)
    assert len(rows) == 8 * 12


def test_an_interrupted_pass_leaves_nothing(tmp_path, llama, data):
    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    for base in (tmp_path / "base", llama):
        with pytest.raises(KeyboardInterrupt):
            calibrate(base, data, tmp_path / "cal", progress=interrupt)
        assert sorted(os.listdir(tmp_path)) == ["base", "code.jsonl", "math.jsonl"]
    assert all(not module._forward_pre_hooks for module in llama.modules())


def test_an_existing_folder_is_refused_before_the_announcement(tmp_path, llama, data):
    calibrate(tmp_path / "base", data, tmp_path / "cal")
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        calibrate(tmp_path / "base", data, tmp_path / "cal", announce=lambda plan: 1 / 0)
    calibrate(tmp_path / "base", {"law": data["math"]}, tmp_path / "cal", overwrite=True)
    assert list(open_calibration(tmp_path / "cal").domains) == ["law"]
    with pytest.raises(InputError, match="would overwrite the input"):
        calibrate(tmp_path / "base", data, tmp_path / "base", overwrite=True)
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 100, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_writer.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(InputError, match=r"the disk has 0.00 GB left"):
            calibrate(tmp_path / "base", data, tmp_path / "new", announce=lambda plan: 1 / 0)


@pytest.mark.parametrize("as_object", [False, True])
def test_nan_names_module_and_domain(tmp_path, data, as_object):
    model = make_base(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    save(model, tmp_path / "base")
    with pytest.raises(InputError) as caught:
        calibrate(model if as_object else tmp_path / "base", data, tmp_path / "cal")
    assert caught.value.key == "model.layers.1.self_attn.o_proj"
    assert "inputs in domain 'math' are NaN" in caught.value.reason
    assert not (tmp_path / "cal").exists()


def test_a_model_object_is_left_as_it_was(tmp_path, data):
    model = make_base(tmp_path / "base", attention_dropout=0.5)
    quiet = calibrate(model, data, tmp_path / "a")
    model.train()
    model.model.layers[0].eval()
    calibrate(model, data, tmp_path / "b", gradients=True)
    assert not model.model.layers[0].training and model.model.layers[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    calibration = open_calibration(tmp_path / "b")
    for name in calibration.modules:
        np.testing.assert_array_equal(
            calibration.inputs("code", name), quiet.inputs("code", name)
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_widened(tmp_path, data, dtype):
    """A half-precision folder computes in float32, and in its own dtype when told to."""
    own = getattr(torch, dtype)
    save(make_base(tmp_path / "base").to(own), tmp_path / "base")
    for given, computed in (("auto", torch.float32), (dtype, own)):
        plan = plan_calibration(tmp_path / "base", data, dtype=given)
        assert plan.streamed
        plan.record(tmp_path / given)
        calibrate(load(tmp_path / "base", computed), data, tmp_path / f"{given}-whole")
        assert same_tensors(tmp_path / given, tmp_path / f"{given}-whole")
    assert not same_tensors(tmp_path / "auto", tmp_path / dtype)


def test_text_goes_through_the_tokenizer(tmp_path, llama, rng):
    words = [f"w{i}" for i in rng.integers(0, 40, 12)]
    (tmp_path / "d.txt").write_text(" ".join(words))
    ids = write_ids(tmp_path / "d.jsonl", [[int(w[1:]) for w in words]])
    calibrate(tmp_path / "base", {"d": tmp_path / "d.txt"}, tmp_path / "text")
    calibrate(tmp_path / "base", {"d": ids}, tmp_path / "ids")
    assert same_tensors(tmp_path / "text", tmp_path / "ids")
    with pytest.raises(InputError, match="text needs a tokenizer beside the model object"):
        calibrate(llama, {"d": tmp_path / "d.txt"}, tmp_path / "x")
    calibrate(llama, {"d": tmp_path / "d.txt"}, tmp_path / "x", tokenizer=make_tokenizer())
    assert same_tensors(tmp_path / "x", tmp_path / "ids")
