"""Stacks of factors and the fused P1 call on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.declare import Need
from mergeprobe_fast.ops._tables import BLOCK

# "hsic" is N*N on centred inputs, and what `domain_grams` adds.
_PRODUCT = {"uv": 0, "uu": 1, "vv": 2, "hsic": 2}
_WEIGHT = {"one": -1, "sigma": 0, "energy": 1}
POWER = {"one": 0, "sigma": 1, "energy": 2}  # of sigma
# Sums over entries of dense matrices instead of tiles of ranks: 0 never, 1 where a model of the
# cost says so (csrc/cpu/gram_streamed.cpp: large ranks), 2 always, to test and to measure.
STREAMING = 1


def flip(n: Need) -> Need:
    """The same sum with the two adapters exchanged."""
    return Need(n.product, n.column, n.row, n.view, n.relative)


@dataclass(frozen=True, eq=False)
class Side:
    """The chunk's entries of one block of adapters."""

    count: int  # adapters in the block
    entries: np.ndarray  # indices into the chunk's entries
    form: CanonicalChunk
    bounds: np.ndarray  # entries of each module
    weights: np.ndarray  # (2, stacked rows): sigma / top and its square
    where: np.ndarray  # position of each entry's adapter in the block
    top: np.ndarray  # largest sigma of each entry, 0 where the delta counts as zero
    sigma: np.ndarray
    rank: np.ndarray

    @staticmethod
    def of(members: np.ndarray, raw: RawChunk, form: CanonicalChunk) -> Side:
        """What a chunk has of ``members``, indices of adapters."""
        position = np.full(len(raw.zoo), -1)
        position[members] = np.arange(len(members))
        here = np.flatnonzero(position[raw.entries["adapter"]] >= 0)
        module = raw.entries["module"][here] - raw.chunk.first
        bounds = np.searchsorted(module, np.arange(raw.chunk.last - raw.chunk.first + 1))
        rank = form.rank[here]
        # A delta below the rounding of its factors counts as zero.
        sigma = np.where(rank[:, None] > 0, form.sigma[here], 0.0)
        top = sigma[:, 0] if sigma.shape[1] else np.zeros(len(here))
        # Weights are relative to each delta's largest sigma, so that float32 neither over- nor
        # underflows; the product is scaled back in float64.
        kept = np.arange(sigma.shape[1])[None, :] < rank[:, None]
        relative = (sigma / np.where(top > 0, top, 1.0)[:, None])[kept]
        return Side(
            len(members), here, form, bounds.astype(np.int64),
            np.ascontiguousarray([relative, relative**2]),
            position[raw.entries["adapter"][here]], top, sigma, rank,
        )  # fmt: skip

    @cached_property
    def blocks(self) -> np.ndarray:
        """The canonical factors of the entries."""
        return np.ascontiguousarray(self.form.blocks[self.entries])

    @cached_property
    def module(self) -> np.ndarray:
        """The module of each entry, counted from the chunk's first."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def rows(self, k: int) -> slice:
        """The entries of a module."""
        return slice(self.bounds[k], self.bounds[k + 1])

    def spread(self, rows: slice, values: np.ndarray) -> np.ndarray:
        """Values (..., entries of a module) by adapter, zero where it lacks the module."""
        out = np.zeros((*np.shape(values)[:-1], self.count))
        out[..., self.where[rows]] = values
        return out


@dataclass(frozen=True, eq=False)
class View:
    """Other factors of a chunk's entries: ``matrices`` MATRIX, ``columns`` how many by module."""

    matrices: np.ndarray
    columns: np.ndarray


def outputs(one: Side, two: Side) -> np.ndarray:
    """Where each module's n1 x n2 results start, and the end."""
    counts = np.diff(one.bounds) * np.diff(two.bounds)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def fused(
    one: Side, two: Side, p: np.ndarray, q: np.ndarray, needs: Sequence[tuple[Need, int]],
    views: Sequence[View] = (), *, left: View | None = None, threads: int,
) -> np.ndarray:  # fmt: skip
    """One pass over the modules of a chunk: (needs, results), those of a module as ``outputs`` has.

    ``needs`` say which N they read: that of the right factors (0), or of ``views[k - 1]``. ``left``
    takes the place of the left factors, with p columns a module. ``one is two``: symmetric.

    A module's sums without a view may be taken over the entries of dense matrices, formed in tiles,
    if that is cheaper, which depends on how many adapters are there: their last bits do too.
    """
    bounds = outputs(one, two)
    out = np.empty((len(needs), int(bounds[-1])))
    if out.size == 0:
        return out

    def table(side: Side) -> np.ndarray:
        if left is None:
            return side.blocks
        blocks = np.zeros(len(side.blocks), BLOCK)
        blocks["u"], blocks["v"] = left.matrices[side.entries], side.blocks["v"]
        blocks["rank"] = side.blocks["rank"]
        return blocks

    def matrices(side: Side) -> np.ndarray:
        return np.concatenate([v.matrices[side.entries] for v in views])

    second = (None,) * 3 if one is two else (table(two), two.bounds, two.weights)
    others = None
    if views:
        others = (
            matrices(one), None if one is two else matrices(two),
            np.array([v.columns for v in views], np.int64), [k for _, k in needs],
        )  # fmt: skip
    _native.core().gram_pass(
        table(one), one.bounds, one.weights, *second, np.asarray(p, np.int64),
        np.asarray(q, np.int64), [epilogue(n) for n, _ in needs], out, bounds, False, threads,
        _native.isa(), 0, others, STREAMING,
    )  # fmt: skip
    return out


def epilogue(n: Need) -> tuple[int, int, int]:
    """(product, row weight, column weight) as the kernel numbers them."""
    return _PRODUCT[n.product], _WEIGHT[n.row], _WEIGHT[n.column]


def alone(left: View | None, right: View, side: Side, need: Need, threads: int) -> np.ndarray:
    """The sum of each of a side's entries with itself, float64 throughout.

    Like those of :func:`fused`, with sigma relative to its largest.
    """
    n = len(side.blocks)
    module = np.repeat(np.arange(len(side.bounds) - 1), np.diff(side.bounds))
    blocks = np.zeros(n, BLOCK)
    blocks["v"], blocks["rank"] = right.matrices[side.entries], side.blocks["rank"]
    p = np.zeros(n, np.int64)
    if left is not None:
        blocks["u"], p = left.matrices[side.entries], left.columns[module]
    out = np.empty((1, n))
    each = np.arange(n + 1)
    _native.core().gram_pass(
        blocks, each, side.weights, None, None, None, p, right.columns[module], [epilogue(need)],
        out, each, True, threads, _native.isa(), 0,
    )  # fmt: skip
    return out[0]
