"""One level's model: an ensemble, how far it may be off, and where it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.boosted import fit_boosted
from mergeprobe_fast.predict.bounds import Bounds, bounds_of
from mergeprobe_fast.predict.columns import RETENTION
from mergeprobe_fast.predict.extra import fit_extra
from mergeprobe_fast.predict.forest import Forest
from mergeprobe_fast.predict.linear import Folds, Linear, Ranks, fit_linear, ranks_of, short
from mergeprobe_fast.predict.recipe import Recipe

FEWEST = 20  # rows to fit a level on
_FLOOR = 0.01  # of retention: errors below are as good as none
_SCALE_ROWS = 60  # from which on errors are told apart row by row


@dataclass(frozen=True, eq=False)
class Part:
    """A model of the ensemble and how much it counts."""

    share: float
    model: Forest | Linear


@dataclass(frozen=True, eq=False)
class LevelModel:
    """Retention from the columns of one level.

    Attributes:
        columns: in the order of the models' numbers.
        soft: of ``Recipe``.
        parts: their shares add up to 1.
        scale: log of the absolute error from the columns, the prediction and how much the parts
            differ; None: one size for all.
        below, above: errors over their scale that intervals reach, downwards and upwards.
        ranks, bounds: where it answers.
        rows: of the training set.
    """

    columns: tuple[str, ...]
    soft: float
    parts: tuple[Part, ...]
    scale: Forest | None
    below: float
    above: float
    ranks: Ranks
    bounds: Bounds
    rows: int

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Retention, low and high, (n,) each, from (n, columns)."""
        middle, size = _predicted(self.parts, self.soft, self.scale, x)
        low = np.clip(middle - self.below * size, *RETENTION)
        return middle, np.minimum(low, middle), np.clip(
            np.maximum(middle + self.above * size, middle), *RETENTION
        )  # fmt: skip

    def contributions(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A constant and (columns,) of one row; they add up to ``inner`` of its prediction."""
        constant, out = 0.0, np.zeros(len(self.columns))
        for part in self.parts:
            own, each = part.model.contributions(x)
            constant += part.share * own
            out += part.share * each
        return constant, out

    def inner(self, x: np.ndarray) -> np.ndarray:
        """(n,) what the models predict: minus the log of damage plus ``soft``."""
        return _inner(self.parts, x).mean

    def outer(self, inner: np.ndarray) -> np.ndarray:
        """The retention of it."""
        return outer(inner, self.soft)


def inner(y: np.ndarray, soft: float) -> np.ndarray:
    """What is learnt of retention y: ``-log(max(1 - y, 0) + soft)``."""
    return -np.log(np.maximum(1.0 - y, 0.0) + soft)


def outer(t: np.ndarray, soft: float) -> np.ndarray:
    """The retention of which ``inner`` made t."""
    with np.errstate(over="ignore"):
        return np.clip(1.0 + soft - np.exp(-t), *RETENTION)


@dataclass(frozen=True, eq=False)
class _Inner:
    mean: np.ndarray
    spread: np.ndarray  # largest less smallest of the parts


def _inner(parts: Sequence[Part], x: np.ndarray) -> _Inner:
    each = [p.model.predict(x) for p in parts]
    mean = sum(p.share * t for p, t in zip(parts, each, strict=True))
    return _Inner(mean, np.ptp(np.array(each), axis=0))


def _told(x: np.ndarray, found: _Inner) -> np.ndarray:
    """What the size of an error is learnt from."""
    return np.column_stack([x, found.mean, found.spread])


def _predicted(
    parts: Sequence[Part], soft: float, scale: Forest | None, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    found = _inner(parts, x)
    size = np.ones(len(x)) if scale is None else np.exp(scale.predict(_told(x, found)))
    return outer(found.mean, soft), size


def fit_parts(
    x: np.ndarray, y: np.ndarray, se: np.ndarray, folds: Folds, recipe: Recipe
) -> tuple[Part, ...]:
    """The ensemble of (n, columns) rows; ``folds`` choose the linear model's penalty."""
    t = inner(y, recipe.soft)
    weights = recipe.noise**2 / (recipe.noise**2 + se**2) if recipe.noise else np.ones(len(t))
    weights = weights / weights.mean()
    total = recipe.boosted_share + recipe.extra_share + recipe.linear_share
    parts = []
    if recipe.boosted_share:
        share = recipe.boosted_share / total / recipe.boost_seeds
        for k in range(recipe.boost_seeds):
            parts.append(Part(share, fit_boosted(
                x, t, weights, rounds=recipe.boost_rounds, depth=recipe.boost_depth,
                rate=recipe.boost_rate, rows=recipe.boost_rows, columns=recipe.boost_columns,
                child_weight=recipe.boost_child_weight, ridge=recipe.boost_ridge,
                seed=recipe.seed + k,
            )))  # fmt: skip
    if recipe.extra_share:
        parts.append(Part(recipe.extra_share / total, fit_extra(
            x, t, weights, count=recipe.extra_count, leaf=recipe.extra_leaf,
            columns=recipe.extra_columns, seed=recipe.seed,
        )))  # fmt: skip
    if recipe.linear_share:
        parts.append(
            Part(recipe.linear_share / total, fit_linear(x, t, weights, folds, recipe.lasso))
        )
    return tuple(parts)


def fit_level(
    columns: Sequence[str], x: np.ndarray, y: np.ndarray, se: np.ndarray, folds: Folds,
    recipe: Recipe, advance: Callable[[int], None] | None = None,
) -> LevelModel:  # fmt: skip
    """Fit on (n, columns) rows; ``folds`` hold out families, ``advance`` is called per fold.

    Intervals are conformal: the errors of rows whose family was held out, over the scale that was
    learnt from the other folds' errors (locally weighted, Lei et al. 2018; folds as the CV+ of
    Barber et al. 2021, about the model of all rows). Each side has its own quantile.

    Raises:
        InputError: the folds leave too little to learn from.
    """
    middle, told = np.full(len(y), np.nan), np.full((len(y), x.shape[1] + 2), np.nan)
    fold = np.full(len(y), -1)
    for number, (test, gone) in enumerate(folds):
        left = ~gone
        if np.count_nonzero(left) >= FEWEST // 2:
            inside = [(t[left], g[left]) for k, (t, g) in enumerate(folds) if k != number]
            parts = fit_parts(x[left], y[left], se[left], inside, recipe)
            found = _inner(parts, x[test])
            middle[test], told[test] = outer(found.mean, recipe.soft), _told(x[test], found)
            fold[test] = number
        if advance is not None:
            advance(1)
    known = np.isfinite(middle)
    if not known.any():
        reason = f"no fold of families leaves {FEWEST // 2} rows to learn from"
        raise InputError(reason, key="labels")
    error = np.where(known, y - middle, 0.0)
    size = np.ones(len(y))
    scale = None
    if recipe.scale_rounds and np.count_nonzero(known) >= _SCALE_ROWS:
        for k in np.unique(fold[known]):
            others = known & (fold != k)
            if np.count_nonzero(others) >= _SCALE_ROWS // 2:
                size[fold == k] = np.exp(
                    _fit_scale(told[others], error[others], recipe).predict(told[fold == k])
                )
        scale = _fit_scale(told[known], error[known], recipe)
    scores = error[known] / size[known]
    ranks = ranks_of(x)
    return LevelModel(
        tuple(columns), recipe.soft, fit_parts(x, y, se, folds, recipe), scale,
        _quantile(-scores, recipe.coverage), _quantile(scores, recipe.coverage), ranks,
        bounds_of(x, ranks, folds, recipe.rare), len(y),
    )  # fmt: skip


def _fit_scale(told: np.ndarray, error: np.ndarray, recipe: Recipe) -> Forest:
    return fit_boosted(
        told, np.log(np.abs(error) + _FLOOR), np.ones(len(error)), rounds=recipe.scale_rounds,
        depth=recipe.scale_depth, rate=0.1, rows=recipe.boost_rows, columns=0.5, child_weight=10.0,
        ridge=recipe.boost_ridge, seed=recipe.seed,
    )  # fmt: skip


def _quantile(scores: np.ndarray, coverage: float) -> float:
    """The score that a new one exceeds in half of what ``coverage`` leaves, at most."""
    number = len(scores)
    rank = min(int(np.ceil((number + 1) * (1 + coverage) / 2)), number)
    return max(float(short(np.sort(scores)[rank - 1])), 0.0)
