"""What columns from principal angles are made from, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class PairAngles:
    """What the columns read, as arrays over pairs (1, 2), for one module or over all.

    ``of``: the statistics by name (csrc/include/mergeprobe/angles.hpp says what each is), added up,
    or the largest or smallest. ``rank``, ``energy``, ``nuclear``, ``largest``: (2, pairs), of each
    of the two, over all modules it has; ``shared``: principal angles there are; ``top``: directions
    in the overlaps of the strongest.
    """

    of: dict[str, np.ndarray]
    rank: np.ndarray
    energy: np.ndarray
    nuclear: np.ndarray
    largest: np.ndarray
    shared: np.ndarray
    top: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.of[name]

    @property
    def directions(self) -> np.ndarray:
        """Cosines of the concatenated deltas, those that are 0 for want of a partner included."""
        return self.rank.min(0)

    @property
    def alone(self) -> np.ndarray:
        """How many those are."""
        return self.directions - self.shared


Value = Callable[[PairAngles], np.ndarray]


@dataclass(frozen=True, eq=False)
class AngleTable:
    """Columns over the pairs (a, b), a < b, in row-major order of the upper triangle."""

    count: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def get(
        self, name: str, a: np.ndarray, b: np.ndarray, mirrored: str | None = None
    ) -> np.ndarray:
        """A column at pairs; where a > b it is that of (b, a), or ``mirrored`` of it."""
        low, high = np.minimum(a, b), np.maximum(a, b)
        at = low * self.count - low * (low + 1) // 2 + (high - low - 1)
        out = np.full(len(at), np.nan)  # an adapter is no pair with itself
        for name_of, here in ((name, a < b), (mirrored or name, a > b)):
            out[here] = self.columns[name_of][at[here]]
        return out
