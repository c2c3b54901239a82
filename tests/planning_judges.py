"""Judges that make up what they say, for tests of planners, and planners that try everything."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mergeprobe_fast.planning.costs import Costs
from mergeprobe_fast.planning.judging import Judged


class MadeJudge:
    """Counts what it is asked, and refuses to be asked twice."""

    level, calibrated, coverage = "weights", True, 0.9

    def __init__(self, names: Sequence[str], unavailable: Mapping[str, str] | None = None) -> None:
        self.names = list(names)
        self.unavailable = dict(unavailable or {})
        self.seen: set[tuple[str, frozenset[int]]] = set()
        self.cells = self.calls = 0

    def retention(self, members: np.ndarray, action: str) -> np.ndarray:
        raise NotImplementedError

    def outside(self, members: np.ndarray, action: str) -> np.ndarray:
        return np.zeros(members.shape, bool)

    def judge(self, members: np.ndarray, action: str) -> Judged:
        assert action not in self.unavailable and action != "route"
        assert members.dtype == np.int32 and (members[:, 1] >= 0).all()
        for row in members:
            key = action, frozenset(row[row >= 0].tolist())
            assert len(key[1]) == np.count_nonzero(row >= 0), "a member twice"
            assert key not in self.seen, "asked twice"
            self.seen.add(key)
        there = members >= 0
        self.cells += int(there.sum())
        self.calls += 1
        kept = np.where(there, self.retention(members, action), np.nan)
        size = there.sum(axis=1, keepdims=True)
        weights = np.where(there, 1.0 / size, np.nan)
        if action == "regmean":
            weights = np.full(members.shape, np.nan)
        return Judged(kept, kept - 0.05, kept + 0.03, self.outside(members, action), weights)


class HashJudge(MadeJudge):
    """A number of every (set, member, action) by names: no order in it at all, not monotone.

    ``steps``: of so many values, so that there are ties.
    """

    def __init__(self, names, seed: int, steps: int = 0, low: float = 0.8, **rest) -> None:
        super().__init__(names, **rest)
        self.seed, self.steps, self.low = seed, steps, low

    def retention(self, members, action):
        out = np.full(members.shape, np.nan)
        for row, found in zip(out, members, strict=True):
            own = [self.names[i] for i in found if i >= 0]
            for k, name in enumerate(own):
                key = repr((self.seed, action, sorted(own), name)).encode()
                u = zlib.crc32(zlib.crc32(key).to_bytes(4, "little")) / 2**32
                u = math.floor(u * self.steps) / self.steps if self.steps else u
                row[k] = self.low + (1.05 - self.low) * u
        return out


class HarmJudge(MadeJudge):
    """Each member loses what the others do to it: ``harm[i, j]`` of i by j, added up.

    ``speed``: set-members a second, or as fast as it can.
    """

    def __init__(self, names, harm, better=None, speed: float | None = None, **rest) -> None:
        super().__init__(names, **rest)
        self.harm = np.array(harm, float)
        np.fill_diagonal(self.harm, 0.0)
        self.better = dict.fromkeys(("merge", "reweight", "prune", "regmean"), 1.0)
        self.better.update(better or {})
        self.speed = speed

    def retention(self, members, action):
        started = time.perf_counter()
        size = np.count_nonzero(members >= 0, axis=1)
        out = np.full(members.shape, np.nan)
        for k in np.unique(size):
            rows = members[size == k, :k]
            harm = self.harm[rows[:, :, None], rows[:, None, :]].sum(axis=2)
            out[np.flatnonzero(size == k)[:, None], np.arange(k)] = 1 - self.better[action] * harm
        if self.speed:
            needed = int(size.sum()) / self.speed - (time.perf_counter() - started)
            time.sleep(max(0.0, needed))
        return out


def planted(count: int, families: int, rng: np.random.Generator, within=0.002, across=0.3):
    """Harm of adapters in families that get along: (harm, family of each)."""
    family = rng.integers(0, families, count)
    same = family[:, None] == family
    harm = np.where(same, within, across) * rng.uniform(0.5, 1.5, (count, count))
    return harm, family


def partitions(items: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """Every partition of ``items``, by putting each item into every part of the rest's."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [(first,), *parts]
        for k, part in enumerate(parts):
            yield [*parts[:k], (first, *part), *parts[k + 1 :]]


def dense_cost(
    judge: MadeJudge, groups: Sequence[Sequence[int]], costs: Costs, actions: Sequence[str]
) -> float:
    """The cost of a partition by its definition, each group by its cheapest action, or inf."""
    shares = costs.shares(judge.names)
    total = 0.0
    for group in groups:
        p = sum(shares[i] for i in group)
        cost = costs.adapter + costs.request * p * (1 - p)
        if len(group) == 1:
            total += cost
            continue
        row = np.array([group], np.int32)
        best = math.inf
        for action in actions:
            if action == "route" or action in judge.unavailable:
                continue
            kept = judge.retention(row, action)[0]
            floored = kept - 0.05 if costs.floor_on == "low" else kept
            if judge.outside(row, action).any() or not (floored >= costs.least).all():
                continue
            lost = np.maximum(0, 1 - kept)
            weighted = sum(len(shares) * shares[i] * x for i, x in zip(group, lost, strict=True))
            best = min(best, cost + 100 * (costs.average * weighted + costs.worst * lost.max()))
        total += best
    return total
