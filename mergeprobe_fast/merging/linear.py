"""Weighted sums of deltas: as they are (cat), without the redundancy (linear), truncated (svd)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mergeprobe_fast.merging.algebra import gram
from mergeprobe_fast.merging.methods import MergedModule, MergeRequest
from mergeprobe_fast.merging.truncate import Sum, truncate
from mergeprobe_fast.ops import block_gram


def svd(request: MergeRequest) -> Iterator[MergedModule]:
    """Best rank-k approximation of the weighted sum of deltas, sum_i w_i s_i B_i A_i.

    Exact: equal to the truncated SVD of the materialised sum, from QR-like bases of the stacked
    factors and an SVD of their small core, float64 inside. The error of truncation is exact.
    ``rank`` defaults to the largest rank among the adapters, as in PEFT. Every module gets that
    rank (zeros where the sum has less), unless ``energy`` chooses. Gauge-invariant. PEFT's
    combination_type "svd"; Eckart and Young 1936.
    """
    rank = request.rank
    if rank is None and request.energy is None:
        rank = request.source.largest_rank
    yield from _weighted_sum(request, rank, pad=True)


def linear(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas itself, at its numerical rank.

    Exact to float32 rounding: no cross terms B_i A_j (PEFT's "linear" has them), any ranks, any
    signs. Ranks follow from the sum and may differ between modules; with ``rank`` or ``energy`` it
    is ``svd``. Gauge-invariant. Task arithmetic (Ilharco et al. 2023).
    """
    yield from _weighted_sum(request, request.rank, pad=True)


def cat(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas by stacking the factors: [w_1 s_1 B_1 ...] [A_1; ...].

    Exact, A untouched, nothing computed; the rank is the sum of the ranks of the adapters that
    have the module. Takes no ``rank``. The product is gauge-invariant. PEFT's combination_type
    "cat".
    """
    for chunk in request.chunks():
        for m in chunk:
            stacked_a = np.concatenate([a.wide(np.float32) for a in m.a])
            scales = m.scales * request.weights_of(m)
            exact_b = np.concatenate(
                [b.wide() * s for b, s in zip(m.b, scales, strict=True)], axis=1
            )
            with np.errstate(over="ignore"):  # checked for every method at once
                stacked_b = exact_b.astype(np.float32)
            yield MergedModule(
                m.module, stacked_a, stacked_b, request.members(m),
                _norm(stacked_a, exact_b, request.device), 0.0, len(stacked_a),
            )  # fmt: skip


def _weighted_sum(request: MergeRequest, rank: int | None, *, pad: bool) -> Iterator[MergedModule]:
    for chunk in request.chunks():
        sums = [
            Sum(m.module, m.segments(request.weights_of(m)), request.members(m), m) for m in chunk
        ]
        yield from truncate(
            sums, rank, request.energy, request.threads, pad=pad, device=request.device
        )


def _norm(a: np.ndarray, b: np.ndarray, device: Any) -> float:
    """||b @ a||_F from the factors, float64."""
    if device is not None:
        products = gram(b.T, device) * gram(a, device)
        return float(np.sqrt(max(0.0, float(products.sum()))))
    found = block_gram(b.T, a, np.array([0, len(a)]), accumulate="fp64", threads=1)
    return float(np.sqrt(max(0.0, found[0, 0])))
