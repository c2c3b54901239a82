"""What a run trains, merges and measures: declarations, nothing is done here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from mergeprobe_fast.errors import InputError

from ..public.hub import draw
from ..tasks.build import build
from ..tasks.item import Item
from ..tasks.twists import TWISTS
from ..tasks.words import Split
from .recipe import Recipe

BASE = "base"
Weights = Literal["one", "mean", "reweighted", "minimax"]


@dataclass(frozen=True)
class Exam:
    """What an adapter was trained for: test items are drawn from it, and calibration texts.

    ``name`` is also the domain of a calibration. ``tasks`` are those of ``domain``, all by default.
    ``twist`` names another behaviour on the same questions (``tasks.twists``). ``data`` is a folder
    of public sets (``public.hub``): ``tasks`` are sets there, all that are wanted.
    """

    name: str
    domain: str
    tasks: tuple[str, ...] = ()
    twist: str = ""
    data: str = ""

    def items(self, split: Split, count: int, seed: int) -> list[Item]:
        """``count`` items, the same for the same arguments.

        Raises:
            InputError: a name that does not exist, or fewer items than asked for.
        """
        if self.data:
            found = draw(self.data, self.domain, self.tasks, split, count, seed)
        else:
            found = build(
                self.domain, split=split, count=count, seed=seed, tasks=self.tasks or None
            )
        if not self.twist:
            return found
        if self.twist not in TWISTS:
            raise InputError(f"{self.twist!r} is none of {', '.join(TWISTS)}", key="twist")
        return [TWISTS[self.twist](item) for item in found]


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter to train, and what it is measured on.

    It is trained on ``items`` of the split train of its ``exam``, drawn with the recipe's seed.
    """

    name: str
    exam: str
    recipe: Recipe
    items: int = 384
    note: str = ""  # why it is there: "near-duplicate of math-0", "shares two tasks with code-1"


@dataclass(frozen=True)
class Operator:
    """A row of the operator table: a method of ``mergeprobe_fast.MERGE_METHODS``, fully chosen.

    Attributes:
        name: unique; what tables and rows call it.
        weights: one per member; 1, 1/N, or what ``mergeprobe_fast.set_features`` finds best
            ("reweighted": E7, "minimax": E8).
        rank: of the result; None: the method's own.
        calibration: the sequences of each exam it may learn from, 0: none.
        swapped: each member gets the calibration of another exam: what a wrong one does.
    """

    name: str
    method: str
    weights: Weights = "one"
    rank: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 0
    swapped: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether it is a weighted sum and nothing else."""
        return self.method == "cat" and self.rank is None and not self.arguments


@dataclass(frozen=True)
class MergePlan:
    """Members to merge with an operator; ``study`` is what it is there for.

    pairs: cross-domain pairs, same: pairs of one domain, sets: of 3 and 5, capacity: many in one,
    broken: cases that are meant to fail.
    """

    operator: str
    members: tuple[str, ...]
    study: str = "pairs"

    @property
    def key(self) -> str:
        """Unique in a run: "ties(math-0+code-1)"."""
        return f"{self.operator}({'+'.join(self.members)})"


def single_key(adapter: str) -> str:
    """The key of an adapter on its own."""
    return f"single({adapter})"


@dataclass(frozen=True)
class Tier:
    """One size of the benchmark.

    Attributes:
        name, about: what it is called, and how long it takes where.
        seed: of test items and calibration texts; recipes have their own.
        exams, adapters, operators, merges: by name or key.
        crossed: adapters that are measured on each other's exams, for routers.
        test_items, calibration_items: of each exam.
        gradients: the calibration of all items also has gradients, and points of all adapters.
    """

    name: str
    about: str
    seed: int
    exams: Mapping[str, Exam]
    adapters: Mapping[str, AdapterPlan]
    operators: Mapping[str, Operator]
    merges: Mapping[str, MergePlan]
    crossed: tuple[str, ...] = ()
    test_items: int = 128
    calibration_items: int = 48
    gradients: bool = False

    def __post_init__(self) -> None:
        """Names that do not fit each other are a mistake of whoever wrote the tier."""
        for adapter in self.adapters.values():
            exam = self.exams[adapter.exam]
            if (exam.domain, exam.tasks) != (adapter.recipe.domain, adapter.recipe.tasks):
                raise InputError(f"is trained for another exam than {exam.name}", key=adapter.name)
        for operator in self.operators.values():
            if operator.calibration > self.calibration_items:
                reason = f"wants {operator.calibration} texts of {self.calibration_items} an exam"
                raise InputError(reason, key=operator.name)
        for merge in self.merges.values():
            if merge.operator not in self.operators:
                raise InputError(f"there is no operator {merge.operator!r}", key=merge.key)
            for member in merge.members:
                if member not in self.adapters:
                    raise InputError(f"there is no adapter {member!r}", key=merge.key)
            if len({*merge.members}) < len(merge.members) or len(merge.members) < 2:
                raise InputError("expected two different members, or more", key=merge.key)

    @property
    def first_layer(self) -> int:
        """The lowest layer that any adapter touches."""
        return min(a.recipe.layers[0] for a in self.adapters.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all but ``about``: runs of different tiers are not to be mixed."""
        declared = asdict(self) | {"about": ""}
        for exam in declared["exams"].values():
            if not exam["data"]:
                del exam["data"]  # came later than the first runs, which go on
        return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()

    def only(self, keys: Sequence[str]) -> Tier:
        """The part that the merges with these keys need, and no more.

        Raises:
            InputError: a key that the tier does not have.
        """
        for key in keys:
            if key not in self.merges:
                raise InputError(f"tier {self.name} has no such merge", key=key)
        merges = {key: self.merges[key] for key in keys}
        members = {name for merge in merges.values() for name in merge.members}
        adapters = {name: a for name, a in self.adapters.items() if name in members}
        # Calibrations are of one exam at a time, so that a part has the same as the whole.
        exams = {a.exam for a in adapters.values()}
        return replace(
            self, merges=merges, adapters=adapters, crossed=(), gradients=False,
            exams={name: exam for name, exam in self.exams.items() if name in exams},
            operators={n: o for n, o in self.operators.items()
                       if n in {m.operator for m in merges.values()}},
        )  # fmt: skip
