"""PEFT 0.21.2's results layer by layer, for ``compat="peft"``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, _ConvNd

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.integrations._peft_inject import injected
from mergeprobe_fast.integrations._peft_rules import RULES, Rule, check, merged
from mergeprobe_fast.merging.merge import run
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.record.peft_layers import has, live_layer, weights_of

# Rules whose truncated result comes from the factors alone: nothing in them depends on chance.
_FROM_FACTORS = {"svd": "svd", "ties": "ties", "magnitude_prune": "magnitude_prune"}
_TYPES = ("cat", *RULES, *(f"{kind}_svd" for kind, rule in RULES.items() if rule.prune))
# Initialisations that leave the base weights as they are.
_HARMLESS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Call:
    """What was asked for, checked."""

    tuner: LoraModel
    adapters: Sequence[str]
    weights: Sequence[float]
    rank: int
    rule: Rule
    kind: str  # the combination type without "_svd"
    density: float | None
    majority_sign_method: str
    svd_clamp: float | None
    svd_full_matrices: bool
    svd_driver: str | None
    threads: int | None

    def combine(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        return merged(tensors, weights, self.rule, self.density, self.majority_sign_method)


@torch.no_grad()
def add_like_peft(
    tuner: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    *,
    threads: int | None,
    **options: Any,
) -> None:
    """See :func:`mergeprobe_fast.integrations.peft.add_weighted_adapter`."""
    if adapter_name in tuner.peft_config:
        return
    chosen, rank, targets = tuner._check_add_weighted_adapter(
        adapters=adapters, combination_type=combination_type, svd_rank=svd_rank
    )
    kind = chosen.removesuffix("_svd")
    if chosen not in _TYPES:
        raise ValueError(f"Invalid combination_type: {combination_type}")
    rule = RULES.get(kind, Rule())
    check(rule, options["density"], options["majority_sign_method"])
    call = _Call(tuner, adapters, weights, rank, rule, kind, threads=threads, **options)
    config = _config(tuner.peft_config[adapters[0]], rank, targets, adapters[0])
    with injected(tuner, adapter_name, config, empty=False) as layers:
        for path, layer in layers:
            used = [(a, w) for a, w in zip(adapters, weights, strict=False) if has(layer, a)]
            if not used:
                raise ValueError("No matching LoRAs found. Please raise an issue on GitHub.")
            if kind == "cat":
                a, b = _stacked(layer, used)
            elif chosen == kind != "svd":
                a, b = _factor_by_factor(call, path, layer, used)
            else:
                a, b = _truncated(call, path, layer, used)
            _fill(layer, adapter_name, path, a, b, keep_dtype=kind == "cat")


def _config(first: LoraConfig, rank: int, targets: Any, name: str) -> LoraConfig:
    for key in ("kasa_config", "layer_replication"):
        if getattr(first, key):
            reason = "adding an adapter with it would change the base model once more"
            raise InputError(reason, path=f"adapter {name!r}", key=key)
    init = first.init_lora_weights
    if isinstance(init, str) and init.lower() not in _HARMLESS:
        init = True
    return replace(
        first, r=rank, lora_alpha=rank, target_modules=targets, rank_pattern={}, alpha_pattern={},
        init_lora_weights=init,
    )  # fmt: skip


Used = Sequence[tuple[str, float]]


def _stacked(layer: LoraLayer, used: Used) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [weights_of(layer, name) for name, _ in used]
    scaled = [
        a * weight * layer.scaling[name] for (a, _), (name, weight) in zip(pairs, used, strict=True)
    ]
    return torch.cat(scaled), torch.cat([b for _, b in pairs], 1)


def _factor_by_factor(
    call: _Call, path: str, layer: LoraLayer, used: Used
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule on all A, and on all B: PEFT's meaning of the types without "_svd"."""
    pairs = [weights_of(layer, name) for name, _ in used]
    if len({a.shape for a, _ in pairs}) > 1:
        ranks = ", ".join(str(len(a)) for a, _ in pairs)
        raise InputError(f"{call.kind} adds factors, and their ranks differ here: {ranks}",
                         key=path)  # fmt: skip
    sizes = [weight * layer.scaling[name] for name, weight in used]
    roots = [math.sqrt(abs(size)) for size in sizes]
    signed = [root if size >= 0 else -root for root, size in zip(roots, sizes, strict=True)]
    a = call.combine([a for a, _ in pairs], signed)
    b = call.combine([b for _, b in pairs], roots)
    return a.to(pairs[0][0].dtype), b.to(pairs[0][0].dtype)


