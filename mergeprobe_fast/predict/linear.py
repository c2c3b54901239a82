"""A sparse linear model on ranks: what is left to say about adapters unlike those of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_KNOTS = 48  # of a column's ranks, at most
_PENALTIES = 20
_SMALLEST = 3e-3  # of the penalty at which everything is 0
_SWEEPS, _SETTLED = 150, 1e-3  # the second of t, whose deviation is about 1

Folds = Sequence[tuple[np.ndarray, np.ndarray]]  # masks: to predict, not to learn from


def short(values: np.ndarray | float, digits: int = 9) -> np.ndarray:
    """Rounded to so many digits, as the model file holds it: what was fitted is what is written."""
    flat = [float(f"{v:.{digits}g}") for v in np.asarray(values, np.float64).ravel()]
    return np.array(flat).reshape(np.shape(values))


@dataclass(frozen=True, eq=False)
class Ranks:
    """Columns as their ranks among the training rows, mean 0 and deviation 1 there.

    Attributes:
        values, ranks: of each column the knots between which ranks are interpolated; beyond them
            a rank stays what it is at the end. Fewer than two: the column is always 0.
        mean, deviation: (columns,) of the ranks.
    """

    values: Sequence[np.ndarray]
    ranks: Sequence[np.ndarray]
    mean: np.ndarray
    deviation: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, columns) standardised ranks; 0, the middle, for NaN."""
        out = np.zeros(x.shape[::-1])
        for j, (v, r) in enumerate(zip(self.values, self.ranks, strict=True)):
            if len(v) > 1:
                out[j] = np.interp(np.ascontiguousarray(x[:, j]), v, r)  # of NaN it is NaN
                out[j] -= self.mean[j]
                out[j] /= self.deviation[j]
        out[np.isnan(out)] = 0.0
        return out.T


def ranks_of(x: np.ndarray) -> Ranks:
    """The ranks of (n, columns) training rows, NaN left out."""
    values, ranks, mean, deviation = [], [], np.zeros(x.shape[1]), np.ones(x.shape[1])
    for j in range(x.shape[1]):
        known = x[np.isfinite(x[:, j]), j]
        found, number = np.unique(short(known, 6), return_counts=True)
        of = (np.cumsum(number) - number / 2) / max(len(known), 1)
        knots = np.linspace(0, len(found) - 1, min(_KNOTS, len(found)))
        keep = np.unique(knots.round().astype(int))
        found, of = found[keep], short(of[keep], 5)
        if len(found) > 1:
            at = np.interp(known, found, of)
            mean[j], deviation[j] = short(at.mean()), short(at.std())
        values.append(found)
        ranks.append(of)
    return Ranks(values, ranks, mean, deviation)


@dataclass(frozen=True, eq=False)
class Linear:
    """``intercept`` + ranks times ``coefficients``, most of which are 0."""

    ranks: Ranks
    intercept: float
    coefficients: np.ndarray

    def predict(self, x: np.ndarray, z: np.ndarray | None = None) -> np.ndarray:
        """(n,) from (n, columns); ``z``: the ranks of ``x``, where they are known."""
        z = self.ranks(x) if z is None else z
        return self.intercept + np.einsum("nc,c->n", z, self.coefficients)

    def contributions(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A constant and (columns,) what each column adds to it for one row."""
        return self.intercept, self.ranks(np.asarray(x, np.float64)[None])[0] * self.coefficients

    def used(self, columns: int) -> np.ndarray:
        """(columns,) whether it counts."""
        return self.coefficients != 0


def fit_linear(
    x: np.ndarray, t: np.ndarray, weights: np.ndarray, folds: Folds, lasso: float
) -> Linear:
    """An elastic net whose penalty predicts the folds' held-out rows best (Zou & Hastie 2005)."""
    ranks = ranks_of(x)
    z = ranks(x)
    # Ranks are of all rows of the fit, labels of none: the folds only choose a penalty.
    sizes = _largest(z, t, weights, lasso) * np.geomspace(1.0, _SMALLEST, _PENALTIES)
    errors = np.zeros(_PENALTIES)
    for test, gone in folds:
        left = ~gone
        if test.any() and np.count_nonzero(left) >= 3:
            intercepts, slopes = _path(z[left], t[left], weights[left], sizes, lasso)
            wrong = intercepts[:, None] + np.einsum("pc,nc->pn", slopes, z[test]) - t[test]
            errors += np.einsum("pn,n->p", np.square(wrong), weights[test])
    intercepts, slopes = _path(z, t, weights, sizes, lasso)
    best = int(errors.argmin())
    return Linear(ranks, float(short(intercepts[best])), short(slopes[best]))


def _largest(z: np.ndarray, t: np.ndarray, weights: np.ndarray, lasso: float) -> float:
    """The penalty at which all coefficients are 0."""
    w = weights / weights.sum()
    level = np.einsum("n,n->", w, t)
    pull = np.abs(np.einsum("nc,n->c", z, w * (t - level))).max(initial=0.0)
    return max(float(pull) / max(lasso, 0.05), 1e-12)


def _path(
    z: np.ndarray, t: np.ndarray, weights: np.ndarray, sizes: np.ndarray, lasso: float
) -> tuple[np.ndarray, np.ndarray]:
    """(penalties,) intercepts and (penalties, columns), all penalties descending side by side."""
    w = weights / weights.sum()
    centre, level = np.einsum("n,nc->c", w, z), float(np.einsum("n,n->", w, t))
    u = z - centre
    # einsum: BLAS may add up in another order on another number of threads.
    gram = np.einsum("ni,nj->ij", u, u * w[:, None])
    pull = np.einsum("nc,n->c", u, w * (t - level))
    out = np.zeros((len(sizes), z.shape[1]))
    slope = np.tile(pull, (len(sizes), 1))  # of the squared error, where ``out`` is
    soft, shrunk = sizes * lasso, sizes * (1.0 - lasso)
    known = [(j, gram[j, j]) for j in range(len(gram)) if gram[j, j] > 1e-12]
    for _ in range(_SWEEPS):
        before = out.copy()
        for j, own in known:
            towards = slope[:, j] + out[:, j] * own
            # What lies within the penalty of 0 becomes 0; np.clip is slow on a few numbers.
            new = (towards - np.minimum(np.maximum(towards, -soft), soft)) / (own + shrunk)
            slope -= np.multiply.outer(new - out[:, j], gram[j])
            out[:, j] = new
        if np.abs(out - before).max() < _SETTLED:
            break
    return level - np.einsum("pc,c->p", out, centre), out
