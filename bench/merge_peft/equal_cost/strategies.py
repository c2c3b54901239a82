"""What is compared: groups of a zoo's adapters, and the operator that makes one of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..tiers.operators import CALIBRATION, CAPACITY_OPERATORS, OPERATORS, cut_name
from ..tiers.plan import MergePlan, Operator, Tier
from .partitions import DOMAIN, DRAWS, ONE, Groups, Zoo, domain_groups, random_groups

PLAN = "MergeProbe"  # the operator of strategies whose groups have one each
OURS = "MergeProbe's groups"
OWN = "*"  # behind the action in the name of an operator that only a plan has
STUDY = "equal cost"
REGMEAN = f"regmean-{CALIBRATION}"
# What a plan may choose, of every set: the operators that its actions are.
CHOICES = ("sum", "mean", "reweighted", "minimax", "prune", REGMEAN)
CUT = cut_name(REGMEAN, 16)  # twice the rank of one adapter
MAIN = (REGMEAN, "ties")
SEVERAL = ("mean", "tsv_m", "sum")
OTHERS = ("regmean-8", "fisher", "knots", "lora_lego", "dare_ties")
MANY = 10  # adapters in a zoo

_EXTRA = {
    "prune": Operator("prune", "prune", "mean", calibration=CALIBRATION),
    CUT: CAPACITY_OPERATORS[CUT],
}
ALL: dict[str, Operator] = {
    name: _EXTRA[name] if name in _EXTRA else OPERATORS[name]
    for name in dict.fromkeys((*MAIN, *SEVERAL, *CHOICES, *OTHERS, *_EXTRA))
}


@dataclass(frozen=True)
class Own:
    """An operator that only a plan has: with weights or arguments of its own."""

    operator: Operator
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Resident:
    """A resident adapter: its members and their operator, "" where it is a single one.

    ``predicted`` is what the plan says is kept of each, low to high; empty of what nobody planned.
    ``own`` says what the operator is where it is none of ``ALL``.
    """

    members: tuple[str, ...]
    operator: str = ""
    predicted: tuple[tuple[float | None, float | None, float | None], ...] = ()
    own: Own | None = None

    @property
    def merge(self) -> MergePlan | None:
        """What is to be made; None of a single one."""
        if len(self.members) < 2:
            return None
        return MergePlan(self.operator, self.members, STUDY)


@dataclass(frozen=True)
class Strategy:
    """All adapters of a zoo served by ``allowed`` resident ones at most."""

    zoo: Zoo
    allowed: int
    partition: str
    operator: str
    residents: tuple[Resident, ...]


def fixed(zoo: Zoo, allowed: int, partition: str, operator: str, groups: Groups) -> Strategy:
    """One operator for all groups."""
    made = tuple(Resident(group, operator if len(group) > 1 else "") for group in groups)
    return Strategy(zoo, allowed, partition, operator, made)


def by_hand(zoo: Zoo, domains: Mapping[str, str]) -> Iterator[Strategy]:
    """What somebody without a planner would do.

    One resident adapter: all operators; in zoos of more than ``MANY`` those of which the run has
    rows. Several: the main operators on every partition, and in small zoos the others of
    ``SEVERAL`` on the first random one.
    """
    own = {name: domains[name] for name in zoo.members}
    small = len(zoo) <= MANY
    for allowed in zoo.residents:
        if allowed == 1:
            for operator in ALL if small else (*MAIN, CUT, *SEVERAL):
                yield fixed(zoo, 1, ONE, operator, (zoo.members,))
            continue
        for name, groups in partitions(zoo, own, allowed).items():
            others = SEVERAL if small and name == DRAWS[0] else ()
            for operator in (*MAIN, *others):
                yield fixed(zoo, allowed, name, operator, groups)


def on_groups_of(plan: Strategy) -> Iterator[Strategy]:
    """The main operators on the groups of a plan: what is left of its gain is the groups'."""
    groups = tuple(resident.members for resident in plan.residents)
    if len(groups) > 1:
        for operator in (*MAIN, CUT):
            yield fixed(plan.zoo, plan.allowed, plan.partition, operator, groups)


def partitions(zoo: Zoo, domains: Mapping[str, str], allowed: int) -> dict[str, Groups]:
    """By name, those that need no planner."""
    found = {name: random_groups(zoo.members, allowed, f"{zoo.name}/{allowed}/{name}")
             for name in DRAWS}  # fmt: skip
    return found | {DOMAIN: domain_groups(domains, allowed, f"{zoo.name}/{allowed}")}


def urgency(strategy: Strategy) -> int:
    """What is measured first, where there is not time for all: 0."""
    if strategy.operator == PLAN:
        return 0
    if strategy.operator == REGMEAN:
        return 2 if strategy.partition == DRAWS[1] else 1
    if strategy.operator in MAIN or strategy.allowed == 1:
        return 4 if strategy.partition in (DRAWS[1], DOMAIN) else 3
    return 5


def tier_of(base: Tier, strategies: Sequence[Strategy]) -> Tier:
    """The tier of a run with the merges of these strategies in place of its own."""
    residents = [r for s in strategies for r in s.residents]
    merges = {merge.key: merge for r in residents if (merge := r.merge)}
    own = {r.operator: r.own.operator for r in residents if r.own}
    return replace(base, operators={**ALL, **own}, merges=merges)
