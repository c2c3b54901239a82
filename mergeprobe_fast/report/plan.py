"""A plan for a terminal, and its files: plan.json, pairs.parquet, plan.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.planning.plan_file import PLAN_NAME, to_json, to_text
from mergeprobe_fast.planning.words import list_of, share
from mergeprobe_fast.predict.columns import meaning

if TYPE_CHECKING:
    from rich.console import Console

    from mergeprobe_fast.planning.plan_types import Group
    from mergeprobe_fast.planning.result import Plan

PAGE_NAME, PAIRS_NAME, MEASURE_NAME = "plan.html", "pairs.parquet", "measure.csv"
APPLIED_NAME = "applied"
CONTENTS = (PLAN_NAME, PAGE_NAME, PAIRS_NAME)
LEVELS = {
    "weights": "the weights alone",
    "calibration": "weights and recorded inputs",
    "points": "weights, recorded inputs and losses",
    "score": "a closed formula",
}
LISTED_NAMES = 6
LISTED_GROUPS = 25


def write_plan(folder: Path, plan: Plan, command: str) -> dict[str, Any]:
    """Write the files of a plan into ``folder``; returns what plan.json says."""
    from mergeprobe_fast.report.plan_page import render_plan

    (folder / PLAN_NAME).write_text(to_text(plan), encoding="utf-8")
    if plan.pairs is not None:
        plan.pairs.write_parquet(folder / PAIRS_NAME)
    (folder / PAGE_NAME).write_text(render_plan(plan, command), encoding="ascii")
    return to_json(plan)


def headline(plan: Plan) -> str:
    """8 adapters: 3 resident, 2 of them merged from 7, 1 as it is."""
    merged, routed = plan.merged, plan.routed
    limit = "" if plan.resident is None else f" of at most {plan.resident}"
    parts = [f"{len(plan.groups)} resident{limit}"]
    if merged:
        count = sum(len(g.members) for g in merged)
        parts.append(f"{len(merged)} of them merged from {count}")
    if routed:
        parts.append(f"{len(routed)} as {'they are' if len(routed) > 1 else 'it is'}")
    word = "adapter" if len(plan.adapters) == 1 else "adapters"
    return f"{len(plan.adapters)} {word}: {', '.join(parts)}"


def against(plan: Plan) -> str:
    """What the plan costs, beside every adapter resident and one sum of all."""
    kept = plan.outcome
    said = f"cost {plan.cost:.2f} ({plan.costs.adapter:g} a resident adapter) for "
    said += f"{share(kept.average)} kept on average and {share(kept.worst)} at worst"
    said += f"; every adapter resident: {plan.routed_cost:.2f}"
    if plan.one_sum is not None:
        one = plan.one_sum
        word = "" if one.allowed else " (below the floor)"
        said += f"; one sum of all: {one.cost:.2f}{word}, {share(one.worst)} at worst"
    return said


def certainty(plan: Plan) -> str:
    """How far the plan can be trusted."""
    most = plan.resident
    few = "" if most is None else f" of {most} adapters or fewer" if most > 1 else " of one adapter"
    better = f"no other plan{few} {'keeps more at worst' if plan.highest else 'costs less'}"
    searched = better if plan.proven else f"the best found{few}, not proven"
    asked = [f"{n:,} for {a}" for a, n in plan.judged.items() if n]
    return f"{searched}; sets judged: {list_of(asked)}" if asked else searched


def basis(plan: Plan) -> str:
    """What the predictions are made from."""
    if not plan.calibrated:
        text = "uncalibrated: a score that ranks; what it predicts is no measured retention"
    elif plan.coverage is None:
        text = "no intervals are claimed"
    else:
        text = f"intervals are to hold {100 * plan.coverage:.0f} % of what is measured"
    early = " of unfinished adapters" if plan.early else ""
    known, _, reason = plan.reason.partition("; ")
    if known != f"level {plan.level}":  # else it is said already
        reason = plan.reason
    column, middle, rest = reason.partition(" is ")
    if middle and " " not in column:
        reason = f"{meaning(column)} ({column}) is {rest}"
    what = LEVELS.get(plan.level, plan.level)
    return f"predicted from {what}{early}; {text}{f' ({reason})' if reason else ''}"


def interval(group: Group) -> str:
    """Of the worst member: 91 to 97 %."""
    known = [(r, lo, hi) for r, lo, hi in zip(group.retention, group.low, group.high, strict=True)
             if r is not None]  # fmt: skip
    if not group.merged or not known:
        return ""
    _, low, high = min(known)
    return "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f} %"


def print_plan_summary(plan: Plan, console: Console, out: Path) -> None:
    """Print a plan within the width of ``console``."""
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    view = View(console)
    base = plan.base_model or "no declared base model"
    head = headline(plan)
    room = console.width - len(head) - 2
    console.print(Text(head, style="bold"), view.text(base, room), sep="  ")
    console.print(Text(view.clean(basis(plan)), style="dim"))
    for note in plan.notes:
        console.print(Text("note: ", style="yellow") + Text(view.clean(note), overflow="fold"))
    if plan.merged:
        console.print()
        console.print(_merged_table(plan, view))
        _more(console, len(plan.merged))
    if plan.routed:
        console.print()
        console.print(_routed_table(plan, view))
        _more(console, len(plan.routed))
    console.print()
    console.print(Text(against(plan)))
    console.print(Text(certainty(plan), style="dim"))
    console.print()
    console.print(Text(view.clean(out), style="cyan", overflow="fold"))
    for name, what in (
        (PAGE_NAME, "open in a browser"), (PLAN_NAME, "for programs"),
        (PAIRS_NAME, "every pair"), (MEASURE_NAME, "to fill in: plan --measured"),
        (APPLIED_NAME, "the adapters, and what serves them"),
    ):  # fmt: skip
        if (out / name).exists():
            console.print(Text(f"  {name:<16}") + Text(what, style="dim"))


def _more(console: Any, count: int) -> None:
    if count > LISTED_GROUPS:
        console.print(f"  and {count - LISTED_GROUPS} more", style="dim")


def _merged_table(plan: Plan, view: Any) -> Any:
    from rich.text import Text

    table = view.table("Merged")
    for name in ("group", "members", "action"):
        table.add_column(name)
    for name in ("average", "worst", "its interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for g in plan.merged[:LISTED_GROUPS]:
        shown = list(g.members[:LISTED_NAMES])
        if len(g.members) > LISTED_NAMES:
            shown[-1] = f"{len(g.members) - LISTED_NAMES + 1} more"
        table.add_row(
            view.text(g.name, 16), Text(view.clean(list_of(shown)), overflow="fold"), g.action,
            share(g.average), share(g.worst), interval(g),
        )  # fmt: skip
    return table


def _routed_table(plan: Plan, view: Any) -> Any:
    from rich.text import Text

    table = view.table("As they are")
    table.add_column("adapter")
    table.add_column("why")
    for g in plan.routed[:LISTED_GROUPS]:
        why = Text(view.clean("; ".join(g.reasons)), overflow="fold")
        table.add_row(view.text(g.members[0], 28), why)
    return table
