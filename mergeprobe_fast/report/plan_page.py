"""plan.html: a plan as one page without scripts, other files or network, light and dark."""

from __future__ import annotations

import base64
import hashlib
import html
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

import mergeprobe_fast
from mergeprobe_fast.planning.words import VERBS, list_of, share
from mergeprobe_fast.report.plan import against, basis, certainty, headline, interval

if TYPE_CHECKING:
    from mergeprobe_fast.planning.result import Outcome, Plan

STYLE = """
:root { --paper: #fff; --ink: #1b1e23; --soft: #646b75; --line: #e3e5e8; --accent: #1c5cb8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e6e9; --soft: #989fa9; --line: #2c3036; --accent: #7eb0f5; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 1000px; margin: 0 auto;
  padding: 48px 28px 80px; background: var(--paper); color: var(--ink); }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 52px 0 8px; }
p { margin: 6px 0; } .soft, figcaption { color: var(--soft); font-size: 13px; }
ul.notes { padding-left: 16px; border-left: 3px solid #b8610a; list-style: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td p { margin: 0 0 3px; }
figure { margin: 12px 0; } svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--line); } .line { stroke: var(--accent); fill: none; stroke-width: 2; }
.mean { fill: var(--accent); }
.least { fill: var(--paper); stroke: var(--accent); stroke-width: 2; }
.least-line { stroke: var(--accent); fill: none; stroke-dasharray: 3 3; }
.limit { stroke: var(--soft); stroke-dasharray: 1 4; }
.here { stroke: var(--ink); fill: none; }
img { image-rendering: pixelated; width: min(100%, 640px); border: 1px solid var(--line); }
"""
MAX_SQUARES = 40  # adapters: with names and a title each; beyond, one pixel each
_CELLS, _LABEL = (15, 32), 130  # pixels of a square, and of the names


