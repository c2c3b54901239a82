"""A finished plan: its groups, what they cost and keep, and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.planning.book import Book
from mergeprobe_fast.planning.costs import Costs
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.table import PairTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

if TYPE_CHECKING:
    from mergeprobe_fast.planning.served import Served


@dataclass(frozen=True)
class PlannedAdapter:
    """One adapter of a plan: its name, where it lies, and its calibration domain, if any.

    ``fingerprint`` (``io.fingerprint``) is of what was planned with; None: of no files.
    """

    name: str
    path: str
    domain: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a way to serve all adapters keeps and costs; ``allowed``: the floor holds."""

    resident: int
    cost: float
    average: float
    worst: float
    floor: float
    allowed: bool = True


@dataclass(frozen=True, eq=False)
class Plan:
    """Groups of adapters, each merged into one or a single one that stays as it is.

    Attributes:
        groups: the largest first.
        routed_cost: of keeping every adapter; ``one_sum``: of one sum of all, None if unknown.
        level, calibrated, coverage, reason: of the predictions, see :class:`.Judge`.
        proven: no other partition costs less.
        decided: False where the predictor abstains from everything.
        judged: sets that each action was asked for.
        curve: the plan at several floors, what is kept against how many are resident.
        resident: at most so many groups were allowed; None: any number.
        highest: then, whether the floor is the highest that so many can keep, not one asked for.
        pairs: what the best action leaves of the members of every pair; None after ``load``.
    """

    adapters: tuple[PlannedAdapter, ...]
    base_model: str | None
    calibration: str | None
    costs: Costs
    actions: tuple[str, ...]
    groups: tuple[Group, ...]
    cost: float
    routed_cost: float
    one_sum: Outcome | None
    level: str
    calibrated: bool
    coverage: float | None
    reason: str
    early: bool
    proven: bool
    decided: bool
    judged: Mapping[str, int]
    notes: tuple[str, ...] = ()
    curve: tuple[Outcome, ...] = ()
    pairs: PairTable | None = field(default=None, repr=False)
    book: Book | None = field(default=None, repr=False)
    resident: int | None = None
    highest: bool = False

    def __repr__(self) -> str:
        merged = sum(g.merged for g in self.groups)
        return (f"<Plan of {len(self.adapters)} adapters: {len(self.groups)} resident, "
                f"{merged} of them merged>")  # fmt: skip

    @property
    def merged(self) -> tuple[Group, ...]:
        """The groups that are merged."""
        return tuple(g for g in self.groups if g.merged)

    @property
    def routed(self) -> tuple[Group, ...]:
        """The adapters that stay as they are."""
        return tuple(g for g in self.groups if not g.merged)

    @property
    def outcome(self) -> Outcome:
        """What all adapters keep, and what it costs; those of a file that are unknown left out."""
        kept = [r for g in self.groups for r in (g.retention or (1.0,)) if r is not None]
        return Outcome(len(self.groups), self.cost, float(np.mean(kept)) if kept else 1.0,
                       min(kept, default=1.0), self.costs.least)  # fmt: skip

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write plan.json; InputError where it exists (without ``overwrite``) or cannot be."""
        from mergeprobe_fast.io.atomic_file import AtomicFile
        from mergeprobe_fast.planning.plan_file import to_text

        with AtomicFile(path, overwrite) as file:
            file.write_text(to_text(self), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read plan.json, or the folder that it lies in; anything wrong is an InputError."""
        from mergeprobe_fast.planning.plan_file import PLAN_NAME, read

        return read(Path(path) / PLAN_NAME if Path(path).is_dir() else Path(path))

    def apply(
        self, folder: str | os.PathLike[str], zoo: Zoo | Paths | None = None, **options: Any
    ) -> Served:
        """Write the merged adapters, and what serves them (:func:`.artefacts.apply_plan`).

        ``zoo``: default the paths that the plan names.
        """
        from mergeprobe_fast.planning.artefacts import apply_plan

        if self.early:
            raise InputError("is of unfinished adapters: nothing to merge yet", key="plan")
        options.setdefault("calibration", self.calibration)
        if options["calibration"] is not None:
            options.setdefault("domains", {a.name: a.domain for a in self.adapters if a.domain})
        if zoo is None:
            zoo = Zoo([open_adapter(a.path, name=a.name) for a in self.adapters], same_base=True)
        return apply_plan(self, as_zoo(zoo), folder, **options)
