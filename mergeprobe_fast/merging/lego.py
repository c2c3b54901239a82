"""Merging rank-one units by clusters: LoRA-LEGO."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mergeprobe_fast.merging.arguments import flag, whole
from mergeprobe_fast.merging.atoms import Atoms, batches, inner
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeMethod,
    MergeRequest,
    near_one,
)
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.merging.truncate import Sum, product, truncate
from mergeprobe_fast.ops.tiles_rule import stream

_STEPS = 100  # of Lloyd's iteration; a handful is usual
# Objectives this near are one, and cosines this small are 0: no choice must hang on rounding.
_SAME = 1e-9
_ORTHOGONAL = 1e-5


def lora_lego(request: MergeRequest) -> Iterator[MergedModule]:
    """Cluster the rank-one units of all deltas; each cluster's mean is a unit of the result.

    The units are the singular triples of w_i W_i as balanced vectors x = sqrt(s) [u; v] (a negative
    weight turns u). They fall into ``rank`` clusters (None: the largest rank of the adapters), or
    as many as there are distinct units, by k-means: k-means++ from ``seed``, the best of
    ``restarts``. Since (u, v) and (-u, -v) are one unit, distances are to the nearer of x and -x,
    and means are of vectors turned alike. The mean [b; a] gives the unit b a^T, which is not the
    mean of the clustered u v^T: that one has no rank of one.

    Two scales, as the paper has two: with ``reweight_units`` the mean takes the average length of
    the vectors in its cluster, since averaging shortens; with ``reweight_output`` the result is
    multiplied by sqrt(r / k), r the mean number of units of an adapter and k that of clusters. The
    paper's formulae were not at hand: these are after its abstract and another implementation,
    which takes the largest entry for the length.

    The paper's units are the columns of B and rows of A in the files, which depend on the gauge.
    These here do not: gauge-invariant but for rotations inside equal singular values. No order of
    adapters matters. k-means finds a local optimum; given the clusters, the result is exact.
    Zhao et al. 2025.
    """
    wanted = request.rank or request.source.largest_rank
    for batch in batches(request):
        sums = [_assembled(request, m, atoms, wanted) for m, atoms in batch]
        pad = request.rank is not None
        yield from truncate(
            sums, request.rank, request.energy, request.threads, pad=pad, device=request.device
        )


def _assembled(request: MergeRequest, m: ModuleFactors, atoms: Atoms, wanted: int) -> Sum:
    given = request.arguments
    weights, up = near_one(request.weights_of(m))
    atoms = atoms.select(atoms.spread(weights) != 0)
    weights = atoms.spread(weights)
    sigma, more = near_one(atoms.sigma * np.abs(weights))
    order = np.argsort(-sigma, kind="stable")  # whatever the order of the adapters
    root = np.sqrt(sigma[order])[:, None]
    left, right = atoms.left[order], atoms.right[order]
    top = np.abs(left).argmax(axis=1)
    turn = np.sign(np.take_along_axis(left, top[:, None], axis=1))
    left, right = left * root * turn * np.sign(weights[order])[:, None], right * root * turn
    threads, device = request.threads, request.device
    gram = inner(left, left, threads, device) + inner(right, right, threads, device)
    chance = np.random.default_rng([given["seed"], stream(m.module.name)])
    means, spread = clusters(gram, min(wanted, len(gram)), given["restarts"], chance)
    scale = np.ones(len(means))
    if given["reweight_units"]:
        lengths = np.sqrt(np.diag(gram))
        own = (means != 0) @ lengths / np.maximum(np.count_nonzero(means, axis=1), 1)
        scale = own**2 / np.maximum(((means @ gram) * means).sum(1), 1e-300)
    if given["reweight_output"] and len(means):
        having = np.count_nonzero(atoms.counts)
        scale = scale * math.sqrt(len(gram) / having / len(means))
    b, a = (inner(means, side.T, threads, device) for side in (left, right))
    details = {"clusters": len(means), "within": spread}
    whole = product(m.module, (b * scale[:, None]).T, a, request.members(m), details)
    whole.segments["scale"] *= np.ldexp(1.0, max(-1000, min(1000, up + more)))
    return whole


def clusters(
    gram: np.ndarray, k: int, restarts: int, chance: np.random.Generator
) -> tuple[np.ndarray, float]:
    """k-means of vectors up to their sign, given their Gram matrix (n, n), at most k clusters.

    Returns means (clusters, n), the coefficients of each mean: +-1/size at its members, else 0; and
    the share of the squared lengths that is left within the clusters.
    """
    squares = np.diag(gram)
    total = float(squares.sum())
    best, least = np.zeros((0, len(gram))), math.inf
    if k == 0:
        return best, 0.0
    for _ in range(restarts):
        means, left_over = _lloyd(gram, squares, _plus_plus(gram, squares, k, chance))
        if left_over < least - _SAME * total:
            best, least = means, left_over
        if least <= _SAME * total:
            break
    return best, least / total


def _plus_plus(
    gram: np.ndarray, squares: np.ndarray, k: int, chance: np.random.Generator
) -> np.ndarray:
    """Vectors to start from, each drawn by its squared distance to those drawn before."""
    chosen = [int(chance.integers(len(gram)))]
    apart = np.full(len(gram), math.inf)
    while len(chosen) < k:
        last = chosen[-1]
        apart = np.minimum(apart, squares + squares[last] - 2.0 * np.abs(gram[last]))
        apart[apart <= _SAME * squares] = 0.0
        sums = np.cumsum(apart)
        if sums[-1] == 0:  # no more than these are distinct
            break
        at = np.searchsorted(sums, chance.random() * sums[-1], side="right")
        chosen.append(int(min(at, len(gram) - 1)))
    return np.array(chosen)


def _lloyd(
    gram: np.ndarray, squares: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, float]:
    """Means at which assigning and averaging change nothing, and what is left within."""
    n = len(gram)
    means = np.eye(n)[start]
    before = None
    for _ in range(_STEPS):
        dots = means @ gram
        apart = (dots * means).sum(1)[:, None] + squares - 2.0 * np.abs(dots)
        label = apart.argmin(0)
        own = dots[label, np.arange(n)]
        lengths = np.sqrt((dots * means).sum(1)[label] * squares)
        turn = np.where(own < -_ORTHOGONAL * lengths, -1.0, 1.0)
        assigned = np.zeros_like(means)
        assigned[label, np.arange(n)] = turn
        sizes = np.abs(assigned).sum(1)
        means = assigned[sizes > 0] / sizes[sizes > 0, None]
        if before is not None and np.array_equal(before, assigned):
            break
        before = assigned
    inside = squares.sum() - float((sizes[sizes > 0] * ((means @ gram) * means).sum(1)).sum())
    return means, max(0.0, float(inside))


METHODS = (
    MergeMethod(
        "lora_lego", lora_lego, weights="one",
        arguments={
            "seed": Argument(0, whole(0, 2**64 - 1), "of the choice of the first means"),
            "restarts": Argument(8, whole(1), "choices of first means, of which the best is taken"),
            "reweight_units": Argument(True, flag, "means get the average length of their cluster"),
            "reweight_output": Argument(True, flag, "the result is multiplied by sqrt(r / k)"),
        },
    ),
)  # fmt: skip
