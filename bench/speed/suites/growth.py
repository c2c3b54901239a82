"""How the time of the block Gram grows with adapters, rank and width: exponents from 8-fold ranges.

The sizes of an axis are interleaved with each other and with a product of fixed size, whose spread
says how steady the machine was. An exponent is the slope of a line through the logarithms of the
medians; necessary work grows as N (N r + 1), (N r + 1) r and d: 2, 2 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work

from mergeprobe_fast import _native
from suites.gram import F32, Shape, block_table, gram_pass

BASE = Shape("", 100, (16,), 2048, 2048, F32, 7)
STEADY = "sgemm 1024x1024x4096"
# Axis, its values, and the most that PERFORMANCE allows.
AXES = (
    ("N", (50, 100, 200, 400), 2.05),
    ("r", (4, 8, 16, 32), 2.0),
    ("d", (512, 1024, 2048, 4096), 1.1),
)
QUICK = (("N", (20, 40), None), ("r", (4, 8), None), ("d", (256, 512), None))


def cases(quick: bool) -> list[Case]:
    """One case an axis, on one thread."""
    return [_case(*axis, quick) for axis in (QUICK if quick else AXES)]


def _shape(axis: str, value: int, quick: bool) -> Shape:
    base = replace(BASE, count=30) if quick else BASE
    if axis == "N":
        return replace(base, count=value)
    return replace(base, ranks=(value,)) if axis == "r" else replace(base, p=value, q=value)


def _case(axis: str, values: tuple[int, ...], most: float | None, quick: bool) -> Case:
    shapes = {f"{OURS} {axis}={v}": _shape(axis, v, quick) for v in values}
    variants = [Variant(name, work=s.flops, compare=False) for name, s in shapes.items()]
    variants.append(Variant(STEADY, "torch", work=2.0 * 1024 * 1024 * 4096, compare=False))
    rest = ", ".join(x for x in ("N=100", "r=16", "d=2048") if x[0] != axis)
    return Case(
        "growth", f"block Gram over {axis}; {rest}", 1, "thread_cpu", 3 if quick else 7,
        tuple(variants), partial(_prepare, axis, values, shapes, most),
    )  # fmt: skip


@contextmanager
def _prepare(
    axis: str, values: tuple[int, ...], shapes: dict[str, Shape], most: float | None
) -> Iterator[Work]:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(1024, 4096, generator=generator), torch.empty(1024, 1024)
    kept, run = [], {}
    for name, s in shapes.items():
        a = [torch.randn(r, s.q, generator=generator) for r in s.rank_list]
        b = [torch.randn(s.p, r, generator=generator) for r in s.rank_list]
        kept.append((a, b))
        table = block_table(a, b)
        run[name] = partial(gram_pass, table, [0, len(table)], [s.p], [s.q], 1, _native.isa())
    run[STEADY] = lambda: torch.mm(left, left.T, out=right)

    def finish(results, medians) -> list[Fact]:
        for (a, b), name in zip(kept, shapes, strict=True):
            got = results[name][0]
            exact = float(((a[0] @ a[1].T).double() * (b[0].T @ b[1]).double()).sum())
            size = float(np.sqrt(got[0, 0] * got[1, 1]))
            assert abs(got[0, 1] - exact) < 1e-5 * size, name
        times = [medians[name] for name in shapes]
        slope = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        target = None if most is None else Target(most, at_least=False)
        return [Fact(f"exponent over {axis}", slope, "1", target)]

    yield Work(run, finish)
