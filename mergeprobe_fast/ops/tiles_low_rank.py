"""P2 to low rank: an elementwise merge as a LoRA adapter, without forming the merged delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops.tiles import Backend, Factors, NotFinite, merge_dense, merge_sketch
from mergeprobe_fast.ops.tiles_reference import matrix_values
from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule

_OVERSAMPLE = 8
_BLOCK = 512  # rows that are float64 at a time
_MOST_PASSES = 6
# Expected gain of another pass, relative to the energy left out, below which there is none: the
# error is then within half of it of the optimum.
_SETTLED = 2e-6
# Directions weaker than this, relative to the strongest, are float32 rounding of the products.
_FAINT = 1e-6
# Below this ratio of squared singular values one turn to orthonormal columns, which loses as the
# square of the condition number, is repaired by a second.
_REPAIR = 1e-6
# Gains below this share of what is captured are the rounding of float32 products (1.2e-7 seen).
_ROUNDING = 2.0**-22
# Share of the energy left out below which ||M||^2 less what was captured would cancel: the error is
# then measured by a pass of its own.
_CANCELS = 1e-2


class LowRank(NamedTuple):
    """``b @ a`` in place of a merged delta M."""

    b: np.ndarray  # (d_out, k) float32: left singular vectors times sigma
    a: np.ndarray  # (k, d_in) float32, orthonormal rows
    sigma: np.ndarray  # (k,) float64, descending
    norm: float  # ||M||_F
    error: float  # ||M - b a||_F
    excess: float  # estimated share of the error that the best b @ a of this rank would not have
    passes: int  # over the entries; 0: M was formed


def merge_low_rank(
    factors: Factors,
    weights: Sequence[float] | np.ndarray,
    rule: ElementwiseRule,
    rank: int,
    *,
    energy: float | None = None,
    warm: bool = True,
    seed: int = 0,
    fisher: Factors | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> LowRank:
    """The best approximation of rank k of an elementwise merge, to within ``excess``.

    Subspace iteration (Halko, Martinsson and Tropp 2011) whose start is the row space of all
    deltas, random columns added up to ``rank + 8``. Each pass over the entries is two half steps,
    ``M X`` and ``M^T M X``; passes go on until the expected gain of another is below 2e-6 of the
    energy that rank k leaves out, or below the rounding of float32 products, six at most. Where
    the basis would be as wide as M is, M is formed and the result is its truncated SVD, exact.
    Products are summed in float32: elsewhere, components below about 1e-5 of ||M||_F are not
    resolved.

    Args:
        rank: k, at most; the result has fewer components when M has, 0 when M is zero.
        energy: the smallest k that keeps this share of ||M||_F^2, at most ``rank``. Where
            ``rank`` components hold less, all of them are returned; ``error`` tells.
        warm: False starts from random columns alone: for measuring what the start is worth.
        seed: of the random columns.
        Other arguments are those of :func:`merge_dense`.

    Raises:
        InputError: as :func:`merge_dense`; a rank or energy out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"must be a positive integer, got {rank!r}", key="rank")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"must lie in (0, 1], got {energy!r}", key="energy")
    deltas = factors if isinstance(factors, Deltas) else Deltas.of(factors)
    full = min(deltas.d_out, deltas.d_in)
    stacked = int(deltas.segments["rank"].sum())
    width = max(stacked, min(int(rank), full) + _OVERSAMPLE)
    options: dict[str, Any] = {"fisher": fisher, "threads": threads, "backend": backend}
    if width >= full:
        return _exact(merge_dense(deltas, weights, rule, **options), rank, energy)

    x, unit = _start(deltas, width, warm, seed), _unit(deltas, weights)
    captured: list[float] = []
    passes = 0
    while True:
        passes += 1
        # M^T M X would leave float32's range where M is far from 1.
        x *= np.float32(unit)
        y, z, squares = merge_sketch(deltas, weights, rule, x, transpose=True, **options)
        if not np.isfinite(squares):
            raise InputError("the merged delta overflows float32", key="factors")
        if squares == 0:
            return _nothing(deltas, passes)
        # U = Y turn is orthonormal, so U^T M = (Z turn)^T: the other half step.
        values, vectors = _eigen(_gram(y))
        turn = vectors / np.sqrt(values)
        rows = _rotated(z, turn)
        sigma_squared, right = _eigen(_gram(rows))
        del z
        k = _kept(sigma_squared, squares, rank, energy)
        captured += [float(values[:k].sum()) / unit**2, float(sigma_squared[:k].sum())]
        gain = _expected_gain(captured)
        left_out = max(squares - captured[-1], 0.0)
        exact = left_out <= _FAINT**2 * squares
        settled = exact or gain <= max(_SETTLED * left_out, _ROUNDING * captured[-1])
        if settled or passes == _MOST_PASSES:
            break
        del x, y  # before more is taken
        x = _rotated(rows, right / np.sqrt(sigma_squared))
        if sigma_squared[-1] < _REPAIR * sigma_squared[0]:
            x = _orthonormal(x)
    sigma = np.sqrt(sigma_squared[:k])
    a = np.ascontiguousarray(_rotated(rows, right[:, :k] / sigma).T)
    b = _rotated(y, turn @ (right[:, :k] * sigma))
    if left_out < _CANCELS * squares:
        nothing = np.zeros((deltas.d_in, 0), np.float32)
        residual = merge_sketch(deltas, weights, rule, nothing, minus=(b, a), **options)
        left_out, passes = residual.squares, passes + 1
    excess = 0.0 if exact or left_out == 0 else 1 - (max(left_out - gain, 0.0) / left_out) ** 0.5
    return LowRank(b, a, sigma, squares**0.5, left_out**0.5, excess, passes)


