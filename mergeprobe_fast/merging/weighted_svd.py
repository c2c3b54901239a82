"""Truncation that is best for the inputs that the adapters see, not for the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.merging.activation import ARGUMENTS, Metric, Metrics, pooled
from mergeprobe_fast.merging.algebra import dot, eigh, gram, qr
from mergeprobe_fast.merging.methods import (
    MergedModule,
    MergeMethod,
    MergeRequest,
    near_one,
    pad_rank,
)
from mergeprobe_fast.merging.source import ModuleFactors, each_module
from mergeprobe_fast.merging.truncate import share_rank
from mergeprobe_fast.zoo import Module

# A Gram's eigenvalues are good to n u of the largest: below the root of that is no rank.
_NOISE = 2.0**-50


def weighted_svd(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas, cut to the rank that loses least on the adapters' own inputs.

    ``sum_i w_i s_i B_i A_i`` as in ``svd``, but the rank-k approximation M' is the one that
    minimises ``sum_i E_{x ~ i} ||(M - M') x||^2 / N`` over the calibration domains of the adapters
    (with the ``off_diagonal`` and ``ridge`` of ``regmean``) instead of the Frobenius norm.
    ``rank`` defaults to the largest rank among the adapters; ``energy`` is a share of that expected
    output energy. Optimal for the samples, float64 (products of large modules float32, see
    :mod:`mergeprobe_fast.merging.activation`); ``truncation_error`` is still the Frobenius norm.
    Gauge-invariant. Needs inputs. Eckart and Young 1936 in the metric of the inputs; ASVD
    (Yuan et al. 2023) and SVD-LLM (Wang et al. 2024) truncate base weights so.
    """
    metrics = Metrics(request)
    shares = pooled([1.0] * len(request.domains), request.domains)
    rank = request.rank
    if rank is None and request.energy is None:
        rank = request.source.largest_rank

    def merged(m: ModuleFactors) -> MergedModule:
        metric = metrics.of(m.module, shares)
        weights, up = near_one(request.weights_of(m))
        scales = m.scales * weights
        b = np.concatenate([f.wide() for f in m.b], axis=1)
        a = np.concatenate([f.wide() * s for f, s in zip(m.a, scales, strict=True)])
        x = metric.scaled(a)
        delta = SeenDelta(b, x, metric.seen(x), metric, request.device)
        width = rank if request.energy is None else None
        return delta.cut(rank, request.energy).module(m.module, request.members(m), width, up=up)

    yield from each_module(request.chunks(), merged, request.workers, metrics.shared)


class SeenDelta:
    """A delta M = b a, with what it does to the samples of a metric.

    ``x`` is a (R, d_in) in the coordinates of the metric and ``seen`` is ``x Z^T`` (R, T).
    """

    def __init__(
        self, b: np.ndarray, x: np.ndarray, seen: np.ndarray, metric: Metric, device: Any = None
    ) -> None:
        self.device = device
        self.basis = Basis(b, device)
        self.a: np.ndarray = x / metric.scale
        weighted = gram(x, device) + metric.off * gram(seen, device)
        self._weighted = _congruent(self.basis.r, weighted, device)
        # Of the parts, before they cancel: below 2^-40 of it is rounding.
        parts = np.square(np.linalg.norm(self.basis.r, axis=0)) @ np.maximum(np.diag(weighted), 0)
        self._faint = 2.0**-40 * float(np.sqrt(parts))
        self._plain = _congruent(self.basis.r, gram(self.a, device), device)

    def cut(self, rank: int | None, energy: float | None, *, metric: str = "activation") -> Cut:
        """The best approximation of at most that rank in one of the metrics.

        It is a projection from the left, ``U U^T M`` with U orthonormal, in either.
        """
        chosen = self._weighted if metric == "activation" else self._plain
        squares, vectors = eigh(chosen, self.device)
        sigma = np.sqrt(np.maximum(squares[::-1], 0.0))
        vectors = vectors[:, ::-1]
        floor = np.sqrt(_NOISE * len(sigma)) * sigma[0]
        if metric == "activation":
            floor = max(floor, self._faint)
        before = int((sigma > floor).sum())
        kept = min(before, share_rank(sigma, energy), before if rank is None else rank)
        rest = vectors[:, kept:]
        return Cut(
            self, vectors[:, :kept], before,
            norm=_root(np.trace(self._plain)),
            lost=_root(np.trace(rest.T @ self._plain @ rest)),
            weighted_norm=_root(np.trace(self._weighted)),
            weighted_lost=_root(np.trace(rest.T @ self._weighted @ rest)),
        )  # fmt: skip


