"""Frobenius and spectral norms of a base model's weights, one tensor in memory at a time."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import FactorRef
from mergeprobe_fast.io.dtypes import to_f32
from mergeprobe_fast.io.read import read_tensor

# Of the spectral norm; the residual bounds the distance to a singular value.
RESIDUAL = 1e-4
STEPS = 100


def norms(ref: FactorRef) -> tuple[float, float]:
    """(Frobenius norm, spectral norm) of a tensor as a matrix of its first dimension's rows.

    The second is from below, within RESIDUAL of a singular value: that of Lanczos bidiagonalisation
    with full orthogonalisation (Golub and Kahan 1965), whose first vector has one fixed seed.

    Raises:
        InputError: a file that changed, or numbers that are not finite; names file and key.
    """
    matrix = to_f32(read_tensor(ref), ref.dtype).reshape(ref.shape[0], -1)
    square = sum(float(np.einsum("ij,ij->", part, part, dtype=np.float64))
                 for part in np.array_split(matrix, -(-matrix.size // (1 << 22)) or 1))  # fmt: skip
    if not np.isfinite(square):
        raise InputError("holds NaN or infinite values", path=ref.file.path, key=ref.key)
    if square == 0:
        return 0.0, 0.0
    return float(np.sqrt(square)), spectral_norm(matrix)


def spectral_norm(matrix: np.ndarray) -> float:
    """The largest singular value of a matrix that is not zero."""
    rows, columns = matrix.shape
    start = np.random.default_rng(0).standard_normal(columns)
    right, left = [start / np.linalg.norm(start)], []
    alpha: list[float] = []
    beta: list[float] = []
    top = 0.0
    for step in range(min(rows, columns, STEPS)):
        u = _off(matrix @ right[-1].astype(np.float32), left)
        alpha.append(float(np.linalg.norm(u)))
        if alpha[-1] == 0:
            break
        left.append(u / alpha[-1])
        v = _off(left[-1].astype(np.float32) @ matrix, right)
        rest = float(np.linalg.norm(v))
        # Their products with the matrix, the last ones' rest as one more column.
        small = np.zeros((step + 1, step + 2))
        np.fill_diagonal(small, alpha)
        np.fill_diagonal(small[:, 1:], [*beta, rest])
        vectors, sigma, _ = np.linalg.svd(small)
        top = float(sigma[0])
        if rest * abs(vectors[step, 0]) <= RESIDUAL * top:
            break
        beta.append(rest)
        right.append(v / rest)
    return top


def _off(vector: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """What of a vector is orthogonal to these, float64."""
    vector = vector.astype(np.float64)
    if others:
        basis = np.array(others)
        for _ in range(2):
            vector -= basis.T @ (basis @ vector)
    return vector
