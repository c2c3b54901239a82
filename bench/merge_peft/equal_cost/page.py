"""The page of equal cost: one table a number of adapters, what is needed, and the choice at one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.charts import number
from ..report.operator_table import CLIP, KEEPS
from ..results.operators import markdown, ranged
from ..results.pictures import lines
from .partitions import DOMAIN, DRAWS
from .rows import ROUTED, Row
from .strategies import OURS, OWN, PLAN, REGMEAN
from .summary import (
    ENOUGH,
    RANDOM,
    Measured,
    Record,
    choices,
    curves,
    foretold,
    needed,
    pooled,
    spread,
)

PICTURE = "equal-cost.svg"
# In sentences on what is needed; in the picture all but the operator on MergeProbe's own groups,
# MergeProbe last and thus above what it covers.
SHOWN = ((OURS, PLAN), (RANDOM, REGMEAN), (DOMAIN, REGMEAN), (OURS, REGMEAN), (RANDOM, "ties"),
         (RANDOM, "tsv_m"), (RANDOM, "mean"))  # fmt: skip
_NAMES = {RANDOM: "random groups", DOMAIN: "groups by domain", OURS: OURS}
_SHORT = {RANDOM: "random", DOMAIN: "domain"}

Failed = Mapping[tuple[str, int, str, str], str]


def label(way: str, operator: str, names: Mapping[str, str] = _NAMES) -> str:
    """How a strategy is called."""
    return PLAN if operator == PLAN else f"{operator}, {names[way]}"


def picture(records: Sequence[Record]) -> str:
    """SVG: a panel a number of adapters, what is kept by number of residents; "" of one number."""
    panels: dict[str, dict[str, list[tuple[int, float, float | None]]]] = {}
    for adapters in sorted({r["adapters"] for r in records}):
        for way, operator in (*(s for s in SHOWN if s[0] != OURS), (OURS, PLAN)):
            mine = [r for r in records if (r["adapters"], r["way"], r["operator"])
                    == (adapters, way, operator) and r["whole"]]  # fmt: skip
            if len(mine) > 1:
                panels.setdefault(f"{adapters} adapters", {})[label(way, operator, _SHORT)] = [
                    (r["allowed"], r["mean"], r["worst"]) for r in mine
                ]
    if not panels:
        return ""
    title = "ll_norm by resident adapters, 1: all of them resident; dotted: the worst member"
    return lines(title, panels)


def page(
    found: Measured, routed: Sequence[Row], failed: Failed, refused: Mapping[tuple[str, int], str],
    told: Mapping[str, Any],
) -> str:  # fmt: skip
    """Markdown; ``told`` has what was run: model, items, base."""
    records = curves(found)
    parts = [_introduction(told)]
    if picture(records):
        parts += [f"![What is kept]({PICTURE})", "## In short", _short(found, records)]
    chosen = choices(found)
    if chosen:
        parts += ["## One resident adapter", *_chosen(chosen)]
    for adapters in sorted({r["adapters"] for r in records}):
        mine = [r for r in records if r["adapters"] == adapters]
        if len({r["allowed"] for r in mine}) > 1:
            parts += [f"## {adapters} adapters", *_table(mine)]
    parts += ["## All resident, behind a router", *_routers(routed)]
    parts += ["## Foretold", _foretold(found)]
    if failed or refused:
        parts += ["## Not there", _not_there(failed, refused)]
    return "\n\n".join(parts) + "\n"


def _introduction(told: Mapping[str, Any]) -> str:
    return f"""\
# MERGE-PEFT at equal cost

N adapters of N tasks, of which only K may be resident: each resident one serves a group. What is
kept by MergeProbe's plan for K (its groups, actions and weights), and by fixed operators on groups
that need no plan: random ones of equal size ({len(DRAWS)} draws) and groups by domain. Made by
`python -m mergeprobe_fast.merge_peft.equal_cost`; the rows are in `equal-cost.parquet`.

