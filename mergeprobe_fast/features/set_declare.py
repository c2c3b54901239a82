"""What a statistic of a set of adapters is: a declaration of what it is made from, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.engine.totals import Totals

Values = Mapping[str, np.ndarray]


@dataclass
class SetRequest:
    """Sets of a zoo's adapters, checked, and what is known about the zoo."""

    zoo: Zoo
    recorded: Recorded
    members: np.ndarray  # (sets, widest) int32, -1 beyond a set
    weights: np.ndarray  # (sets, widest)
    threads: int
    progress: Callable[[int], None] | None = None
    device: Any = None  # from ops.open_device
    _totals: Totals | None = field(default=None, repr=False)

    @property
    def totals(self) -> Totals:
        """Inner products of all adapters, from one pass over the zoo."""
        if self._totals is None:
            from mergeprobe_fast.engine.totals import totals

            self._totals = totals(
                self.zoo, self.recorded.calibration, threads=self.threads, progress=self.progress,
                device=self.device,
            )  # fmt: skip
        return self._totals

    @property
    def domain_of(self) -> np.ndarray | None:
        """(N,) row of ``totals.inputs`` of each adapter's domain; None without a calibration."""
        if self.recorded.calibration is None:
            return None
        row = {name: t for t, name in enumerate(self.totals.domains)}
        return np.array([row[name] for name in self.recorded.domains], np.int64)


@dataclass(frozen=True)
class SetFeature:
    """A number per set. ``finish`` gets what the group of the feature computed.

    ``per_member=True``: a value of every member, which :meth:`.SetTable.per_member` gives, and no
    column.
    """

    name: str
    title: str
    definition: str
    finish: Callable[[Values], np.ndarray]
    low: float | None = None
    high: float | None = None
    source: str = ""
    per_member: bool = False


@dataclass(frozen=True)
class SetGroup:
    """Features that share what they are made from.

    ``missing(recorded)`` says in one phrase what is not there, or None. ``compute`` is called once
    and gives arrays (sets,) or (sets, widest); "there" (what is no padding) is added to them.
    Groups that are not ``default`` are slow: asked for by name, or with "all".
    """

    name: str
    missing: Callable[[Recorded], str | None]
    compute: Callable[[SetRequest], Values]
    features: tuple[SetFeature, ...]
    default: bool = True


def over(reduce: str, name: str) -> Callable[[Values], np.ndarray]:
    """Minimum, mean or maximum over the members of each set; NaN where it is so for one of them."""

    def finish(values: Values) -> np.ndarray:
        x, there = values[name], values["there"]
        if reduce == "mean":
            return np.where(there, x, 0.0).sum(axis=1) / there.sum(axis=1)
        if reduce == "min":
            return np.where(there, x, np.inf).min(axis=1)
        return np.where(there, x, -np.inf).max(axis=1)

    return finish


def plain(name: str) -> Callable[[Values], np.ndarray]:
    """A value as it was computed."""
    return lambda values: values[name]
