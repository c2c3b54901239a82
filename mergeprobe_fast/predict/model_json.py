"""The model file: one readable JSON, read as strictly as any file from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.json_fields import (
    count,
    fields,
    flag,
    many,
    named,
    natural,
    not_negative,
    nullable,
    number,
    of_format,
    text,
)
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.predict.bounds import Bounds
from mergeprobe_fast.predict.columns import EARLY, meaning
from mergeprobe_fast.predict.forest import Forest
from mergeprobe_fast.predict.forest_json import TREE, forest_json, read_forest
from mergeprobe_fast.predict.level import LevelModel, Part
from mergeprobe_fast.predict.linear import Linear, Ranks
from mergeprobe_fast.predict.predictor import Facts, RetentionPredictor
from mergeprobe_fast.predict.recipe import Recipe

FORMAT, VERSION = "mergeprobe-predictor", 1


def write_model(
    predictor: RetentionPredictor, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the file; it appears as a whole or not at all.

    Raises:
        InputError: it exists and ``overwrite`` is not set; it cannot be written.
    """
    content = model_text(predictor)
    with AtomicFile(path, overwrite) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_model(path: str | os.PathLike[str]) -> RetentionPredictor:
    """Read a file of ``write_model``.

    Raises:
        InputError: it cannot be read, is no such file, or holds what it may not.
    """
    value = strict_json.read(path)
    try:
        return from_json(value)
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    except RecursionError:
        raise InputError("is nested too deeply", path=path, key="facts.evaluation") from None


def model_text(predictor: RetentionPredictor) -> str:
    """The file's text: a line for each list, so that people can find their way."""
    return _lines(to_json(predictor), 0) + "\n"


def _lines(value: Any, depth: int) -> str:
    """Objects over several lines, lists of objects too, lists of numbers on one."""
    pad = " " * (depth + 1)
    if isinstance(value, Mapping) and depth < 6 and value:
        inner = ",\n".join(f"{pad}{_compact(k)}: {_lines(v, depth + 1)}" for k, v in value.items())
        return f"{{\n{inner}\n{' ' * depth}}}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Mapping, list, tuple)):
        each = (_compact(v) if _is_tree(v) else _lines(v, depth + 1) for v in value)
        inner = ",\n".join(f"{pad}{v}" for v in each)
        return f"[\n{inner}\n{' ' * depth}]"
    return _compact(value)


