"""A calibration on a device: the same as on the CPU, or one clear error."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tiny_bases import draw_sequences, load, make_base, write_ids  # noqa: E402

from mergeprobe_fast.errors import BackendError, InputError  # noqa: E402
from mergeprobe_fast.record import calibrate, plan_calibration  # noqa: E402


@pytest.fixture
def base(tmp_path):
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path, rng):
    return {"math": write_ids(tmp_path / "math.jsonl", draw_sequences(rng, (9, 2, 14)))}


@pytest.fixture
def moved(monkeypatch):
    """Where models go that device="cuda" was asked for: the CPU, in a list."""
    module = import_module("mergeprobe_fast.record.calibrate")  # not the function of that name
    went = []
    there = SimpleNamespace(torch=torch.device("cpu"), copies=None)
    to = torch.nn.Module.to

    def noted(self, *given, **options):
        went.append(given)
        return to(self, *given, **options)

    monkeypatch.setattr(module, "open_device", lambda name: None if name == "cpu" else there)
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    return went


def test_a_calibration_on_a_device_is_that_of_the_whole_model(tmp_path, base, data, moved):
    found = calibrate(base, data, tmp_path / "there", samples=8, device="cuda")
    assert moved == [(torch.device("cpu"),)]
    assert any("it runs on cpu" in note for note in found.info.notes), found.info.notes
    whole = calibrate(load(base, torch.float32), data, tmp_path / "whole", samples=8)
    for name in whole.modules:
        assert (found.inputs("math", name) == whole.inputs("math", name)).all()
        assert (found.moment("math", name) == whole.moment("math", name)).all()
    assert not plan_calibration(base, data, device="cuda").streamed
    assert plan_calibration(base, data, device="cpu").streamed
    assert len(moved) == 2


def test_a_model_without_room_is_one_error(tmp_path, base, data, moved, monkeypatch):
    def full(self, *given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee also")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(BackendError, match="does not go on cpu: CUDA out of memory") as error:
        calibrate(base, data, tmp_path / "out", device="cuda")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_object_runs_where_it_is(base, data, moved):
    with pytest.raises(InputError, match="device: cannot be set for a model object"):
        plan_calibration(load(base, torch.float32), data, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_one_error(base, data):
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(BackendError, match="device cuda is not available"):
        plan_calibration(base, data, device="cuda")
