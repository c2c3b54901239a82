"""All tables of a report, of rows of labels.parquet: which operators were measured on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..outcome.labels import ROUTING
from ..outcome.noise import FEWEST_SETS
from .label_noise import noise_floor
from .operator_table import (
    Row,
    capacity_table,
    differ,
    grouped,
    operator_table,
    reference_of,
    sets_of,
    who_hurts_whom,
)

WORST_ROWS = 10


def tables(rows: Sequence[Row]) -> dict[str, Any]:
    """What labels say.

    Returns:
        studies: one of each study and size, ``study_block``. "routing" has the merges of the same
        sets too.
        hurts: ``who_hurts_whom`` of each operator with pairs, most rows first.
        worst: the rows of pairs and sets with the lowest ll_norm, each with its domains.
        capacity: ``capacity_table``. noise: ``noise_floor``.
    """
    studies = []
    for study, size in sorted({(r["study"], r["size"]) for r in rows}, key=study_order):
        mine = [r for r in rows if (r["study"], r["size"]) == (study, size)]
        if study == ROUTING:
            routed = {frozenset(r["members"]) for r in mine}
            mine += [r for r in rows if r["study"] != ROUTING and frozenset(r["members"]) in routed]
        studies.append({"study": study, "size": size, **study_block(mine)})
    pairs = [r for r in rows if r["study"] in ("pairs", "same") and r["size"] == 2]
    by_operator = grouped(pairs, lambda r: r["operator"])
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


def study_block(rows: Sequence[Row]) -> dict[str, Any]:
    """Operators of one study at one size, which need not have merged the same sets.

    Returns:
        rows, sets: how many; reference: what operators are compared with on the rows both have.
        operators: ``operator_table`` of all; where sets differ in order of that comparison.
        comparable: whether means of "common" or else of "operators" are of the same sets.
        common, common_sets: where sets differ, ``operator_table`` of sets that several operators
        share (``shared``), and how many; None where there are too few. dropped: operators that are
        not in it.
        highest: where comparable, the operator with the highest mean ll_norm of each kind (see
        ``_highest``).
    """
    reference, apart = reference_of(rows), differ(rows)
    operators = operator_table(rows, reference, paired=apart)
    same = shared(rows) if apart else rows
    records = operator_table(same, reference) if apart and same else None
    kept = {r["operator"] for r in records or operators}
    told = records or operators
    return {
        "rows": len(rows), "sets": len({frozenset(r["members"]) for r in rows}),
        "reference": reference, "operators": operators, "comparable": bool(same),
        "common": records,
        "common_sets": len({frozenset(r["members"]) for r in same}) if records else None,
        "dropped": [r["operator"] for r in operators if records and r["operator"] not in kept],
        "highest": _highest(same, told) if same else [],
    }  # fmt: skip


def shared(rows: Sequence[Row]) -> list[Row]:
    """The rows of ``FEWEST_SETS`` sets or more that two operators or more were all measured on.

    Operators of the fewest sets are left out, one after the other, until enough are left; none
    come back if there are never enough.
    """
    sets = sets_of(rows)
    left = sorted(sets, key=lambda name: (-len(sets[name]), name))
    while len(left) > 1:
        common = set.intersection(*(sets[name] for name in left))
        if len(common) >= FEWEST_SETS:
            return [r for r in rows
                    if r["operator"] in left and frozenset(r["members"]) in common]  # fmt: skip
        left.pop()
    return []


def _highest(rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of all operators, of those that need no data if others do, and by rank for capacity.

    Each: of (what kind, in words), operator, count (how many there are of the kind), close: the
    others whose difference to it, on the rows both have, has an interval with 0 in it, and unknown:
    those whose difference has none.
    """
    study = rows[0]["study"]
    have = [r for r in records if r["ll_norm"] is not None and r["routed_right"] is None]
    kinds = {"all operators": have, "operators without data": [
        r for r in have if not r["calibration"]]}  # fmt: skip
    if study == "capacity":
        ranks = sorted({r["rank"] for r in have}, key=lambda k: k or 10**6, reverse=True)
        kinds = {"its own rank" if k is None else f"rank {k}": [r for r in have if r["rank"] == k]
                 for k in ranks}  # fmt: skip
    found = []
    for words, of in kinds.items():
        if not of or (words == "operators without data" and len(of) == len(have)):
            continue
        best = max(of, key=lambda r: r["ll_norm"])["operator"]
        names = {r["operator"] for r in of}
        against = operator_table([r for r in rows if r["operator"] in names], best)
        others = [r for r in against if r["operator"] != best]
        close = [r["operator"] for r in others
                 if r["versus_interval"] and r["versus_interval"][1] >= 0]  # fmt: skip
        unknown = [r["operator"] for r in others if not r["versus_interval"]]
        found.append({"of": words, "operator": best, "count": len(of), "close": close,
                      "unknown": unknown})  # fmt: skip
    return found


def told_apart(best: Mapping[str, Any]) -> str:
    """What follows the highest of a kind: which others may be as high."""
    told = f"; not distinguishable: {', '.join(best['close'])}" if best["close"] else ""
    if best["unknown"]:
        whole = len(best["unknown"]) == best["count"] - 1
        few = "too few sets for an interval"
        told += f"; {few}" + ("" if whole else f": {', '.join(best['unknown'])}")
    return told


def study_order(which: tuple[str, int]) -> tuple[int, str, int]:
    """What studies and sizes are sorted by."""
    order = ("pairs", "same", "sets", "capacity", ROUTING, "broken")
    return (order.index(which[0]) if which[0] in order else len(order), *which)
