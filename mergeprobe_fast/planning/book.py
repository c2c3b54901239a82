"""Every set that was judged, priced; the judge is never asked the same twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mergeprobe_fast.planning.costs import NEVER, Costs
from mergeprobe_fast.planning.judging import Judge, Judged, padded
from mergeprobe_fast.planning.plan_types import CHEAP, COSTLY
from mergeprobe_fast.planning.verdict import Verdict

Set = tuple[int, ...]
_BATCH_CELLS = 1_000_000  # sets x widest in one call
# What a set keeps is between -1 and 1; one of which nothing is to be relied on comes far behind.
NOTHING = -5.0
_OUTSIDE = 10.0
_UNKNOWN = -100.0


class Exhausted(Exception):
    """The planner has asked as much as it may."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """What the judge said in one call."""

    number: int
    ranks: np.ndarray  # (sets, widest)
    judged: Judged


class _Store:
    """All that was judged: of every action, where each set's row lies."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[Set, tuple[_Batch, int]]] = {a: {} for a in (*CHEAP, *COSTLY)}
        self.harm: dict[bool, np.ndarray] = {}
        self.batches = 0
        self.cells = 0  # set-members asked for
        self.prices: list[dict[Set, tuple[int, str | None]]] = []  # of every book, kept up to date


