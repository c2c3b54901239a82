"""P3 on pairs: singular values of many small matrices, and statistics of pairs by LAPACK."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import BackendError, InputError

_SIDE = (
    "cosines", "largest", "smallest", "angles", "sines", "halves", "gap", "logs", "aligned",
    "top", "bottom",
)  # fmt: skip
# In the order of AngleStatistic, csrc/include/mergeprobe/angles.hpp.
STATISTICS = (
    *(f"row_{name}" for name in _SIDE), *(f"col_{name}" for name in _SIDE),
    "dot", "row_1", "row_2", "col_1", "col_2", "both_1", "both_2", "entries_1", "entries_2",
    "merged_largest", "merged_sum", "agreeing",
)  # fmt: skip
LEAST_SQUARE = 1e-12  # squared cosines below are not told from 0
_DEPENDENT = 1e-14  # squared sine below which a direction of U_2 is one of U_1


def singular_values(matrices: Any, *, threads: int | None = None) -> np.ndarray:
    """Singular values of many small matrices, descending: (count, min(m, n)) float64.

    Up to 32 on the narrow side they are computed in float64, one matrix in each lane of a register,
    from the eigenvalues of X^T X: off by at most 1e-7 of the largest of each matrix. Wider ones go
    to LAPACK, in the precision they come in.

    Args:
        matrices: (count, m, n) float32 or float64, numpy or torch; on a CUDA device they are
            computed there, by Jacobi iterations, to 1e-14 of the largest.
        threads: default: MERGEPROBE_THREADS, or the cores.

    Raises:
        InputError: another shape or kind, or values that are not finite.
    """
    if getattr(getattr(matrices, "device", None), "type", "cpu") == "cuda":
        return _on_device(matrices)
    x = matrices.detach().cpu().numpy() if hasattr(matrices, "detach") else matrices
    if not isinstance(x, np.ndarray) or x.dtype not in (np.float32, np.float64):
        raise InputError("expected float32 or float64 arrays", key="matrices")
    if x.ndim != 3:
        raise InputError(f"expected 3 dimensions, got {x.ndim}", key="matrices")
    if not np.isfinite(x).all():
        raise InputError("holds NaN or infinite values", key="matrices")
    few = min(x.shape[1:])
    if few == 0 or len(x) == 0:
        return np.zeros((len(x), few))
    threads = _env.threads_or_default(threads)
    if few > _native.core().WIDEST_ANGLES:
        with _env.one_blas_thread(), ThreadPoolExecutor(threads) as pool:
            parts = pool.map(_lapack, np.array_split(x, threads))
            return np.concatenate([p.astype(np.float64) for p in parts])
    out = np.empty((len(x), few))
    _native.core().small_singular_values(np.ascontiguousarray(x), out, threads, _native.isa())
    return out


def _on_device(matrices: Any) -> np.ndarray:
    try:
        from mergeprobe_fast.kernels.canonical import singular_values as kernel
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"singular values on a CUDA device: {error}") from error
    if matrices.ndim != 3 or not matrices.is_floating_point():
        got = f"{matrices.dtype} of {matrices.ndim} dimensions"
        raise InputError(f"expected 3 dimensions of floats, got {got}", key="matrices")
    if not bool(matrices.isfinite().all()):
        raise InputError("holds NaN or infinite values", key="matrices")
    return kernel(matrices).cpu().numpy()


def _lapack(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(x, compute_uv=False)


@dataclass(frozen=True, eq=False)
class Form:
    """W = u diag(sigma) v^T, float64: orthonormal columns, sigma descending and positive."""

    u: np.ndarray
    sigma: np.ndarray
    v: np.ndarray


def corrected(vectors: np.ndarray) -> np.ndarray:
    """Columns that are orthonormal to 1e-8 made so to 1e-15, by one step of Newton's."""
    return vectors @ (1.5 * np.eye(vectors.shape[1]) - 0.5 * (vectors.T @ vectors))


def pair_statistics(one: Form, two: Form, top: int) -> np.ndarray:
    """STATISTICS of two deltas of any rank, by LAPACK; the kernels have them for small ranks."""
    m, n = one.u.T @ two.u, one.v.T @ two.v
    s1, s2 = one.sigma, two.sigma
    out = dict(zip(STATISTICS, np.zeros(len(STATISTICS)), strict=True))
    for side, x in (("row", n), ("col", m)):
        cosines = np.clip(np.linalg.svd(x, compute_uv=False), 0.0, 1.0)
        # Squared sines from the squares, as the kernels have them: 1e-15 where cosines are near 1.
        sines = np.clip(1 - _squares(x), 0.0, 1.0)
        angles = np.arctan2(np.sqrt(sines), cosines)
        few = min(top, len(s1), len(s2))
        weighted = np.linalg.svd(s1[:, None] * x * s2, compute_uv=False)
        values = (
            cosines.sum(), cosines[0], cosines[-1], np.square(angles).sum(), sines.sum(),
            (2 * sines / (1 + cosines)).sum(), sines[-1],
            -np.log(np.maximum(np.square(cosines), LEAST_SQUARE)).sum(), weighted.sum(),
            np.square(x[:few, :few]).sum(),
            np.square(x[len(s1) - few :, len(s2) - few :]).sum(),
        )  # fmt: skip
        out |= {f"{side}_{name}": v for name, v in zip(_SIDE, values, strict=True)}
    inner1, inner2 = m.T @ (s1[:, None] * n), m @ (s2[:, None] * n.T)
    values, energy = _merged(m, n, s1, s2)
    out |= {
        "dot": (s1[:, None] * m * n * s2).sum(),
        "row_1": np.square(s1[:, None] * n).sum(), "row_2": np.square(n * s2).sum(),
        "col_1": np.square(s1[:, None] * m).sum(), "col_2": np.square(m * s2).sum(),
        "both_1": np.square(inner1).sum(), "both_2": np.square(inner2).sum(),
        "entries_1": np.abs(inner1).sum(), "entries_2": np.abs(inner2).sum(),
        "merged_largest": values[0], "merged_sum": values.sum(),
        "agreeing": np.maximum((np.square(values) - energy) / 2, 0.0).sum(),
    }  # fmt: skip
    return np.array(list(out.values()))


def _squares(x: np.ndarray) -> np.ndarray:
    """Squared singular values, descending, with absolute errors of a rounding or so."""
    return np.linalg.eigvalsh(x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x)[::-1]


def _merged(
    m: np.ndarray, n: np.ndarray, s1: np.ndarray, s2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of W_1 + W_2; and ||u^T W_1||^2 + ||u^T W_2||^2 of each left vector u."""

    def basis(x: np.ndarray) -> np.ndarray:
        """Rows: both adapters' vectors in an orthonormal basis of all of them."""
        values, vectors = np.linalg.eigh(np.eye(x.shape[1]) - x.T @ x)
        rest = vectors * np.sqrt(np.where(values > _DEPENDENT, values, 0.0))
        top = np.hstack([np.eye(len(x)), np.zeros((len(x), x.shape[1]))])
        return np.vstack([top, np.hstack([x.T, rest])])

    sigma = np.concatenate([s1, s2])
    left = basis(m)
    u, values, _ = np.linalg.svd(left.T @ (sigma[:, None] * basis(n)))
    return values, np.square(sigma[:, None] * (left @ u)).sum(0)
