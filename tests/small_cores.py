"""Zoos that are hard for methods on small cores, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import MadeAdapter, make_adapter
from dense_merge import RAGGED, WIDE, factor_bound, seed_from, subset

import mergeprobe_fast as mpf

Deltas = dict[str, list[np.ndarray]]  # per module, one per adapter; zero where it is absent


def _each(*recipes: dict[str, Any]) -> Callable[[Path, np.random.Generator], list[MadeAdapter]]:
    def build(folder: Path, rng: np.random.Generator) -> list[MadeAdapter]:
        seed = seed_from(rng)
        return [
            make_adapter(folder / "abcd"[i], **{"seed": seed + i, **recipe})
            for i, recipe in enumerate(recipes)
        ]

    return build


def _deficient(folder: Path, rng: np.random.Generator) -> list[MadeAdapter]:
    """Rows that repeat, B that cancels rows of A, one delta that is zero though no factor is."""
    made = []
    for i, rank in enumerate((3, 5, 4)):
        factors = {}
        for name, (d_out, d_in, _) in WIDE.items():
            a, b = rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank))
            a[1] = a[0]
            if i == 2 and name == "head":
                a[2:], b[:, 2:], b[:, 1] = a[0], 0.0, -b[:, 0]
            factors[name] = a, b
        made.append(make_adapter(folder / "abc"[i], factors=factors, modules=WIDE))
    return made


def _duplicates(folder: Path, rng: np.random.Generator) -> list[MadeAdapter]:
    seed = seed_from(rng)
    seeds = (seed, seed + 1, seed)
    return [make_adapter(folder / "abc"[i], WIDE, seed=s) for i, s in enumerate(seeds)]


_TINY = {"row": (1, 17, 1), "column": (19, 1, 1), "narrow": (5, 4, 3)}
CASES = {
    "ragged ranks and rsLoRA": _each(*RAGGED),
    "modules missing": _each(
        {"modules": subset("head", of=WIDE)}, {"modules": WIDE},
        {"modules": subset("layers.1.q_proj", of=WIDE), "rank": 6},
    ),
    "bfloat16 and float16": _each(
        {"modules": WIDE, "dtype": "BF16"}, {"modules": WIDE, "dtype": "F16", "rank": 2},
        {"modules": WIDE, "dtype": "BF16", "rank": 5},
    ),
    "rank deficient": _deficient,
    "duplicates": _duplicates,
    "a zero B": _each(
        {"modules": WIDE, "zero_b": ("head",)}, {"modules": WIDE}, {"modules": WIDE, "rank": 2}
    ),
    "one row, one column": _each(*[{"modules": _TINY}] * 3),
    "huge": _each(*[{"modules": WIDE, "magnitude": 1e15}] * 3),
    "tiny": _each(*[{"modules": WIDE, "magnitude": 1e-15}] * 3),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def true_deltas(made: Sequence[MadeAdapter]) -> Deltas:
    """Every module's deltas, materialised in float64."""
    shapes = {name: m.delta.shape for adapter in made for name, m in adapter.modules.items()}
    return {
        name: [a.modules[name].delta if name in a.modules else np.zeros(shape) for a in made]
        for name, shape in shapes.items()
    }


def merged_deltas(made: Sequence[MadeAdapter], method: str, **options: Any) -> dict[str, Any]:
    """The modules of the merge by name."""
    merged = mpf.merge(mpf.open_zoo([a.path for a in made]), method, **options)
    return {m.module.name: m for m in merged.modules}


def delta(module: Any) -> np.ndarray:
    return module.b.astype(np.float64) @ module.a


def rounding(truth: np.ndarray, deltas: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    """What float32 factors of the truth may be off by; see ``factor_bound``."""
    stack = sum(abs(w) * np.linalg.norm(d) for w, d in zip(weights, deltas, strict=True))
    return factor_bound(float(np.linalg.norm(truth)), float(stack), min(truth.shape), 24)


def turned(adapter: MadeAdapter, folder: Path, rng: np.random.Generator) -> MadeAdapter:
    """The same deltas from other factors: A -> M A, B -> B M^-1, rounded to float32 again.

    The scale goes into B, so that alpha = rank; its deltas are as near as 'gauge' says.
    """
    factors = {}
    for name, m in adapter.modules.items():
        r = len(m.a)
        move = np.linalg.qr(rng.standard_normal((r, r)))[0] * 2.0 ** rng.integers(-3, 4, r)
        factors[name] = move @ m.a, m.scale * m.b @ np.linalg.inv(move)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    alphas = {name: float(r) for name, r in ranks.items()}
    return make_adapter(folder, factors=factors, modules=subset(*factors, of=_sizes(adapter)),
                        alphas=alphas, alpha=max(ranks.values()))  # fmt: skip


def _sizes(adapter: MadeAdapter) -> dict[str, tuple[int, int, int]]:
    return {n: (m.b.shape[0], m.a.shape[1], len(m.a)) for n, m in adapter.modules.items()}


def two_gauges(
    folder: Path, rng: np.random.Generator, ranks: Sequence[int] = (2, 5, 3)
) -> tuple[list[MadeAdapter], list[MadeAdapter]]:
    """Adapters twice, with the very same deltas from other factors; the first lacks a module.

    Factors are small integers and M is unimodular, so that M A and B M^-1 are exact in float32.
    """
    first, second = [], []
    for i, rank in enumerate(ranks):
        factors, moved = {}, {}
        for name, (d_out, d_in, _) in WIDE.items():
            if i == 0 and name == "head":
                continue
            a = rng.integers(-8, 9, (rank, d_in)) / 8.0
            b = rng.integers(-8, 9, (d_out, rank)) / 8.0
            signs = rng.integers(-1, 2, (2, rank, rank))
            move = (np.tril(signs[0], -1) + np.eye(rank)) @ (np.triu(signs[1], 1) + np.eye(rank))
            move = move[rng.permutation(rank)]
            factors[name] = a, b
            moved[name] = move @ a, b @ np.round(np.linalg.inv(move))
        sizes = subset(*factors, of=WIDE)
        for made, own, pairs in ((first, "first", factors), (second, "second", moved)):
            made.append(make_adapter(folder / own / "abcd"[i], sizes, factors=pairs))
        for name, module in first[i].modules.items():
            assert np.array_equal(module.delta, second[i].modules[name].delta)
    return first, second
