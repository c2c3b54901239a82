"""The best partition of a small zoo: dynamic programming over all its subsets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergeprobe_fast.planning.book import Book, Exhausted, Set
from mergeprobe_fast.planning.costs import NEVER, UNIT

_TIE = UNIT // 1_000_000


def best_partition(book: Book, count: int) -> tuple[list[Set], bool]:
    """The cheapest partition of ``count`` adapters, and whether that is proven.

    Cheap actions are asked for every subset. Costly ones only where they could matter: a set that
    was not asked for counts as if it lost nothing, and whatever the best partition takes on such
    credit is asked for, until it takes none. Then nothing that was not asked could be better. When
    the book allows no more of that, the best partition of what is known comes back, not proven.
    """
    sets = subsets(count)
    book.ask(sets)
    known = np.array([0, *(book.price(s) for s in sets[1:])], np.int64)
    if not book.costly or count < 2:
        return _solve(known, sets), True
    masks = {s: mask for mask, s in enumerate(sets)}
    _ask_the_likely(book, sets, known, masks)
    credit = np.array([0, *(_credit(book, s) for s in sets[1:])], np.int64)
    return without_credit(book, sets, known, credit, lambda prices: _solve(prices, sets))


def without_credit(
    book: Book, sets: list[Set], known: np.ndarray, credit: np.ndarray,
    solve: Callable[[np.ndarray], list[Set]],
) -> tuple[list[Set], bool]:  # fmt: skip
    """What ``solve`` finds best on ``credit``, once it takes none; and whether it got so far.

    Of every set by bit mask, ``known`` is its price and ``credit`` the least that it may turn out
    to be; both are brought up to date. When the book allows no more, the best by what is known.
    """
    masks = {s: mask for mask, s in enumerate(sets)}
    while True:
        groups = solve(credit)
        unknown = [g for g in groups if len(g) > 1 and not book.knows(g, book.costly)]
        unknown = [g for g in unknown if credit[masks[g]] < known[masks[g]]]
        if not unknown:
            return groups, True
        chosen = max(unknown, key=len)  # the larger decides more
        try:
            book.ask([chosen], book.costly)
        except Exhausted:
            return solve(known), False
        known[masks[chosen]] = credit[masks[chosen]] = book.price(chosen)


def _ask_the_likely(
    book: Book, sets: list[Set], known: np.ndarray, masks: dict[Set, int]
) -> None:  # fmt: skip
    """Ask the costly actions of what is likely to be best, so that a proof has little left to do.

    The set of all adapters is asked for first. Then what they leave of a set is guessed: the loss
    of its kindest cheap action, times what that factor was in the median of the sets asked so far.
    The best partition by guesses is asked for, until it holds no guess. ``known`` is brought up to
    date.
    """
    kindest = [book.closest(s) for s in sets]
    count = len(book.shares)
    mean, most, lost, share = np.zeros((4, len(sets)))
    for mask, (s, v) in enumerate(zip(sets, kindest, strict=True)):
        share[mask] = book.shares[list(s)].sum()
        # With no cheap action to go by, all are alike.
        each = np.full(len(s), 1 - book.floor) if v is None else v.lost
        if len(s) > 1:
            mean[mask], most[mask] = each.mean(), each.max()
            lost[mask] = count * float((book.shares[list(s)] * each).sum())
    size = np.array([len(s) for s in sets])
    factors, asked = [], np.zeros(len(sets), bool)
    unknown = [len(sets) - 1]  # first of all, everything in one
    while unknown:
        try:
            book.ask([sets[m] for m in unknown], book.costly)
        except Exhausted:
            return
        for m in unknown:
            asked[m], known[m] = True, book.price(sets[m])
            kept = [v for v in book.verdicts(sets[m]) if v.action in book.costly]
            if mean[m] > 0:
                factors.append(min(float(v.lost.mean()) for v in kept) / mean[m])
        factor = float(np.median(factors)) if factors else 1.0
        guess = book.costs.price(share, size, factor * lost, factor * most)
        guess = np.where(1 - factor * most >= book.floor, guess, NEVER)
        guess = np.where(asked | (size < 2), known, np.minimum(known, guess))
        groups = [masks[g] for g in _solve(guess, sets)]
        unknown = [m for m in groups if not asked[m] and size[m] > 1 and guess[m] < known[m]]


def _credit(book: Book, members: Set) -> int:
    """What a set costs at least; among equals, one whose plain merge loses less comes first.

    By less than a millionth, which is what "proven" leaves open.
    """
    bound, verdict = book.bound(members), book.closest(members)
    if verdict is None or bound == book.price(members):
        return bound
    return min(book.price(members), bound + int(_TIE * min(1.0, float(verdict.lost.mean()))))


def subsets(count: int) -> list[Set]:
    """The set of every bit mask."""
    sets: list[Set] = [()]
    for i in range(count):
        sets += [(*s, i) for s in sets]
    return sets


def _solve(prices: np.ndarray, sets: list[Set]) -> list[Set]:
    """The cheapest partition of the last set into sets of these prices, by bit mask.

    Every partition has one part with the lowest member of what is still to be placed, so that each
    is looked at once: 3^n steps. Of equals, the one found first, which is always the same.
    """
    best = np.zeros(len(prices), np.int64)
    part = np.zeros(len(prices), np.int64)
    inside: dict[int, np.ndarray] = {0: np.zeros(1, np.int64)}  # the subsets of a mask
    for mask in range(1, len(prices)):
        top = 1 << (mask.bit_length() - 1)
        inside[mask] = np.concatenate([inside[mask ^ top], inside[mask ^ top] | top])
        low = mask & -mask
        rest = mask ^ low
        others = inside[rest]
        cost = np.minimum(prices[others | low] + best[rest ^ others], NEVER)
        at = int(cost.argmin())
        best[mask], part[mask] = cost[at], int(others[at]) | low
    groups, mask = [], len(prices) - 1
    while mask:
        groups.append(sets[int(part[mask])])
        mask ^= int(part[mask])
    return sorted(groups)
