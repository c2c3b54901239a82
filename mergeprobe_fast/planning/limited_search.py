"""A good partition of a large zoo into at most so many groups, for what the worst member keeps.

Two partitions are compared by their worst groups, then by their second worst and so on, so that
every exchange between groups that are not the worst may still make room for those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mergeprobe_fast.planning.book import Set
from mergeprobe_fast.planning.changes import (
    PARTNERS,
    Change,
    moves,
    splits,
    swaps,
    unions,
)
from mergeprobe_fast.planning.search import Search

_AT_ONCE = 8  # one in so many groups is united in one step
_KICKS = 10  # in a row that did not help
_TRIES = 6  # changes of a group that the costly actions are asked for, until it is given up


class LimitedSearch:
    """Partitions into at most ``most`` groups, less than there are adapters."""

    def __init__(self, search: Search, most: int) -> None:
        self.search, self.book, self.most = search, search.book, most
        self._between = search.between

    def best(self, start: Sequence[Set] = ()) -> list[Set]:
        """The best partition that was found; its groups have all been asked for."""
        even = self._united(self._even)
        shapes = [self._united(self._kindly), even]
        if start and len(start) <= self.most:
            shapes.append(sorted(start))
        found = max((self._improved(list(s)) for s in shapes), key=self._rank)
        found = self._kicked(found)
        self._ask_anyway([*found, *even])
        return self._with_costly([found, even])

    def _rank(self, groups: Sequence[Set]) -> tuple[float, ...]:
        kept = sorted(map(self.book.kept, groups))
        return (*kept, *[1.0] * (self.most - len(kept)))

    # -- where to start -------------------------------------------------------------------------

    def _united(self, ranked: Callable[[list[Set]], list[Change]]) -> list[Set]:
        """From the bottom up, the unions that come first, some at a time."""
        groups: list[Set] = [(i,) for i in range(self.search.count)]
        while len(groups) > self.most:
            left = max(1, min(len(groups) - self.most, len(groups) // _AT_ONCE))
            used: set[Set] = set()
            for old, new in ranked(groups):
                if left == 0:
                    break
                if not used.intersection(old):
                    used.update(old)
                    groups = sorted([*(g for g in groups if g not in old), *new])
                    left -= 1
        return groups

    def _kindly(self, groups: list[Set]) -> list[Change]:
        """By what the worst member would keep."""
        changes = unions(self._between, groups)
        self.search.ask([s for _, new in changes for s in new])
        return sorted(changes, key=lambda c: -self.book.kept(c[1][0]))

    def _even(self, groups: list[Set]) -> list[Change]:
        """Small ones first, of those the ones that harm each other least."""
        size = -(-self.search.count // self.most)  # of groups that are all alike
        return sorted(unions(self._between, groups), key=lambda c: max(0, len(c[1][0]) - size))

    # -- changes --------------------------------------------------------------------------------

    def _improved(self, groups: list[Set]) -> list[Set]:
        """Change one group after the other, the worst first, while that helps."""
        self.search.ask(groups)
        tried: set[Set] = set()
        while not self.search.done:
            left = [g for g in groups if len(g) > 1 and g not in tried]
            if not left:
                break
            worst = min(left, key=lambda g: (self.book.kept(g), g))
            changes = self._changes(groups, worst)
            self.search.ask([s for _, new in changes for s in new])
            better = [c for c in changes if self._helps(c)]
            if not better:
                tried.add(worst)
                continue
            old, new = max(better, key=lambda c: (*self._gain(c), c))
            groups = sorted([*(g for g in groups if g not in old), *new])
            tried -= {g for g in tried if self._may_take(g, new)}
        return groups

    def _may_take(self, group: Set, new: Sequence[Set]) -> bool:
        """A group that could not be helped before may be, now that there are others, better off."""
        return any(self.book.kept(group) <= self.book.kept(n) for n in new)

    def _changes(self, groups: list[Set], own: Set) -> list[Change]:
        """What could be done about one group."""
        found = [*moves(self._between, groups, own), *swaps(self._between, groups, own)]
        room = self.most - len(groups)
        parts = splits(self._between, [own])
        if len(own) == 2:
            parts = [((own,), ((own[0],), (own[1],)))]
        if room > 0:
            found += parts
        others = [g for g in groups if g != own]
        for (_, new), (pair, joined) in (
            (p, u) for p in parts for u in unions(self._between, others, 2)[:PARTNERS]
        ):
            found.append(((own, *pair), (*new, *joined)))
        return [c for c in found if len(groups) + len(c[1]) - len(c[0]) <= self.most]

    def _helps(self, change: Change) -> bool:
        old, new = (sorted(map(self.book.kept, side)) for side in change)
        most = max(len(old), len(new))
        return [*new, *[1.0] * (most - len(new))] > [*old, *[1.0] * (most - len(old))]

    def _gain(self, change: Change) -> tuple[float, float]:
        old, new = ([max(-20.0, self.book.kept(g)) for g in side] for side in change)
        return min(new) - min(old), sum(new) - sum(old)

    def _kicked(self, found: list[Set]) -> list[Set]:
        """Deal the members of the worst group and two others anew, improve, keep what is better."""
        random = np.random.default_rng(0)
        failed = 0
        while failed < _KICKS and len(found) > 1 and not self.search.done:
            failed += 1
            worst = min(found, key=lambda g: (self.book.kept(g), g))
            rest = [g for g in found if g != worst]
            chosen = random.choice(len(rest), min(2, len(rest)), replace=False).tolist()
            dealt = [worst, *(rest[k] for k in chosen)]
            members = random.permutation([i for g in dealt for i in g]).tolist()
            parts = [tuple(sorted(members[k :: len(dealt)])) for k in range(len(dealt))]
            groups = [*(g for g in found if g not in dealt), *parts]
            groups = self._improved(sorted(g for g in groups if g))
            if self._rank(groups) > self._rank(found):
                found, failed = groups, 0
        return found

    # -- costly actions -------------------------------------------------------------------------

    def _with_costly(self, shapes: Sequence[list[Set]]) -> list[Set]:
        """The same or better by the costly actions, as far as the book allows them.

        They are asked for the groups of every shape, then for changes of the worst group.
        """
        self.search.done = False
        actions = self.book.costly
        if not actions:
            return shapes[0]
        for groups in shapes:
            for g in sorted(groups, key=lambda g: (self.book.kept(g), g)):
                self.search.ask([g], actions)
        found = max(shapes, key=self._rank)
        # Those that left most anywhere; the others are not worth the asking.
        best = [max(actions, key=lambda a: self.book.kept(g, [a])) for g in found if len(g) > 1]
        actions = [a for a in actions if a in best]
        better = True
        while better and not self.search.done:
            worst = min(found, key=lambda g: (self.book.kept(g), g))
            changes = self._changes(found, worst) if len(worst) > 1 else []
            changes.sort(key=self._guess)
            better = False
            for old, new in changes[:_TRIES]:
                self.search.ask(new, actions)
                if self._helps((old, new)):
                    found = sorted([*(g for g in found if g not in old), *new])
                    better = True
                if better or self.search.done:
                    break
        self._ask_anyway(found)
        return found

    def _ask_anyway(self, groups: Sequence[Set]) -> None:
        """Few sets, when the effort is spent, too."""
        left, self.book.effort = self.book.effort, None
        self.book.ask(groups)
        self.book.effort = left

    def _guess(self, change: Change) -> float:
        """What the worst member would lose, if losses were as what pairs cost each other."""
        old, new = change
        per_harm = [max(0.0, 1 - self.book.kept(g)) / max(self._harm(g), 1e-9) for g in old
                    if len(g) > 1]  # fmt: skip
        return max(self._harm(g) for g in new) * float(np.mean(per_harm))

    def _harm(self, members: Set) -> float:
        at = np.array(members)
        return float(self._between[np.ix_(at, at)].sum(axis=0).max())


