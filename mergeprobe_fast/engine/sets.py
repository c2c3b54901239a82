"""Statistics of sets of adapters from Gram matrices of whole deltas: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError

if TYPE_CHECKING:
    from mergeprobe_fast.engine.totals import Totals

STATISTICS = ("geometry", "retention", "reweighted", "minimax")
# Added to the diagonal of each Gram, of itself, before weights are optimised. Float64 Grams of
# equal adapters resolve 1e-15; weights beyond 1e4 that fit the difference of two that are nearly
# equal would cost more than they gain.
RIDGE = 1e-10
TOLERANCE = 1e-7  # of the worst error in minimax, relative, as its duality gap certifies


def set_statistics(
    totals: Totals,
    members: Any,
    weights: Any,
    domain_of: Any = None,
    lambdas: Any = None,
    *,
    which: Sequence[str] | None = None,
    raw: bool = False,
    ridge: float = RIDGE,
    threads: int | None = None,
) -> dict[str, np.ndarray]:
    """What N x N Gram matrices say of sets of adapters merged to ``M = sum_j w_j W_j``.

    Member i is judged on the inputs of its own domain, C_i: with G = ``<W_a, W_b>`` there, its
    error is ``e_i(w) = (w - 1_i)^T G (w - 1_i) / G_ii = E||(M - W_i) x||^2 / E||W_i x||^2``.

    Args:
        totals: inner products of N adapters, symmetric; on inputs NaN where undefined.
        members: (sets, widest) integers, the adapters of each set, then -1 where it is smaller.
        weights: (sets, widest), of the merge; what stands beside -1 is not read.
        domain_of: (N,) row of ``totals.inputs`` for each adapter; needed for all but "geometry".
        lambdas: (N,) positive, what each adapter's error counts in "reweighted"; None: 1.
        which: of ``STATISTICS``; None: all that ``domain_of`` allows.
        raw: on ``totals.inputs`` although there is ``totals.relative``.
        ridge: the optima are of ``e_i + ridge sum_j w_j^2 G_jj / G_ii``.
        threads: the result does not depend on it.

    Returns:
        float64, NaN where undefined (a member that is zero) and beyond a set's members.

        * geometry: "merged_norm", "superposition", "gram_rank", "cosine_rank" (sets,) and
          "leverage" (sets, widest), resolved to 1e-12 below 1;
        * retention: "error" and "direction" (cosine of M and W_i under C_i), (sets, widest);
        * reweighted: "reweighted_weights", argmin of ``sum_i lambda_i e_i``, and
          "reweighted_error", (sets, widest);
        * minimax: "minimax_weights", argmin of ``max_i e_i``, and "minimax_error", (sets, widest);
          "minimax_gap" (sets,): the least worst error, ridge included, lies at most this far below.

    Raises:
        InputError: an argument of the wrong shape or kind, an adapter that does not exist.
    """
    n = len(totals.names)
    members = _members(members, n)
    weights = _weights(weights, members)
    chosen = _which(which, domain_of)
    threads = _env.threads_or_default(threads)
    out: dict[str, np.ndarray] = {}
    if "geometry" in chosen:
        gram = _grams(totals.gram, (n, n), "gram")
        out |= {name: _nan(members) for name in _GEOMETRY} | {"leverage": _nan(members, True)}
        _native.core().set_geometry(
            members, weights, gram, *out.values(), threads, _native.isa()
        )  # fmt: skip
    if set(chosen) - {"geometry"}:
        grams = totals.inputs if raw or totals.relative is None else totals.relative
        grams = _grams(grams, (len(totals.domains), n, n), "inputs")
        made = {
            name: [_nan(members, True) for _ in range(2)] if name in chosen else [None, None]
            for name in STATISTICS[1:]
        }
        gap = _nan(members)
        _native.core().set_retention(
            members, weights, grams, _domain_of(domain_of, n, len(grams)), _lambdas(lambdas, n),
            *made["retention"], *made["reweighted"], *made["minimax"], gap,
            _ridge(ridge), TOLERANCE, threads, _native.isa(),
        )  # fmt: skip
        if "retention" in chosen:
            out["error"], out["direction"] = made["retention"]
        for name in ("reweighted", "minimax"):
            if name in chosen:
                out[f"{name}_weights"], out[f"{name}_error"] = made[name]
        if "minimax" in chosen:
            out["minimax_gap"] = gap
    return out


_GEOMETRY = ("merged_norm", "superposition", "gram_rank", "cosine_rank")


def _nan(members: np.ndarray, per_member: bool = False) -> np.ndarray:
    return np.full(members.shape if per_member else len(members), np.nan)


def _which(which: Sequence[str] | None, domain_of: Any) -> Sequence[str]:
    if which is None:
        return STATISTICS if domain_of is not None else STATISTICS[:1]
    for name in which:
        if name not in STATISTICS:
            raise InputError(f"no statistic {name!r}; there are: {', '.join(STATISTICS)}",
                             key="which")  # fmt: skip
        if name != "geometry" and domain_of is None:
            raise InputError(f"{name} needs the domain of every adapter", key="domain_of")
    return which


def _members(members: Any, n: int) -> np.ndarray:
    given = np.asarray(members)
    if given.ndim != 2 or given.dtype.kind not in "iu":
        raise InputError("expected integers, (sets, widest)", key="members")
    if given.size and (given.min() < -1 or given.max() >= n):
        raise InputError(f"expected indices of {n} adapters, or -1", key="members")
    there = given >= 0
    if given.shape[1] == 0 or not there[:, 0].all():
        if len(given):
            raise InputError("a set has no member", key="members")
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise InputError("-1 stands before a member", key="members")
    return np.ascontiguousarray(given, np.int32)


def _weights(weights: Any, members: np.ndarray) -> np.ndarray:
    given = np.asarray(weights)
    if given.shape != members.shape or given.dtype.kind not in "fiu":
        raise InputError(f"expected numbers, {members.shape} like members", key="weights")
    wide = np.where(members >= 0, given, 0.0).astype(np.float64)
    if not np.isfinite(wide).all():
        raise InputError("must be finite", key="weights")
    return wide


def _grams(grams: Any, shape: tuple[int, ...], key: str) -> np.ndarray:
    wide = np.ascontiguousarray(grams, np.float64)
    if wide.shape != shape:
        raise InputError(f"expected the shape {shape}, got {wide.shape}", key=key)
    if np.isinf(wide).any() or (key == "gram" and np.isnan(wide).any()):
        raise InputError("must be finite", key=key)
    if (np.diagonal(wide, axis1=-2, axis2=-1) < 0).any():
        raise InputError("has a negative diagonal: no Gram matrix", key=key)
    return wide


def _domain_of(domain_of: Any, n: int, domains: int) -> np.ndarray:
    given = np.asarray(domain_of)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise InputError(f"expected one row of inputs for each of {n} adapters", key="domain_of")
    if n and (given.min() < 0 or given.max() >= domains):
        raise InputError(f"expected rows of {domains} domains", key="domain_of")
    return np.ascontiguousarray(given, np.int64)


def _lambdas(lambdas: Any, n: int) -> np.ndarray:
    if lambdas is None:
        return np.ones(n)
    given = np.asarray(lambdas, np.float64)
    if given.shape != (n,) or not (np.isfinite(given) & (given > 0)).all():
        raise InputError(f"expected a positive number for each of {n} adapters", key="lambdas")
    return np.ascontiguousarray(given)


def _ridge(ridge: float) -> float:
    if not 0 <= ridge < float("inf"):
        raise InputError(f"must be finite and not negative, got {ridge!r}", key="ridge")
    return float(ridge)
