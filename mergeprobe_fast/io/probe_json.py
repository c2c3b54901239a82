"""``probe.json`` of a snapshot and ``run.json`` of its run: dataclasses, and the two directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .dtypes import FACTOR_DTYPES
from .json_fields import (
    count,
    fields,
    flag,
    hexadecimal,
    many,
    named,
    natural,
    not_negative,
    nullable,
    number,
    of_format,
    text,
)
from .strict_json import Bad

RUN_NAME, PROBE_NAME, GRADIENTS_NAME = "run.json", "probe.json", "gradients.safetensors"
RUN_FORMAT, PROBE_FORMAT, VERSION = "mergeprobe-run", "mergeprobe-probe", 1
TOO_EARLY = 5  # steps: with fewer, a snapshot says more about the optimiser's start than the task


def snapshot_name(steps: int) -> str:
    """The folder of the snapshot after that many optimiser steps: step-0000012."""
    return f"step-{steps:07d}"


@dataclass(frozen=True, slots=True)
class Initial:
    """Fingerprints of the factors A before the first step; of B where A began at zero."""

    sha256: str  # of the bytes of all A, in the order of the modules
    modules: Mapping[str, str]  # module -> first 16 hexadecimal digits of the SHA-256 of its A


@dataclass(frozen=True, slots=True)
class Loss:
    """Losses of the window's steps, nats per token as the user's loop computes them.

    NaN where a loss was not finite; it is null in the file.
    """

    mean: float
    last: float
    count: int  # losses that were seen


@dataclass(frozen=True, slots=True)
class Clip:
    """What clipping multiplied the gradient with in the window's steps; 1: not clipped."""

    mean: float
    last: float
    min: float


@dataclass(frozen=True, slots=True)
class ProbeInfo:
    """Everything ``probe.json`` says of a snapshot after ``steps`` optimiser steps."""

    run: str | None  # the name given to the run; None: it is called like its folder
    base_model: str | None
    adapter_name: str  # in the model: "default"
    fractions: tuple[float, ...]  # of the run's, those that this snapshot stands for; ascending
    steps: int
    total_steps: int
    window: int  # steps over which means were taken, the last one included
    micro_batches: float  # per optimiser step, mean over the window
    loss: Loss | None  # None: none was seen
    learning_rate: float | None  # of the last step before the snapshot; None: unknown
    learning_rate_integral: float | None  # sum over the steps; None: unknown after a resume
    learning_rate_groups: Mapping[str, float] | None  # {"A": .., "B": ..} where they differ
    clip: Clip | None  # None: unknown
    loss_scale: float | None  # of the last step; None: losses were not scaled
    skipped_steps: int  # that GradScaler skipped, since the start or the resume
    optimizer: str | None  # name of its class; None: unknown
    dtype: str | None  # of the factors in training, "F32", "BF16" or "F16"; None: they differ
    modules: tuple[str, ...]  # the order of euler_a, euler_b and visible_square
    initial: Initial | None  # None: unknown after a resume
    notes: tuple[str, ...] = ()

    @property
    def too_early(self) -> bool:
        """Whether a prediction from this snapshot would rest on fewer than TOO_EARLY steps."""
        return self.steps < TOO_EARLY


@dataclass(frozen=True, slots=True)
class Saved:
    """The learning-rate integral at a step from which training may resume."""

    step: int
    learning_rate_integral: float | None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Everything ``run.json`` says."""

    name: str | None  # as given; None: the run is called like its folder
    base_model: str | None
    total_steps: int
    fractions: tuple[float, ...]  # ascending
    planned: tuple[int, ...]  # optimiser steps at which each fraction is reached
    initial: Initial | None
    saved: tuple[Saved, ...] = ()  # ascending
    notes: tuple[str, ...] = field(default=())


def probe_to_json(info: ProbeInfo) -> dict[str, Any]:
    """The object to write; ``parse_probe`` gives ``info`` back."""
    loss, clip = info.loss, info.clip
    return {
        "format": PROBE_FORMAT,
        "version": VERSION,
        "run": info.run,
        "base_model": info.base_model,
        "adapter_name": info.adapter_name,
        "fractions": list(info.fractions),
        "steps": info.steps,
        "total_steps": info.total_steps,
        "too_early": info.too_early,
        "window": info.window,
        "micro_batches": info.micro_batches,
        "loss": loss and {
            "mean": _or_null(loss.mean), "last": _or_null(loss.last), "count": loss.count
        },
        "learning_rate": info.learning_rate,
        "learning_rate_integral": info.learning_rate_integral,
        "learning_rate_groups": info.learning_rate_groups and dict(info.learning_rate_groups),
        "clip": clip and {"mean": clip.mean, "last": clip.last, "min": clip.min},
        "loss_scale": info.loss_scale,
        "skipped_steps": info.skipped_steps,
        "optimizer": info.optimizer,
        "dtype": info.dtype,
        "modules": list(info.modules),
        "initial": _initial_to_json(info.initial),
        "notes": list(info.notes),
    }  # fmt: skip


def run_to_json(info: RunInfo) -> dict[str, Any]:
    """The object to write; ``parse_run`` gives ``info`` back."""
    return {
        "format": RUN_FORMAT,
        "version": VERSION,
        "name": info.name,
        "base_model": info.base_model,
        "total_steps": info.total_steps,
        "fractions": list(info.fractions),
        "planned": list(info.planned),
        "initial": _initial_to_json(info.initial),
        "saved": [
            {"step": s.step, "learning_rate_integral": s.learning_rate_integral}
            for s in info.saved
        ],
        "notes": list(info.notes),
    }  # fmt: skip


def parse_probe(value: dict[str, Any]) -> ProbeInfo:
    """Check every field of ``probe.json``; raises ``Bad`` with the field's path as key."""
    of_format(value, PROBE_FORMAT, VERSION)
    found = fields(
        value, "", format=text, version=count, run=nullable(text), base_model=nullable(text),
        adapter_name=text, fractions=_fractions, steps=count, total_steps=count, too_early=flag,
        window=count, micro_batches=_from_one, loss=nullable(_loss),
        learning_rate=nullable(not_negative), learning_rate_integral=nullable(not_negative),
        learning_rate_groups=nullable(_groups), clip=nullable(_clip),
        loss_scale=nullable(_positive), skipped_steps=natural, optimizer=nullable(text),
        dtype=nullable(_dtype), modules=_modules, initial=nullable(_initial), notes=many(text),
    )  # fmt: skip
    early = found.pop("too_early")
    info = ProbeInfo(**{key: found[key] for key in found if key not in ("format", "version")})
    if info.steps > info.total_steps:
        raise Bad(f"is beyond total_steps, which is {info.total_steps}", "steps")
    if info.window > info.steps + 1:
        raise Bad(f"is more than the {info.steps + 1} steps that were seen", "window")
    if early != info.too_early:
        raise Bad(f"is not whether there were fewer than {TOO_EARLY} steps", "too_early")
    _same_modules(info.initial, info.modules)
    return info


