"""What the labels say: operators compared, who hurts whom, and capacity.

Rows are those of labels.parquet as dictionaries; what comes back is plain dictionaries and lists.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..outcome.noise import Crossed
from ..tasks.build import DOMAINS

Row = Mapping[str, Any]
CLIP = (-1.0, 1.2)  # of ll_norm in means: one small gain in a denominator is not to decide them
CLIP_KEPT = (-1.0, 2.0)  # of retention in means, for the same reason
KEEPS = 0.8  # of ll_norm; a row below has lost something


def clipped(row: Row) -> float:
    """The row's ll_norm within ``CLIP``; NaN where it has none."""
    return float("nan") if row["ll_norm"] is None else float(np.clip(row["ll_norm"], *CLIP))


def operator_table(
    rows: Sequence[Row], reference: str | None = None, *, paired: bool = False
) -> list[dict[str, Any]]:
    """One record an operator, the highest mean ll_norm first.

    ll_norm is clipped to ``CLIP`` in means, retention to ``CLIP_KEPT``. Intervals hold 95 % and are
    over adapters (``outcome.noise.Crossed``), None of fewer than ``noise.FEWEST_SETS`` sets.

    Args:
        rows: labels of one study.
        reference: the operator that others are compared with on the rows both have.
        paired: the highest such difference first, that of the reference being 0; last those
            without an interval.

    Returns:
        operator, method, rank, calibration; rows, merges; ll_norm, ll_norm_interval;
        ll_norm_worst: the mean over merges of their worst member, of the ll_norm_whole merges
        whose members all have one; ll_norm_min: of all rows, not clipped;
        ll_norm_below: share of rows below ``KEEPS``; ll_norm_none: rows that have none;
        retention, retention_interval, retention_worst, retention_whole, prob_ret; resident:
        adapters in memory; parameters_ratio: of what is held, over those of one member;
        merged_rank: the highest; merge_seconds: median; seconds_per_prompt, routed_right of
        routers; versus: mean difference in ll_norm to ``reference`` on the rows both have,
        versus_interval, versus_rows.
    """
    by_operator = grouped(rows, lambda r: r["operator"])
    standard = {_same(r): clipped(r) for r in by_operator.get(reference or "", ())}
    found = [_record(name, mine, reference, standard) for name, mine in by_operator.items()]

    def order(record: Mapping[str, Any]) -> tuple[bool, float, str]:
        value, vague = record["ll_norm"], False
        if paired and record["operator"] == reference:
            value = 0.0
        elif paired:
            value, vague = record["versus"], record["versus_interval"] is None
        return (vague, 9.0 if value is None else -value, record["operator"])

    return sorted(found, key=order)


def _record(
    name: str, rows: Sequence[Row], reference: str | None, standard: Mapping[Hashable, float]
) -> dict[str, Any]:
    ll_norm = np.array([clipped(r) for r in rows])
    retention = np.clip([_number(r["retention"]) for r in rows], *CLIP_KEPT)
    others = [tuple(m for m in r["members"] if m != r["member"]) for r in rows]
    draw = Crossed([r["member"] for r in rows], others, name)
    raw = [r["ll_norm"] for r in rows if r["ll_norm"] is not None]
    both = np.array([name != reference and _same(r) in standard for r in rows], bool)
    against = np.array([standard.get(_same(r), np.nan) for r in rows])
    difference = np.where(both, ll_norm - against, np.nan)
    first = rows[0]
    ll_norm_worst, ll_norm_whole = _worst(rows, ll_norm)
    retention_worst, retention_whole = _worst(rows, retention)
    return {
        "operator": name, "method": first["method"], "rank": first["rank"],
        "calibration": first["calibration"], "rows": len(rows),
        "merges": len({_merge(r) for r in rows}),
        "ll_norm": _mean(ll_norm), "ll_norm_interval": draw.interval(ll_norm),
        "ll_norm_worst": ll_norm_worst, "ll_norm_whole": ll_norm_whole,
        "ll_norm_min": min(raw, default=None),
        "ll_norm_below": float(np.mean(np.array(raw) < KEEPS)) if raw else None,
        "ll_norm_none": len(rows) - len(raw),
        "retention": _mean(retention), "retention_interval": draw.interval(retention),
        "retention_worst": retention_worst, "retention_whole": retention_whole,
        "prob_ret": _mean_of(rows, "prob_ret"),
        "resident": max(r["resident"] for r in rows),
        "parameters_ratio": _mean_of(rows, "parameters_ratio"),
        "merged_rank": max((r["merged_rank"] for r in rows if r["merged_rank"]), default=None),
        "merge_seconds": _median_of(rows, "merge_seconds"),
        "seconds_per_prompt": _median_of(rows, "seconds_per_prompt"),
        "routed_right": _mean_of(rows, "routed_right"),
        "versus": _mean(difference), "versus_interval": draw.interval(difference),
        "versus_rows": int((~np.isnan(difference)).sum()),
    }  # fmt: skip


