"""Pictures of the results page: SVG files that stand on their own, readable on any background."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..report.charts import scale, ticks

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989")
_INK, _PALE, _PAPER = "#24292f", "#d0d7de", "#ffffff"
_ROW, _LABEL, _PLOT = 20, 300, 420
_PANEL, _GAP = (250, 190), 56


@dataclass(frozen=True)
class Mark:
    """A number with its interval, and the worst member if there is one."""

    value: float
    interval: Sequence[float] | None = None
    worst: float | None = None


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    """A line of text."""
    return (f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">'
            f"{html.escape(words)}</text>")  # fmt: skip


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" fill="{_INK}" role="img">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def dots(
    title: str, series: Sequence[str], rows: Mapping[str, Sequence[Mark | None]], at: float
) -> str:
    """A row a name with a dot and an interval per series; a line where nothing is gained or lost.

    The worst members are hollow.
    """
    shown = [v for marks in rows.values() for m in marks if m
             for v in (m.value, m.worst, *(m.interval or ())) if v is not None]  # fmt: skip
    low, high = min([*shown, at]), max([*shown, at])
    room = 0.04 * ((high - low) or 1.0)
    x = scale(low - room, high + room, _LABEL, _LABEL + _PLOT)
    row = _ROW + 8 * (len(series) - 1)
    top = 56 if len(series) > 1 else 36
    bottom = top + row * len(rows)
    parts = [text(10, 22, title, size=14)]
    for n, name in enumerate(series if len(series) > 1 else ()):
        left = _LABEL + n * 150
        parts.append(f'<circle cx="{left}" cy="38" r="4" fill="{COLOURS[n]}"/>')
        parts.append(text(left + 9, 42, name))
    for tick in ticks(low, high):
        style = _INK if math.isclose(tick, at, abs_tol=1e-9) else _PALE
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{top - 6}" y2="{bottom}" '
                     f'stroke="{style}"/>')  # fmt: skip
        parts.append(text(x(tick), bottom + 16, f"{tick:g}", "middle"))
    for k, (name, marks) in enumerate(rows.items()):
        middle = top + row * k + row / 2
        parts.append(text(_LABEL - 10, middle + 4, name, "end"))
        for n, mark in enumerate(marks):
            if mark is None:
                continue
            y = middle + 8 * (n - (len(series) - 1) / 2)
            if mark.interval is not None:
                one, two = (x(edge) for edge in mark.interval)
                parts.append(f'<line x1="{one}" x2="{two}" y1="{y}" y2="{y}" '
                             f'stroke="{COLOURS[n]}" stroke-width="2"/>')  # fmt: skip
            if mark.worst is not None:
                parts.append(f'<circle cx="{x(mark.worst)}" cy="{y}" r="3.5" fill="{_PAPER}" '
                             f'stroke="{COLOURS[n]}"/>')  # fmt: skip
            parts.append(f'<circle cx="{x(mark.value)}" cy="{y}" r="4" fill="{COLOURS[n]}"/>')
    return document(_LABEL + _PLOT + 30, bottom + 28, title, parts)


def lines(
    title: str, panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float | None]]]]
) -> str:
    """A panel a name; in it a line a series of (adapters, mean, worst), worst dotted; log x."""
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    points = [p for panel in panels.values() for way in panel.values() for p in way]
    sizes = sorted({size for size, *_ in points})
    shown = [v for _, *values in points for v in values if v is not None]
    low, high = max(min(*shown, 0.9), -1.0), max(*shown, 1.0) + 0.03
    wide, tall = _PANEL
    across = min(3, len(panels))
    parts = [text(10, 22, title, size=14)]
    for n, name in enumerate(series):
        left = 16 + 150 * n
        parts.append(f'<line x1="{left}" x2="{left + 18}" y1="38" y2="38" '
                     f'stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2"/>')  # fmt: skip
        parts.append(text(left + 24, 42, name))
    for k, (name, ways) in enumerate(panels.items()):
        left, top = 44 + (k % across) * (wide + _GAP), 74 + (k // across) * (tall + _GAP)
        x = scale(math.log2(sizes[0]), math.log2(max(sizes[-1], sizes[0] + 1)),
                  left + 8, left + wide)  # fmt: skip
        y = scale(low, high, top + tall, top)
        parts.append(text(left, top - 8, name, size=13))
        for tick in ticks(low, high):
            style = _INK if tick == 1 else _PALE
            parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y(tick)}" y2="{y(tick)}" '
                         f'stroke="{style}"/>')  # fmt: skip
            parts.append(text(left - 6, y(tick) + 4, f"{tick:g}", "end"))
        for size in sizes:
            parts.append(text(x(math.log2(size)), top + tall + 16, str(size), "middle"))
        for way, found in ways.items():
            colour = COLOURS[series.index(way) % len(COLOURS)]
            for which, dash in ((1, ""), (2, ' stroke-dasharray="3 3"')):
                ends = [(x(math.log2(p[0])), y(p[which])) for p in found if p[which] is not None]
                drawn = " ".join(f"{a},{b}" for a, b in ends)
                parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" '
                             f'stroke-width="1.8"{dash}/>')  # fmt: skip
                parts += [f'<circle cx="{a}" cy="{b}" r="{4 - which}" fill="{colour}"/>'
                          for a, b in ends]  # fmt: skip
    height = 74 + -(-len(panels) // across) * (tall + _GAP)
    width = max(44 + across * (wide + _GAP), 16 + 150 * len(series))
    return document(width, height, title, parts)
