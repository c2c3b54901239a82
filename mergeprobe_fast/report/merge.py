"""What a merge did, for a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.merging.output import REPORT_NAME, SUFFIX

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mergeprobe_fast.report.terminal import View

LISTED_ADAPTERS = 12
WORST_MODULES = 3


def print_merge_summary(
    report: Mapping[str, Any], console: Console, out_dir: str | os.PathLike[str]
) -> None:
    """Print the content of merge.json in short: members, what was kept, where most was lost."""
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    view = View(console)
    adapters, modules, total = report["adapters"], report["modules"], report["total"]
    ranks = sorted({m["rank"] for m in modules.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    console.print(
        Text(f"{report['method']} of {len(adapters)} adapters", style="bold"),
        f"{len(modules)} modules, rank {rank}, {report['dtype']}",
        sep="  ",
    )
    for adapter in adapters[:LISTED_ADAPTERS]:
        name = view.text(adapter["name"], console.width - 12)
        weight = adapter["weight"]
        shown = "varies" if isinstance(weight, list) else view.number(weight)
        console.print(Text(f"{shown:>8}  ") + name)
    if len(adapters) > LISTED_ADAPTERS:
        console.print(f"          and {len(adapters) - LISTED_ADAPTERS} more", style="dim")
    for note in report["notes"]:
        console.print(Text("note: ", style="yellow") + Text(view.clean(note), overflow="fold"))
    console.print()
    lost = total["truncation_error_relative"]
    console.print(
        f"energy kept {total['energy_kept']:.2%}   "
        f"truncation error {lost:.2%}   "
        f"rounding to {report['dtype']} {total['rounding_error_relative']:.2%}   (of the norm)"
    )
    worst = sorted(modules, key=lambda name: -modules[name]["truncation_error_relative"])
    for name in worst[: WORST_MODULES if lost > 0 else 0]:
        error = modules[name]["truncation_error_relative"]
        console.print(Text(f"{error:8.2%}  ", style="dim") + view.text(name, console.width - 12))
    print_outputs(report, view)
    console.print()
    console.print(Text(view.clean(out_dir), style="cyan", overflow="fold"))
    path = Path(out_dir)
    if path.suffix == SUFFIX:
        beside = view.clean(f"{path.stem}.{REPORT_NAME}")
        console.print(Text(f"  as its inputs; {beside} has every module", style="dim"))
    else:
        console.print(Text("  PEFT loads it as it is; merge.json has every module", style="dim"))


def print_outputs(report: Mapping[str, Any], view: View) -> None:
    """Print how far the outputs are from each adapter's own, where the report says so."""
    from rich.text import Text

    if "outputs" not in report:
        return
    view.console.print()
    head = "output error / output energy, on the calibration samples of each adapter's domain"
    view.console.print(Text(head, style="dim"))
    view.console.print(_output_table(report["outputs"], view))


def _output_table(outputs: Mapping[str, Any], view: View) -> Table:
    """What each adapter's outputs lose, beside what a plain average would have cost them."""
    from rich.table import Table
    from rich.text import Text

    rows = outputs["adapters"]
    full = any(r.get("full_relative") not in (None, r["error_relative"]) for r in rows)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("adapter")
    table.add_column("domain")
    table.add_column("plain average", justify="right")
    if full:
        table.add_column("before the cut", justify="right")
    table.add_column("this merge", justify="right", style="bold")

    def share(value: float | None) -> Text:
        return Text("-" if value is None else f"{value:.1%}")

    for r in rows[:LISTED_ADAPTERS]:
        cells = [share(r["average_relative"])]
        if full:
            cells.append(share(r.get("full_relative")))
        table.add_row(
            view.text(r["name"], 32), view.text(r["domain"], 16), *cells, share(r["error_relative"])
        )
    if len(rows) > LISTED_ADAPTERS:
        table.add_row(Text(f"and {len(rows) - LISTED_ADAPTERS} more", style="dim"))
    return table
