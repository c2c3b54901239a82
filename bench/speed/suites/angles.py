"""Principal angles: singular values of many small matrices, and all angle columns of a zoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import temporary_folder, uniform, write_zoo

import mergeprobe_fast as mpf
from mergeprobe_fast import engine, ops
from mergeprobe_fast.features import select
from mergeprobe_fast.features.angles import FAMILY
from mergeprobe_fast.recorded import NOTHING

SVDVALS, EIGVALSH = "torch.linalg.svdvals", "torch.linalg.eigvalsh of M M^T"
NUMPY = "numpy.linalg.svd"
PASS, LOOP = "default columns (P1)", "torch, pair by pair, cosines alone"


@dataclass(frozen=True)
class Shape:
    """``count`` matrices of cosines, r x r."""

    rank: int
    count: int
    target: float | None


@dataclass(frozen=True)
class Zoo:
    """Adapters of one rank on square modules; so many pairs for the loop."""

    count: int
    modules: int
    width: int
    rank: int
    pairs: int = 40


def cases(quick: bool) -> list[Case]:
    """Ranks 4 to 64, and zoos."""
    shapes = (Shape(8, 2000, 10.0), Shape(16, 1000, 5.0)) if quick else (
        Shape(4, 40_000, None), Shape(8, 40_000, 10.0), Shape(16, 20_000, 5.0),
        Shape(32, 4000, None), Shape(64, 500, None),
    )  # fmt: skip
    zoos = (Zoo(12, 4, 512, 8),) if quick else (Zoo(50, 8, 4096, 16), Zoo(50, 32, 1024, 8))
    return [
        *(_small(s, threads) for s in shapes for threads in (1, 2)),
        *(_zoo(z, threads) for z in zoos for threads in (1, 2)),
    ]


def _small(shape: Shape, threads: int) -> Case:
    target = None if shape.target is None else Target(shape.target)
    variants = (
        Variant(OURS, note="float64 inside"),
        Variant(SVDVALS, "torch", target, note="float32, batched"),
        Variant(EIGVALSH, "torch", note="float32: wrong below 1e-3"),
        Variant(NUMPY, "numpy (OpenBLAS)", note="float32, batched"),
    )
    clock = "thread_cpu" if threads == 1 else "wall"
    return Case(
        "angles", f"{shape.count} matrices {shape.rank} x {shape.rank}", threads, clock, 7,
        variants, lambda: _prepare_small(shape, threads),
    )  # fmt: skip


@contextmanager
def _prepare_small(shape: Shape, threads: int) -> Iterator[Work]:
    rng = np.random.default_rng(0)
    r, d = shape.rank, 1024
    # Cosines of independent spaces, and of spaces that share a part.
    x = rng.standard_normal((shape.count, r, r), np.float32) / np.float32(d**0.5)
    x[::3] += 0.9 * np.eye(r, dtype=np.float32)
    given = torch.from_numpy(x)
    run = {
        OURS: lambda: ops.singular_values(x, threads=threads),
        SVDVALS: lambda: torch.linalg.svdvals(given),
        EIGVALSH: lambda: torch.linalg.eigvalsh(given @ given.mT),
        NUMPY: lambda: np.linalg.svd(x, compute_uv=False),
    }

    def finish(results, medians) -> list[Fact]:
        exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        worst = {n: float(np.abs(np.asarray(results[n]) - exact).max()) for n in (OURS, SVDVALS)}
        assert worst[OURS] < 1e-6, f"singular values off by {worst[OURS]:.1e}"
        return [
            Fact("largest error", worst[OURS], "1", Target(1e-6, False), note="against float64"),
            Fact("largest error", worst[SVDVALS], "1", peer="torch", note="against float64"),
        ]

    yield Work(run, finish)


def _zoo(zoo: Zoo, threads: int) -> Case:
    pairs = zoo.count * (zoo.count - 1) // 2
    variants = (
        Variant(OURS, note=f"{len(FAMILY.pairs)} columns, from files"),
        Variant(PASS, compare=False, note="from files"),
        Variant(LOOP, "torch", factor=pairs / zoo.pairs, extrapolated=True, most=3,
                note=f"orthonormal bases for free, float32, {zoo.pairs} pairs, times "
                f"{pairs / zoo.pairs:g}"),
    )  # fmt: skip
    name = f"{zoo.count} adapters, {zoo.modules} modules {zoo.width}^2, r={zoo.rank}"
    return Case(
        "angles", name, threads, "process_cpu" if threads == 1 else "wall", 3, variants,
        lambda: _prepare_zoo(zoo, threads),
    )  # fmt: skip


@contextmanager
def _prepare_zoo(shape: Zoo, threads: int) -> Iterator[Work]:
    with temporary_folder() as folder:
        write_zoo(folder, shape.count, uniform(shape.modules, shape.width, shape.width), shape.rank)
        zoo = mpf.open_zoo(folder)
        first, second = (x[: shape.pairs] for x in np.triu_indices(shape.count, 1))
        bases = [
            {
                name: (torch.from_numpy(f.left.copy()), torch.from_numpy(f.right.copy()))
                for name, f in module.forms.items()
            }
            for module in mpf.canonical(zoo)
        ]

        def loop() -> torch.Tensor:
            out = []
            for module in bases:
                for i, j in zip(first, second, strict=True):
                    a, b = module[zoo.names[i]], module[zoo.names[j]]
                    out += [torch.linalg.svdvals(x @ y.T) for x, y in zip(a, b, strict=True)]
            return torch.stack(out)

        run = {
            OURS: lambda: FAMILY.compute(zoo, NOTHING, threads),
            PASS: lambda: engine.run(zoo, select("default").features, threads=threads),
            LOOP: loop,
        }

        def finish(results, medians) -> list[Fact]:
            column = {c.name: c for c in FAMILY.pairs}["row_cosine_mean"]
            found = column.finish(results[OURS], first, second)
            row = results[LOOP].reshape(shape.modules, len(first), 2, -1)[:, :, 1]
            apart = np.abs(row.double().mean((0, 2)).numpy() - found).max()
            assert apart < 1e-5, f"mean cosines differ by {apart:.1e}"
            again = FAMILY.compute(zoo, NOTHING, 3 - threads)
            for name, values in results[OURS].columns.items():
                assert np.array_equal(values, again.columns[name], equal_nan=True), name
            return [Fact("mean cosine, largest difference to torch", float(apart), "1")]

        yield Work(run, finish)
