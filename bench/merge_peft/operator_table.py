"""What the labels say: operators compared, who hurts whom, capacity, and the noise floor.

Rows are those of labels.parquet as dictionaries; what comes back is plain dictionaries and lists.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .labels import ROUTING
from .noise import Crossed
from .tasks.build import DOMAINS

Row = Mapping[str, Any]
CLIP = (-1.0, 1.2)  # of ll_norm in means: one small gain in a denominator is not to decide them
KEEPS = 0.8  # of ll_norm; a row below has lost something
WORST_ROWS = 10
MEASURES = ("ll_norm", "option_norm", "prob_ret", "retention", "accuracy_norm")
_FEWEST_COMMON = 5  # sets that all operators were measured on, for a table of these alone


def clipped(row: Row) -> float:
    """The row's ll_norm within ``CLIP``; NaN where it has none."""
    return float("nan") if row["ll_norm"] is None else float(np.clip(row["ll_norm"], *CLIP))


def tables(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything below, of all rows.

    Returns:
        studies: for each study and size ``{"study", "size", "sets", "rows", "reference",
        "operators": operator_table, "common_sets", "common": operator_table of the sets that all
        operators have, or None}``. The study "routing" has the merges of the same sets too.
        hurts: ``who_hurts_whom`` of each operator with pairs, most rows first.
        worst: the rows of pairs and sets with the lowest ll_norm, each with its domains.
        capacity: ``capacity_table``. noise: ``noise_floor``.
    """
    studies = []
    for study, size in sorted({(r["study"], r["size"]) for r in rows}, key=_study_order):
        mine = [r for r in rows if (r["study"], r["size"]) == (study, size)]
        if study == ROUTING:
            routed = {frozenset(r["members"]) for r in mine}
            mine += [r for r in rows if r["study"] != ROUTING and frozenset(r["members"]) in routed]
        reference, common = _reference(mine), _common(mine)
        sets = {frozenset(r["members"]) for r in common}
        apart = len(common) < len(mine) and len(sets) >= _FEWEST_COMMON
        studies.append({
            "study": study, "size": size, "rows": len(mine), "reference": reference,
            "sets": len({frozenset(r["members"]) for r in mine}),
            "operators": operator_table(mine, reference),
            "common_sets": len(sets) if apart else None,
            "common": operator_table(common, reference) if apart else None,
        })  # fmt: skip
    pairs = [r for r in rows if r["study"] in ("pairs", "same") and r["size"] == 2]
    by_operator = _grouped(pairs, lambda r: r["operator"])
    order = sorted(by_operator, key=lambda name: (-len(by_operator[name]), name))
    shown = [r for r in rows if r["study"] in ("pairs", "same", "sets")]
    shown = [r for r in shown if r["ll_norm"] is not None]
    worst = sorted(shown, key=lambda r: (r["ll_norm"], r["row"]))[:WORST_ROWS]
    columns = ("row", "operator", "member", "domain", "partner", "partner_domain", "members",
               "ll_norm", "ll_norm_se", "retention", "retention_se", "command")  # fmt: skip
    return {
        "studies": studies,
        "hurts": [{"operator": name, **who_hurts_whom(by_operator[name])} for name in order],
        "worst": [{column: row[column] for column in columns} for row in worst],
        "capacity": capacity_table([r for r in rows if r["study"] == "capacity"]),
        "noise": noise_floor(rows),
    }


def operator_table(rows: Sequence[Row], reference: str | None = None) -> list[dict[str, Any]]:
    """One record an operator, the highest mean ll_norm first.

    ll_norm is clipped to ``CLIP`` in means. Intervals hold 95 % and are over adapters
    (``noise.Crossed``), None of fewer than three rows.

    Returns:
        operator, method, rank, calibration; rows, merges; ll_norm, ll_norm_interval;
        ll_norm_worst: the mean over merges of their worst member; ll_norm_min: of all rows, not
        clipped; ll_norm_below: share of rows below ``KEEPS``; ll_norm_none: rows that have none;
        retention, retention_interval, retention_worst, prob_ret; resident: adapters in memory;
        parameters_ratio: of what is held, over those of one member; merged_rank: the highest;
        merge_seconds: median; seconds_per_prompt, routed_right of routers; versus: mean
        difference in ll_norm to ``reference`` on the rows both have, versus_interval,
        versus_rows.
    """
    by_operator = _grouped(rows, lambda r: r["operator"])
    standard = {_same(r): clipped(r) for r in by_operator.get(reference or "", ())}
    found = [_record(name, mine, reference, standard) for name, mine in by_operator.items()]
    return sorted(found, key=lambda r: (-r["ll_norm"] if r["ll_norm"] is not None else 9,
                                        r["operator"]))  # fmt: skip


def _record(
    name: str, rows: Sequence[Row], reference: str | None, standard: Mapping[Hashable, float]
) -> dict[str, Any]:
    ll_norm = np.array([clipped(r) for r in rows])
    retention = np.array([_number(r["retention"]) for r in rows])
    others = [tuple(m for m in r["members"] if m != r["member"]) for r in rows]
    draw = Crossed([r["member"] for r in rows], others, name)
    raw = [r["ll_norm"] for r in rows if r["ll_norm"] is not None]
    both = np.array([name != reference and _same(r) in standard for r in rows], bool)
    against = np.array([standard.get(_same(r), np.nan) for r in rows])
    difference = np.where(both, ll_norm - against, np.nan)
    first = rows[0]
    return {
        "operator": name, "method": first["method"], "rank": first["rank"],
        "calibration": first["calibration"], "rows": len(rows),
        "merges": len({_merge(r) for r in rows}),
        "ll_norm": _mean(ll_norm), "ll_norm_interval": draw.interval(ll_norm),
        "ll_norm_worst": _worst(rows, ll_norm), "ll_norm_min": min(raw, default=None),
        "ll_norm_below": float(np.mean(np.array(raw) < KEEPS)) if raw else None,
        "ll_norm_none": len(rows) - len(raw),
        "retention": _mean(retention), "retention_interval": draw.interval(retention),
        "retention_worst": _worst(rows, retention), "prob_ret": _mean_of(rows, "prob_ret"),
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
    """
    found = []
    for size, mine in sorted(_grouped(rows, lambda r: r["size"]).items()):
        for record in operator_table(mine, _reference(mine)):
            family = re.sub(rf"-r{record['rank']}$", "", record["operator"])
            cut = record["rank"] if family != record["operator"] else None
            found.append({"size": size, "family": family, "cut": cut, **record})
    return sorted(found, key=lambda r: (r["family"], -(r["cut"] or 10**6), r["size"]))


def noise_floor(rows: Sequence[Row]) -> dict[str, Any]:
    """How much of what labels differ by is noise.

    Returns:
        measures: for each of ``MEASURES`` that rows have: rows, sd, se (median), and reliability:
        the share of the variance within (operator, study, domains of victim and partner) that is
        not squared standard error, None without cells of two rows.
        retrained: for ll_norm, prob_ret and retention the standard deviation between adapters
        trained alike but for their seeds, merged with the same others: "order" where they
        started from the same A0, "start" where not, each ``{"sd", "groups"}``.
    """
    measures = {}
    for name in MEASURES:
        have = [r for r in rows if r[name] is not None]
        if len(have) < 2:
            continue
        values = np.array([clipped(r) if name == "ll_norm" else r[name] for r in have])
        errors = np.array([r[f"{name}_se"] for r in have])
        cells = _grouped(range(len(have)), lambda n: _cell(have[n]))  # noqa: B023
        inside = [(len(of) - 1, float(values[of].var(ddof=1)), float((errors[of] ** 2).mean()))
                  for of in cells.values() if len(of) > 1]  # fmt: skip
        reliability = None
        if inside:
            freedom, variances, noise = np.array(inside).T
            spread = float(freedom @ variances)
            reliability = 1 - float(freedom @ noise) / spread if spread else None
        measures[name] = {"rows": len(have), "sd": float(values.std(ddof=1)),
                          "se": float(np.median(errors)), "reliability": reliability}  # fmt: skip
    retrained = {
        name: {"order": _between_seeds(rows, name, same_start=True),
               "start": _between_seeds(rows, name, same_start=False)}
        for name in ("ll_norm", "prob_ret", "retention")
    }  # fmt: skip
    return {"measures": measures, "retrained": retrained}


def _between_seeds(rows: Sequence[Row], name: str, *, same_start: bool) -> dict[str, Any]:
    """Pooled over groups of rows that differ in the victim's seeds alone."""

    def alike(row: Row) -> Hashable:
        others = tuple(sorted(m for m in row["members"] if m != row["member"]))
        start = row["train_init_seed"] if same_start else None
        recipe = (row[f"train_{n}"] for n in ("rank", "lr", "steps", "variant"))
        return (row["operator"], others, row["exam"], *recipe, tuple(row["train_layers"]), start)

    squares = freedom = groups = 0
    for mine in _grouped([r for r in rows if r[name] is not None], alike).values():
        if not same_start:  # one of each start, so that only different ones are compared
            mine = [*{r["train_init_seed"]: r for r in reversed(mine)}.values()]
        values = np.array([clipped(r) if name == "ll_norm" else r[name] for r in mine])
        if len(values) > 1:
            squares += float(((values - values.mean()) ** 2).sum())
            freedom += len(values) - 1
            groups += 1
    return {"sd": (squares / freedom) ** 0.5 if freedom else None, "groups": groups}


def _grouped(things: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def _same(row: Row) -> Hashable:
    return frozenset(row["members"]), row["member"]


def _merge(row: Row) -> str:
    return row["row"].rpartition("|")[0]


def _cell(row: Row) -> Hashable:
    return row["operator"], row["study"], row["size"], row["domain"], row["partner_domain"]


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


def _worst(rows: Sequence[Row], values: np.ndarray) -> float | None:
    """The mean over merges of their lowest value, where all members have one."""
    sets = _grouped(range(len(rows)), lambda n: _merge(rows[n]))
    lowest = [values[of].min() for of in sets.values()
              if len(of) == rows[of[0]]["size"] and not np.isnan(values[of]).any()]  # fmt: skip
    return float(np.mean(lowest)) if lowest else None


def _reference(rows: Sequence[Row]) -> str | None:
    """What others are compared to: the mean of the deltas, or else their sum."""
    names = {r["operator"] for r in rows}
    return next((name for name in ("mean", "sum") if name in names), None)


def _common(rows: Sequence[Row]) -> list[Row]:
    """The rows of sets that every operator was measured on."""
    sets = [{frozenset(r["members"]) for r in mine}
            for mine in _grouped(rows, lambda r: r["operator"]).values()]  # fmt: skip
    common = set.intersection(*sets)
    return [r for r in rows if frozenset(r["members"]) in common]


def _study_order(which: tuple[str, int]) -> tuple[int, str, int]:
    order = ("pairs", "same", "sets", "capacity", ROUTING, "broken")
    return (order.index(which[0]) if which[0] in order else len(order), *which)


def _domain_order(name: str) -> tuple[int, str]:
    return (DOMAINS.index(name) if name in DOMAINS else len(DOMAINS), name)
