"""Interleaved timing: clocks, pinning, child processes, peak memory. No knowledge of any suite."""

from __future__ import annotations

import ctypes
import gc
import glob
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]

Clock = Literal["thread_cpu", "process_cpu", "wall", "events"]
CLOCKS: dict[Clock, Callable[[], float]] = {
    "thread_cpu": time.thread_time,  # the calling thread's CPU time
    "process_cpu": time.process_time,  # all threads': for code that reads ahead in a second one
    "wall": time.perf_counter,
    "events": time.perf_counter,  # callables that time themselves on a device, see device.py
}


@dataclass(frozen=True)
class SelfTimed:
    """What a callable returns that measured its own time: a child process, or a scaled sample."""

    seconds: float
    result: Any = None


@dataclass
class Samples:
    """Seconds per repetition and the last result, by name."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    repetitions: int,
    clock: Clock,
    *,
    most: Mapping[str, int] | None = None,
) -> Samples:
    """Time every variant once per round, so that slow drift of the machine hits all alike.

    Each round starts with another variant: no one always follows the one that fills the caches.
    ``most`` caps the repetitions of slow variants; one that runs once is not warmed up either.
    """
    now = CLOCKS[clock]
    limit = {name: min(repetitions, (most or {}).get(name, repetitions)) for name in variants}
    out = Samples({name: [] for name in variants})
    for name, run in variants.items():
        if limit[name] > 1:
            run()
    names = list(variants)
    gc.collect()
    gc.disable()
    try:
        for i in range(repetitions):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                if i >= limit[name]:
                    continue
                out.results.pop(name, None)  # two results alive at once would be a memory cost
                began = now()
                result = variants[name]()
                seconds = now() - began
                if isinstance(result, SelfTimed):
                    seconds, result = result.seconds, result.result
                out.seconds[name].append(seconds)
                out.results[name] = result
    finally:
        gc.enable()
    return out


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads in torch, numpy's BLAS and this package; one thread is pinned to a core.

    The last core of the set, because interrupts tend to land on the first.
    """
    import torch

    before, torch_before = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(count)
    openblas_threads(count)
    if count == 1:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(torch_before)
        openblas_threads(torch_before)


def openblas_threads(count: int) -> bool:
    """Set the threads of the OpenBLAS in numpy's wheel; False when there is none."""
    import numpy

    found = glob.glob(str(Path(numpy.__file__).parent.parent / "numpy.libs" / "*openblas*.so*"))
    for path in found:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(count)
                return True
    return False


@dataclass(frozen=True)
class Finished:
    """A child process that exited with 0."""

    wall: float
    cpu: float
    peak_rss: int  # bytes
    stdout: str


def run_process(command: Sequence[str | Path], *, cwd: Path | None = None) -> Finished:
    """Run a command from a small launcher and measure it there.

    A child's ru_maxrss starts at that of the process it was forked from, and this one may hold
    gigabytes; the launcher holds 10 MB.
    """
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py"))]
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, cwd=cwd or REPOSITORY,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"launcher failed: {done.stderr}")
    facts = json.loads(done.stdout)
    if facts["returncode"]:
        raise RuntimeError(f"{' '.join(map(str, command))}: {facts['stderr'][-2000:]}")
    return Finished(facts["wall"], facts["cpu"], facts["peak_rss"], facts["stdout"])


def timed_process(command: Sequence[str | Path], *, cwd: Path | None = None) -> SelfTimed:
    """:func:`run_process` for :func:`interleave`."""
    done = run_process(command, cwd=cwd)
    return SelfTimed(done.wall, done)


@dataclass
class Growth:
    """Bytes that the resident set grew by at its peak, filled in at the end."""

    bytes: int = 0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Peak resident memory of a block above what was resident before it (Linux)."""
    growth = Growth()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status("VmRSS")
    yield growth
    growth.bytes = max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith(f"{key}:"))
