"""A screen's families and merges from factors, on a CUDA device and on the machine's CPU."""

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
from data import Shapes, size_of, temporary_folder, uniform, write_calibration, write_zoo
from harness import SelfTimed, peak_growth

import mergeprobe_fast as mpf
from mergeprobe_fast.features import select
from mergeprobe_fast.recorded import NOTHING

CPU = "the CPU, all cores"
RANK = 16
SEEN = ("activation_cosine_a", "activation_cosine_b", "drift_cka_a", "drift_cka_b")
METHODS = ("svd", "tsv_m", "core_space", "knots", "regmean", "prune")


def cases(quick: bool) -> list[Case]:
    """Each family by itself, columns on domains, and merges."""
    few = (4, 2, 64) if quick else (50, 14, 4096)
    many = (6, 1, 64) if quick else (400, 2, 4096)
    out = [
        _features_case(said, _of_family(family), *size)
        for said, family in (("principal angles", "angles"), ("entries, sampled", "entries"))
        for size in (few, many)
    ]
    out.append(_features_case("calibration of 5 domains", SEEN, *few))
    size = (3, 2, 64) if quick else (8, 28, 4096)
    return [*out, *(_merge_case(method, *size) for method in METHODS)]


def _of_family(name: str) -> tuple[str, ...]:
    [family] = [f for f in select("all", NOTHING).families if f.name == name]
    return tuple(c.name for c in family.pairs if "." not in c.name)


def _shapes(modules: int, width: int) -> Shapes:
    return uniform(modules, width, width)


def _features_case(
    said: str, columns: tuple[str, ...], count: int, modules: int, width: int
) -> Case:
    variants = (
        Variant(OURS, note="pair_features(zoo, columns, device='cuda'), files in the page cache"),
        Variant(CPU, OURS, most=2),
    )
    name = f"{said}, {count} adapters, {modules} modules {width}x{width}, r={RANK}, bf16"
    return Case("device_families", name, os.cpu_count() or 1, "wall", 3, variants,
                partial(_features, columns, count, modules, width))  # fmt: skip


@contextmanager
def _features(columns: tuple[str, ...], count: int, modules: int, width: int) -> Iterator[Work]:
    with temporary_folder() as root:
        shapes = _shapes(modules, width)
        paths = write_zoo(root / "zoo", count, shapes, RANK, torch.bfloat16)
        zoo, given = mpf.open_zoo(root / "zoo"), {}
        if columns is SEEN:
            domains = [f"domain{i}" for i in range(5)]
            write_calibration(root / "cal", shapes, domains, 16 if device.INTERPRETED else 256)
            given = {"calibration": root / "cal",
                     "domains": [domains[i % 5] for i in range(count)]}  # fmt: skip

        def run(place: str) -> Any:
            return mpf.pair_features(zoo, list(columns), device=place, **given)

        yield _both(run, lambda one, two: max(_off(one[c], two[c]) for c in columns),
                    Fact("zoo on disk", size_of(paths) / 1e6, "MB"))  # fmt: skip


def _merge_case(method: str, count: int, modules: int, width: int) -> Case:
    variants = (
        Variant(OURS, note="merge(zoo, method, device='cuda'), files in the page cache"),
        Variant(CPU, OURS, most=2),
    )
    name = f"{method} of {count} adapters, {modules} modules {width}x{width}, r={RANK}, bf16"
    return Case("device_families", name, os.cpu_count() or 1, "wall", 3, variants,
                partial(_merge, method, count, modules, width))  # fmt: skip


@contextmanager
def _merge(method: str, count: int, modules: int, width: int) -> Iterator[Work]:
    with temporary_folder() as root:
        shapes = _shapes(modules, width)
        paths = write_zoo(root / "zoo", count, shapes, RANK, torch.bfloat16)
        zoo, given = mpf.open_zoo(root / "zoo"), {}
        if mpf.MERGE_METHODS[method].data:
            write_calibration(root / "cal", shapes, ["a", "b"], 16 if device.INTERPRETED else 256)
            given = {"calibration": root / "cal", "domains": ["ab"[i % 2] for i in range(count)]}

        def run(place: str) -> Any:
            return mpf.merge(zoo, method, device=place, **given)

        def off(one: Any, two: Any) -> float:
            x = np.random.default_rng(0).standard_normal((width, 4)).astype(np.float32)
            seen = [[m.b @ (m.a @ x) for m in found.modules] for found in (one, two)]
            return max(_off(a, b) for a, b in zip(*seen, strict=True))

        yield _both(run, off, Fact("zoo on disk", size_of(paths) / 1e6, "MB"))


def _both(
    run: Callable[[str], Any], off: Callable[[Any, Any], float], *facts: Fact
) -> Work:
    """The same call on the device and on the CPU, and how far apart the results are."""

    def timed(place: str) -> Callable[[], SelfTimed]:
        def call() -> SelfTimed:
            began = time.perf_counter()
            found = run(place)
            return SelfTimed(time.perf_counter() - began, found)

        return call

    if not device.INTERPRETED:
        torch.cuda.reset_peak_memory_stats()  # of the suites before
    with peak_growth() as growth:
        run("cuda")
    most = 0 if device.INTERPRETED else torch.cuda.max_memory_allocated()

    def finish(results: dict[str, Any], medians: dict[str, float]) -> list[Fact]:
        worst = off(results[OURS], results[CPU])
        assert worst < 1e-4, f"off by {worst:.1e}"
        out = [*facts, Fact("largest difference from the CPU", worst, "of the largest value"),
               Fact("peak host memory above the start", growth.bytes / 1e6, "MB")]  # fmt: skip
        return [*out, Fact("peak device memory", most / 1e6, "MB")] if most else out

    return Work({OURS: timed("cuda"), CPU: timed("cpu")}, finish)


def _off(one: Any, two: Any) -> float:
    """Largest difference over the largest value; infinite where only one is undefined."""
    one, two = (np.asarray(x, np.float64) for x in (one, two))
    if (np.isnan(one) != np.isnan(two)).any():
        return np.inf
    top = np.nanmax(np.abs(two), initial=0.0) if two.size else 0.0
    return float(np.nanmax(np.abs(one - two), initial=0.0) / (top or 1.0))
