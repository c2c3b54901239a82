"""Checks for the arguments of merge methods; each raises ValueError with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def number(
    least: float = -np.inf, most: float = np.inf, *, open_least: bool = False
) -> Callable[[Any], float]:
    """A finite number in [least, most]; ``open_least``: greater than ``least``."""

    def check(value: Any) -> float:
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
            raise ValueError(f"must be a number, got {value!r}")
        value = float(value)
        inside = least <= value <= most and not (open_least and value == least)
        if not np.isfinite(value) or not inside:
            low = "(" if open_least or least == -np.inf else "["
            high = ")" if most == np.inf else "]"
            raise ValueError(f"must be in {low}{least:g}, {most:g}{high}, got {value:g}")
        return value

    return check


def whole(least: int = 0, most: int | None = None) -> Callable[[Any], int]:
    """An integer of at least ``least``."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"must be an integer, got {value!r}")
        if value < least or (most is not None and value > most):
            limit = f"at least {least}" + ("" if most is None else f" and at most {most}")
            raise ValueError(f"must be {limit}, got {value}")
        return int(value)

    return check


def choice(*names: str) -> Callable[[Any], str]:
    """One of these words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {value!r}")
        return value

    return check


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"must be true or false, got {value!r}")
    return bool(value)


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same, or None."""
    return lambda value: None if value is None else check(value)
