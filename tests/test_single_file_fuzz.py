"""Whatever a file holds: every tensor is accounted for, and opening agrees with the account."""

from __future__ import annotations

import math

import numpy as np
import pytest
from adapters import delta_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import check, open_adapter, read_header, safetensors

NAMES = ["lora_unet_x", "lora_te1_y_0_q", "lycoris_z", "unet.x", "text_encoder.a.0.q", "blocks.0",
         "diffusion_model.x", "base_model.model.x", "lone", "unet.x.base_layer"]  # fmt: skip
ENDS = ["lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "lora.down.weight",
        "lora.up.weight", "lora_A.default.weight", "lora_B.other.weight", "alpha", "alpha",
        "lora_linear_layer.up.weight", "lora_mid.weight", "dora_scale", "hada_w1_a", "diff",
        "lora_up.bias", "weight", "lora_embedding_A", "b_norm", "whatever"]  # fmt: skip
SHAPES = [(), (1,), (2,), (2, 3), (4, 2), (2, 3, 1, 1), (4, 2, 1, 1), (2, 3, 3, 3), (0, 3)]
DTYPES = ["<f4", "<f2", "<f8", "<i8", "?"]
METADATA = ['{"unet.r": 2, "unet.lora_alpha": 3}', "{", '{"r": 2}', '{"unet.use_dora": true}']
PAIRS = [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")]


@st.composite
def files(draw):
    tensors = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True)):
        down, up = draw(st.sampled_from(PAIRS))
        tensors[f"{name}.{down}"] = np.ones((2, 3), np.float32)
        tensors[f"{name}.{up}"] = np.ones((4, 2), np.float32)
        if draw(st.booleans()):
            alpha = draw(st.sampled_from([1.0, 2.5, 0.0, -1.0, math.nan, math.inf]))
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    for _ in range(draw(st.integers(0, 2))):
        key = f"{draw(st.sampled_from(NAMES))}.{draw(st.sampled_from(ENDS))}"
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
        tensors[key] = np.ones(shape, dtype)
    texts = {"format": "pt"}
    if draw(st.integers(0, 3)) == 0:
        texts["lora_adapter_metadata"] = draw(st.sampled_from(METADATA))
    return tensors, texts


@pytest.mark.parametrize("opened", [True, False])
@given(file=files())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_tensor_is_accounted_for_and_opening_agrees(tmp_path, opened, file):
    tensors, texts = file
    path = tmp_path / "a.safetensors"
    safetensors.write(path, tensors, texts)
    found = check(path)
    assert [row.key for row in found.keys] == list(read_header(path).tensors)
    assert all((row.status == "used") == (row.reason is None) for row in found.keys)
    if found.ok != opened:
        return
    if not opened:
        with pytest.raises(InputError) as caught:
            open_adapter(path)
        first = found.problems[0]
        assert caught.value.reason.startswith(first.reason)
        assert (caught.value.path, caught.value.key) == (first.path, first.key) and first.path
        return
    assert all(row.status == "used" for row in found.keys)
    adapter = open_adapter(path)
    assert len(adapter.modules) == len(found.modules) > 0
    used = len(adapter.modules) * 2 + sum(key.endswith(".alpha") for key in tensors)
    assert used == len(tensors)
    for name, ref in adapter.modules.items():
        alpha = tensors.get(f"{adapter.config['prefix']}{name}.alpha")
        scale = 1.5 if "lora_adapter_metadata" in texts and alpha is None else None
        if scale is None:
            scale = 1.0 if alpha is None else float(alpha.reshape(-1)[0]) / ref.rank
        elif adapter.format == "kohya":  # which knows no such metadata
            scale = 1.0
        elif adapter.config["naming"] == "path":  # {"r": 2} and PEFT's default alpha 8
            scale = 4.0
        assert ref.scale == scale and math.isfinite(scale) and scale > 0
        size = tensors[ref.a.key].reshape(ref.rank, -1)
        expected = scale * tensors[ref.b.key].reshape(-1, ref.rank).astype("f8") @ size
        np.testing.assert_array_equal(delta_of(ref), expected)
