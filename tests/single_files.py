"""kohya and diffusers files for tests, written without torch, with the truth beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.dtypes import from_float, to_f32

# Names as sd-scripts writes them for SD 1.5, SDXL and Flux; (d_out, d_in, rank), convs below.
KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (12, 10, 4),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (24, 10, 4),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (10, 8, 4),
    "lora_unet_down_blocks_0_resnets_0_conv1": (9, 8 * 9, 3),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (6, 7, 4),
}
SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (12, 10, 4),
    "lora_unet_input_blocks_1_0_in_layers_2": (9, 8 * 9, 3),
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": (6, 7, 4),
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": (6, 7, 4),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (12, 10, 4),
    "lora_unet_single_blocks_37_linear1": (20, 10, 4),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (6, 6, 4),
}
CONVS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": (8, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": (8, 3, 3),
    "lora_unet_input_blocks_1_0_in_layers_2": (8, 3, 3),
    "unet.down_blocks.0.resnets.0.conv1": (8, 3, 3),
    "unet.down_blocks.0.attentions.0.proj_in": (8, 1, 1),
}
DIFFUSERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (12, 10, 4),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (10, 12, 4),
    "unet.down_blocks.0.attentions.0.proj_in": (10, 8, 4),
    "unet.down_blocks.0.resnets.0.conv1": (9, 8 * 9, 4),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (6, 7, 4),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (8, 7, 4),
}
TRANSFORMER = {
    "transformer.transformer_blocks.0.attn.to_q": (12, 10, 4),
    "transformer.single_transformer_blocks.3.proj_mlp": (20, 10, 4),
}
COMFYUI = {
    "diffusion_model.double_blocks.0.img_attn.qkv": (12, 10, 4),
    "diffusion_model.single_blocks.3.linear1": (20, 10, 4),
}
ENDS = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


@dataclass(frozen=True)
class Made:
    """A module's truth: down (rank, in[, kh, kw]) and up (out, rank[, 1, 1]) widened, and alpha."""

    down: np.ndarray  # float64, shaped as stored
    up: np.ndarray
    alpha: float | None

    @property
    def weight(self) -> np.ndarray:
        """up @ down * alpha / rank as the layer's weight: (out, in) or (out, in, kh, kw)."""
        scale = 1.0 if self.alpha is None else self.alpha / self.down.shape[0]
        if self.down.ndim == 2:
            return scale * (self.up @ self.down)
        return scale * np.einsum("or,rikl->oikl", self.up[:, :, 0, 0], self.down)


@dataclass(frozen=True)
class MadeFile:
    path: Path
    modules: dict[str, Made]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float((m.weight**2).sum()) for m in self.modules.values()))


def make_file(
    path: str | Path,
    modules: Mapping[str, tuple[int, int, int]] | None = None,
    *,
    style: str | Mapping[str, str] = "lora_down",
    prefix: str = "",
    rank: int | None = None,
    alpha: float | None = 2.0,
    alphas: Mapping[str, float | None] | None = None,
    alpha_dtype: str | None = "F32",
    alpha_shape: tuple[int, ...] = (),
    dtype: str = "F32",
    seed: int = 0,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
) -> MadeFile:
    """Write one LoRA file. ``style`` is of ``ENDS``, for all or by the first part of the name.

    ``alpha`` (and ``alphas`` by module) become ``.alpha`` tensors; None writes none. ``factors``
    gives flat (down, up) of some modules, ``extra`` adds tensors and ``drop`` leaves keys out.
    """
    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    made: dict[str, Made] = {}
    for name, (d_out, d_in, r) in (modules or KOHYA).items():
        r = rank or r
        down = generator.standard_normal((r, d_in)) / math.sqrt(d_in)
        up = generator.standard_normal((d_out, r))
        if factors and name in factors:
            down, up = factors[name]
        conv = CONVS.get(name)
        down_shape = (len(down), *conv) if conv else down.shape
        up_shape = (*up.shape, 1, 1) if conv else up.shape
        raw = from_float(down, dtype), from_float(up, dtype)
        part = name.split(".")[0]
        ends = ENDS[style if isinstance(style, str) else style[part]]
        tensors[f"{prefix}{name}.{ends[0]}"] = (dtype, down_shape, raw[0])
        tensors[f"{prefix}{name}.{ends[1]}"] = (dtype, up_shape, raw[1])
        value = (alphas or {}).get(name, alpha)
        if value is not None:
            stored = np.full(1, value, "<i8") if alpha_dtype == "I64" else (
                np.full(1, value, "<f8") if alpha_dtype == "F64"
                else from_float(np.full(1, value), alpha_dtype)
            )  # fmt: skip
            tensors[f"{prefix}{name}.alpha"] = (alpha_dtype, alpha_shape, stored)
        wide = (to_f32(raw[0], dtype), to_f32(raw[1], dtype))
        made[name] = Made(
            wide[0].astype(np.float64).reshape(down_shape),
            wide[1].astype(np.float64).reshape(up_shape), value,
        )  # fmt: skip
    tensors.update(extra or {})
    kept = {key: tensor for key, tensor in tensors.items() if key not in drop}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    safetensors.write(path, kept, metadata)
    return MadeFile(Path(path), made)


def adapter_metadata(components: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """``lora_adapter_metadata`` of diffusers: config keys under their component."""
    flat = {
        f"{part}.{key}" if part else key: value
        for part, config in components.items()
        for key, value in config.items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat, indent=2, sort_keys=True)}
