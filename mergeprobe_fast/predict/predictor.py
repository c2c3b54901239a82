"""The predictor that users hold: columns of merges in, retention with intervals out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.bounds import INSIDE
from mergeprobe_fast.predict.columns import EARLY, meaning, score
from mergeprobe_fast.predict.level import LevelModel
from mergeprobe_fast.predict.prediction import Explanation, Prediction, Reasons
from mergeprobe_fast.predict.recipe import Recipe

DEFAULT = Path(__file__).parent / "data" / "default.json"
UNCALIBRATED = "score"  # Prediction.level where no model answers


@dataclass(frozen=True)
class Facts:
    """What a predictor was fitted on.

    Attributes:
        bases: names of base models; none: unknown, and no base is refused.
        fingerprints: of their configurations, as calibrations have them.
        digest: SHA-256 of the file of labels; "" where there was none.
        evaluation: of ``predict.evaluate``, as JSON has it; None: not evaluated.
    """

    bases: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    digest: str = ""
    rows: int = 0
    merges: int = 0
    adapters: int = 0
    families: int = 0
    domains: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    made_by: str = ""
    notes: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class RetentionPredictor:
    """Predicts what members of merges keep.

    Attributes:
        models: by level, poorest first; "early:..." are for snapshots of unfinished training.
        recipe: how they were fitted.
        facts: on what.
    """

    models: Mapping[str, LevelModel]
    recipe: Recipe
    facts: Facts

    @classmethod
    def load_default(cls) -> RetentionPredictor:
        """The predictor that is shipped; its card is beside it."""
        return cls.load(DEFAULT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RetentionPredictor:
        """Read a model file.

        Raises:
            InputError: anything wrong with it.
        """
        from mergeprobe_fast.predict.model_json import read_model

        return read_model(path)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model file, as a whole or not at all.

        Raises:
            InputError: it exists and ``overwrite`` is not set; it cannot be written.
        """
        from mergeprobe_fast.predict.model_json import write_model

        write_model(self, path, overwrite=overwrite)

    @property
    def levels(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(self.models)

    @property
    def coverage(self) -> float:
        """Of the intervals."""
        return self.recipe.coverage

    def knows(self, base: str | None, fingerprint: str | None = None) -> bool:
        """Whether it was fitted on this base model.

        By the fingerprint of its configuration where both sides have one, else by its name.
        """
        if not self.facts.bases and not self.facts.fingerprints:
            return True
        if fingerprint is not None and self.facts.fingerprints:
            return fingerprint in self.facts.fingerprints
        return base is not None and base in self.facts.bases

    def predict(
        self, columns: Mapping[str, Any], *, early: bool = False, base: str | None = None,
        fingerprint: str | None = None,
    ) -> Prediction:  # fmt: skip
        """Retention of rows.

        Args:
            columns: arrays of one shape by name, NaN where unknown; others than a level's are not
                read. A table that knows its ``base_model`` need not be told ``base``.
            early: they are of snapshots.
            base: the base model's name; ``fingerprint``: of its configuration, as a calibration
                has it (``config_sha256``).

        Each row is answered by the richest level whose columns are all there and that knows, of
        that row, whatever it knew of all rows of training; by the poorest level where none does.
        On a base that the predictor does not know, or that is not named, a closed form answers.

        Raises:
            InputError: columns of different shapes; no level and no closed form has its columns.
        """
        values = {n: v for n, v in columns.items() if _is_number(v)}
        shape = _shape(values)
        base = getattr(columns, "base_model", None) if base is None else base
        fingerprint = getattr(columns, "fingerprint", None) if fingerprint is None else fingerprint
        if not self.knows(base, fingerprint):
            told = "the base model is not named" if base is None else f"{base!r} is not among them"
            known = ", ".join(self.facts.bases)
            return self._scored(values, shape, f"fitted on {known}; {told}")
        found = self._answering(values, early)
        if not found:
            return self._scored(values, shape, "no level has its columns")
        rows = int(np.prod(shape))
        answers = [np.full(rows, np.nan) for _ in range(3)]
        codes = np.full(rows, INSIDE)
        for _, own, x, model in found:
            *said, codes[own] = model.answer(x)
            for into, values_ in zip(answers, said, strict=True):
                into[own] = values_
        why = Reasons(codes, [part[1:] for part in found])
        # The richest of those that answer as many rows.
        level = max(found, key=lambda part: len(part[1]))[0]
        text, there = f"level {level}", sum(len(part[1]) for part in found)
        for name, own, _, _ in found:
            if name != level and len(own):
                text += f"; level {name} for {len(own)} of {there} rows, which lack columns"
        if len(why):
            text += f"; {why.commonest()} ({len(why)} of {there} rows are outside)"
        out = codes != INSIDE
        retention, low, high = (v.reshape(shape) for v in answers)
        return Prediction(
            retention, low, high, out.reshape(shape), level, True, self.coverage, text, why, codes
        )

    def explain(
        self, columns: Mapping[str, Any], row: int | tuple[int, ...] = 0, *, early: bool = False
    ) -> Explanation:
        """What the prediction of one row is made of; no base is asked for.

        Raises:
            InputError: as ``predict``; the row has no value.
        """
        values = {n: v for n, v in columns.items() if _is_number(v)}
        shape = _shape(values)
        try:
            at = int(np.ravel_multi_index(row if isinstance(row, tuple) else (row,), shape))
        except ValueError:
            raise InputError(f"{row} is no row of shape {shape}", key="row") from None
        found = self._answering({n: np.ravel(v)[at : at + 1] for n, v in values.items()}, early)
        if not found:
            raise InputError("no level has its columns", key="columns")
        level, _, x, model = next((part for part in found if len(part[1])), found[0])
        if not len(x):
            raise InputError(f"row {row} has no value", key="row")
        x = x[0]
        constant, each = model.contributions(x)
        order = np.argsort(-np.abs(each), kind="stable")
        total = constant + float(each.sum())
        retention = float(model.outer(np.array([total]))[0])
        parts = tuple((model.columns[j], float(x[j]), float(each[j])) for j in order if each[j])
        if parts:
            name, value, share = parts[0]
            is_ = "unknown" if np.isnan(value) else f"{value:.3g}"
            median = model.bounds.median[model.columns.index(name)]
            does = "speaks most for it" if share > 0 else "speaks most against it"
            sentence = f"{meaning(name)} ({name}) is {is_}, usually {median:.3g}: {does}."
        else:
            sentence = "No column tells it from the average."
        return Explanation(level, retention, constant, total, parts, sentence)

    def _answering(
        self, values: Mapping[str, np.ndarray], early: bool
    ) -> list[tuple[str, np.ndarray, np.ndarray, LevelModel]]:
        """Of each level whose columns are there, richest first: the rows that it answers and x."""
        able = [
            (level, model) for level, model in reversed(self.models.items())
            if level.startswith(EARLY) == early and all(n in values for n in model.columns)
        ]  # fmt: skip
        out = []
        left: np.ndarray | None = None
        for level, model in able:
            x = _matrix(values, model.columns)
            left = np.arange(len(x)) if left is None else left
            known = np.isfinite(x[left])
            knows = known.any(axis=1)
            if model is not able[-1][1]:
                knows &= known[:, model.bounds.complete].all(axis=1)
            own = left[knows]
            out.append((level, own, x[own], model))
            left = left[~knows]
            if not len(left):
                break
        return out

    def _scored(
        self, values: Mapping[str, np.ndarray], shape: tuple[int, ...], why: str
    ) -> Prediction:
        retention, words = score(values)
        if not words:
            raise InputError(f"{why}, and no closed form has its column", key="columns")
        none = np.full(shape, np.nan)
        return Prediction(
            retention.reshape(shape), none, none.copy(), np.zeros(shape, bool), UNCALIBRATED,
            False, float("nan"), f"uncalibrated, {words}: {why}",
        )  # fmt: skip


def _is_number(values: Any) -> bool:
    return np.asarray(values).dtype.kind in "fiub"


def _shape(values: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = {np.shape(v) for v in values.values()}
    if len(shapes) != 1:
        found = f"columns of different shapes, {sorted(shapes)}" if shapes else "no columns"
        raise InputError(found, key="columns")
    return shapes.pop()


def _matrix(values: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    x = np.column_stack([np.asarray(values[n], np.float64).ravel() for n in names])
    x[np.isinf(x)] = np.nan
    return x
