"""Models with several LoRA adapters in memory, for the tests of the PEFT drop-in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft_models import Mixed, lora_layers

EQUAL: dict[str, dict[str, Any]] = {
    name: {"r": 4, "lora_alpha": alpha} for name, alpha in (("a", 4), ("b", 8), ("c", 2))
}
RAGGED: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 5},
    "b": {"r": 5, "lora_alpha": 2, "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 16, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"1": 3}},
}
# Layers of Mixed(blocks=2) that are larger than the ranks: PEFT's svd fails on smaller ones.
LARGE = ["0.q_proj", "0.v_proj", "1.q_proj", "embed", "conv3"]


def several(
    configs: dict[str, dict[str, Any]], targets: list[str] | None = None, *, base: Any = None,
    conv1d: bool = False, dtype: Any = None, seed: int = 3,
) -> Any:  # fmt: skip
    """A PEFT model with these adapters, their factors random, as after training; the first active.

    ``dtype`` is that of base and factors; None: all float32.
    """
    torch.manual_seed(seed)
    model = Mixed(conv1d, blocks=2) if base is None else base
    if dtype:
        model = model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in configs.items():
            config = LoraConfig(**{"target_modules": targets, **copy.deepcopy(options)})
            if not hasattr(model, "peft_config"):
                model = get_peft_model(model, config, name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
    randomise(model, configs)
    return model


@torch.no_grad()
def randomise(model: Any, names: Sequence[str]) -> None:
    """Draw every LoRA factor of these adapters anew."""
    for path, parameter in model.named_parameters():
        if "lora_" in path and set(path.split(".")) & set(names):
            parameter.normal_()


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """PEFT's own update of each layer that has the adapter, computed in float64."""
    model = copy.deepcopy(model).double()
    return {
        path: layer.get_delta_weight(adapter).detach()
        for path, layer in lora_layers(model).items()
        if adapter in layer.scaling
    }


def weighted(model: Any, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """sum_i w_i s_i B_i A_i of every layer, materialised, float64."""
    sums: dict[str, torch.Tensor] = {}
    for adapter, weight in weights.items():
        for path, delta in deltas(model, adapter).items():
            sums[path] = sums.get(path, 0.0) + weight * delta
    return sums


def everything(model: Any) -> dict[str, Any]:
    """All that an outsider can see of a model: to compare before and after."""
    state: dict[str, Any] = {k: (v, v.detach().clone()) for k, v in model.state_dict().items()}
    for path, p in model.named_parameters():
        state[f"{path} requires_grad"] = p.requires_grad
    for path, m in model.named_modules():
        state[f"{path} training"] = m.training
        for name in ("_active_adapter", "merged_adapters", "scaling", "r", "lora_variant"):
            if hasattr(m, name):
                state[f"{path} {name}"] = copy.copy(getattr(m, name))
    tuner = model.base_model
    state["configs"] = {k: v.to_dict() for k, v in tuner.peft_config.items()}
    state["targeted"] = list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)
    state["active"] = list(tuner.active_adapters)
    return state


def differences(before: dict[str, Any], after: dict[str, Any], without: str = "") -> list[str]:
    """Keys whose values differ; those that ``without`` (a new adapter's name) is part of, aside."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, tuple) and x and isinstance(x[0], torch.Tensor):
            # The same memory: a copy put in its place would be a change.
            one, other = x[1], y[1]
            unchanged = (one == other) | ((one != one) & (other != other))
            return x[0].data_ptr() == y[0].data_ptr() and bool(unchanged.all())
        if without and isinstance(y, dict):
            y = {k: v for k, v in y.items() if k != without}
        return x == y

    def new(key: str) -> bool:
        return bool(without) and without in key.split()[0].split(".")

    keys = set(before) | {k for k in after if not new(k)}
    return sorted(k for k in keys if k not in before or k not in after
                  or not same(before[k], after[k]))  # fmt: skip


@contextmanager
def seen_by_svd() -> Iterator[list[torch.Tensor]]:
    """The matrices that torch's SVD is given within the block, in float64."""
    original: Callable[..., Any] = torch.linalg.svd
    seen: list[torch.Tensor] = []

    def recording(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(matrix.detach().double().clone())
        return original(matrix, *args, **kwargs)

    torch.linalg.svd = recording
    try:
        yield seen
    finally:
        torch.linalg.svd = original
