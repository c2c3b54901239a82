"""Run folders under kills, full disks and second runs; only whole snapshots, only our folders."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from probes import make_info

import mergeprobe_fast as mpf
from mergeprobe_fast.io import probe_writer
from mergeprobe_fast.io.probe import open_probe, open_run
from mergeprobe_fast.io.probe_json import Initial, RunInfo
from mergeprobe_fast.io.probe_writer import resume_run, start_run

RUN = RunInfo(None, "test/base", 100, (0.05, 0.1), (5, 10), None)
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"],
    "base_model_name_or_path": "test/base",
}  # fmt: skip


def tensors(rng):
    """Factors and gradients of one module, as a recorder hands them over."""
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((4, 2))
    factors = {
        "base_model.model.q.lora_A.weight": a.astype(np.float32),
        "base_model.model.q.lora_B.weight": b.astype(np.float32),
    }
    gradients = {f"{w}.{x}.q": np.ones(f.shape, np.float32) for w in ("last", "mean")
                 for x, f in (("A", a), ("B", b))}  # fmt: skip
    values = {k: np.ones(1) for k in ("euler_a", "euler_b", "visible_square")}
    return factors, gradients | values


def write(writer, rng, steps=5, **changes):
    info = make_info(steps, ["q"], fractions=(steps / 100,), **changes)
    return writer.write_snapshot(info, json.dumps(CONFIG).encode(), *tensors(rng))


def test_what_is_written_is_what_the_reader_opens(tmp_path, rng):
    writer = start_run(tmp_path / "run", RUN)
    path = write(writer, rng)
    snapshot = open_probe(path)
    assert snapshot.info == make_info(5, ["q"], fractions=(0.05,))
    assert snapshot.adapter.modules["q"].scale == 2.0
    assert writer.has(5) and not writer.has(10)
    writer.saved(5, 0.5)
    writer.saved(3, None)
    writer.saved(5, 0.75)
    writer.note("so it is")
    writer.note("so it is")
    run = open_run(tmp_path / "run")
    assert [(s.step, s.learning_rate_integral) for s in run.info.saved] == [(3, None), (5, 0.75)]
    assert run.info.notes == ("so it is",) and run.snapshots[0].steps == 5
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "step-0000005"]


def test_only_runs_are_replaced_and_only_when_asked(tmp_path, rng):
    out = tmp_path / "run"
    out.mkdir()
    write(start_run(out, RUN), rng)  # an empty folder may be there
    with pytest.raises(mpf.InputError, match="exists; pass overwrite=True to replace a run"):
        start_run(out, RUN)
    (out / ".step-0000010.tmp-0123456789abcdef").mkdir()  # of a killed process
    start_run(out, RUN, overwrite=True)
    assert os.listdir(out) == ["run.json"]
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(mpf.InputError, match=r"holds 'thesis\.tex', which is no part of a probe"):
        start_run(out, RUN, overwrite=True)
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "run.json").unlink()
    with pytest.raises(mpf.InputError, match=r"exists and has no run\.json: not a probe run"):
        start_run(out, RUN, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(mpf.InputError, match="is a symbolic link"):
        start_run(link, RUN, overwrite=True)


@pytest.mark.parametrize(("key", "value"), [
    ("name", "other"), ("base_model", "other/base"), ("total_steps", 90),
    ("fractions", (0.05, 0.2)),
])  # fmt: skip
def test_a_run_is_continued_only_by_the_same_training(tmp_path, key, value):
    from dataclasses import replace

    first = replace(RUN, name="mine", initial=Initial("0" * 64, {"q": "0" * 16}))
    start_run(tmp_path / "run", first)
    assert resume_run(tmp_path / "run", replace(RUN, name=None)).info == first
    with pytest.raises(mpf.InputError, match=rf"run\.json: {key}: is .* in the run that is there"):
        resume_run(tmp_path / "run", replace(first, **{key: value}))
    (tmp_path / "run" / "run.json").write_text('{"format": "mergeprobe-run", "version": 2}')
    with pytest.raises(mpf.InputError, match=r"run\.json: version: is 2"):
        resume_run(tmp_path / "run", first)


def test_what_the_reader_would_refuse_is_not_written(tmp_path, rng):
    writer = start_run(tmp_path / "run", RUN)
    with pytest.raises(mpf.InputError, match=r"probe\.json: window: is more than"):
        write(writer, rng, window=7)
    with pytest.raises(mpf.InputError, match="step-0000005: exists"):
        write(writer, rng)
        write(writer, rng)
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "step-0000005"]


TRAINING = """
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    import warnings; warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import numpy as np
    import mergeprobe_fast as mpf
    from lora_training import batches_of, make_lora, sgd, train
    steps = 400
    fractions = [s / steps for s in range(1, steps - 1)]
    model, batches = make_lora(), batches_of(np.random.default_rng(0), 20) * 20
    with mpf.record.record(model, sys.argv[2], total_steps=steps, fractions=fractions):
        print("go", flush=True)
        train(model, batches, sgd(model, lr=0.01))
"""


@pytest.mark.parametrize("attempt", range(2))
def test_a_kill_at_any_time_leaves_whole_snapshots(tmp_path, rng, attempt):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINING), str(Path(__file__).parent), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "go\n", process.stderr.read()
        while len(list(out.glob("step-*"))) < 5 and process.poll() is None:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.03)))
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
    run = open_run(out)
    assert len(run.snapshots) >= 5
    assert [s.steps for s in run.snapshots] == list(range(1, len(run.snapshots) + 1))
    for snapshot in run.snapshots:
        snapshot.check()
    assert len(run.info.saved) in (len(run.snapshots), len(run.snapshots) - 1)
    start_run(out, RUN, overwrite=True)  # leftovers do not make it somebody else's folder


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_full_disk_ends_the_recording_not_the_training(tmp_path, rng, caplog, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from lora_training import batches_of, factors, make_lora, sgd, train

    batches = batches_of(rng, 12)
    undisturbed, model = make_lora(), make_lora()
    train(undisturbed, batches, sgd(undisturbed))
    real = probe_writer.safetensors.write

    def full(path, *arguments):
        if "step-0000003" in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(path, *arguments)

    monkeypatch.setattr(probe_writer.safetensors, "write", full)
    with (
        caplog.at_level(logging.WARNING),
        mpf.record.record(model, tmp_path / "run", total_steps=12,
                          fractions=[s / 12 for s in range(1, 6)]) as probe,
    ):  # fmt: skip
        train(model, batches, sgd(model))
        assert not probe.recording
    (said,) = [r.getMessage() for r in caplog.records]
    assert "recording stopped after 3 steps" in said and "No space left on device" in said
    run = open_run(tmp_path / "run")
    assert [s.steps for s in run.snapshots] == [1, 2]
    assert "No space left on device" in run.info.notes[0]
    assert sorted(os.listdir(run.path)) == ["run.json", "step-0000001", "step-0000002"]
    one, other = factors(undisturbed), factors(model)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_recording_is_not_imported_before_it_is_asked_for():
    code = """
        import sys
        import mergeprobe_fast as mpf
        mpf.record
        assert not {"torch", "transformers", "peft"} & sys.modules.keys()
        assert "ProbeCallback" in mpf.record.__all__ and "record" in mpf.record.__all__
        mpf.record.record
        assert "transformers.trainer" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
