"""Energies of output and input channels: the squared norms of the rows and columns of each delta.

With canonical factors, row o of W has the squared norm sum_a sigma_a^2 U[o,a]^2: no tile is needed,
and a pair costs d multiply-adds a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.p1 import Side, outputs
from mergeprobe_fast.engine.project import ChunkFactors

SIDE = {"out": "u", "in": "v"}


def energies(factors: ChunkFactors, side: str, i: int) -> np.ndarray:
    """Channel energies of an entry over its largest sigma squared: float64 (d,); "out" or "in"."""
    vectors = factors.vectors(SIDE[side], i)
    weights = np.square(factors.relative[i, : factors.rank[i]]).astype(np.float32)
    return (np.square(vectors) @ weights).astype(np.float64)


class ChannelGrams:
    """Inner products of channel energies over the modules of a chunk, relative to the top sigmas.

    ``cross[side]`` lie as :func:`.p1.outputs` has them, ``alone[side]`` has (entries of one) and
    (entries of two) products of each entry with itself.
    """

    def __init__(
        self, one: Side, two: Side, sides: Sequence[str], raw: RawChunk, form: CanonicalChunk,
        threads: int,
    ) -> None:  # fmt: skip
        self._one, self._two = one, two
        self._bounds = bounds = outputs(one, two)
        self.cross = {side: np.zeros(int(bounds[-1])) for side in sides}
        self.alone = {
            side: (np.zeros(len(one.entries)), np.zeros(len(two.entries))) for side in sides
        }
        if not sides:
            return
        self._factors = ChunkFactors(raw, form)
        jobs = [(side, k) for side in sides for k in range(len(bounds) - 1)]
        with _env.one_blas_thread(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda job: self._fill(*job), jobs))

    def _fill(self, side: str, k: int) -> None:
        one, two = self._one, self._two
        first = self._stack(side, one, k)
        second = first if one is two else self._stack(side, two, k)
        here = slice(*self._bounds[k : k + 2])
        self.cross[side][here] = (first @ second.T).ravel()
        for whole, part, rows in zip(
            self.alone[side], (first, second), (one.rows(k), two.rows(k)), strict=True
        ):
            whole[rows] = np.einsum("nd,nd->n", part, part)

    def _stack(self, side: str, members: Side, k: int) -> np.ndarray:
        rows = members.rows(k)
        found = [energies(self._factors, side, int(i)) for i in members.entries[rows]]
        module = self._factors.modules[k]
        d = module.d_out if side == "out" else module.d_in
        return np.array(found).reshape(len(found), d)
