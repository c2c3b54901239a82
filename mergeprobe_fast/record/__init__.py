"""What is recorded from running models. Only here, and when called, are torch and transformers
imported."""

from __future__ import annotations

from .calibrate import CalibrationPlan, calibrate, plan_calibration
from .texts import data_arguments

__all__ = ["CalibrationPlan", "calibrate", "data_arguments", "plan_calibration"]
