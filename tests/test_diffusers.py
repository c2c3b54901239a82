"""diffusers files and their relatives: keys, where the scale comes from, what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from adapters import delta_of
from single_files import COMFYUI, DIFFUSERS, TRANSFORMER, adapter_metadata, make_file

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import check, open_adapter, read_header

U64 = 2.0**-53
Q = next(iter(DIFFUSERS))
TE = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
ONE = np.ones((2, 3), np.float32)
OLD = {"unet": "lora.down", "text_encoder": "lora_linear_layer", "text_encoder_2": "lora.down"}


def seed(rng):
    return int(rng.integers(1 << 30))


def assert_is(adapter, made, scales=None):
    """Each delta is scale * up @ down in float64; the scale as given, else alpha / rank."""
    assert set(adapter.modules) == set(made.modules)
    for name, truth in made.modules.items():
        ref = adapter.modules[name]
        weight = truth.weight.reshape(len(truth.up), -1)
        if scales is not None:
            weight = weight * scales[name]
        size = np.abs(truth.up.reshape(len(truth.up), -1)) @ np.abs(
            truth.down.reshape(len(truth.down), -1)
        )
        error = np.abs(delta_of(ref) - weight)
        assert (error <= 2 * (ref.rank + 3) * U64 * ref.scale * size).all(), name


@pytest.mark.parametrize(
    ("modules", "style", "naming"),
    [(DIFFUSERS, "lora_A", "diffusers"), (DIFFUSERS, OLD, "diffusers"),
     (TRANSFORMER, "lora_A", "diffusers"), (TRANSFORMER, "default", "diffusers"),
     (COMFYUI, "lora_A", "diffusion_model"), (COMFYUI, "lora_down", "diffusion_model"),
     ({"blocks.0.to_q": (4, 5, 2)}, "lora_A", "path")],
)  # fmt: skip
def test_every_style_of_keys_is_read(tmp_path, rng, modules, style, naming):
    made = make_file(
        tmp_path / "a.safetensors", modules, style=style, alpha=None, dtype="BF16", seed=seed(rng)
    )
    adapter = open_adapter(made.path)
    assert (adapter.format, adapter.config["naming"]) == ("diffusers", naming)
    assert adapter.config["alpha"] == "none"
    assert "no alpha in the file: alpha = rank is taken, scale 1" in adapter.notes
    assert (len(adapter.notes) == 2) == (style == "default")
    assert_is(adapter, made)
    assert check(made.path).counts() == {"used": 2 * len(modules), "refused": 0, "ignored": 0}


def test_alpha_tensors_give_the_scale(tmp_path, rng):
    alphas = {name: 1.5 + i for i, name in enumerate(COMFYUI)}
    made = make_file(tmp_path / "a.safetensors", COMFYUI, alphas=alphas, seed=seed(rng))
    adapter = open_adapter(made.path)
    assert adapter.config["alpha"] == "tensors" and adapter.notes == ()
    assert_is(adapter, made)
    assert check(made.path).counts()["used"] == 6


def test_bare_peft_keys_lose_their_prefix(tmp_path, rng):
    made = make_file(
        tmp_path / "a.safetensors", {"layers.0.q": (4, 5, 2)}, style="lora_A", alpha=None,
        prefix="base_model.model.", seed=seed(rng),
    )  # fmt: skip
    adapter = open_adapter(made.path)
    assert adapter.config["prefix"] == "base_model.model." and adapter.config["naming"] == "path"
    assert_is(adapter, made)
    extra = {f"layers.1.q.lora_{s}.weight": ONE for s in "AB"}
    make_file(made.path, {"a": (4, 5, 2), "b": (4, 5, 2)}, style="lora_A", alpha=None,
              prefix="base_model.model.", extra=extra)  # fmt: skip
    with pytest.raises(InputError, match="among keys of the other kind"):
        open_adapter(made.path)


def config(r, alpha, **more):
    """The LoraConfig fields that diffusers writes."""
    return {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": ["to_q"], **more}


def written(tmp_path, components, rank=None, **more):
    return make_file(
        tmp_path / "a.safetensors", DIFFUSERS, style="lora_A", alpha=None, rank=rank,
        metadata=adapter_metadata(components), **more,
    )  # fmt: skip


def test_metadata_gives_each_component_its_scale(tmp_path, rng):
    base = {"base_model_name_or_path": "org/sd"}
    made = written(tmp_path, {
        "unet": config(4, 6, alpha_pattern={"proj_in": 3, "attn1.to_out.0": 1}, **base),
        "text_encoder": config(4, 10, use_rslora=True, **base),
        "text_encoder_2": config(9, 18, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2}),
    }, seed=seed(rng))  # fmt: skip
    adapter = open_adapter(made.path)
    assert adapter.base_model == "org/sd" and adapter.config["alpha"] == "metadata"
    scales = {
        name: (10 / 2 if name == TE else 2 / 4 if name.startswith("text_encoder_2.") else 6 / 4)
        for name in DIFFUSERS
    }
    scales["unet.down_blocks.0.attentions.0.proj_in"] = 3 / 4
    scales["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"] = 1 / 4
    assert {name: ref.scale for name, ref in adapter.modules.items()} == scales
    assert_is(adapter, made, scales)
    other = scales | {TE: 10 / 4}  # rsLoRA forgotten
    with pytest.raises(AssertionError, match=re.escape(TE)):
        assert_is(adapter, made, other)


def test_the_scales_of_metadata_are_those_of_peft(tmp_path):
    """A LoraConfig of each component, as diffusers makes it, and PEFT's own lookup of patterns."""
    peft = pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    fields = {"r": 4, "lora_alpha": 6, "alpha_pattern": {r"^down_blocks\.0.*proj_in": 3, "q": 9}}
    stored = {**peft.LoraConfig(**fields).to_dict(), "target_modules": ["to_q"]}
    stored = json.loads(json.dumps(stored, default=str))
    written(tmp_path, dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), stored))
    adapter = open_adapter(tmp_path / "a.safetensors")
    for name, ref in adapter.modules.items():
        path = name.split(".", 1)[1]
        key = get_pattern_key(fields["alpha_pattern"], path)
        assert ref.scale == fields["alpha_pattern"].get(key, 6) / 4


