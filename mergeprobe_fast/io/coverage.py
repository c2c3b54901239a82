"""What of an adapter would be used, and what not and why: ``mergeprobe-fast check``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from .formats import examine
from .peft import Examination

Status = Literal["used", "refused", "ignored"]


@dataclass(frozen=True, slots=True)
class KeyCoverage:
    """What happens to one tensor of the file."""

    key: str
    status: Status
    reason: str | None  # None when used
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleCoverage:
    """One module with both factors, as it would be read."""

    name: str
    kind: str
    rank: int
    d_in: int
    d_out: int
    scale: float | None  # None when the config does not give it
    dtypes: tuple[str, str]  # of A and B


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why the adapter is refused."""

    path: str | None
    key: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """The whole account of one adapter, folder or file."""

    path: Path
    base_model: str | None
    keys: tuple[KeyCoverage, ...]
    modules: tuple[ModuleCoverage, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether ``open_adapter`` opens it."""
        return not self.problems

    def counts(self) -> dict[Status, int]:
        """Number of tensors by status."""
        result: dict[Status, int] = {"used": 0, "refused": 0, "ignored": 0}
        for key in self.keys:
            result[key.status] += 1
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``--json``."""
        return {**asdict(self), "path": str(self.path), "ok": self.ok, "counts": self.counts()}


def check(path: str | os.PathLike[str]) -> Coverage:
    """Account for every tensor and every config finding of an adapter; never raises.

    It is the same examination that ``open_adapter`` acts on: ``ok`` means that it opens.
    """
    found = examine(path)
    return Coverage(
        path=found.path,
        base_model=found.reading.base_model if found.reading else None,
        keys=_keys(found),
        modules=_modules(found),
        problems=tuple(_problem(error) for error in found.refused),
        notes=found.notes,
    )


def _problem(error: InputError) -> Problem:
    return Problem(error.path, error.key, error.reason)


def _keys(found: Examination) -> tuple[KeyCoverage, ...]:
    if found.plan is None:
        return ()
    why: dict[str, tuple[Status, str]] = {key: ("ignored", r) for key, r in found.plan.ignored}
    for position, reason in found.resolved.conflicts if found.resolved else ():
        module = found.plan.modules[position]
        alpha = found.alphas[position] if found.alphas else None
        for entry in (module.a, module.b, alpha):
            if entry:
                why[entry.key] = ("refused", reason)
    why.update((key, ("refused", reason)) for key, reason in found.plan.refused)
    used = {entry.key for module in found.plan.modules for entry in (module.a, module.b)}
    used.update(entry.key for entry in found.alphas if entry)
    rows = []
    for layout in found.plan.layouts:
        for entry in layout.entries:
            rest = "factors of its module are" if entry.key.endswith(".alpha") else (
                "other factor of its module is"
            )  # fmt: skip
            left_over = ("refused", f"the {rest} refused")
            default = ("used", None) if entry.key in used else left_over
            status, reason = why.get(entry.key, default)
            rows.append(KeyCoverage(entry.key, status, reason, entry.dtype, entry.shape))
    return tuple(rows)


def _modules(found: Examination) -> tuple[ModuleCoverage, ...]:
    if found.plan is None:
        return ()
    scales: Any = (None,) * len(found.plan.modules)
    if found.resolved:
        scales = found.resolved.scales
    return tuple(
        ModuleCoverage(
            module.name,
            module.kind,
            module.rank,
            module.d_in,
            module.d_out,
            scale,
            (module.a.dtype, module.b.dtype),
        )
        for module, scale in zip(found.plan.modules, scales, strict=True)
    )
