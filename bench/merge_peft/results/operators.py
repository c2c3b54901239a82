"""The part of the results page that says what each operator keeps, of whom, and how many fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..report.charts import number
from ..report.operator_table import KEEPS
from ..report.page_operators import NOT_CORRECTED, of_sets, rows_of
from ..report.report import study_title
from ..report.tables import told_apart
from .pictures import Mark, dots, lines

_WORST, _FAILED = 10, 20


def pictures(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and SVG of each; of a summary.json."""
    for block in found["studies"]:
        if block["study"] != "pairs":
            continue
        if block["comparable"] and not block["dropped"]:
            rows = block["common"] or block["operators"]
            drawn = {r["operator"]: [Mark(r["ll_norm"], r["ll_norm_interval"], r["ll_norm_worst"])]
                     for r in rows if r["ll_norm"] is not None}  # fmt: skip
            title, at = "ll_norm of pairs, 95 % over adapters; hollow: the worse of each pair", 1.0
        else:  # of different sets: only differences on the same rows say anything
            drawn = {r["operator"]: [Mark(r["versus"], r["versus_interval"])]
                     for r in block["operators"] if r["versus_interval"]}  # fmt: skip
            title, at = f"ll_norm over {block['reference']}, on the rows both have", 0.0
        if drawn:
            yield "operators", dots(title, ["ll_norm"], drawn, at=at)
    panels: dict[str, dict[str, list[tuple[int, float, float | None]]]] = {}
    for r in found["capacity"]:
        if r["ll_norm"] is not None:
            way = "own rank" if r["rank"] is None else f"rank {r['rank']}"
            point = (r["size"], r["ll_norm"], r["ll_norm_worst"])
            panels.setdefault(r["family"], {}).setdefault(way, []).append(point)
    panels = {name: ways for name, ways in panels.items()
              if max(len(way) for way in ways.values()) > 1}  # fmt: skip
    if panels:
        title = "ll_norm by adapters in one, other tasks at every size; dotted: the worst member"
        yield "capacity", lines(title, panels)


