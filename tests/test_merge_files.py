"""What a merge leaves on disk: the same bytes every time, one error or nothing, never a half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter, make_zoo
from dense_merge import METHODS, assert_peft_agrees, digests, merge_json

import mergeprobe_fast as mpf
from mergeprobe_fast.io import is_temporary

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def zoo(tmp_path: Path) -> mpf.Zoo:
    make_zoo(tmp_path / "zoo", 3)
    return mpf.open_zoo(tmp_path / "zoo")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_for_any_number_of_threads(tmp_path, isa, method, dtype):
    modules = {f"layers.{i}.m": (130 + i, 70 - i, 4 + i % 3) for i in range(12)}
    make_zoo(tmp_path / "zoo", 4, modules=modules, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 1, 2):
        zoo = mpf.open_zoo(tmp_path / "zoo")
        mpf.merge(zoo, method, [0.5, -0.1, 0.25, 1], threads=threads).save(tmp_path / "out")
        results.append(digests(tmp_path / "out"))
        os.rename(tmp_path / "out", tmp_path / f"out{len(results)}")
    assert set(results[0]) == {"adapter_config.json", WEIGHTS, "merge.json"}
    assert all(result == results[0] for result in results)


def test_saving_twice_writes_the_same(tmp_path, zoo):
    merged = mpf.merge(zoo)
    merged.save(tmp_path / "one")
    merged.save(tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_progress_adds_up_to_the_modules(zoo):
    for method in METHODS:
        steps: list[int] = []
        mpf.merge(zoo, method, progress=steps.append)
        assert sum(steps) == len(zoo.modules)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "tis"}, "method: no method 'tis'; did you mean 'ties'? there "),
    "unknown argument": ({"density": 0.5}, "method: svd takes no argument 'density'"),
    "too few weights": ({"weights": [1.0, 2.0]}, "weights: expected one for each of 3"),
    "too many weights": ({"weights": [1.0] * 4}, "weights: expected one for each of 3"),
    "no weights": ({"weights": []}, "weights: expected one for each of 3"),
    "nested weights": ({"weights": [[1.0, 2.0, 3.0]]}, "weights: expected one for each of 3"),
    "NaN weight": ({"weights": [1.0, float("nan"), 1.0]}, "weights: must be finite"),
    "infinite weight": ({"weights": [1.0, float("-inf"), 1.0]}, "weights: must be finite"),
    "weights of words": ({"weights": ["a", "b", "c"]}, "weights: must be numbers"),
    "rank 0": ({"rank": 0}, "rank: must be a positive integer, got 0"),
    "negative rank": ({"rank": -2}, "rank: must be a positive integer, got -2"),
    "rank as float": ({"rank": 4.0}, "rank: must be a positive integer, got 4.0"),
    "rank as bool": ({"rank": True}, "rank: must be a positive integer, got True"),
    "cat with rank": ({"method": "cat", "rank": 4}, "rank: cat keeps every component"),
    "F64": ({"dtype": "F64"}, "dtype: must be one of F32, BF16, F16"),
    "torch's dtype": ({"dtype": "bfloat16"}, "dtype: must be one of F32, BF16, F16"),
    "no threads": ({"threads": 0}, "threads must be a positive integer, got 0"),
    "2^31 threads": ({"threads": 2**31}, "threads must be"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_wrong_argument_is_one_error(zoo, arguments, message):
    with pytest.raises(mpf.InputError) as caught:
        mpf.merge(zoo, **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", [0, 1], ids=["A", "B"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_factor_that_is_not_finite_is_named(tmp_path, method, dtype, factor, value):
    made = make_zoo(tmp_path / "zoo", 3, dtype=dtype)
    name = "model.layers.1.self_attn.q_proj"
    pair = [made[1].modules[name].a.copy(), made[1].modules[name].b.copy()]
    pair[factor][1, 2] = value
    bad = make_adapter(made[1].path, dtype=dtype, factors={name: tuple(pair)})
    zoo = mpf.open_zoo(tmp_path / "zoo")
    with pytest.raises(mpf.InputError, match="NaN or infinite") as caught:
        mpf.merge(zoo, method).save(tmp_path / "out")
    assert caught.value.path == str(bad.path / WEIGHTS)
    assert caught.value.key == f"base_model.model.{name}.lora_{'AB'[factor]}.weight"
    assert os.listdir(tmp_path) == ["zoo"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(1e6, "F16"), (1e39, "BF16"), (1e39, "F32"), (1e200, "F32")],
    ids=["beyond f16", "beyond bf16", "beyond f32", "its square beyond f64"],
)
def test_overflow_is_one_error_and_leaves_nothing(tmp_path, zoo, method, weight, dtype):
    with pytest.raises(mpf.InputError) as caught:
        mpf.merge(zoo, method, [weight, 0.5, 0.5], dtype=dtype).save(tmp_path / "deep" / "out")
    assert any(module.name in str(caught.value) for module in zoo.modules)
    assert os.listdir(tmp_path) == ["zoo"]


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_below_float32_is_not_lost_in_silence(tmp_path, zoo, method):
    """Either an error, or the report says that everything was rounded away."""
    try:
        report = mpf.merge(zoo, method, [1e-60, 1e-60, 1e-60]).save(tmp_path / "out")
    except mpf.InputError:
        assert os.listdir(tmp_path) == ["zoo"]
    else:
        assert report["total"]["rounding_error_relative"] > 0.99


def test_the_error_names_the_folder_that_was_asked_for(tmp_path, zoo):
    """Not the temporary one, which is gone when the message is read."""
    with pytest.raises(mpf.InputError) as caught:
        mpf.merge(zoo, "svd", [1e6, 0.5, 0.5], dtype="F16").save(tmp_path / "out")
    assert ".tmp-" not in str(caught.value)


def test_places_that_are_refused(tmp_path, zoo, monkeypatch):
    merged = mpf.merge(zoo)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    monkeypatch.chdir(tmp_path / "full")
    before = digests(tmp_path)
    inside = zoo[0].path
    refused = [
        (tmp_path / "full", False), (tmp_path / "full", True),  # the current folder
        (inside, False), (inside, True), (tmp_path / "zoo", True),
        (tmp_path / "file", False), (tmp_path / "file", True), (tmp_path / "file" / "out", True),
        (Path("/proc/out"), False), ("/", True), ("", True), ("x" * 300, False),
    ]  # fmt: skip
    for out, overwrite in refused:
        with pytest.raises(mpf.InputError) as caught:
            merged.save(out, overwrite=overwrite)
        assert caught.value.path and "\n" not in str(caught.value), out
    assert digests(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "zoo"]


def test_overwrite_replaces_as_a_whole(tmp_path, zoo):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("not ours")
    with pytest.raises(mpf.InputError, match="exists"):
        mpf.merge(zoo).save(tmp_path / "out")
    with pytest.raises(mpf.InputError, match="'thesis', which this command does not write"):
        mpf.merge(zoo).save(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "thesis").unlink()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")  # somebody's trained adapter
    (tmp_path / "out" / WEIGHTS).write_text("weights")
    with pytest.raises(mpf.InputError, match=r"has no merge\.json: not a result"):
        mpf.merge(zoo).save(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "merge.json").write_text("{}")
    mpf.merge(zoo).save(tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", WEIGHTS, "merge.json"]
    assert sorted(os.listdir(tmp_path)) == ["out", "zoo"]


def test_a_merge_of_merges_is_a_merge(tmp_path, zoo):
    """What we write, we read: (a + b) + c is a + b + c."""
    first, second = mpf.open_zoo([zoo[0].path, zoo[1].path]), [zoo[2].path]
    mpf.merge(first, "cat", [1.0, 2.0]).save(tmp_path / "ab")
    twice = mpf.merge(mpf.open_zoo([tmp_path / "ab", *second]), "linear", [1.0, 3.0])
    once = mpf.merge(zoo, "linear", [1.0, 2.0, 3.0])
    for one, two in zip(once.modules, twice.modules, strict=True):
        # Rounded to float32 twice instead of once: a few units of U32 sqrt(rank).
        difference = one.b.astype(np.float64) @ one.a - two.b.astype(np.float64) @ two.a
        assert np.linalg.norm(difference) <= 2.0**-18 * one.norm


KILLED = """
import itertools, sys
import mergeprobe_fast as mpf
zoo, out, overwrite = mpf.open_zoo(sys.argv[1]), sys.argv[2], sys.argv[3] == "overwrite"
# Merged once, written over and over: most of the time is spent where a kill could do harm.
merged = mpf.merge(zoo, "svd", [1.0, -0.5], 8, dtype="F32", threads=2)
print("ready", flush=True)
for i in itertools.count():
    merged.save(out if overwrite else f"{out}-{i}", overwrite=overwrite)
