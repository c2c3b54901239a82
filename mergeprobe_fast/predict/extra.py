"""Extremely randomised trees (Geurts, Ernst, Wehenkel 2006)."""

from __future__ import annotations

import math

import numpy as np

from mergeprobe_fast.predict.forest import Forest, Tree, between
from mergeprobe_fast.predict.linear import short

_NAMES = ("column", "at", "left", "right", "missing_left", "rows")
_KINDS = (np.int32, np.float32, np.int32, np.int32, bool, np.int32)


def fit_extra(
    x: np.ndarray, t: np.ndarray, weights: np.ndarray, *, count: int, leaf: int, columns: float,
    seed: int,
) -> Forest:  # fmt: skip
    """Trees whose cuts are drawn, evenly among the ranks of a column's values in the node.

    Of the share ``columns`` of those columns that differ in a node, drawn anew at each, the cut
    that explains most is taken; no leaf has fewer than ``leaf`` rows. A missing value counts as
    the middle rank. All trees grow at once, level by level.
    """
    x = np.asarray(x, np.float32)
    ranks, values = _ranks(x)
    rng = np.random.default_rng(seed)
    tried = max(1, math.ceil(columns * x.shape[1]))
    # Rows in the order of their nodes; ``node`` of each segment, ``tree`` of each node.
    row = np.tile(np.arange(len(x)), count)
    start = np.arange(count) * len(x)
    node, tree = np.arange(count), np.arange(count)
    grown: list[tuple[np.ndarray, ...]] = []
    total = count
    while len(node):
        size = np.diff(np.append(start, len(row)))
        w, wt = weights[row], (weights * t)[row]
        mass, sums = np.add.reduceat(w, start), np.add.reduceat(wt, start)
        column, rank = _cuts(ranks, row, start, size, w, wt, leaf, tried, rng)
        split = column >= 0
        children = total + np.arange(2 * np.count_nonzero(split)).reshape(-1, 2)
        both = np.full((len(node), 2), -1)
        both[split] = children
        at = short(sums / mass, 5).astype(np.float32)
        for k in np.flatnonzero(split):
            at[k] = _limit(*values[column[k]], rank[k])
        grown.append((column, at, both[:, 0], both[:, 1], split & (0.5 < rank), size,
                      node, tree))  # fmt: skip
        of = np.repeat(np.arange(len(node)), size)
        keep = split[of]
        row, of = row[keep], of[keep]
        right = ranks[row, column[of]] >= rank[of]
        order = np.argsort(2 * of + right, kind="stable")
        row = row[order]
        start = np.flatnonzero(np.diff((2 * of + right)[order], prepend=-1))
        node, tree = children.ravel(), np.repeat(tree[split], 2)
        total += len(node)
    parts = [np.concatenate(kind) for kind in zip(*grown, strict=True)]
    return Forest(_trees(parts, count), 0.0, 1.0 / count)


def _ranks(x: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Ranks in (0, 1), NaN 0.5; by column its values and their ranks, ascending."""
    ranks, known = np.full(x.shape, 0.5, np.float32), []
    for j in range(x.shape[1]):
        there = np.isfinite(x[:, j])
        found, place, number = np.unique(x[there, j], return_inverse=True, return_counts=True)
        of = ((np.cumsum(number) - number / 2) / max(int(there.sum()), 1)).astype(np.float32)
        ranks[there, j] = of[place.ravel()]
        known.append((found, of))
    return ranks, known


def _cuts(
    ranks: np.ndarray, row: np.ndarray, start: np.ndarray, size: np.ndarray, w: np.ndarray,
    wt: np.ndarray, leaf: int, tried: int, rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The best random cut of each segment: column, -1 for none, and rank."""
    values = ranks[row]
    low, high = np.minimum.reduceat(values, start), np.maximum.reduceat(values, start)
    # Constant columns come last, and where one is drawn all the same nothing is below its cut.
    priority = np.where(low < high, rng.random(low.shape), 2.0)
    chosen = np.argsort(priority, axis=1, kind="stable")[:, :tried]
    low, high = (np.take_along_axis(v, chosen, 1) for v in (low, high))
    at = low + (high - low) * rng.random(low.shape, np.float32)
    of = np.repeat(np.arange(len(start)), size)
    left = np.take_along_axis(values, chosen[of], 1) < at[of]
    number = np.add.reduceat(left, start, dtype=np.int64)
    weight = np.add.reduceat(left * w[:, None], start)
    sums = np.add.reduceat(left * wt[:, None], start)
    mass, total = (np.add.reduceat(v, start)[:, None] for v in (w, wt))
    fits = (number >= leaf) & (size[:, None] - number >= leaf)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = sums**2 / weight + (total - sums) ** 2 / (mass - weight)
    best = np.where(fits, gain, -np.inf).argmax(axis=1)[:, None]
    column = np.take_along_axis(chosen, best, 1)[:, 0]
    return np.where(fits.any(axis=1), column, -1), np.take_along_axis(at, best, 1)[:, 0]


def _limit(values: np.ndarray, ranks: np.ndarray, rank: float) -> np.float32:
    """The value below which exactly the values of lower rank are, in as few digits as do."""
    place = int(np.searchsorted(ranks, rank))
    if place == len(values):  # only missing values are above
        return np.nextafter(values[-1], np.float32(np.inf))
    if not place:
        return values[0]
    return between(values[place - 1], values[place])


def _trees(parts: list[np.ndarray], count: int) -> list[Tree]:
    *parts, node, tree = parts
    place = np.full(int(node.max()) + 2, -1)  # the last is that of -1, no child
    out = []
    for number in range(count):
        own = np.flatnonzero(tree == number)
        place[node[own]] = np.arange(len(own))
        arrays = dict(zip(_NAMES, (p[own] for p in parts), strict=True))
        for side in ("left", "right"):
            arrays[side] = place[arrays[side]]
        out.append(Tree(**{n: arrays[n].astype(k) for n, k in zip(_NAMES, _KINDS, strict=True)}))
    return out
