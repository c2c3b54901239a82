"""How a predictor is fitted: every number that is a choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mergeprobe_fast.errors import InputError

_FROM_ZERO = {"boosted_share", "extra_share", "linear_share", "boost_ridge", "boost_child_weight",
              "seed", "scale_rounds", "noise", "lasso"}  # fmt: skip
_UP_TO_ONE = {"boost_rate", "boost_rows", "boost_columns", "extra_columns", "lasso", "coverage",
              "rare"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """Choices of a fit. The model file holds them.

    Attributes:
        soft: labels y are learnt as ``-log(max(1 - y, 0) + soft)``: differences near full
            retention count, those among the ruined do not.
        boosted_share, extra_share, linear_share: how much each model counts in their mean.
        boost_*: gradient-boosted trees: repetitions with other seeds, rounds, depth, learning
            rate, shares of rows (a tree) and columns (a split), least weight of a leaf, ridge.
        extra_*: extremely randomised trees: how many, rows of a leaf, share of columns a split.
        lasso: of the sparse linear model's penalty, the share that is absolute values.
        noise: standard error of a label that halves its weight against one without error.
        folds: of families, and as many of pairs of domains, to learn how far predictions of unseen
            ones are off.
        scale_*: the small boosted trees that say how far, row by row.
        coverage: of the intervals.
        rare: of rows of unseen adapters, the share that each rule may call outside.
        seed: of everything random.
    """

    soft: float = 0.07
    boosted_share: float = 0.45
    extra_share: float = 0.35
    linear_share: float = 0.2
    boost_seeds: int = 1
    boost_rounds: int = 200
    boost_depth: int = 3
    boost_rate: float = 0.05
    boost_rows: float = 0.7
    boost_columns: float = 0.3
    boost_child_weight: float = 3.0
    boost_ridge: float = 3.0
    extra_count: int = 30
    extra_leaf: int = 5
    extra_columns: float = 0.34
    lasso: float = 0.5
    noise: float = 0.1
    folds: int = 6
    scale_rounds: int = 60
    scale_depth: int = 2
    coverage: float = 0.9
    rare: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            if type(value) is not int and (whole or type(value) is not float):
                reason = f"expected {'an integer' if whole else 'a number'}, got {value!r}"
                raise InputError(reason, key=field.name)
            least = value >= 0 if field.name in _FROM_ZERO else value > 0
            if not least or (field.name in _UP_TO_ONE and value > 1) or value > 1e6:
                raise InputError(f"{value!r} is out of range", key=field.name)
        if self.boosted_share + self.extra_share + self.linear_share <= 0:
            raise InputError("nothing is left to predict with", key="boosted_share")
        if self.coverage >= 1:
            raise InputError("must be below 1", key="coverage")
        if self.folds < 2:
            raise InputError("must be at least 2", key="folds")

    def to_json(self) -> dict[str, Any]:
        """What the model file says."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Recipe:
        """The recipe of such an object.

        Raises:
            InputError: an unknown or missing field, a value out of range.
        """
        if not isinstance(value, dict):
            raise InputError("is not an object")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in (*value, *names):
            if name not in names or name not in value:
                reason = "is missing" if name in names else "is not a field of this format"
                raise InputError(reason, key=name)
        whole = {f.name for f in dataclasses.fields(cls) if f.type == "int"}
        return cls(**{
            n: float(v) if type(v) is int and n not in whole else v for n, v in value.items()
        })  # fmt: skip
