"""Canonical forms of many adapters on a CUDA device against batched QR and SVD."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import device
import torch
from cases import OURS, Case, Fact, Target, Variant, Work

from mergeprobe_fast.kernels.canonical import canonical_batch

QR = "torch.linalg.qr of both sides, svd of the core"


def cases(quick: bool) -> list[Case]:
    """Float32 factors of one module."""
    if quick:
        return [_case(20, 8, 256)]
    return [_case(1000, 16, 4096), _case(1000, 8, 4096), _case(200, 64, 4096)]


def _case(count: int, rank: int, width: int) -> Case:
    variants = (
        Variant(OURS, note="kernels.canonical.canonical_batch, float64 inside"),
        Variant(f"{QR}, float32", "torch", Target(10.0), most=3),
        Variant(f"{QR}, float64", "torch", most=2),
    )
    name = f"canonical form of {count} adapters, r={rank}, {width}+{width}"
    return Case("device_canonical", name, 1, "events", 5, variants,
                partial(_prepare, count, rank, width))  # fmt: skip


@contextmanager
def _prepare(count: int, rank: int, width: int) -> Iterator[Work]:
    generator = torch.Generator(device.WHERE).manual_seed(0)
    u, v = (
        torch.randn(count, rank, width, generator=generator, device=device.WHERE) for _ in range(2)
    )

    def peer(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        qu, ru = torch.linalg.qr(u.to(dtype).mT)
        qv, rv = torch.linalg.qr(v.to(dtype).mT)
        left, sigma, right = torch.linalg.svd(ru @ rv.mT)
        return qu @ left, sigma, right @ qv.mT

    run = {
        OURS: lambda: canonical_batch(u, v),
        f"{QR}, float32": lambda: peer(torch.float32),
        f"{QR}, float64": lambda: peer(torch.float64),
    }

    def finish(results, medians) -> list[Fact]:
        exact = results[f"{QR}, float64"][1]
        mine = results[OURS].sigma
        error = float(((mine - exact).abs().amax(1) / exact[:, 0]).max())
        assert error < 1e-12, f"sigma off by {error:.1e}"
        moved = 2 * 2 * u.numel() * 4
        return [
            Fact("largest error of a singular value", error, "of the largest"),
            Fact("factors read and written once", moved / medians[OURS] / 1e9, "GB/s"),
        ]

    yield Work({name: device.timed(call) for name, call in run.items()}, finish)
