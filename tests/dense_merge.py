"""The truth about a merge: deltas materialised in float64, and PEFT's own reading of the result.

Nothing here uses the engine: factors come from ``MadeAdapter``, sums from numpy, files from PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from adapters import MadeAdapter, delta_of, make_adapter, read_factor

from mergeprobe_fast.io import open_adapter

METHODS = ["svd", "linear", "cat"]
WIDE = {"layers.1.q_proj": (40, 33, 4), "layers.11.q_proj": (40, 33, 4), "head": (21, 40, 3)}
RAGGED = (
    {"modules": WIDE, "rank": 2, "alpha": 3},
    {"modules": WIDE, "rank": 5, "alpha": 16, "rslora": True},
    {"modules": WIDE, "ranks": {"head": 1, "layers.1.q_proj": 7}, "alphas": {"head": 5.5}},
)
U32 = 2.0**-24
ROUNDOFF = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}  # relative, to nearest


def zoo_of(*recipes: dict[str, Any]) -> Callable[[Path, int], list[MadeAdapter]]:
    """Adapters ``a``, ``b``, ... with these arguments, all factors drawn anew from ``seed``."""

    def build(folder: Path, seed: int) -> list[MadeAdapter]:
        return [
            make_adapter(folder / "abcdefgh"[i], **{"seed": seed + i, **recipe})
            for i, recipe in enumerate(recipes)
        ]

    return build


def subset(*names: str, of: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    return {name: of[name] for name in names}


def seed_from(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def exact_sums(adapters: Sequence[MadeAdapter], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """sum_i w_i s_i B_i A_i of every module of any adapter."""
    sums: dict[str, np.ndarray] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, module in adapter.modules.items():
            sums[name] = sums.get(name, 0.0) + weight * module.delta
    return sums


def stack_sizes(adapters: Sequence[MadeAdapter], weights: Sequence[float]) -> dict[str, float]:
    """||[w_i s_i B_i]||_F ||[A_i]||_F per module: what backward errors of stacked factors scale as.

    With cancelling weights it is much larger than the norm of the sum.
    """
    squares: dict[str, tuple[float, float]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, m in adapter.modules.items():
            b, a = squares.get(name, (0.0, 0.0))
            b += (weight * m.scale) ** 2 * float((m.b**2).sum())
            squares[name] = b, a + float((m.a**2).sum())
    return {name: math.sqrt(b) * math.sqrt(a) for name, (b, a) in squares.items()}


def stacked_ranks(adapters: Sequence[MadeAdapter]) -> dict[str, int]:
    """Sum of the ranks of the adapters that have each module."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for name, m in adapter.modules.items():
            ranks[name] = ranks.get(name, 0) + m.a.shape[0]
    return ranks


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Best approximation of that rank."""
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def factor_bound(norm: float, stack: float, rank: int, stacked: int) -> float:
    """||written delta - exact delta|| for float32 factors b = left sigma, a = right.

    Rounding: each entry of a and b is off by U32, so |db||a| + |b||da| <= 2 U32 |b||a|, of norm
    <= 2 U32 ||b|| ||a|| = 2 U32 norm sqrt(rank). Components left out as noise are below
    U32 sigma_1 each or 2^-40 stack each. float64 inside: 2^-40 covers n kappa u of the stack.
    """
    root = math.sqrt(max(rank, stacked))
    return 3.1 * U32 * norm * root + 2 * 2.0**-40 * stack * root


def deltas(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """scale B A of a written adapter, read back from its bytes."""
    return {name: delta_of(ref) for name, ref in open_adapter(folder).modules.items()}


def merge_json(folder: Path) -> dict[str, Any]:
    """merge.json, parsed as the strict JSON that it must be."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"merge.json holds {constant}")

    return json.loads((folder / "merge.json").read_text("utf-8"), parse_constant=refuse)


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def base_for(folder: str | os.PathLike[str]) -> Any:
    """A torch model that has exactly the layers that an adapter adapts."""
    import torch
    from transformers.pytorch_utils import Conv1D

    root = torch.nn.Module()
    for name, ref in open_adapter(folder).modules.items():
        if ref.kind == "embedding":
            leaf: Any = torch.nn.Embedding(ref.d_in, ref.d_out)
        elif ref.kind == "conv2d":
            channels, *kernel = ref.a.shape[1:]
            leaf = torch.nn.Conv2d(channels, ref.d_out, tuple(kernel), bias=False)
        elif ref.fan_in_fan_out:
            leaf = Conv1D(ref.d_out, ref.d_in)
        else:
            leaf = torch.nn.Linear(ref.d_in, ref.d_out, bias=False)
        node, parts = root, name.split(".")
        for part in parts[:-1]:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.add_module(parts[-1], leaf)
    return root


def assert_peft_agrees(folder: str | os.PathLike[str]) -> None:
    """PEFT loads the folder without a warning, and its own deltas are those that we read.

    Both sides are float64 products of the same factors: rank + 2 roundings of |B| |A| each.
    """
    from peft import PeftModel
    from peft_models import as_weight, lora_layers

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's and PEFT's internals
        model = PeftModel.from_pretrained(base_for(folder), str(folder)).double()
    layers = lora_layers(model)
    adapter = open_adapter(folder)
    assert set(layers) == set(adapter.modules)
    for name, ref in adapter.modules.items():
        theirs = layers[name].get_delta_weight("default").detach().numpy()
        size = np.abs(read_factor(ref.b)) @ np.abs(read_factor(ref.a))
        bound = (ref.rank + 2) * np.finfo(np.float64).eps * as_weight(ref, ref.scale * size)
        assert theirs.shape == bound.shape, name
        assert (np.abs(theirs - as_weight(ref, delta_of(ref))) <= bound).all(), name
        assert layers[name].scaling["default"] == 1.0, name
