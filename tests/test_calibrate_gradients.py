"""Output gradients: against autograd on the whole model, finite differences and the definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bases import draw_sequences, make_base, write_ids

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.record import calibrate, gradients

KINDS = ("Llama", "GPT2", "Bloom", "OPT")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    return {"math": write_ids(tmp_path / "d.jsonl", draw_sequences(rng, (9, 3, 14)))}


def sequences_of(data: dict[str, Path]) -> list[np.ndarray]:
    lines = data["math"].read_text().splitlines()
    return [np.array(json.loads(line)["input_ids"]) for line in lines]


def loss_of(model: torch.nn.Module, ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """Sum of -log p(label) over the tokens that have one (not -100), as the definition says."""
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    return -sum(p[t, label].log() for t, label in enumerate(labels) if label >= 0)


def hooked_gradients(
    model: torch.nn.Module, names: list[str], sequences: list[np.ndarray], labels: list[np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """By adding a zero leaf to every output: its gradient is the output's."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for ids, chosen in zip(sequences, labels, strict=True):
        leaves: dict[str, torch.Tensor] = {}

        def hook(name: str, leaves: dict = leaves) -> object:
            def add(module, args, out):
                leaves[name] = torch.zeros_like(out, requires_grad=True)
                return out + leaves[name]
            return add

        handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
        loss_of(model, ids, chosen).backward()
        for handle in handles:
            handle.remove()
        for name, leaf in leaves.items():
            found[name].append(leaf.grad.reshape(len(ids), -1).numpy())
    return found


def check(calibration, expected: dict[str, list[np.ndarray]]) -> None:
    sequence, position = calibration.sampled_tokens("math")
    for name, per_sequence in expected.items():
        rows = np.array([per_sequence[s][p] for s, p in zip(sequence, position, strict=True)])
        stored = calibration.gradients("math", name)
        # BF16 rounds by 2^-8 relative; float32 backward against a float64 softmax: 1e-4 of the row.
        # Where a label's p is nearly 1, p - 1 cancels: 1e-5 of the rows where it is not.
        size = np.abs(rows)
        scale = 1e-4 * size.max(1, keepdims=True) + 1e-5 * size.max()
        assert (np.abs(stored - rows) <= 2.0**-8 * size + scale).all()
        assert (np.abs(np.roll(stored, 1, 0) - rows) > 2.0**-7 * size + scale).any()
        squares = np.concatenate([g[1:].astype(np.float64) ** 2 for g in per_sequence])
        found = calibration.gradient_moment("math", name)
        assert np.abs(found - squares.mean(0)).max() <= 1e-3 * squares.mean(0).max()


@pytest.mark.parametrize("kind", KINDS)
def test_empirical_gradients_are_those_of_autograd(tmp_path, data, kind):
    model = make_base(tmp_path / "base", kind)
    calibration = calibrate(
        tmp_path / "base", data, tmp_path / "cal", gradients=True, labels="data", samples=10
    )
    assert calibration.has_gradients and calibration.info.labels == "data"
    sequences = sequences_of(data)
    labels = [ids[1:] for ids in sequences]
    check(calibration, hooked_gradients(model, list(calibration.modules), sequences, labels))


def test_fisher_gradients_are_of_labels_drawn_from_the_model(tmp_path, data, monkeypatch):
    model = make_base(tmp_path / "base")
    drawn: list[np.ndarray] = []
    draw = gradients._draw

    def noted(log_p, seed):
        labels = draw(log_p, seed)
        drawn.append(labels[:, 0].numpy())
        return labels

    monkeypatch.setattr(gradients, "_draw", noted)
    calibration = calibrate(
        tmp_path / "base", data, tmp_path / "cal", gradients=True, samples=10, threads=1
    )
    assert calibration.info.labels == "model"
    assert any("gradients need all of it" in note for note in calibration.notes)
    sequences = sequences_of(data)
    assert [len(labels) for labels in drawn] == [len(ids) for ids in sequences]
    check(calibration, hooked_gradients(model, list(calibration.modules), sequences, drawn))


