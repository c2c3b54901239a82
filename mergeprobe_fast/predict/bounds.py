"""Where a model was trained, and so where it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.predict.linear import Folds, Ranks, short

INSIDE, FAR, MISSING = -1, -2, -3  # of ``Bounds.check``; from 0: a column beyond its range
_LEAST, _MOST = 0.02, 0.25  # of a column's spread, how far it may exceed its range, in two steps
_RIDGE = 0.05  # of a rank's variance, so that columns that move together leave room


@dataclass(frozen=True, eq=False)
class Bounds:
    """Ranges of columns, and how far from the training rows a row may lie in all of them together.

    A column may exceed its range by as much as unseen adapters did in all but a share ``rare``
    of the rows, when families of adapters were held out, and by half its spread at most. The
    distance is Mahalanobis's of the ranks; its limit is what the same rows kept to. So each
    rule calls about that share of the rows of new adapters of the same kind outside (more,
    where adapters differ so much that half a spread is not enough), and combinations of values
    that were never seen.

    Attributes:
        low, high: (columns,) of the training rows, with that margin; NaN: no row has the column.
        median: (columns,), to explain by.
        complete: (columns,) whether all training rows have the column.
        inverse: (columns, columns) of the ranks' covariance.
        limit: of the squared distance.
    """

    low: np.ndarray
    high: np.ndarray
    median: np.ndarray
    complete: np.ndarray
    inverse: np.ndarray
    limit: float

    def check(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """(n,) ``INSIDE``, the number of the column that is farthest out, ``MISSING`` or ``FAR``.

        ``x`` and its ranks ``z`` are (n, columns).

        ``MISSING`` stands for a column that all training rows have and this one has not.
        """
        out = np.where(_distance(z, self.inverse) > self.limit, FAR, INSIDE)
        out[(np.isnan(x) & self.complete).any(axis=1)] = MISSING
        width = np.where(self.high > self.low, self.high - self.low, 1.0)
        with np.errstate(invalid="ignore"):
            beyond = np.nan_to_num(np.maximum(self.low - x, x - self.high) / width, nan=0.0)
        worst = beyond.argmax(axis=1)
        far = beyond[np.arange(len(x)), worst] > 0
        out[far] = worst[far]
        return out


def bounds_of(x: np.ndarray, ranks: Ranks, folds: Folds, rare: float) -> Bounds:
    """Of (n, columns) training rows and the folds of their families."""
    known = [x[np.isfinite(x[:, j]), j] for j in range(x.shape[1])]
    low, high = _range(x)
    spread = np.array([_spread(v) for v in known])
    z = ranks(x)
    beyond, distance = np.zeros(x.shape), np.zeros(len(x))
    for test, gone in folds:
        left = ~gone
        if test.any() and np.count_nonzero(left) >= 3:
            least, most = _range(x[left])
            with np.errstate(invalid="ignore", divide="ignore"):
                over = np.maximum(least - x[test], x[test] - most) / spread
            beyond[test] = np.nan_to_num(np.maximum(over, 0.0), nan=0.0, posinf=_MOST)
            distance[test] = _distance(z[test], _inverse(z[left]))
    margin = np.clip(np.quantile(beyond, 1.0 - rare, axis=0), _LEAST, _MOST)
    # That is the share of each column; of all of them together it takes some more.
    more = np.quantile((beyond - margin).max(axis=1), 1.0 - rare)
    margin = (margin + np.clip(more, 0.0, _MOST)) * spread
    # More than rounding to 6 digits can move an end.
    margin = np.maximum(margin, 1e-5 * np.maximum(np.abs(low), np.abs(high)))
    ends = short(low - margin, 6), short(high + margin, 6)
    median = np.array([np.median(v) if len(v) else np.nan for v in known])
    return Bounds(
        *ends, short(median, 6), np.isfinite(x).all(axis=0), short(_inverse(z), 6),
        float(short(np.quantile(distance, 1.0 - rare))),
    )  # fmt: skip


def _range(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(x)
    some = there.any(axis=0)
    low = np.where(there, x, np.inf).min(axis=0)
    high = np.where(there, x, -np.inf).max(axis=0)
    return np.where(some, low, np.nan), np.where(some, high, np.nan)


def _spread(values: np.ndarray) -> float:
    """Of the middle nine tenths, or of all where those are one value."""
    if not len(values):
        return 0.0
    low, high = np.quantile(values, [0.05, 0.95])
    return float(high - low) or float(np.ptp(values))


def _inverse(z: np.ndarray) -> np.ndarray:
    """Of the covariance of standardised ranks, whose mean is about 0."""
    covariance = np.einsum("ni,nj->ij", z, z) / len(z)
    return np.linalg.inv(covariance + _RIDGE * np.eye(z.shape[1]))


def _distance(z: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    # By BLAS, unlike what is fitted: its last bit decides nothing here but which side of a limit.
    return np.einsum("nc,nc->n", z @ inverse, z)


def reason(code: int, columns: Sequence[str], values: np.ndarray, bounds: Bounds) -> str:
    """What ``Bounds.check`` said of a row, in words; "" for inside."""
    if code == INSIDE:
        return ""
    if code == FAR:
        return "no row of training had such values together"
    if code == MISSING:
        gone = next(n for n, v, c in zip(columns, values, bounds.complete, strict=True)
                    if c and np.isnan(v))  # fmt: skip
        return f"{gone} is unknown; all rows of training had it"
    low, high = bounds.low[code], bounds.high[code]
    return f"{columns[code]} is {values[code]:.3g}; training had {low:.3g} to {high:.3g}"
