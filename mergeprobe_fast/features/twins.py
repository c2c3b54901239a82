"""Columns that come in twos: the same statistic with the two adapters exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergeprobe_fast.features.declare import PairColumn

Value = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def directed(
    name: str, title: str, definition: str, value: Value, **options: Any
) -> tuple[PairColumn, PairColumn]:
    """``name_a_by_b`` and ``name_b_by_a``: what the partner does to the victim.

    ``value(data, victim, partner)`` gets adapter indices. In ``title`` and ``definition``, {a}
    stands for the victim and {b} for the partner. ``options`` are further fields of PairColumn.
    """
    return _twins(name, "a_by_b", "b_by_a", title, definition, value, options)


def sided(
    name: str, title: str, definition: str, value: Value, **options: Any
) -> tuple[PairColumn, PairColumn]:
    """``name_a`` and ``name_b``: the same of both adapters, seen from one and from the other.

    As :func:`directed`; {a} is the adapter whose side it is.
    """
    return _twins(name, "a", "b", title, definition, value, options)


def _twins(
    name: str, one: str, other: str, title: str, definition: str, value: Value,
    options: dict[str, Any],
) -> tuple[PairColumn, PairColumn]:  # fmt: skip
    def column(own: str, twin: str, a: str, b: str, finish: Value) -> PairColumn:
        words = {"a": a, "b": b}
        return PairColumn(
            f"{name}_{own}", title.format(**words), definition.format(**words), finish,
            directed_twin=f"{name}_{twin}", **options,
        )  # fmt: skip

    return (
        column(one, other, "a", "b", value),
        column(other, one, "b", "a", lambda data, a, b: value(data, b, a)),
    )
