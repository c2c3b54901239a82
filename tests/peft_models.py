"""Small torch models and PEFT as the oracle of reading and writing; test modules import-skip it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import read_factor
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D


class Block(torch.nn.Module):
    """Two layers of one name as in every block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(10, 12)
        self.v_proj = torch.nn.Linear(10, 6, bias=False)


class Mixed(torch.nn.Module):
    """Every supported kind of layer, twelve blocks (so that 1 and 11 exist), odd names."""

    def __init__(self, conv1d: bool = False, blocks: int = 12) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.embed = torch.nn.Embedding(9, 5)
        self.conv1 = torch.nn.Conv2d(3, 8, 1)
        self.conv3 = torch.nn.Conv2d(3, 7, (3, 2), padding=1)
        self.add_module("odd[0]+x", torch.nn.Linear(4, 5))
        self.q_proj = torch.nn.Linear(3, 2)
        if conv1d:
            self.c_attn = Conv1D(9, 6)  # weight (in 6, out 9)


LINEARS = ["q_proj", "v_proj", "odd[0]+x"]
ALL = [*LINEARS, "embed", "conv1", "conv3"]


def trained(config: LoraConfig, *, conv1d: bool = False, seed: int = 0, dtype: Any = None) -> Any:
    """A PEFT model with random factors, as after training."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Mixed(conv1d), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.to(dtype) if dtype else model


def load(path: Path, *, conv1d: bool = False, strict: bool = True) -> Any:
    """A fresh base with the adapter from a folder; any warning is an error, unless not strict."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        # torch and PEFT internals deprecate things that no adapter can help.
        warnings.simplefilter("ignore", DeprecationWarning)
        return PeftModel.from_pretrained(Mixed(conv1d), str(path))


def lora_layers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def peft_deltas(model: Any) -> dict[str, np.ndarray]:
    """PEFT's own update of each layer, in float64, in the layout of the base weight."""
    model = model.double()
    return {
        name: layer.get_delta_weight("default").detach().numpy()
        for name, layer in lora_layers(model).items()
    }


def as_weight(ref: Any, delta: np.ndarray) -> np.ndarray:
    """Our (d_out, d_in) delta in the layout of the base weight."""
    if ref.kind == "embedding" or ref.fan_in_fan_out:
        return delta.T
    if ref.kind == "conv2d":
        return delta.reshape(ref.d_out, *ref.a.shape[1:])
    return delta


def assert_same_deltas(adapter: Any, expected: dict[str, np.ndarray]) -> None:
    """Every delta equals PEFT's, up to float64 rounding of sums of ``rank`` products.

    Either side rounds each product, each addition and the scaling: the difference of the two is at
    most 2 * (rank + 2) * eps/2 * scale * |B| @ |A|, entry by entry.
    """
    assert set(adapter.modules) == set(expected)
    for name, ref in adapter.modules.items():
        a, b = read_factor(ref.a), read_factor(ref.b)
        assert (ref.rank, ref.d_in, ref.d_out) == (a.shape[0], a.shape[1], b.shape[0])
        ours = as_weight(ref, ref.scale * (b @ a))
        size = as_weight(ref, abs(ref.scale) * (np.abs(b) @ np.abs(a)))
        bound = (ref.rank + 2) * np.finfo(np.float64).eps * size
        assert ours.shape == expected[name].shape, name
        worst = np.max(np.abs(ours - expected[name]) - bound)
        assert worst <= 0, f"{name}: {worst} over the bound"
        norm, theirs = np.linalg.norm(ours), np.linalg.norm(expected[name])
        assert abs(norm - theirs) <= np.linalg.norm(bound) + 1e-14 * norm, name
        assert theirs > 0, name
