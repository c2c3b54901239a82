"""Models that look like a chain of layers and are none are loaded as a whole, and it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bases import draw_sequences, hooked_inputs, make_base, write_ids
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.record import plan_calibration
from mergeprobe_fast.record.base import NotStreamable, open_base
from mergeprobe_fast.record.capture import Discovery
from mergeprobe_fast.record.layers import LayeredModel


def decoder(order=lambda layers: layers, between=lambda h, length: h, extra=lambda h: {}) -> Any:
    """A Llama decoder written out, with something of its own in it."""

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        angles = self.rotary_emb(hidden, positions)
        for layer in order(list(self.layers)):
            hidden = between(hidden, input_ids.shape[1])
            hidden = layer(hidden, position_embeddings=angles, **extra(hidden))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward


ORDER = "its layers are not called in their order, once each"
VARIANTS = {
    "plain": (decoder(), None),
    "scaled between": (decoder(between=lambda h, n: h * 0.9), "something stands between"),
    "reversed": (decoder(order=lambda x: x[::-1]), ORDER),
    "one left out": (decoder(order=lambda x: x[:1] + x[2:]), ORDER),
    "last left out": (decoder(order=lambda x: x[:-1]), ORDER),
    "more handed on": (
        decoder(extra=lambda h: {"memory": {"of": [h * 2]}}), "get more than the hidden states"
    ),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    sequences = draw_sequences(rng, (9, 12))
    return {"d": write_ids(tmp_path / "d.jsonl", sequences)}


@pytest.mark.parametrize("name", VARIANTS)
def test_only_a_plain_chain_is_streamed(tmp_path, rng, monkeypatch, name):
    forward, reason = VARIANTS[name]
    monkeypatch.setattr(LlamaModel, "forward", forward)
    model = make_base(tmp_path / "base")
    sequences = draw_sequences(rng, (9, 12))
    plan = plan_calibration(
        tmp_path / "base", {"d": write_ids(tmp_path / "d.jsonl", sequences)}
    )
    assert plan.streamed == (reason is None)
    assert reason is None or any(reason in note for note in plan.info.notes)
    calibration = plan.record(tmp_path / "cal")
    seen = hooked_inputs(model, sequences)
    for module in calibration.modules:
        rows = np.concatenate([x[1:] for x in seen[module]])
        stored = calibration.inputs("d", module)
        np.testing.assert_array_equal(stored, bf16_to_f32(f32_to_bf16(rows)))


def test_a_chain_that_breaks_on_longer_texts_is_an_error(tmp_path, data, monkeypatch):
    forward = decoder(between=lambda h, length: h if length < 8 else h * 0.9)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    make_base(tmp_path / "base")
    plan = plan_calibration(tmp_path / "base", data)
    assert plan.streamed
    with pytest.raises(InputError, match="layer by layer: something stands between its layers"):
        plan.record(tmp_path / "cal")
    assert not (tmp_path / "cal").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda out: (out, out), "its layers return more than the hidden states"),
        (lambda out: {"hidden": out}, "its layers return more than the hidden states"),
        (lambda out: out * float(out.sum()), "a layer does not run without weights"),
    ],
)
def test_layers_that_cannot_be_tried_without_weights(tmp_path, data, monkeypatch, change, reason):
    forward = LlamaDecoderLayer.forward
    make_base(tmp_path / "base")
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *a, **k: change(forward(self, *a, **k))
    )
    base = open_base(tmp_path / "base", None, "auto")
    layers = LayeredModel(base, base.skeleton())
    with pytest.raises(NotStreamable, match=reason):
        layers.discover(torch.ones(1, 5, dtype=torch.long), Discovery({}))


def test_the_skeleton_has_no_weights_and_the_right_buffers(tmp_path, data):
    make_base(tmp_path / "base", "Gemma3Text")
    register = torch.nn.Module.register_parameter
    plan = plan_calibration(tmp_path / "base", data)
    assert torch.nn.Module.register_parameter is register
    assert all(p.is_meta for p in plan._model.parameters())
    whole = plan._base.whole()
    for name, buffer in whole.named_buffers():
        assert torch.equal(plan._model.get_buffer(name), buffer), name
    linear = torch.nn.Linear(2, 2)
    assert not linear.weight.is_meta
