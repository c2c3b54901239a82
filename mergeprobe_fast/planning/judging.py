"""What a planner asks, and what it is told: it never knows features or models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Judged:
    """What one action would leave of the members of some sets; each array is (sets, widest).

    ``retention`` 1: all that a member had learnt is still there, 0: nothing; ``low`` to ``high`` is
    its interval, NaN where none is claimed. ``outside``: no prediction is to be trusted there.
    ``weights`` is what to merge with, NaN for rules that have none. What stands beyond a set's
    members is not read.
    """

    retention: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    weights: np.ndarray


class Judge(Protocol):
    """Judges what actions would make of sets of a zoo's adapters."""

    unavailable: Mapping[str, str]  # actions that cannot be judged here, and what is missing
    level: str  # what it is judged from: "weights", "calibration", "points", ...
    calibrated: bool  # False: no labelled merge of this base model stands behind it
    coverage: float | None  # of the intervals; None: there are none

    # Optional, ``refused``: merges that cannot be made, (action, frozenset of members) and why.

    def judge(self, members: np.ndarray, action: str) -> Judged:
        """``members`` (sets, widest) int32, -1 behind the last of each set; at least two each."""


def padded(sets: list[tuple[int, ...]]) -> np.ndarray:
    """Sets as (sets, widest) int32, -1 behind the last member."""
    out = np.full((len(sets), max(map(len, sets), default=1)), -1, np.int32)
    for row, members in zip(out, sets, strict=True):
        row[: len(members)] = members
    return out
