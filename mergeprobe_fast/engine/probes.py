"""Inner products of probe snapshots: their deltas, their gradients, and those before them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.io.probe import Snapshot
from mergeprobe_fast.ops import block_gram, canonical

Stack = tuple[np.ndarray, np.ndarray, float]  # U (k, d_out), V (k, d_in): scale * U^T V


@dataclass(frozen=True, eq=False)
class ProbeGrams:
    """Sums over all modules, float64, for n snapshots; a module that one lacks counts as zero.

    W is a snapshot's delta, W' that of the snapshot before (zero where there is none), T the
    invariant gradient of :func:`tangent_gradient`.
    """

    delta: np.ndarray  # (n, n) <W_i, W_j>
    displacement: np.ndarray  # (n, n) <W_i - W'_i, W_j - W'_j>
    gradient: np.ndarray  # (n, n) <T_i, T_j>
    first_order: np.ndarray  # (n, n) <T_i, W_j>
    visible: np.ndarray  # (n,) |T P_A|^2, of the part that dB alone shows
    path: np.ndarray  # (n, 3, 3) inner products of W'', W', W: two before, one before, here


def probe_grams(snapshots: Sequence[Snapshot], modules: Sequence[str], threads: int) -> ProbeGrams:
    """One pass over the modules; in memory are the factors of one module of all snapshots.

    Raises:
        InputError: a file that changed, a number that is not finite; names file and key.
    """
    n = len(snapshots)
    delta, gradient, first_order = np.zeros((2 * n, 2 * n)), np.zeros((n, n)), np.zeros((n, n))
    visible, path = np.zeros(n), np.zeros((n, 3, 3))
    with ThreadPoolExecutor(threads) as pool:
        for module in modules:
            here = [i for i in range(n) if module in snapshots[i].adapter.modules]
            parts = list(pool.map(_Part.of, [snapshots[i] for i in here], [module] * len(here)))
            deltas: list[Stack | None] = [None] * (2 * n)
            gradients: list[Stack | None] = [None] * n
            for i, part in zip(here, parts, strict=True):
                deltas[i], deltas[n + i], gradients[i] = part.delta, part.before, part.gradient
                visible[i] += part.visible
                path[i] += part.path
            # In float64, for the sake of differences of deltas that are close to each other.
            delta += _gram(deltas, accumulate="fp64", threads=threads)
            gradient += _gram(gradients, threads=threads)
            first_order += _gram(gradients, deltas[:n], threads=threads)
    w, v = slice(0, n), slice(n, 2 * n)
    displacement = delta[w, w] - delta[w, v] - delta[v, w] + delta[v, v]
    return ProbeGrams(delta[w, w], displacement, gradient, first_order, visible, path)


def tangent_gradient(
    a: np.ndarray, b: np.ndarray, scale: float, d_a: np.ndarray, d_b: np.ndarray
) -> tuple[Stack, float]:
    """The gradient as the delta feels it, from the gradients of its factors, in factor form.

    With G = dLoss/dW and W = scale B A, dA = scale B^T G and dB = scale G A^T show
    ``T = P_B G + G P_A - P_B G P_A``: the projection of G onto what changes of A and B can reach,
    which does not depend on how W is split into factors. With P_A = Q_A^T Q_A,

        T = (dB / scale) (A A^T)^+ A + B (B^T B)^+ (dA / scale) (I - P_A)

    and the two terms are orthogonal (LoRA-Pro, Riemannian LoRA). B = 0 leaves T = G P_A.

    Args:
        a, d_a: (rank, d_in); b, d_b: (d_out, rank).

    Returns:
        (U, V, size) float32 with T = size U^T V and |T|_F = size, and |G P_A|_F^2.
    """
    # Rows of A and columns of B at length 1, so that no gauge decides what counts as zero; their
    # gradients move with them.
    rows, columns = _inverse_norms(a, 1), _inverse_norms(b, 0)
    form_a = canonical([(np.diag(rows), a, 1.0)])
    form_b = canonical([(b, np.diag(columns), 1.0)])
    q_a, q_b = form_a.right, form_b.left
    solve_a = form_a.left / form_a.sigma[: form_a.rank, None]  # (A A^T)^+ A = solve_a^T Q_A
    solve_b = form_b.right / form_b.sigma[: form_b.rank, None]  # B (B^T B)^+ = Q_B^T solve_b
    left = (solve_a * (rows / scale)) @ d_b.T.astype(np.float64)
    right = (solve_b * (columns / scale)) @ d_a.astype(np.float64)
    right -= (right @ q_a.T) @ q_a
    visible, hidden = float(np.square(left).sum()), float(np.square(right).sum())
    size = float(np.sqrt(visible + hidden))
    if size == 0:
        return _stack(np.zeros((0, len(b))), np.zeros((0, a.shape[1])), 0.0), 0.0
    u, v = np.concatenate([left / size, q_b]), np.concatenate([q_a, right / size])
    return _stack(u, v, size), visible


@dataclass(frozen=True, eq=False)
class _Part:
    """What one snapshot has to say of one module."""

    delta: Stack
    before: Stack | None
    gradient: Stack
    visible: float
    path: np.ndarray  # (3, 3)

    @staticmethod
    def of(snapshot: Snapshot, module: str) -> _Part:
        scale = snapshot.adapter.modules[module].scale
        a, b = snapshot.factors(module)
        gradient, visible = tangent_gradient(a, b, scale, *snapshot.gradients(module))
        here = _within_range(a, b, scale)
        trail: list[Stack | None] = [None, None, here]
        earlier = snapshot.before
        for k in (1, 0):
            if earlier is not None:
                a, b = earlier.factors(module)
                trail[k] = _within_range(a, b, earlier.adapter.modules[module].scale)
                earlier = earlier.before
        path = _gram(trail, accumulate="fp64", threads=1)
        return _Part(here, trail[1], gradient, visible, path)


def _gram(
    first: Sequence[Stack | None], second: Sequence[Stack | None] | None = None, **options: Any
) -> np.ndarray:
    """Inner products of scale U^T V of every two blocks; None counts as zero."""
    one = _stacked(first)
    if second is None:
        return block_gram(*one[:3], scale=one[3], **options)
    two = _stacked(second)
    return block_gram(*one[:3], *two[:3], scale=one[3], scale2=two[3], **options)


def _stacked(blocks: Sequence[Stack | None]) -> tuple[np.ndarray, ...]:
    """U, V, offsets and scale of all blocks."""
    there = [b for b in blocks if b is not None]
    rows = [0 if b is None else len(b[0]) for b in blocks]
    return (
        np.concatenate([u for u, _, _ in there]), np.concatenate([v for _, v, _ in there]),
        np.concatenate([[0], np.cumsum(rows)]),
        np.array([0.0 if b is None else b[2] for b in blocks]),
    )  # fmt: skip


def _within_range(a: np.ndarray, b: np.ndarray, scale: float) -> Stack:
    """The delta as a stack with largest entries about 1: moved by powers of two, exactly."""
    up = [int(np.frexp(np.abs(x).max())[1]) for x in (a, b)]
    return np.ldexp(b, -up[1]).T, np.ldexp(a, -up[0]), float(np.ldexp(scale, sum(up)))


def _inverse_norms(x: np.ndarray, axis: int) -> np.ndarray:
    norms = np.linalg.norm(x.astype(np.float64), axis=axis)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _stack(u: np.ndarray, v: np.ndarray, size: float) -> Stack:
    return u.astype(np.float32), v.astype(np.float32), size
