"""The sections of the report's page that compare operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..outcome.noise import FEWEST_SETS
from .charts import (
    Column,
    bar,
    between,
    capacity_panels,
    legend,
    number,
    say,
    section,
    table,
    text,
)
from .tables import told_apart

NOT_CORRECTED = (
    "Intervals are not corrected for the number of operators compared; there are none of fewer "
    f"than {FEWEST_SETS} sets."
)


def operators(found: Mapping[str, Any], titles: Mapping[tuple[str, int], str]) -> str:
    """Operators by study and size."""
    parts = [say(
        "What merged members keep of what they learned, on their own test items. The bar shows "
        "the mean ll_norm with its interval, and hollow the worst member of a merge; the dashed "
        f"line is a single adapter. {NOT_CORRECTED}"
    )]  # fmt: skip
    for block in found["studies"]:
        if block["study"] == "capacity":
            continue
        title = titles[block["study"], block["size"]]
        parts += [f"<h3>{text(title[:1].upper() + title[1:])}</h3>", *_block(block)]
    if not found["studies"]:
        parts.append(say("Nothing is measured yet."))
    return section("Operators", *parts)


def _block(block: Mapping[str, Any]) -> Iterator[str]:
    reference, common = block["reference"], block["common"]
    told = f"Sets: {block['sets']}, rows: {block['rows']}."
    highest = [
        say(f"Highest mean of {best['count']} {best['of'].removeprefix('all ')}: "
            f"{best['operator']}{told_apart(best)}.") for best in block["highest"]
    ]  # fmt: skip
    if block["comparable"] and not common:
        yield say(told)
        yield operator_records(block["operators"], reference)
        yield from highest
    else:
        if common:
            which = "all" if not block["dropped"] else "these"
            yield say(f"The {block['common_sets']} sets that {which} {len(common)} operators were "
                      "measured on.")  # fmt: skip
            yield operator_records(common, reference)
            yield from highest
        yield from _apart(block, told)


def _apart(block: Mapping[str, Any], told: str) -> Iterator[str]:
    """All operators, which were measured on different sets."""
    why = "operators were measured on different sets, so that their means do not compare"
    shown = operator_records(block["operators"], block["reference"], paired=True)
    if block["reference"]:
        how = (f"The bar is the mean difference in ll_norm to {block['reference']} on the rows "
               "that both have; last those without an interval.")  # fmt: skip
    else:
        how = "There is none that all could be compared with."
    if block["common"] and not block["dropped"]:
        yield (f"<details><summary>All {block['sets']} sets: {text(why)}</summary>{say(how)}{shown}"
               "</details>")  # fmt: skip
        return
    few = f" Too few of the same ones: {', '.join(block['dropped'])}." if block["dropped"] else ""
    yield say(f"{told}{few} {why[:1].upper() + why[1:]}. {how}")
    yield shown


def operator_records(
    records: Sequence[Mapping[str, Any]], reference: str | None, *, paired: bool = False
) -> str:
    """The table of one study.

    Args:
        records: of ``operator_table.operator_table``.
        reference: as there.
        paired: draw and show first the difference to the reference on the rows both have.
    """
    against: list[Column] = [(f"against {reference}", _against)]
    if paired and reference is not None:
        edges = [v for r in records for v in (r["versus"], *(r["versus_interval"] or ()))
                 if v is not None]  # fmt: skip
        low, high = min([*edges, -0.1]), max([*edges, 0.1])
        first: list[Column] = [
            ("", lambda r: bar(r["versus"], r["versus_interval"], None, low, high, at=0.0)),
            *against,
            ("95 %", lambda r: f'<span class="soft">{between(r["versus_interval"], 2)}</span>'),
            ("rows both have", lambda r: str(r["versus_rows"])),
        ]  # fmt: skip
        against = []
    else:
        edges = [v for r in records for v in (r["ll_norm"], r["ll_norm_worst"],
                 *(r["ll_norm_interval"] or ())) if v is not None]  # fmt: skip
        low, high = max(min([*edges, 0.6]), -1.0), max([*edges, 1.05])
        first = [
            ("", lambda r: bar(r["ll_norm"], r["ll_norm_interval"], r["ll_norm_worst"], low, high)),
        ]
        against = against if reference is not None and len(records) > 1 else []
    columns: list[Column] = [
        ("operator", lambda r: text(r["operator"])), *first,
        ("ll_norm", lambda r: number(r["ll_norm"])),
        ("95 %", lambda r: f'<span class="soft">{between(r["ll_norm_interval"], 2)}</span>'),
        ("worst of set", lambda r: of_sets(r, "ll_norm")),
        ("lowest", lambda r: number(r["ll_norm_min"], 2)),
        ("below .8", lambda r: number(r["ll_norm_below"], 2)), *against,
        ("accuracy kept", lambda r: number(r["retention"])),
        ("95 %", lambda r: f'<span class="soft">{between(r["retention_interval"], 2)}</span>'),
        ("worst of set", lambda r: of_sets(r, "retention")),
        ("resident", lambda r: str(r["resident"])),
        ("size", lambda r: number(r["parameters_ratio"], 1)),
        ("merge, s", lambda r: number(r["merge_seconds"], 2)),
        ("rows with ll_norm", rows_of), ("merges", lambda r: str(r["merges"])),
    ]  # fmt: skip
    if any(r["seconds_per_prompt"] is not None for r in records):
        columns = [c for c in columns if c[0] not in ("lowest", "below .8")]
        columns += [
            ("routed right", lambda r: number(r["routed_right"])),
            ("ms a prompt", lambda r: number(_thousandfold(r["seconds_per_prompt"]), 2)),
        ]  # fmt: skip
    return table(records, columns)


def of_sets(record: Mapping[str, Any], what: str) -> str:
    """The worst of a set, and of how many sets where they are not all."""
    shown, whole = number(record[f"{what}_worst"]), record[f"{what}_whole"]
    return shown if whole == record["merges"] else f"{shown} ({whole} of {record['merges']})"


def rows_of(record: Mapping[str, Any]) -> str:
    """How many rows, and of how many where some have no ll_norm."""
    rows, none = record["rows"], record["ll_norm_none"]
    return f"{rows - none} of {rows}" if none else str(rows)


def _against(record: Mapping[str, Any]) -> str:
    if record["versus"] is None:
        return number(None)
    told = text(f"{between(record['versus_interval'])}, {record['versus_rows']} rows")
    return f'<span title="{told}">{record["versus"]:+.3f}</span>'


def _thousandfold(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def capacity(found: Mapping[str, Any]) -> str:
    """How many adapters fit into one, or nothing where that was not asked."""
    records = found["capacity"]
    if not records:
        return ""
    parts = [say(
        "Adapters merged into one, on a logarithmic axis, and the mean of what each keeps with "
        "its interval; dotted: the worst of the set. The dashed line is a single adapter. "
        "Operators measured at one number of adapters alone are in the table. Every size has "
        "other tasks: the last curves are of the members of the smallest sets alone, the same "
        f"ones at every size. {NOT_CORRECTED}"
    )]  # fmt: skip
    apart = sorted({r["size"] for r in records if not r["comparable"]})
    if apart:
        parts.append(say(f"{' and '.join(map(str, apart))} adapters: operators were measured on "
                         "different sets, so that their means do not compare."))  # fmt: skip
    for title, what, worst in (
        ("ll_norm", "ll_norm", "ll_norm_worst"), ("Accuracy kept", "retention", "retention_worst"),
        ("ll_norm of the members of the smallest sets", "core", None),
    ):  # fmt: skip
        panels, names = capacity_panels(records, what, worst)
        parts += [f"<h3>{title}</h3>", legend(names), panels] if panels else []
    columns: list[Column] = [
        ("operator", lambda r: text(r["operator"])), ("adapters", lambda r: str(r["size"])),
        ("sets", lambda r: str(r["merges"])), ("ll_norm", lambda r: number(r["ll_norm"])),
        ("95 %", lambda r: between(r["ll_norm_interval"], 2)),
        ("worst of set", lambda r: of_sets(r, "ll_norm")),
        ("of the smallest sets' members", lambda r: number(r["core"])),
        ("accuracy kept", lambda r: number(r["retention"])),
        ("worst of set", lambda r: of_sets(r, "retention")),
        ("rank", lambda r: number(r["merged_rank"], 0)),
        ("size", lambda r: number(r["parameters_ratio"], 1)),
        ("merge, s", lambda r: number(r["merge_seconds"], 2)), ("rows with ll_norm", rows_of),
    ]  # fmt: skip
    told = table(records, columns)
    parts.append(f"<details><summary>The numbers</summary>{told}</details>")
    return section("Capacity", *parts)
