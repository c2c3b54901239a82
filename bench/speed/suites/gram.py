"""The block Gram against matrix multiplication: rates, other formulations, instruction sets."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import CORE, OURS, Case, Fact, Target, Variant, Work
from data import temporary_folder

from mergeprobe_fast import _native, ops
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE

SGEMM = 2.0 * 1024 * 1024 * 4096
DTYPES = {torch.float32: DTYPE_CODE["F32"], torch.bfloat16: DTYPE_CODE["BF16"]}
RAGGED = (4, 8, 8, 16, 32, 12)
COSINE_ERROR = 5e-7


@dataclass(frozen=True)
class Shape:
    """One problem: ``count`` adapters, ranks cycled through, factors of widths p (B) and q (A)."""

    name: str
    count: int
    ranks: tuple[int, ...]
    p: int
    q: int
    dtype: torch.dtype
    repetitions: int
    sets: bool = False  # also time the other instruction sets

    @property
    def rank_list(self) -> list[int]:
        """Rank of each adapter."""
        return [self.ranks[i % len(self.ranks)] for i in range(self.count)]

    @property
    def flops(self) -> float:
        """Necessary ones: half of two symmetric products, R(R+1)(p+q)."""
        rows = sum(self.rank_list)
        return float(rows) * (rows + 1) * (self.p + self.q)


F32, BF16 = torch.float32, torch.bfloat16
FULL = (
    Shape("N=200 r=16 4096+4096 fp32", 200, (16,), 4096, 4096, F32, 5),
    Shape("N=100 r=16 2048+2048 fp32", 100, (16,), 2048, 2048, F32, 11, sets=True),
    Shape("N=200 r=8 4096+1024 fp32", 200, (8,), 4096, 1024, F32, 9, sets=True),
    Shape("N=200 ragged 4-32 4096+1024 fp32", 200, RAGGED, 4096, 1024, F32, 5),
    Shape("N=200 r=8 4096+1024 bf16", 200, (8,), 4096, 1024, BF16, 9),
    # The ends of each axis: ranks, adapters, widths.
    Shape("N=400 r=4 2048+2048 fp32", 400, (4,), 2048, 2048, F32, 9),
    Shape("N=50 r=32 2048+2048 fp32", 50, (32,), 2048, 2048, F32, 9),
    Shape("N=25 r=64 2048+2048 fp32", 25, (64,), 2048, 2048, F32, 9),
    Shape("N=10 r=16 2048+2048 fp32", 10, (16,), 2048, 2048, F32, 21),
    Shape("N=1000 r=8 1024+1024 fp32", 1000, (8,), 1024, 1024, F32, 3),
    Shape("N=100 r=16 256+256 fp32", 100, (16,), 256, 256, F32, 21),
    Shape("N=100 r=16 11008+4096 fp32", 100, (16,), 11008, 4096, F32, 5),
)
QUICK = (
    Shape("N=60 r=16 2048+2048 fp32", 60, (16,), 2048, 2048, F32, 3, sets=True),
    Shape("N=60 ragged 4-32 1000+1024 fp32", 60, RAGGED, 1000, 1024, F32, 3),
    Shape("N=60 r=16 1024+1024 bf16", 60, (16,), 1024, 1024, BF16, 3),
)


def cases(quick: bool) -> list[Case]:
    """Every shape with one and two threads."""
    return [_case(s, threads) for s in (QUICK if quick else FULL) for threads in (1, 2)]


def _case(shape: Shape, threads: int) -> Case:
    f, stacked = shape.flops, "given stacked factors for free"
    if shape.dtype == BF16:
        stacked = "given stacked factors, widened to fp32 inside the call"
    variants = [
        Variant(OURS, work=f, note="from separate tensors, packing included"),
        Variant("ops.block_gram on stacks", work=f, note="public call, checks included"),
        Variant("torch sgemm 1024x1024x4096", "torch", Target(0.80), work=SGEMM,
                note="aim 0.90; MKL takes its AVX2 kernels on AMD"),
        Variant("numpy sgemm 1024x1024x4096", "numpy (OpenBLAS)", work=SGEMM),
        Variant("torch.mm R x R, reduced", "torch", Target(1.8), note=stacked),
        Variant("torch tiles of 512, reduced", "torch", note=stacked),
    ]  # fmt: skip
    if shape.sets:
        variants += [Variant(f"{OURS} {isa}", work=f) for isa in _other_sets()]
    if _compiler():
        variants.append(Variant(
            "register loop of FMAs", CORE, work=FMA_ITERATIONS * _fma_flops() * threads,
            note="peak of the arithmetic units",
        ))  # fmt: skip
    clock = "thread_cpu" if threads == 1 else "wall"
    return Case(
        "gram", shape.name, threads, clock, shape.repetitions, tuple(variants),
        lambda: _prepare(shape, threads),
    )  # fmt: skip


@contextmanager
def _prepare(shape: Shape, threads: int) -> Iterator[Work]:
    generator = torch.Generator().manual_seed(0)
    ranks = shape.rank_list
    a = [torch.randn(r, shape.q, generator=generator).to(shape.dtype) for r in ranks]
    b = [torch.randn(shape.p, r, generator=generator).to(shape.dtype) for r in ranks]
    u, v = torch.cat([x.T for x in b]).contiguous(), torch.cat(a)
    bounds = np.concatenate([[0], np.cumsum(ranks)]).astype(np.int64)
    table = block_table(a, b)
    best = _native.isa()

    def ours(isa: str = best, count: int = threads) -> np.ndarray:
        return gram_pass(table, [0, len(table)], [shape.p], [shape.q], count, isa)[0]

    left, right = torch.randn(1024, 4096, generator=generator), torch.empty(1024, 1024)
    left_np = left.numpy()
    run: dict[str, Callable[[], object]] = {
        OURS: ours,
        "ops.block_gram on stacks": lambda: ops.block_gram(u, v, bounds, threads=threads),
        "torch sgemm 1024x1024x4096": lambda: torch.mm(left, left.T, out=right),
        "numpy sgemm 1024x1024x4096": lambda: left_np @ other_np,
        "torch.mm R x R, reduced": lambda: full_mm(u, v, ranks),
        "torch tiles of 512, reduced": lambda: tiled_mm(u, v, ranks),
    }
    # x @ x.T would be recognised as symmetric and halved.
    other_np = np.ascontiguousarray(left_np[::-1]).T
    if shape.sets:
        run |= {f"{OURS} {isa}": lambda isa=isa: ours(isa) for isa in _other_sets()}

    def finish(results, medians) -> list[Fact]:
        exact = full_mm(u.double(), v.double(), ranks).numpy()
        length = np.sqrt(np.diag(exact))
        outer = length[:, None] * length[None, :]
        facts, worst = [], {}
        for name, got in results.items():
            if "sgemm" in name or "FMA" in name:
                continue
            got = np.asarray(got, dtype=np.float64)
            own = np.sqrt(np.diag(got))
            worst[name] = float(np.abs(got / (own[:, None] * own) - exact / outer).max())
            assert worst[name] < 20 * COSINE_ERROR, f"{name}: cosine error {worst[name]:.1e}"
        facts.append(Fact("largest cosine error", worst[OURS], "1", Target(COSINE_ERROR, False),
                          note="against float64"))  # fmt: skip
        facts.append(Fact("largest cosine error", worst["torch.mm R x R, reduced"], "1",
                          peer="torch", note="against float64"))  # fmt: skip
        same = np.array_equal(ours(count=1), ours(count=2))
        assert same, "the result depends on the number of threads"
        return facts

    with _fma_loop(threads) as loop:
        if loop:
            run["register loop of FMAs"] = loop
        yield Work(run, finish)


def block_table(a: list[torch.Tensor], b: list[torch.Tensor]) -> np.ndarray:
    """The kernels' description of factors A (r, q) and B (p, r) where they lie."""
    table = np.zeros(len(a), BLOCK)
    table["u"]["data"] = [x.data_ptr() for x in b]
    table["v"]["data"] = [x.data_ptr() for x in a]
    table["rank"] = [len(x) for x in a]
    table["u"]["row_stride"], table["u"]["col_stride"] = 1, table["rank"]
    table["v"]["row_stride"], table["v"]["col_stride"] = [x.shape[1] for x in a], 1
    table["u"]["dtype"], table["v"]["dtype"] = DTYPES[b[0].dtype], DTYPES[a[0].dtype]
    return table


