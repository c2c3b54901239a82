"""Evaluate a way of predicting on labelled merges: what is predicted is always held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.boosted import xgboost
from mergeprobe_fast.predict.bounds import INSIDE
from mergeprobe_fast.predict.columns import EARLY
from mergeprobe_fast.predict.fit import matrix, plan
from mergeprobe_fast.predict.labels import Labels, codes
from mergeprobe_fast.predict.level import fit_level
from mergeprobe_fast.predict.predictor import RetentionPredictor
from mergeprobe_fast.predict.recipe import Recipe
from mergeprobe_fast.predict.rivals import METADATA, rivals
from mergeprobe_fast.predict.scores import (
    RESAMPLES,
    Draws,
    Held,
    ceiling,
    regret,
    regret_of_fixed,
    resampled,
    score,
    whole_merges,
)
from mergeprobe_fast.predict.splits import (
    SPLITS,
    Fold,
    Split,
    domain_folds,
    family_folds,
    held_out,
    predict_held_out,
)

OURS = "ours"


def evaluate(
    labels: Labels,
    *,
    recipe: Recipe | None = None,
    levels: Mapping[str, Sequence[str]] | None = None,
    own: Sequence[str] = (),
    splits: Sequence[Split] = SPLITS,
    shown: Sequence[str] = (),
    resamples: int = RESAMPLES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fit within every fold of every split, predict what was held out, and score that.

    Args:
        labels, recipe, levels, own: as ``fit`` takes them. Of the levels, all are evaluated.
        splits: names of ``SPLITS``.
        shown: columns that are taken as predictions themselves, say a test of the merge on a few
            items.
        resamples: of families, for the intervals.
        progress: called with 1 after each fold, ``steps`` times.

    Returns:
        What JSON can hold. ``levels``: by level its columns, rows, the reliability ``ceiling`` of
        all and ``ceiling_within``, and ``splits``: by split the folds and ``predictors``, each with
        its scores as {value, interval}: rho, within, mae, auc; ours also coverage, width, outside,
        coverage_inside; regret_worst, regret_mean where sets were merged in several ways; and
        over_metadata, within_over_metadata: how far rho and within are above that rival's. A split
        that cannot be made has a ``reason`` instead. ``sizes``: ours by how many were merged;
        ``always``: the regret of taking one operator always, on the sets that it was measured on,
        and how far above ours that is.

    Raises:
        InputError: as ``fit``.
    """
    recipe = recipe or Recipe()
    if recipe.boosted_share or recipe.scale_rounds:
        xgboost()
    for name in shown:
        if name not in labels.columns:
            raise InputError("the labels have no such column of numbers", key=name)
    out = {}
    for level, columns, rows in plan(labels, levels, own):
        part = labels.part(rows)
        weights = resampled(part, resamples)
        found = {}
        for split in splits:
            try:
                folds = held_out(part, split)
                fold, held = _held(part, folds, level, columns, recipe, shown, progress)
            except InputError as error:
                found[split] = {"reason": error.reason}
                continue
            found[split] = _scored(part, fold, held, weights) | {"folds": len(folds)}
        out[level] = _of_rows(part) | {"columns": list(columns), "splits": found}
    return {"recipe": recipe.to_json(), "resamples": resamples, "levels": out}


