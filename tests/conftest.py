"""Shared by all tests."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before numpy: oracles on small matrices wait for each other's threads longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from mergeprobe_fast import _native

# importlib mode leaves sys.path alone; this makes `from adapters import make_adapter` work.
sys.path.insert(0, str(Path(__file__).parent))

SEED = int(os.environ.get("MERGEPROBE_TEST_SEED") or secrets.randbits(32))
ALLOCATING = (
    "mergeprobe_fast.ops.gram",
    "mergeprobe_fast.ops.canonical",
    "mergeprobe_fast.ops.tiles",
    "mergeprobe_fast.ops.tiles_low_rank",
    "mergeprobe_fast.ops.tiles_reference",
    "mergeprobe_fast.ops.entries",
    "mergeprobe_fast.ops.angles",
    "mergeprobe_fast.engine.angles",
    "mergeprobe_fast.engine.chunks",
    "mergeprobe_fast.engine.entries",
    "mergeprobe_fast.engine.pair_angles",
    "mergeprobe_fast.engine.passes",
    "mergeprobe_fast.engine.aggregate",
    "mergeprobe_fast.engine.p1",
    "mergeprobe_fast.engine.project",
    "mergeprobe_fast.engine.totals",
)


def pytest_report_header() -> str:
    return f"MERGEPROBE_TEST_SEED={SEED} (set it to repeat this run)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers every run. The seed is printed, and MERGEPROBE_TEST_SEED pins it."""
    print(f"MERGEPROBE_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(params=_native.core().available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once on every instruction set of this CPU and build."""
    monkeypatch.setenv("MERGEPROBE_ISA", request.param)
    return request.param


class PoisonedNumpy:
    """numpy, but ``empty`` returns NaN (all bits set), so that unwritten output shows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
        out = np.empty(shape, dtype, order)
        if out.size:
            out.reshape(-1, order="A").view(np.uint8)[:] = 0xFF
        return out


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that the package asks numpy for is NaN in every test."""
    for name in ALLOCATING:
        monkeypatch.setattr(importlib.import_module(name), "np", PoisonedNumpy())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """While torch computes on one thread: on more, what it adds up first is another's each time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
