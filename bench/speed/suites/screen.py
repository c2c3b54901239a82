"""A screen of a zoo on disk against the sum of its parts, its memory, and its growth with N."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import size_of, temporary_folder, uniform, write_zoo
from harness import run_process

import mergeprobe_fast as mpf
from mergeprobe_fast import _native
from mergeprobe_fast.engine.chunks import CanonicalFactors, RawChunk, RawFactors, plan_chunks
from mergeprobe_fast.engine.passes import CHUNK_BYTES
from mergeprobe_fast.ops._tables import BLOCK
from mergeprobe_fast.screening import Screen, screen
from mergeprobe_fast.zoo import Zoo
from suites.everyday import NAMES
from suites.gram import gram_pass

P1, CANONICAL = "P1 alone, raw factors in memory", "canonicalisation alone"
RANK, D_OUT, D_IN = 8, 4096, 1024
CHILD = (
    "import sys, mergeprobe_fast as mpf; from mergeprobe_fast.screening import screen; "
    "screen(mpf.open_zoo(sys.argv[1]))"
)


def cases(quick: bool) -> list[Case]:
    """fp32 and bf16 on all cores, growth in N for fp32."""
    count, modules, repetitions = (40, 12, 3) if quick else (200, 64, 3)
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        name = f"zoo of {count} x {modules} modules, r=8, {NAMES[dtype]}"
        halves = (count // 4, count // 2) if dtype == torch.float32 else ()
        variants = [
            Variant(OURS, note="screen(): files in the page cache, default features"),
            Variant(P1, compare=False, note="one gram_pass, all factors already in memory"),
            Variant(CANONICAL, compare=False, note="factors already in memory"),
            *(Variant(f"{OURS} N={n}", compare=False) for n in halves),
        ]
        out.append(
            Case(
                "screen", name, 2, "wall", repetitions, tuple(variants),
                lambda dtype=dtype, halves=halves: _prepare(count, modules, dtype, halves, quick),
            )
        )  # fmt: skip
    return out


@contextmanager
def _prepare(
    count: int, modules: int, dtype: torch.dtype, halves: tuple[int, ...], quick: bool
) -> Iterator[Work]:
    threads = 2
    with temporary_folder() as root:
        paths = write_zoo(root, count, uniform(modules, D_OUT, D_IN), RANK, dtype)
        zoo = mpf.open_zoo(root)
        memory = _Memory(zoo, threads)
        run = {
            OURS: lambda: screen(zoo, threads=threads),
            P1: lambda: memory.gram(threads),
            CANONICAL: lambda: memory.canonicalise(threads),
        }
        for n in halves:
            part = mpf.open_zoo(paths[:n])
            run[f"{OURS} N={n}"] = lambda part=part: screen(part, threads=threads)

        def finish(results, medians) -> list[Fact]:
            _check(results[OURS], results[P1], results[CANONICAL], zoo)
            parts = medians[P1] + medians[CANONICAL]
            # What is fixed per pair and per module weighs more in a small zoo.
            target = None if quick else Target(1.15, False)
            facts = [
                Fact("screen / (P1 + canonicalisation)", medians[OURS] / parts, "ratio",
                     target, note=f"sum of parts {parts:.3f} s"),
                Fact("rate of P1 alone", _flops(zoo) / medians[P1] / 1e9, "GF/s"),
                *_memory_facts(root, paths),
            ]  # fmt: skip
            sizes = [*halves, count]
            times = [medians[f"{OURS} N={n}"] for n in halves] + [medians[OURS]]
            for k in range(1, len(sizes)):
                exponent = math.log(times[k] / times[k - 1]) / math.log(sizes[k] / sizes[k - 1])
                facts.append(
                    Fact(f"exponent of time, N={sizes[k - 1]} to {sizes[k]}", exponent, "1")
                )
            return facts

        yield Work(run, finish)


class _Memory:
    """All raw factors of a zoo in memory, described once as a whole and once by chunks."""

    def __init__(self, zoo: Zoo, threads: int) -> None:
        everyone = np.arange(len(zoo))
        (whole,) = plan_chunks(zoo, everyone, 1 << 62)
        self._raw = RawFactors(zoo, whole.raw_bytes).read(whole, threads)
        self._blocks = self._raw.fill(np.zeros(len(self._raw.entries), BLOCK))
        self._p, self._q = np.array([(m.d_out, m.d_in) for m in zoo.modules], np.int64).T.copy()
        self._bounds = zoo.table.module_bounds
        self._chunks = []
        for chunk in plan_chunks(zoo, everyone, CHUNK_BYTES):
            rows = chunk.rows
            self._chunks.append(
                RawChunk(chunk, self._raw.entries[rows], self._raw.a[rows], self._raw.b[rows],
                         self._raw.buffer, zoo)
            )  # fmt: skip
        self._canonical = CanonicalFactors(max(c.chunk.canonical_floats for c in self._chunks))

    def gram(self, threads: int) -> np.ndarray:
        """The unscaled inner products of every module."""
        return gram_pass(self._blocks, self._bounds, self._p, self._q, threads, _native.isa())

    def canonicalise(self, threads: int) -> np.ndarray:
        """Singular values of every delta."""
        return np.concatenate([self._canonical.compute(c, threads).sigma for c in self._chunks])


def _check(found: Screen, grams: np.ndarray, sigma: np.ndarray, zoo: Zoo) -> None:
    """The screen says what its parts say."""
    scale = zoo.table.entries["scale"][0]
    total = scale**2 * grams.sum(0)
    length = np.sqrt(np.diag(total))
    i, j = np.triu_indices(len(zoo), 1)
    difference = np.abs(np.asarray(found.pairs["cosine"]) - total[i, j] / (length[i] * length[j]))
    assert difference.max() < 2e-6, f"cosine: {difference.max():.1e}"
    norms = np.asarray(found.adapters["norm"])
    assert np.allclose(norms, length, rtol=1e-5), "norms of P1"
    owner = zoo.table.entries["adapter"]
    energy = np.bincount(owner, weights=np.square(sigma).sum(1))
    assert np.allclose(norms, np.sqrt(energy), rtol=1e-9), "norms of the canonical form"


def _flops(zoo: Zoo) -> float:
    rows = RANK * len(zoo)
    return float(rows) * (rows + 1) * sum(m.d_out + m.d_in for m in zoo.modules)


def _memory_facts(root: Path, paths: list[Path]) -> list[Fact]:
    alone = run_process([sys.executable, "-c", "import mergeprobe_fast.screening"])
    whole = run_process([sys.executable, "-c", CHILD, root])
    zoo_bytes = size_of(paths)
    return [
        Fact("zoo on disk", zoo_bytes / 1e6, "MB"),
        Fact("peak RSS of a process that screens", whole.peak_rss / 1e6, "MB",
             note=f"{alone.peak_rss / 1e6:.0f} MB of it for the imports"),
        Fact("peak RSS / zoo", whole.peak_rss / zoo_bytes, "ratio"),
    ]  # fmt: skip
