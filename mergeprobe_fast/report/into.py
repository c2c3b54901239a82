"""What a merge into base weights did, for a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.report.merge import LISTED_ADAPTERS, WORST_MODULES, print_outputs

if TYPE_CHECKING:
    from rich.console import Console


def print_into_summary(
    report: Mapping[str, Any], console: Console, out_dir: str | os.PathLike[str]
) -> None:
    """Print the merge.json of ``merge_into`` in short: members, what the rounding cost, where."""
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    view = View(console)
    adapters, modules, total = report["adapters"], report["modules"], report["total"]
    dtype = report["dtype"] if isinstance(report["dtype"], str) else ", ".join(report["dtype"])
    console.print(
        Text(f"{report['method']} of {len(adapters)} adapters", style="bold"),
        f"into {len(modules)} tensors, {dtype}, {report['base']['bytes'] / 1e9:.2f} GB",
        sep="  ",
    )
    for adapter in adapters[:LISTED_ADAPTERS]:
        weight = adapter["weight"]
        shown = "varies" if isinstance(weight, list) else view.number(weight)
        console.print(Text(f"{shown:>8}  ") + view.text(adapter["name"], console.width - 12))
    if len(adapters) > LISTED_ADAPTERS:
        console.print(f"          and {len(adapters) - LISTED_ADAPTERS} more", style="dim")
    for note in report["notes"]:
        console.print(Text("note: ", style="yellow") + Text(view.clean(note), overflow="fold"))
    console.print()
    console.print(
        f"rounding to {dtype} {total['rounding_error_relative']:.2%} of the update   "
        f"weights it leaves unchanged {total['unchanged']:.2%}   "
        f"truncation error {total['truncation_error_relative']:.2%}"
    )
    worst = sorted(modules, key=lambda name: -modules[name]["rounding_error_relative"])
    for name in worst[:WORST_MODULES]:
        error = modules[name]["rounding_error_relative"]
        console.print(Text(f"{error:8.2%}  ", style="dim") + view.text(name, console.width - 12))
    print_outputs(report, view)
    console.print()
    console.print(Text(view.clean(out_dir), style="cyan", overflow="fold"))
    console.print(Text("  loads as the base does; merge.json has every module", style="dim"))
