"""Which adapters to put together: the cheapest partition of a zoo that keeps to the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning.book import Book, Set
from mergeprobe_fast.planning.costs import UNIT, Costs
from mergeprobe_fast.planning.exact import best_partition
from mergeprobe_fast.planning.judging import Judge
from mergeprobe_fast.planning.limited import limited
from mergeprobe_fast.planning.plan_types import ACTIONS
from mergeprobe_fast.planning.search import Search
from mergeprobe_fast.planning.verdict import Verdict

EXACT_UP_TO = 12
MOST = 1000  # adapters; beyond, the pairs alone are half a million
EFFORT = 250_000  # set-members asked for among the cheap actions, beside all pairs
COSTLY = 48  # sets asked for among the costly ones


@dataclass(frozen=True)
class Progress:
    """How far a planner has come: set-members judged, and the best plan so far."""

    judged: int
    cost: float
    resident: int


@dataclass(frozen=True, eq=False)
class Partition:
    """Groups of adapters, as ascending indices of the zoo, with what is to be done with each.

    ``verdicts[g]`` is None where group g is one adapter, which stays as it is. ``proven``: no other
    partition costs less.
    """

    groups: list[tuple[int, ...]]
    verdicts: list[Verdict | None]
    cost: float
    proven: bool
    book: Book
    ranks: list[Set]  # the groups in the book's own numbers


def partition(
    judge: Judge,
    names: Sequence[str],
    costs: Costs | None = None,
    *,
    actions: Sequence[str] = ACTIONS,
    exact_up_to: int = EXACT_UP_TO,
    effort: int = EFFORT,
    costly: int = COSTLY,
    resident: int | None = None,
    known: Partition | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Partition:
    """The cheapest partition of the adapters ``names`` into groups, each merged or one adapter.

    Up to ``exact_up_to`` adapters it is the best there is (:mod:`.exact`), above it is searched for
    (:mod:`.search`). It does not depend on the order of the adapters, as far as the judge does not.

    Args:
        actions: of :data:`.ACTIONS`, those that may be used.
        effort: set-members that the cheap actions may be asked for, all pairs not counted.
        costly: sets that "prune" and "regmean" may be asked for.
        resident: at most so many groups. Without a floor in the costs, or with 0, the partition
            whose worst member keeps most, and of those the cheapest; with a floor, the cheapest.
            Small zoos' is the best there is, as far as ``costly`` allows (:mod:`.limited`).
        known: a partition by the same judge of the same names at other costs: the search begins
            there, with all that was judged, and ``effort`` counts the pairs.
        progress: called whenever something was judged.

    Raises:
        InputError: no such action, more than ``MOST`` adapters, no partition into so few groups as
            ``resident`` that is known to be allowed.
    """
    costs = costs or Costs()
    check_actions(actions)
    count = len(names)
    if count > MOST:
        raise InputError(f"has {count} adapters; a plan can be made for up to {MOST}", key="zoo")
    if resident is not None and (type(resident) is not int or resident < 1):
        raise InputError(f"must be a positive integer, got {resident!r}", key="resident")
    order = np.array(sorted(range(count), key=lambda i: names[i]), np.int32)
    small = count <= exact_up_to
    pairs = 2 * count * (count - 1) if known is None else 0
    allowed = None if small else effort + pairs
    if resident is not None and costs.floor:
        costly //= 2  # half for a plan that may turn out to have too many groups
    best = [float("inf"), count]

    def told(_: int) -> None:
        if progress is not None:
            progress(Progress(found.cells, float(best[0]), int(best[1])))

    if known is None:
        shares = costs.shares(names)[order] if count else np.zeros(0)
        found = Book(judge, costs, order, shares, actions, effort=allowed, costly=costly, told=told)
    else:
        found = known.book.with_costs(costs, effort=allowed, costly=costly)

    def improved(groups: list[Set]) -> None:
        best[:] = found.total(groups) / UNIT, len(groups)
        told(0)

    start = () if known is None else known.ranks
    if count == 0:
        groups, proven = [], True
    elif resident is not None and not costs.floor:
        groups, proven = [], False
    elif small:
        groups, proven = best_partition(found, count)
        if resident is not None and not proven and len(groups) <= resident:
            found.costly_left += costly  # the other half; may end in more groups, see below
            groups, proven = best_partition(found, count)
            costly = found.costly_left
    else:
        search = Search(found, count, improved)
        groups = search.with_costly(search.best(start))
        if resident is not None and len(groups) <= resident:
            found.costly_left += costly
            again = search.with_costly(groups)
            groups = again if len(again) <= resident else groups
        proven = search.proven(groups)
    if count and resident is not None and not 0 < len(groups) <= resident:
        ranked = [names[i] for i in order]
        book = found.with_costs(costs, effort=allowed, costly=costly)
        told(0)
        few = limited(book, count, resident, exact=small, start=groups or start, names=ranked)
        found, groups, proven = few.book, few.groups, few.proven
    return finished(found, groups, proven)


def check_actions(actions: Sequence[str]) -> None:
    """InputError for an action that does not exist."""
    for action in actions:
        if action not in ACTIONS:
            raise InputError(f"no action {action!r}; there are: {', '.join(ACTIONS)}",
                             key="actions")  # fmt: skip


def finished(book: Book, groups: list[Set], proven: bool) -> Partition:
    """A partition in the numbers of the zoo, the largest groups first."""
    order = book.order.tolist()
    rows = []
    for ranks in groups:
        own = sorted(range(len(ranks)), key=lambda k: order[ranks[k]])
        verdict = book.best(ranks) if len(ranks) > 1 else None
        members = tuple(order[ranks[k]] for k in own)
        rows.append((members, None if verdict is None else verdict.reordered(own), ranks))
    rows.sort(key=lambda row: (-len(row[0]), row[0]))
    return Partition(
        [r[0] for r in rows], [r[1] for r in rows],
        sum((group_cost(book, r[2]) for r in rows), 0.0), proven, book, [r[2] for r in rows],
    )  # fmt: skip


def group_cost(book: Book, ranks: Set) -> float:
    """What a group costs, without the millionths that decide between equals."""
    share = float(book.shares[list(ranks)].sum())
    verdict = book.best(ranks) if len(ranks) > 1 else None
    if verdict is None:
        return book.costs.cost(share, 0.0, 0.0)
    lost = verdict.lost
    weighted = len(book.shares) * float((book.shares[list(ranks)] * lost).sum())
    return book.costs.cost(share, weighted, float(lost.max()))
