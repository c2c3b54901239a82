"""What one action makes of one set of adapters, and whether that is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.planning.costs import NEVER


@dataclass(frozen=True, eq=False)
class Verdict:
    """What one action makes of one set. Arrays are (members,), in the order of the set."""

    action: str
    price: int  # NEVER where the floor or the predictor forbids it
    retention: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    weights: np.ndarray
    refused: str | None = None  # why the merge cannot be made, where it cannot

    @property
    def allowed(self) -> bool:
        """Whether the floor holds."""
        return self.price < NEVER

    @property
    def known(self) -> bool:
        """Whether every member has a prediction to rely on."""
        return bool(np.isfinite(self.retention).all() and not self.outside.any())

    @property
    def worst(self) -> float:
        """The least retention; -inf where one is unknown."""
        return float(np.where(np.isfinite(self.retention), self.retention, -np.inf).min())

    @property
    def lost(self) -> np.ndarray:
        """What each member loses, unknown counting as all."""
        return np.where(np.isfinite(self.retention), np.clip(1 - self.retention, 0, None), 1.0)

    def reordered(self, places: Sequence[int]) -> Verdict:
        """The same with the members in another order."""
        at = list(places)
        return Verdict(self.action, self.price, self.retention[at], self.low[at], self.high[at],
                       self.outside[at], self.weights[at], self.refused)  # fmt: skip