class Book:
    """Prices of sets. Adapters are ranks in the order of their names, sets ascending.

    Args:
        order: (N,) index in the zoo of each rank: what the judge is asked for.
        shares: (N,) of the requests, by rank.
        actions: those of :data:`.CHEAP` and :data:`.COSTLY` to ask for; what the judge has not is
            left out.
        effort: set-members that may be asked for among the cheap actions; None: no end.
        costly: sets that may be asked for among the costly ones.
        floor: what every member must keep; default that of the costs; ``NOTHING``: no matter what.
        told: called with the number of set-members asked for since the last call.
    """

    def __init__(
        self, judge: Judge, costs: Costs, order: np.ndarray, shares: np.ndarray,
        actions: Sequence[str], *, effort: int | None = None, costly: int = 0,
        floor: float | None = None, told: Callable[[int], None] | None = None,
        store: _Store | None = None,
    ) -> None:  # fmt: skip
        self.judge, self.costs = judge, costs
        self.anything = costs.floor == 0  # what is outside counts, too
        least = NOTHING if self.anything else costs.least
        self.floor = least if floor is None else floor
        self.order, self.shares = np.asarray(order, np.int32), np.asarray(shares, np.float64)
        there = [a for a in actions if a not in judge.unavailable]
        self.cheap = tuple(a for a in CHEAP if a in there)
        self.costly = tuple(a for a in COSTLY if a in there)
        self.effort, self.costly_left, self._told = effort, costly, told
        self._store = _Store() if store is None else store
        self._best_of: dict[Set, tuple[int, str | None]] = {}
        self._store.prices.append(self._best_of)
        self._priced: dict[int, np.ndarray] = {}
        self._rated: dict[int, np.ndarray] = {}
        one = np.ones(len(self.order))
        self._alone: list[int] = costs.price(self.shares, one, 0 * one, 0 * one).tolist()

    def with_costs(
        self, costs: Costs, *, effort: int | None, costly: int, floor: float | None = None
    ) -> Book:
        """A book of other costs, or floor; both know whatever either asks."""
        return Book(self.judge, costs, self.order, self.shares, self.actions, effort=effort,
                    costly=costly, floor=floor, told=self._told, store=self._store)  # fmt: skip

    @property
    def actions(self) -> tuple[str, ...]:
        """Those that can be asked for."""
        return (*self.cheap, *self.costly)

    @property
    def asked(self) -> dict[str, int]:
        """The sets that each action was asked for."""
        return {a: len(self._store.rows[a]) for a in self.actions}

    @property
    def refused(self) -> Mapping[tuple[str, frozenset[int]], str]:
        """Merges that cannot be made, by action and members in the zoo's numbers, and why."""
        return getattr(self.judge, "refused", {})

    @property
    def cells(self) -> int:
        """The set-members that were asked for."""
        return self._store.cells

    # -- asking ---------------------------------------------------------------------------------

    def ask(self, sets: Iterable[Set], actions: Sequence[str] | None = None) -> None:
        """Have sets judged, those that were not yet; ``Exhausted`` where that is too many.

        ``actions``: default the cheap ones.
        """
        wanted = [s for s in dict.fromkeys(sets) if len(s) > 1]
        for action in self.cheap if actions is None else actions:
            rows = self._store.rows[action]
            missing = [s for s in wanted if s not in rows]
            missing.sort(key=len)  # a batch is as wide as its widest
            if action in COSTLY:
                self._spend_costly(len(missing))
            else:
                self._spend(sum(map(len, missing)))
            at = 0
            while at < len(missing):
                end = at + 1
                while end < len(missing) and (end + 1 - at) * len(missing[end]) <= _BATCH_CELLS:
                    end += 1
                self._judge(missing[at:end], action)
                at = end

    def _spend(self, cells: int) -> None:
        if self.effort is not None:
            if cells > self.effort:
                raise Exhausted
            self.effort -= cells

    def _spend_costly(self, sets: int) -> None:
        if sets > self.costly_left:
            raise Exhausted
        self.costly_left -= sets

    def _judge(self, sets: list[Set], action: str) -> None:
        ranks = padded(sets)
        judged = self.judge.judge(np.where(ranks >= 0, self.order[ranks], np.int32(-1)), action)
        store = self._store
        batch = _Batch(store.batches, ranks, judged)
        store.batches += 1
        store.rows[action].update((members, (batch, row)) for row, members in enumerate(sets))
        for known in store.prices:
            for members in sets:
                known.pop(members, None)
        cells = sum(map(len, sets))
        store.cells += cells
        if self._told is not None:
            self._told(cells)

    def _prices_of(self, batch: _Batch) -> np.ndarray:
        found = self._priced.get(batch.number)
        if found is None:
            found = self._priced[batch.number] = self._prices(batch.ranks, batch.judged)
        return found

    def _prices(self, ranks: np.ndarray, judged: Judged) -> np.ndarray:
        there = ranks >= 0
        share = np.where(there, self.shares[ranks], 0.0)
        lost = np.where(there, np.clip(1.0 - judged.retention, 0.0, None), 0.0)
        allowed = self._rates(ranks, judged) >= self.floor
        lost = np.where(allowed[:, None], lost, 0.0)
        prices = self.costs.price(
            share.sum(axis=1), there.sum(axis=1),
            len(self.shares) * (share * lost).sum(axis=1), lost.max(axis=1),
        )  # fmt: skip
        return np.where(allowed, prices, NEVER)

    def _rates(self, ranks: np.ndarray, judged: Judged) -> np.ndarray:
        """(sets,) what the floor is compared with, of the worst member; see ``kept``."""
        floored = judged.low if self.costs.floor_on == "low" else judged.retention
        known = np.isfinite(floored) & np.isfinite(judged.retention)
        rate = np.where(known, np.clip(floored, 1 + NOTHING, 1.0), _UNKNOWN)
        if not self.anything:
            rate = rate - np.where(judged.outside, _OUTSIDE, 0.0)
        return np.where(ranks >= 0, rate, 1.0).min(axis=1)

    # -- looking up -----------------------------------------------------------------------------

    def kept(self, members: Set, actions: Sequence[str] | None = None) -> float:
        """What the worst member keeps by the action, of those asked, that leaves it most.

        At most 1, which is that of one adapter. Less than ``NOTHING`` where no prediction is to be
        relied on; the prediction still ranks those.
        """
        if len(members) == 1:
            return 1.0
        most = 3 * _UNKNOWN
        for name in self.actions if actions is None else actions:
            found = self._store.rows[name].get(members)
            if found is not None:
                batch, row = found
                rated = self._rated.get(batch.number)
                if rated is None:
                    rated = self._rated[batch.number] = self._rates(batch.ranks, batch.judged)
                most = max(most, float(rated[row]))
        return most

    def verdict(self, members: Set, action: str) -> Verdict | None:
        """What is known of one action; None: not asked."""
        found = self._store.rows[action].get(members)
        if found is None:
            return None
        batch, row = found
        at, j = (row, slice(0, len(members))), batch.judged
        refused = self.refused
        why = refused.get((action, frozenset(self.order[list(members)].tolist()))) if (
            refused) else None  # fmt: skip
        return Verdict(action, int(self._prices_of(batch)[row]), j.retention[at], j.low[at],
                       j.high[at], j.outside[at], j.weights[at], why)  # fmt: skip

    def verdicts(self, members: Set) -> list[Verdict]:
        """What is known, in the order of the actions."""
        found = (self.verdict(members, a) for a in self.actions)
        return [v for v in found if v is not None]

    def best(self, members: Set) -> Verdict | None:
        """The cheapest allowed action that is known, the first of equals; None: there is none."""
        action = self._best(members)[1]
        return None if action is None else self.verdict(members, action)

    def price(self, members: Set) -> int:
        """Of a group, as far as it is known; of one adapter, that of keeping it."""
        return self._alone[members[0]] if len(members) == 1 else self._best(members)[0]

    def _best(self, members: Set) -> tuple[int, str | None]:
        known = self._best_of.get(members)
        if known is not None:
            return known
        price, action = NEVER, None
        for name in self.actions:
            found = self._store.rows[name].get(members)
            if found is not None:
                batch, row = found
                own = int(self._prices_of(batch)[row])
                if own < price:
                    price, action = own, name
        self._best_of[members] = price, action
        return price, action

    def closest(self, members: Set) -> Verdict | None:
        """The action that leaves most to the worst member, allowed or not; None: nothing known."""
        found = self.verdicts(members)
        if len(found) < 2:
            return found[0] if found else None
        return max(found, key=lambda v: (not v.outside.any(), v.worst))

    def knows(self, members: Set, actions: Sequence[str]) -> bool:
        """Whether all these actions were asked for."""
        return all(members in self._store.rows[a] for a in actions)

    def bound(self, members: Set) -> int:
        """What a set costs at least, whatever the costly actions, not asked yet, would say."""
        known = self.price(members)
        if len(members) == 1 or self.knows(members, self.costly):
            return known
        return min(known, self._lossless(members))

    def least(self, count: int) -> int:
        """What no partition of so many adapters can cost less than."""
        return self._lossless(tuple(range(count)))

    def _lossless(self, members: Set) -> int:
        share, zero = self.shares[list(members)].sum(keepdims=True), np.zeros(1)
        return int(self.costs.price(share, zero + len(members), zero, zero)[0])

    def known_sets(self) -> list[Set]:
        """Every set that any action was asked for, in the order of asking."""
        return list(dict.fromkeys(s for a in self.actions for s in self._store.rows[a]))

    def harm(self) -> np.ndarray:
        """(N, N) what each adapter loses in a pair with each other, by the kindest action.

        All, 1, where that is not known; the pairs must have been asked for, as far as allowed.
        """
        found = self._store.harm.get(self.anything)
        if found is None:
            count = len(self.order)
            found = self._store.harm[self.anything] = np.zeros((count, count))
            for pair in combinations(range(count), 2):
                verdict = self.closest(pair)
                hidden = verdict is None or (verdict.outside.any() and not self.anything)
                lost = np.ones(2) if hidden else verdict.lost
                found[pair], found[pair[::-1]] = lost
        return found

    def total(self, groups: Iterable[Set]) -> int:
        """The price of a partition."""
        return min(NEVER, sum([self.price(g) for g in groups]))
