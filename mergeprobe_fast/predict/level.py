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

    def answer(
        self, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Retention, low, high and what ``Bounds.check`` says, (n,) each, from (n, columns)."""
        z = self.ranks(x)
        found = _inner(self.parts, x, z)
        middle, size = outer(found.mean, self.soft), np.ones(len(x))
        if self.scale is not None:
            size = np.exp(self.scale.predict(_told(x, found)))
        low = np.clip(middle - self.below * size, *RETENTION)
        high = np.clip(middle + self.above * size, *RETENTION)
        codes = self.bounds.check(x, z)
        return middle, np.minimum(low, middle), np.maximum(high, middle), codes

    def contributions(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A constant and (columns,) of one row; they add up to ``inner`` of its prediction."""
        constant, out = 0.0, np.zeros(len(self.columns))
        for part in self.parts:
            own, each = part.model.contributions(x)
            constant += part.share * own
            out += part.share * each
        return constant, out

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


def _inner(parts: Sequence[Part], x: np.ndarray, z: np.ndarray | None = None) -> _Inner:
    """``z``: the ranks of ``x``, where they are known."""
    each = [
        p.model.predict(x, z) if isinstance(p.model, Linear) else p.model.predict(x) for p in parts
    ]
    mean = sum(p.share * t for p, t in zip(parts, each, strict=True))
    return _Inner(mean, np.ptp(np.array(each), axis=0))


def _told(x: np.ndarray, found: _Inner) -> np.ndarray:
    """What the size of an error is learnt from."""
    return np.column_stack([x, found.mean, found.spread])


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
    apart: Folds, recipe: Recipe, advance: Callable[[int], None] | None = None,
) -> LevelModel:  # fmt: skip
    """Fit on (n, columns) rows; ``folds`` hold out families, ``apart`` pairs of domains, if any.

    Intervals are conformal: the errors of rows that were held out, over the scale that was learnt
    from the errors of other rows (locally weighted, Lei et al. 2018; folds as the CV+ of Barber
    et al. 2021, about the model of all rows). Each side has its own quantile. Both kinds of folds
    count alike: a new adapter meets domains that were merged before, and such that were not; by
    families alone, intervals were too narrow for the latter. ``advance`` is called per fold.

    Raises:
        InputError: the folds leave too little to learn from.
    """
    found: list[_Errors] = []
    for kind in (folds, apart):
        for number, (test, gone) in enumerate(kind):
            left = ~gone
            if np.count_nonzero(left) >= FEWEST // 2:
                inside = [(t[left], g[left]) for k, (t, g) in enumerate(folds)
                          if kind is not folds or k != number]  # fmt: skip
                parts = fit_parts(x[left], y[left], se[left], inside, recipe)
                said = _inner(parts, x[test])
                error = y[test] - outer(said.mean, recipe.soft)
                found.append(_Errors(np.flatnonzero(test), error, _told(x[test], said)))
            if advance is not None:
                advance(1)
        if not found:
            reason = f"no fold of families leaves {FEWEST // 2} rows to learn from"
            raise InputError(reason, key="labels")
    scale, scores = _scaled(found, recipe)
    ranks = ranks_of(x)
    return LevelModel(
        tuple(columns), recipe.soft, fit_parts(x, y, se, folds, recipe), scale,
        _quantile(-scores, recipe.coverage), _quantile(scores, recipe.coverage), ranks,
        bounds_of(x, ranks, folds, recipe.rare), len(y),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Errors:
    """Of one fold: numbers of the rows held out, their errors, and what a size is learnt from."""

    rows: np.ndarray
    error: np.ndarray
    told: np.ndarray


def _scaled(found: Sequence[_Errors], recipe: Recipe) -> tuple[Forest | None, np.ndarray]:
    """The model of sizes, and all errors over the size that other rows' errors say."""
    rows, error = (np.concatenate([getattr(f, n) for f in found]) for n in ("rows", "error"))
    if not recipe.scale_rounds or len(np.unique(rows)) < _SCALE_ROWS:
        return None, error
    told = np.concatenate([f.told for f in found])
    scores = []
    for fold in found:
        others = ~np.isin(rows, fold.rows)
        size = np.ones(len(fold.rows))
        if np.count_nonzero(others) >= _SCALE_ROWS // 2:
            size = np.exp(_fit_scale(told[others], error[others], recipe).predict(fold.told))
        scores.append(fold.error / size)
    return _fit_scale(told, error, recipe), np.concatenate(scores)


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