- {told["base"]}; adapters, exams and {told["items"]} test items an exam of tier capacity; whatever
  that run had merged was not measured again
- predictor: {told["model"]}; plans without a floor, which take the groups whose worst member is
  predicted to keep most, also where a prediction is outside of what the predictor has seen
- calibration: {told["texts"]} texts an exam, for RegMean, Fisher and the plans alike; the plans
  also use derivatives at every adapter's trained point
- **ll_norm**: (serving - base) / (alone - base) of the log-likelihood of a token; 1: as with every
  adapter resident and oracle routing. Clipped to {CLIP[0]:g} to {CLIP[1]:g}. **worst**: the lowest
  of a zoo, averaged over zoos and draws
- **[ ]**: 95 %, adapters and items drawn anew; of the worst, items alone: other zoos or random
  groups may move it further
- **accuracy kept**: utility serving / utility alone, without code, whose lines were not run here
- **rank**: of all resident adapters together; `-r16` is cut to rank 16 each"""


def _short(found: Measured, records: Sequence[Record]) -> str:
    said = []
    for adapters in sorted({r["adapters"] for r in records}):
        mine = [r for r in records if r["adapters"] == adapters and r["whole"]]
        allowed = sorted({r["allowed"] for r in mine})
        if len(allowed) < 2:
            continue
        told = []
        for way, operator in SHOWN:
            curve = [r for r in mine if (r["way"], r["operator"]) == (way, operator)]
            least = needed(curve)
            if len(curve) > 1:
                most = max(r["allowed"] for r in curve)
                told.append(f"{least or f'more than {most}'} by {label(way, operator)}")
        said.append(f"- **{100 * ENOUGH:.0f} % of oracle routing of {adapters} adapters**, on "
                    f"average: K = {'; '.join(told)} (measured at "
                    f"{', '.join(map(str, allowed))}).")  # fmt: skip
        for way, operator in SHOWN[1:]:
            over = pooled(found, adapters, way, operator)
            if over is not None and _is_same(over):
                said.append(f"- MergeProbe's plans of {adapters} are {operator} throughout: what "
                            "they gain or lose is the groups'.")  # fmt: skip
            elif over is not None:
                said.append(f"- MergeProbe's plans of {adapters} over {label(way, operator)}, "
                            f"K = {', '.join(map(str, over['allowed']))} together: "
                            f"{_difference(over, 'mean')} on average, "
                            f"{_difference(over, 'worst')} in the worst adapter.")  # fmt: skip
        groups = spread(found, adapters, REGMEAN)
        if groups is not None:
            said.append(
                f"- Who is put together, {REGMEAN} on every partition of {groups['cases']} cases "
                f"of {adapters}: the best partition's mean is {groups['range_mean']:.3f} above the "
                f"lowest one's, its worst adapter {groups['range_worst']:.2f}; MergeProbe's groups "
                f"are the best of them {groups['first_mean']} times by the mean, "
                f"{groups['first_worst']} by the worst adapter."
            )
    return "\n".join(said)


def _is_same(record: Record) -> bool:
    return all(record[f"over_{what}_interval"] == (0.0, 0.0) for what in ("mean", "worst"))


def _difference(record: Record, what: str) -> str:
    low, high = record[f"over_{what}_interval"]
    value = f"{record[f'over_{what}']:+.3f} [{low:.3f}, {high:.3f}]"
    return value if low > 0 or high < 0 else f"{value} (not distinguishable)"


def _table(records: Sequence[Record]) -> list[str]:
    header = ["groups", "operator", "K", "resident", "rank", "ll_norm", "worst",
              f"below {KEEPS:g}", "accuracy kept", "zoos", "MergeProbe over it",
              "worst over its"]  # fmt: skip
    order = {way: n for n, way in enumerate((OURS, RANDOM, DOMAIN))}
    rows = []
    for r in sorted(records, key=lambda r: (r["allowed"], -r["mean"], order[r["way"]])):
        if r["allowed"] == 1 and r["way"] != OURS:  # one group is the same in every way
            continue
        ours = r["operator"] == PLAN
        rows.append([
            "one" if r["allowed"] == 1 else _NAMES[r["way"]], r["operator"], r["allowed"],
            number(r["resident"], 1), number(r["total_rank"], 0),
            ranged(r["mean"], r["mean_interval"], 3), ranged(r["worst"], r["worst_interval"]),
            f"{100 * r['below']:.0f} %", number(r["accuracy"], 2), len(r["zoos"]),
            "" if ours else ranged(r["over_mean"], r["over_mean_interval"], 3),
            "" if ours else ranged(r["over_worst"], r["over_worst_interval"]),
        ])  # fmt: skip
    return [markdown(header, rows)]


def _chosen(records: Sequence[Record]) -> list[str]:
    zoos = records[0]["zoos"]
    chosen = next(r["chosen"] for r in records if r["operator"] == PLAN)
    counts: dict[str, int] = {}
    for operator in chosen.values():
        name, own, _ = operator.partition(OWN)
        name += " with weights of its own" if own else ""
        counts[name] = counts.get(name, 0) + 1
    header = ["operator", "ll_norm", "worst", "regret", "regret of the worst",
              "MergeProbe over it", "worst over its"]  # fmt: skip
    rows = [[
        r["operator"], ranged(r["mean"], r["mean_interval"], 3),
        ranged(r["worst"], r["worst_interval"]), number(r["regret_mean"]),
        number(r["regret_worst"]),
        "" if r["operator"] == PLAN else ranged(r["over_mean"], r["over_mean_interval"], 3),
        "" if r["operator"] == PLAN else ranged(r["over_worst"], r["over_worst_interval"]),
    ] for r in records]  # fmt: skip
    took = ", ".join(f"{name} {n} times" for name, n in counts.items())
    return [
        f"All adapters of a zoo in one, on {len(zoos)} zoos ({', '.join(zoos)}: adapters and the "
        f"order they are from; those of one order are nested). MergeProbe took {took}. Regret: "
        "what the best of these operators on each zoo keeps more.",
        markdown(header, rows),
    ]


def _routers(rows: Sequence[Row]) -> list[str]:
    zoos: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        zoos.setdefault((row["operator"], row["zoo"]), []).append(row)
    cells = []
    for (operator, zoo), mine in sorted(zoos.items()):
        kept = [min(max(r["ll_norm"], CLIP[0]), CLIP[1]) for r in mine if r["ll_norm"] is not None]
        cells.append([operator, zoo, len(mine), number(sum(kept) / len(kept)), number(min(kept))])
    cells.append(["oracle routing", "any", "", number(1.0), number(1.0)])
    return [f"K = N. {ROUTED[0]}: as it is built from calibration texts.",
            markdown(["router", "zoo", "resident", "ll_norm", "worst"], cells)]  # fmt: skip


def _foretold(found: Measured) -> str:
    said = foretold(found)
    if not said["rows"]:
        return "No plan was measured."
    rho = number(said["rho"], 2)
    return (f"Of {said['rows']} merged adapters of plans: predicted {said['predicted']:.3f} on "
            f"average, measured {said['measured']:.3f}; mean error {said['error']:.3f}; rank "
            f"correlation {rho}; {said['inside']} of {said['intervals']} in their "
            "interval.")  # fmt: skip


def _not_there(failed: Failed, refused: Mapping[tuple[str, int], str]) -> str:
    cells = [[zoo, allowed, PLAN, "", reason] for (zoo, allowed), reason in refused.items()]
    cells += [[zoo, allowed, operator, partition, reason]
              for (zoo, allowed, partition, operator), reason in failed.items()]  # fmt: skip
    return markdown(["zoo", "K", "operator", "groups", "reason"], cells)
