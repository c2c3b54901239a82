"""Adapters for tests, written in milliseconds without torch, with the truth beside them."""

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

DEFAULT_MODULES = {
    "model.layers.0.self_attn.q_proj": (12, 10, 4),
    "model.layers.0.self_attn.v_proj": (6, 10, 4),
    "model.layers.1.self_attn.q_proj": (12, 10, 4),
    "model.layers.1.mlp.down_proj": (10, 24, 4),
}


@dataclass(frozen=True)
class MadeModule:
    """The truth of one module: the stored factors, widened exactly, and its scale."""

    a: np.ndarray  # float64 (rank, d_in), flattened for conv
    b: np.ndarray  # float64 (d_out, rank)
    scale: float
    kind: str = "linear"

    @property
    def delta(self) -> np.ndarray:
        """scale * B @ A in float64, (d_out, d_in)."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class MadeAdapter:
    """A written adapter folder and the truth about it."""

    path: Path
    modules: dict[str, MadeModule]
    config: dict[str, Any]

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(sum(float((m.delta**2).sum()) for m in self.modules.values()))


def make_adapter(
    folder: str | Path,
    modules: Mapping[str, tuple[int, int, int]] | None = None,
    *,
    rank: int | None = None,
    ranks: Mapping[str, int] | None = None,
    alpha: float = 8,
    alphas: Mapping[str, float] | None = None,
    rslora: bool = False,
    dtype: str = "F32",
    dtypes: Mapping[str, str] | None = None,
    seed: int = 0,
    zero_b: bool | tuple[str, ...] = False,
    magnitude: float = 1.0,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    embeddings: tuple[str, ...] = (),
    convs: Mapping[str, tuple[int, int, int]] | None = None,
    base_model: str | None = "test/base",
    fan_in_fan_out: bool = False,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> MadeAdapter:
    """Write a PEFT folder and return its float64 factors and scales.

    ``modules`` maps a path to (d_out, d_in, rank); ``rank`` overrides all ranks, ``ranks`` some.
    Differing ranks, and ``alphas`` by module, go into patterns. ``dtype`` and ``dtypes`` (by
    module) are safetensors names. A is standard normal over sqrt(d_in), B standard normal times
    ``magnitude``; both come back as stored. ``zero_b``: all, or the named modules, have B = 0.
    ``factors`` gives (A, B) of some modules instead. ``embeddings`` names the modules that are
    embeddings (d_in is the vocabulary), ``convs`` gives (channels, kh, kw) of those that are
    Conv2d. ``config`` overrides config keys (the value ``...`` deletes one), ``extra`` adds
    tensors under their full key.
    """
    path = Path(folder)
    sizes = _sizes(modules or DEFAULT_MODULES, rank, ranks, factors)
    rule = _scale_rule(sizes, alpha, alphas or {})
    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = dict(extra or {})
    made: dict[str, MadeModule] = {}
    for name, (d_out, d_in, r) in sizes.items():
        stored = (dtypes or {}).get(name, dtype)
        a = generator.standard_normal((r, d_in)) / math.sqrt(d_in)
        b = generator.standard_normal((d_out, r)) * magnitude
        if zero_b is True or (zero_b and name in zero_b):
            b = np.zeros_like(b)
        if factors and name in factors:
            a, b = (np.asarray(f, dtype=np.float64) for f in factors[name])
        conv = (convs or {}).get(name)
        kind = "conv2d" if conv else "embedding" if name in embeddings else "linear"
        raw = from_float(a, stored), from_float(b, stored)
        tensors.update(_tensors(name, kind, conv, raw, stored))
        module_alpha = (alphas or {}).get(name, alpha)
        scale = module_alpha / (math.sqrt(r) if rslora else r)
        wide_a, wide_b = (_widen(f, stored) for f in raw)
        made[name] = MadeModule(wide_a, wide_b, scale, kind)
    written = {
        **_base_config(sorted(sizes), base_model, fan_in_fan_out, rslora),
        **rule,
        **(config or {}),
    }
    written = {key: value for key, value in written.items() if value is not ...}
    path.mkdir(parents=True, exist_ok=True)
    safetensors.write(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    return MadeAdapter(path, made, written)


def make_zoo(folder: str | Path, count: int, **arguments: Any) -> list[MadeAdapter]:
    """``count`` adapters ``adapter_000``, ... of one recipe with seeds 0, 1, ..."""
    seed = arguments.pop("seed", 0)
    return [
        make_adapter(Path(folder) / f"adapter_{i:03d}", seed=seed + i, **arguments)
        for i in range(count)
    ]


def read_factor(ref: Any) -> np.ndarray:
    """The bytes a ``FactorRef`` points at, widened to float64 and flattened to two dimensions."""
    with open(ref.file.path, "rb") as file:
        file.seek(ref.offset)
        data = file.read(ref.nbytes)
    raw = np.frombuffer(data, dtype=safetensors.STORAGE[ref.dtype])
    return _widen(raw, ref.dtype).reshape(ref.shape[0], -1)


def delta_of(module: Any) -> np.ndarray:
    """scale * B @ A of a ``ModuleRef`` in float64, (d_out, d_in), read from its file."""
    return module.scale * (read_factor(module.b) @ read_factor(module.a))


def _widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    return raw.astype(np.float64) if dtype == "F64" else to_f32(raw, dtype).astype(np.float64)


def _sizes(
    modules: Mapping[str, tuple[int, int, int]],
    rank: int | None,
    ranks: Mapping[str, int] | None,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]] | None,
) -> dict[str, tuple[int, int, int]]:
    sizes = {}
    for name, (d_out, d_in, r) in modules.items():
        if rank is not None:
            r = rank
        sizes[name] = (d_out, d_in, (ranks or {}).get(name, r))
    for name, (a, b) in (factors or {}).items():
        sizes[name] = (b.shape[0], a.shape[1], a.shape[0])
    return sizes


def _scale_rule(
    sizes: Mapping[str, tuple[int, int, int]], alpha: float, alphas: Mapping[str, float]
) -> dict[str, Any]:
    ranks = {name: r for name, (_, _, r) in sizes.items()}
    r = max(ranks.values())
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != r},
        "alpha_pattern": dict(alphas),
    }


def _base_config(
    names: list[str], base_model: str | None, fan_in_fan_out: bool, rslora: bool
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": rslora,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _tensors(
    name: str,
    kind: str,
    conv: tuple[int, int, int] | None,
    raw: tuple[np.ndarray, np.ndarray],
    dtype: str,
) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    stem = f"base_model.model.{name}.lora_"
    keys = (f"{stem}A.weight", f"{stem}B.weight")
    if kind == "embedding":
        keys = (f"{stem}embedding_A", f"{stem}embedding_B")
    a, b = raw
    shapes = ((a.shape[0], *conv), (*b.shape, 1, 1)) if conv else (a.shape, b.shape)
    return {keys[0]: (dtype, shapes[0], a), keys[1]: (dtype, shapes[1], b)}