"""


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_killed_at_any_moment_it_leaves_nothing_half_done(tmp_path, mode):
    """SIGKILL at random moments: what has the name of a result is complete and loads."""
    modules = {f"layers.{i}.m": (256, 192, 8) for i in range(16)}
    make_zoo(tmp_path / "zoo", 2, modules=modules)
    targets = [tmp_path / f"run{i}" for i in range(8)]
    for batch in (targets[:4], targets[4:]):
        running = []
        for target in batch:
            target.mkdir()
            if mode == "overwrite":
                mpf.merge(mpf.open_zoo(tmp_path / "zoo")).save(target / "out")
            command = [sys.executable, "-c", KILLED, tmp_path / "zoo", target / "out", mode]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path))
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(random.uniform(0.02, 0.2))
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL, "it ended before it was killed"
            process.stdout.close()
    finished = 0
    for target in targets:
        names = os.listdir(target)
        found = sorted(name for name in names if not is_temporary(name))
        finished += len(found)
        for name in found:
            files = sorted(os.listdir(target / name))
            assert files == ["adapter_config.json", WEIGHTS, "merge.json"]
            assert set(merge_json(target / name)["modules"]) == set(modules)
        newest = max(found, key=lambda name: (target / name).stat().st_mtime_ns, default=None)
        if newest:
            assert_peft_agrees(target / newest)
        assert mode == "new" or "out" in names, "it was there before and must be at every moment"
        # The leftovers are invisible: the same merge works on beside them.
        assert not found or len(mpf.open_zoo(target)) == len(found)
        mpf.merge(mpf.open_zoo(tmp_path / "zoo")).save(target / "out", overwrite=True)
    assert finished > 0, "killed too early to show anything"
