"""Rows of speed.jsonl as Markdown: python bench/speed/table.py [FILE] [--quick]

The latest row of each measurement, every one of them, the losing ones included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NO_RIVALS = ("mergeprobe_fast", "the core")
KEY = ("suite", "case", "threads", "kind", "variant", "peer")


def latest(rows: list[Row]) -> list[Row]:
    """Of rows that measure the same thing, the last; in the order they first appeared."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[tuple(row[k] for k in KEY)] = row
    return list(found.values())


def render(rows: list[Row]) -> str:
    """One table per suite."""
    rows = latest(rows)
    parts = []
    for suite in dict.fromkeys(r["suite"] for r in rows):
        own = [r for r in rows if r["suite"] == suite]
        lines = [
            f"\n**{suite}**{', quick' if own[0]['quick'] else ''}\n",
            "| case | threads | measured | by | median | ours against it | target | met |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(r) for r in own]
        timed = [r for r in own if r["kind"] == "time" and r["note"]]
        notes = dict.fromkeys((r["variant"], r["note"]) for r in timed)
        lines += ["", *(f"- {variant}: {note}" for variant, note in notes)]
        parts.append("\n".join(lines))
    return "\n".join([*parts, "", *_provenance(rows)])


def _line(row: Row) -> str:
    ratio = "" if row["ratio"] is None else f"{_number(row['ratio'])} {row['ratio_unit']}"
    if row["ratio"] is not None and row["ratio"] < 1 and row["peer"] not in NO_RIVALS:
        ratio += " (loses)"
    median = _seconds(row["median"]) if row["kind"] == "time" else (
        f"{_number(row['median'])} {row['unit'] if row['unit'] != '1' else ''}".strip()
    )  # fmt: skip
    if row.get("gflops"):
        median += f", {row['gflops']:.0f} GF/s"
    if row["kind"] == "fact" and row["note"]:
        median += f" ({row['note']})"
    if row["extrapolated"]:
        median += " (extrapolated)"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    where = row["case"] if row["gated"] else f"{row['case']} (UNGATED)"
    target = row["target"] or ""
    if target and row["kind"] == "time" and row["target_of"] == "median":
        target += " s"
    clock = {"wall": "wall", "events": "device"}.get(row["clock"], "CPU")
    return (
        f"| {where} | {row['threads']}, {clock} | {row['variant']} | {row['peer']} "
        f"| {median} | {ratio} | {target} | {met} |"
    )


def missed(rows: list[Row]) -> str:
    """One line: how many targets, and which were missed."""
    bounded = [r for r in latest(rows) if r["met"] is not None]
    lost = [r for r in bounded if not r["met"]]
    text = f"{len(bounded) - len(lost)} of {len(bounded)} targets met"
    for r in lost:
        value = r["ratio"] if r["target_of"] == "ratio" else r["median"]
        text += (
            f"\n  missed: {r['suite']}: {r['case']}, {r['threads']}T, {r['variant']}: "
            f"{_number(value)}, target {r['target']}"
        )
    return text


def _provenance(rows: list[Row]) -> list[str]:
    lines = []
    for commit in dict.fromkeys((r["commit"], r["dirty"], r["date"]) for r in rows):
        row = next(r for r in rows if (r["commit"], r["dirty"], r["date"]) == commit)
        m, v = row["machine"], row["versions"]
        caches = ", ".join(f"{k} {size}" for k, size in m["caches"].items())
        device = "".join(f"{k} {x}, " for k, x in row.get("device", {}).items())
        lines.append(
            f"{device}{m['cpu']} ({m['family_model']}), {m['cores']} cores, {caches}; "
            f"{', '.join(f'{k} {x}' for k, x in v.items())}; commit {row['commit'][:12]}"
            f"{' with uncommitted changes' if row['dirty'] else ''}; `{row['command']}`; "
            f"{row['date']}"
        )
    return lines


def _number(x: float) -> str:
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
    return f"{x:.1e}"


def _seconds(x: float) -> str:
    if x < 1e-3:
        return f"{x * 1e6:.0f} us"
    return f"{x * 1e3:.3g} ms" if x < 1 else f"{x:.3g} s" if x < 600 else f"{x / 60:.0f} min"


def main() -> None:
    """Print the table of a results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="default: this machine's speed.jsonl")
    parser.add_argument("--quick", action="store_true", help="rows of quick runs")
    options = parser.parse_args()
    path = options.file
    if path is None:
        import sys

        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from results import default_path

        path = default_path()
    if not path.exists():
        raise SystemExit(f"table.py: {path} does not exist")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    rows = [r for r in rows if r["quick"] == options.quick]
    if not rows:
        raise SystemExit(f"table.py: {path} holds no {'quick' if options.quick else 'full'} rows")
    print(render(rows))
    print("\n" + missed(rows))


if __name__ == "__main__":
    main()
