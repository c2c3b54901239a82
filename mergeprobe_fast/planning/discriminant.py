"""Which class a vector belongs to: linear discriminants with a shrunk covariance, closed form.

The scores are those of classes with one normal covariance S each and equal priors,

    score_k(x) = m_k' S^-1 x - m_k' S^-1 m_k / 2,

with S = (1 - l) W + l tr(W)/d I, W the covariance within classes of the features divided by their
standard deviations (Friedman 1989; l = 1 is the nearest mean). There are fewer examples than
features: S^-1 is had from a thin SVD of the examples, one for all l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from mergeprobe_fast import _env

SHRINKAGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # the strongest first: it wins ties
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Scores x W^T + c, the highest wins, of equal ones the first."""

    weight: np.ndarray  # (classes, d) float64
    bias: np.ndarray  # (classes,) float64
    shrinkage: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        """(n, classes) of (n, d) features."""
        return x @ self.weight.T + self.bias


def folds(y: np.ndarray) -> np.ndarray:
    """The fold of each example: those of a class are dealt out in turn, in their order."""
    fold = np.zeros(len(y), np.int64)
    for label in np.unique(y):
        mine = np.flatnonzero(y == label)
        fold[mine] = np.arange(len(mine)) % FOLDS
    return fold


@_env.one_blas_thread()
def fit(x: np.ndarray, y: np.ndarray) -> Discriminant:
    """The discriminant under which held-out folds are likeliest.

    Args:
        x: (n, d) features, float64.
        y: (n,) classes 0, 1, ..., each at least twice.
    """
    fold = folds(y)
    likelihood = np.zeros(len(SHRINKAGES))
    for held in (fold == k for k in np.unique(fold)):
        for i, found in enumerate(_path(x[~held], y[~held], SHRINKAGES)):
            log_p = log_softmax(found.scores(x[held]), axis=1)
            likelihood[i] += log_p[np.arange(held.sum()), y[held]].sum()
    return _path(x, y, [SHRINKAGES[int(likelihood.argmax())]])[0]


def choose_held_out(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The class of every example from a fit, its shrinkage too, to the other folds only: (n,).

    Each class has three examples or more.
    """
    chosen = np.full(len(y), -1)
    fold = folds(y)
    for held in (fold == k for k in np.unique(fold)):
        chosen[held] = fit(x[~held], y[~held]).scores(x[held]).argmax(axis=1)
    return chosen


def _path(x: np.ndarray, y: np.ndarray, shrinkages: Sequence[float]) -> list[Discriminant]:
    """A discriminant for each shrinkage."""
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread <= np.abs(x).max(0) * 1e-12, 1.0, spread)  # rounding of equal numbers
    z = (x - mean) / spread
    centres = np.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    _, s, axes = np.linalg.svd(z - centres[y], full_matrices=False)
    along = centres @ axes.T  # of the centres along the axes of W
    variance = s**2 / len(z)
    typical = variance.sum() / z.shape[1] or 1.0  # all examples equal their centres: nearest one
    found = []
    for l in shrinkages:  # noqa: E741
        rest = l * typical
        inverse = 1 / ((1 - l) * variance + rest)
        solved = centres / rest + (along * (inverse - 1 / rest)) @ axes
        bias = -(solved * centres).sum(1) / 2
        weight = solved / spread
        found.append(Discriminant(weight, bias - weight @ mean, l))
    return found