def evaluate_model(
    predictor: RetentionPredictor, labels: Labels, *, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Score a fitted predictor, as it is, on labels that it should not have seen.

    Returns:
        As ``evaluate``, with one split, "as it is"; ``same_labels`` says that the predictor was
        fitted on one of these very files, and that its scores mean nothing.

    Raises:
        InputError: no level has its columns in the labels.
    """
    out = {}
    base, fingerprint = (
        found[0] if len(found) == 1 else None for found in (labels.bases, labels.fingerprints)
    )
    for early in (False, True):
        names = {n.removeprefix(EARLY): n for n in labels.columns if n.startswith(EARLY) == early}
        columns = {n: labels.columns[name] for n, name in names.items()}
        if not columns:
            continue
        try:
            found = predictor.predict(columns, early=early, base=base, fingerprint=fingerprint)
        except InputError:
            continue
        there = np.isfinite(found.retention)
        if there.any():
            part = labels.part(there)
            sure = found.calibrated
            held = Held(
                OURS, found.retention[there], found.low[there] if sure else None,
                found.high[there] if sure else None, found.outside[there] if sure else None,
            )  # fmt: skip
            fold = np.zeros(len(part), np.int64)
            scored = _scored(part, fold, [held], resampled(part, resamples))
            out[f"{EARLY if early and not sure else ''}{found.level}"] = _of_rows(part) | {
                "columns": sorted(columns), "reason": found.reason,
                "splits": {"as it is": scored | {"folds": 1}},
            }  # fmt: skip
    if not out:
        raise InputError("no level of the model has its columns in the labels", key="labels")
    same = not set(labels.digest.split()).isdisjoint(predictor.facts.digest.split())
    return {"recipe": predictor.recipe.to_json(), "resamples": resamples, "same_labels": same,
            "levels": out}  # fmt: skip


def steps(
    labels: Labels, levels: Mapping[str, Sequence[str]] | None = None, own: Sequence[str] = (),
    splits: Sequence[Split] = SPLITS,
) -> int:  # fmt: skip
    """How often ``evaluate`` calls its progress."""
    total = 0
    for _, _, rows in plan(labels, levels, own):
        for split in splits:
            try:
                total += len(held_out(labels.part(rows), split))
            except InputError:
                continue
    return total


def _held(
    labels: Labels, folds: list[Fold], level: str, columns: Sequence[str], recipe: Recipe,
    shown: Sequence[str], progress: Callable[[int], None] | None,
) -> tuple[np.ndarray, list[Held]]:  # fmt: skip
    def learn(seen: Labels, asked: Labels) -> dict[str, np.ndarray]:
        model = fit_level(
            columns, matrix(seen, level, columns), seen.y, seen.se,
            family_folds(seen, recipe.folds, recipe.seed),
            domain_folds(seen, recipe.folds, recipe.seed), recipe,
        )  # fmt: skip
        x = matrix(asked, level, columns)
        value, low, high, codes = model.answer(x)
        if progress is not None:
            progress(1)
        others = rivals(seen, asked, level, recipe)
        return {"": value, " low": low, " high": high, " outside": codes != INSIDE, **others}

    fold, found = predict_held_out(labels, folds, learn)
    value, low, high, outside = (found.pop(n) for n in ("", " low", " high", " outside"))
    held = [Held(OURS, value, low, high, outside == 1.0)]
    held += [Held(name, values) for name, values in found.items()]
    held += [Held(name, labels.columns[name]) for name in shown]
    return fold, held


def _scored(
    labels: Labels, fold: np.ndarray, held: Sequence[Held], weights: np.ndarray
) -> dict[str, Any]:
    there = np.all([np.isfinite(h.value) for h in held], axis=0) & (fold >= 0)
    if np.count_nonzero(there) < 3:
        return {"reason": "fewer than 3 rows were predicted", "predictors": []}
    part, rows = labels.part(there), fold[there]
    weights = weights[:, there]
    held = [Held(h.name, *(None if v is None else v[there] for v in (
        h.value, h.low, h.high, h.outside))) for h in held]  # fmt: skip
    found = {h.name: score(h, part, rows, weights) for h in held}
    whole = whole_merges(part)
    fixed: list[dict[str, Any]] = []
    if whole.any():
        first = Held(held[0].name, held[0].value[whole])
        fixed = regret_of_fixed(first, part.part(whole), weights[:, whole])
        for h in held:
            complete = Held(h.name, h.value[whole])
            found[h.name] |= regret(complete, part.part(whole), weights[:, whole])
    for name, scores in found.items():
        if name != METADATA and METADATA in found:
            for key, of in (("over_metadata", "rho"), ("within_over_metadata", "within")):
                scores[key] = scores[of] - found[METADATA][of]
    ours = held[0]
    sizes = {
        str(size): {"rows": int(np.count_nonzero(part.size == size))} | {
            k: v.json() for k, v in score(
                Held(OURS, *(None if v is None else v[part.size == size] for v in (
                    ours.value, ours.low, ours.high, ours.outside))),
                part.part(part.size == size), rows[part.size == size],
                weights[:, part.size == size]).items()
        }
        for size in np.unique(part.size) if np.count_nonzero(part.size == size) >= 3
    }  # fmt: skip
    return {
        "rows": int(there.sum()),
        "predictors": [
            {"name": name} | {key: value.json() for key, value in scores.items()}
            for name, scores in found.items()
        ],
        "sizes": sizes,
        "always": [
            {k: v.json() if isinstance(v, Draws) else v for k, v in row.items()} for row in fixed
        ],
    }


def _of_rows(labels: Labels) -> dict[str, Any]:
    found = {
        "rows": len(labels), "merges": len(np.unique(labels.merge)),
        "adapters": len(np.unique(labels.members[labels.members >= 0])),
        "operators": sorted({str(o) for o in labels.operator}),
    }  # fmt: skip
    for key, cell in (("ceiling", None), ("ceiling_within", codes(labels.cell))):
        value = ceiling(labels.y, labels.se, cell)
        found[key] = round(value, 6) if np.isfinite(value) else None
    return found
