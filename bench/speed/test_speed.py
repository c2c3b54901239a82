"""Every variant of every case in pytest-benchmark's table.

The variants of a case are interleaved in one go (``cases.measure``), because ratios of numbers
taken minutes apart mean nothing on a shared machine. pytest-benchmark times one function per test,
so each test replays the samples of its variant through a clock that only the samples move: its
table, JSON and comparisons show exactly what was measured.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import Measured


class Replay:
    """A clock that stands still except for ``advance``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, samples: list[float]) -> None:
        """The next sample passes."""
        self.now += samples.pop(0)


CLOCK = Replay()


@pytest.mark.filterwarnings("default")  # peers warn as they please
@pytest.mark.benchmark(timer=CLOCK)
def test_speed(benchmark: Any, measured: Measured | Exception, variant: str) -> None:
    """Fails when results disagree; a missed target does not fail, it is printed."""
    if isinstance(measured, Exception):
        raise measured
    benchmark.group = measured.case.id
    declared = next(v for v in measured.case.variants if v.name == variant)
    benchmark.name = f"{variant} (extrapolated)" if declared.extrapolated else variant
    benchmark.extra_info["ratio"] = measured.ratios[variant]
    samples = list(measured.samples[variant])
    rounds = len(samples)
    CLOCK.now = 0.0  # so that adding a sample to it loses no digits
    benchmark.pedantic(CLOCK.advance, args=(samples,), rounds=rounds, iterations=1)
