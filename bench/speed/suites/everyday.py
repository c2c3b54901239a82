"""Everyday use: two adapters of a whole model, all inner products and norms, from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import Factors, Shapes, adapters, llama_7b, small_model
from harness import SelfTimed

from mergeprobe_fast import _native
from suites.gram import block_table, gram_pass

LOOP, CAT = "torch loop over pairs, factored", "torch cat + mm per module, factored"
DENSE, TENSORS = "torch, deltas materialised", "table of addresses included"
DENSE_SHAPES = ((4096, 4096), (11008, 4096))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TOLERANCE = 2e-6  # of the product of two norms: float32 sums over r^2 products of two float32 sums


def cases(quick: bool) -> list[Case]:
    """The 7B pair and a small model."""
    layers = 4 if quick else 32
    repetitions = 3 if quick else 15
    name = "7B pair, 224 modules, r=16" if not quick else "4 blocks of a 7B pair, 28 modules, r=16"
    out = [
        _case(name, llama_7b(layers), 16, dtype, threads, repetitions, dense=not quick)
        for dtype in (torch.float32, torch.bfloat16)
        for threads in (1, 2)
    ]
    small = "small model pair, 144 modules of 768, r=8"
    return out + [
        _case(small, small_model(), 8, torch.float32, threads, 5 if quick else 31, dense=False)
        for threads in (1, 2)
    ]


def _case(
    name: str, shapes: Shapes, rank: int, dtype: torch.dtype, threads: int, repetitions: int, *,
    dense: bool,
) -> Case:  # fmt: skip
    small = len(shapes) == 144
    target = Target(4) if small else Target(2) if threads == 2 else Target(1.5)
    widened = ", widened to fp32 inside" if dtype != torch.float32 else ""
    variants = [
        Variant(OURS, note="one gram_pass call, table of addresses ready"),
        Variant(TENSORS, note="the same call, addresses first collected from 4 tensors a module"),
        Variant(LOOP, "torch", target, note=f"(B_i'B_j * A_iA_j').sum(){widened}"),
        Variant(CAT, "torch", Target(4) if small else None, note=f"one Gram a module{widened}"),
    ]
    if dense:
        variants.append(
            Variant(DENSE, "torch", Target(300), most=3, extrapolated=True, note="one 4096x4096 "
                    "and one 11008x4096 module timed, scaled by 128 and 96; fp32 deltas")
        )  # fmt: skip
    clock = "thread_cpu" if threads == 1 else "wall"
    return Case(
        "everyday", f"{name}, {NAMES[dtype]}", threads, clock, repetitions, tuple(variants),
        lambda: _prepare(shapes, rank, dtype, threads, dense),
    )  # fmt: skip


@contextmanager
def _prepare(
    shapes: Shapes, rank: int, dtype: torch.dtype, threads: int, dense: bool
) -> Iterator[Work]:
    pair = list(adapters(2, shapes, rank, dtype))
    table, bounds, p, q = _table(pair, shapes)
    isa = _native.isa()
    run: dict[str, Callable[[], object]] = {
        OURS: lambda: gram_pass(table, bounds, p, q, threads, isa),
        TENSORS: lambda: gram_pass(*_table(pair, shapes), threads, isa),
        LOOP: lambda: _loop(pair, shapes),
        CAT: lambda: _cat(pair, shapes),
    }
    if dense:
        run[DENSE] = lambda: _dense(pair, shapes, threads)

    def finish(results, medians) -> list[Fact]:
        exact = _loop([_cast(f, torch.float64) for f in pair], shapes)
        length = np.sqrt(np.einsum("mii->mi", exact))
        outer = length[:, :, None] * length[:, None, :]
        worst = {}
        for name, got in results.items():
            if name == DENSE:
                continue
            worst[name] = float((np.abs(got - exact) / outer).max())
            assert worst[name] < TOLERANCE, f"{name}: {worst[name]:.1e} from float64"
        cosines = (exact / outer)[:, 0, 1]
        assert 0.01 < np.abs(cosines).mean() < 0.9, "the data tests nothing"
        for k, (module, inner) in enumerate(results.get(DENSE, {}).items()):
            want = exact[list(shapes).index(module)]
            assert abs(inner - want[0, 1]) < 1e-4 * outer[0, 0, 1], f"materialised module {k}"
        moved = sum(x.nbytes for f in pair for ab in f.values() for x in ab)
        return [
            Fact("largest error of a cosine per module", worst[OURS], "1", note="against float64"),
            Fact("factors read", moved / medians[OURS] / 1e9, "GB/s", note=f"{moved / 1e6:.0f} MB"),
        ]

    yield Work(run, finish)


def _table(pair: list[Factors], shapes: Shapes) -> tuple[np.ndarray, ...]:
    """Blocks sorted by module, then adapter."""
    a = [f[name][0] for name in shapes for f in pair]
    b = [f[name][1] for name in shapes for f in pair]
    p, q = np.array(list(shapes.values()), np.int64).T
    bounds = np.arange(0, len(a) + 1, len(pair), dtype=np.int64)
    return block_table(a, b), bounds, np.ascontiguousarray(p), np.ascontiguousarray(q)


def _loop(pair: list[Factors], shapes: Shapes) -> np.ndarray:
    out = []
    for name in shapes:
        (a0, b0), (a1, b1) = (_wide(f[name]) for f in pair)
        inner = ((b0.T @ b1) * (a0 @ a1.T)).sum()
        norm0 = ((b0.T @ b0) * (a0 @ a0.T)).sum()
        norm1 = ((b1.T @ b1) * (a1 @ a1.T)).sum()
        out += [norm0, inner, inner, norm1]
    return torch.stack(out).view(-1, 2, 2).double().numpy()


def _cat(pair: list[Factors], shapes: Shapes) -> np.ndarray:
    out = []
    for name in shapes:
        wide = [_wide(f[name]) for f in pair]
        a, b = torch.cat([x[0] for x in wide]), torch.cat([x[1] for x in wide], dim=1)
        rank = len(a) // 2
        out.append(((b.T @ b).mul_(a @ a.T)).view(2, rank, 2, rank).sum((1, 3)))
    return torch.stack(out).double().numpy()


def _dense(pair: list[Factors], shapes: Shapes, threads: int) -> SelfTimed:
    """One module of each size through materialised deltas, time scaled to the whole model."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds, inner = 0.0, {}
    for size in DENSE_SHAPES:
        alike = [n for n, s in shapes.items() if sorted(s) == sorted(size)]
        (a0, b0), (a1, b1) = (_wide(f[alike[0]]) for f in pair)
        began = clock()
        d0, d1 = b0 @ a0, b1 @ a1
        value = (d0 * d1).sum()
        norms = d0.norm(), d1.norm()
        seconds += (clock() - began) * len(alike)
        inner[alike[0]] = float(value)
        del d0, d1, norms
    return SelfTimed(seconds, inner)


def _wide(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in factors)


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors.items()}
