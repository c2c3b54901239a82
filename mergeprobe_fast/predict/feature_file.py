"""Columns of labelled merges from a file of their own, as merge-peft writes it beside labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.columns import EARLY

KEY, FINAL = "row", "final:"


def phase(fraction: float) -> str:
    """What the names of the columns of snapshots begin with: "at5%:"."""
    return f"at{100 * fraction:g}%:"


def joined(
    columns: Mapping[str, list[Any]], path: Path, features: Path, at: float | None,
    read: Callable[[Path], dict[str, list[Any]]],
) -> dict[str, list[Any]]:  # fmt: skip
    """The columns of labels with those of ``features``, row by row.

    "final:x" becomes "x", and with ``at`` the columns of that share of training become "early:x".
    Rows that the file lacks (what was routed is no merge) are left out.

    Raises:
        InputError: no column ``row`` in one of the two, a row twice, no row in common, no
            columns of that time, a column that the labels have with other values.
    """
    found = read(features)
    for where, table in ((path, columns), (features, found)):
        if KEY not in table:
            raise InputError("has no such column", path=where, key=KEY)
    place = {row: i for i, row in enumerate(found[KEY])}
    if len(place) < len(found[KEY]):
        twice = next(row for i, row in enumerate(found[KEY]) if place[row] != i)
        raise InputError("is there twice", path=features, key=str(twice))
    kept = [i for i, row in enumerate(columns[KEY]) if row in place]
    if not kept:
        raise InputError("has no row of the labels", path=features, key=KEY)
    out = {name: [values[i] for i in kept] for name, values in columns.items()}
    at_row = [place[row] for row in out[KEY]]
    wanted = {FINAL: ""} | ({} if at is None else {phase(at): EARLY})
    for prefix, name in wanted.items():
        names = [n for n in found if n.startswith(prefix)]
        if not names:
            raise InputError("has no columns of that time", path=features, key=prefix)
        for n in names:
            own = name + n.removeprefix(prefix)
            values = [found[n][i] for i in at_row]
            if any(v not in (None, w) for v, w in zip(values, out.get(own, values), strict=True)):
                raise InputError(f"the labels say otherwise of {own}", path=features, key=n)
            out[own] = values
    return out
