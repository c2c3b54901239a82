"""The best partition into at most so many groups: what the worst member keeps, then the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning.book import NOTHING, Book, Exhausted, Set
from mergeprobe_fast.planning.costs import NEVER
from mergeprobe_fast.planning.exact import subsets, without_credit
from mergeprobe_fast.planning.limited_search import LimitedSearch
from mergeprobe_fast.planning.search import Search
from mergeprobe_fast.planning.words import list_of, share

# What the costly actions are hoped to leave of a set's loss, of what they left of others', one
# after the other; 0 is the proof, and asks most.
_HOPES = (1.0, 0.7, 0.4, 0.0)


@dataclass(frozen=True)
class Limited:
    """At most so many groups; ``book`` has the floor that they keep to.

    ``proven``: no other such partition keeps more, or keeps to the floor and costs less.
    """

    groups: list[Set]
    book: Book
    proven: bool


def limited(
    book: Book, count: int, most: int, *, exact: bool, start: Sequence[Set], names: Sequence[str]
) -> Limited:
    """The best partition of ``count`` adapters into at most ``most`` groups that is known of.

    Where the costs ask for a floor, the cheapest that keeps to it; else the one whose worst member
    keeps most, and of those the cheapest.

    Args:
        start: a partition to begin with, or nothing.
        names: by rank, to say what is missing.

    Raises:
        InputError: no such partition is known to be allowed; says the least that is.
    """
    asked = book.costs.floor or NOTHING  # 0 and None ask for none
    most = min(most, count)
    if exact:
        groups, proven = _best(book, count, most)
    elif most == count:
        groups, proven = [(i,) for i in range(count)], False
    else:
        search = Search(book, count, lambda _: None)
        kept_back = (book.effort or 0) // 4
        if book.effort is not None:
            book.effort -= kept_back
        groups, proven = LimitedSearch(search, most).best(start), False
        if book.effort is not None:
            book.effort += kept_back
    kept = min(map(book.kept, groups), default=1.0)
    if kept < max(asked, NOTHING):
        raise _refused(book, count, most, groups, asked, exact, proven, names)
    floor = kept if asked == NOTHING else asked
    left = book.costly_left if exact else 0
    book = book.with_costs(book.costs, effort=book.effort, costly=left, floor=floor)
    if exact:
        groups, cheapest = _cheapest(book, count, most)
        proven = proven and cheapest
    else:
        search = Search(book, count, lambda _: None)
        groups = search.cheaper(groups, most)
        proven = count <= most and search.proven(groups)
    return Limited(groups, book, proven)


def _best(book: Book, count: int, most: int) -> tuple[list[Set], bool]:
    """The partition whose worst member keeps most, and whether that is proven.

    Cheap actions are asked for every set; costly ones for those of the best partition, if they are
    taken to leave of each set's loss what they left of others' in the median, times a hope, until
    the best partition holds none that was not asked for. With no hope left out, 0, that proves it.
    """
    sets = subsets(count)
    book.ask(sets)
    worst = np.array([-1.0, *(-book.kept(s) for s in sets[1:])])
    if not book.costly or count < 2:
        return _solve(worst, sets, most, np.maximum), True
    # What the kindest cheap action leaves; with none to go by, all are alike.
    lost = np.array([0.0, *(min(1 - book.kept(s, book.cheap), 2.0) for s in sets[1:])])
    number = {s: k for k, s in enumerate(sets)}
    asked = np.array([len(s) < 2 for s in sets])
    factors: list[float] = []
    for hope in _HOPES:
        while True:
            factor = hope * (float(np.median(factors)) if factors else 1.0)
            hoped = np.where(asked, worst, np.minimum(worst, factor * lost - 1.0))
            groups = _solve(hoped, sets, most, np.maximum)
            unknown = [g for g in groups if not asked[number[g]] and hoped[number[g]] < worst[
                number[g]]]  # fmt: skip
            if not factors:  # nothing is known of the costly actions yet
                unknown = [g for g in groups if len(g) > 1]
            if not unknown:
                break
            unknown.sort(key=lambda g: (hoped[number[g]], -len(g)), reverse=True)
            try:
                for g in unknown:
                    book.ask([g], book.costly)
                    k = number[g]
                    asked[k], worst[k] = True, -book.kept(g)
                    if lost[k] > 0:
                        factors.append(max(0.0, 1 - book.kept(g, book.costly)) / lost[k])
            except Exhausted:
                return _solve(worst, sets, most, np.maximum), False
            factors = factors or [1.0]
    return groups, True


def _cheapest(book: Book, count: int, most: int) -> tuple[list[Set], bool]:
    """The cheapest partition that keeps to the book's floor, and whether that is proven.

    As :func:`.exact.best_partition`: sets that costly actions were not asked for count as if those
    lost nothing, until the cheapest partition takes nothing on such credit.
    """
    sets = subsets(count)
    known = np.array([0, *(book.price(s) for s in sets[1:])], np.int64)
    credit = np.array([0, *(book.bound(s) for s in sets[1:])], np.int64)
    return without_credit(book, sets, known, credit, lambda c: _solve(c, sets, most, np.add))


def _solve(worth: np.ndarray, sets: list[Set], most: int, combine: np.ufunc) -> list[Set]:
    """The partition of the last set into at most ``most`` sets with the least ``worth`` together.

    ``worth`` by bit mask, of several ``combine(a, b)``: ``np.add``, or ``np.maximum`` for the
    worst. As :func:`.exact.solve`, for every number of groups.
    """
    nothing = 0 if combine is np.add else -np.inf
    never = NEVER if combine is np.add else np.inf
    best = np.full((len(sets), most + 1), never, worth.dtype)
    best[0] = nothing
    part = np.zeros((len(sets), most + 1), np.int64)
    inside: dict[int, np.ndarray] = {0: np.zeros(1, np.int64)}  # the subsets of a mask
    each = np.arange(most)
    for mask in range(1, len(sets)):
        top = 1 << (mask.bit_length() - 1)
        inside[mask] = np.concatenate([inside[mask ^ top], inside[mask ^ top] | top])
        low = mask & -mask
        rest = mask ^ low
        others = inside[rest]
        found = combine(worth[others | low][:, None], best[rest ^ others, :most])
        at = found.argmin(axis=0)
        best[mask, 1:] = np.minimum(found[at, each], never)
        part[mask, 1:] = others[at] | low
    groups, mask, left = [], len(sets) - 1, most
    while mask:
        groups.append(sets[int(part[mask, left])])
        mask, left = mask ^ int(part[mask, left]), left - 1
    return sorted(groups)


def _refused(
    book: Book, count: int, most: int, groups: Sequence[Set], asked: float, exact: bool,
    proven: bool, names: Sequence[str],
) -> InputError:  # fmt: skip
    """What is missing for so few groups, and with how many it would be there."""
    floor = max(asked, NOTHING)
    left = book.costly_left if exact else 0
    book = book.with_costs(book.costs, effort=book.effort, costly=left, floor=floor)
    short = min(groups, key=book.kept)
    kept, verdict = book.kept(short), book.closest(short)
    known = kept >= NOTHING
    if known:
        at = int(np.argmin(verdict.low if book.costs.floor_on == "low" else verdict.retention))
        best = "at best" if proven else "in the best that was found"
        why = (f"{names[short[at]]} would keep {share(kept)} {best}, and the floor is "
               f"{share(asked)}")  # fmt: skip
    elif verdict is None:
        why = "nothing was judged"
    else:
        finite = np.isfinite(verdict.retention)
        hit = [names[i] for i, bad in zip(short, ~finite | verdict.outside, strict=True) if bad]
        what = "outside what the model has seen" if finite.all() else "a value is undefined"
        hit = hit[:3] + [f"{len(hit) - 3} more"] * (len(hit) > 3)
        why = f"no prediction for {list_of(hit)} in the best of them, {what}"
    if exact:
        least = most
        while kept < floor:  # each one as it is keeps all
            least += 1
            groups, too = _best(book, count, least)
            kept = min(map(book.kept, groups))
            proven = proven and (too or kept >= floor)
    else:
        proven, least = False, len(Search(book, count, lambda _: None).best(groups))
    more = "" if known else "; a floor of 0 takes predictions as they are"
    return InputError(
        f"no plan with {most} or fewer: {why}; the least {'is' if proven else 'that was found is'} "
        f"{least}{more}", key="resident",
    )  # fmt: skip
