"""All pairs of a zoo on disk, to the table: on a CUDA device and on the machine's CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import device
import numpy as np
import torch
from cases import OURS, Case, Fact, Variant, Work
from data import size_of, temporary_folder, uniform, write_zoo
from harness import SelfTimed, peak_growth

import mergeprobe_fast as mpf

CPU, TF32 = "the CPU, all cores", "precision='high'"


def cases(quick: bool) -> list[Case]:
    """Few large adapters, and many."""
    if quick:
        return [_case(4, 2, 64)]
    return [_case(50, 28, 4096), _case(300, 28, 2048), _case(1000, 8, 2048)]


def _case(count: int, modules: int, width: int) -> Case:
    variants = (
        Variant(OURS, note="pair_features(zoo, device='cuda'), files in the page cache"),
        Variant(TF32, compare=False),
        Variant(CPU, OURS),
    )
    name = f"default features, {count} adapters, {modules} modules {width}x{width}, r=16, bf16"
    return Case("device_screen", name, os.cpu_count() or 1, "wall", 3, variants,
                partial(_prepare, count, modules, width))  # fmt: skip


@contextmanager
def _prepare(count: int, modules: int, width: int) -> Iterator[Work]:
    with temporary_folder() as root:
        paths = write_zoo(root, count, uniform(modules, width, width), 16, torch.bfloat16)
        zoo = mpf.open_zoo(root)

        def screened(**options: Any) -> Callable[[], SelfTimed]:
            def run() -> SelfTimed:
                began = time.perf_counter()
                found = mpf.pair_features(zoo, **options)
                return SelfTimed(time.perf_counter() - began, found)

            return run

        run = {
            OURS: screened(device="cuda"), TF32: screened(device="cuda", precision="high"),
            CPU: screened(),
        }  # fmt: skip
        if not device.INTERPRETED:
            torch.cuda.reset_peak_memory_stats()  # of the suites before
        with peak_growth() as growth:
            run[OURS]()
        most = 0 if device.INTERPRETED else torch.cuda.max_memory_allocated()

        def finish(results, medians) -> list[Fact]:
            def worst(name: str) -> float:
                one, two = results[name], results[CPU]
                off = [np.abs(np.asarray(one[c]) - np.asarray(two[c])).max()
                       for c in ("cosine", "row_overlap", "col_overlap")]  # fmt: skip
                return float(max(off))

            assert worst(OURS) < 1e-5, f"off by {worst(OURS):.1e}"
            assert worst(TF32) < 1e-2, f"off by {worst(TF32):.1e}"
            facts = [
                Fact("largest difference from the CPU", worst(OURS), "1"),
                Fact("largest difference from the CPU, high", worst(TF32), "1"),
                Fact("zoo on disk", size_of(paths) / 1e6, "MB"),
                Fact("peak host memory above the start", growth.bytes / 1e6, "MB"),
            ]
            if most:
                facts.append(Fact("peak device memory", most / 1e6, "MB"))
            return facts

        yield Work(run, finish)
