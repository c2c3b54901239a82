"""P1 over a chunk of modules, and what it says about each pair of a block of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mergeprobe_fast.engine.channels import ChannelGrams
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.declare import CHANNELS, Need, Sums
from mergeprobe_fast.engine.device import DeviceChunk
from mergeprobe_fast.engine.on_domains import DomainGrams
from mergeprobe_fast.engine.p1 import POWER, Side, flip, fused, outputs
from mergeprobe_fast.engine.samples import Samples


class ChunkGrams:
    """One fused P1 pass over the modules of a chunk; ``modules`` then gives the sums of each.

    ``pairs`` are positions in the blocks of adapters ``first`` and ``second``, which may be the
    same object: then the pass is symmetric. ``on``: samples, and each adapter's
    domain among them, where a need has a view.
    """

    def __init__(
        self, first: np.ndarray, second: np.ndarray, pairs: tuple[np.ndarray, np.ndarray],
        needs: Sequence[Need], raw: RawChunk, form: CanonicalChunk, threads: int,
        on: tuple[Samples, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._symmetric = first is second
        self._one = one = Side.of(first, raw, form)
        self._two = two = one if self._symmetric else Side.of(second, raw, form)
        self._i, self._j = pairs
        self._needs = [n for n in needs if n.view == "weights"]
        tiles = [n for n in self._needs if n.product not in CHANNELS]
        # The (b, a) value of a directed sum lies in the other triangle; without one it is an
        # epilogue of its own.
        self._listed = list(tiles)
        if not self._symmetric:
            self._listed += [flip(n) for n in tiles if flip(n) not in tiles]
        self._chunk = raw.chunk
        self._shapes = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
        self._bounds = outputs(one, two)
        self._domains = self._domain_grams = None
        riding, views = [], []
        if on is not None:
            samples, of = on
            with_view = [n for n in needs if n.view != "weights"]
            self._domain_grams = DomainGrams(one, two, with_view, raw, form, samples, threads)
            self._domains = of[first], of[second]
            riding, views = self._domain_grams.riding, self._domain_grams.views
        p, q = [m.d_out for m in self._shapes], [m.d_in for m in self._shapes]
        if isinstance(form, DeviceChunk):
            self._results = form.fused(one, two, p, q, self._listed)
            ridden = fused(one, two, p, q, riding, views, threads=threads) if riding else None
        else:
            listed = [(n, 0) for n in self._listed]
            found = fused(one, two, p, q, listed + riding, views, threads=threads)
            self._results, ridden = lambda: found[: len(listed)], found[len(listed) :]
        if self._domain_grams is not None:
            self._domain_grams.take(ridden)
        self._channels = ChannelGrams(
            one, two, [n.product for n in self._needs if n.product in CHANNELS], raw, form, threads
        )

    def modules(self) -> Iterator[tuple[int, Sums]]:
        """(module, its sums over the pairs) for every module that any adapter has."""
        self._out = self._results()
        for k in range(len(self._shapes)):
            rows1, rows2 = self._one.rows(k), self._two.rows(k)
            if rows1.start < rows1.stop or rows2.start < rows2.stop:
                yield self._chunk.first + k, self._sums(k, rows1, rows2)

    def _sums(self, k: int, rows1: slice, rows2: slice) -> Sums:
        one, two, i, j = self._one, self._two, self._i, self._j
        width = two.bounds[k + 1] - two.bounds[k]
        grams = self._out[:, self._bounds[k] : self._bounds[k + 1]]
        # Where each pair's entry lies in the module's Gram; pairs that lack it read entry 0.
        row_of = one.spread(rows1, np.arange(rows1.stop - rows1.start)).astype(np.intp)
        column_of = two.spread(rows2, np.arange(rows2.stop - rows2.start)).astype(np.intp)
        here1 = one.spread(rows1, np.ones(rows1.stop - rows1.start))
        here2 = two.spread(rows2, np.ones(rows2.stop - rows2.start))
        here_i, here_j = here1[i], here2[j]
        at = row_of[i] * width + column_of[j]
        back = row_of[j] * width + column_of[i] if self._symmetric else at
        top_i, top_j = one.spread(rows1, one.top[rows1])[i], two.spread(rows2, two.top[rows2])[j]
        both = None if here1.all() and here2.all() else here_i * here_j

        def over_pairs(n: Need, where: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            if grams.shape[1] == 0:
                return np.zeros(len(i))
            if n.product in CHANNELS:
                gram = self._channels.cross[n.product][self._bounds[k] : self._bounds[k + 1]]
            else:
                gram = grams[self._listed.index(n)]
            values = np.take(gram, where)
            for top, power in ((a, POWER[n.row]), (b, POWER[n.column])):
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

        def energies(side: Side, rows: slice, pair: np.ndarray) -> list[np.ndarray]:
            square = np.square(side.sigma[rows])
            values = square.sum(1), np.square(square).sum(1), side.rank[rows]
            return [side.spread(rows, v)[pair] for v in values]

        own = {}
        for n in self._needs:
            if n.product in CHANNELS:
                alone1, alone2 = self._channels.alone[n.product]
                own[n] = np.array([
                    one.spread(rows1, alone1[rows1] * one.top[rows1] ** 4)[i],
                    two.spread(rows2, alone2[rows2] * two.top[rows2] ** 4)[j],
                ])  # fmt: skip
        e1, f1, k1 = energies(one, rows1, i)
        e2, f2, k2 = energies(two, rows2, j)
        entries = self._shapes[k].d_out * self._shapes[k].d_in
        domain = {}
        if self._domain_grams is not None:
            place = np.where(here_i * here_j > 0, at, -1)
            domain = self._domain_grams.sums(k, place, (i, j), self._domains)
        return Sums(
            need, mirrored, e1, e2, f1, f2, k1, k2, e1 * here_j, e2 * here_i, e1 * e2 / entries,
            here_i, here_j, domain, own,
        )  # fmt: skip
