"""A good partition of a large zoo: from the bottom up, from the top down, then local moves.

Nothing here takes a set to be worse than its subsets: every set that is chosen was judged itself.
What pairs do to each other only decides which sets are looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from mergeprobe_fast.planning.book import Book, Exhausted, Set
from mergeprobe_fast.planning.changes import (
    PARTNERS,
    Change,
    moves,
    singles,
    splits,
    sums,
    swaps,
    union,
    unions,
    without,
)
from mergeprobe_fast.planning.costs import NEVER

_AT_ONCE = 8  # one in so many groups is merged in one step from the bottom up
_KICKS = 10  # in a row that did not help, until it is good enough
_LEAVE = 12  # one in so many members leaves a set that is not allowed


class Search:
    """Partitions of ``count`` adapters, better and better; all that is known is in the book.

    ``improved(groups)`` is called with every better one. ``done``: the book allows no more.
    ``between`` (count, count): both ways, what two adapters cost each other.
    """

    def __init__(self, book: Book, count: int, improved: Callable[[list[Set]], None]) -> None:
        self.book, self.count = book, count
        self._improved = improved
        self.done = False
        self._most = count
        self.ask(list(combinations(range(count), 2)))
        self._harm = book.harm()
        self.between = self._harm + self._harm.T

    def best(self, start: Sequence[Set] = ()) -> list[Set]:
        """The cheapest partition found with the cheap actions, from a ``start`` or from nothing.

        Groups of ``start`` that are not allowed are taken apart.
        """
        alone: list[Set] = [(i,) for i in range(self.count)]
        self._improved(alone)
        found = alone
        price = self.book.price
        apart = [p for g in start for p in ([g] if price(g) < NEVER else singles(g))]
        starts = [self._from_the_top, self._from_the_bottom] if not start else [lambda _: apart]
        for begin in starts:
            if self.proven(found):
                break
            groups = self._local(begin(alone))
            if self.book.total(groups) < self.book.total(found):
                found = groups
                self._improved(found)
        if not start:
            found = self._kicked(found)
        return sorted(found)

    def cheaper(self, groups: Sequence[Set], most: int) -> list[Set]:
        """The same or cheaper, of at most ``most`` groups, by local moves from ``groups``."""
        self._most = most
        found = self._local(sorted(groups))
        self._most = self.count
        return min(sorted(groups), found, key=self.book.total)

    def _kicked(self, found: list[Set]) -> list[Set]:
        """Take some groups apart at random, improve again, and keep what is better."""
        random = np.random.default_rng(0)
        failed = 0
        while failed < _KICKS and len(found) > 1 and not self.done and not self.proven(found):
            apart = set(random.choice(len(found), min(3, len(found)), replace=False).tolist())
            groups = [p for k, g in enumerate(found) for p in (singles(g) if k in apart else [g])]
            groups = self._local(groups)
            failed += 1
            if self.book.total(groups) < self.book.total(found):
                found, failed = groups, 0
                self._improved(found)
        return found

    def proven(self, groups: Sequence[Set]) -> bool:
        """Whether nothing can cost less: one adapter answers all, and nothing is lost."""
        return self.book.total(groups) == self.book.least(self.count)

    def with_costly(self, groups: list[Set]) -> list[Set]:
        """The same or better, by what the costly actions can do; as far as the book allows."""
        actions = self.book.costly
        self.done = False
        if not actions or self.proven(groups):
            return groups
        top, rest = [], tuple(range(self.count))
        while len(rest) > 1 and self.book.costly_left > 0:
            kept = self._largest(rest, actions)
            if kept is None:
                break
            top.append(kept)
            rest = without(rest, kept)
        left = [tuple(i for i in g if i in rest) for g in groups]
        left = [g for g in left if g]
        self.done = False
        self.ask(left)
        price = self.book.price
        left = [p for g in left for p in ([g] if price(g) < NEVER else singles(g))]
        found = min(groups, [*top, *left], key=self.book.total)
        self.done = False
        while not self.done and self._step(
            found, unions(self.between, found, 2), most=1, actions=actions, each=True
        ):
            self._improved(found)
        for g in sorted(found, key=len, reverse=True):
            self.done = False
            self.ask([g], actions)
        return sorted(found)

    # -- where to start -------------------------------------------------------------------------

    def _from_the_bottom(self, groups: Sequence[Set]) -> list[Set]:
        """Unite the groups that save most, some at a time."""
        found = list(groups)
        while not self.done and self._step(
            found, unions(self.between, found), most=max(1, len(found) // _AT_ONCE)
        ):
            pass
        return found

    def _from_the_top(self, groups: Sequence[Set]) -> list[Set]:
        """Take the largest set that is allowed, then the largest of the rest."""
        found, rest = [], tuple(range(self.count))
        while len(rest) > 1 and not self.done:
            kept = self._largest(rest, self.book.cheap)
            if kept is None:
                break
            found.append(kept)
            rest = without(rest, kept)
        return found + singles(rest)

    def _largest(self, members: Set, actions: Sequence[str]) -> Set | None:
        """A large allowed subset: those leave first who lose most and who take most from others."""
        while len(members) > 1:
            self.ask([members], actions)
            if self.book.price(members) < NEVER:
                return members
            verdict = self.book.closest(members)
            if verdict is None:
                return None
            at = np.array(members)
            kept = verdict.low if self.book.costs.floor_on == "low" else verdict.retention
            short = np.clip(self.book.floor - kept, 0.0, None)
            hidden = verdict.outside & (not self.book.anything)
            short = np.where(hidden | np.isnan(short), 1.0, short)
            blame = (self._harm[np.ix_(at, at)] * short[:, None]).sum(axis=0)
            score = short + blame
            leave = np.argsort(-score, kind="stable")[: max(1, len(members) // _LEAVE)]
            members = tuple(np.delete(at, leave).tolist())
        return None

    # -- moves ----------------------------------------------------------------------------------

    def _local(self, groups: list[Set]) -> list[Set]:
        """Moves of members, unions, exchanges, splits and dissolved groups, while any helps."""
        kinds = (moves, unions, swaps, splits)
        better = True
        while better and not self.done:
            better = False
            for kind in kinds:
                while not self.done and self._step(groups, kind(self.between, groups)):
                    better = True
            better |= self._dissolve(groups)
        return groups

    def _step(
        self, groups: list[Set], changes: Sequence[Change], most: int | None = None,
        actions: Sequence[str] | None = None, each: bool = False,
    ) -> bool:  # fmt: skip
        """Make the changes that save most and do not touch the same groups; whether any was made.

        ``each``: one after the other, the first that saves anything.
        """
        if not each:
            self.ask([s for _, new in changes for s in new], actions)
        used: set[Set] = set()
        made = 0
        for number, (saved, (old, new)) in enumerate(self._ranked(changes, each)):
            if each:
                if self.done:
                    break
                self.ask(new, actions)
                saved = self._saved(changes[number])
            if saved <= 0 or used.intersection(old) or self._too_many(groups, old, new):
                continue
            used.update(old)
            for g in old:
                groups.remove(g)
            groups.extend(new)
            made += 1
            if made == most:
                break
        groups.sort()
        return made > 0

    def _too_many(self, groups: Sequence[Set], old: Sequence[Set], new: Sequence[Set]) -> bool:
        return len(new) > len(old) and len(groups) + len(new) - len(old) > self._most

    def _ranked(self, changes: Sequence[Change], as_given: bool) -> list[tuple[int, Change]]:
        if as_given:
            return [(0, change) for change in changes]
        priced = [(self._saved(change), change) for change in changes]
        return sorted([p for p in priced if p[0] > 0], key=lambda row: (-row[0], row[1]))

    def _saved(self, change: Change) -> int:
        old, new = change
        return self.book.total(old) - self.book.total(new)

    def ask(self, sets: Sequence[Set], actions: Sequence[str] | None = None) -> None:
        """As the book does; where it allows no more, ``done`` says so."""
        try:
            self.book.ask(sets, actions)
        except Exhausted:
            self.done = True

    def _dissolve(self, groups: list[Set]) -> bool:
        """Give the members of a group to the others, one after the other; small groups first.

        A group fewer is what saves most, and no single move on the way to it saves anything.
        """
        better = False
        order = sorted(groups, key=lambda g: (len(g), g))
        self._foresee(groups, order)
        for number, own in enumerate(order):
            if own not in groups or self.done or len(groups) < 2:
                continue
            others = [g for g in groups if g != own]
            saved = self.book.price(own)
            for i in own:
                tried, joined = self._homes(i, others)
                self.ask(joined)
                saved -= self._settled(i, others, tried, joined)
            if saved > 0 and len(others) <= max(self._most, len(groups)):
                groups[:] = sorted(others)
                better = True
                self._foresee(groups, order[number + 1 :])
        return better

    def _homes(self, i: int, others: Sequence[Set]) -> tuple[list[int], list[Set]]:
        """The groups that a member is likely to fit best, by place, and what they would become."""
        size = np.array([len(g) for g in others])
        cost = sums(self.between[[i]], others)[0] / (size + 1)
        tried = np.argsort(cost, kind="stable")[:PARTNERS].tolist()
        return tried, [union(others[h], (i,)) for h in tried]

    def _settled(
        self, i: int, others: list[Set], tried: Sequence[int], joined: Sequence[Set]
    ) -> int:  # fmt: skip
        """Put a member where it costs least, by itself if that is there; what that costs."""
        added = [self.book.price(u) - self.book.price(others[h])
                 for u, h in zip(joined, tried, strict=True)]  # fmt: skip
        least, alone = int(np.argmin(added)), self.book.price((i,))
        if added[least] < alone:
            others[tried[least]] = joined[least]
        else:
            others.append((i,))
        return min(added[least], alone)

    def _foresee(self, groups: Sequence[Set], order: Sequence[Set]) -> None:
        """Ask what dissolving each group alone would ask, all groups at once: a judge is faster so.

        Nothing else: where the book does not allow that many, it is left to be asked step by step.
        """
        there = set(groups) if len(groups) > 1 else set()
        rest = {own: [g for g in groups if g != own] for own in order if own in there}
        for step in range(max(map(len, rest), default=0)):
            homes = {own: self._homes(own[step], others) for own, others in rest.items()
                     if step < len(own)}  # fmt: skip
            try:
                self.book.ask([s for _, joined in homes.values() for s in joined])
            except Exhausted:
                return
            for own, (tried, joined) in homes.items():
                self._settled(own[step], rest[own], tried, joined)
