"""The words of a plan: what can be done with a set of adapters, and a group of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What can be done with a set, in the order in which equal costs are decided.
ACTIONS = ("merge", "reweight", "prune", "regmean", "route")
# Those that are asked of every set, and those that are asked only where they could matter.
CHEAP = ("merge", "reweight")
COSTLY = ("prune", "regmean")


@dataclass(frozen=True)
class Group:
    """Adapters that become one resident adapter, or one that stays as it is ("route").

    ``method``, ``weights`` (in the order of ``members``; None: the method's own) and ``arguments``
    are those of :func:`mergeprobe_fast.merge`; all None or empty for "route". ``retention``, with
    its interval ``low`` to ``high``, is what is predicted to be left of each member; None: unknown.
    """

    name: str
    members: tuple[str, ...]
    action: str
    method: str | None = None
    weights: tuple[float, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    retention: tuple[float | None, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    cost: float = 0.0
    reasons: tuple[str, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether anything is merged here."""
        return self.action != "route"

    @property
    def worst(self) -> float:
        """The least predicted retention of its members; 1 where nothing is merged."""
        return min((r for r in self.retention if r is not None), default=1.0)

    @property
    def average(self) -> float:
        """The mean predicted retention of its members; 1 where nothing is merged."""
        known = [r for r in self.retention if r is not None]
        return sum(known) / len(known) if known else 1.0
