"""The predictor that users hold: columns of merges in, retention with intervals out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.bounds import INSIDE, reason
from mergeprobe_fast.predict.columns import EARLY, meaning, score
from mergeprobe_fast.predict.level import LevelModel
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
class Prediction:
    """Retention of members of merges. Arrays have the shape of the columns.

    Attributes:
        retention: 1: all the adapter had learned is still there; 0: nothing; NaN: undefined.
        low, high: hold it in ``coverage`` of the cases; NaN where no interval is claimed.
        outside: the row is unlike those of training: the numbers are there, but not to rely on.
        level: of the model that answered, say "calibration"; "score": a closed form did.
        calibrated: False: a closed form on a base model that the predictor has not seen, or
            without the columns of any level; it ranks, and its scale means little.
        coverage: of the intervals; NaN where there are none.
        reason: in words why this level, and the commonest reason of rows outside.
    """

    retention: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    level: str
    calibrated: bool
    coverage: float
    reason: str
    _why: Mapping[int, str] = field(default_factory=dict, repr=False)
    _codes: np.ndarray | None = field(default=None, repr=False)

    def why(self, *row: int) -> str:
        """Why the row with these indices is outside; "" where it is not."""
        if self._codes is None:
            return ""
        at = int(np.ravel_multi_index(row, self.retention.shape))
        return self._why.get(at, "")


@dataclass(frozen=True)
class Explanation:
    """What one row's prediction is made of, by path attribution (``forest.contributions``).

    Attributes:
        level, retention: of the prediction.
        constant: what is predicted before any column is known, on the scale that is learnt: minus
            the log of damage.
        contributions: (column, its value, what it adds on that scale), the largest first; they and
            ``constant`` add up to ``total``, whose retention is the prediction.
        sentence: the first of them in words.
    """

    level: str
    retention: float
    constant: float
    total: float
    contributions: tuple[tuple[str, float, float], ...]
    sentence: str


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

        The richest level answers whose columns are all there, each known in some row. On a base
        that the predictor does not know, or that is not named, a closed form answers.

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
        level = self._level(values, early)
        if level is None:
            return self._scored(values, shape, "no level has its columns")
        model = self.models[level]
        x = _matrix(values, model.columns)
        there = np.isfinite(x).any(axis=1)
        found = [np.full(len(x), np.nan) for _ in range(3)]
        codes = np.full(len(x), INSIDE)
        if there.any():
            for into, values_ in zip(found, model.predict(x[there]), strict=True):
                into[there] = values_
            codes[there] = model.bounds.check(x[there], model.ranks)
        why = _Reasons(codes, x, model)
        out = codes != INSIDE
        text = f"level {level}"
        if out.any():
            text += f"; {why.commonest()} ({out.sum()} of {there.sum()} rows are outside)"
        retention, low, high = (v.reshape(shape) for v in found)
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
        level = self._level(values, early)
        if level is None:
            raise InputError("no level has its columns", key="columns")
        model = self.models[level]
        try:
            at = int(np.ravel_multi_index(row if isinstance(row, tuple) else (row,), shape))
        except ValueError:
            raise InputError(f"{row} is no row of shape {shape}", key="row") from None
        x = _matrix(values, model.columns)[at]
        if not np.isfinite(x).any():
            raise InputError(f"row {row} has no value", key="row")
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

    def _level(self, values: Mapping[str, np.ndarray], early: bool) -> str | None:
        for level in reversed(self.models):
            needed = self.models[level].columns
            if level.startswith(EARLY) == early and all(
                n in values and np.isfinite(values[n]).any() for n in needed
            ):
                return level
        return None

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


class _Reasons(Mapping[int, str]):
    """The reason of each row outside, made when asked for."""

    def __init__(self, codes: np.ndarray, x: np.ndarray, model: LevelModel) -> None:
        self._codes, self._x, self._model = codes, x, model

    def __getitem__(self, row: int) -> str:
        if self._codes[row] == INSIDE:
            raise KeyError(row)
        model = self._model
        return reason(int(self._codes[row]), model.columns, self._x[row], model.bounds)

    def __iter__(self):
        return iter(np.flatnonzero(self._codes != INSIDE).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self._codes != INSIDE))

    def commonest(self) -> str:
        """The reason of the first row that has the most frequent code."""
        out = self._codes[self._codes != INSIDE]
        codes, counts = np.unique(out, return_counts=True)
        return self[int(np.flatnonzero(self._codes == codes[counts.argmax()])[0])]


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