def gram_pass(
    table: np.ndarray, bounds: list[int] | np.ndarray, p: list[int] | np.ndarray,
    q: list[int] | np.ndarray, threads: int, isa: str,
) -> np.ndarray:  # fmt: skip
    """P1 over modules of n adapters each, sum of u*v only, without scales: (modules, n, n)."""
    bounds = np.asarray(bounds, np.int64)
    out_bounds = np.concatenate([[0], np.cumsum(np.diff(bounds) ** 2)]).astype(np.int64)
    out = np.empty((1, int(out_bounds[-1])))
    weights = np.empty((0, int(table["rank"].sum())))
    _native.core().gram_pass(
        table, bounds, weights, None, None, None, np.asarray(p, np.int64), np.asarray(q, np.int64),
        [(0, -1, -1)], out, out_bounds, False, threads, isa, 0,
    )  # fmt: skip
    n = int(bounds[1])
    return out.reshape(-1, n, n)


def full_mm(u: torch.Tensor, v: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Both R x R Grams at once, multiplied, and segment sums as two thin products."""
    u, v = _wide(u), _wide(v)
    member = torch.repeat_interleave(
        torch.eye(len(ranks), dtype=u.dtype), torch.tensor(ranks), dim=0
    )
    return member.T @ ((u @ u.T).mul_(v @ v.T) @ member)


def tiled_mm(u: torch.Tensor, v: torch.Tensor, ranks: list[int], limit: int = 512) -> torch.Tensor:
    """Upper triangle of tiles of whole adapters, scratch reused."""
    u, v = _wide(u), _wide(v)
    member = torch.repeat_interleave(torch.eye(len(ranks)), torch.tensor(ranks), dim=0)
    starts = [0, *np.cumsum(ranks).tolist()]
    tiles, first = [], 0
    for i in range(len(ranks)):
        if starts[i + 1] - starts[first] > limit:
            tiles.append((first, i))
            first = i
    tiles.append((first, len(ranks)))
    out = torch.empty(len(ranks), len(ranks))
    m, n = torch.empty(limit * limit), torch.empty(limit * limit)
    for k, (i0, i1) in enumerate(tiles):
        rows = slice(starts[i0], starts[i1])
        for j0, j1 in tiles[k:]:
            columns = slice(starts[j0], starts[j1])
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            mm, nn = (x[: shape[0] * shape[1]].view(shape) for x in (m, n))
            torch.mm(u[rows], u[columns].T, out=mm)
            torch.mm(v[rows], v[columns].T, out=nn)
            part = member[rows, i0:i1].T @ (mm.mul_(nn) @ member[columns, j0:j1])
            out[i0:i1, j0:j1], out[j0:j1, i0:i1] = part, part.T
    return out


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == BF16 else x


def _other_sets() -> list[str]:
    return [isa for isa in _native.core().available_isas() if isa != _native.isa()]


FMA_ITERATIONS = 10_000_000


def _compiler() -> str | None:
    on_x86 = "avx2" in _native.core().available_isas()
    return shutil.which("gcc") if on_x86 else None


def _fma_flops() -> float:
    """Per iteration of fma_peak.c: 12 chains, two flops a lane."""
    return 24.0 * (16 if "avx512" in _native.core().available_isas() else 8)


@contextmanager
def _fma_loop(threads: int) -> Iterator[Callable[[], object] | None]:
    """The register loop on every thread, or None without a compiler."""
    compiler = _compiler()
    if compiler is None:
        yield None
        return
    with temporary_folder() as folder, ThreadPoolExecutor(threads) as pool:
        source, built = Path(__file__).parents[1] / "fma_peak.c", folder / "fma_peak.so"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", built, source], check=True, capture_output=True)
        library = ctypes.CDLL(str(built))
        library.flops_per_iteration.restype = ctypes.c_double
        library.fma_loop.restype = ctypes.c_float
        library.fma_loop.argtypes = [ctypes.c_long]
        assert library.flops_per_iteration() == _fma_flops(), "built for another width"
        if threads == 1:
            yield lambda: library.fma_loop(FMA_ITERATIONS)
        else:
            yield lambda: list(pool.map(library.fma_loop, [FMA_ITERATIONS] * threads))
