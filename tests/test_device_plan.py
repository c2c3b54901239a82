"""Sets, merges that are judged, and plans with ``device="cuda"``, against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

import device_child
from device_child import interpreter
from set_zoo import Made

# Grams are float64 on both; merges are cut and rounded to float32 factors.
CLOSE = {"sets": 1e-6, "merges": 1e-5}


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    with interpreter(tmp_path_factory.mktemp("out")) as call:
        yield call


@pytest.fixture
def made(tmp_path, rng):
    return Made(tmp_path, rng)


def options(made):
    return {"calibration": str(made.calibration.path)}


def differences(found, want, close):
    """Names of values that are off, with by how much of the largest."""
    assert set(found) == set(want)
    off = {}
    for name, values in want.items():
        one, two = (np.asarray(x, np.float64) for x in (found[name], values))
        if (np.isnan(one) != np.isnan(two)).any():
            off[name] = "NaN"
        elif two.size and np.nanmax(np.abs(one - two), initial=0) > close * max(
            1.0, np.nanmax(np.abs(two), initial=0)
        ):
            off[name] = float(np.nanmax(np.abs(one - two)))
    return off


@pytest.mark.parametrize("task", CLOSE)
def test_features_are_the_cpus(on_device, made, task):
    zoo = made.folder / "zoo"
    want = device_child.TASKS[task](str(zoo), device="cpu", **options(made))
    assert len(want) > 10
    assert not differences(on_device(task, zoo, **options(made)), want, CLOSE[task])
    if task == "merges":  # TIES with thresholds twice as high
        found = on_device(task, zoo, fault=True, **options(made))
        assert differences(found, want, 100 * CLOSE[task])


def test_a_plan_and_what_it_writes_are_the_cpus(on_device, made, tmp_path):
    zoo = made.folder / "zoo"
    want = device_child.planned(str(zoo), tmp_path / "cpu", "cpu", **options(made))
    found = on_device("planned", zoo, out=str(tmp_path / "there"), **options(made))
    assert str(found.pop("groups")) == str(want.pop("groups"))
    assert not differences(found, want, 1e-5)