def _truncated(
    call: _Call, path: str, layer: LoraLayer, used: Used
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule on the deltas, then the best approximation of that rank."""
    tensors = [t for name, _ in used for t in weights_of(layer, name)]
    single = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    grouped = isinstance(layer, _ConvNd) and layer.get_base_layer().groups > 1
    if call.kind in _FROM_FACTORS and single and call.svd_clamp is None and not grouped:
        return _from_factors(call, path, layer, used)
    return _dense(call, layer, used)


def _from_factors(
    call: _Call, path: str, layer: LoraLayer, used: Used
) -> tuple[torch.Tensor, torch.Tensor]:
    """By our kernels: nothing of the size of a delta exists."""
    names, weights = zip(*used, strict=True)
    source, live = live_layer(path, layer, names)
    arguments: dict[str, Any] = {}
    if call.rule.prune:
        arguments = {"density": min(call.density, 1.0), "dialect": "peft"}
        if call.rule.elect:
            arguments["majority_sign_method"] = call.majority_sign_method
        else:
            arguments.pop("dialect")
    module = source.modules[0]
    method, request = prepare(
        source, _FROM_FACTORS[call.kind], weights=torch.tensor(weights).tolist(),
        rank=min(call.rank, max(module.d_out, module.d_in)), threads=call.threads,
        arguments=arguments,
    )  # fmt: skip
    (found,) = run(method, request)
    return live.tensors(found.a, found.b)


def _dense(call: _Call, layer: LoraLayer, used: Used) -> tuple[torch.Tensor, torch.Tensor]:
    """As PEFT does it, one layer at a time: for chance, clamping and half precision.

    Chance is drawn entry by entry of whole deltas; a clamp depends on the signs that LAPACK gives
    to singular vectors; half precision rounds every delta before it is added.
    """
    deltas = [layer.get_delta_weight(name).detach() for name, _ in used]
    delta = call.combine(deltas, [weight for _, weight in used])
    del deltas
    delta = delta.flatten(1)
    if getattr(layer, "fan_in_fan_out", False) or used[0][0] in layer.lora_embedding_A:
        delta = delta.T
    if delta.dtype not in (torch.float32, torch.float64):
        delta = delta.float()
    clamp = call.svd_clamp
    u, s, vh = torch.linalg.svd(
        delta, full_matrices=call.svd_full_matrices and clamp is not None, driver=call.svd_driver
    )
    k = min(call.rank, len(s))
    b, a = u[:, :k] * s[:k], vh[:k]
    if clamp is not None:
        top = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-top, top), b.clamp(-top, top)
    return a, b


def _fill(
    layer: LoraLayer, name: str, path: str, a: torch.Tensor, b: torch.Tensor, *, keep_dtype: bool
) -> None:
    """Put factors into a layer, zeros up to its rank; kernel dimensions are given back."""
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError("the merged factors are not finite", key=path)
    if name in layer.lora_A:
        targets = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        targets = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    for target, given, axis in zip(targets, (a, b), (0, 1), strict=True):
        dtype = target.dtype if keep_dtype else given.dtype
        full = torch.zeros(target.shape, dtype=dtype, device=given.device)
        rank = given.shape[axis]
        part = full[:rank] if axis == 0 else full[:, :rank]
        part.copy_(given.reshape(part.shape))
        target.data = full
