"""The short form of a screening, for a terminal or a log, and the progress bar."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import FeatureInfo, ScreenReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ALL_PAIRS_UP_TO = 15
LIST_LENGTH = 5
NUMBER = 8  # cells of the widest number, -1.23e-5
GAP = 2  # cells between columns
# The columns of the pair table, by how much they say; as many as fit.
PREFERRED = (
    "cosine",
    "damage_trained_a_by_b",
    "damage_trained_b_by_a",
    "cross_to_self_a_by_b",
    "cross_to_self_b_by_a",
    "probe_gradient_cosine",
    "cosine_z",
    "norm_ratio",
    "row_rv",
    "col_rv",
    "row_overlap",
    "col_overlap",
    "over_amplification",
)
LISTS = {
    "most_aligned": "Most aligned (cosine >= 0.01)",
    "most_conflicting": "Most conflicting (cosine <= -0.01)",
    "near_duplicates": "Near-duplicates (cosine >= 0.71, half of each one's energy)",
    "most_harmed": "Most harmed by another (predicted loss, as a share of its gain; uncalibrated)",
}
FILES = {
    "report.html": "open in a browser",
    "pairs.parquet": "every pair, every feature",
    "adapters.parquet": "every adapter",
    "modules.parquet": "every pair in every module",
}
ADAPTER_COLUMNS = {
    "rank": "rank",
    "modules": "modules",
    "parameters": "params",
    "norm": "norm",
    "spectral_norm": "spectral",
    "stable_rank": "stable rank",
    "effective_rank": "eff. rank",
    "energy_rank_90": "rank 90%",
}


def print_screen_summary(
    report: ScreenReport, console: Console, out_dir: str | os.PathLike[str]
) -> None:
    """Print what a screening found, within the width of ``console``."""
    from rich.table import Table
    from rich.text import Text

    view = View(console)
    folder = Path(out_dir)
    n, m = report.n_adapters, report.n_pairs
    base = "no declared base model" if report.base_model is None else report.base_model
    head = f"{_count(n, 'adapter')}, {_count(m, 'pair')}"
    room = console.width - len(head) - 2
    console.print(Text(head, style="bold"), view.text(base, room), sep="  ")
    if report.notes:
        notes = Table.grid(padding=(0, 1, 0, 0))
        for note in report.notes:
            notes.add_row(Text("note:", style="yellow"), Text(view.clean(note), overflow="fold"))
        console.print(notes)
    if n == 0:
        return
    if m:
        console.print()
        shown = np.arange(m) if m <= ALL_PAIRS_UP_TO else report.strongest(ALL_PAIRS_UP_TO)
        console.print(_pair_table(report, view, shown))
        if m > len(shown):
            left = f"{m - len(shown):,} more pairs: "
            console.print(Text(left, style="dim") + _wrap_path(view, folder / "pairs.parquet"))
        for key, title in LISTS.items():
            if key == "most_harmed" and key not in report.summary:
                continue
            console.print()
            console.print(_list_table(report.summary.get(key, ()), title, view))
    console.print()
    console.print(_adapter_table(report, view))
    console.print()
    console.print(_wrap_path(view, folder))
    present = [name for name in FILES if (folder / name).exists()] or ["report.html"]
    for name in present:
        console.print(Text(f"  {name:<18}") + Text(FILES[name], style="dim"))


@contextmanager
def progress(console: Console, total: int, label: str) -> Iterator[Callable[..., None]]:
    """A bar with ``label`` while the block runs; yields ``advance(steps=1)``.

    Draws on a terminal only and leaves nothing behind.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda steps=1: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Eta

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        Eta(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(View(console).clean(label), total=total)
        yield lambda steps=1: bar.advance(task, steps)


class View:
    """Text as one console can show it: no control characters, no markup, ASCII where it must."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii = console.options.ascii_only
        self.dots = "..." if self.ascii else "\N{HORIZONTAL ELLIPSIS}"
        self.none = "-" if self.ascii else "\N{EN DASH}"
        self.times = "x" if self.ascii else "\N{MULTIPLICATION SIGN}"

    def clean(self, text: Any) -> str:
        # A name is free text from a file: it must not move the cursor or turn the line around.
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
        )
        return shown.encode("ascii", "backslashreplace").decode("ascii") if self.ascii else shown

    def widest(self, values: Sequence[Any], most: int) -> int:
        from rich.cells import cell_len

        return max((min(most, cell_len(self.clean(v))) for v in values), default=0)

    def text(self, value: Any, cells: int, style: str = "") -> Any:
        """``value`` as rich text, its middle left out where it is wider than ``cells``."""
        from rich.cells import cell_len, set_cell_size
        from rich.text import Text

        shown = self.clean(value)
        cells = max(cells, len(self.dots) + 2)
        if cell_len(shown) > cells:
            room = cells - len(self.dots)
            head = set_cell_size(shown, room - room // 2)
            # set_cell_size cuts at the end only, so the tail is cut in reverse
            tail = set_cell_size(shown[::-1], room // 2)[::-1]
            shown = head.rstrip() + self.dots + tail.lstrip()
        return Text(shown, style=style, no_wrap=True)

    def number(self, value: Any, whole: bool = False) -> str:
        """Three significant digits."""
        if isinstance(value, str):
            return self.clean(value)
        if value is None or math.isnan(value):
            return self.none
        size = abs(float(value))
        if math.isinf(size):
            return "inf" if value > 0 else "-inf"
        if size == 0 or (whole and size < 10_000):
            return f"{value:.0f}"
        if size < 1e-3:
            return f"{value:.2e}".replace("e-0", "e-")
        step = min(4, max(0, int(math.log10(float(f"{size:.3g}")) / 3)))
        scaled = value / 10 ** (3 * step)
        digits = max(0, 2 - math.floor(math.log10(float(f"{abs(scaled):.3g}"))))
        return f"{scaled:.{digits}f}" + ("", "k", "M", "G", "T")[step]

    def table(self, title: str) -> Table:
        from rich import box
        from rich.table import Table

        return Table(
            title=title,
            title_style="bold",
            title_justify="left",
            header_style="dim",
            box=box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
            if self.ascii
            else box.SIMPLE_HEAD,
            border_style="dim",
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _wrap_path(view: View, path: Path) -> Any:
    from rich.text import Text

    return Text(view.clean(path), overflow="fold", style="cyan")


def _ranked(features: Sequence[FeatureInfo]) -> list[FeatureInfo]:
    by_name = {f.name: f for f in features}
    ranked = [by_name[name] for name in PREFERRED if name in by_name]
    return ranked + [f for f in features if f.name not in PREFERRED]


def _head(title: str) -> tuple[str, int]:
    """``title`` in lines no wider than they must be, and its width; never cut inside a word."""
    cells = max([NUMBER, *map(len, title.replace("-", "- ").split())])
    return "\n".join(textwrap.wrap(title, cells)), cells


def _fitting(heads: Sequence[tuple[str, int]], room: int) -> int:
    """How many columns fit into ``room`` cells; at least one."""
    ends = np.cumsum([cells + GAP for _, cells in heads])
    return max(1, int(np.searchsorted(ends, room, side="right")))


def _pair_table(report: ScreenReport, view: View, rows: np.ndarray) -> Table:
    from rich.text import Text

    m = report.n_pairs
    names = report.adapters["name"]
    columns = [[names[i] for i in report.pairs[side][rows]] for side in "ab"]
    features = _ranked(report.features)
    # Names first, each up to a fourth of the line; numbers take what is left; then names again.
    width = view.console.width
    heads = [_head(view.clean(f.title)) for f in features]
    spare = width - sum(view.widest(c, width // 4) for c in columns) - GAP
    heads = heads[: _fitting(heads, spare)]
    features = features[: len(heads)]
    room = width - sum(w + GAP for _, w in heads) - GAP
    wide = [view.widest(c, room) for c in columns]
    first = min(wide[0], max(room // 2, room - wide[1]))

    table = view.table("Pairs" if len(rows) == m else f"{len(rows)} strongest of {m:,} pairs")
    table.add_column("a", no_wrap=True)
    table.add_column("b", no_wrap=True)
    for title, cells in heads:
        table.add_column(Text(title), justify="right", width=cells)
    for p, *pair in zip(rows, *columns, strict=True):
        values = [float(report.pairs[f.name][p]) for f in features]
        table.add_row(
            view.text(pair[0], first),
            view.text(pair[1], room - first),
            *(_signed(view, f, v) for f, v in zip(features, values, strict=True)),
        )
    return table


def _signed(view: View, feature: FeatureInfo, value: float) -> Any:
    from rich.text import Text

    style = ""
    if feature.name == "cosine" and abs(value) >= 0.1:
        style = "blue" if value > 0 else "yellow"
    return Text(view.number(value), style=style)


def _list_table(rows: Sequence[Any], title: str, view: View) -> Any:
    from rich.text import Text

    if not rows:
        return Text.assemble((title, "bold"), ("  none", "dim"))
    table = view.table(title)
    table.show_header = False
    room = (min(view.console.width, 90) - 16) // 2
    for justify in ("right", "left", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for row in rows[:LIST_LENGTH]:
        table.add_row(
            view.number(row.get("damage", row.get("cosine"))),
            view.text(row.get("a"), room),
            Text("by" if "damage" in row else view.times, style="dim"),
            view.text(row.get("b"), room),
        )
    if len(rows) > LIST_LENGTH:
        table.add_row("", Text(f"and {len(rows) - LIST_LENGTH} more", style="dim"), "", "")
    return table


def _adapter_table(report: ScreenReport, view: View) -> Table:
    table = view.table("Adapters")
    width, names = view.console.width, report.adapters["name"]
    chosen = [key for key in ADAPTER_COLUMNS if key in report.adapters]
    heads = [_head(ADAPTER_COLUMNS[key]) for key in chosen]
    heads = heads[: _fitting(heads, width - view.widest(names, width // 3))]
    room = width - sum(cells + GAP for _, cells in heads)
    table.add_column("name", no_wrap=True)
    for title, cells in heads:
        table.add_column(title, justify="right", width=cells)
    shown = min(report.n_adapters, 2 * ALL_PAIRS_UP_TO)
    for i in range(shown):
        cells = []
        for key in chosen[: len(heads)]:
            column = report.adapters[key]
            whole = key in ("modules", "parameters", "energy_rank_90", "rank")
            cells.append(view.number(column[i], whole))
        table.add_row(view.text(names[i], room), *cells)
    if shown < report.n_adapters:
        table.caption = f"{report.n_adapters - shown:,} more adapters: adapters.parquet"
        table.caption_justify = "left"
    return table
