"""P1 over a chunk of modules, and what it says about each pair of a block of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.features.declare import Need, Sums

_PRODUCT = {"uv": 0, "uu": 1, "vv": 2}
_WEIGHT = {"one": -1, "sigma": 0, "energy": 1}
_POWER = {"one": 0, "sigma": 1, "energy": 2}


def flip(n: Need) -> Need:
    """The same sum with the two adapters exchanged."""
    return Need(n.product, n.column, n.row)


@dataclass(frozen=True, eq=False)
class _Side:
    """The chunk's entries of one block of adapters."""

    count: int  # adapters in the block
    blocks: np.ndarray
    bounds: np.ndarray  # entries of each module
    weights: np.ndarray  # (2, stacked rows): sigma / top and its square
    where: np.ndarray  # position of each entry's adapter in the block
    top: np.ndarray  # largest sigma of each entry, 0 where the delta counts as zero
    sigma: np.ndarray
    rank: np.ndarray

    @staticmethod
    def of(members: np.ndarray, raw: RawChunk, form: CanonicalChunk) -> _Side:
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
        return _Side(
            len(members), np.ascontiguousarray(form.blocks[here]), bounds.astype(np.int64),
            np.ascontiguousarray([relative, relative**2]),
            position[raw.entries["adapter"][here]], top, sigma, rank,
        )  # fmt: skip

    def spread(self, rows: slice, values: np.ndarray) -> np.ndarray:
        """Values of a module's entries by adapter of the block, zero where it lacks the module."""
        out = np.zeros(self.count)
        out[self.where[rows]] = values
        return out


class ChunkGrams:
    """One fused P1 pass over the modules of a chunk; ``modules`` then gives the sums of each.

    ``pairs`` are positions in the blocks of adapters ``first`` and ``second``, which may be the
    same object: then the pass is symmetric.
    """

    def __init__(
        self, first: np.ndarray, second: np.ndarray, pairs: tuple[np.ndarray, np.ndarray],
        needs: Sequence[Need], raw: RawChunk, form: CanonicalChunk, threads: int,
    ) -> None:  # fmt: skip
        self._symmetric = first is second
        self._one = one = _Side.of(first, raw, form)
        self._two = two = one if self._symmetric else _Side.of(second, raw, form)
        self._i, self._j = pairs
        self._needs = list(needs)
        # The (b, a) value of a directed sum lies in the other triangle; without one it is an
        # epilogue of its own.
        self._listed = list(needs)
        if not self._symmetric:
            self._listed += [flip(n) for n in needs if flip(n) not in needs]
        self._chunk = raw.chunk
        self._shapes = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
        counts = np.diff(one.bounds) * np.diff(two.bounds)
        self._bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._out = np.empty((len(self._listed), int(self._bounds[-1])))
        if self._out.size == 0:
            return
        second_stack = (None,) * 3 if self._symmetric else (two.blocks, two.bounds, two.weights)
        _native.core().gram_pass(
            one.blocks, one.bounds, one.weights, *second_stack,
            np.array([m.d_out for m in self._shapes], np.int64),
            np.array([m.d_in for m in self._shapes], np.int64),
            [(_PRODUCT[n.product], _WEIGHT[n.row], _WEIGHT[n.column]) for n in self._listed],
            self._out, self._bounds, False, threads, _native.isa(), 0,
        )  # fmt: skip

    def modules(self) -> Iterator[tuple[int, Sums]]:
        """(module, its sums over the pairs) for every module that any adapter has."""
        for k in range(len(self._shapes)):
            rows1 = slice(self._one.bounds[k], self._one.bounds[k + 1])
            rows2 = slice(self._two.bounds[k], self._two.bounds[k + 1])
            if rows1.start < rows1.stop or rows2.start < rows2.stop:
                yield self._chunk.first + k, self._sums(k, rows1, rows2)

    def _sums(self, k: int, rows1: slice, rows2: slice) -> Sums:
        one, two, i, j = self._one, self._two, self._i, self._j
        width = two.bounds[k + 1] - two.bounds[k]
        grams = self._out[:, self._bounds[k] : self._bounds[k + 1]]
        # Where each pair's entry lies in the module's Gram; pairs that lack it read entry 0.
        row_of = one.spread(rows1, np.arange(rows1.stop - rows1.start)).astype(np.intp)
        column_of = two.spread(rows2, np.arange(rows2.stop - rows2.start)).astype(np.intp)
        here1, here2 = one.spread(rows1, 1.0), two.spread(rows2, 1.0)
        here_i, here_j = here1[i], here2[j]
        at = row_of[i] * width + column_of[j]
        back = row_of[j] * width + column_of[i] if self._symmetric else at
        top_i, top_j = one.spread(rows1, one.top[rows1])[i], two.spread(rows2, two.top[rows2])[j]
        both = None if here1.all() and here2.all() else here_i * here_j

        def over_pairs(n: Need, where: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            if grams.shape[1] == 0:
                return np.zeros(len(i))
            values = np.take(grams[self._listed.index(n)], where)
            for top, power in ((a, _POWER[n.row]), (b, _POWER[n.column])):
                if power:
                    values *= top if power == 1 else top * top
            return values if both is None else np.where(both > 0, values, 0.0)

        need = {n: over_pairs(n, at, top_i, top_j) for n in self._needs}
        mirrored = {}
        for n in self._needs:
            if flip(n) == n:
                mirrored[n] = need[n]
            elif self._symmetric:
                mirrored[n] = over_pairs(n, back, top_j, top_i)
            else:
                mirrored[n] = over_pairs(flip(n), at, top_i, top_j)

        def energies(side: _Side, rows: slice, pair: np.ndarray) -> list[np.ndarray]:
            square = np.square(side.sigma[rows])
            values = square.sum(1), np.square(square).sum(1), side.rank[rows]
            return [side.spread(rows, v)[pair] for v in values]

        e1, f1, k1 = energies(one, rows1, i)
        e2, f2, k2 = energies(two, rows2, j)
        entries = self._shapes[k].d_out * self._shapes[k].d_in
        return Sums(
            need, mirrored, e1, e2, f1, f2, k1, k2, e1 * here_j, e2 * here_i, e1 * e2 / entries
        )
