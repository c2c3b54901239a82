"""Outputs, both kinds of labels, and losses of completions only: against plain hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from test_calibrate import ids_of, same_tensors
from test_calibrate_gradients import check, hooked_gradients
from tiny_bases import draw_sequences, hooked_inputs, make_base, make_tokenizer, write_ids
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.record import calibrate, gradients, plan_calibration
from mergeprobe_fast.record.texts import Texts, read_texts

LENGTHS = (9, 2, 14)
ALL = 10**6
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    return {"math": write_ids(tmp_path / "d.jsonl", draw_sequences(rng, LENGTHS))}


def hooked_outputs(model: Any, names: list[str], sequences: list[np.ndarray]) -> dict[str, list]:
    """What a plain run puts out at each module: (length, d_out) a sequence, bias included."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the pass runs: the last bits depend on it
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen[name].append(
                out.detach().reshape(-1, out.shape[-1]).numpy().copy()
            )
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    torch.set_num_threads(threads)
    return seen


@pytest.mark.parametrize("kind, streamed", [("Llama", True), ("GPT2", True), ("OPT", False)])
def test_outputs_are_what_hooks_see(tmp_path, data, kind, streamed):
    model = make_base(tmp_path / "base", kind)
    plan = plan_calibration(tmp_path / "base", data, samples=11, skip_first=1, outputs=True)
    assert plan.streamed == streamed
    calibration = plan.record(tmp_path / "cal")
    bare = calibrate(tmp_path / "base", data, tmp_path / "bare", samples=11)
    with_gradients = calibrate(tmp_path / "base", data, tmp_path / "grad", gradients=True)
    sequence, position = calibration.sampled_tokens("math")
    seen = hooked_outputs(model, list(calibration.modules), ids_of(data["math"]))
    for name in calibration.modules:
        rows = np.array([seen[name][s][p] for s, p in zip(sequence, position, strict=True)])
        np.testing.assert_array_equal(
            calibration.outputs("math", name), bf16_to_f32(f32_to_bf16(rows))
        )
        squares = np.concatenate([y[1:].astype(np.float64) ** 2 for y in seen[name]])
        moment = calibration.output_moment("math", name)
        np.testing.assert_allclose(moment, squares.mean(0), rtol=1e-13)
        for other in (bare, with_gradients):
            np.testing.assert_array_equal(other.output_moment("math", name), moment)
    biased = [n for n in calibration.modules if model.get_submodule(n).bias is not None]
    assert bool(biased) == (kind != "Llama")
    assert not bare.has_outputs


def test_outputs_that_are_not_finite_name_the_module(tmp_path, data):
    model = make_base(tmp_path / "base")
    down = model.model.layers[2].mlp.down_proj
    with torch.no_grad():
        down.weight[3] = float("inf")
    with pytest.raises(InputError) as caught:
        calibrate(model, data, tmp_path / "cal")
    assert caught.value.key == "model.layers.2.mlp.down_proj"
    assert "outputs in domain 'math' are NaN" in caught.value.reason


def test_both_labels_are_those_of_each(tmp_path, data):
    model = make_base(tmp_path / "base")
    given = {"gradients": True, "samples": 8}
    both = calibrate(model, data, tmp_path / "both", labels="both", **given)
    assert both.labels == ("model", "data")
    for labels in both.labels:
        one = calibrate(model, data, tmp_path / labels, labels=labels, **given)
        for name in both.modules:
            np.testing.assert_array_equal(
                both.gradients("math", name, labels), one.gradients("math", name)
            )
            np.testing.assert_array_equal(
                both.gradient_moment("math", name, labels), one.gradient_moment("math", name)
            )
    differs = both.gradients("math", DOWN, "data") != both.gradients("math", DOWN, "model")
    assert differs.any()
    calibrate(model, data, tmp_path / "again", labels="both", threads=3, **given)
    assert same_tensors(tmp_path / "both", tmp_path / "again")


