"""P3, canonical form of deltas from their factors: checks and dispatch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops import reference
from mergeprobe_fast.ops._tables import DTYPE_CODE, JOB, SEGMENT, address
from mergeprobe_fast.ops.canonical_device import canonical_on_device
from mergeprobe_fast.ops.reference import Canonical

# Components are kept while sigma > max(RELATIVE * sigma_1, NOISE * size), size^2 the sum of the
# squared norms of the rank-one units s b_a a_a: below the first they carry no energy, below the
# second they are the rounding of float32 factors.
RELATIVE = 1e-6
NOISE = 2.0**-24


def canonical(
    factors: list[tuple[Any, Any, float]],
    *,
    relative: float = RELATIVE,
    noise: float = NOISE,
    max_rank: int | None = None,
    backend: Literal["auto", "cpu", "triton", "reference"] = "auto",
) -> Canonical:
    """Canonical form of ``sum_i scale_i B_i A_i``: orthonormal rows and descending sigma.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, numpy or torch.
        relative, noise: the rank rule, ``sigma > max(relative sigma_1, noise size)`` with
            ``size^2 = sum over units a of |s b_a|^2 |a_a|^2``.
        max_rank: keep at most this many components; ``sigma`` is complete all the same.
        backend: "auto" takes "triton" for tensors on a CUDA device, else "cpu".

    Returns:
        ``left`` (rank, d_out), ``sigma``, ``right`` (rank, d_in), float64, and ``rank``. An
        all-zero delta has rank 0.

    Raises:
        InputError: shapes that disagree, or factors that are not finite.
        BackendError: "triton" without torch and triton.
    """
    if backend not in ("auto", "cpu", "triton", "reference"):
        known = "'auto', 'cpu', 'triton' or 'reference'"
        raise InputError(f"expected {known}, got {backend!r}", key="backend")
    for name, value in (("relative", relative), ("noise", noise)):
        if not 0 <= value < float("inf"):
            raise InputError(f"must be finite and not negative, got {value!r}", key=name)
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 0):
        raise InputError(f"must be an integer and not negative, got {max_rank!r}", key="max_rank")
    if backend == "triton" or (backend == "auto" and _on_cuda(factors)):
        return canonical_on_device(factors, relative, noise, max_rank)
    checked = _check(factors)
    rule = {"relative": relative, "noise": noise}
    if backend == "reference":
        for i, (b, a, _) in enumerate(checked):
            for status, x in ((1, b), (2, a)):
                if not np.isfinite(x).all():
                    raise InputError(STATUS[status], key=f"factors[{i}]")
        return reference.canonical(checked, **rule, max_rank=max_rank)
    d_out, d_in = checked[0][0].shape[0], checked[0][1].shape[1]
    segments = np.zeros(len(checked), SEGMENT)
    for i, (b, a, scale) in enumerate(checked):
        segments[i]["u"] = matrix_record(b.T)
        segments[i]["v"] = matrix_record(a)
        segments[i]["rank"], segments[i]["scale"] = a.shape[0], scale
    full = min(int(segments["rank"].sum()), d_out, d_in)
    top = full if max_rank is None else min(full, max_rank)
    left, right, sigma = np.zeros((top, d_out)), np.zeros((top, d_in)), np.zeros(full)
    job = np.zeros(1, JOB)
    job["d_out"], job["d_in"], job["max_rank"] = d_out, d_in, top
    job["u_out"], job["u_row"], job["u_col"] = address(left), d_out, 1
    job["v_out"], job["v_row"], job["v_col"] = address(right), d_in, 1
    _native.core().canonicalise(
        segments, np.array([0, len(checked)]), job, sigma, True, False, relative, noise,
        _env.default_threads(), _native.isa(),
    )  # fmt: skip
    status = int(job["status"][0])
    if status:
        raise InputError(
            STATUS[status], key=f"factors[{int(job['bad_segment'][0])}]" if status < 3 else None
        )
    rank = int(job["rank"][0])
    return Canonical(left[:rank], sigma, right[:rank], rank)


def _on_cuda(factors: Any) -> bool:
    try:
        return any(x.device.type == "cuda" for item in factors for x in item[:2])
    except (AttributeError, TypeError):  # not torch, or not factors at all
        return False


def _check(factors: Any) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """(B, A, scale) as arrays the kernels read, all of one shape."""
    if not factors:
        raise InputError("expected at least one (B, A, scale)", key="factors")
    checked: list[tuple[np.ndarray, np.ndarray, float]] = []
    for i, item in enumerate(factors):
        key = f"factors[{i}]"
        try:
            B, A, scale = item
            scale = float(scale)
        except (TypeError, ValueError):
            raise InputError("expected (B, A, scale)", key=key) from None
        if not np.isfinite(scale):
            raise InputError(f"scale is {scale}", key=key)
        (b, up_b), (a, up_a) = _within_range(_array(B, key)), _within_range(_array(A, key))
        with np.errstate(over="ignore"):
            scale = float(np.ldexp(scale, up_b + up_a))
        if not np.isfinite(scale):
            raise InputError("the delta overflows float64", key=key)
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise InputError(f"B {b.shape} and A {a.shape} do not chain", key=key)
        first = (b, a) if not checked else checked[0][:2]
        want = (first[0].shape[0], first[1].shape[1])
        if (b.shape[0], a.shape[1]) != want:
            raise InputError(
                f"delta is {b.shape[0]} x {a.shape[1]}, expected {want[0]} x {want[1]}", key=key
            )
        checked.append((b, a, scale))
    return checked


STATUS = {
    1: "B holds NaN or infinite values",
    2: "A holds NaN or infinite values",
    3: "the singular value iteration did not converge",
}


def matrix_record(x: np.ndarray) -> tuple[int, int, int, int, int]:
    """A 2-D float32 or float64 array as the kernels see it. The caller keeps it alive."""
    code = DTYPE_CODE["F64" if x.dtype == np.float64 else "F32"]
    return (address(x), x.strides[0] // x.itemsize, x.strides[1] // x.itemsize, code, 0)


def _within_range(x: np.ndarray) -> tuple[np.ndarray, int]:
    """x / 2^e and e: float64 values whose squares would over- or underflow are moved, exactly."""
    if x.dtype != np.float64 or x.size == 0:
        return x, 0
    with np.errstate(invalid="ignore"):
        top = float(np.abs(x).max())
    if not np.isfinite(top) or top == 0 or 1e-100 < top < 1e100:
        return x, 0
    exponent = int(np.frexp(top)[1])
    return np.ldexp(x, -exponent), exponent


def _array(x: Any, key: str) -> np.ndarray:
    """Factors as float32 where that is exact, else float64; no copy when already one of these."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x if str(x.dtype) in ("torch.float32", "torch.float64") else x.float()).numpy()
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
        got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"expected arrays of real numbers, got {got}", key=key)
    x = x if x.dtype in (np.float32, np.float64) and x.dtype.isnative else x.astype(np.float64)
    # The kernels count strides in elements.
    return x if all(stride % x.itemsize == 0 for stride in x.strides) else x.copy()
