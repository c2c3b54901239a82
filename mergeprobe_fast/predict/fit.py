"""Fit a predictor on labelled merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

import mergeprobe_fast
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.boosted import xgboost
from mergeprobe_fast.predict.columns import in_table, levels_of
from mergeprobe_fast.predict.labels import Labels
from mergeprobe_fast.predict.level import FEWEST, LevelModel, fit_level
from mergeprobe_fast.predict.predictor import Facts, RetentionPredictor
from mergeprobe_fast.predict.recipe import Recipe
from mergeprobe_fast.predict.splits import domain_folds, family_folds


def matrix(labels: Labels, level: str, columns: Sequence[str]) -> np.ndarray:
    """(n, columns) of a level."""
    names = [in_table(level, name) for name in columns]
    return np.column_stack([np.asarray(labels.columns[n], np.float64) for n in names])


def fit(
    labels: Labels,
    *,
    recipe: Recipe | None = None,
    levels: Mapping[str, Sequence[str]] | None = None,
    own: Sequence[str] = (),
    notes: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> RetentionPredictor:
    """A predictor of what each member of a merge keeps.

    Args:
        labels: rows (merge, member) with columns.
        recipe: how; default: ``Recipe()``.
        levels: the columns of each level by its name, which begins with "early:" for snapshots;
            default: the columns of merges that the labels have, and ``own`` in each.
        own: further columns of the labels that every level reads.
        notes: for the model's card.
        progress: called with 1 after each fold, ``steps(labels, ...)`` times in all.

    A level is fitted on the rows that have a value in one of the columns it adds to the level
    before. The same labels and recipe give the same model.

    Raises:
        InputError: xgboost is not installed; a column is missing; no level has ``FEWEST`` rows or
            two families.
    """
    recipe = recipe or Recipe()
    if recipe.boosted_share or recipe.scale_rounds:
        xgboost()
    models: dict[str, LevelModel] = {}
    for level, columns, rows in plan(labels, levels, own):
        part = labels.part(rows)
        models[level] = fit_level(
            columns, matrix(part, level, columns), part.y, part.se,
            family_folds(part, recipe.folds, recipe.seed),
            domain_folds(part, recipe.folds, recipe.seed), recipe, progress,
        )  # fmt: skip
    return RetentionPredictor(models, recipe, _facts(labels, notes))


def steps(
    labels: Labels, recipe: Recipe | None = None,
    levels: Mapping[str, Sequence[str]] | None = None, own: Sequence[str] = (),
) -> int:  # fmt: skip
    """How often ``fit`` calls its progress."""
    recipe = recipe or Recipe()
    return sum(
        len(deal(labels.part(rows), recipe.folds, recipe.seed))
        for _, _, rows in plan(labels, levels, own) for deal in (family_folds, domain_folds)
    )


def plan(
    labels: Labels, levels: Mapping[str, Sequence[str]] | None, own: Sequence[str]
) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """The levels to fit: name, columns, and a mask of the rows.

    Raises:
        InputError: a column that is missing; no level with enough rows.
    """
    for name in own:
        if name not in labels.columns:
            raise InputError("the labels have no such column of numbers", key=name)
    found = levels_of(labels.columns, own) if levels is None else levels
    out: list[tuple[str, tuple[str, ...], np.ndarray]] = []
    before: set[str] = set()
    for level, columns in found.items():
        names = [in_table(level, c) for c in columns]
        for name in names:
            if name not in labels.columns:
                raise InputError("the labels have no such column of numbers", key=name)
        new = [n for n in names if n not in before] or names
        before = set(names)
        rows = np.isfinite([labels.columns[n] for n in new]).any(axis=0)
        families = labels.families[rows]
        if np.count_nonzero(rows) >= FEWEST and len(np.unique(families[families >= 0])) > 1:
            out.append((level, tuple(columns), rows))
    if not out:
        reason = f"no level has {FEWEST} rows of two families; columns that are known: "
        raise InputError(reason + (", ".join(found) or "none"), key="labels")
    return out


def _facts(labels: Labels, notes: Sequence[str]) -> Facts:
    domains = sorted({a.domain for a in labels.adapters} - {""})
    return Facts(
        bases=labels.bases, fingerprints=labels.fingerprints, digest=labels.digest,
        rows=len(labels), merges=len(np.unique(labels.merge)), adapters=len(labels.adapters),
        families=len({a.family for a in labels.adapters}), domains=tuple(domains),
        operators=tuple(sorted({str(o) for o in labels.operator} - {""})),
        sizes=tuple(int(s) for s in np.unique(labels.size)),
        made_by=f"mergeprobe_fast {mergeprobe_fast.__version__}", notes=tuple(notes),
    )  # fmt: skip
