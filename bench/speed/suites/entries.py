"""Sign conflicts of all pairs, exact, and every statistic of the entries, against torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import ALPHA_OVER_R, adapters, temporary_folder, write_zoo
from harness import SelfTimed, peak_growth

import mergeprobe_fast as mpf
from mergeprobe_fast.features.entries import entry_features
from mergeprobe_fast.ops.entries import Deltas, Sample, entry_moments, entry_pairs, sign_conflicts

LAYER = "layers.0.proj"
CACHED, GEMM = "dense deltas cached, pair by pair", "signs as floats, GEMM in row chunks"
DENSE, SAMPLED = "dense deltas cached, every statistic", "a sample of 65,536 entries"
MEASURED = 4  # adapters that the dense peers are timed on
ROWS = 64
# Adapters, shape, rank, and PERFORMANCE's targets against the two peers.
CASES = (
    (4, (4096, 4096), 16, 60, 25), (50, (4096, 4096), 16, 500, 25), (50, (2048, 2048), 8, 500, 25),
)  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """One layer on one core and on two; a zoo of 50 on two."""
    chosen = ((4, (512, 512), 16, None, None),) if quick else CASES
    out = [_signs_case(*c, threads) for c in chosen for threads in (1, 2)]
    out += [_all_case(n, (512, 512) if quick else (4096, 4096)) for n in (2, 4)]
    return [*out, _family_case(8 if quick else 50, quick)]


def _signs_case(
    count: int, shape: tuple[int, int], rank: int, cached: Any, gemm: Any, threads: int
) -> Case:
    far = count > MEASURED
    said = f"timed on {MEASURED} adapters, scaled by the number of deltas and of pairs"
    variants = (
        Variant(OURS, note="ops.sign_conflicts, factors in memory"),
        Variant(CACHED, "torch", Target(cached) if cached else None, most=2, extrapolated=far,
                note=said if far else "deltas included"),
        Variant(GEMM, "torch", Target(gemm) if gemm else None, most=2,
                note=f"{ROWS} rows of all deltas at a time"),
    )  # fmt: skip
    name = f"sign conflicts, {count} adapters, one {shape[0]}x{shape[1]} layer, r={rank}"
    clock = "thread_cpu" if threads == 1 else "wall"
    return Case("entries", name, threads, clock, 5, variants,
                partial(_signs, count, shape, rank, threads))  # fmt: skip


@contextmanager
def _signs(count: int, shape: tuple[int, int], rank: int, threads: int) -> Iterator[Work]:
    made = [f[LAYER] for f in adapters(count, {LAYER: shape}, rank)]
    deltas = Deltas.of([(b, a, ALPHA_OVER_R) for a, b in made])
    now = time.thread_time if threads == 1 else time.perf_counter

    def cached() -> Any:
        few = made[:MEASURED]
        start = now()
        dense = [b @ a for a, b in few]
        between = now()
        found = np.zeros((len(few), len(few)))
        for i, j in combinations(range(len(few)), 2):
            found[i, j] = int(((dense[i] < 0) != (dense[j] < 0)).sum())
        end = now()
        pairs = len(few) * (len(few) - 1) / 2
        seconds = (between - start) * count / len(few)
        seconds += (end - between) * count * (count - 1) / 2 / pairs
        return SelfTimed(seconds, found / (shape[0] * shape[1]))

    def gemm() -> np.ndarray:
        total = torch.zeros(count, count)
        for row in range(0, shape[0], ROWS):
            signs = torch.stack(
                [torch.where((b[row : row + ROWS] @ a) < 0, -1.0, 1.0).flatten() for a, b in made]
            )
            total += signs @ signs.T
        return np.triu((1 - total.numpy() / (shape[0] * shape[1])) / 2, 1)

    run = {OURS: lambda: sign_conflicts(deltas, threads=threads), CACHED: cached, GEMM: gemm}

    def finish(results, medians) -> list[Fact]:
        mine, few = results[OURS], results[CACHED].shape[0]
        error = max(
            np.abs(np.triu(mine, 1)[:few, :few] - results[CACHED]).max(),
            np.abs(np.triu(mine, 1) - results[GEMM]).max(),
        )
        assert error < 1e-4, f"{error:.1e} of the entries"  # signs of next to nothing
        rate = 2 * rank * count * shape[0] * shape[1] / medians[OURS] / 1e9
        return [Fact("largest difference of a share", error, "1"),
                Fact("flops of rebuilding the entries", rate, "GF/s")]  # fmt: skip

    yield Work(run, finish)


def _all_case(count: int, shape: tuple[int, int]) -> Case:
    variants = (
        Variant(OURS, note="ops.entry_moments and ops.entry_pairs, every entry"),
        Variant(SAMPLED, compare=False, note="the same, ops.entries.Sample"),
        Variant(DENSE, "torch", most=2, note="the definitions, deltas and thresholds included"),
    )
    name = f"every statistic of entries, {count} adapters, one {shape[0]}x{shape[1]} layer, r=16"
    return Case("entries", name, 2, "wall", 5, variants, partial(_all, count, shape))


@contextmanager
def _all(count: int, shape: tuple[int, int]) -> Iterator[Work]:
    made = [f[LAYER] for f in adapters(count, {LAYER: shape}, 16)]
    deltas = Deltas.of([(b, a, ALPHA_OVER_R) for a, b in made])
    sample = Sample.draw(*shape, 65536, 0, 1)
    peak: dict[str, int] = {}

    def ours(which: Sample | None) -> Any:
        moments = entry_moments(deltas, 0.2, sample=which, threads=2)
        pairs = entry_pairs(deltas, moments.threshold, sample=which, threads=2)
        return [
            pairs.conflict_mass[i, j] / pairs.mass[i, j] for i, j in combinations(range(count), 2)
        ]

    def dense() -> Any:
        w = [ALPHA_OVER_R * (b @ a) for a, b in made]
        size = [x.abs() for x in w]
        kept = int(0.2 * w[0].numel())
        top = [s >= s.flatten().topk(kept).values[-1] for s in size]
        found = []
        for i, j in combinations(range(count), 2):
            product, conflict = w[i] * w[j], w[i].sign() != w[j].sign()
            mass = product.abs()
            numbers = [
                conflict.sum(), mass.sum(), mass[conflict].sum(), size[i][conflict].sum(),
                size[j][conflict].sum(), (w[i] + w[j]).abs().sum(), (product**2).sum(),
                (top[i] & top[j]).sum(),
            ]  # fmt: skip
            found.append(float(numbers[2] / numbers[1]))
        return found

    run = {OURS: lambda: ours(None), SAMPLED: lambda: ours(sample), DENSE: dense}
    for kind, call in run.items():
        with peak_growth() as growth:
            call()
        peak[kind] = growth.bytes

    def finish(results, medians) -> list[Fact]:
        error = np.abs(np.array(results[OURS]) - results[DENSE]).max()
        assert error < 1e-4, f"{error:.1e} of the mass"
        return [
            Fact("largest difference of a share", float(error), "1"),
            *(Fact(f"peak memory above the start, {k}", v / 1e6, "MB") for k, v in peak.items()),
        ]

    yield Work(run, finish)


def _family_case(count: int, quick: bool) -> Case:
    modules, dim = (4, 256) if quick else (16, 4096)
    variants = (
        Variant(OURS, note="a sample of 75,000 entries a layer, files in the page cache"),
        Variant("default features", compare=False, note="of the same zoo"),
    )
    name = f"columns of entries, {count} adapters, {modules} layers of {dim}x{dim}, r=16"
    return Case("entries", name, 2, "wall", 2, variants, partial(_family, count, modules, dim))


@contextmanager
def _family(count: int, modules: int, dim: int) -> Iterator[Work]:
    shapes = {f"model.layers.{i}.self_attn.q_proj": (dim, dim) for i in range(modules)}
    with temporary_folder() as root:
        write_zoo(root, count, shapes, 16)
        zoo = mpf.open_zoo(root)
        family = entry_features(75000 * modules)
        run = {
            OURS: lambda: mpf.pair_features(zoo, [family], threads=2),
            "default features": lambda: mpf.pair_features(zoo, threads=2),
        }

        def finish(results, medians) -> list[Fact]:
            ours, others = results[OURS], results["default features"]
            angle = np.arccos(np.asarray(others["cosine"])) / np.pi
            error = np.abs(np.asarray(ours["sign_conflict"]) - angle).max()
            assert error < 0.05, f"{error} from what the cosine says of Gaussian entries"
            return [Fact("largest residual of sign conflicts", float(error), "1")]

        yield Work(run, finish)
