"""Zoos of the capacity run, and the groups that somebody without a planner would put them in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..tiers import capacity

Groups = tuple[tuple[str, ...], ...]
DRAWS = ("random-0", "random-1")
DOMAIN, ONE = "domain", "one group"


@dataclass(frozen=True)
class Zoo:
    """Some adapters of the capacity run, in its order, and how many may be resident."""

    name: str
    members: tuple[str, ...]
    residents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)


def _zoo(size: int, seed: int, residents: Sequence[int]) -> Zoo:
    chosen = {*capacity.order(seed)[:size]}
    members = tuple(name for name in capacity.ADAPTERS if name in chosen)
    return Zoo(f"{size}-{seed}", members, tuple(residents))


# The first two orders are those of the run, which has merged these as a whole.
ZOOS: dict[str, Zoo] = {
    zoo.name: zoo
    for zoo in (
        *(_zoo(10, seed, (1, 2, 3, 5)) for seed in (0, 1)),
        _zoo(20, 0, (1, 2, 5, 10)),
        _zoo(len(capacity.ADAPTERS), 0, (1, 2, 5, 10, 17)),
        *(_zoo(5, seed, (1,)) for seed in range(4)),
    )
}


def random_groups(members: Sequence[str], count: int, seed: str) -> Groups:
    """``count`` groups whose sizes differ by one at most; the same for the same ``seed``."""
    return ordered(members, _dealt(_shuffled(members, seed), count))


def domain_groups(domains: Mapping[str, str], count: int, seed: str) -> Groups:
    """``count`` groups that mix domains as little as possible, about equally large.

    With fewer groups than domains whole domains share a group, the largest first into the smallest
    group; with more, the domain with the largest groups is dealt into one more, its adapters in the
    order of ``seed``.
    """
    members = list(domains)
    by_domain: dict[str, list[str]] = {}
    for name in _shuffled(members, seed):
        by_domain.setdefault(domains[name], []).append(name)
    largest = sorted(by_domain.values(), key=lambda of: (-len(of), domains[of[0]]))
    if count <= len(largest):
        groups: list[list[str]] = [[] for _ in range(count)]
        for of in largest:
            min(groups, key=len).extend(of)
        return ordered(members, groups)
    parts = [1] * len(largest)
    while sum(parts) < count:
        most = max(range(len(parts)), key=lambda d: len(largest[d]) / parts[d])
        parts[most] += 1
    dealt = (_dealt(of, n) for of, n in zip(largest, parts, strict=True))
    return ordered(members, [group for groups in dealt for group in groups])


def ordered(members: Sequence[str], groups: Sequence[Sequence[str]]) -> Groups:
    """The same groups, members in the order of ``members``, groups by their first one."""
    place = {name: n for n, name in enumerate(members)}
    inside = (tuple(sorted(group, key=place.__getitem__)) for group in groups)
    return tuple(sorted(inside, key=lambda group: place[group[0]]))


def _shuffled(members: Sequence[str], seed: str) -> list[str]:
    return random.Random(f"equal cost/{seed}").sample(list(members), len(members))


def _dealt(members: Sequence[str], count: int) -> list[list[str]]:
    return [list(members[n::count]) for n in range(count)]