def render_plan(plan: Plan, command: str) -> str:
    """The page, ASCII only."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode("ascii")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(headline(plan))}</title>", f"<style>{STYLE}</style>", "</head>", "<body>",
        f"<h1>{_text(headline(plan))}</h1>",
        f"<p>{_text(plan.base_model or 'no declared base model')}</p>",
        f"<p>{_sentence(against(plan))}</p>",
        f'<p class="soft">{_sentence(basis(plan))} {_sentence(certainty(plan))}</p>',
        _notes(plan), _merged(plan), _routed(plan), _curve(plan), _matrix(plan), _costs(plan),
        f'<p class="soft">mergeprobe_fast {mergeprobe_fast.__version__}: {_text(command)}</p>',
        "</body>", "</html>",
    ]  # fmt: skip
    page = "\n".join(part for part in parts if part) + "\n"
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _text(value: object) -> str:
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return html.escape(shown)


def _sentence(words: str) -> str:
    return _text(f"{words[0].upper()}{words[1:]}.")


def _notes(plan: Plan) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in plan.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _merged(plan: Plan) -> str:
    if not plan.merged:
        return "<h2>Merged</h2><p>Nothing: no set of adapters keeps to the floor and pays.</p>"
    rows = []
    for g in plan.merged:
        weights = [""] * len(g.members) if g.weights is None else [f"{w:.3g}" for w in g.weights]
        kept = ["?" if r is None else share(r) for r in g.retention]
        members = "".join(
            f"<p>{_text(m)}: {k}{f', weight {w}' if w else ''}</p>"
            for m, k, w in zip(g.members, kept, weights, strict=True)
        )
        why = "".join(f"<p>{_text(r)}</p>" for r in g.reasons)
        rows.append(
            f"<tr><td>{_text(g.name)}<p class=soft>{_text(VERBS[g.action])}</p></td>"
            f"<td>{members}</td><td class=num>{share(g.average)}</td>"
            f"<td class=num>{share(g.worst)}<p class=soft>{interval(g)}</p></td>"
            f"<td class=num>{g.cost:.2f}</td><td>{why}</td></tr>"
        )
    head = "".join(f"<th{c}>{t}</th>" for t, c in (
        ("group", ""), ("members, what each keeps", ""), ("average", " class=num"),
        ("worst", " class=num"), ("cost", " class=num"), ("why", ""),
    ))  # fmt: skip
    return (f"<h2>Merged</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")  # fmt: skip


def _routed(plan: Plan) -> str:
    if not plan.routed:
        return ""
    rows = "".join(
        f"<tr><td>{_text(g.members[0])}</td><td>{_text('; '.join(g.reasons))}</td></tr>"
        for g in plan.routed
    )
    return ("<h2>As they are</h2><table><thead><tr><th>adapter</th><th>why it joins no group</th>"
            f"</tr></thead><tbody>{rows}</tbody></table>")  # fmt: skip


def _curve(plan: Plan) -> str:
    """Retention against resident adapters."""
    if len(plan.curve) < 2:
        return ""
    wide, high, left, bottom = 640, 300, 48, 36
    most = max(o.resident for o in plan.curve)
    limited = plan.resident is not None
    # From the tenth below the least: on an axis from 0 good plans could not be told apart.
    lowest = min(plan.outcome.worst, *(o.worst for o in plan.curve))
    least = np.floor(10 * max(-1.0, min(0.95, lowest)) - 1e-9) / 10

    def at(o: Outcome, kept: float) -> tuple[float, float]:
        x = left + (wide - left - 16) * (o.resident - 1) / max(1, most - 1)
        y = 12 + (high - bottom - 12) * (1 - max(least, min(1.05, kept))) / (1 - least)
        return round(x, 1), round(y, 1)

    # One sum of all is no plan of the planner's: a point beside its line.
    planned = plan.curve if plan.one_sum is None else plan.curve[:-1]
    out = [f'<svg viewBox="0 0 {wide} {high}" role="img" width="{wide}" height="{high}">']
    for tick in np.linspace(least, 1.0, 5):
        y = at(plan.curve[0], float(tick))[1]
        out.append(f'<line class="axis" x1="{left}" x2="{wide}" y1="{y}" y2="{y}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{100 * tick:.3g}%</text>')
    for name, key in (("line", "average"), ("least-line", "worst")):
        for a, b in pairwise(planned):
            (x, y), (u, v) = at(a, getattr(a, key)), at(b, getattr(b, key))
            out.append(f'<line class="{name}" x1="{x}" y1="{y}" x2="{u}" y2="{v}"/>')
    points = [(o, f"floor {o.floor:.0%}" if number < len(planned) else "one sum of all",
               not limited and 0 < number < len(planned) and o.floor == plan.costs.floor)
              for number, o in enumerate(plan.curve)]  # fmt: skip
    if limited:  # its own, beside the line of the floors
        points.append((plan.outcome, f"at most {plan.resident} resident", True))
    if limited and plan.resident <= most:
        x = at(replace(plan.outcome, resident=plan.resident), 1.0)[0]
        out.append(f'<line class="limit" x1="{x}" x2="{x}" y1="12" y2="{high - bottom}"/>')
    for o, what, chosen in points:
        title = (f"{what}: {o.resident} resident, {share(o.average)} on average, "
                 f"{share(o.worst)} at worst, cost {o.cost:.2f}")  # fmt: skip
        for name, key in (("mean", "average"), ("least", "worst")):
            x, y = at(o, getattr(o, key))
            out.append(f'<circle class="{name}" cx="{x}" cy="{y}" r="4"><title>{title}</title>'
                       "</circle>")  # fmt: skip
            if chosen:
                out.append(f'<circle class="here" cx="{x}" cy="{y}" r="8"/>')
    for number in sorted({1, most}):
        x = left + (wide - left - 16) * (number - 1) / max(1, most - 1)
        out.append(f'<text x="{x:.1f}" y="{high - 14}" text-anchor="middle">{number}</text>')
    out.append(f'<text x="{wide / 2}" y="{high - 2}" text-anchor="middle">adapters resident</text>')
    caption = (
        "What is predicted to be kept against how many adapters stay resident: the planner at "
        "several floors, filled on average, open at worst; the plan above is circled."
    )
    if limited:
        caption = caption.replace("; the plan above is circled", (
            f". The plan above is circled: {plan.resident} resident at most, left of the vertical "
            "line or on it"))  # fmt: skip
    if plan.one_sum is not None:
        caption += " The points off the line are one plain sum of all."
    return (f"<h2>Retention against resident adapters</h2><figure>{''.join(out)}</svg>"
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def _matrix(plan: Plan) -> str:
    """What each adapter (row) keeps with each other one (column)."""
    if plan.pairs is None or len(plan.adapters) < 2:
        return ""
    index = {a.name: i for i, a in enumerate(plan.adapters)}
    order = [index[m] for g in plan.groups for m in g.members]
    kept = plan.pairs.matrix("retention_a")[np.ix_(order, order)]
    outside = plan.pairs.matrix("outside")[np.ix_(order, order)] == 1
    names = [plan.adapters[i].name for i in order]
    caption = (
        "What the adapter of a row is predicted to keep in a pair with that of a column, by the "
        f"kindest action: blue {share(1)} and more, white the floor, {share(plan.costs.floor)}, "
        "orange less, grey where the model does not answer: a value is unknown, or unlike all that "
        "it has seen. Adapters stand in the order of the groups above."
    )
    draw = _squares if len(names) <= MAX_SQUARES else _pixels
    return (f"<h2>Pairs</h2><figure>{draw(kept, outside, names, plan.costs.floor)}"
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def _colours(kept: np.ndarray, outside: np.ndarray, floor: float) -> np.ndarray:
    """(N, N, 3) bytes: orange below the floor, white at it, blue above, grey without an answer."""
    above = np.clip((kept - floor) / max(1 - floor, 1e-9), 0, 1)
    below = np.clip((floor - kept) / max(floor, 1e-9), 0, 1)
    white, blue, orange = (np.array(c, float) for c in ((244,) * 3, (28, 92, 184), (216, 110, 20)))
    mixed = white + above[..., None] * (blue - white) + below[..., None] * (orange - white)
    return np.where((np.isnan(kept) | outside)[..., None], 150.0, mixed).round().astype(np.uint8)


def _squares(
    kept: np.ndarray, outside: np.ndarray, names: Sequence[str], floor: float
) -> str:
    n, colours = len(names), _colours(kept, outside, floor)
    cell = min(_CELLS[1], max(_CELLS[0], 480 // n))
    side = _LABEL + n * cell
    out = [f'<svg viewBox="0 0 {side} {n * cell + 4}" width="{side}" role="img">']
    for i, name in enumerate(names):
        short = name if len(name) <= 20 else f"{name[:9]}...{name[-8:]}"
        y, middle = i * cell, i * cell + cell // 2 + 4
        out.append(f'<text x="{_LABEL - 6}" y="{middle}" text-anchor="end">{_text(short)}</text>')
        for j, other in enumerate(names):
            if i == j:
                continue
            said = "unknown" if np.isnan(kept[i, j]) else share(kept[i, j])
            if outside[i, j]:
                said += ", outside what the model has seen"
            red, green, blue = colours[i, j]
            out.append(
                f'<rect x="{_LABEL + j * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="#{red:02x}{green:02x}{blue:02x}">'
                f"<title>{_text(name)} with {_text(other)}: {said}</title></rect>"
            )
    return "".join(out) + "</svg>"


def _pixels(
    kept: np.ndarray, outside: np.ndarray, names: Sequence[str], floor: float
) -> str:
    """A PNG of one pixel per pair, in the page itself."""
    rows = _colours(kept, outside, floor)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", len(names), len(names), 8, 2, 0, 0, 0)
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(raw, 9))
           + chunk(b"IEND", b""))  # fmt: skip
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="pairs of {len(names)} adapters" src="data:image/png;base64,{data}">'


def _limit(plan: Plan) -> str:
    if plan.resident is None:
        return ""
    found = "; the floor is the highest that was found for so many" if plan.highest else ""
    return f"At most {plan.resident} adapters were to be resident{found}. "


def _costs(plan: Plan) -> str:
    c = plan.costs
    floored = "the lower end of its interval" if c.floor_on == "low" else "its prediction"
    traffic = "all adapters are asked for equally" if not c.traffic else "traffic as given"
    return (
        "<h2>Costs</h2><p>"
        f"A resident adapter {c.adapter:g}, routing {c.request:g}, a point of retention lost "
        f"{c.average:g} for each adapter and {c.worst:g} for the worst of a group; {traffic}. "
        f"{_limit(plan)}No member of a merged group may keep less than {share(c.floor)}, by "
        f"{floored}. "
        f"Allowed were {_text(list_of(plan.actions))}.</p>"
    )
