"""The primitives in float64 numpy: the definitions, the oracle of the tests, a backend by name.

Same names and signatures as :mod:`mergeprobe_fast.ops`. Slow and memory-hungry on purpose: what
is short can be read and believed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


def float64(tensor: Any) -> np.ndarray:
    """A numpy float64 copy of a torch tensor (any dtype or device) or numpy array."""
    if hasattr(tensor, "detach"):
        return tensor.detach().cpu().double().numpy()
    return np.asarray(tensor, dtype=np.float64)


def _segment_sums(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of the rows of each segment: a NaN stays within its own."""
    sums = [x[a:b].sum(0) for a, b in pairwise(offsets)]
    return np.array(sums).reshape(len(sums), *x.shape[1:])


def block_gram(
    U: Any,
    V: Any,
    offsets: Any,
    U2: Any = None,
    V2: Any = None,
    offsets2: Any = None,
    scale: Any = None,
    scale2: Any = None,
    reduce: str = "both",
) -> np.ndarray:
    """See :func:`mergeprobe_fast.ops.block_gram`."""
    if U2 is None:
        U2, V2, offsets2, scale2 = U, V, offsets, scale
    u, v, u2, v2 = (float64(x) for x in (U, V, U2, V2))
    bounds, bounds2 = np.asarray(offsets), np.asarray(offsets2)
    s1 = np.ones(len(bounds) - 1) if scale is None else float64(scale)
    s2 = np.ones(len(bounds2) - 1) if scale2 is None else float64(scale2)
    out = (u @ u2.T) * (v @ v2.T)
    if reduce == "both":
        out = _segment_sums(out, bounds)
    else:
        s1 = np.repeat(s1, np.diff(bounds))
    if reduce == "none":
        s2 = np.repeat(s2, np.diff(bounds2))
    else:
        out = _segment_sums(out.T, bounds2).T
    return out * np.outer(s1, s2)


class Canonical(NamedTuple):
    """delta = left.T @ diag(sigma[:rank]) @ right, rows of left and right orthonormal."""

    left: np.ndarray  # (rank, d_out)
    sigma: np.ndarray  # all min(stacked rank, d_out, d_in) singular values, descending
    right: np.ndarray  # (rank, d_in)
    rank: int


def canonical(
    factors: list[tuple[Any, Any, float]],
    *,
    relative: float = 1e-6,
    noise: float = 2.0**-24,
    max_rank: int | None = None,
) -> Canonical:
    """Canonical form of sum_i scale_i B_i A_i by Householder QR and a dense SVD of the core.

    ``factors``: (B (d_out, r), A (r, d_in), scale) per adapter.
    """
    b = np.concatenate([scale * float64(B) for B, _, scale in factors], axis=1)
    a = np.concatenate([float64(A) for _, A, _ in factors], axis=0)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    left, sigma, right = np.linalg.svd(r_b @ r_a.T)
    units = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
    floor = max(relative * (sigma[0] if sigma.size else 0.0), noise * float(np.linalg.norm(units)))
    rank = int(np.count_nonzero(sigma > max(floor, 0.0)))
    rank = rank if max_rank is None else min(rank, max_rank)
    return Canonical((q_b @ left[:, :rank]).T, sigma, (q_a @ right[:rank].T).T, rank)