def who_hurts_whom(rows: Iterable[Row]) -> dict[str, Any]:
    """Mean clipped ll_norm of pairs by domain: ``mean[victim][partner]``, None without rows.

    Returns:
        domains, mean and rows (how many), both (domains, domains).
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["ll_norm"] is not None:
            cells[row["domain"], row["partner_domain"]].append(clipped(row))
    domains = sorted({d for pair in cells for d in pair}, key=_domain_order)
    return {
        "domains": domains,
        "mean": [[_mean(np.array(cells.get((v, p), ()))) for p in domains] for v in domains],
        "rows": [[len(cells.get((v, p), ())) for p in domains] for v in domains],
    }


def capacity_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """``operator_table`` by number of members, in order of "family", "cut" and "size".

    The family of "sum-r16" is "sum" and its cut 16; "sum" itself has None, its own rank.
    "comparable": whether all operators of that size were measured on the same sets. "core": the
    mean ll_norm of the members of the smallest sets alone, each counting once, which are the same
    ones at every size; None where one of them is missing.
    """
    found = []
    sizes = sorted(grouped(rows, lambda r: r["size"]).items())
    core = {r["member"] for _, mine in sizes[:1] for r in mine if r["ll_norm"] is not None}
    for size, mine in sizes:
        comparable = not differ(mine)
        by_operator = grouped(mine, lambda r: r["operator"])
        for record in operator_table(mine, reference_of(mine)):
            family = re.sub(rf"-r{record['rank']}$", "", record["operator"])
            cut = record["rank"] if family != record["operator"] else None
            found.append({"size": size, "family": family, "cut": cut, "comparable": comparable,
                          "core": _core(by_operator[record["operator"]], core),
                          **record})  # fmt: skip
    return sorted(found, key=lambda r: (r["family"], -(r["cut"] or 10**6), r["size"]))


def _core(rows: Sequence[Row], core: Collection[str]) -> float | None:
    """The mean over core members of their mean ll_norm."""
    mine = grouped([r for r in rows if r["member"] in core and r["ll_norm"] is not None],
                   lambda r: r["member"])  # fmt: skip
    if not core or len(mine) < len(core):
        return None
    return float(np.mean([np.mean([clipped(r) for r in of]) for of in mine.values()]))


def sets_of(rows: Iterable[Row]) -> dict[str, set[frozenset[str]]]:
    """The merged sets of each operator."""
    found: dict[str, set[frozenset[str]]] = defaultdict(set)
    for row in rows:
        found[row["operator"]].add(frozenset(row["members"]))
    return found


def differ(rows: Iterable[Row]) -> bool:
    """Whether operators were measured on different sets: their means then do not compare."""
    sets = [*sets_of(rows).values()]
    return any(mine != sets[0] for mine in sets)


def grouped(things: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    """Things by their key, in the order in which keys come first."""
    found: dict[Any, list[Any]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def _same(row: Row) -> Hashable:
    return frozenset(row["members"]), row["member"]


def _merge(row: Row) -> str:
    return row["row"].rpartition("|")[0]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def _values(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([r[name] for r in rows if r[name] is not None], np.float64)


def _mean_of(rows: Sequence[Row], name: str) -> float | None:
    return _mean(_values(rows, name))


def _median_of(rows: Sequence[Row], name: str) -> float | None:
    values = _values(rows, name)
    return float(np.median(values)) if len(values) else None


def _worst(rows: Sequence[Row], values: np.ndarray) -> tuple[float | None, int]:
    """The mean over merges of their lowest value, and of how many: where all members have one."""
    sets = grouped(range(len(rows)), lambda n: _merge(rows[n]))
    lowest = [values[of].min() for of in sets.values()
              if len(of) == rows[of[0]]["size"] and not np.isnan(values[of]).any()]  # fmt: skip
    return (float(np.mean(lowest)) if lowest else None), len(lowest)


def reference_of(rows: Sequence[Row]) -> str | None:
    """What others are compared to: the mean of the deltas, or their sum if it shares more sets."""
    sets = sets_of(rows)
    shares = {name: sum(len(sets[name] & mine) for other, mine in sets.items() if other != name)
              for name in ("mean", "sum") if name in sets}  # fmt: skip
    return max(shares, key=shares.__getitem__, default=None)


def _domain_order(name: str) -> tuple[int, str]:
    return (DOMAINS.index(name) if name in DOMAINS else len(DOMAINS), name)
