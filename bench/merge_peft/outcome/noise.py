"""How far a number measured on a few items, or on a few adapters, would move on others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SURE = 2.0  # standard errors that a difference must have before anything is divided by it
FEWEST_SETS = 5  # merged sets that an interval over adapters needs
_SIDES = (2.5, 97.5)


def counts_of(size: int, name: str, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of ``size`` things is drawn: (resamples, size) float64, rows sum to ``size``.

    The same for the same name.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size) * 1.0


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, and what it was on each resample: (resamples,).

    Estimates from one ``Bootstrap`` were resampled together, so that what they share cancels.
    """

    value: float
    draws: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)

    def exp(self) -> Estimate:
        """Its exponential."""
        return Estimate(float(np.exp(self.value)), np.exp(self.draws))

    def over(self, other: Estimate) -> Estimate | None:
        """The ratio to another; None where that is 0.

        The draws are those of the ratio linearised at its value (the delta method): a resample in
        which the denominator happens to be near 0 would otherwise be all of the variance.
        """
        if other.value == 0:
            return None
        value = self.value / other.value
        return Estimate(value, value + (self.draws - value * other.draws) / other.value)

    @property
    def se(self) -> float:
        """The standard error."""
        return float(self.draws.std(ddof=1))

    @property
    def interval(self) -> tuple[float, float]:
        """It holds 95 % of the draws."""
        low, high = np.percentile(self.draws, _SIDES)
        return float(low), float(high)

    @property
    def sure(self) -> bool:
        """Whether it is away from 0 by more than ``SURE`` standard errors."""
        return abs(self.value) > SURE * self.se


class Bootstrap:
    """A paired bootstrap over the items of one exam.

    Items of equal key come and go together. Every run over these items is resampled in the same
    way, so that differences and ratios of runs get the error they have.

    Args:
        keys: (n,) of the items.
        refuse: (n,) as ``stages.evaluate.Scores`` has it.
        name: the seed.
        resamples: how many.
    """

    def __init__(
        self, keys: Sequence[str], refuse: np.ndarray, name: str, resamples: int = RESAMPLES
    ) -> None:
        of = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        self._cluster = np.array([of[key] for key in keys])
        self._refuse = np.asarray(refuse)
        self._clusters = len(of)
        # The first row is what was measured: every cluster once.
        drawn = counts_of(self._clusters, name, resamples)
        self._counts = np.concatenate([np.ones((1, self._clusters)), drawn])

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """(1 + resamples,) of the sum of (n,) values."""
        of = np.bincount(self._cluster, np.asarray(values, np.float64), self._clusters)
        # Not by BLAS, whose last bits may depend on its threads.
        return np.einsum("rc,c->r", self._counts, of)

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of (n,) values."""
        return _estimate(self._sums(values) / self._sums(np.ones(len(self._cluster))))

    def utility(self, correct: np.ndarray) -> Estimate:
        """The utility as ``stages.evaluate.Scores.utility`` defines it, of (n,) booleans.

        Refusal items count with their balanced accuracy, on each resample anew; a resample
        without one of the two sides has that of the other.
        """
        correct = np.asarray(correct, np.float64)
        sides = [self._refuse == side for side in (0, 1)]
        asked = [self._sums(side) for side in sides]
        right = [self._sums(side * correct) for side in sides]
        with np.errstate(invalid="ignore"):
            shares = np.array([r / a for r, a in zip(right, asked, strict=True)])
        there = np.array(asked) > 0
        balanced = np.where(there, shares, 0).sum(0) / np.maximum(there.sum(0), 1)
        others = self._sums((self._refuse < 0) * correct)
        return _estimate((others + balanced * sum(asked)) / self._sums(np.ones(len(self._cluster))))


def _estimate(found: np.ndarray) -> Estimate:
    return Estimate(float(found[0]), found[1:])


class Crossed:
    """A bootstrap over rows that share adapters: means of rows with an interval.

    Rows are crossed by two factors: whose loss it is, and with whom it was merged, an adapter for
    pairs and else the set. Adapters are drawn, for both factors at once, and sets; a row weighs
    the product of how often its two were drawn (Owen 2007, the pigeonhole bootstrap: it errs on
    the wide side).

    Args:
        members: (rows,) the adapter whose row it is.
        others: (rows,) the set without it, one name for pairs.
        name: the seed.
    """

    def __init__(
        self, members: Sequence[str], others: Sequence[tuple[str, ...]], name: str,
        resamples: int = RESAMPLES,
    ) -> None:  # fmt: skip
        partners = [
            o[0] if len(o) == 1 else tuple(sorted({m, *o}))
            for m, o in zip(members, others, strict=True)
        ]
        codes: dict[frozenset[str], int] = {}
        self._sets = np.array(
            [codes.setdefault(frozenset({m, *o}), len(codes))
             for m, o in zip(members, others, strict=True)], np.int64,
        )  # fmt: skip
        adapters = sorted({*members, *(p for p in partners if isinstance(p, str))})
        sets = sorted({p for p in partners if not isinstance(p, str)})
        places = {thing: n for n, thing in enumerate([*adapters, *sets])}
        counts = counts_of(len(adapters), name, resamples) if adapters else np.ones((resamples, 0))
        if sets:
            counts = np.hstack([counts, counts_of(len(sets), f"{name}, sets", resamples)])
        first, second = ([places[t] for t in things] for things in (members, partners))
        self._weights = counts[:, first] * counts[:, second]

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """Holds 95 % of the weighted means of (rows,) values, of which NaN are left out.

        None where they are of fewer than ``FEWEST_SETS`` merged sets: it would be too narrow.
        """
        values = np.asarray(values, np.float64)
        there = ~np.isnan(values)
        if len(np.unique(self._sets[there])) < FEWEST_SETS:
            return None
        weights = self._weights[:, there]
        total = weights.sum(1)
        sums = np.einsum("rn,n->r", weights, values[there])
        low, high = np.percentile(sums[total > 0] / total[total > 0], _SIDES)
        return float(low), float(high)
