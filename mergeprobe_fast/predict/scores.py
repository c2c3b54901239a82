"""How well held-out rows were predicted, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.predict.labels import Labels, codes

RESAMPLES = 1000
_AT_ONCE = 10_000_000  # draws times members
_FEWEST_SETS = 5  # of an operator, for its regret
_SMALLEST = 3  # rows of a cell in which ranks are compared
_DIGITS = 9  # of predictions: what should be one number is not to be ranked by its rounding


@dataclass(frozen=True, eq=False)
class Held:
    """What a predictor said of held-out rows, (n,) each; NaN where it was not asked.

    ``low`` and ``high`` are None for a predictor without intervals, ``outside`` without bounds.
    """

    name: str
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    outside: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Draws:
    """A number and what it was on each resample of families."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.value - other.value, self.draws - other.draws)

    def json(self) -> dict[str, Any]:
        """Value and the middle 95 % of the draws; None for what is not a number."""
        known = self.draws[np.isfinite(self.draws)]
        interval = None
        if len(known) and np.isfinite(self.value):
            interval = [round(float(q), 6) for q in np.quantile(known, [0.025, 0.975])]
        value = round(float(self.value), 6) if np.isfinite(self.value) else None
        return {"value": value, "interval": interval}


def resampled(labels: Labels, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(count + 1, n): how often each row is drawn when families are, with replacement.

    Row 0 is all ones. A row counts how often its own family was drawn times how often the other
    families of its merge were, in the mean: of two the pigeonhole bootstrap (Owen 2007), whose
    product over many is all but always 0. Rows share adapters, and one by one would look too
    independent.
    """
    own, others = labels.families[:, 0], np.sort(labels.families, axis=1)
    others[:, 1:][others[:, 1:] == others[:, :-1]] = -1
    others[others == own[:, None]] = -1
    number = int(labels.families.max(initial=0)) + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), count)
    drawn = np.hstack([drawn, np.zeros((count, 1), np.int64)]).astype(np.float64)
    beside = np.count_nonzero(others >= 0, axis=1)
    mean = np.ones((count, len(labels)))
    for rows in np.array_split(np.flatnonzero(beside), -(-others.size * count // _AT_ONCE)):
        mean[:, rows] = drawn[:, others[rows]].sum(axis=2) / beside[rows]
    return np.vstack([np.ones(len(labels)), drawn[:, own] * mean])


def spearman(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Draws:
    """Spearman's of predictions and labels; the ranks are those of all rows."""
    return _draws(_correlation(rankdata(_settled(p, y)), rankdata(y), weights, centre=True))


def spearman_within(p: np.ndarray, y: np.ndarray, cell: np.ndarray, weights: np.ndarray) -> Draws:
    """The same of ranks inside cells, less their mean and over the cell's size.

    Cells of fewer than 3 rows are left out; 0 for predictions that are constant in every cell.
    """
    a, b = (centred_ranks(v, cell) for v in (_settled(p, y), y))
    there = np.isfinite(a)
    if there.any() and not a[there].any():
        return Draws(0.0, np.zeros(len(weights) - 1))
    return _draws(_correlation(a[there], b[there], weights[:, there], centre=False))


def mean(values: np.ndarray, weights: np.ndarray) -> Draws:
    """Of what is not NaN."""
    there = np.isfinite(values)
    total = weights[:, there].sum(axis=1)
    sums = np.einsum("dn,n->d", weights[:, there], values[there].astype(np.float64))
    return _draws(_over(sums, total))


def auc(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Draws:
    """How often a row of the worst quarter is predicted below one of the rest."""
    low = y < np.quantile(y, 0.25)
    if low.all() or not low.any():
        return Draws(np.nan, np.full(len(weights) - 1, np.nan))
    settled = _settled(p, y)
    below = settled[low][:, None] < settled[~low]
    wins = below + 0.5 * (settled[low][:, None] == settled[~low])
    one, other = weights[:, low], weights[:, ~low]
    found = np.einsum("dl,dl->d", one, np.einsum("lr,dr->dl", wins, other))
    return _draws(_over(found, one.sum(axis=1) * other.sum(axis=1)))


def ceiling(y: np.ndarray, se: np.ndarray, cell: np.ndarray | None = None) -> float:
    """The correlation that the truth itself would have with the labels, for their noise.

    ``sqrt(1 - mean se^2 / variance)``, inside cells where they are given; NaN without errors or
    where the labels scatter less than their errors say.
    """
    noise = float(np.mean(np.square(se)))
    freedom, left = len(y) - 1, y - y.mean()
    if cell is not None:
        place = np.unique(cell, return_inverse=True)[1].ravel()
        number = np.bincount(place)
        left = y - (np.bincount(place, y) / number)[place]
        freedom = len(y) - len(number)
    variance = float(np.square(left).sum() / freedom) if freedom > 0 else 0.0
    return float(np.sqrt(1 - noise / variance)) if 0 < noise < variance else float("nan")


def score(
    held: Held, labels: Labels, fold: np.ndarray, weights: np.ndarray
) -> dict[str, Draws]:
    """Everything about one predictor, on rows that all have a prediction."""
    y, p = labels.y, held.value
    found = {
        "rho": spearman(p, y, weights),
        "within": spearman_within(p, y, codes(fold, labels.cell), weights),
        "mae": mean(np.abs(p - y), weights),
        "auc": auc(p, y, weights),
    }
    if held.low is not None and held.high is not None:
        inside = (held.low <= y) & (y <= held.high)
        found["coverage"] = mean(inside.astype(np.float64), weights)
        found["width"] = mean(held.high - held.low, weights)
    if held.outside is not None:
        found["outside"] = mean(held.outside.astype(np.float64), weights)
        if held.low is not None:
            kept = np.where(held.outside, np.nan, inside)
            found["coverage_inside"] = mean(kept, weights)
    return found


def regret(held: Held, labels: Labels, weights: np.ndarray) -> dict[str, Draws]:
    """What is lost by choosing a set's operator by predictions and not by measurements.

    Of each set measured under two merges or more, the merge whose worst member is predicted best
    is taken (equals count in equal parts), and its measured worst and mean are held against the
    best there are. Empty without such a set.
    """
    of_set = _Choices(labels)
    if not of_set.sets:
        return {}
    lost = of_set.lost(held.value)
    drawn = weights[:, of_set.rows]
    return {f"regret_{name}": mean(lost[:, k], drawn) for k, name in enumerate(("worst", "mean"))}


def regret_of_fixed(
    held: Held, labels: Labels, weights: np.ndarray, least: int = _FEWEST_SETS
) -> list[dict[str, Any]]:
    """The regret of always taking one operator, beside that of choosing, on the same sets.

    Of the sets that ``regret`` looks at, those that were merged by the operator (by several merges
    of it: their mean counts); operators with fewer than ``least`` are left out. Each has its
    ``name``, how many ``sets``, ``worst`` and ``mean`` as ``Draws``, and ``worst_above`` and
    ``mean_above``: its regret less that of choosing.
    """
    of_set = _Choices(labels)
    if not of_set.sets:
        return []
    ours, out = of_set.lost(held.value), []
    for name in np.unique(labels.operator.astype(str)):
        its = of_set.lost(np.where(labels.operator == name, 0.0, -np.inf))
        has = [bool((labels.operator[of_set.first[of]] == name).any()) for of in of_set.sets]
        at = np.flatnonzero(has)
        if len(at) < least:
            continue
        drawn = weights[:, of_set.rows[at]]
        found: dict[str, Any] = {"name": str(name), "sets": len(at)}
        for k, what in enumerate(("worst", "mean")):
            found[what] = mean(its[at, k], drawn)
            found[f"{what}_above"] = found[what] - mean(ours[at, k], drawn)
        out.append(found)
    return sorted(out, key=lambda row: (row["worst"].value, row["name"]))


class _Choices:
    """The sets that were measured under two merges or more."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._worst, self._mean, self.first, self._inverse = _by_merge(labels)
        number = labels.sets[self.first]
        every = [np.flatnonzero(number == s) for s in np.unique(number)]
        self.sets = [of for of in every if len(of) > 1]  # their merges
        self.rows = np.array([self.first[of[0]] for of in self.sets], np.int64)

    def lost(self, value: np.ndarray) -> np.ndarray:
        """(sets, 2): in the worst member and the mean, by what has the largest least ``value``."""
        predicted = np.full(len(self.first), np.inf)
        np.minimum.at(predicted, self._inverse, _settled(value, self._labels.y))
        out = np.empty((len(self.sets), 2))
        for row, of in zip(out, self.sets, strict=True):
            chosen = of[predicted[of] == predicted[of].max()]
            row[:] = [m[of].max() - m[chosen].mean() for m in (self._worst, self._mean)]
        return out


def _by_merge(labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Measured worst and mean of each merge, its first row, and the merge of each row."""
    _, first, inverse = np.unique(labels.merge, return_index=True, return_inverse=True)
    inverse = inverse.ravel()
    worst = np.full(len(first), np.inf)
    np.minimum.at(worst, inverse, labels.y)
    middle = np.bincount(inverse, labels.y) / np.bincount(inverse)
    return worst, middle, first, inverse


def whole_merges(labels: Labels) -> np.ndarray:
    """(n,) whether all members of a row's merge have a row."""
    _, inverse, count = np.unique(labels.merge, return_inverse=True, return_counts=True)
    return count[inverse.ravel()] >= labels.size


def centred_ranks(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks less their mean within each group, over its size; NaN in groups of fewer than 3."""
    out = np.full(len(x), np.nan)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(rows) >= _SMALLEST:
            out[rows] = (rankdata(x[rows]) - (len(rows) + 1) / 2) / len(rows)
    return out


def rankdata(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values at the mean of theirs."""
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse.ravel()]


def _settled(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.round(p / max(float(np.ptp(y)), 1e-300), _DIGITS)


def _correlation(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, *, centre: bool
) -> np.ndarray:
    """Weighted correlations, one per row of ``weights``; NaN where one side is constant."""
    total = weights.sum(axis=1)

    def average(v: np.ndarray) -> np.ndarray:
        return _over(np.einsum("dn,n->d", weights, v), total)

    mx, my = (average(x), average(y)) if centre else (0.0, 0.0)
    xx, yy = average(x * x) - np.square(mx), average(y * y) - np.square(my)
    size = np.sqrt(np.maximum(xx, 0.0) * np.maximum(yy, 0.0))
    least = 1e-12 * float(np.ptp(x) * np.ptp(y)) if len(x) else 0.0
    return _over(average(x * y) - mx * my, np.where(size > least, size, 0.0))


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    out = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def _draws(values: np.ndarray) -> Draws:
    return Draws(float(values[0]), values[1:])