def parse_run(value: dict[str, Any]) -> RunInfo:
    """Check every field of ``run.json``; raises ``Bad`` with the field's path as key."""
    of_format(value, RUN_FORMAT, VERSION)
    found = fields(
        value, "", format=text, version=count, name=nullable(text), base_model=nullable(text),
        total_steps=count, fractions=_fractions, planned=many(count, 1),
        initial=nullable(_initial), saved=many(_saved), notes=many(text),
    )  # fmt: skip
    info = RunInfo(**{key: found[key] for key in found if key not in ("format", "version")})
    if len(info.planned) != len(info.fractions):
        raise Bad(f"expected one for each of {len(info.fractions)} fractions", "planned")
    _ascending(info.planned, "planned", strictly=False)
    _ascending([s.step for s in info.saved], "saved", strictly=True)
    for where, steps in (("planned", info.planned), ("saved", [s.step for s in info.saved])):
        if steps and steps[-1] > info.total_steps:
            raise Bad(f"has a step beyond total_steps, which is {info.total_steps}", where)
    return info


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number_or_nan(value: Any, where: str) -> float:
    return math.nan if value is None else number(value, where)


def _loss(value: Any, where: str) -> Loss:
    return Loss(**fields(value, where, mean=_number_or_nan, last=_number_or_nan, count=count))


def _clip(value: Any, where: str) -> Clip:
    return Clip(**fields(value, where, mean=_factor, last=_factor, min=_factor))


def _groups(value: Any, where: str) -> dict[str, float]:
    return fields(value, where, A=not_negative, B=not_negative)


def _saved(value: Any, where: str) -> Saved:
    checks = {"step": count, "learning_rate_integral": nullable(not_negative)}
    return Saved(**fields(value, where, **checks))


def _initial_to_json(initial: Initial | None) -> dict[str, Any] | None:
    if initial is None:
        return None
    return {"sha256": initial.sha256, "modules": dict(initial.modules)}


def _initial(value: Any, where: str) -> Initial:
    checks = {"sha256": hexadecimal(64), "modules": named(hexadecimal(16))}
    return Initial(**fields(value, where, **checks))


def _same_modules(initial: Initial | None, modules: Sequence[str]) -> None:
    if initial is None:
        return
    for name in sorted(initial.modules.keys() ^ set(modules)):
        what = "is no module of this probe" if name in initial.modules else "is missing"
        raise Bad(what, f"initial.modules.{name}")


def _modules(value: Any, where: str) -> tuple[str, ...]:
    names = many(text, 1)(value, where)
    if len(set(names)) != len(names):
        raise Bad("names a module twice", where)
    return names


def _fractions(value: Any, where: str) -> tuple[float, ...]:
    found = many(_positive, 1)(value, where)
    _ascending(found, where, strictly=True)
    if found[-1] > 1:
        raise Bad("has a fraction above 1", where)
    return found


def _ascending(values: Sequence[float], where: str, *, strictly: bool) -> None:
    for one, other in pairwise(values):
        if other < one or (strictly and other == one):
            raise Bad("is not in ascending order", where)


def _positive(value: Any, where: str) -> float:
    if number(value, where) <= 0:
        raise Bad("is not above 0", where)
    return float(value)


def _factor(value: Any, where: str) -> float:
    if not 0 <= number(value, where) <= 1:
        raise Bad("is not from 0 to 1", where)
    return float(value)


def _from_one(value: Any, where: str) -> float:
    if number(value, where) < 1:
        raise Bad("is below 1", where)
    return float(value)


def _dtype(value: Any, where: str) -> str:
    if value not in FACTOR_DTYPES:
        raise Bad(f"is none of {', '.join(FACTOR_DTYPES)}", where)
    return value
