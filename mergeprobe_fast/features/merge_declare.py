"""What a number about a merge and one of its members is: a declaration over common quantities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Level = Literal["weights", "calibration", "points"]
LEVELS: tuple[Level, ...] = ("weights", "calibration", "points")


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the merge M, member i and D = M - W_i in one metric, (sets, widest)."""

    own: np.ndarray  # |W_i|^2
    merged: np.ndarray  # |M|^2
    cross: np.ndarray  # <M, W_i>
    change: np.ndarray  # |D|^2

    @property
    def change_cross(self) -> np.ndarray:
        """<D, W_i>."""
        return self.cross - self.own


@dataclass(frozen=True, eq=False)
class AtPoint:
    """What D does to the loss of member i's own texts at one kind of point, (sets, widest).

    In nats per token: ``first`` its derivative, ``curvature`` half the Fisher's quadratic form
    (mean over texts of a text's tokens times its squared derivative, labels drawn from the model),
    ``observed`` the same with the data's labels, ``absolute`` with the squared mean of absolute
    values for the mean of squares, which few texts cannot rule, ``self_curvature`` that of W_i and
    ``with_self`` the Fisher's bilinear form of D and W_i.
    """

    first: np.ndarray
    curvature: np.ndarray
    absolute: np.ndarray
    observed: np.ndarray
    self_curvature: np.ndarray
    with_self: np.ndarray


@dataclass(frozen=True, eq=False)
class MemberValues:
    """All that declarations may read; arrays are (sets, widest), None where not recorded.

    ``inputs`` weighs each module by the base module's output there, where output moments were
    recorded; ``raw`` does not. ``outside`` is the energy of M on i's inputs that no combination of
    the members has.
    """

    size: np.ndarray
    weights: Products
    inputs: Products | None = None
    raw: Products | None = None
    outside: np.ndarray | None = None
    trained: AtPoint | None = None
    base: AtPoint | None = None
    gain: np.ndarray | None = None  # base loss less own loss; NaN where nothing was learned


@dataclass(frozen=True)
class OwnColumn:
    """A number per adapter, which a merge reads of each member and, if ``beside``, of the others.

    What only says which texts an adapter is of is not read of others: there it would tell domains
    apart that were labelled, and mean nothing for others.
    """

    name: str
    title: str
    level: Level
    beside: bool = True


@dataclass(frozen=True)
class MergeColumn:
    """A number per member of a merge. ``level`` says what has to be recorded for it."""

    name: str
    title: str
    definition: str
    level: Level
    finish: Callable[[MemberValues], np.ndarray]
    low: float | None = None
    high: float | None = None
    source: str = "ours"
