"""P3, canonical form of deltas from their factors: checks and dispatch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops import reference
from mergeprobe_fast.ops._tables import DTYPE_CODE, JOB, SEGMENT, address
from mergeprobe_fast.ops.reference import Canonical

# Components are kept while sigma > max(RELATIVE * sigma_1, NOISE * ||sB|| ||A||): below the first
# they carry no energy, below the second they are the rounding of float32 factors.
RELATIVE = 1e-6
NOISE = 2.0**-24


def canonical(
    factors: list[tuple[Any, Any, float]],
    *,
    relative: float = RELATIVE,
    noise: float = NOISE,
    max_rank: int | None = None,
    backend: Literal["cpu", "reference"] = "cpu",
) -> Canonical:
    """Canonical form of ``sum_i scale_i B_i A_i``: orthonormal rows and descending sigma.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, numpy or CPU torch.
        relative, noise: the rank rule, ``sigma > max(relative sigma_1, noise ||sB||_F ||A||_F)``.
        max_rank: keep at most this many components; ``sigma`` is complete all the same.

    Returns:
        ``left`` (rank, d_out), ``sigma``, ``right`` (rank, d_in), float64, and ``rank``. An
        all-zero delta has rank 0.

    Raises:
        InputError: shapes that disagree, or factors that are not finite.
    """
    if not factors:
        raise InputError("expected at least one (B, A, scale)", key="factors")
    if backend == "reference":
        return reference.canonical(factors, relative=relative, noise=noise, max_rank=max_rank)
    d_out, d_in = int(factors[0][0].shape[0]), int(factors[0][1].shape[1])
    segments = np.zeros(len(factors), SEGMENT)
    keep = []
    for i, (B, A, scale) in enumerate(factors):
        b, a = _array(B), _array(A)
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise InputError(f"B {b.shape} and A {a.shape} do not chain", key=f"factors[{i}]")
        if (b.shape[0], a.shape[1]) != (d_out, d_in):
            raise InputError(
                f"delta is {b.shape[0]} x {a.shape[1]}, expected {d_out} x {d_in}",
                key=f"factors[{i}]",
            )
        keep += [b, a]
        segments[i]["u"] = matrix_record(b.T)
        segments[i]["v"] = matrix_record(a)
        segments[i]["rank"], segments[i]["scale"] = a.shape[0], scale
    stacked = int(segments["rank"].sum())
    full = min(stacked, d_out, d_in)
    top = full if max_rank is None else min(full, max_rank)
    left, right, sigma = np.zeros((top, d_out)), np.zeros((top, d_in)), np.zeros(full)
    job = np.zeros(1, JOB)
    job["d_out"], job["d_in"], job["max_rank"] = d_out, d_in, top
    job["u_out"], job["u_row"], job["u_col"] = address(left), d_out, 1
    job["v_out"], job["v_row"], job["v_col"] = address(right), d_in, 1
    _native.core().canonicalise(
        segments, np.array([0, len(factors)]), job, sigma, True, False, relative, noise,
        _env.default_threads(), _native.isa(),
    )  # fmt: skip
    status = int(job["status"][0])
    if status:
        raise InputError(
            STATUS[status], key=f"factors[{int(job['bad_segment'][0])}]" if status < 3 else None
        )
    rank = int(job["rank"][0])
    return Canonical(left[:rank], sigma, right[:rank], rank)


STATUS = {
    1: "B holds NaN or infinite values",
    2: "A holds NaN or infinite values",
    3: "the singular value iteration did not converge",
}


def matrix_record(x: np.ndarray) -> tuple[int, int, int, int, int]:
    """A 2-D float32 or float64 array as the kernels see it. The caller keeps it alive."""
    code = DTYPE_CODE["F64" if x.dtype == np.float64 else "F32"]
    return (address(x), x.strides[0] // x.itemsize, x.strides[1] // x.itemsize, code, 0)


def _array(x: Any) -> np.ndarray:
    """Factors as float32 where that is exact, else float64; no copy when already one of these."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x if str(x.dtype) in ("torch.float32", "torch.float64") else x.float()).numpy()
    x = np.asarray(x)
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)
