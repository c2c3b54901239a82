"""What strategies keep at equal numbers of resident adapters, with intervals, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..outcome.noise import RESAMPLES, counts_of
from ..report.operator_table import CLIP_KEPT, KEEPS, clipped
from .partitions import DOMAIN, DRAWS, ONE
from .rows import Found, Row
from .strategies import CHOICES, OURS, PLAN

ENOUGH = 0.95  # of what oracle routing keeps, which is 1
RANDOM = "random"
WAYS = {**dict.fromkeys(DRAWS, RANDOM), DOMAIN: DOMAIN, OURS: OURS}
_SIDES = (2.5, 97.5)

Record = dict[str, Any]
Key = tuple[str, int, str, str]  # zoo, allowed, partition, operator


class Measured:
    """The rows by strategy; what is asked of several is resampled together."""

    def __init__(self, found: Found) -> None:
        self.rows: dict[Key, list[Row]] = {}
        at: dict[Key, list[int]] = {}
        for n, row in enumerate(found.rows):
            key = row["zoo"], row["allowed"], row["partition"], row["operator"]
            self.rows.setdefault(key, []).append(row)
            at.setdefault(key, []).append(n)
        self.values = {k: np.array([clipped(r) for r in rows]) for k, rows in self.rows.items()}
        self._draws = {key: found.draws[places] for key, places in at.items()}
        names = sorted({row["member"] for row in found.rows})
        counts = counts_of(len(names), "equal cost") if names else np.ones((RESAMPLES, 0))
        self._counts = dict(zip(names, counts.T, strict=True))

    def mean(self, keys: Sequence[Key]) -> tuple[float, np.ndarray]:
        """The mean over all adapters of these strategies, and with adapters and items drawn anew.

        An adapter has the same weight in all strategies it is in.
        """
        value = float(np.nanmean(np.concatenate([self.values[key] for key in keys])))
        total, weight = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
        for key in keys:
            counts = np.array([self._counts[row["member"]] for row in self.rows[key]])
            there = ~np.isnan(self.values[key])
            total += (counts[there] * self._draws[key][there]).sum(axis=0)
            weight += counts[there].sum(axis=0)
        with np.errstate(invalid="ignore"):
            return value, total / weight

    def worst(self, keys: Sequence[Key]) -> tuple[float, np.ndarray]:
        """The worst adapter of each strategy, their mean, and with items drawn anew."""
        value = float(np.mean([np.nanmin(self.values[key]) for key in keys]))
        return value, np.mean([np.nanmin(self._draws[key], axis=0) for key in keys], axis=0)

    def interval(self, draws: np.ndarray) -> tuple[float, float]:
        """It holds 95 % of the draws."""
        low, high = np.nanpercentile(draws, _SIDES)
        return float(low), float(high)


def curves(found: Measured) -> list[Record]:
    """One record a number of adapters, way to group them, operator and number of residents.

    ``zoos`` are those that the strategy was measured on; ``mean``, ``worst`` with "_interval";
    ``below``: share of adapters that keep less than ``KEEPS``; ``accuracy``: kept; ``total_rank``
    and ``resident``: means. ``over_mean``, ``over_worst``: MergeProbe's less this one's on the zoos
    that both have, with "_interval"; None where there are none. ``whole``: it was measured on all
    zoos that any strategy of this size and number of residents was measured on.
    """
    ways: dict[tuple[int, str, str, int], list[Key]] = {}
    for key, rows in found.rows.items():
        _, allowed, partition, operator = key
        for way in (RANDOM, DOMAIN, OURS) if partition == ONE else (WAYS[partition],):
            ways.setdefault((rows[0]["adapters"], way, operator, allowed), []).append(key)
    known: dict[tuple[int, int], set[str]] = {}
    for (adapters, _, _, allowed), keys in ways.items():
        known.setdefault((adapters, allowed), set()).update(key[0] for key in keys)
    records = []
    for (adapters, way, operator, allowed), keys in sorted(ways.items()):
        zoos = sorted({key[0] for key in keys})
        told = [row for key in keys for row in found.rows[key]]
        records.append({
            "adapters": adapters, "way": way, "operator": operator, "allowed": allowed,
            "zoos": zoos, "whole": {*zoos} == known[adapters, allowed], "strategies": len(keys),
            "resident": float(np.mean([row["resident"] for row in told])),
            "total_rank": float(np.mean([row["total_rank"] for row in told])),
            "below": float(np.mean([v < KEEPS for key in keys for v in found.values[key]])),
            "accuracy": _accuracy(told), **_numbers(found, keys),
            **_over(found, [_plan(key) for key in keys], keys),
        })  # fmt: skip
    return records


def _numbers(found: Measured, keys: Sequence[Key]) -> Record:
    record: Record = {}
    for what in ("mean", "worst"):
        record[what], draws = getattr(found, what)(keys)
        record[f"{what}_interval"] = found.interval(draws)
    return record


def _over(found: Measured, ours: Sequence[Key], theirs: Sequence[Key]) -> Record:
    """How much more ``ours`` keep than ``theirs``, pair by pair of those that are there."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a in found.rows]
    record: Record = {}
    for what in ("mean", "worst"):
        record[f"over_{what}"] = record[f"over_{what}_interval"] = None
        if both:
            (a, drawn_a), (b, drawn_b) = (getattr(found, what)(list(keys))
                                          for keys in zip(*both, strict=True))  # fmt: skip
            record[f"over_{what}"] = a - b
            record[f"over_{what}_interval"] = found.interval(drawn_a - drawn_b)
    return record


