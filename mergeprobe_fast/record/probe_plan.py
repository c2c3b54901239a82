"""At which optimiser steps a run is recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergeprobe_fast.errors import InputError

FRACTIONS = (0.01, 0.02, 0.05, 0.10)
_ROUNDING = 2.0**-50  # relative: of the fraction, and of its product


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The fractions of training as floats; InputError unless they ascend strictly within (0, 1)."""
    try:
        found = tuple(float(f) for f in fractions)
    except (TypeError, ValueError):
        raise InputError(f"expected numbers, got {fractions!r}", key="fractions") from None
    ascending = all(one < other for one, other in zip((0.0, *found), (*found, 1.0), strict=True))
    if not found or not ascending:
        raise InputError(f"expected ascending numbers between 0 and 1, got {fractions!r}",
                         key="fractions")  # fmt: skip
    return found


def planned_steps(fractions: Sequence[float], total_steps: int) -> tuple[int, ...]:
    """The number of steps after which each fraction of ``total_steps`` is reached, at least 1.

    The rounding of floats does not count: 0.07 of 100 steps are 7, and 1 / 3 of 12 are 4. Each
    snapshot needs the gradient of one step more: InputError where a fraction takes all steps.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise InputError(f"expected an integer from 1, got {total_steps!r}", key="total_steps")
    planned = tuple(max(1, math.ceil(f * total_steps * (1 - _ROUNDING))) for f in fractions)
    if planned[-1] >= total_steps:
        reason = f"{fractions[-1]:g} of {total_steps} steps leave no step to take a gradient from"
        raise InputError(reason, key="fractions")
    return planned
