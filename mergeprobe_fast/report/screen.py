"""From a finished screen to files: tables, summary and the HTML report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import mergeprobe_fast
from mergeprobe_fast.features import GROUPS
from mergeprobe_fast.report.data import FeatureInfo, ScreenReport
from mergeprobe_fast.report.html import write_html
from mergeprobe_fast.screening import Screen
from mergeprobe_fast.table import PairTable

# More than half of each other's energy in common: cosine^2 >= 1/2.
NEAR_DUPLICATE = 0.5**0.5
# Deviations of chance below which a cosine is not called aligned or conflicting.
BEYOND_CHANCE = 4.0
# A smaller cosine may be beyond chance in millions of weights, and still mean nothing in practice.
WORTH_NAMING = 0.01
LISTED = 10
# Share of what an adapter has learnt, from which on another one that costs it is named.
HARM = 0.05
CONTENTS = ("adapters.parquet", "pairs.parquet", "report.html", "summary.json")


def summarise(pairs: PairTable) -> dict[str, list[dict[str, Any]]]:
    """The pairs worth naming: most aligned, most conflicting, near-duplicates."""
    harmed = {"most_harmed": _most_harmed(pairs)} if "damage_trained_a_by_b" in pairs else {}
    if "cosine" not in pairs:
        return harmed
    cosine = np.asarray(pairs["cosine"])
    z = np.asarray(pairs["cosine_z"]) if "cosine_z" in pairs else np.sign(cosine) * np.inf

    def listed(keep: np.ndarray, order: np.ndarray, most: int) -> list[dict[str, Any]]:
        rows = [int(i) for i in order if keep[i]][:most]
        return [{"a": pairs["a"][i], "b": pairs["b"][i], "cosine": float(cosine[i])} for i in rows]

    with np.errstate(invalid="ignore"):
        up, down = np.argsort(-cosine, kind="stable"), np.argsort(cosine, kind="stable")
        twins = cosine >= NEAR_DUPLICATE
        return {
            "most_aligned": listed((z > BEYOND_CHANCE) & (cosine >= WORTH_NAMING), up, LISTED),
            "most_conflicting": listed(
                (z < -BEYOND_CHANCE) & (cosine <= -WORTH_NAMING), down, LISTED
            ),
            "near_duplicates": listed(twins, up, len(cosine)),
            **harmed,
        }


def _most_harmed(pairs: PairTable) -> list[dict[str, Any]]:
    """Victims a and partners b whose loss rises most, as a share of what a has learnt."""
    a, b = np.asarray(pairs["a"]), np.asarray(pairs["b"])
    victims, partners = np.concatenate([a, b]), np.concatenate([b, a])
    both = [pairs[f"damage_trained_{side}"] for side in ("a_by_b", "b_by_a")]
    damage = np.concatenate(both)
    worst = np.argsort(-np.nan_to_num(damage, nan=-np.inf), kind="stable")[:LISTED]
    return [
        {"a": victims[i], "b": partners[i], "damage": float(damage[i])}
        for i in worst
        if damage[i] >= HARM
    ]


def screen_report(screen: Screen, command: str) -> ScreenReport:
    """What the terminal and the page are made from."""
    zoo = screen.zoo
    notes = [f"left out: {s.reason}" for s in zoo.skipped] + list(zoo.notes)
    notes += screen.recorded.notes
    if screen.pairs.clipped:
        clipped = f"{screen.pairs.clipped} values clipped to their range"
        notes.append(f"{clipped} (rounding, or few samples)")
    zero = [n for n, v in zip(zoo.names, screen.adapters["norm"], strict=True) if v == 0]
    if zero:
        notes.append(f"all-zero update (untrained?): {', '.join(zero[:5])}")
    features = [
        FeatureInfo(
            f.name, f.title, f.definition, f.low, f.high, f.null, f.directed_twin,
            GROUPS.get(f.name, "Your own"),
        )
        for f in screen.features
    ]
    return ScreenReport(
        zoo=zoo.root.resolve().name if zoo.root else ", ".join(zoo.names[:3]),
        base_model=zoo.base_model,
        version=mergeprobe_fast.__version__,
        command=command,
        adapters=dict(screen.adapters),
        pairs={"a": screen.pairs.a, "b": screen.pairs.b}
        | {f.name: np.asarray(screen.pairs[f.name]) for f in screen.features},
        features=features,
        layers=screen.layers,
        profile=screen.profile,
        adapter_profile=screen.adapter_profile,
        summary=summarise(screen.pairs),
        notes=notes,
    )


def summary_json(screen: Screen, report: ScreenReport) -> dict[str, Any]:
    """The machine-readable summary; the same for the same input."""
    zoo = screen.zoo
    return {
        "tool": f"mergeprobe_fast {mergeprobe_fast.__version__}",
        "zoo": report.zoo,
        "base_model": zoo.base_model,
        "adapters": len(zoo),
        "modules": len(zoo.modules),
        "pairs": screen.pairs.rows,
        "features": [f.name for f in screen.features],
        "lists": report.summary,
        "rules": {
            "aligned, conflicting": f"|cosine| >= {WORTH_NAMING}, |cosine_z| > {BEYOND_CHANCE:g}",
            "most harmed": f"damage_trained >= {HARM:g}: quadratic prediction, not calibrated",
            "near-duplicates": f"cosine >= {NEAR_DUPLICATE:.3f}: half of each one's energy shared",
        },
        "notes": list(report.notes),
        "skipped": [{"path": str(s.path), "reason": s.reason} for s in zoo.skipped],
    }


def write_screen(folder: Path, screen: Screen, report: ScreenReport) -> dict[str, Any]:
    """Write pairs.parquet, adapters.parquet, summary.json and report.html into ``folder``."""
    screen.pairs.write_parquet(folder / "pairs.parquet")
    screen.adapters.write_parquet(folder / "adapters.parquet")
    summary = summary_json(screen, report)
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    write_html(folder / "report.html", report)
    return summary
