"""Merges that a tier asks for, from the adapters and calibrations of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import MergedAdapter, merge
from mergeprobe_fast.sets import set_features
from mergeprobe_fast.zoo import Zoo, open_zoo

from ..tiers.plan import MergePlan, Operator, Tier
from .calibrations import calibration_folder


def adapter_folder(out: Path, name: str) -> Path:
    """Where an adapter of a run lies."""
    return out / "adapters" / name


def combine(
    tier: Tier, out: Path, plan: MergePlan, weights: Sequence[float] | None = None, *,
    threads: int = 1,
) -> tuple[MergedAdapter, list[float]]:  # fmt: skip
    """What a merge of a run is, and one weight per member: the same for any number of threads.

    ``weights`` are those that were found for it before; None: the operator's, found if need be.

    Raises:
        InputError: what the method refuses, and a swapped calibration where there is nothing to
            swap.
    """
    operator = tier.operators[plan.operator]
    zoo = open_zoo([adapter_folder(out, name) for name in plan.members])
    recorded: dict[str, Any] = {}
    if operator.calibration:
        recorded = {
            "calibration": calibration_folder(out, operator.calibration),
            "domains": calibration_domains(tier, plan),
        }
    chosen = _weights(operator, zoo, recorded, threads) if weights is None else [*weights]
    merged = merge(
        zoo, operator.method, chosen, operator.rank, dtype="F32", threads=threads, **recorded,
        **operator.arguments,
    )  # fmt: skip
    return merged, chosen


def calibration_domains(tier: Tier, plan: MergePlan) -> list[str]:
    """The calibration of each member: of its own exam, or swapped of the next one's."""
    own = [tier.adapters[name].exam for name in plan.members]
    if not tier.operators[plan.operator].swapped:
        return own
    found = []
    for at, exam in enumerate(own):
        others = [other for other in own[at:] + own[:at] if other != exam]
        if not others:
            raise InputError("all members are of one exam: nothing to swap", key=plan.key)
        found.append(others[0])
    return found


def _weights(operator: Operator, zoo: Zoo, recorded: dict[str, Any], threads: int) -> list[float]:
    """One number per member."""
    if operator.weights in ("one", "mean"):
        return [1.0 if operator.weights == "one" else 1 / len(zoo)] * len(zoo)
    table = set_features(
        zoo, [zoo.names], features=f"{operator.weights}_retention_mean", threads=threads, **recorded
    )
    return table.per_member(f"{operator.weights}_weights")[0].tolist()