def _is_tree(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == set(TREE)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def to_json(predictor: RetentionPredictor) -> dict[str, Any]:
    """What the file holds."""
    facts = dataclasses.asdict(predictor.facts)
    return {
        "format": FORMAT, "version": VERSION,
        "facts": {n: list(v) if isinstance(v, tuple) else v for n, v in facts.items()},
        "recipe": predictor.recipe.to_json(),
        "levels": {name: _level(model) for name, model in predictor.models.items()},
    }  # fmt: skip


def _level(model: LevelModel) -> dict[str, Any]:
    b = model.bounds
    return {
        "columns": [
            {"name": n, "meaning": meaning(n), "low": _or_null(b.low[j]),
             "high": _or_null(b.high[j]), "median": _or_null(b.median[j]),
             "complete": bool(b.complete[j]), "values": model.ranks.values[j].tolist(),
             "ranks": model.ranks.ranks[j].tolist(), "mean": float(model.ranks.mean[j]),
             "deviation": float(model.ranks.deviation[j])}
            for j, n in enumerate(model.columns)
        ],
        "rows": model.rows, "soft": model.soft,
        "intervals": {"below": model.below, "above": model.above},
        "distance": {"limit": b.limit, "inverse": b.inverse.tolist()},
        "scale": None if model.scale is None else forest_json(model.scale),
        "parts": [{"share": p.share, **_part(p.model)} for p in model.parts],
    }  # fmt: skip


def _or_null(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _part(model: Forest | Linear) -> dict[str, Any]:
    if isinstance(model, Forest):
        return {"trees": forest_json(model), "linear": None}
    slopes = model.coefficients.tolist()
    return {"trees": None, "linear": {"intercept": model.intercept, "coefficients": slopes}}


def from_json(value: dict[str, Any]) -> RetentionPredictor:
    """The predictor of such an object; ``Bad`` for what it may not hold."""
    of_format(value, FORMAT, VERSION)
    checked = fields(
        value, "", format=text, version=count, facts=_facts, recipe=_recipe, levels=named(_model)
    )
    recipe, levels = checked["recipe"], checked["levels"]
    if not levels:
        raise Bad("is empty", "levels")
    for name, model in levels.items():
        if model.soft != recipe.soft:
            raise Bad("is not the recipe's", f"levels.{name}.soft")
        if not name.removeprefix(EARLY):
            raise Bad("has no name", "levels")
    return RetentionPredictor(levels, recipe, checked["facts"])


def _recipe(value: Any, where: str) -> Recipe:
    try:
        return Recipe.from_json(value)
    except InputError as error:
        raise Bad(error.reason, f"{where}.{error.key}" if error.key else where) from None


def _facts(value: Any, where: str) -> Facts:
    texts = many(text)
    return Facts(**fields(
        value, where, bases=texts, fingerprints=texts, digest=_any_text, rows=natural,
        merges=natural, adapters=natural, families=natural, domains=texts, operators=texts,
        sizes=many(natural), made_by=_any_text, notes=texts, evaluation=nullable(named(_plain)),
    ))  # fmt: skip


def _any_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Bad("is not a text", where)
    return value


def _plain(value: Any, where: str) -> Any:
    """Anything of JSON whose numbers are finite."""
    if isinstance(value, dict):
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value) in (int, float):
        number(value, where)
    return value


def _model(value: Any, where: str) -> LevelModel:
    top = fields(
        value, where, columns=many(_column, 1), rows=count, soft=_positive,
        intervals=lambda v, w: fields(v, w, below=not_negative, above=not_negative),
        distance=lambda v, w: fields(v, w, limit=not_negative, inverse=many(many(number))),
        scale=lambda v, w: v, parts=many(lambda v, w: (v, w), 1),
    )  # fmt: skip
    columns = top["columns"]
    names = tuple(c["name"] for c in columns)
    if len(set(names)) < len(names):
        raise Bad("a column appears twice", f"{where}.columns")
    inverse = top["distance"]["inverse"]
    if any(len(row) != len(names) for row in (inverse, *inverse)):
        raise Bad("is not square, one row a column", f"{where}.distance.inverse")
    ranks = Ranks(
        [c["values"] for c in columns], [c["ranks"] for c in columns],
        np.array([c["mean"] for c in columns]), np.array([c["deviation"] for c in columns]),
    )  # fmt: skip
    parts = tuple(_read_part(v, w, len(names), ranks) for v, w in top["parts"])
    if abs(math.fsum(p.share for p in parts) - 1.0) > 1e-9:
        raise Bad("shares do not add up to 1", f"{where}.parts")
    scale = None
    if top["scale"] is not None:
        scale = read_forest(top["scale"], f"{where}.scale", len(names) + 2)
    bounds = Bounds(
        *(np.array([c[k] for c in columns], np.float64) for k in ("low", "high", "median")),
        np.array([c["complete"] for c in columns], bool), np.array(inverse, np.float64),
        top["distance"]["limit"],
    )  # fmt: skip
    return LevelModel(
        names, top["soft"], parts, scale, top["intervals"]["below"], top["intervals"]["above"],
        ranks, bounds, top["rows"],
    )  # fmt: skip


def _positive(value: Any, where: str) -> float:
    if number(value, where) <= 0:
        raise Bad("is not positive", where)
    return float(value)


def _column(value: Any, where: str) -> dict[str, Any]:
    found = fields(
        value, where, name=text, meaning=text, low=nullable(number), high=nullable(number),
        median=nullable(number), complete=flag, values=_ascending, ranks=_ascending, mean=number,
        deviation=_positive,
    )  # fmt: skip
    if len(found["values"]) != len(found["ranks"]):
        raise Bad("are not as many as values", f"{where}.ranks")
    known = [found[k] is not None for k in ("low", "high", "median")]
    if any(known) != all(known) or (all(known) and found["low"] > found["high"]):
        raise Bad("low, high and median do not go together", where)
    return found


def _ascending(value: Any, where: str) -> np.ndarray:
    found = np.array(many(number)(value, where), np.float64)
    if (np.diff(found) <= 0).any():
        raise Bad("is not ascending", where)
    return found


def _read_part(value: Any, where: str, columns: int, ranks: Ranks) -> Part:
    found = fields(
        value, where, share=_positive, trees=lambda v, w: v,
        linear=nullable(lambda v, w: fields(v, w, intercept=number, coefficients=many(number))),
    )  # fmt: skip
    if (found["trees"] is None) == (found["linear"] is None):
        raise Bad("needs trees or linear, and not both", where)
    if found["linear"] is None:
        return Part(found["share"], read_forest(found["trees"], f"{where}.trees", columns))
    slopes = found["linear"]["coefficients"]
    if len(slopes) != columns:
        raise Bad("are not one a column", f"{where}.linear.coefficients")
    model = Linear(ranks, found["linear"]["intercept"], np.array(slopes, np.float64))
    return Part(found["share"], model)
