"""The best approximation of lower rank, from factors: the last step of most methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.methods import MergedModule, pad_rank
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.ops._tables import JOB, SEGMENT, address
from mergeprobe_fast.ops.canonical import STATUS, matrix_record
from mergeprobe_fast.zoo import Module

# Components below the rounding of the float32 result carry nothing.
_RELATIVE = 2.0**-24
_NOISE = 2.0**-40


@dataclass(frozen=True, eq=False)
class Sum:
    """A delta given as a sum of products, ``sum_i scale_i B_i A_i``, by SEGMENT records."""

    module: Module
    segments: np.ndarray
    members: tuple[str, ...]
    factors: ModuleFactors | None = None  # where the segments come from, for errors
    details: Mapping[str, Any] = field(default_factory=dict)
    keep: Any = None  # whatever the segments point into


def product(
    module: Module, b: np.ndarray, a: np.ndarray, members: tuple[str, ...],
    details: Mapping[str, Any] | None = None,
) -> Sum:  # fmt: skip
    """``b @ a`` with b (d_out, R) and a (R, d_in), float32 or float64."""
    segments = np.zeros(1, SEGMENT)
    segments[0]["u"], segments[0]["v"] = matrix_record(b.T), matrix_record(a)
    segments["rank"], segments["scale"] = a.shape[0], 1.0
    return Sum(module, segments, members, None, details or {}, (b, a))


def truncate(
    sums: Sequence[Sum], rank: int | None, energy: float | None, threads: int, *, pad: bool
) -> list[MergedModule]:
    """Each sum at its best rank-k approximation, b = left sigma, a = right.

    k is at most ``rank``, and the smallest that keeps a share ``energy`` of the squared norm; with
    neither it is the numerical rank. ``pad``: every module gets ``rank``, zeros where it has less.
    Exact: QR-like bases of the stacked factors and an SVD of their core, in float64.
    """
    bounds = np.concatenate([[0], np.cumsum([len(s.segments) for s in sums])]).astype(np.int64)
    jobs = np.zeros(len(sums), JOB)
    spectra, factors = [], []
    sigma_at = 0
    for job, s in zip(jobs, sums, strict=True):
        d_out, d_in = s.module.d_out, s.module.d_in
        full = min(int(s.segments["rank"].sum()), d_out, d_in)
        top = full if rank is None else min(rank, full)
        a, b = np.zeros((top, d_in), np.float32), np.zeros((d_out, top), np.float32)
        factors.append((a, b))
        job["d_out"], job["d_in"], job["max_rank"] = d_out, d_in, top
        job["u_out"], job["u_row"], job["u_col"] = address(b), 1, top
        job["v_out"], job["v_row"], job["v_col"] = address(a), d_in, 1
        job["sigma"] = sigma_at
        spectra.append(slice(sigma_at, sigma_at + full))
        sigma_at += full
    sigma = np.zeros(sigma_at)
    segments = np.concatenate([s.segments for s in sums]) if sums else np.zeros(0, SEGMENT)
    _native.core().canonicalise(
        segments, bounds, jobs, sigma, False, True, _RELATIVE, _NOISE, threads, _native.isa()
    )
    merged = []
    for s, job, at, (a, b) in zip(sums, jobs, spectra, factors, strict=True):
        _refuse_failed(s, job)
        values = sigma[at]
        kept = min(int(job["rank"]), _share(values, energy))
        # A module whose sum is zero still needs a pair of factors.
        width = rank if pad and rank is not None and energy is None else max(1, kept)
        merged.append(
            MergedModule(
                s.module,
                pad_rank(a[:kept], width, 0),
                pad_rank(b[:, :kept], width, 1),
                s.members,
                _length(values),
                _length(values[kept:]),
                int(job["numerical_rank"]),
                s.details,
            )
        )
    return merged


def share_rank(sigma: np.ndarray, energy: float | None) -> int:
    """The smallest k whose leading values keep that share of the sum of squares."""
    return _share(np.asarray(sigma, np.float64), energy)


def _share(sigma: np.ndarray, energy: float | None) -> int:
    top = float(sigma.max(initial=0.0))
    if energy is None or top == 0:
        return len(sigma)
    squares = np.square(sigma / top)
    # Summed from the smallest: what is left out must not drown in what is kept.
    left_out = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return int(np.argmax(left_out <= (1.0 - energy) * left_out[0]))


def _refuse_failed(s: Sum, job: np.void) -> None:
    status = int(job["status"])
    if status == 0:
        return
    reason = STATUS[status].removeprefix("B ").removeprefix("A ")
    if s.factors is None or status == 3:
        raise InputError(f"the merged update cannot be factorised: {reason}", key=s.module.name)
    side = s.factors.b if status == 1 else s.factors.a
    raise side[int(job["bad_segment"])].refuse(reason)


def _length(values: np.ndarray) -> float:
    top = float(values.max(initial=0.0))
    return top * float(np.sqrt(np.square(values / top).sum())) if top > 0 else 0.0
