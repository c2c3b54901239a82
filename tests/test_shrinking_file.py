"""Files that change under us: one InputError naming the file, or the right numbers. No crash."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter, make_zoo
from dense_merge import deltas

import mergeprobe_fast as mpf

WEIGHTS = "adapter_model.safetensors"
# Longer than a tick of the clock that file systems stamp with (1 to 10 ms): two states of a file
# never carry one time stamp.
TICK = 0.02

Change = Callable[[Path], None]


def truncate_by_one(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def truncate_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def modify_at_the_same_size(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(77).tobytes())


def replace_by_another_of_the_same_size(path: Path) -> None:
    other = make_adapter(path.parent / "other", seed=99).path / WEIGHTS
    assert other.stat().st_size == path.stat().st_size
    os.replace(other, path)


def replace_and_keep_the_time(path: Path) -> None:
    """As rsync -t or cp -p do: another file, the same size, the same time of modification."""
    before = path.stat()
    replace_by_another_of_the_same_size(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite_and_keep_the_time(path: Path) -> None:
    before = path.stat()
    modify_at_the_same_size(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [
    truncate_by_one, truncate_to_half, truncate_to_nothing, append, remove, replace_by_a_folder,
    modify_at_the_same_size, replace_by_another_of_the_same_size, replace_and_keep_the_time,
    rewrite_and_keep_the_time,
]  # fmt: skip
USES: dict[str, Callable[[mpf.Zoo], object]] = {
    "pair_features": mpf.pair_features,
    "adapter_features": mpf.adapter_features,
    "svd": mpf.merge,
    "cat": lambda zoo: mpf.merge(zoo, "cat"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed_between_open_and_read(tmp_path, use, change):
    made = make_zoo(tmp_path, 3)
    zoo = mpf.open_zoo(tmp_path)
    path = made[1].path / WEIGHTS
    time.sleep(TICK)
    change(path)
    with pytest.raises(mpf.InputError) as caught:
        use(zoo)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES[:-2], ids=lambda c: c.__name__)
def test_changed_between_two_uses(tmp_path, change):
    """What was read once is not remembered as good."""
    made = make_zoo(tmp_path, 2)
    zoo = mpf.open_zoo(tmp_path)
    mpf.pair_features(zoo)
    time.sleep(TICK)
    change(made[0].path / WEIGHTS)
    with pytest.raises(mpf.InputError, match="adapter_000"):
        mpf.pair_features(zoo)


def test_a_merge_writes_nothing_then(tmp_path):
    made = make_zoo(tmp_path / "zoo", 2)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    truncate_to_half(made[1].path / WEIGHTS)
    with pytest.raises(mpf.InputError, match="adapter_001"):
        mpf.merge(zoo).save(tmp_path / "out")
    assert os.listdir(tmp_path) == ["zoo"]


def test_a_touched_file_is_refused_and_opens_anew(tmp_path):
    made = make_zoo(tmp_path, 2)
    zoo = mpf.open_zoo(tmp_path)
    before = mpf.pair_features(zoo)["cosine"]
    time.sleep(TICK)
    (made[0].path / WEIGHTS).touch()
    with pytest.raises(mpf.InputError, match="changed since its header was read"):
        mpf.pair_features(zoo)
    assert mpf.pair_features(mpf.open_zoo(tmp_path))["cosine"] == before


def test_a_copy_elsewhere_is_not_looked_at(tmp_path):
    made = make_zoo(tmp_path / "zoo", 2)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    shutil.copytree(tmp_path / "zoo", tmp_path / "copy")
    for adapter in (tmp_path / "copy").iterdir():
        truncate_to_nothing(adapter / WEIGHTS)
    table = mpf.adapter_features(zoo)
    assert table["norm"] == pytest.approx([m.norm for m in made], rel=1e-9)


class Vandal(threading.Thread):
    """Spoils a file and restores it, again and again, each state longer than a clock tick."""

    def __init__(self, path: Path, change: Change) -> None:
        super().__init__(daemon=True)
        self.path, self.change, self.done = path, change, threading.Event()
        self.good = path.read_bytes()
        self.states = 0

    def run(self) -> None:
        while not self.done.is_set():
            time.sleep(TICK + random.uniform(0, TICK / 2))
            self.change(self.path)
            self.states += 1
            time.sleep(TICK)
            with open(self.path, "r+b") as file:
                file.write(self.good)  # growing: complete only when it has its size

    def __enter__(self) -> Vandal:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def scramble(path: Path) -> None:
    """Other numbers everywhere behind the header, at the same size, in place."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(np.full((size - start) // 4, 3.25, "<f4").tobytes())


