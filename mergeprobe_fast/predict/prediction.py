"""What a predictor says: predictions with intervals and reasons, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergeprobe_fast.predict.bounds import INSIDE, reason
from mergeprobe_fast.predict.level import LevelModel


@dataclass(frozen=True, eq=False)
class Prediction:
    """Retention of members of merges. Arrays have the shape of the columns.

    Attributes:
        retention: 1: all the adapter had learned is still there; 0: nothing; NaN: undefined.
        low, high: hold it in ``coverage`` of the cases; NaN where no interval is claimed.
        outside: the row is unlike those of training: the numbers are there, but not to rely on.
        level: of the model that answered most rows, say "calibration"; "score": a closed form did.
        calibrated: False: a closed form on a base model that the predictor has not seen, or
            without the columns of any level; it ranks, and its scale means little.
        coverage: of the intervals; NaN where there are none.
        reason: in words why this level, and the commonest reason of rows outside.
    """

    retention: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    level: str
    calibrated: bool
    coverage: float
    reason: str
    _why: Mapping[int, str] = field(default_factory=dict, repr=False)
    _codes: np.ndarray | None = field(default=None, repr=False)

    def why(self, *row: int) -> str:
        """Why the row with these indices is outside; "" where it is not."""
        if self._codes is None:
            return ""
        at = int(np.ravel_multi_index(row, self.retention.shape))
        return self._why.get(at, "")


@dataclass(frozen=True)
class Explanation:
    """What one row's prediction is made of, by path attribution (``forest.contributions``).

    Attributes:
        level, retention: of the prediction.
        constant: what is predicted before any column is known, on the scale that is learnt: minus
            the log of damage.
        contributions: (column, its value, what it adds on that scale), the largest first; they and
            ``constant`` add up to ``total``, whose retention is the prediction.
        sentence: the first of them in words.
    """

    level: str
    retention: float
    constant: float
    total: float
    contributions: tuple[tuple[str, float, float], ...]
    sentence: str


class Reasons(Mapping[int, str]):
    """The reason of each row outside, made when asked for.

    Args:
        codes: of ``Bounds.check``.
        parts: who answered: numbers of rows, their columns, the model.
    """

    def __init__(
        self, codes: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray, LevelModel]]
    ) -> None:
        self._codes, self._parts = codes, parts
        self._of, self._at = np.full(len(codes), -1), np.zeros(len(codes), np.int64)
        for number, (rows, _, _) in enumerate(parts):
            self._of[rows], self._at[rows] = number, np.arange(len(rows))

    def __getitem__(self, row: int) -> str:
        if self._codes[row] == INSIDE:
            raise KeyError(row)
        _, x, model = self._parts[self._of[row]]
        return reason(int(self._codes[row]), model.columns, x[self._at[row]], model.bounds)

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._codes != INSIDE).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self._codes != INSIDE))

    def commonest(self) -> str:
        """The reason of the first row that has the most frequent code."""
        out = self._codes[self._codes != INSIDE]
        codes, counts = np.unique(out, return_counts=True)
        return self[int(np.flatnonzero(self._codes == codes[counts.argmax()])[0])]
