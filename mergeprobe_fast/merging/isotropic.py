"""Sums whose singular values are made equal (Iso-C)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mergeprobe_fast.merging.arguments import number
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeMethod,
    MergeRequest,
    pad_rank,
)
from mergeprobe_fast.merging.truncate import Sum, truncate

TOLERANCE = Argument(
    1e-4, number(1e-6, 1.0),
    "singular values below this share of the largest are rounding, neither counted nor kept",
)  # fmt: skip


def iso_c(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas with all its singular values at their mean (Iso-C).

    sum_i w_i W_i = U S V^T becomes s U V^T, s the mean of the singular values above ``tolerance``
    of the largest: of the sum's numerical rank R. The published code averages over min(d_out, d_in)
    values and keeps as many directions; for a sum of LoRA deltas nearly all of those are null
    vectors that rounding chooses, and s is R / min(d_out, d_in) times as large.

    Exact. Since all values are equal, ``rank`` keeps the directions that led before, and ``energy``
    the smallest share of the R; rank None keeps R. Gauge-invariant. Marczak et al. 2025.
    """
    for chunk in request.chunks():
        sums = [
            Sum(m.module, m.segments(request.weights_of(m)), request.members(m), m) for m in chunk
        ]
        yield from isotropic(request, sums)


def isotropic(request: MergeRequest, sums: Sequence[Sum]) -> Iterator[MergedModule]:
    """Each sum with the mean of its singular values instead of them, cut to the rank asked for."""
    for m in truncate(sums, None, None, request.threads, pad=False, device=request.device):
        yield _flattened(m, request)


def _flattened(m: MergedModule, request: MergeRequest) -> MergedModule:
    b = m.b.astype(np.float64)
    sigma = np.linalg.norm(b, axis=0)  # descending; a has orthonormal rows
    if not np.isfinite(sigma).all():
        return replace(m, norm=math.inf)  # which is refused by the module's name
    if m.norm > 0 and m.rank_before and not sigma.any():
        return m  # likewise, as what float32 rounds to nothing
    full = int(np.count_nonzero(sigma > request.arguments["tolerance"] * sigma[0]))
    kept = full if request.rank is None else min(full, request.rank)
    if request.energy is not None:
        kept = min(kept, math.ceil(round(request.energy * full, 9)))
    width = request.rank if request.rank and request.energy is None else max(1, kept)
    mean = float(sigma[:full].mean()) if full else 0.0
    level = (b[:, :kept] * (mean / sigma[:kept])).astype(np.float32)
    return replace(
        m,
        a=pad_rank(m.a[:kept], width, 0), b=pad_rank(level, width, 1), rank_before=full,
        norm=mean * math.sqrt(full), truncation_error=mean * math.sqrt(full - kept),
        details={**m.details, "sigma": mean},
    )  # fmt: skip


METHODS = (
    MergeMethod("iso_c", iso_c, arguments={"tolerance": TOLERANCE}, weights="one"),
)  # fmt: skip
