"""The factors of one adapter in a live PEFT model, and how they are written down."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.layout import PREFIX, ModuleNames
from mergeprobe_fast.io.peft import CONFIG_NAME
from mergeprobe_fast.io.peft_config import find_patterns, read_config
from mergeprobe_fast.io.probe_json import Initial
from mergeprobe_fast.io.safetensors import TensorLike
from mergeprobe_fast.record.peft_layers import (
    live_source,
    lora_layers,
    refuse_unmergeable,
    tuner_of,
)

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, eq=False)
class LiveModule:
    """One module: ``delta = scale * B @ A`` of trained parameters, for convolutions not flat."""

    name: str
    a: torch.nn.Parameter  # (r, d_in)
    b: torch.nn.Parameter  # (d_out, r)
    scale: float
    keys: tuple[str, str]  # of A and B in the weights file


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """An adapter that can be recorded."""

    name: str
    modules: tuple[LiveModule, ...]  # in the model's order
    dtype: str  # "F32", "BF16" or "F16"
    base_model: str | None
    config: bytes  # adapter_config.json

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """A and B of every module in turn."""
        for module in self.modules:
            yield module.a
            yield module.b

    def initial(self) -> Initial:
        """Fingerprints of all A as they are now, as float32 (r, d_in) in rows.

        Of B where A is zero: PEFT starts an embedding's A at zero, and its B at random.
        """
        whole, each = hashlib.sha256(), {}
        for module in self.modules:
            start = module.a if bool(module.a.any()) else module.b
            raw = start.detach().flatten(1).float().cpu().contiguous().numpy().tobytes()
            whole.update(raw)
            each[module.name] = hashlib.sha256(raw).hexdigest()[:16]
        return Initial(whole.hexdigest(), each)

    def tensors(self) -> dict[str, TensorLike]:
        """What PEFT's weights file holds, bit by bit; on a CPU it shares the memory.

        Raises:
            InputError: for a factor that was converted to another dtype meanwhile.
        """
        found: dict[str, TensorLike] = {}
        for module in self.modules:
            for key, weight in zip(module.keys, (module.a, module.b), strict=True):
                if _STORED.get(weight.dtype) != self.dtype:
                    reason = f"was converted to {weight.dtype} since recording began"
                    raise InputError(reason, path=f"adapter {self.name!r}", key=module.name)
                found[key] = _as_stored(weight)
        return found


def find_adapter(model: Any, name: str | None) -> LiveAdapter:
    """The adapter of that name, or the only active one.

    Raises:
        InputError: no LoRA, several active adapters and no name, an adapter that is more than
            ``scale * B @ A``, frozen or shared factors, factors that are sharded or of several
            dtypes, a scale that its config does not give.
    """
    tuner = tuner_of(model)
    name = _chosen(tuner, name)
    refuse_unmergeable(tuner, [name])
    live_source(tuner, [name])  # refuses layers that are not a plain pair of factors
    modules = tuple(_module(path, layer, name) for path, layer in lora_layers(tuner, [name]))
    _refuse_frozen_or_shared(modules)
    dtypes = {str(p.dtype).removeprefix("torch."): p.dtype for m in modules for p in (m.a, m.b)}
    dtype = _STORED.get(next(iter(dtypes.values()))) if len(dtypes) == 1 else None
    if dtype is None:
        reason = f"its factors are {' and '.join(sorted(dtypes))}; expected one of float32, "
        raise InputError(reason + "bfloat16, float16 for all", path=f"adapter {name!r}")
    base, text = _config(tuner, name)
    _check_scales(modules, text, name)
    return LiveAdapter(name, modules, dtype, base, text)


def _chosen(tuner: Any, name: str | None) -> str:
    known = list(tuner.peft_config)
    if name is not None:
        if name not in known:
            raise InputError(f"no such adapter; the model has {', '.join(known)}", key=str(name))
        return name
    active = list(dict.fromkeys(tuner.active_adapters))
    if len(active) != 1:
        reason = f"{len(active)} adapters are active ({', '.join(active)}); name one with adapter="
        raise InputError(reason, key="adapter")
    return active[0]


def _module(path: str, layer: Any, name: str) -> LiveModule:
    scale = float(layer.scaling[name])
    if scale == 0:
        raise InputError("its scale is 0: it does not learn", path=f"adapter {name!r}", key=path)
    stem = f"{PREFIX}{path}.lora_"
    if name in layer.lora_A:
        keys = f"{stem}A.weight", f"{stem}B.weight"
        return LiveModule(path, layer.lora_A[name].weight, layer.lora_B[name].weight, scale, keys)
    keys = f"{stem}embedding_A", f"{stem}embedding_B"
    a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return LiveModule(path, a, b, scale, keys)


def _refuse_frozen_or_shared(modules: tuple[LiveModule, ...]) -> None:
    seen: dict[int, str] = {}
    for module in modules:
        for letter, weight in (("A", module.a), ("B", module.b)):
            if not weight.requires_grad:
                reason = f"its {letter} is frozen: there are no gradients to record"
                raise InputError(reason, key=module.name)
            other = seen.setdefault(weight.data_ptr(), module.name)
            if other != module.name:
                raise InputError(f"shares its {letter} with {other}; not supported",
                                 key=module.name)  # fmt: skip


def _config(tuner: Any, name: str) -> tuple[str | None, bytes]:
    """The name of the base model, and what PEFT would save as the adapter's config."""
    config = copy.copy(tuner.peft_config[name])
    base = config.base_model_name_or_path or getattr(tuner.model, "name_or_path", None)
    config.base_model_name_or_path = base or None
    config.inference_mode = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return config.base_model_name_or_path, (Path(folder) / CONFIG_NAME).read_bytes()
    except OSError as error:
        reason = f"its config cannot be written to a temporary folder: {error.strerror or error}"
        raise InputError(reason, path=f"adapter {name!r}") from error


def _check_scales(modules: tuple[LiveModule, ...], config: bytes, name: str) -> None:
    """Whoever loads the snapshot knows the scales from its config alone."""
    reading = read_config(json.loads(config))
    for key, reason in reading.refused:
        raise InputError(reason, path=f"adapter {name!r}", key=key)
    rules = reading.rules
    names = tuple(m.name for m in modules)
    index = ModuleNames(names, {path: i for i, path in enumerate(names)})
    ranks, _ = find_patterns(rules.rank_pattern, index, rules.r)
    alphas, _ = find_patterns(rules.alpha_pattern, index, rules.alpha)
    for module, rank, alpha in zip(modules, ranks, alphas, strict=True):
        said = alpha / (math.sqrt(rank) if rules.rslora else rank)
        if rank != len(module.a) or not math.isclose(said, module.scale, rel_tol=1e-12):
            reason = (
                f"has rank {len(module.a)} and scale {module.scale:g}, but its config gives "
                f"{rank} and {said:g}"
            )
            raise InputError(reason, path=f"adapter {name!r}", key=module.name)


def _as_stored(weight: torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    held = weight.detach().cpu().contiguous()
    bits = held.view(torch.int16) if held.dtype == torch.bfloat16 else held
    return _STORED[held.dtype], tuple(held.shape), bits.numpy()
