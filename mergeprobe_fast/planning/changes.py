"""What a search may change about a partition, what is likely to help first.

``between`` (N, N) is what two adapters cost each other in a pair, both ways; it only says what to
try first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergeprobe_fast.planning.book import Set

PARTNERS = 8  # groups that are tried as partners of each
_SWAPS = 2  # exchanges that are tried, for each adapter

Change = tuple[tuple[Set, ...], tuple[Set, ...]]  # groups, and what they become


def unions(between: np.ndarray, groups: Sequence[Set], partners: int = PARTNERS) -> list[Change]:
    """Each group with those that it harms, and that harm it, least per member."""
    if len(groups) < 2:
        return []
    size = np.array([len(g) for g in groups])
    cost = sums(sums(between, groups).T, groups) / (size[:, None] + size)
    np.fill_diagonal(cost, np.inf)
    order = np.argsort(cost, axis=1, kind="stable")[:, : min(partners, len(groups) - 1)]
    pairs = {tuple(sorted((g, int(h)))) for g, row in enumerate(order) for h in row}
    ranked = sorted(pairs, key=lambda p: (cost[p], p))
    return [((groups[g], groups[h]), (union(groups[g], groups[h]),)) for g, h in ranked]


def moves(
    between: np.ndarray, groups: Sequence[Set], only: Set | None = None
) -> list[Change]:  # fmt: skip
    """Each member to the groups where it does least harm, or to none; ``only`` those of one."""
    size = np.array([len(g) for g in groups])
    cost = sums(between, groups) / (size + 1)
    order = np.argsort(cost, axis=1, kind="stable")
    changes: list[Change] = []
    for g, own in enumerate(groups):
        for i in own if len(own) > 1 and only in (None, own) else ():
            left = without(own, (i,))
            changes.append(((own,), (left, (i,))))
            for h in [int(h) for h in order[i] if h != g][:PARTNERS]:
                changes.append(((own, groups[h]), (left, union(groups[h], (i,)))))
    return changes


def swaps(
    between: np.ndarray, groups: Sequence[Set], only: Set | None = None
) -> list[Change]:  # fmt: skip
    """Exchanges of two members that spare most, by what pairs do to each other.

    ``only`` with members of one group; more of each, then.
    """
    if len(groups) < 2:
        return []
    of = np.empty(len(between), np.int64)
    for g, own in enumerate(groups):
        of[list(own)] = g
    size = np.array([len(g) for g in groups])
    there = sums(between, groups)
    now = there[np.arange(len(between)), of]
    # i in the place of j: what i meets there without j.
    cost = there[:, of] - between - now[:, None]
    cost = cost + cost.T
    i, j = np.triu_indices(len(between), 1)
    apart = (of[i] != of[j]) & ((size[of[i]] > 1) | (size[of[j]] > 1))
    tried = _SWAPS * len(between)
    if only is not None:
        inside = np.isin(np.arange(len(between)), only)
        apart &= inside[i] | inside[j]
        tried = PARTNERS * len(only)
    i, j = i[apart], j[apart]
    order = np.argsort(cost[i, j], kind="stable")[:tried]
    changes: list[Change] = []
    for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True):
        g, h = groups[of[a]], groups[of[b]]
        new = union(without(g, (a,)), (b,)), union(without(h, (b,)), (a,))
        changes.append(((g, h), new))
    return changes


def splits(between: np.ndarray, groups: Sequence[Set]) -> list[Change]:
    """Each group in two, around the two members that harm each other most."""
    changes: list[Change] = []
    for own in groups:
        if len(own) < 3:  # a member that leaves two is a move
            continue
        at = np.array(own)
        inside = between[np.ix_(at, at)]
        one, other = np.unravel_index(int(inside.argmax()), inside.shape)
        nearer = inside[:, one] <= inside[:, other]
        nearer[one], nearer[other] = True, False
        parts = tuple(at[nearer].tolist()), tuple(at[~nearer].tolist())
        changes.append(((own,), parts))
    return changes


def sums(rows: np.ndarray, groups: Sequence[Set]) -> np.ndarray:
    """(…, groups): sums of the columns of each group; the same on any number of threads."""
    order = [i for g in groups for i in g]
    starts = np.cumsum([0, *map(len, groups[:-1])])
    return np.add.reduceat(rows[:, order], starts, axis=1)


def union(one: Set, other: Set) -> Set:
    """Both, ascending."""
    return tuple(sorted((*one, *other)))


def without(members: Set, gone: Set) -> Set:
    """Those that are not gone."""
    return tuple(i for i in members if i not in gone)


def singles(members: Set) -> list[Set]:
    """Each by itself."""
    return [(i,) for i in members]
