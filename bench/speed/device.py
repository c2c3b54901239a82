"""Timing on a CUDA device: events, inputs out of the L2 cache, ceilings.

Without a device, TRITON_INTERPRET=1 runs the same code on the CPU, to see that it works: its times
mean nothing.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from harness import SelfTimed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHERE = "cpu" if INTERPRETED else "cuda"

WARM = 2  # calls before the first sample: compilation, and the clock's ramp
FLUSH = 256 << 20  # bytes written between samples: several times the largest L2 cache there is
SAMPLES = 5  # of one repetition, whose median counts
LARGE = 64 if INTERPRETED else 8192  # of a product
COPIED = 1 << (20 if INTERPRETED else 30)  # bytes of a copy


class Event:
    """A moment in the work of a stream; without a device, of the process."""

    def __init__(self) -> None:
        self._event = None if INTERPRETED else torch.cuda.Event(enable_timing=True)
        self._time = 0.0

    def record(self) -> None:
        """Now, on the current stream."""
        if self._event is None:
            self._time = time.perf_counter()
        else:
            self._event.record()

    def wait(self) -> None:
        """The current stream goes on after it."""
        if self._event is not None:
            self._event.wait()

    def seconds_until(self, other: Event) -> float:
        """Waits for both."""
        if self._event is None:
            return other._time - self._time
        torch.cuda.synchronize()
        return self._event.elapsed_time(other._event) / 1e3


class Copies:
    """A stream for copies."""

    def __init__(self) -> None:
        self._stream = None if INTERPRETED else torch.cuda.Stream()

    def stream(self) -> Any:
        """Context manager: it is the current one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(1 if INTERPRETED else FLUSH // 4, dtype=torch.int32, device=WHERE)


def timed(call: Callable[[], Any], samples: int = SAMPLES) -> Callable[[], SelfTimed]:
    """``call`` between events, caches flushed before each; the median of ``samples`` of them."""
    warm = False

    def run() -> SelfTimed:
        nonlocal warm
        if not warm:
            for _ in range(WARM):
                call()
            warm = True
        seconds, result = [], None
        for _ in range(samples):
            del result
            _flush_buffer().zero_()
            begin, end = Event(), Event()
            begin.record()
            result = call()
            end.record()
            seconds.append(begin.seconds_until(end))
        return SelfTimed(statistics.median(seconds), result)

    return run


def walled(call: Callable[[], Any]) -> Callable[[], SelfTimed]:
    """``call`` by the clock on the wall, until the device is idle: where the host has a part."""

    def run() -> SelfTimed:
        if not INTERPRETED:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        if not INTERPRETED:
            torch.cuda.synchronize()
        return SelfTimed(time.perf_counter() - began, result)

    return run


def allow_tf32(on: bool) -> bool:
    """Let torch multiply float32 in tf32, or not; whether it did before."""
    flags = torch.backends.cuda.matmul
    if not hasattr(flags, "fp32_precision"):  # torch before 2.9
        before, flags.allow_tf32 = flags.allow_tf32, on
        return before
    # The older name raises where a program has used both.
    before = flags.fp32_precision == "tf32"
    flags.fp32_precision = "tf32" if on else "ieee"
    return before


def product(dtype: torch.dtype, size: int = LARGE, tf32: bool = False) -> Callable[[], Any]:
    """A large cuBLAS product: the ceiling of anything that multiplies."""
    a, b = (torch.randn(size, size, device=WHERE).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=WHERE)

    def call() -> torch.Tensor:
        before = allow_tf32(tf32)
        try:
            return torch.mm(a, b.T, out=out)
        finally:
            allow_tf32(before)

    return call


def copy(size: int = COPIED) -> Callable[[], Any]:
    """A large copy on the device: ``2 * size`` bytes move."""
    source = torch.empty(size, dtype=torch.uint8, device=WHERE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine() -> dict[str, Any]:
    """The device, driver and compilers."""
    import triton

    if INTERPRETED:
        return {"device": "Triton's interpreter", "triton": triton.__version__}
    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name,
        "capability": f"sm_{p.major}{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "device_memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def slug() -> str:
    """The device as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", machine()["device"].lower()).strip("-")
