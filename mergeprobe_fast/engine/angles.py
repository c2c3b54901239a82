"""Principal angles and what else needs both matrices of cosines of a pair: blocks of adapters
outside, modules inside, in float64.

With W = U diag(sigma) V^T in canonical form, all of it comes from M = U_1^T U_2 and N = V_1^T V_2
of each pair and module. Sums over modules are those of the concatenated deltas, whose cosines are
the cosines of all modules, and 0 for directions that only one of the two has a module for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from math import isqrt
from typing import Any

import numpy as np

from mergeprobe_fast.engine.angle_tables import AngleTable, PairAngles, Value
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk, read_ahead
from mergeprobe_fast.engine.declare import ratio
from mergeprobe_fast.engine.kept_sums import sums_so_far
from mergeprobe_fast.engine.p1 import Side
from mergeprobe_fast.engine.pair_angles import TOP, Backend, OnHost, backend, place
from mergeprobe_fast.errors import BackendError
from mergeprobe_fast.ops.angles import STATISTICS
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.zoo import Module, Zoo

# Factors of the adapters in flight, and sums of their pairs.
FACTOR_BYTES = 1 << 30
PAIR_BYTES = 512 << 20
# Results of one call into the kernels.
RESULT_BYTES = 64 << 20

_LARGEST = ("row_largest", "col_largest", "row_gap", "col_gap", "merged_largest")
_SMALLEST = ("row_smallest", "col_smallest")
_OWN = ("rank", "energy", "nuclear", "largest", "shared", "top")  # of PairAngles, behind `of`


def angles(
    zoo: Zoo, whole: Mapping[str, Value], means: Mapping[str, Value], threads: int
) -> AngleTable:
    """Columns of all pairs: ``whole`` of the concatenated deltas, ``means`` over modules.

    A mean is over the modules that both adapt, weighted by the product of the two norms there.
    NaN where one of the two deltas is zero. On a device (``current_device``) all of it is computed
    there, whatever the ranks; only the last step, from sums over modules to columns, is not.

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
        BackendError: an iteration on the device did not converge.
    """
    pairs = len(zoo) * (len(zoo) - 1) // 2
    table = AngleTable(len(zoo), {n: np.full(pairs, np.nan) for n in (*whole, *means)})
    kept, start, where = sums_so_far(), 0, backend(current_device())
    kept.restore(table.columns)
    blocks = _blocks(zoo, len(table.columns), where.room)
    for first, second in combinations_with_replacement(blocks, 2):
        done, start = kept.step - start, start + len(zoo.modules)
        if done > len(zoo.modules):  # a block's columns are not kept before the next one's sums
            continue
        block = _Block(zoo, first, second, whole, means, where)
        if done > 0:
            where.restore(kept, block.arrays())
        arrays = OnHost(where, table.columns | block.arrays())  # which are added to in place
        for module in block.fill(max(0, done), threads):
            kept.reached(start - len(zoo.modules) + module, arrays)
        a, b = first[block.i], second[block.j]
        at = a * len(zoo) - a * (a + 1) // 2 + (b - a - 1)
        for name, values in block.columns().items():
            table.columns[name][at] = values
    return table


def work(zoo: Zoo) -> float:
    """Multiply-adds of :func:`angles`: cosines, and some 4 (r_1 + r_2)^3 a pair for spectra."""
    entries = zoo.table.entries
    size = np.array([m.d_out + m.d_in for m in zoo.modules], np.float64)
    power = [
        np.bincount(entries["module"], entries["rank"].astype(np.float64) ** p, len(size))
        for p in range(4)
    ]
    products = (power[1] ** 2 - power[2]) / 2
    cubes = (power[0] - 1) * power[3] + 3 * (power[2] * power[1] - power[3])
    return float((products * size + 4 * cubes).sum())


def _blocks(zoo: Zoo, columns: int, room: int = 1) -> list[np.ndarray]:
    """Adapter indices in blocks, any two of which fit the memory.

    ``room``: how many times FACTOR_BYTES and PAIR_BYTES there are.
    """
    entries = zoo.table.entries
    size = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    floats = size[entries["module"]] * entries["rank"]
    # Two chunks as read, and the canonical factors of one.
    most = int((2 * (entries["a_nbytes"] + entries["b_nbytes"]) + 8 * floats).max(initial=1))
    per_pair = 8 * (len(STATISTICS) + 2 * columns + 10)
    side = min(room * FACTOR_BYTES // (2 * most), isqrt(room * PAIR_BYTES // per_pair))
    return np.array_split(np.arange(len(zoo)), max(1, -(-len(zoo) // max(2, side))))


class _Block:
    """Pairs (a, b) of adapters ``first`` x ``second``; a < b only when both are the same."""

    def __init__(
        self, zoo: Zoo, first: np.ndarray, second: np.ndarray, whole: Mapping[str, Value],
        means: Mapping[str, Value], where: Backend,
    ) -> None:  # fmt: skip
        self._backend = where
        self._zoo, self._first, self._second = zoo, first, second
        self._symmetric = first is second
        if self._symmetric:
            self.i, self.j = np.triu_indices(len(first), 1)
        else:
            self.i, self.j = (x.ravel() for x in np.indices((len(first), len(second))))
        n = len(self.i)
        self._pairs = where.array(self.i), where.array(self.j)

        def full(value: float, *shape: int) -> np.ndarray:
            return where.array(np.full(shape, value, np.float64))

        self._total = PairAngles(
            {s: full(np.inf if s in _SMALLEST else 0, n) for s in STATISTICS},
            *(full(0, 2, n) for _ in range(4)), full(0, n), full(0, n),
        )  # fmt: skip
        self._whole, self._means = whole, means
        self._mean = {name: full(0, n) for name in means}
        self._weight = {name: full(0, n) for name in means}

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums, by names that no column has. On a device they are no arrays of numpy's."""
        found = {f"of:{name}": values for name, values in self._total.of.items()}
        for name in _OWN:
            found[f"total:{name}"] = getattr(self._total, name)
        for kind, sums in (("mean", self._mean), ("weight", self._weight)):
            found |= {f"{kind}:{name}": values for name, values in sums.items()}
        return found

    def fill(self, done: int, threads: int) -> Iterator[int]:
        """Account for every module but the first ``done``. Says how many are done, now and then."""
        zoo, where = self._zoo, self._backend
        members = self._first if self._symmetric else np.concatenate([self._first, self._second])
        for raw in read_ahead(zoo, where.plan(zoo, members, done), threads, where.memory):
            yield from self._chunk(raw, where.forms(raw, threads), done, threads)
            where.release()

    def _chunk(self, raw: RawChunk, form: CanonicalChunk, done: int, threads: int) -> Iterator[int]:
        one = Side.of(self._first, raw, form)
        two = one if self._symmetric else Side.of(self._second, raw, form)
        modules = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
        counts = [
            n * (n - 1) // 2 if self._symmetric else n * m
            for n, m in zip(np.diff(one.bounds), np.diff(two.bounds), strict=True)
        ]
        limit = RESULT_BYTES // (8 * len(STATISTICS))
        start = max(0, done - raw.chunk.first)
        while start < len(modules):
            end = start + 1
            while end < len(modules) and sum(counts[start : end + 1]) <= limit:
                end += 1
            part = slice(start, end)
            self._modules(one, two, form, modules[part], part, counts[part], threads)
            start = end
            yield raw.chunk.first + end

    def _modules(
        self, one: Side, two: Side, form: CanonicalChunk, modules: list[Module], part: slice,
        counts: list[int], threads: int,
    ) -> None:  # fmt: skip
        """Modules ``part`` of a chunk, in one call into the kernels."""
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        found = self._backend.statistics(one, two, form, modules, part, bounds, threads)
        for first, last in self._runs(one, two, part):
            here = slice(bounds[first - part.start], bounds[last - part.start])
            self._add(one, two, first, last, found[:, here])

    def _runs(self, one: Side, two: Side, part: slice) -> Iterator[tuple[int, int]]:
        """Modules that are added up at once: on a device as many as all adapters have."""
        first = part.start
        while first < part.stop:
            last = first + 1
            if self._backend.joins and self._complete(one, two, first):
                while last < part.stop and self._complete(one, two, last):
                    last += 1
            yield first, last
            first = last

    def _complete(self, one: Side, two: Side, k: int) -> bool:
        """Whether all adapters have a module, and none is zero there."""
        rows = [(side, side.rows(k)) for side in (one, two)]
        return all(np.count_nonzero(side.rank[r]) == side.count for side, r in rows)

    def _add(self, one: Side, two: Side, first: int, last: int, results: np.ndarray) -> None:
        """Account for modules [first, last): one, or such as are complete."""
        count = last - first

        def over(x: np.ndarray) -> np.ndarray:
            return x[..., 0, :] if count == 1 else x.sum(-2)

        pairs = zip((one, two), self._pairs, strict=True)
        own = [self._own(side, first, last)[:, :, pair] for side, pair in pairs]
        rank, energy, nuclear, largest = np.stack(own, 1)  # (2, modules, pairs) each
        total = self._total
        for mine, more in ((total.rank, rank), (total.energy, energy), (total.nuclear, nuclear)):
            mine += over(more)
        np.maximum(total.largest, largest.max(-2), out=total.largest)
        both = (rank > 0).all(0)
        # Where only one has something, the sum of the two is that.
        total.of["merged_sum"] += over(np.where(both, 0.0, nuclear.sum(0)))
        np.maximum(
            total.of["merged_largest"], np.where(both, 0.0, largest.max(0)).max(-2),
            out=total.of["merged_largest"],
        )  # fmt: skip
        here, at = self._chosen(one, two, first)
        if at is not None and len(at) == 0:
            return
        found = results if at is None else results[:, at]
        found = found.reshape(len(STATISTICS), count, found.shape[1] // count)
        shared = rank[:, :, here].min(0)
        module = PairAngles(
            dict(zip(STATISTICS, found, strict=True)), rank[:, :, here], energy[:, :, here],
            nuclear[:, :, here], largest[:, :, here], shared, np.minimum(shared, TOP),
        )  # fmt: skip
        total.shared[here] += over(shared)
        total.top[here] += over(module.top)
        for name, values in module.of.items():
            mine = total.of[name]
            if name in _LARGEST:
                mine[here] = np.maximum(mine[here], values.max(-2))
            elif name in _SMALLEST:
                mine[here] = np.minimum(mine[here], values.min(-2))
            else:
                mine[here] += over(values)
        weight = np.sqrt(module.energy[0]) * np.sqrt(module.energy[1])
        for name, value in self._means.items():
            values = value(module)
            defined = ~np.isnan(values)
            self._mean[name][here] += over(np.where(defined, weight * values, 0.0))
            self._weight[name][here] += over(np.where(defined, weight, 0.0))

    def _own(self, side: Side, first: int, last: int) -> np.ndarray:
        """Rank, energy, nuclear norm and largest singular value by module and adapter."""
        values = np.zeros((4, last - first, side.count))
        for k in range(first, last):
            rows = side.rows(k)
            kept = np.arange(side.sigma.shape[1]) < side.rank[rows][:, None]
            sigma = np.where(kept, side.sigma[rows], 0.0)
            values[:, k - first] = side.spread(rows, np.array([
                side.rank[rows], np.square(sigma).sum(1), sigma.sum(1), sigma.max(1, initial=0.0)
            ]))  # fmt: skip
        return self._backend.array(values)

    def _chosen(self, one: Side, two: Side, k: int) -> tuple[Any, Any]:
        """Which pairs have a module both, and where their results lie; None: all, in order."""
        if self._complete(one, two, k):
            return slice(None), None
        rows = [(side, side.rows(k)) for side in (one, two)]
        present = [side.spread(r, side.rank[r] > 0) > 0 for side, r in rows]
        here = np.flatnonzero(present[0][self.i] & present[1][self.j])
        places = [side.spread(r, np.arange(r.stop - r.start)).astype(np.int64) for side, r in rows]
        width = rows[1][1].stop - rows[1][1].start
        at = place(places[0][self.i[here]], places[1][self.j[here]], width, self._symmetric)
        return self._backend.array(here), self._backend.array(at)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column, one value per pair of the block."""
        host = self._backend.host
        total = PairAngles(
            {name: host(values) for name, values in self._total.of.items()},
            *(host(getattr(self._total, name)) for name in _OWN),
        )  # fmt: skip
        if np.isnan(total.of["row_cosines"]).any():
            raise BackendError("an iteration for singular values did not converge on the device")
        zero = (total.energy == 0).any(0)
        out = {n: np.where(zero, np.nan, value(total)) for n, value in self._whole.items()}
        return out | {n: ratio(host(self._mean[n]), host(self._weight[n])) for n in self._means}
