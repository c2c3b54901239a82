"""Which columns a level reads, and the score that needs no fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mergeprobe_fast.features.merge_columns import (
    MEMBER,
    MERGE_FEATURES,
    OTHERS,
    OWN,
    level_columns,
)
from mergeprobe_fast.features.merge_declare import LEVELS

EARLY = "early:"  # before the name of a level, and of its columns in a table of labels
EARLY_LEVELS = tuple(f"{EARLY}{level}" for level in LEVELS if level != "points")

RETENTION = (-1.0, 1.2)  # a label beyond is as bad, or as good, as it gets


def levels_of(
    names: Iterable[str], own: Iterable[str] = ()
) -> dict[str, tuple[str, ...]]:
    """The levels that a table with these columns has, poorest first, and the columns of each.

    Args:
        names: of the table's columns; those of snapshots begin with ``EARLY``.
        own: the user's own columns, which every level reads.
    """
    there, own = set(names), tuple(own)
    found = {}
    for prefix in ("", EARLY):
        mine = tuple(n for n in own if n.startswith(EARLY) == bool(prefix))
        before: tuple[str, ...] = ()
        for level in LEVELS:
            if f"{prefix}{level}" not in (*LEVELS, *EARLY_LEVELS):
                continue
            columns = tuple(n for n in level_columns(level) if f"{prefix}{n}" in there)
            columns += tuple(n.removeprefix(EARLY) for n in mine)
            if len(columns) > len(before):
                found[f"{prefix}{level}"] = before = columns
    return found


def in_table(level: str, column: str) -> str:
    """What a level's column is called in a table of labels."""
    return f"{EARLY}{column}" if level.startswith(EARLY) else column


def meaning(column: str) -> str:
    """What a column is, in words."""
    if column in MERGE_FEATURES:
        return MERGE_FEATURES[column].title
    own = {c.name: c.title for c in OWN}
    for prefix, whose in ((MEMBER, "the member"), (OTHERS, "the others, their mean")):
        if column.startswith(prefix) and column.removeprefix(prefix) in own:
            return f"{own[column.removeprefix(prefix)]} ({whose})"
    return "A column of your own"


# The richest first: (column, what is made of it, in words).
_SCORES: tuple[tuple[str, Callable[[np.ndarray], np.ndarray], str], ...] = (
    ("damage_trained", lambda x: np.exp(-np.maximum(x, 0.0)), "exp(-damage_trained)"),
    ("error", lambda x: np.clip(1.0 - x, *RETENTION), "1 - error"),
    ("change_to_self", lambda x: 1.0 / (1.0 + x**2), "1 / (1 + change_to_self^2)"),
)


def score(columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Retention by a closed form, fitted to nothing, and the form in words.

    Taken is the form whose column is there and known of most rows; NaN where it is not. The forms:
    with points, the quadratic prediction of lost gain; with a calibration, E6 of the catalogue;
    from weights, what share of the energy would be the member's own, were the rest orthogonal.
    ``({}, "")`` has no rows: (0,) and "".
    """
    best, words, known = np.zeros(0), "", -1
    for name, form, text in _SCORES:
        if name in columns:
            values = np.asarray(columns[name], np.float64)
            if np.isfinite(values).sum() > known:
                best, words, known = values, text, int(np.isfinite(values).sum())
                made = form
    return (made(best), words) if words else (best, words)
