"""Linear classifiers of prompts, small enough for a router: numpy, and the same on every run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

from mergeprobe_fast.errors import InputError

FOLDS = 5
PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # the strongest first: it wins ties
SMOOTHINGS = (10.0, 1.0, 1e-1, 1e-2)
_GRADIENT = 1e-7  # largest entry at which the solver stops; classes differ by 1e-2 and more


@dataclass(frozen=True, eq=False)
class Linear:
    """Scores x W^T + c; the class with the highest is chosen, of equal ones the first.

    Attributes:
        weight: (classes, d) float64.
        bias: (classes,) float64.
        strength: the penalty or smoothing that cross-validation chose; None where there is none.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float | None = None

    @property
    def parameters(self) -> int:
        """How many numbers it keeps."""
        return self.weight.size + self.bias.size

    def choose(self, x: np.ndarray) -> np.ndarray:
        """The class of each row of (n, d) features."""
        return np.argmax(x @ self.weight.T + self.bias, axis=1)


def _one_thread(fit: Callable[..., Linear]) -> Callable[..., Linear]:
    """The order in which BLAS sums depends on its threads."""

    @wraps(fit)
    def fitted(*args: Any) -> Linear:
        with threadpool_limits(1, "blas"):
            return fit(*args)

    return fitted


def folds(y: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The fold, 0 to ``FOLDS - 1``, of each of n examples.

    Examples of one group share a fold, and the groups of a class are dealt out evenly, in an order
    that their names alone decide.

    Raises:
        InputError: a class with fewer than two groups.
    """
    found: dict[str, int] = {}
    for label in np.unique(y):
        mine = {groups[int(i)] for i in np.flatnonzero(y == label)}
        if len(mine) < 2:
            raise InputError("expected two different texts of each domain, or more", key="texts")
        new = sorted(mine - found.keys(), key=lambda name: (zlib.crc32(name.encode()), name))
        found.update({name: place % FOLDS for place, name in enumerate(new)})
    return np.array([found[name] for name in groups])


@_one_thread
def fit_centroids(x: np.ndarray, y: np.ndarray) -> Linear:
    """The class whose mean is nearest, features divided by their standard deviations.

    Args:
        x: (n, d) features.
        y: (n,) classes, 0 to the highest, each at least once.
    """
    mean, spread = _standard(x)
    z = (x - mean) / spread
    centres = np.stack([z[y == k].mean(0) for k in range(y.max() + 1)])
    # |z - m|^2 = |z|^2 - 2 (z m - |m|^2 / 2), and |z|^2 is the same for all classes.
    weight = centres / spread
    return Linear(weight, -weight @ mean - (centres**2).sum(1) / 2)


@_one_thread
def fit_logistic(x: np.ndarray, y: np.ndarray, groups: Sequence[str]) -> Linear:
    """Multinomial logistic regression on standardised features divided by sqrt(d).

    Minimises the mean of -log p(y) plus penalty / 2 |W|^2 (the bias is free), with the penalty
    under which held-out folds are likeliest.

    Args:
        x: (n, d) features.
        y: (n,) classes, 0 to the highest, each at least once.
        groups: of the n examples; those of one are held out together.

    Raises:
        InputError: a class with fewer than two groups; features without a finite solution.
    """
    mean, spread = _standard(x)
    spread = spread * np.sqrt(x.shape[1])
    # The penalty does not see a rotation: W has no part outside the span of the examples.
    u, s, axes = np.linalg.svd((x - mean) / spread, full_matrices=False)
    kept = s > s[0] * max(x.shape) * np.finfo(float).eps
    z, axes = u[:, kept] * s[kept], axes[kept]
    classes, fold = int(y.max()) + 1, folds(y, groups)
    likelihood = np.zeros(len(PENALTIES))
    for held in (fold == k for k in np.unique(fold)):
        for i, w in enumerate(_path(z[~held], y[~held], classes, PENALTIES)):
            likelihood[i] += _log_p(w, z[held])[np.arange(held.sum()), y[held]].sum()
    best = int(likelihood.argmax())
    *_, w = _path(z, y, classes, PENALTIES[: best + 1])
    weight = w[:, :-1] @ axes / spread
    return Linear(weight, w[:, -1] - weight @ mean, PENALTIES[best])


@_one_thread
def fit_bayes(counts: np.ndarray, y: np.ndarray, groups: Sequence[str]) -> Linear:
    """Multinomial naive Bayes of token counts, with the smoothing that held-out folds like best.

    Args:
        counts: (n, d) how often each of d tokens occurs.
        y, groups: as in :func:`fit_logistic`.

    Raises:
        InputError: a class with fewer than two groups.
    """
    classes, fold = int(y.max()) + 1, folds(y, groups)
    likelihood = np.zeros(len(SMOOTHINGS))
    for held in (fold == k for k in np.unique(fold)):
        for i, smoothing in enumerate(SMOOTHINGS):
            weight, bias = _bayes(counts[~held], y[~held], classes, smoothing)
            log_p = log_softmax(counts[held] @ weight.T + bias, axis=1)
            likelihood[i] += log_p[np.arange(held.sum()), y[held]].sum()
    best = SMOOTHINGS[int(likelihood.argmax())]
    return Linear(*_bayes(counts, y, classes, best), best)


def _bayes(
    counts: np.ndarray, y: np.ndarray, classes: int, smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    of = y[None] == np.arange(classes)[:, None]  # (classes, n)
    totals = of.astype(float) @ counts + smoothing
    weight = np.log(totals) - np.log(totals.sum(1, keepdims=True))
    prior = of.sum(1) + 1.0  # a class may be missing from a fold
    return weight, np.log(prior / prior.sum())


def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature; 1 where it never changes."""
    spread = x.std(0)
    constant = spread <= np.abs(x).max(0) * 1e-12  # what rounding makes of equal numbers
    return x.mean(0), np.where(constant, 1.0, spread)


def _log_p(w: np.ndarray, z: np.ndarray) -> np.ndarray:
    return log_softmax(z @ w[:, :-1].T + w[:, -1], axis=1)


def _path(
    z: np.ndarray, y: np.ndarray, classes: int, penalties: Sequence[float]
) -> list[np.ndarray]:
    """Solutions (classes, d + 1), bias last, each the start of the next weaker penalty's."""
    n, shape = len(z), (classes, z.shape[1] + 1)
    right = y[:, None] == np.arange(classes)

    def loss(flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        w = flat.reshape(shape)
        log_p = _log_p(w, z)
        off = (np.exp(log_p) - right) / n
        slope = np.column_stack([off.T @ z + penalty * w[:, :-1], off.sum(0)])
        value = -log_p[right].sum() / n + penalty / 2 * (w[:, :-1] ** 2).sum()
        return value, slope.ravel()

    found, w = [], np.zeros(shape)
    options = {"gtol": _GRADIENT, "ftol": 0.0, "maxiter": 5000, "maxfun": 10000, "maxcor": 20}
    for penalty in penalties:
        done = minimize(loss, w.ravel(), (penalty,), "L-BFGS-B", jac=True, options=options)
        if not np.abs(done.jac).max() <= 100 * _GRADIENT:  # the last digits do not matter
            raise InputError(f"the regression did not converge: {done.message}", key="texts")
        w = done.x.reshape(shape)
        found.append(w)
    return found