def _plan(key: Key) -> Key:
    return key[0], key[1], OURS, PLAN


def _accuracy(rows: Iterable[Row]) -> float | None:
    kept = [np.clip(r["retention"], *CLIP_KEPT) for r in rows if r["retention"] is not None]
    return float(np.mean(kept)) if kept else None


def needed(records: Iterable[Record]) -> int | None:
    """The least number of residents from which on the mean is ``ENOUGH`` of routing's, of one
    strategy's records."""
    least = None
    for record in sorted(records, key=lambda r: -r["allowed"]):
        if record["mean"] < ENOUGH:
            break
        least = record["allowed"]
    return least


def pooled(found: Measured, adapters: int, way: str, operator: str) -> Record | None:
    """MergeProbe's less this strategy's, over all zoos of a size and all numbers of residents but
    one that both were measured on: ``allowed``, ``over_mean`` and ``over_worst`` as in ``curves``.
    """
    keys = [key for key, rows in found.rows.items()
            if rows[0]["adapters"] == adapters and WAYS.get(key[2]) == way and key[1] > 1
            and key[3] == operator and _plan(key) in found.rows]  # fmt: skip
    if not keys:
        return None
    allowed = sorted({key[1] for key in keys})
    return {"allowed": allowed, **_over(found, [_plan(key) for key in keys], keys)}


def spread(found: Measured, adapters: int, operator: str) -> Record | None:
    """How much it matters who is put together: one operator on at least three partitions.

    Of every zoo of a size and number of residents: the highest less the lowest partition's mean
    (``range_mean``) and worst (``range_worst``), averaged; and in how many of ``cases``
    MergeProbe's groups have the highest (``first_mean``, ``first_worst``). None: no such.
    """
    cases: dict[tuple[str, int], dict[str, Key]] = {}
    for key, rows in found.rows.items():
        if rows[0]["adapters"] == adapters and key[1] > 1 and key[3] == operator:
            cases.setdefault(key[:2], {})[key[2]] = key
    cases = {case: of for case, of in cases.items() if len(of) > 2 and OURS in of}
    if not cases:
        return None
    record: Record = {"cases": len(cases)}
    for what in ("mean", "worst"):
        values = [{p: _only(found, what, key) for p, key in of.items()} for of in cases.values()]
        low, high = ([side(v.values()) for v in values] for side in (min, max))
        record[f"range_{what}"] = float(np.mean(np.subtract(high, low)))
        record[f"first_{what}"] = sum(v[OURS] == most for v, most in zip(values, high, strict=True))
    return record


def choices(found: Measured) -> list[Record]:
    """One resident adapter: a record an operator that was measured wherever a plan could choose.

    That is on ``zoos``: those with a plan for one, and with all of ``CHOICES``. mean, worst with
    intervals; over_mean, over_worst: MergeProbe's less; regret_mean, regret_worst: the average of
    what the operator that is best on each zoo keeps more. MergeProbe's record has ``chosen``, the
    operator of each zoo.
    """
    at: dict[str, dict[str, Key]] = {}
    for key in found.rows:
        if key[1] == 1:
            at.setdefault(key[3], {})[key[0]] = key
    if PLAN not in at:
        return []
    zoos = [z for z in at[PLAN] if all(z in at.get(name, ()) for name in CHOICES)]
    if not zoos:
        return []
    there = {name: of for name, of in at.items() if all(z in of for z in zoos)}
    best = {
        what: [max(_only(found, what, of[z]) for name, of in there.items() if name != PLAN)
               for z in zoos] for what in ("mean", "worst")
    }  # fmt: skip
    records = []
    for name, of in there.items():
        keys = [of[z] for z in zoos]
        record: Record = {"operator": name, "zoos": zoos, **_numbers(found, keys),
                          **_over(found, [there[PLAN][z] for z in zoos], keys)}  # fmt: skip
        for what, most in best.items():
            own = [_only(found, what, key) for key in keys]
            # As the two themselves are averaged: means over adapters, worst ones over zoos.
            sizes = [len(found.values[key]) for key in keys] if what == "mean" else None
            record[f"regret_{what}"] = float(np.average(np.subtract(most, own), weights=sizes))
        if name == PLAN:
            record["chosen"] = {z: found.rows[of[z]][0]["merged_with"] for z in zoos}
        records.append(record)
    return sorted(records, key=lambda r: -r["mean"])


def _only(found: Measured, what: str, key: Key) -> float:
    return getattr(found, what)([key])[0]


def foretold(found: Measured) -> Mapping[str, Any]:
    """What plans predicted of merged adapters, beside what was measured of them."""
    rows = [(r, v) for key, mine in found.rows.items() if key[3] == PLAN
            for r, v in zip(mine, found.values[key], strict=True)
            if r["merged_with"] and r["predicted"] is not None and not np.isnan(v)]  # fmt: skip
    sure = [(r, v) for r, v in rows if None not in (r["low"], r["high"])]
    if not rows:
        return {"rows": 0}
    from scipy.stats import spearmanr

    told, measured = np.array([r["predicted"] for r, _ in rows]), np.array([v for _, v in rows])
    return {
        "rows": len(rows), "predicted": float(told.mean()), "measured": float(measured.mean()),
        "error": float(np.abs(told - measured).mean()),
        "rho": float(spearmanr(told, measured).statistic) if len(rows) > 2 else None,
        "intervals": len(sure), "inside": sum(r["low"] <= v <= r["high"] for r, v in sure),
    }  # fmt: skip