def _unit(deltas: Deltas, weights: Sequence[float] | np.ndarray) -> float:
    """A power of two that brings the largest entry there can be near 1."""
    largest = 0.0
    for w, s in zip(weights, deltas.segments, strict=True):
        u = matrix_values(s["u"], int(s["rank"]), deltas.d_out)
        v = matrix_values(s["v"], int(s["rank"]), deltas.d_in)
        size = np.abs(u).max(initial=0.0) * np.abs(v).max(initial=0.0) * abs(w * s["scale"])
        largest = max(largest, float(size))
    if not 0 < largest < np.inf:
        return 1.0
    return float(np.ldexp(1.0, -int(np.clip(np.frexp(largest)[1], -100, 100))))


def _start(deltas: Deltas, width: int, warm: bool, seed: int) -> np.ndarray:
    """Orthonormal columns (d_in, width) whose span holds the rows of every A."""
    rng = np.random.default_rng(seed)
    x = np.zeros((deltas.d_in, width), np.float32)
    used = 0
    for i, s in enumerate(deltas.segments if warm else ()):
        rows = matrix_values(s["v"], int(s["rank"]), deltas.d_in)
        if not np.isfinite(rows).all():
            raise NotFinite(2, i, "factors")
        # How a delta is split between B and A must not matter: every row gets the same size.
        size = np.abs(rows).max(1, initial=0.0, keepdims=True)
        x[:, used : used + len(rows)] = (rows / np.where(size > 0, size, 1.0)).T
        used += len(rows)
    if used and x.any():
        x = _orthonormal(x[:, :used])
    else:
        x = x[:, :0]
    if x.shape[1] == width:
        return x
    # Random columns in place of dependent ones too: the more, the faster the iteration.
    more = rng.standard_normal((deltas.d_in, width - x.shape[1])).astype(np.float32)
    return _orthonormal(np.concatenate([x, more * np.float32(deltas.d_in**-0.5)], axis=1))


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns of x, float32, less what is rounding."""
    for _ in range(2):
        values, vectors = _eigen(_gram(x))
        x = _rotated(x, vectors / np.sqrt(values))
        if values[-1] >= _REPAIR * values[0]:
            break
    return x


def _gram(x: np.ndarray) -> np.ndarray:
    """x^T x in float64, a block of rows at a time."""
    out = np.zeros((x.shape[1], x.shape[1]))
    for i in range(0, len(x), _BLOCK):
        rows = x[i : i + _BLOCK].astype(np.float64)
        out += rows.T @ rows
    return out


def _rotated(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """x @ turn, float64 inside, float32 out."""
    out = np.empty((len(x), turn.shape[1]), np.float32)
    for i in range(0, len(x), _BLOCK):
        out[i : i + _BLOCK] = x[i : i + _BLOCK].astype(np.float64) @ turn
    return out


def _eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and vectors of those that are not rounding."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = int(np.count_nonzero(values > _FAINT**2 * values[0]))
    return values[:kept], vectors[:, :kept]


def _kept(values: np.ndarray, squares: float, rank: int, energy: float | None) -> int:
    k = min(int(rank), len(values))
    if energy is None:
        return k
    enough = np.flatnonzero(np.cumsum(values[:k]) >= energy * squares)
    return int(enough[0]) + 1 if enough.size else k


def _expected_gain(captured: list[float]) -> float:
    """What further half steps would add: their gains fall by the same ratio as the last two did."""
    if len(captured) < 3:
        return np.inf
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    if last <= _ROUNDING * captured[-1]:
        return _ROUNDING * captured[-1]
    ratio = last / before if before > last else 1.0
    return last * ratio / (1 - ratio) if ratio < 1 else np.inf


def _exact(merged: np.ndarray, rank: int, energy: float | None) -> LowRank:
    left, sigma, right = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
    squares = np.square(sigma)
    rounding = max(merged.shape) * np.finfo(np.float64).eps * sigma[0]
    k = min(_kept(squares, float(squares.sum()), rank, energy), int((sigma > rounding).sum()))
    b, a = (left[:, :k] * sigma[:k]).astype(np.float32), right[:k].astype(np.float32)
    error = float(np.sqrt(squares[k:].sum()))
    return LowRank(b, a, sigma[:k], float(np.sqrt(squares.sum())), error, 0.0, 0)


def _nothing(deltas: Deltas, passes: int) -> LowRank:
    b, a = np.zeros((deltas.d_out, 0), np.float32), np.zeros((0, deltas.d_in), np.float32)
    return LowRank(b, a, np.zeros(0), 0.0, 0.0, 0.0, passes)
