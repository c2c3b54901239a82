"""The data block of the HTML report: plain JSON, with columns of numbers as base64 bytes.

A packed column is ``{"t": type, "d": base64}``, little-endian, type one of f8 f4 i4 i2 i1 u2.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .data import SUMMARY_LISTS, ScreenReport
from .order import leaf_order

TEXT_COLUMNS = ("name", "path", "rank")

# Limits that keep the file small enough to mail and to open at once; what they cut is said in it.
MAX_MAP = 500  # adapters: one device pixel each is the end of a legible heat map
MAX_PAIRS = MAX_MAP * (MAX_MAP - 1) // 2
EXACT_BYTES = 2_000_000  # features are float64 up to here, float32 above
PROFILE_BYTES = ((4, 2_000_000), (2, 3_000_000))  # float32, then int16, then int8


def payload(report: ScreenReport) -> dict[str, Any]:
    """``report`` as a value that ``json.dumps(..., allow_nan=False)`` takes."""
    n, m = report.n_adapters, report.n_pairs
    kept = np.sort(report.strongest(MAX_PAIRS)) if m > MAX_PAIRS else np.arange(m)
    width = "f8" if 8 * len(kept) * len(report.features) <= EXACT_BYTES else "f4"
    index = "u2" if n <= 1 << 16 else "i4"
    return {
        "zoo": report.zoo,
        "base_model": report.base_model,
        "version": report.version,
        "command": report.command,
        "notes": [str(note) for note in report.notes],
        "adapters": {name: _column(name, v) for name, v in report.adapters.items()},
        "n_adapters": n,
        "n_pairs": m,
        "pairs": {
            "count": len(kept),
            "a": _pack(np.asarray(report.pairs["a"])[kept], index),
            "b": _pack(np.asarray(report.pairs["b"])[kept], index),
            "features": {
                f.name: _pack(np.asarray(report.pairs[f.name])[kept], width)
                for f in report.features
            },
        },
        "features": [
            {
                "name": f.name,
                "title": f.title,
                "text": f.text,
                "low": _number(f.low),
                "high": _number(f.high),
                "null": _number(f.null),
                "twin": f.directed_twin,
                "group": f.group,
            }
            for f in report.features
        ],
        "layers": [str(layer) for layer in report.layers],
        "profile": _profile(report.profile, kept),
        "adapter_profile": (
            None if report.adapter_profile is None else _pack(report.adapter_profile, "f4")
        ),
        "order": _pack(leaf_order(report.similarity()), index) if 0 < n <= MAX_MAP else None,
        "summary": {
            name: [_summary_row(row, report) for row in report.summary.get(name, ())]
            for name in SUMMARY_LISTS
        },
    }


def _pack(values: Any, kind: str) -> dict[str, str]:
    array = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return {"t": kind, "d": base64.b64encode(array.tobytes()).decode("ascii")}


def _column(name: str, values: Sequence[Any]) -> Any:
    number = all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values)
    if number and name not in TEXT_COLUMNS:
        return _pack(values, "f8")
    return ["" if v is None else str(v) for v in values]


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _profile(profile: np.ndarray | None, kept: np.ndarray) -> dict[str, Any] | None:
    """The profile as it is while that is small, else integers times one scale per pair."""
    if profile is None or profile.size == 0:
        return None
    rows = np.asarray(profile, dtype=np.float32)[kept]
    width = next((w for w, most in PROFILE_BYTES if rows.size * w <= most), 1)
    if width == 4:
        return {"values": _pack(rows, "f4"), "scale": None}
    top = (1 << (8 * width - 1)) - 1
    clean = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
    scale = np.abs(clean).max(axis=1) / top
    steps = np.rint(clean / np.where(scale > 0, scale, 1.0)[:, None])
    steps[~np.isfinite(rows)] = -top - 1  # the one value that clipping cannot reach
    return {"values": _pack(steps, f"i{width}"), "scale": _pack(scale, "f4")}


def _summary_row(row: Mapping[str, Any], report: ScreenReport) -> dict[str, Any]:
    """Names become indices, so that a click finds the pair even if two adapters share a name."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            out[key] = None if value is None else str(value)
        else:
            out[key] = _number(value)
    names = [str(name) for name in report.adapters["name"]]
    out["pair"] = None
    if out.get("a") in names and out.get("b") in names:
        out["pair"] = [names.index(out["a"]), names.index(out["b"])]
    return out
