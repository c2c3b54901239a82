"""Elementwise merges as the papers and PEFT define them, dense and in float64, and inputs for them.

The definitions take the float32 entries that the kernels see, so that a threshold decides alike.
"""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.ops import Deltas, ElementwiseRule, merge_dense, tiles_reference

SHAPES = [(1, 37), (37, 1), (1, 1), (7, 5), (8, 48), (9, 49), (33, 130), (70, 97)]


def factors(rng, shape, ranks, dtype=np.float32):
    """(B, A, scale) per rank; scales differ and one is negative."""
    return [
        (
            rng.standard_normal((shape[0], r)).astype(dtype),
            rng.standard_normal((r, shape[1])).astype(dtype),
            (-1.0) ** (i == 1) * (0.3 + i),
        )
        for i, r in enumerate(ranks)
    ]


def entries(deltas):
    """float32 (n, d_out, d_in): the entries as every kernel sees them."""
    deltas = deltas if isinstance(deltas, Deltas) else Deltas.of(deltas)
    return np.stack([merge_dense(deltas[i], [1.0], ElementwiseRule()) for i in range(len(deltas))])


def spread(value, n):
    return np.broadcast_to(np.asarray(value, np.float32), (n,)).astype(np.float64)


def survivors(x, rule):
    """Boolean mask of the entries of x (n, d_out, d_in) that the rule keeps."""
    n, d_out, d_in = x.shape
    size = np.abs(x)
    if rule.keep == "all":
        return np.ones(x.shape, bool)
    if rule.keep == "magnitude":
        low, high = spread(rule.low, n), spread(rule.high, n)
        return (size >= low[:, None, None]) & (size <= high[:, None, None])
    chance = np.empty(x.shape)
    chance[:] = np.broadcast_to(np.asarray(rule.density, float), (n,))[:, None, None]
    if rule.keep == "della":
        for i in range(n):
            for row in range(d_out):
                order = sorted(range(d_in), key=lambda j, i=i, row=row: (size[i, row, j], j))
                for rank, j in enumerate(order):
                    place = rank / (d_in - 1) if d_in > 1 else 0.5
                    chance[i, row, j] += (2 * place - 1) * rule.epsilon
    position = np.arange(d_out * d_in, dtype=np.uint64).reshape(d_out, d_in)
    draws = np.stack(
        [tiles_reference.counter_hash(rule.seed, s, position) for s in rule.streams]
    )
    return (draws + 0.5) / 2**32 < chance


def definition(x, weights, rule, fisher=None):
    """(merged, slack, undecided): slack is what rule_bound multiplies.

    Undecided are the entries whose elected sign is within the rounding of the float32 sum.
    """
    n = len(x)
    w = np.asarray(weights, np.float32).astype(float)[:, None, None]
    y = np.where(survivors(x, rule), x * spread(rule.rescale, n)[:, None, None], 0.0)
    undecided = np.zeros(x.shape[1:], bool)
    if rule.combine == "fisher":
        f = fisher.astype(float) + rule.floor
        top, below, size = (w * f * y).sum(0), (w * f).sum(0), np.abs(w * f).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            merged = np.where(below != 0, top / below, 0.0)
            slack = (np.abs(w * f * y).sum(0) + np.abs(merged) * size) / np.abs(below)
        return merged, slack, size * 1e-3 > np.abs(below)
    agree = np.ones(x.shape, bool)
    if rule.combine == "ties":
        e = w * y if rule.elect_weighted else y
        votes = np.sign(e) if rule.elect == "frequency" else e
        total, size = votes.sum(0), np.abs(votes).sum(0)
        undecided = (total != 0) & (np.abs(total) <= (n + 1) * 2.0**-24 * size)
        if rule.elect == "total" and n > 2:
            undecided |= (total == 0) & (size > 0)
        sign = np.where(total > 0, 1, np.where(total < 0, -1, rule.zero_sign))
        agree = (np.sign(e) == sign) & (e != 0)
    top, size = np.where(agree, w * y, 0).sum(0), np.where(agree, np.abs(w * y), 0).sum(0)
    divisor, around = np.ones(top.shape), np.zeros(top.shape)
    if rule.divide == "count":
        divisor = np.maximum(agree.sum(0), 1)
    elif rule.divide == "weights":
        exact, around = np.where(agree, w, 0).sum(0), np.where(agree, np.abs(w), 0).sum(0)
        undecided |= (np.abs(exact) < 1e-3 * around)
        divisor = np.where(np.abs(exact) < 1e-8, 1.0, exact)
    merged = top / divisor
    return merged, (size + np.abs(merged) * around) / np.abs(divisor), undecided