@pytest.mark.parametrize(
    "change", [truncate_to_half, truncate_to_nothing, scramble], ids=lambda c: c.__name__
)
def test_changed_while_being_read(tmp_path, change):
    """30 screens, each with one change at a random moment: the old numbers or an error."""
    modules = {f"layers.{i}.m": (900, 700, 8) for i in range(24)}
    path = make_zoo(tmp_path, 3, modules=modules)[1].path / WEIGHTS
    good = path.read_bytes()
    began = time.perf_counter()
    truth = mpf.pair_features(mpf.open_zoo(tmp_path))
    span = time.perf_counter() - began
    outcomes: list[str] = []
    for _ in range(30):
        path.write_bytes(good)
        time.sleep(TICK)
        zoo = mpf.open_zoo(tmp_path)
        vandal = threading.Timer(random.uniform(0, span / 3), change, [path])
        vandal.start()
        try:
            table = mpf.pair_features(zoo)
        except mpf.InputError as error:
            assert error.path == str(path), error
            outcomes.append("refused")
        else:
            for column in ("cosine", "row_rv", "norm_ratio"):
                np.testing.assert_array_equal(table[column], truth[column])
            outcomes.append("right")
        vandal.join()
    print({name: outcomes.count(name) for name in sorted(set(outcomes))})


@pytest.mark.parametrize("change", [truncate_to_half, truncate_to_nothing])
def test_changed_again_and_again_while_opened_and_read(tmp_path, change):
    modules = {f"layers.{i}.m": (300, 200, 8) for i in range(24)}
    made = make_zoo(tmp_path, 3, modules=modules)
    truth = mpf.pair_features(mpf.open_zoo(tmp_path))
    with Vandal(made[1].path / WEIGHTS, change) as vandal:
        for attempt in range(30):
            try:
                zoo = mpf.open_zoo(tmp_path)
                time.sleep(random.uniform(0, TICK) if attempt % 2 else 0)
                table = mpf.pair_features(zoo)
            except mpf.InputError as error:
                assert error.path == str(vandal.path), error
            else:
                np.testing.assert_array_equal(table["cosine"], truth["cosine"])
    assert vandal.states > 0


def test_a_merge_while_files_change_is_right_or_refused(tmp_path):
    modules = {f"layers.{i}.m": (300, 200, 8) for i in range(12)}
    made = make_zoo(tmp_path / "zoo", 2, modules=modules)
    mpf.merge(mpf.open_zoo(tmp_path / "zoo"), "cat").save(tmp_path / "truth")
    truth = deltas(tmp_path / "truth")
    with Vandal(made[0].path / WEIGHTS, truncate_to_half):
        for attempt in range(20):
            try:
                merged = mpf.merge(mpf.open_zoo(tmp_path / "zoo"), "cat")
                merged.save(tmp_path / f"out{attempt}")
            except mpf.InputError:
                assert not (tmp_path / f"out{attempt}").exists()
            else:
                for name, delta in deltas(tmp_path / f"out{attempt}").items():
                    np.testing.assert_array_equal(delta, truth[name])


def test_no_signal_kills_the_process(tmp_path):
    """A mapped file that shrinks is SIGBUS; run apart, so that a crash would show as one."""
    make_zoo(tmp_path, 2, modules={f"layers.{i}.m": (400, 300, 16) for i in range(16)})
    script = textwrap.dedent("""
        import os, sys, threading, time
        import mergeprobe_fast as mpf
        path = os.path.join(sys.argv[1], "adapter_000", "adapter_model.safetensors")
        good = open(path, "rb").read()
        def spoil():
            while True:
                os.truncate(path, 4096); time.sleep(0.003)
                with open(path, "r+b") as file: file.write(good)
                time.sleep(0.004)
        threading.Thread(target=spoil, daemon=True).start()
        for _ in range(60):
            try: mpf.pair_features(mpf.open_zoo(sys.argv[1]))
            except mpf.InputError: pass
        print("alive")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
