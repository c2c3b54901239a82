"""LoRA layers of a live PEFT model as a source of factors, read in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from peft.utils import ModulesToSaveWrapper

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.peft_config import read_config
from mergeprobe_fast.merging.source import MemorySource, Stored
from mergeprobe_fast.zoo import Module

_STORED = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
}  # fmt: skip
# What the layers themselves answer: ranks and scales are read from them, not from patterns.
_ANSWERED_BY_LAYERS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save")


def tuner_of(model: Any) -> LoraModel:
    """The LoraModel inside a PeftModel, or the model itself; InputError for anything else."""
    from peft.tuners.adalora import AdaLoraModel

    tuner = model if isinstance(model, LoraModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, LoraModel) or isinstance(tuner, AdaLoraModel):
        raise InputError(f"expected a PEFT model with LoRA adapters, got {type(model).__name__}",
                         key="model")  # fmt: skip
    return tuner


def lora_layers(tuner: LoraModel, adapters: Sequence[str]) -> Iterator[tuple[str, LoraLayer]]:
    """Path and layer of every LoRA layer that one of the adapters has, in the model's order."""
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, LoraLayer) and any(has(layer, a) for a in adapters):
            yield name, layer


def has(layer: LoraLayer, adapter: str) -> bool:
    """Whether the adapter adapts this layer."""
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def weights_of(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as the layer holds them, detached: 2-D, for convolutions with kernel dimensions."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()


def refuse_unmergeable(tuner: LoraModel, adapters: Sequence[str]) -> None:
    """Refuse adapters that are more than ``scale * B @ A`` of layers, by what they say and are.

    Raises:
        InputError: naming adapter or layer, and the reason.
    """
    for name in adapters:
        config = tuner.peft_config[name].to_dict()
        for key in _ANSWERED_BY_LAYERS:
            config.pop(key, None)
        for key, reason in read_config(config).refused:
            raise InputError(reason, path=f"adapter {name!r}", key=key)
        if config.get("bias", "none") != "none":
            reason = "biases of the base model were trained with it, and would be left behind"
            raise InputError(reason, path=f"adapter {name!r}", key="bias")
        if config.get("ensure_weight_tying"):
            reason = "its factors are shared between layers; a merged pair per layer cannot be"
            raise InputError(reason, path=f"adapter {name!r}", key="ensure_weight_tying")
    for path, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in adapters:
                if name in module.modules_to_save:
                    reason = f"adapter {name!r} has a trained copy of it (modules_to_save)"
                    raise InputError(f"{reason}, which a merged LoRA would drop", key=path)


@dataclass(frozen=True)
class LiveLayer:
    """One LoRA layer, and how its merged factors go back into it."""

    layer: LoraLayer
    dtype: torch.dtype  # of the weights that are merged, the wider one where they differ
    device: torch.device
    shape_a: tuple[int, ...]  # of A and B without the rank, as the layer holds them
    shape_b: tuple[int, ...]

    def tensors(
        self, a: np.ndarray, b: np.ndarray, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merged A (r, d_in) and B (d_out, r) in the shapes of the layer, on its device."""
        first, *kernel = self.shape_b
        shapes = (len(a), *self.shape_a), (first, len(a), *kernel)
        return tuple(
            torch.from_numpy(np.ascontiguousarray(x)).reshape(shape).to(self.device, dtype)
            for x, shape in zip((a, b), shapes, strict=True)
        )  # type: ignore[return-value]


def live_source(
    tuner: LoraModel, adapters: Sequence[str]
) -> tuple[MemorySource, dict[str, LiveLayer]]:
    """The factors of the adapters where they are (copied only from a GPU), and their layers.

    Raises:
        InputError: a layer or a weight that cannot be merged as ``scale * B @ A``, by name.
    """
    modules: list[Module] = []
    factors: dict[tuple[int, int], tuple[Stored, Stored, float]] = {}
    live: dict[str, LiveLayer] = {}
    for path, layer in lora_layers(tuner, adapters):
        module, found, live[path] = _read(path, layer, adapters)
        factors |= {(len(modules), i): pair for i, pair in found.items()}
        modules.append(module)
    if not modules:
        raise InputError("none of these adapters adapts a layer", key="adapters")
    return MemorySource(list(adapters), modules, factors), live


def live_layer(
    path: str, layer: LoraLayer, adapters: Sequence[str]
) -> tuple[MemorySource, LiveLayer]:
    """The same for one layer."""
    module, found, live = _read(path, layer, adapters)
    return MemorySource(adapters, [module], {(0, i): pair for i, pair in found.items()}), live


def _read(
    path: str, layer: LoraLayer, adapters: Sequence[str]
) -> tuple[Module, dict[int, tuple[Stored, Stored, float]], LiveLayer]:
    _refuse_layer(layer, path)
    pairs = {i: weights_of(layer, name) for i, name in enumerate(adapters) if has(layer, name)}
    found = {}
    size = None
    for i, (a, b) in pairs.items():
        name = adapters[i]
        scale = float(layer.scaling[name])
        if not math.isfinite(scale):
            raise InputError(f"its scaling is {scale}", path=f"adapter {name!r}", key=path)
        stored_a = _stored(a, f"{path}.lora_A.{name}")
        stored_b = _stored(b, f"{path}.lora_B.{name}")
        mine = stored_b.shape[0], stored_a.shape[1]
        size = size or mine
        if stored_a.shape[0] != stored_b.shape[1] or mine != size:
            reason = f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit the layer"
            raise InputError(reason, path=f"adapter {name!r}", key=path)
        found[i] = stored_b, stored_a, scale
    a, b = next(iter(pairs.values()))
    dtype = reduce(torch.promote_types, (t.dtype for pair in pairs.values() for t in pair))
    kind = "embedding" if isinstance(layer, Embedding) else "linear"
    live = LiveLayer(layer, dtype, a.device, tuple(a.shape[1:]), (b.shape[0], *b.shape[2:]))
    return Module(path, kind, *size), found, live


def _refuse_layer(layer: LoraLayer, path: str) -> None:
    reason = None
    if isinstance(layer, ParamWrapper):
        reason = "the adapter is on a bare parameter (target_parameters)"
    elif isinstance(layer, MultiheadAttention):
        reason = "torch's MultiheadAttention keeps a second LoRA layer inside this one"
    elif isinstance(layer, _ConvNd) and layer.get_base_layer().groups != 1:
        reason = f"a convolution of {layer.get_base_layer().groups} groups: its delta is not B @ A"
    elif getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        reason = "its weights are sharded over processes (tensor parallelism)"
    elif not type(layer).__module__.startswith("peft."):
        reason = f"a layer of {type(layer).__module__}: what its factors mean is not known"
    elif not isinstance(layer, Embedding | _ConvNd):
        parts = [*layer.lora_A.values(), *layer.lora_B.values()]
        strange = [type(p).__name__ for p in parts if type(p) is not torch.nn.Linear]
        reason = f"its factors are {strange[0]} modules" if strange else None
    if reason:
        raise InputError(f"{reason}; not supported", key=path)


def _stored(weight: torch.Tensor, key: str) -> Stored:
    """A weight as a matrix without a copy: kernel dimensions go with the inputs."""
    if type(weight.data) not in (torch.Tensor, torch.nn.Parameter) or weight.is_meta:
        raise InputError("is not a plain tensor (sharded, offloaded or quantised)", key=key)
    name = _STORED.get(weight.dtype)
    if name is None:
        raise InputError(f"is {weight.dtype}; expected one of {', '.join(map(str, _STORED))}",
                         key=key)  # fmt: skip
    matrix = weight.cpu().flatten(1)
    raw = matrix.view(torch.int16).numpy().view("u2") if name == "BF16" else matrix.numpy()
    return Stored(raw, name, (None, key))