def section(
    found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> str:
    """Markdown of a summary.json and of its labels; ``names`` are the files of pictures."""
    parts = [NOT_CORRECTED]
    for block in found["studies"]:
        if block["study"] == "capacity":
            continue
        title = study_title(block["study"], block["size"])
        parts.append(f"### {title[0].upper()}{title[1:]}")
        if block["study"] == "pairs" and "operators" in names:
            parts.append(f"![Operators]({names['operators']})")
        parts += _compared(block)
        if block["study"] == "broken":
            parts.append(_by_set([r for r in rows if r["study"] == "broken"]))
    if found["capacity"]:
        parts.append("### How many fit into one")
        if "capacity" in names:
            parts.append(f"![Capacity]({names['capacity']})")
        parts += ["ll_norm: mean / worst member (accuracy kept), by adapters merged; without a "
                  "rank an operator has its own. Every size has other tasks; [ ] is the mean of "
                  "the members of the smallest sets alone, the same ones at every size.",
                  _capacity(found["capacity"])]  # fmt: skip
        apart = sorted({r["size"] for r in found["capacity"] if not r["comparable"]})
        if apart:
            parts.append(f"{' and '.join(map(str, apart))} adapters: operators were measured on "
                         "different sets, means do not compare.")  # fmt: skip
    if found["hurts"]:
        parts += ["### Who hurts whom", *_hurts(found)]
    parts += ["### What adapters gain alone", _gains(found["gains"])]
    if found["failed"]:
        parts += ["### Merges that failed", *_failed(found["failed"])]
    return "\n\n".join(parts)


def _compared(block: Mapping[str, Any]) -> Iterator[str]:
    """The operators of one study, where they differ in their sets on those of the same ones."""
    reference, common = block["reference"], block["common"]
    highest = [
        f"Highest mean of {best['count']} {best['of'].removeprefix('all ')}: {best['operator']}"
        f"{told_apart(best)}." for best in block["highest"]
    ]  # fmt: skip
    if common:
        which = "these" if block["dropped"] else "all"
        yield (f"The {block['common_sets']} sets that {which} {len(common)} operators were "
               "measured on:")  # fmt: skip
        yield _table(common, reference)
        yield from highest
    if common or not block["comparable"]:
        few = [f"`{name}`" for name in block["dropped"]]
        left = f" Measured on too few of the same ones: {', '.join(few)}." if few else ""
        order = (f" In order of the difference to `{reference}` on the rows both have, last those "
                 "without an interval.")  # fmt: skip
        yield (f"Sets: {block['sets']}.{left} Operators were measured on different sets, so "
               f"that their means do not compare.{order if reference else ''}")  # fmt: skip
    yield _table(block["operators"], reference)
    if not common:
        yield from highest


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first are aligned right."""
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    told = ([str(c).replace("|", "\\|") for c in line] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in told)


def ranged(value: float | None, interval: Sequence[float | None] | None, digits: int = 2) -> str:
    """0.93 [0.88, 0.96]"""
    if value is None or interval is None or None in interval:
        return number(value, digits)
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def what_was_run(found: Mapping[str, Any], machine: str) -> str:
    """Markdown: the base, the machine, how many of everything."""
    run = found["run"]
    items = sorted({e["items"] for e in run["exams"].values()})
    by_domain: dict[str, int] = {}
    for gain in found["gains"]:
        by_domain[gain["domain"]] = by_domain.get(gain["domain"], 0) + 1
    facts = [
        f"{run['base']}, seed {run['seed']}; {machine or run['device']}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items())),
        f"{run['adapters']} of {run['adapters_planned']} adapters ("
        + ", ".join(f"{n} {d}" for d, n in by_domain.items())
        + f"), trained in {run['training_seconds'] / 60:.0f} minutes of one process each",
        f"{len(run['exams'])} exams of {items[0]} to {items[-1]} test items"
        if len(items) > 1 else f"{len(run['exams'])} exams of {items[0]} test items",
        f"{run['merges']} of {run['merges_planned']} merges, {run['rows']} labels, "
        f"{len(found['failed'])} merges that an operator refused",
    ]  # fmt: skip
    if run["merges"] + len(found["failed"]) < run["merges_planned"]:
        facts.append("not complete, merges that are in: " + "; ".join(
            f"{study_title(s['study'], s['size'])} {s['merges']} of {s['planned']}"
            for s in run["studies"]
        ))  # fmt: skip
    return "\n".join(f"- {fact}" for fact in facts)


def _table(records: Sequence[Mapping[str, Any]], reference: str | None) -> str:
    routed = any(r["routed_right"] is not None for r in records)
    header = ["operator", "ll_norm", "worst of set", "lowest", f"below {KEEPS:g}", "accuracy kept"]
    header += [] if reference is None else [f"against {reference}", "of rows"]
    header += ["rows with ll_norm", "rank", "resident", "size", "merge s"]
    header += ["routed right", "ms a prompt"] if routed else []
    rows = []
    for r in records:
        below = r["ll_norm_below"]
        row = [
            r["operator"], ranged(r["ll_norm"], r["ll_norm_interval"], 3),
            of_sets(r, "ll_norm"), number(r["ll_norm_min"], 2),
            number(None if below is None else 100 * below, 0) + (" %" if below is not None else ""),
            ranged(r["retention"], r["retention_interval"]),
        ]  # fmt: skip
        if reference is not None:
            row += [ranged(r["versus"], r["versus_interval"], 3), r["versus_rows"] or ""]
        row += [
            rows_of(r), r["merged_rank"] or "", r["resident"], number(r["parameters_ratio"], 1),
            number(r["merge_seconds"], 2),
        ]  # fmt: skip
        if routed:
            seconds = r["seconds_per_prompt"]
            row += [number(r["routed_right"]),
                    number(None if seconds is None else 1000 * seconds, 2)]  # fmt: skip
        rows.append(row)
    return markdown(header, rows)


def _capacity(records: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({r["size"] for r in records})
    cells = {(r["operator"], r["size"]): f"{number(r['ll_norm'], 2)} / "
             f"{number(r['ll_norm_worst'], 2)} ({number(r['retention'], 2)}) "
             f"[{number(r['core'], 2)}]" for r in records}  # fmt: skip
    rows = [[name, *(cells.get((name, size), "") for size in sizes)]
            for name in dict.fromkeys(r["operator"] for r in records)]  # fmt: skip
    return markdown(["operator", *map(str, sizes)], rows)


def _by_set(rows: Sequence[Mapping[str, Any]]) -> str:
    """ll_norm of each member of each set, operators in columns."""
    operators = list(dict.fromkeys(r["operator"] for r in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows:
        place = " + ".join(r["members"]), r["member"]
        lines.setdefault(place, {})[r["operator"]] = number(r["ll_norm"], 2)
    return markdown(["merged", "what is left of", *operators],
                    [[*place, *(line.get(o, "") for o in operators)]
                     for place, line in sorted(lines.items())])  # fmt: skip


def _hurts(found: Mapping[str, Any]) -> Iterator[str]:
    for hurt in found["hurts"][:2]:
        domains = hurt["domains"]
        rows = [[f"**{v}**", *(number(mean, 2) for mean in means)]
                for v, means in zip(domains, hurt["mean"], strict=True)]  # fmt: skip
        yield (f"Mean ll_norm under `{hurt['operator']}`, of {sum(map(sum, hurt['rows']))} rows: "
               "the victim's row, the partner's column.")  # fmt: skip
        yield markdown(["", *domains], rows)
    yield "The lowest rows that have an ll_norm:"
    rows = [[f"`{r['row']}`", number(r["ll_norm"], 2), number(r["ll_norm_se"], 2),
             number(r["retention"], 2)] for r in found["worst"][:_WORST]]  # fmt: skip
    yield markdown(["row", "ll_norm", "s.e.", "accuracy kept"], rows)


def _gains(gains: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for exam in dict.fromkeys(g["exam"] for g in gains):
        mine = [g for g in gains if g["exam"] == exam]
        unsure = sum(g["loglik_gain"] <= 2 * g["loglik_gain_se"] for g in mine)
        utility = [g["utility_single"] for g in mine]
        gain = [g["loglik_gain"] for g in mine]
        rows.append([
            exam, len(mine), number(mine[0]["utility_base"], 2),
            f"{min(utility):.2f} to {max(utility):.2f}", number(mine[0]["loglik_base"], 2),
            f"{min(gain):.2f} to {max(gain):.2f}", unsure or "",
        ])  # fmt: skip
    return markdown(["exam", "adapters", "utility of the base", "of adapters",
                     "log-likelihood of the base", "gain of adapters", "no sure gain"],
                    rows)  # fmt: skip


def _failed(failed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    reasons: dict[tuple[str, str], int] = {}
    for f in failed:
        key = f["operator"], f["reason"]
        reasons[key] = reasons.get(key, 0) + 1
    rows = [[operator, count, reason] for (operator, reason), count in reasons.items()]
    yield markdown(["operator", "merges", "reason"], rows[:_FAILED])
    if len(rows) > _FAILED:
        yield f"and {len(rows) - _FAILED} more reasons."