def test_labels_have_the_probabilities_of_the_model(rng):
    """4000 draws of each of three rows: every frequency within 5 sigma."""
    p = rng.dirichlet(np.ones(6), size=3)
    counts = np.zeros((3, 6))
    for seed in range(4000):
        labels = gradients._draw(torch.from_numpy(np.log(p)), [seed, 7])[:, 0]
        counts[range(3), labels.numpy()] += 1
    assert (np.abs(counts - 4000 * p) <= 5 * np.sqrt(4000 * p * (1 - p)) + 1).all()
    again = [gradients._draw(torch.from_numpy(np.log(p)), [3, 7]).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_one_entry_is_the_finite_difference(tmp_path, data):
    model = make_base(tmp_path / "base", "GPT2").double()  # Llama's norms stay in float32
    name = "transformer.h.1.mlp.c_proj"
    calibration = calibrate(
        model, data, tmp_path / "cal", gradients=True, labels="data", samples=10**6
    )
    sequence, position = calibration.sampled_tokens("math")
    ids = sequences_of(data)[2]
    for token, channel in ((5, 3), (1, 0), (12, 15)):
        losses = []
        for step in (-1e-5, 1e-5):

            def nudge(module, args, out, step=step, token=token, channel=channel):
                out = out.clone()
                out[0, token, channel] += step
                return out

            handle = model.get_submodule(name).register_forward_hook(nudge)
            with torch.no_grad():
                losses.append(float(loss_of(model, ids, ids[1:])))
            handle.remove()
        expected = (losses[1] - losses[0]) / 2e-5
        row = np.flatnonzero((sequence == 2) & (position == token))[0]
        found = calibration.gradients("math", name)[row, channel]
        assert abs(found - expected) <= 2.0**-8 * abs(expected) + 1e-8


def test_an_output_changed_in_place_keeps_its_own_gradient(tmp_path, data):
    """The gradient of what comes out of the module, not of what it is turned into."""
    model = make_base(tmp_path / "base")
    block = model.model.layers[1].mlp
    forward = block.forward
    found = []
    for name, double in (("a", lambda x: forward(x) * 2), ("b", lambda x: forward(x).mul_(2))):
        block.forward = double
        calibration = calibrate(model, data, tmp_path / name, gradients=True, labels="data")
        found.append(calibration.gradients("math", DOWN))
    np.testing.assert_array_equal(*found)


def test_frozen_weights_change_nothing(tmp_path, data):
    model = make_base(tmp_path / "base")
    calibrate(model, data, tmp_path / "a", gradients=True)
    model.requires_grad_(False)
    calibrate(model, data, tmp_path / "b", gradients=True)
    one, other = ((tmp_path / n / "math.safetensors").read_bytes() for n in "ab")
    assert one == other


def test_small_gradients_keep_their_bits(tmp_path, data):
    """BF16 has the exponents of float32: 1e-30 times the loss is stored as precisely."""
    model = make_base(tmp_path / "base")
    plain = calibrate(model, data, tmp_path / "a", gradients=True, labels="data")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.o_proj.weight.mul_(2.0**-100)
    small = calibrate(model, data, tmp_path / "b", gradients=True, labels="data")
    for name, calibration, least in (("v_proj", plain, 1e-6), ("v_proj", small, 1e-36)):
        rows = calibration.gradients("math", f"model.layers.2.self_attn.{name}")
        share = (np.abs(rows) > least).mean()
        assert share > 0.5, (name, share)
        np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(rows)), rows)


def test_the_same_bytes_for_any_thread_count(tmp_path, data):
    make_base(tmp_path / "base")
    for threads in (1, 2, 3):
        calibrate(
            tmp_path / "base", data, tmp_path / str(threads), gradients=True, threads=threads
        )
    one, two, three = ((tmp_path / n / "math.safetensors").read_bytes() for n in "123")
    assert one == two == three


def test_a_module_that_does_not_matter_is_named(tmp_path, data):
    model = make_base(tmp_path / "base")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x).detach()
    with pytest.raises(InputError, match=r"layers.0.mlp.*: the loss does not depend"):
        calibrate(model, data, tmp_path / "cal", gradients=True)
    assert not (tmp_path / "cal").exists()
    assert not model.get_input_embeddings()._forward_hooks
