"""What has to be known of an optimiser: its factors, its learning rates, and who calls it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergeprobe_fast.errors import InputError

from .probe_adapter import LiveModule


@dataclass(frozen=True)
class Rates:
    """Learning rates of one step."""

    mean: float  # over all factors
    groups: dict[str, float] | None  # of all A and of all B, where these two differ


def read_rates(optimizer: torch.optim.Optimizer, modules: Sequence[LiveModule]) -> Rates | None:
    """None when the optimiser keeps a rate to itself, as Adafactor may."""
    of = {id(p): g.get("lr") for g in optimizer.param_groups for p in g["params"]}
    a, b = [of[id(m.a)] for m in modules], [of[id(m.b)] for m in modules]
    if None in a or None in b:
        return None
    mean_a, mean_b = _mean(a), _mean(b)
    if mean_a == mean_b:
        return Rates(mean_a, None)
    return Rates((mean_a + mean_b) / 2, {"A": mean_a, "B": mean_b})


def _mean(rates: list[float | torch.Tensor]) -> float:
    values = {float(rate) for rate in {id(r): r for r in rates}.values()}
    if len(values) == 1:
        return values.pop()
    return sum(float(rate) for rate in rates) / len(rates)


def is_wrapper(optimizer: Any) -> bool:
    """Whether its ``step`` is another torch optimizer's, as accelerate's."""
    return isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer)


def checked(optimizer: Any, factors: set[int]) -> torch.optim.Optimizer:
    """The optimiser itself, should it be wrapped.

    Raises:
        InputError: when it is none of torch's, or lacks some of the factors (given by their ids).
    """
    while is_wrapper(optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        reason = f"{type(optimizer).__name__} is no torch optimizer; not supported"
        raise InputError(reason, key="optimizer")
    held = held_by(optimizer, factors)
    if held < len(factors):
        reason = f"holds {held} of the {len(factors)} factors of the adapter"
        raise InputError(reason, key="optimizer")
    return optimizer


def held_by(optimizer: torch.optim.Optimizer, factors: set[int]) -> int:
    """How many of the factors (given by their ids) the optimiser holds."""
    return len(factors & {id(p) for g in optimizer.param_groups for p in g["params"]})


def calling_scaler() -> Any:
    """The GradScaler whose ``step`` is running, if any: nobody else knows the loss's scale."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            if hasattr(caller, "unscale_") and hasattr(caller, "get_scale"):
                return caller
        frame = frame.f_back
    return None


def stepping() -> bool:
    """Whether an optimiser's method is running: its hooks must not be taken away from under it."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
        frame = frame.f_back
    return False


def processes() -> tuple[int, int]:
    """Number of processes that train together, and which of them this is."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()