class Basis:
    """``b = q r`` with q orthonormal, (d_out, p) and (p, R); q itself is seldom needed.

    The Gram matrix of the columns, each scaled to unit length, gives q to u kappa^2: enough below
    kappa = 1e4. Beyond (near-duplicate adapters, dependent columns) it is Householder's QR.
    """

    def __init__(self, b: np.ndarray, device: Any = None) -> None:
        self._device = device
        lengths = np.linalg.norm(b, axis=0)
        unit = b / np.where(lengths > 0, lengths, 1.0)
        squares, vectors = eigh(gram(unit.T, device), device)
        if b.shape[0] >= b.shape[1] and squares[0] > 1e-8 * squares[-1]:
            roots = np.sqrt(squares)
            self._left, self._inner = unit, vectors / roots
            self.r = (vectors * roots).T * lengths
        else:
            self._left, self.r = qr(b, device)
            self._inner = None

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        """``q @ coordinates``."""
        if self._inner is not None:
            coordinates = self._inner @ coordinates
        return dot(self._left, coordinates, self._device)


@dataclass(frozen=True, eq=False)
class Cut:
    """``U U^T M`` with ``U = q @ kept``, and what is lost: Frobenius norm, and in the metric.

    Norms are roots of float64 sums of squares of all of M: good to 1e-8 of ``norm``.
    """

    delta: SeenDelta
    kept: np.ndarray  # (p, k), orthonormal, in the coordinates of q
    rank_before: int
    norm: float
    lost: float
    weighted_norm: float
    weighted_lost: float

    def module(
        self, module: Module, members: tuple[str, ...], width: int | None,
        details: dict[str, object] | None = None, *, up: int = 0,
    ) -> MergedModule:  # fmt: skip
        """b = U times sigma, a = right rows of unit length, at least ``width`` (or 1) of them.

        All of it times 2^up.
        """
        right = dot(self.kept.T @ self.delta.basis.r, self.delta.a, self.delta.device)
        sigma = np.linalg.norm(right, axis=1)
        right = right / np.where(sigma > 0, sigma, 1.0)[:, None]
        left = self.delta.basis.expand(self.kept) * sigma
        with np.errstate(over="ignore"):  # checked for every method at once
            a, b = right.astype(np.float32), np.ldexp(left, up).astype(np.float32)
            norm, lost = (float(np.ldexp(x, up)) for x in (self.norm, self.lost))
        width = max(1, width or 0)
        return MergedModule(
            module, pad_rank(a, width, 0), pad_rank(b, width, 1), members,
            norm, lost, self.rank_before,
            {"activation_error_relative": self.relative, **(details or {})},
        )  # fmt: skip

    @property
    def relative(self) -> float:
        """What is lost in the metric of the inputs, of M's norm there."""
        return self.weighted_lost / self.weighted_norm if self.weighted_norm else 0.0


def _congruent(r: np.ndarray, inner: np.ndarray, device: Any) -> np.ndarray:
    """``r inner r^T``, symmetric to the bit."""
    full = dot(dot(r, inner, device), r.T, device)
    return 0.5 * (full + full.T)


def _root(square: float) -> float:
    return float(np.sqrt(max(0.0, square)))


METHODS = (
    MergeMethod("weighted_svd", weighted_svd, data=("inputs",), arguments=ARGUMENTS),
)  # fmt: skip