ALL = {part: config(4, 4) for part in ("unet", "text_encoder", "text_encoder_2")}
BAD_METADATA = {
    "rank": (ALL | {"unet": config(8, 8)}, "gives rank 8, the tensors have 4"),
    "a component missing": ({"unet": config(4, 4)}, "says nothing about its component"),
    "dora": (ALL | {"unet": config(4, 4, use_dora=True)}, "DoRA"),
    "not lora": (ALL | {"unet": config(4, 4, peft_type="LOHA")}, "not 'LORA'"),
    "alpha": (ALL | {"unet": config(4, "x")}, "not a finite number"),
    "transposed": (ALL | {"unet": config(4, 4, fan_in_fan_out=True)}, "transposed"),
    "empty": ({}, "is empty"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_metadata_that_cannot_be_followed_is_refused(tmp_path, case):
    components, reason = BAD_METADATA[case]
    written(tmp_path, components)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.path == str(tmp_path / "a.safetensors") and caught.value.key
    if case == "rank":
        assert caught.value.key.startswith("unet.")
    if case == "a component missing":
        assert caught.value.key == TE
    assert not check(tmp_path / "a.safetensors").ok


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 4, "unet.r": 4}', '{"unet.r": NaN}'])
def test_metadata_that_is_no_json_object_is_refused(tmp_path, text):
    texts = {"lora_adapter_metadata": text}
    make_file(tmp_path / "a.safetensors", DIFFUSERS, style="lora_A", alpha=None, metadata=texts)
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.key in ("lora_adapter_metadata", "unet.r")


def test_metadata_and_alpha_tensors_together_are_refused_as_diffusers_does(tmp_path):
    extra = {f"{Q}.alpha": np.array(4, np.float32)}
    written(tmp_path, ALL, extra=extra)
    with pytest.raises(InputError, match="alpha tensors too"):
        open_adapter(tmp_path / "a.safetensors")


def test_oddities_of_metadata_are_noted(tmp_path):
    written(tmp_path, ALL | {"prior": config(4, 4)})
    notes = open_adapter(tmp_path / "a.safetensors").notes
    assert any("'prior' without tensors" in note for note in notes)
    written(tmp_path, ALL | {"": {"version": 1}})
    notes = open_adapter(tmp_path / "a.safetensors").notes
    assert any("keys of no component" in note for note in notes)
    texts = {"alpha": "32"}
    make_file(tmp_path / "b.safetensors", TRANSFORMER, style="lora_A", alpha=None, metadata=texts)
    notes = open_adapter(tmp_path / "b.safetensors").notes
    assert any("metadata alpha is '32'" in note for note in notes)


REFUSED = {
    "dora": ({f"{Q}.lora_magnitude_vector": ONE}, "DoRA"),
    "bias": ({f"{Q}.lora_B.bias": ONE}, "trained bias"),
    "processor": (
        {"unet.mid_block.attn1.processor.to_q_lora.down.weight": ONE}, "old diffusers",
    ),
    "half": ({"unet.x.lora_A.weight": ONE}, "half a pair: the module has no lora_B"),
    "old half": ({"unet.x.lora.up.weight": ONE}, "half a pair: the module has no lora.down"),
    "two styles": (
        {"unet.x.lora_A.weight": ONE, "unet.x.lora.up.weight": ONE.T}, "one module with both",
    ),
    "twice": (
        {"unet.x.lora_A.weight": ONE, "unet.x.lora_A.default.weight": ONE}, "second tensor",
    ),
    "adapter name": ({"unet.x.lora_A.style.weight": ONE}, "adapter name 'style'"),
    "kohya among them": (
        {"lora_unet_x.lora_up.weight": ONE, "lora_unet_x.lora_down.weight": ONE}, "kohya key",
    ),
    "embedding": ({"text_encoder.x.lora_embedding_A": ONE}, "embedding factors"),
    "full": ({"unet.conv_in.weight": ONE}, "full weight"),
    "norm": ({"unet.norm.bias": ONE}, "trained bias"),
    "tucker": ({f"{Q}.lora_mid.weight": ONE}, "Tucker"),
    "nested": ({"unet.x.base_layer.lora_A.weight": ONE}, "nested"),
    "orphan": ({"unet.x.alpha": np.array(1, np.float32)}, "no factors"),
    "conv1d": (
        {"unet.x.lora_A.weight": np.ones((2, 3, 3), np.float32),
         "unet.x.lora_B.weight": np.ones((4, 2, 1), np.float32)}, "Conv1d",
    ),
    "float64": (
        {"unet.x.lora_A.weight": ONE.astype("f8"), "unet.x.lora_B.weight": ONE.T}, "dtype F64",
    ),
    "stranger": ({"step": np.array(1, np.float32)}, "unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_names_file_key_and_reason_and_nothing_is_skipped(tmp_path, case):
    extra, reason = REFUSED[case]
    path = tmp_path / "a.safetensors"
    make_file(path, DIFFUSERS, style="lora_A", alpha=None, extra=extra)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(path)
    assert caught.value.path == str(path) and caught.value.key in extra
    rows = {row.key: row for row in check(path).keys}
    assert set(rows) == set(read_header(path).tensors)
    assert any(rows[key].status == "refused" for key in extra)
    assert all((row.status == "used") == (row.reason is None) for row in rows.values())
