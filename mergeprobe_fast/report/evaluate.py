"""An evaluation of a predictor, for a terminal and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.predict.card import evaluation_markdown
from mergeprobe_fast.report.terminal import View

if TYPE_CHECKING:
    from rich.console import Console

CONTENTS = ("evaluation.json", "evaluation.md")
# What fits beside a name in 100 cells.
_SHOWN = {
    "rho": "rho", "within": "within", "mae": "MAE", "auc": "AUC", "coverage": "cover",
    "width": "width", "outside": "out", "regret_worst": "regret", "over_metadata": "- metadata",
}  # fmt: skip


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write evaluation.json and evaluation.md into ``folder``."""
    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    markdown = "# Evaluation\n\n" + evaluation_markdown(evaluation)
    (folder / "evaluation.md").write_text(markdown, encoding="utf-8")


def print_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """A table per level and split; intervals of rho, the rest in the files."""
    from rich.text import Text

    view = View(console)
    for level, found in evaluation["levels"].items():
        console.print()
        counts = f"{found['rows']} labels, {found['adapters']} adapters, "
        counts += f"{len(found['columns'])} columns"
        console.print(Text(f"{view.clean(level)}", style="bold"), Text(counts), sep="  ")
        if found["ceiling"] is not None:
            within = found["ceiling_within"]
            text = f"the labels' noise would leave rho {found['ceiling']:.2f}"
            text += "" if within is None else f", within {within:.2f}"
            console.print(Text(text, style="dim"))
        for split, scores in found["splits"].items():
            console.print()
            if "reason" in scores:
                console.print(Text(f"{split}: {view.clean(scores['reason'])}", style="dim"))
            else:
                console.print(_table(split, scores, view))
    if evaluation.get("same_labels"):
        console.print()
        console.print(Text("The model was fitted on these labels, or on some of them: its scores "
                           "mean nothing.", style="yellow"))  # fmt: skip


def _table(split: str, scores: Mapping[str, Any], view: View) -> Any:
    from rich.table import Table
    from rich.text import Text

    keys = [k for k in _SHOWN if any(k in p for p in scores["predictors"])]
    title = split if split == "as it is" else f"leave one {split} out"
    table = Table(
        title=f"{title}: {scores['rows']} rows, {scores['folds']} folds", title_justify="left",
        box=None, padding=(0, 1, 0, 0), header_style="dim",
    )  # fmt: skip
    table.add_column("")
    for key in keys:
        table.add_column(_SHOWN[key], justify="right", no_wrap=True)
    for p in scores["predictors"]:
        cells = [_cell(p.get(k), k, view) for k in keys]
        style = "bold" if p is scores["predictors"][0] else ""
        table.add_row(Text(view.clean(p["name"])), *map(Text, cells), style=style)
    return table


def _cell(score: Mapping[str, Any] | None, key: str, view: View) -> str:
    if score is None or score["value"] is None:
        return view.none
    text = _short(score["value"], 3 if key in ("mae", "regret_worst") else 2)
    if key not in ("rho", "over_metadata") or score["interval"] is None:
        return text
    low, high = (_short(v, 2) for v in score["interval"])
    return f"{text} [{low},{high}]"


def _short(value: float, digits: int) -> str:
    """Without the 0 before the point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def print_fitted(model: Any, console: Console, out: Path) -> None:
    """What a fit made: its levels, and where it lies."""
    from rich.table import Table
    from rich.text import Text

    view = View(console)
    facts = model.facts
    console.print(Text(
        f"{facts.rows} labels of {facts.merges} merges of {facts.adapters} adapters"
    ))  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head, side in (("level", "left"), ("labels", "right"), ("columns", "right")):
        table.add_column(head, justify=side)
    for name, level in model.models.items():
        table.add_row(Text(view.clean(name)), str(level.rows), str(len(level.columns)))
    console.print(table)
    console.print(Text(view.clean(out), overflow="fold"))
    console.print(Text(view.clean(out.with_suffix(".md")), overflow="fold"), style="dim")
