"""What is recorded from running models. Only here, and when called, are torch and transformers
imported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .calibrate import CalibrationPlan, calibrate, plan_calibration
from .texts import data_arguments

_LATER = {"ProbeCallback": "trainer", "record": "loop"}

__all__ = [
    "CalibrationPlan",
    "ProbeCallback",
    "calibrate",
    "data_arguments",
    "plan_calibration",
    "record",
]

if TYPE_CHECKING:
    from .loop import record
    from .trainer import ProbeCallback


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = found
    return found
