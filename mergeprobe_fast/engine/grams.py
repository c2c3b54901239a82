"""P1 over a chunk of modules, and what it says about each pair of a block of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from mergeprobe_fast.engine.channels import ChannelGrams
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.declare import CHANNELS, Need, Sums
from mergeprobe_fast.engine.device import AT_ONCE, DeviceChunk
from mergeprobe_fast.engine.device_views import DeviceChannelGrams, DeviceDomainGrams
from mergeprobe_fast.engine.on_domains import DomainGrams
from mergeprobe_fast.engine.p1 import POWER, Side, flip, fused, outputs
from mergeprobe_fast.engine.samples import Samples

# Of an entry: where its row and column of the module's Gram start, 1, the largest sigma, the sums
# of sigma^2 and sigma^4, the rank.
_ROW, _COLUMN, _HERE, _TOP, _ENERGY, _ENERGY2, _RANK = range(7)


class ChunkGrams:
    """One fused P1 pass over the modules of a chunk; ``modules`` then gives the sums of each.

    ``pairs`` are positions in the blocks of adapters ``first`` and ``second``, which may be the
    same object: then the pass is symmetric. ``on``: samples, and each adapter's
    domain among them, where a need has a view. ``there``: ``pairs`` as arrays of a device, where
    sums are then made and stay; None: on the CPU.
    """

    def __init__(
        self, first: np.ndarray, second: np.ndarray, pairs: tuple[np.ndarray, np.ndarray],
        needs: Sequence[Need], raw: RawChunk, form: CanonicalChunk, threads: int,
        on: tuple[Samples, np.ndarray] | None = None,
        there: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._pairs, self._there = pairs, pairs if there is None else there
        self._like = None if there is None else there[0]
        self._symmetric = first is second
        self._one = one = Side.of(first, raw, form)
        self._two = two = one if self._symmetric else Side.of(second, raw, form)
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
        on_device = isinstance(form, DeviceChunk)
        riding, views = [], []
        if on is not None:
            samples, of = on
            with_view = [n for n in needs if n.view != "weights"]
            self._domains = of[first], of[second]
            if on_device:
                self._domain_grams = DeviceDomainGrams(one, two, with_view, raw, form, samples)
            else:
                here = DomainGrams(one, two, with_view, raw, form, samples, threads)
                self._domain_grams, riding, views = here, here.riding, here.views
        p, q = [m.d_out for m in self._shapes], [m.d_in for m in self._shapes]
        sides = [n.product for n in self._needs if n.product in CHANNELS]
        if on_device:
            self._out = form.fused(one, two, p, q, self._listed)
            self._channels = DeviceChannelGrams(one, two, sides, raw, form)
        else:
            listed = [(n, 0) for n in self._listed]
            found = fused(one, two, p, q, listed + riding, views, threads=threads)
            self._out = found[: len(listed)]
            if on is not None:
                here.take(found[len(listed) :])
            self._channels = ChannelGrams(one, two, sides, raw, form, threads)

    def modules(self) -> Iterator[tuple[int, int, Sums]]:
        """(first, last, sums) of consecutive modules that any adapter has: on the CPU of one each.

        Sums are of the pairs of the first module, then of those of the next, and so on.
        """
        most = 1 if self._like is None else max(1, AT_ONCE // max(1, len(self._pairs[0])))
        here = np.diff(self._one.bounds) + np.diff(self._two.bounds) > 0
        first = 0
        while first < len(here):
            last = first + 1
            if here[first]:
                while last < len(here) and here[last] and last - first < most:
                    last += 1
                yield self._chunk.first + first, self._chunk.first + last, self._sums(first, last)
            first = last

    def _sums(self, first: int, last: int) -> Sums:
        one, two, like = self._one, self._two, self._like
        table1 = self._spread(one, first, last, self._entries[0])
        table2 = table1
        if not self._symmetric:
            table2 = self._spread(two, first, last, self._entries[1])
        i, j = self._places(first, last)
        filled = self._bounds[first] < self._bounds[last]
        here_i, here_j = table1[_HERE][i], table2[_HERE][j]
        whole = all(
            side.bounds[last] - side.bounds[first] == side.count * (last - first)
            for side in (one, two)
        )
        both = None if whole else here_i * here_j

        def places(row: np.ndarray, column: np.ndarray) -> np.ndarray:
            # Where each pair's entry lies in the Grams; pairs that lack it read another.
            found = table1[_ROW].astype(np.intp)[row] + table2[_COLUMN].astype(np.intp)[column]
            return found if both is None or last - first == 1 else np.where(both > 0, found, 0)

        at = places(i, j)
        back = places(j, i) if self._symmetric else at
        top_i, top_j = table1[_TOP][i], table2[_TOP][j]

        def over_pairs(n: Need, where: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            if not filled:
                return np.zeros(len(i), like=like)
            if n.product in CHANNELS:
                values = np.take(self._channel_grams[n.product], where)
            else:
                values = np.take(self._out[self._listed.index(n)], where)
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

        own = {}
        for n in self._needs:
            if n.product in CHANNELS:
                own[n] = np.stack([
                    self._spread(side, first, last, alone * side.top**4)[of]
                    for side, alone, of in zip(
                        (one, two), self._channels.alone[n.product], (i, j), strict=True
                    )
                ])  # fmt: skip
        e1, f1, k1 = (table1[x][i] for x in (_ENERGY, _ENERGY2, _RANK))
        e2, f2, k2 = (table2[x][j] for x in (_ENERGY, _ENERGY2, _RANK))
        sizes = np.array([[float(m.d_out * m.d_in)] for m in self._shapes[first:last]])
        sizes = np.asarray(sizes, like=like)
        null = ((e1 * e2).reshape(last - first, -1) / sizes).reshape(-1)
        return Sums(
            need, mirrored, e1, e2, f1, f2, k1, k2, e1 * here_j, e2 * here_i, null, here_i, here_j,
            self._on_domains(first, last, at, both, (i, j)), own,
        )  # fmt: skip

    def _spread(self, side: Side, first: int, last: int, values: np.ndarray) -> np.ndarray:
        """Values (..., entries) of modules [first, last), as (..., modules x adapters)."""
        rows = slice(side.bounds[first], side.bounds[last])
        places = side.where[rows] + side.count * (side.module[rows] - first)
        out = np.zeros((*values.shape[:-1], side.count * (last - first)), like=self._like)
        out[..., np.asarray(places, like=self._like)] = np.asarray(
            values[..., rows], like=self._like
        )
        return out

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of each entry, (7, entries) of either side."""
        one, two = self._one, self._two
        made = []
        for side in (one,) if self._symmetric else (one, two):
            square = np.square(side.sigma)
            place = np.arange(len(side.entries)) - side.bounds[side.module]
            width = np.diff(two.bounds)[side.module]
            made.append(np.array([
                self._bounds[side.module] + place * width, place, np.ones(len(place)), side.top,
                square.sum(1), np.square(square).sum(1), side.rank,
            ], np.float64))  # fmt: skip
        return made[0], made[-1]

    def _places(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Both adapters of each pair among the modules x adapters of ``_spread``."""
        i, j = self._there
        if last - first == 1:
            return i, j
        steps = np.arange(last - first, like=self._like).reshape(-1, 1)
        return tuple(
            (x + side.count * steps).reshape(-1)
            for x, side in zip((i, j), (self._one, self._two), strict=True)
        )  # fmt: skip

    @cached_property
    def _channel_grams(self) -> dict[str, np.ndarray]:
        return {x: np.asarray(gram, like=self._like) for x, gram in self._channels.cross.items()}

    def _on_domains(
        self, first: int, last: int, at: np.ndarray, both: np.ndarray | None,
        pairs: tuple[np.ndarray, np.ndarray],
    ) -> dict[Need, np.ndarray]:  # fmt: skip
        if self._domain_grams is None:
            return {}
        return self._domain_grams.sums(
            (first, last), at, both, pairs, self._domains,
            lambda side, values: self._spread(side, first, last, values), self._like,
        )  # fmt: skip
