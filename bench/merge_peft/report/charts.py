"""Charts of the report: SVG and tables as text, coloured by the classes of template.html alone."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DASH = "\N{EN DASH}"
_COLOURS = 6
_BAR = (150, 24)
_PANEL = (250, 190)
_STRIP = (460, 22)  # a row of it

Column = tuple[str, Callable[[Mapping[str, Any]], str]]  # title, and what a record shows there


def text(value: object) -> str:
    """Safe in HTML."""
    return html.escape(str(value))


def number(value: float | None, digits: int = 3) -> str:
    """As tables show it; a dash where there is none."""
    return DASH if value is None else f"{value:.{digits}f}"


def between(interval: Sequence[float] | None, digits: int = 3) -> str:
    """An interval of 95 %, as text."""
    return "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def section(title: str, *parts: str) -> str:
    """A part of the page, of HTML under its title."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def say(words: str) -> str:
    """A paragraph."""
    return f'<p class="soft">{text(words)}</p>'


def table(records: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Columns are (title, how a record becomes HTML); the first one is a name.

    A title that ends in a space is one of texts.
    """
    first, *others = columns
    head = f'<th class="text">{text(first[0])}</th>'
    head += "".join(
        f'<th class="text">{text(t)}</th>' if t.endswith(" ") else f"<th>{text(t)}</th>"
        for t, _ in others
    )
    lines = []
    for record in records:
        cells = "".join(_cell(title, cell(record)) for title, cell in others)
        lines.append(f'<tr><th class="text">{first[1](record)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(title: str, shown: str) -> str:
    if shown.startswith("<svg"):
        return f'<td class="bar">{shown}</td>'
    return f'<td class="text long">{shown}</td>' if title.endswith(" ") else f"<td>{shown}</td>"


def bar(
    value: float | None, interval: Sequence[float] | None, worst: float | None, low: float,
    high: float, at: float = 1.0,
) -> str:  # fmt: skip
    """A dot with its interval, and the worst member hollow; a dashed line at ``at``."""
    wide, tall = _BAR
    x = scale(low, high, 6, wide - 6)
    mid = tall / 2
    parts = [f'<line class="zero" x1="{x(at)}" x2="{x(at)}" y1="0" y2="{tall}"/>']
    if interval is not None:
        a, b = x(interval[0]), x(interval[1])
        parts.append(f'<line class="range" x1="{a}" x2="{b}" y1="{mid}" y2="{mid}"/>')
    if worst is not None:
        parts.append(f'<circle class="worst" cx="{x(worst)}" cy="{mid}" r="3.5"/>')
    if value is not None:
        parts.append(f'<circle class="dot" cx="{x(value)}" cy="{mid}" r="3.5"/>')
    return _svg(wide, tall, parts)


def heat_map(hurts: Mapping[str, Any]) -> str:
    """Domains by domains: whose loss in a row, merged with whom in a column."""
    domains = hurts["domains"]
    head = "".join(f"<th>{text(d)}</th>" for d in domains)
    lines = []
    for victim, means, counts in zip(domains, hurts["mean"], hurts["rows"], strict=True):
        cells = []
        for partner, mean, count in zip(domains, means, counts, strict=True):
            if mean is None:
                cells.append(f'<td class="none">{DASH}</td>')
                continue
            told = text(f"{victim} merged with {partner}: {mean:.3f}, {count} rows")
            cells.append(f'<td class="{_heat(mean)}" title="{told}">{mean:.2f}</td>')
        lines.append(f"<tr><th>{text(victim)}</th>{''.join(cells)}</tr>")
    return (
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _heat(mean: float) -> str:
    lost = round((1 - mean) * 10)
    return f"h{min(lost, 8)}" if lost >= 0 else f"b{min(-lost, 2)}"


def capacity_panels(
    records: Sequence[Mapping[str, Any]], what: str, worst: str | None = None
) -> tuple[str, list[str]]:
    """A panel a family, a line a cut: the mean, dotted the worst member, over adapters merged.

    Families of one number of adapters are no curve and have no panel.

    Args:
        records: of ``operator_table.capacity_table``.
        what, worst: the columns to draw, the second dotted if there is one.

    Returns:
        The panels, and what each colour stands for.
    """
    many: dict[str, set[int]] = {}
    for record in records:
        many.setdefault(record["family"], set()).add(record["size"])
    records = [r for r in records if len(many[r["family"]]) > 1]
    cuts = sorted({r["cut"] for r in records}, key=lambda cut: -(cut or 10**6))
    sizes = sorted({r["size"] for r in records})
    drawn = [name for name in (what, worst) if name]
    shown = [v for r in records
             for v in (*(r[name] for name in drawn), *(r.get(f"{what}_interval") or ()))
             if v is not None]  # fmt: skip
    if not shown:
        return "", []
    low = max(math.floor(min(*shown, 0.9) * 5) / 5, -1.0)
    high = max(*shown, 1.0) + 0.05
    panels = []
    for name in dict.fromkeys(r["family"] for r in records):
        mine = [r for r in records if r["family"] == name]
        panel = _panel(mine, what, worst, sizes, cuts, (low, high))
        panels.append(f"<figure><figcaption>{text(name)}</figcaption>{panel}</figure>")
    names = ["the method's own rank" if cut is None else f"rank {cut}" for cut in cuts]
    return f'<div class="panels">{"".join(panels)}</div>', names


def _panel(
    records: Sequence[Mapping[str, Any]], what: str, worst: str | None, sizes: Sequence[int],
    cuts: Sequence[int | None], limits: tuple[float, float],
) -> str:  # fmt: skip
    wide, tall = _PANEL
    last = max(sizes[-1], sizes[0] + 1)
    log = scale(math.log2(sizes[0]), math.log2(last), 34, wide - 8)
    up = scale(*limits, tall - 24, 6)
    parts = []
    for tick in ticks(*limits):
        style = "zero" if tick == 1 else "axis"
        parts.append(f'<line class="{style}" x1="30" x2="{wide}" y1="{up(tick)}" y2="{up(tick)}"/>')
        parts.append(f'<text x="24" y="{up(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for size in sizes:
        x = log(math.log2(size))
        parts.append(f'<text x="{x}" y="{tall - 6}" text-anchor="middle">{size}</text>')
    for cut in cuts:
        colour = cuts.index(cut) % _COLOURS
        mine = sorted((r for r in records if r["cut"] == cut), key=lambda r: r["size"])
        for name, style in ((worst, "low"), (what, "mean")):
            if name is None:
                continue
            points = [(log(math.log2(r["size"])), up(max(r[name], limits[0])), r)
                      for r in mine if r[name] is not None]  # fmt: skip
            way = " ".join(f"{x},{y}" for x, y, _ in points)
            parts.append(f'<polyline class="{style} k{colour}" points="{way}"/>')
            for x, y, r in points:
                interval = r.get(f"{what}_interval")
                if name == what and interval is not None:
                    ends = [up(max(edge, limits[0])) for edge in interval]
                    parts.append(f'<line class="error k{colour}" x1="{x}" x2="{x}" '
                                 f'y1="{ends[0]}" y2="{ends[1]}"/>')  # fmt: skip
                told = text(f"{r['operator']}, {r['size']} adapters: {name} {r[name]:.3f}")
                radius = 3 if name == what else 2
                parts.append(f'<circle class="f{colour}" cx="{x}" cy="{y}" r="{radius}">'
                             f"<title>{told}</title></circle>")  # fmt: skip
    return _svg(wide, tall, parts)


def gain_strips(gains: Sequence[Mapping[str, Any]], what: str) -> str:
    """A row an exam: where the base model stands (hollow) and where each adapter does.

    Args:
        gains: of ``outcome.kept.single_gains``.
        what: "utility" or "loglik".
    """
    wide, tall = _STRIP
    exams = list(dict.fromkeys(g["exam"] for g in gains))
    values = [g[f"{what}_{run}"] for g in gains for run in ("base", "single")]
    low, high = (0.0, 1.0) if what == "utility" else (min(values), max(max(values), 0.0))
    x = scale(low, high, 150, wide - 10)
    bottom = tall * len(exams) + 4
    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line class="axis" x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for n, exam in enumerate(exams):
        mine, y = [g for g in gains if g["exam"] == exam], tall * n + tall / 2
        base, best = mine[0][f"{what}_base"], max(g[f"{what}_single"] for g in mine)
        parts.append(f'<text x="140" y="{y + 4}" text-anchor="end">{text(exam)}</text>')
        parts.append(f'<line class="way" x1="{x(base)}" x2="{x(best)}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="hollow" cx="{x(base)}" cy="{y}" r="4"/>')
        for g in mine:
            told = text(f"{g['adapter']}: {g[f'{what}_single']:.3f}, base {base:.3f}")
            parts.append(f'<circle class="dot" cx="{x(g[f"{what}_single"])}" cy="{y}" r="3" '
                         f'fill-opacity=".6"><title>{told}</title></circle>')  # fmt: skip
    return _svg(wide, bottom + 20, parts)


def legend(names: Sequence[str]) -> str:
    """Names beside the colours of lines."""
    lines = (
        f'<span><svg width="22" height="6" viewBox="0 0 22 6"><line class="mean k{n % _COLOURS}" '
        f'x1="0" x2="22" y1="3" y2="3"/></svg>{text(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(lines)}</div>'


def scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """From low..high to pixels; what lies outside is drawn at the edge."""
    step = (last - first) / ((high - low) or 1.0)
    return lambda value: round(first + (min(max(value, low), high) - low) * step, 1)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within, four to eight of them."""
    raw = (high - low) / 5 or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 5, 10) if s * size >= raw)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(wide: int, tall: float, parts: Sequence[str]) -> str:
    return f'<svg width="{wide}" height="{tall}" viewBox="0 0 {wide} {tall}">{"".join(parts)}</svg>'
