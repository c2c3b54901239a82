"""Every statistic of pairs and of adapters: what it is, what it needs, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mergeprobe_fast.engine.work import canonical_work, factor_work, gram_work
from mergeprobe_fast.features import FAMILIES, GROUPS, ON_TILES, SPECTRUM, AdapterFeature
from mergeprobe_fast.features.cost import CHANNEL_PACE
from mergeprobe_fast.features.declare import (
    CHANNELS,
    AdapterColumn,
    Family,
    Feature,
    PairColumn,
)
from mergeprobe_fast.recorded import NOTHING
from mergeprobe_fast.zoo import Zoo

ADAPTERS = "the adapters"  # what a statistic needs that needs nothing else
AGGREGATES = ("mean", "max", "min", "p10", "p90")
_TILES = "r^2 (d_out + d_in), once for all of the tiles"
_DOMAINS = "{} for each domain"
_OF_VIEW = {
    "inputs": "r (r + d_in) T",
    "mean_input": "r (r + d_in)",
    "kfac": "r (r + d_out + d_in) T",
    "fisher": "r^2 (d_out + d_in)",
}


@dataclass(frozen=True)
class Statistic:
    """A statistic of pairs or of adapters; a column of their table, and its ``aggregates``.

    ``low`` and ``high``: its range, None where it has no bound (``range`` says both in words).
    ``null``: what it is for unrelated updates that point in random directions, as a formula, "" if
    it is not known. ``needs``: what must be recorded beside the adapters. ``cost``: multiply-adds
    of a pair and module of rank r (an adapter and module where it says so), and what shares them;
    T samples. ``default``: whether it is among the features "default". ``twin``: the same with
    the two adapters exchanged.
    """

    name: str
    of: Literal["pair", "adapter"]
    group: str
    title: str
    definition: str
    low: float | None
    high: float | None
    range: str
    null: str
    needs: str
    cost: str
    source: str
    default: bool
    aggregates: tuple[str, ...]
    twin: str | None
    declared: Feature | PairColumn | AdapterFeature | AdapterColumn = field(repr=False)
    _work: Callable[[Zoo], float | None] = field(repr=False)

    @property
    def per_module(self) -> bool:
        """Whether there are aggregates over modules."""
        return bool(self.aggregates)

    def work(self, zoo: Zoo) -> float | None:
        """Multiply-adds on a zoo, alone, in those of the block Gram; None: not stated."""
        return self._work(zoo)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title} ({self.of})", self.definition]
        for key in ("range", "null", "needs", "cost", "source"):
            if getattr(self, key):
                lines.append(f"{key}: {getattr(self, key)}")
        return "\n".join(lines)


def _range(low: float | None, high: float | None, high_text: str = "") -> str:
    if low is None and high is None:
        return "any number"
    if high is None and not high_text:
        return f">= {low:g}"
    if low is None:
        return f"<= {high:g}"
    return f"{low:g} to {high_text or format(high, 'g')}"


def _nothing(zoo: Zoo) -> float | None:
    return 0.0


def _unknown(zoo: Zoo) -> float | None:
    return None


def _channels(zoo: Zoo) -> float:
    return CHANNEL_PACE * factor_work(zoo)


def _of_feature(f: Feature) -> Statistic:
    views = {n.view for n in f.needs if n.view != "weights"}
    if views:
        cost = _DOMAINS.format(_OF_VIEW[next(iter(views))]) + ", on the same tiles"
        work: Callable[[Zoo], float | None] = _unknown
    elif any(n.product in CHANNELS for n in f.needs):
        cost, work = "d, and r d of an adapter and module", _channels
    elif f.needs:
        cost, work = _TILES, gram_work
    else:
        cost, work = "none", _nothing
    return Statistic(
        f.name, "pair", GROUPS[f.name], f.title, f.definition, f.low, f.high,
        _range(f.low, f.high), f.null_text, f.missing(NOTHING) or ADAPTERS, cost, f.source,
        f.by_default, AGGREGATES if f.per_module else (), f.directed_twin, f, work,
    )  # fmt: skip


def _work_of(family: Family) -> Callable[[Zoo], float | None]:
    if family.work is not None:
        return lambda zoo: family.pace * family.work(zoo)
    return _nothing if family.compute is None else _unknown


def _of_family(family: Family) -> list[Statistic]:
    needs = family.missing(NOTHING) or ADAPTERS
    cost = f"{family.cost}, once for all of {family.title.lower()}" if family.cost else ""
    every = (*family.pairs, *family.adapters)
    names = {c.name for c in every}
    # A column "x.mean" beside "x" is an aggregate of it over modules.
    over: dict[str, list[str]] = {}
    for c in every:
        base, _, how = c.name.partition(".")
        if how and base in names:
            over.setdefault(base, []).append(how)
    found = []
    for c in every:
        if c.name.partition(".")[0] in over and c.name not in over:
            continue
        pair = isinstance(c, PairColumn)
        found.append(Statistic(
            c.name, "pair" if pair else "adapter", family.title, c.title, c.definition, c.low,
            c.high, _range(c.low, c.high), c.null_text, needs, cost, c.source, family.by_default,
            tuple(over.get(c.name, ())), c.directed_twin if pair else None, c, _work_of(family),
        ))  # fmt: skip
    return found


def _of_spectrum(f: AdapterFeature) -> Statistic:
    return Statistic(
        f.name, "adapter", "Spectra", f.title, f.definition, f.low, f.high,
        _range(f.low, f.high, f.high_text), f.null_text, ADAPTERS,
        "r^2 (d_out + d_in) of an adapter and module, once for all", f.source, f.by_default,
        () if f.name == "norm" else AGGREGATES[:2], None, f, canonical_work,
    )  # fmt: skip


def _list() -> dict[str, Statistic]:
    every = [_of_feature(f) for f in ON_TILES]
    families = [s for family in FAMILIES for s in _of_family(family)]
    every += [s for s in families if s.of == "pair"]
    every += [_of_spectrum(f) for f in SPECTRUM]
    every += [s for s in families if s.of == "adapter"]
    named = {s.name: s for s in every}
    if len(named) != len(every):
        raise AssertionError("two statistics have one name")
    return named


FEATURES: dict[str, Statistic] = _list()
