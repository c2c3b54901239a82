"""Sign conflicts of all pairs of a layer on a CUDA device, against products of signs as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import device
import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work

from mergeprobe_fast.ops.entries_cuda import sign_counts

GEMM = "signs as bf16 numbers, products of row chunks"
ROWS = 64  # of all updates at a time


def cases(quick: bool) -> list[Case]:
    """A small zoo and a large one; none in the interpreter, which does not run CUDA C++."""
    if device.INTERPRETED:
        return []
    return [_case(8, 512, 8)] if quick else [_case(50, 4096, 16), _case(1000, 4096, 16)]


def _case(count: int, width: int, rank: int) -> Case:
    variants = (
        Variant(OURS, note="ops.entries_cuda.sign_counts, exact"),
        Variant("the same, popcount", compare=False, most=3),
        Variant(GEMM, "torch", Target(1.0), most=3, note="one product: conflicts of entries not 0"),
    )
    name = f"sign conflicts, {count} adapters, one {width}x{width} layer, r={rank}"
    return Case("device_signs", name, 1, "events", 5, variants,
                partial(_prepare, count, width, rank))  # fmt: skip


@contextmanager
def _prepare(count: int, width: int, rank: int) -> Iterator[Work]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    factors = [(draw(width, rank), draw(rank, width), 1.0) for _ in range(count)]

    def gemm() -> torch.Tensor:
        total = torch.zeros(count, count, device="cuda")
        stacked_a = torch.stack([a for _, a, _ in factors])
        rows = max(1, min(ROWS, (1 << 30) // (count * width)))
        for row in range(0, width, rows):
            b = torch.stack([b[row : row + rows] for b, _, _ in factors])
            signs = torch.where(b @ stacked_a < 0, -1.0, 1.0).bfloat16().flatten(1)
            total += (signs @ signs.T).float()
        return (width * width - total.double()) / 2

    def finish(results, medians) -> list[Fact]:
        mine, other = np.triu(results[OURS][0], 1), np.triu(results[GEMM].cpu().numpy(), 1)
        assert np.array_equal(results[OURS][0], results["the same, popcount"][0])
        # The peer's sums are bf16: 2^-8 of a chunk.
        off = float(np.abs(mine - other).max()) / width**2
        assert off < 1e-2, f"{off:.1e} of the entries"
        pairs = count * (count - 1) / 2 * width**2
        return [
            Fact("pairs of entries a second", pairs / medians[OURS] / 1e12, "1e12"),
            Fact("flops of rebuilding the entries",
                 2 * rank * count * width**2 / medians[OURS] / 1e12, "TF/s"),
        ]  # fmt: skip

    yield Work({
        OURS: device.timed(lambda: sign_counts(factors)),
        "the same, popcount": device.timed(lambda: sign_counts(factors, engine="popcount")),
        GEMM: device.timed(gemm),
    }, finish)  # fmt: skip