def prompts(path: Path, ids: list[np.ndarray], lengths: list[int]) -> Path:
    lines = [
        {"prompt": " ".join(f"w{i}" for i in x[:p]), "completion": "".join(f" w{i}" for i in x[p:])}
        for x, p in zip(ids, lengths, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("labels", ["model", "data"])
def test_only_completions_have_labels(tmp_path, rng, monkeypatch, labels):
    """Where all lines have a prompt and a completion; the tokens before have no loss."""
    model = make_base(tmp_path / "base")
    ids = [np.minimum(x, 45) for x in draw_sequences(rng, (9, 3, 14))]
    first = [4, 1, 13]
    data = {"math": prompts(tmp_path / "p.jsonl", ids, first)}
    drawn: list[np.ndarray] = []
    draw = gradients._draw

    def noted(log_p, seed):
        found = draw(log_p, seed)
        drawn.append(found[:, 0].numpy())
        return found

    monkeypatch.setattr(gradients, "_draw", noted)
    calibration = calibrate(
        model, data, tmp_path / "cal", gradients=True, labels=labels, samples=12, threads=1,
        tokenizer=make_tokenizer(),
    )  # fmt: skip
    assert calibration.domains["math"].loss == "completion"
    masked = []
    for i, (x, p) in enumerate(zip(ids, first, strict=True)):
        found = x[p:] if labels == "data" else drawn[i]
        assert len(found) == len(x) - p + (labels == "model")
        masked.append(np.concatenate([np.full(p - 1, -100), found]))
    check(calibration, hooked_gradients(model, list(calibration.modules), ids, masked))
    # The very same tokens as plain text have a loss everywhere.
    plain = calibrate(
        model, {"math": write_ids(tmp_path / "i.jsonl", ids)}, tmp_path / "plain",
        gradients=True, labels=labels, samples=12, threads=1,
    )  # fmt: skip
    assert plain.domains["math"].loss == "all"
    np.testing.assert_array_equal(plain.inputs("math", DOWN), calibration.inputs("math", DOWN))
    assert (plain.gradients("math", DOWN) != calibration.gradients("math", DOWN)).any()


def read(path: Path, tokenizer: Any, **arguments: Any) -> Texts:
    given = {"max_length": 50, "max_sequences": None, "least": 1, "seed": 0, "labelled": True}
    return read_texts("math", path, lambda: tokenizer, 48, **(given | arguments))


def test_where_a_completion_begins(tmp_path):
    """Special tokens in front belong to the prompt; a token across the border does not."""
    ids = [np.arange(8), np.arange(3)]
    path = prompts(tmp_path / "p.jsonl", ids, [5, 2])
    plain = read(path, make_tokenizer())
    assert (plain.loss, plain.starts) == ("completion", (5, 2))
    assert [plain.labelled(i) for i in range(2)] == [3, 1]

    class Wrapped:
        """A tokenizer that adds <s> (46) on both sides."""

        def __call__(self, text, **given):
            return {"input_ids": [46, *make_tokenizer()(text, **given)["input_ids"], 46]}

    wrapped = read(path, Wrapped())
    assert wrapped.starts == (6, 3) and [wrapped.labelled(i) for i in range(2)] == [4, 2]

    # "w1" + "2 w3" is the one token w12: it holds something of the completion.
    path.write_text(json.dumps({"prompt": "w5 w1", "completion": "2 w3"}) + "\n")
    across = read(path, make_tokenizer())
    assert across.sequences[0].tolist() == [5, 12, 3] and across.starts == (1,)
    path.write_text(json.dumps({"prompt": "", "completion": "w2 w3"}) + "\n")
    assert read(path, make_tokenizer()).starts == (1,)  # the first token is no label


def test_one_line_of_another_form_makes_all_tokens_labels(tmp_path):
    path = prompts(tmp_path / "p.jsonl", [np.arange(8)], [5])
    path.write_text(path.read_text() + json.dumps({"text": "w1 w2"}) + "\n")
    texts = read(path, make_tokenizer())
    assert (texts.loss, texts.starts) == ("all", (1, 1))
    # All lines count, also those that are not drawn.
    few = {read(path, make_tokenizer(), max_sequences=1, seed=s).loss for s in range(8)}
    assert few == {"all"}


def test_a_completion_that_is_cut_off_is_named(tmp_path):
    path = prompts(tmp_path / "p.jsonl", [np.arange(8), np.arange(9)], [5, 6])
    assert read(path, make_tokenizer(), max_length=7).starts == (5, 6)
    with pytest.raises(InputError) as caught:
        read(path, make_tokenizer(), max_length=6)
    assert caught.value.key == "line 2"
    assert caught.value.reason == "has no token of its completion among its first 6"
    assert read(path, make_tokenizer(), max_length=6, labelled=False).cut == 2
    path.write_text(json.dumps({"prompt": "w1 w2", "completion": ""}) + "\n")
    with pytest.raises(InputError, match="line 1: has no token of its completion"):
        read(path, make_tokenizer())


def test_samples_give_the_output_energies_of_hooks(tmp_path, data):
    """E ||W x||^2: the output of a module with the delta less that without, on the whole data."""
    model = make_base(tmp_path / "base")
    calibration = calibrate(model, data, tmp_path / "cal", samples=ALL)
    sizes = {n: (m.d_out, m.d_in, 3) for n, m in calibration.modules.items()}
    adapter = make_adapter(tmp_path / "math", sizes)
    inputs = hooked_inputs(model, ids_of(data["math"]))
    outputs = hooked_outputs(model, list(sizes), ids_of(data["math"]))
    noticed = []
    for name, m in adapter.modules.items():
        module = model.get_submodule(name)
        before = module.weight.data.clone()
        module.weight.data += torch.from_numpy(m.delta).float()
        with torch.no_grad():
            after = [module(torch.from_numpy(x)).double().numpy() for x in inputs[name]]
        module.weight.data.copy_(before)
        moved = np.concatenate([(y - z)[1:] for y, z in zip(after, outputs[name], strict=True)])
        measured = (moved**2).sum(1).mean()
        x = calibration.inputs("math", name).astype(np.float64)
        energy = ((x @ m.delta.T) ** 2).sum(1).mean()
        size = ((np.abs(x) @ np.abs(m.delta).T) ** 2).sum(1).mean()
        allowed = bound("bf16_gram") * size + 1e-5 * measured
        assert abs(energy - measured) <= allowed, name
        other = ((np.roll(x, 1, 1) @ m.delta.T) ** 2).sum(1).mean()
        noticed.append(abs(other - measured) > allowed)
    assert np.mean(noticed) > 0.5
