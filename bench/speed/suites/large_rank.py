"""Sums of the features at large ranks: over tiles of ranks, streamed, and what is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from cases import CORE, OURS, Case, Fact, Target, Variant, Work

from mergeprobe_fast import _native
from mergeprobe_fast.engine.p1 import epilogue
from mergeprobe_fast.features import select
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE, address

TILES, STREAMED = "tiles of ranks", "streamed"
STREAMING = {OURS: 1, TILES: 0, STREAMED: 2}
FEATURES = {"default features": "default", "cosine": ["cosine"]}
ERROR = 2e-6  # of a range of 1, the bound of features in the tests
# (rank, width of the square delta, adapters)
FULL = (
    (32, 320, 200), (64, 320, 50), (64, 320, 200), (128, 320, 8), (128, 320, 50), (128, 320, 200),
    (64, 640, 200), (128, 640, 50), (128, 640, 200), (64, 1280, 50), (128, 1280, 50),
    (64, 1280, 200), (128, 2048, 50),
)  # fmt: skip
QUICK = ((32, 320, 50), (64, 320, 50), (128, 320, 50))


def cases(quick: bool) -> list[Case]:
    """One thread; the choice is never to be far from the better of the two."""
    variants = (
        Variant(OURS, note="what the model of the cost chooses"),
        Variant(TILES, CORE, Target(0.9), note="never streamed"),
        Variant(STREAMED, CORE, Target(0.75), note="always streamed"),
    )
    return [
        Case(
            "large_rank", f"N={n} r={r} {d}x{d} {name}", 1, "thread_cpu", 3, variants,
            lambda r=r, d=d, n=n, chosen=chosen: _prepare(r, d, n, chosen),
        )
        for r, d, n in (QUICK if quick else FULL) for name, chosen in FEATURES.items()
    ]  # fmt: skip


@contextmanager
def _prepare(rank: int, d: int, count: int, chosen: str | list[str]) -> Iterator[Work]:
    needs = sorted({x for f in select(chosen).features for x in f.needs}, key=str)
    sums = [epilogue(x) for x in needs]
    generator = np.random.default_rng(0)
    # Rows of length 1 at random, the scale of orthonormal ones, with spectra that fall like 1 / a.
    factors = generator.standard_normal((2, count, d, rank), np.float32) / np.float32(d**0.5)
    table = np.zeros(count, BLOCK)
    table["rank"] = rank
    for side, stack in zip("uv", factors, strict=True):
        m = table[side]
        m["data"] = address(stack) + stack[0].nbytes * np.arange(count)
        m["row_stride"], m["col_stride"], m["dtype"] = 1, rank, DTYPE_CODE["F32"]
    sigma = np.tile(1.0 / np.arange(1, rank + 1), count)
    weights = np.ascontiguousarray([sigma, sigma**2])
    bounds, results = np.array([0, count]), np.array([0, count**2])

    def run(streaming: int, exact: bool = False) -> np.ndarray:
        out = np.empty((len(sums), count**2))
        _native.core().gram_pass(
            table, bounds, weights, None, None, None, np.array([d]), np.array([d]), sums, out,
            results, exact, 1, _native.isa(), 0, None, streaming,
        )  # fmt: skip
        return out

    def finish(results, medians) -> list[Fact]:
        exact = run(0, exact=True).reshape(-1, count, count)
        found = {name: x.reshape(exact.shape) for name, x in results.items()}
        worst = dict.fromkeys(found, 0.0)
        for k, need in enumerate(needs):
            if need.row != need.column:
                continue
            length = np.sqrt(np.diagonal(exact[k]))
            for name, x in found.items():
                error = np.abs(x[k] - exact[k]) / np.outer(length, length)
                worst[name] = max(worst[name], float(error.max()))
        assert max(worst.values()) < ERROR, f"errors against float64: {worst}"
        same = [np.array_equal(x, y) for x, y in zip(found[OURS], found[TILES], strict=True)]
        return [
            Fact("largest error, tiles of ranks", worst[TILES], "1", Target(ERROR, False), CORE),
            Fact("largest error, streamed", worst[STREAMED], "1", Target(ERROR, False)),
            Fact("share of sums that are streamed", 1.0 - float(np.mean(same)), "1"),
        ]

    yield Work({name: lambda s=s: run(s) for name, s in STREAMING.items()}, finish)
