"""What a predictor must beat: each is fitted in the same folds, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergeprobe_fast.predict.columns import EARLY, in_table, score
from mergeprobe_fast.predict.labels import Labels
from mergeprobe_fast.predict.level import fit_parts, outer
from mergeprobe_fast.predict.linear import fit_linear
from mergeprobe_fast.predict.recipe import Recipe
from mergeprobe_fast.predict.splits import family_folds

MEAN, CELL = "mean", "mean of domain pair"
METADATA = "metadata + domains"  # of the adapters, and the operator's name
COSINE, NORM = "cosine only", "norm ratio only"
CLOSED = "closed form, no fit"
_SINGLE = {COSINE: "change_cosine", NORM: "change_to_self"}
_FEWEST = 3  # labels that a mean is taken of


def rivals(seen: Labels, asked: Labels, level: str, recipe: Recipe) -> dict[str, np.ndarray]:
    """Predictions of the rows of ``asked`` by every rival that their columns allow."""
    out = {
        MEAN: np.full(len(asked), seen.y.mean()),
        CELL: _cell_mean(seen, asked),
        METADATA: _metadata(seen, asked, recipe),
    }
    for name, column in _SINGLE.items():
        column = in_table(level, column)
        if column in seen.columns:
            x, new = (v.columns[column][:, None] for v in (seen, asked))
            folds = family_folds(seen, recipe.folds, recipe.seed) if _families(seen) > 1 else []
            out[name] = fit_linear(x, seen.y, np.ones(len(x)), folds, 0.0).predict(new)
    early = level.startswith(EARLY)
    own = {
        n.removeprefix(EARLY): v for n, v in asked.columns.items() if n.startswith(EARLY) == early
    }
    closed, words = score(own)
    if words:
        out[CLOSED] = np.where(np.isfinite(closed), closed, seen.y.mean())
    return out


def _families(labels: Labels) -> int:
    return len(np.unique(labels.families[labels.families >= 0]))


def _cell_mean(seen: Labels, asked: Labels) -> np.ndarray:
    """The mean of the finest cell with labels enough: own domain, the others, the operator."""
    keys = [_cells(labels) for labels in (seen, asked)]
    out = np.full(len(asked), seen.y.mean())
    for parts in (1, 2, 3):
        known: dict[object, list[float]] = {}
        for key, y in zip(keys[0], seen.y, strict=True):
            known.setdefault(key[:parts], []).append(y)
        for row, key in enumerate(keys[1]):
            own = known.get(key[:parts], ())
            if len(own) >= _FEWEST:
                out[row] = np.mean(own)
    return out


def _cells(labels: Labels) -> list[tuple[str, tuple[str, ...], str]]:
    return [
        (row[0], tuple(sorted(d for d in row[1:] if d)), str(operator))
        for row, operator in zip(labels.of("domain"), labels.operator, strict=True)
    ]


def _metadata(seen: Labels, asked: Labels, recipe: Recipe) -> np.ndarray:
    """Our ensemble on how adapters were trained, for what domains, how many, and how merged."""
    names = sorted({n for a in seen.adapters for n in a.recipe})
    domains = sorted({a.domain for a in seen.adapters})
    operators = sorted({str(o) for o in seen.operator})
    x, new = (metadata(labels, names, domains, operators) for labels in (seen, asked))
    folds = family_folds(seen, recipe.folds, recipe.seed) if _families(seen) > 1 else []
    parts = fit_parts(x, seen.y, seen.se, folds, recipe)
    return outer(sum(p.share * p.model.predict(new) for p in parts), recipe.soft)


def metadata(
    labels: Labels, names: Sequence[str], domains: Sequence[str], operators: Sequence[str] = ()
) -> np.ndarray:
    """(n, columns): the numbers of a row's own adapter, mean and largest of the others, domains,
    operators and how many are merged."""
    table = np.full((len(labels.adapters) + 1, len(names)), np.nan)
    for i, adapter in enumerate(labels.adapters):
        if adapter.recipe:
            table[i] = [adapter.recipe.get(n, 0.0 if "=" in n else np.nan) for n in names]
    values, there = table[labels.members], labels.members >= 0
    others = values[:, 1:]
    known = np.isfinite(others)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.where(known, others, 0.0).sum(axis=1) / known.sum(axis=1)
    largest = np.where(known, others, -np.inf).max(axis=1, initial=-np.inf)
    of = labels.of("domain")
    told = [of[:, 0] == d for d in domains]
    told += [((of[:, 1:] == d) & there[:, 1:]).sum(axis=1) for d in domains]
    told += [labels.operator.astype(str) == o for o in operators]
    return np.column_stack([
        values[:, 0], middle, np.where(np.isfinite(largest), largest, np.nan),
        np.array(told, np.float64).T, labels.size,
    ])  # fmt: skip
