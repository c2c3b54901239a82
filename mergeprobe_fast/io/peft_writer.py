"""Writing a PEFT adapter folder that PEFT and vLLM load as it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import safetensors
from .adapter import ModuleKind
from .dtypes import FACTOR_DTYPES, from_float, to_f32
from .layout import PREFIX, full_shapes
from .peft import CONFIG_NAME, WEIGHTS_NAME, is_adapter

NOTES_NAME = "mergeprobe_notes.json"


@dataclass(frozen=True, slots=True)
class WrittenModule:
    """One module to write: ``delta = scale * b @ a``, in the orientation of ``ModuleRef``.

    ``a`` is (rank, d_in) and ``b`` (d_out, rank), of any float dtype. ``conv_shape`` is
    (in channels, kernel height, kernel width), for "conv2d" only; d_in is their product.
    """

    name: str
    kind: ModuleKind
    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0  # multiplied into b before rounding
    conv_shape: tuple[int, int, int] | None = None
    fan_in_fan_out: bool = False


@dataclass(frozen=True, slots=True)
class RoundedModule:
    """What was written for one module. ``a`` and ``b`` widen it exactly, on demand."""

    name: str
    dtype: str
    raw_a: np.ndarray  # (rank, d_in) in the storage of ``dtype``; BF16 as its uint16 bits
    raw_b: np.ndarray

    @property
    def a(self) -> np.ndarray:
        """The written A as float32, (rank, d_in)."""
        return to_f32(self.raw_a, self.dtype)

    @property
    def b(self) -> np.ndarray:
        """The written B as float32, (d_out, rank), with the scale in it."""
        return to_f32(self.raw_b, self.dtype)


def write_adapter(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None,
    modules: Iterable[WrittenModule],
    dtype: str = "F32",
    task_type: str | None = None,
    revision: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, RoundedModule]:
    """Write a PEFT LoRA folder and return what was written, to measure the rounding against.

    The scale goes into B and ``lora_alpha = r``, so that it is 1 for PEFT and for vLLM, which
    reads no patterns. Ranks may differ: ``r`` is then the largest, and smaller ones stand in
    ``rank_pattern`` and ``alpha_pattern`` under keys that match one module only.

    ``target_modules`` lists full paths. Should the base have another module whose path ends in
    ``.<one of them>``, PEFT puts a zero LoRA there and says that its weights are missing.

    ``dtype`` is "F32", "BF16" or "F16", rounded to nearest even; a value that is not finite, or not
    any more after rounding, is an ``InputError`` naming the module. ``notes`` go into
    ``mergeprobe_notes.json``. An existing adapter is not overwritten: to replace one, write into
    what an ``AtomicFolder`` yields.
    """
    folder = Path(folder)
    if dtype not in FACTOR_DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(FACTOR_DTYPES)}", path=folder)
    if is_adapter(folder):
        raise InputError("already holds an adapter", path=folder)
    tensors: dict[str, safetensors.TensorLike] = {}
    written: dict[str, RoundedModule] = {}
    flags: dict[str, bool] = {}
    for module in modules:
        if module.name in written:
            raise InputError("module given twice", path=folder, key=module.name)
        rounded = round_module(module, dtype, folder)
        written[module.name] = rounded
        flags[module.name] = module.fan_in_fan_out
        tensors.update(_tensors(module, rounded))
    if not written:
        raise InputError("no modules to write", path=folder)
    ranks = {name: module.raw_a.shape[0] for name, module in written.items()}
    config = adapter_config(ranks, any(flags.values()), base_model, task_type, revision)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    _write_json(folder / CONFIG_NAME, config)
    if notes:
        _write_json(folder / NOTES_NAME, {"notes": list(notes)})
    return written


def round_module(module: WrittenModule, dtype: str, path: Path) -> RoundedModule:
    """What a module becomes in a file; InputError naming it when that is not possible."""
    _check(module, path)
    # float32 would round the product twice; a float64 copy of one B is small.
    b = module.b if module.scale == 1.0 else np.asarray(module.b, np.float64) * module.scale
    raw_a, raw_b = from_float(module.a, dtype), from_float(b, dtype)
    for name, given, raw in (("A", module.a, raw_a), ("B", b, raw_b)):
        if not np.isfinite(to_f32(raw, dtype)).all():
            finite = np.isfinite(given).all()
            reason = f"{name} overflows {dtype}" if finite else f"{name} has NaN or Inf"
            raise InputError(reason, path=path, key=module.name)
    return RoundedModule(module.name, dtype, raw_a, raw_b)


def _check(module: WrittenModule, folder: Path) -> None:
    a, b = module.a, module.b
    reason = None
    if not module.name or module.name != module.name.strip("."):
        reason = "is not a module path"
    elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
        reason = f"A {a.shape} and B {b.shape} are not (rank, d_in) and (d_out, rank)"
    elif not (np.issubdtype(a.dtype, np.floating) and np.issubdtype(b.dtype, np.floating)):
        reason = f"factors are {a.dtype} and {b.dtype}, not floating point"
    elif (module.kind == "conv2d") != (module.conv_shape is not None):
        reason = f"conv_shape {module.conv_shape} does not go with kind {module.kind!r}"
    elif module.conv_shape is not None and np.prod(module.conv_shape) != a.shape[1]:
        reason = f"conv_shape {module.conv_shape} does not give d_in {a.shape[1]}"
    if reason:
        raise InputError(reason, path=folder, key=module.name or "''")


def _tensors(
    module: WrittenModule, rounded: RoundedModule
) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    stem = f"{PREFIX}{module.name}.lora_"
    key_a, key_b = f"{stem}A.weight", f"{stem}B.weight"
    if module.kind == "embedding":
        key_a, key_b = f"{stem}embedding_A", f"{stem}embedding_B"
    shape_a, shape_b = full_shapes(rounded.raw_a.shape, rounded.raw_b.shape, module.conv_shape)
    return {
        key_a: (rounded.dtype, shape_a, rounded.raw_a),
        key_b: (rounded.dtype, shape_b, rounded.raw_b),
    }


def adapter_config(
    ranks: dict[str, int],
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """PEFT's config for modules of these ranks, every scale 1."""
    r = max(ranks.values())
    # "^" holds PEFT's "(.*\.)?" prefix off, so that the key matches this one path and no other.
    pattern = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != r}
    # No peft_version: PEFT fills in its own, and versions before 0.18 warn of the key.
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern,
        "revision": revision,
        "target_modules": sorted(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_bytes((text + "\n").encode("utf-8"))
