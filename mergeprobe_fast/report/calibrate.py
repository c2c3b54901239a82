"""What a calibration pass is going to do, and what it wrote, for a terminal and as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mergeprobe_fast.io.calibration import Calibration
    from mergeprobe_fast.record import CalibrationPlan


_LABELLED = {"all": "all tokens", "completion": "completions"}


def describe_calibration(calibration: Calibration, plan: CalibrationPlan) -> dict[str, Any]:
    """What was recorded, as plain JSON values."""
    return {
        "out": str(calibration.path),
        "base_model": calibration.base_model,
        "point": calibration.point,
        "streamed": plan.streamed,
        "modules": len(calibration.modules),
        "inputs": plan.inputs,
        "gradients": calibration.has_gradients,
        "labels": list(calibration.labels),
        "outputs": calibration.has_outputs,
        "points": list(plan.points.info.points) if plan.points else [],
        "adapters": list(plan.points.info.fingerprints) if plan.points else [],
        "nbytes": plan.nbytes,
        "domains": {
            name: {k: getattr(d, k) for k in ("sequences", "tokens", "samples", "loss")}
            for name, d in calibration.domains.items()
        },
        "notes": list(calibration.notes),
    }


def print_plan(plan: CalibrationPlan, console: Console) -> None:
    """Print what is going to be read, run and written, before any of it is done."""
    from rich.table import Table
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    view = View(console)
    info = plan.info
    base = "" if info.base_model is None else info.base_model
    console.print(Text("calibrate", style="bold"), view.text(base, console.width - 12), sep="  ")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("domain")
    for title in ("texts", "tokens", "kept"):
        table.add_column(title, justify="right")
    labelled = bool(info.labels or plan.points)
    if labelled:
        table.add_column("labels")
    for domain in info.domains.values():
        table.add_row(
            view.text(domain.name, 40), f"{domain.sequences:,}", f"{domain.tokens:,}",
            f"{domain.samples:,}", *([_LABELLED[domain.loss]] if labelled else []),
        )  # fmt: skip
    console.print(table)
    how = "one decoder layer at a time" if plan.streamed else "the whole model in memory"
    recorded = "inputs, outputs" if info.outputs else "inputs"
    if info.labels:
        recorded += f", output gradients (labels: {' and '.join(info.label_kinds)})"
    console.print(
        f"{len(info.modules)} modules, {plan.inputs} distinct inputs; {recorded}; {how}\n"
        f"{_points(plan)}"
        f"writes {_size(plan.nbytes)}, takes about {_size(plan.peak_nbytes)} of memory"
    )
    for note in info.notes:
        console.print(Text("note: ", style="yellow") + Text(view.clean(note), overflow="fold"))


def print_calibration(
    calibration: Calibration, console: Console, out: str | os.PathLike[str]
) -> None:
    """Print where it is and what it is for."""
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    console.print(Text(View(console).clean(Path(out)), style="cyan", overflow="fold"))
    methods = "regmean, weighted_svd, osrm" + (", fisher" if calibration.has_gradients else "")
    console.print(f"  for merge --calibration: {methods}", style="dim")
    console.print("  for screen --calibration: what updates do to each other", style="dim")


def _points(plan: CalibrationPlan) -> str:
    if plan.points is None:
        return ""
    points = plan.points.info.points.values()
    base = sum(point.adapter is None for point in points)
    return (
        f"then the loss along {len(plan.points.zoo)} adapters, at the base on {base} domains and "
        f"at {len(points) - base} adapters: {plan.points.steps} texts\n"
    )


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"
