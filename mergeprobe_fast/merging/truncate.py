"""The best approximation of lower rank, from factors: the last step of most methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.methods import MergedModule, pad_rank
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.ops._tables import JOB, SEGMENT, address
from mergeprobe_fast.ops.canonical import STATUS, _within_range, matrix_record
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

    def parts(self) -> list[tuple[tuple[np.ndarray, str], tuple[np.ndarray, str], float]]:
        """((B, its dtype), (A, its dtype), scale) of each product, as they are stored."""
        if self.factors is None:
            b, a = self.keep
            return [((b, _dtype(b)), (a, _dtype(a)), float(self.segments["scale"][0]))]
        m = self.factors
        return [
            ((b.raw, b.dtype), (a.raw, a.dtype), float(s))
            for b, a, s in zip(m.b, m.a, self.segments["scale"], strict=True)
        ]


def product(
    module: Module, b: np.ndarray, a: np.ndarray, members: tuple[str, ...],
    details: Mapping[str, Any] | None = None,
) -> Sum:  # fmt: skip
    """``b @ a`` with b (d_out, R) and a (R, d_in), float32 or float64."""
    (b, up_b), (a, up_a) = _within_range(b), _within_range(a)
    segments = np.zeros(1, SEGMENT)
    segments[0]["u"], segments[0]["v"] = matrix_record(b.T), matrix_record(a)
    # Beyond 2^1000 either way float32 does not hold the result.
    scale = np.ldexp(1.0, int(np.clip(up_b + up_a, -1000, 1000)))
    segments["rank"], segments["scale"] = a.shape[0], scale
    return Sum(module, segments, members, None, details or {}, (b, a))


def truncate(
    sums: Sequence[Sum], rank: int | None, energy: float | None, threads: int, *, pad: bool,
    device: Any = None,
) -> list[MergedModule]:  # fmt: skip
    """Each sum at its best rank-k approximation, b = left sigma, a = right.

    k is at most ``rank``, and the smallest that keeps a share ``energy`` of the squared norm; with
    neither it is the numerical rank. ``pad``: every module gets ``rank``, zeros where it has less.
    Exact: QR-like bases of the stacked factors and an SVD of their core, in float64; on the
    ``device`` if there is one, by the same rule for the rank.
    """
    for s in sums:
        if not np.isfinite(s.segments["scale"]).all():
            raise InputError("the merged update overflows float32", key=s.module.name)
    if device is not None:
        return _truncate_there(sums, rank, energy, device, pad=pad)
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
        width = _width(rank, energy, kept, pad)
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


def _truncate_there(
    sums: Sequence[Sum], rank: int | None, energy: float | None, device: Any, *, pad: bool
) -> list[MergedModule]:
    from mergeprobe_fast.kernels.factors import canonical_forms

    def choose(_: int, sigma: np.ndarray, found: int) -> int:
        return min(found if rank is None else min(rank, found), _share(sigma, energy))

    forms = canonical_forms(
        device, [s.parts() for s in sums], _RELATIVE, _NOISE, choose, scaled=True
    )
    merged = []
    for s, f in zip(sums, forms, strict=True):
        if f.status in STATUS:
            raise _refusal(s, f.status, _first_bad(s, f.status))
        a, b, norm = f.right, f.left, _length(f.sigma)
        if f.status:  # beyond float64: refused by the module's name, as what float32 cannot hold
            b, norm = np.full((s.module.d_out, 1), np.inf, np.float32), math.inf
            a = np.zeros((1, s.module.d_in), np.float32)
        width = _width(rank, energy, len(a), pad)
        merged.append(
            MergedModule(
                s.module, pad_rank(a, width, 0), pad_rank(b, width, 1), s.members, norm,
                _length(f.sigma[len(a) :]), f.rank, s.details,
            )
        )  # fmt: skip
    return merged


def _width(rank: int | None, energy: float | None, kept: int, pad: bool) -> int:
    # A module whose sum is zero still needs a pair of factors.
    return rank if pad and rank is not None and energy is None else max(1, kept)


def _dtype(x: np.ndarray) -> str:
    return "F64" if x.dtype == np.float64 else "F32"


def _first_bad(s: Sum, status: int) -> int:
    """The first segment whose B (1) or A (2) is not finite; a status of the whole: -1."""
    if s.factors is None or status == 3:
        return -1
    side = s.factors.b if status == 1 else s.factors.a
    return next(i for i, x in enumerate(side) if not x.finite())


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
    if status := int(job["status"]):
        raise _refusal(s, status, int(job["bad_segment"]))


def _refusal(s: Sum, status: int, segment: int) -> InputError:
    reason = STATUS[status].removeprefix("B ").removeprefix("A ")
    if s.factors is None or status == 3:
        return InputError(f"the merged update cannot be factorised: {reason}", key=s.module.name)
    side = s.factors.b if status == 1 else s.factors.a
    return side[segment].refuse(reason)


def _length(values: np.ndarray) -> float:
    top = float(values.max(initial=0.0))
    return top * float(np.sqrt(np.square(values / top).sum())) if top > 0 else 0.0
