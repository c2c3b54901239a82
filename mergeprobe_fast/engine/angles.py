"""Principal angles and what else needs both matrices of cosines of a pair: blocks of adapters
outside, modules inside, in float64.

With W = U diag(sigma) V^T in canonical form, all of it comes from M = U_1^T U_2 and N = V_1^T V_2
of each pair and module. Sums over modules are those of the concatenated deltas, whose cosines are
the cosines of all modules, and 0 for directions that only one of the two has a module for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import isqrt

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import (
    CanonicalChunk,
    CanonicalFactors,
    RawChunk,
    plan_chunks,
    read_ahead,
)
from mergeprobe_fast.engine.declare import ratio
from mergeprobe_fast.engine.kept_sums import sums_so_far
from mergeprobe_fast.engine.p1 import Side
from mergeprobe_fast.ops._tables import address
from mergeprobe_fast.ops.angles import STATISTICS, Form, corrected, pair_statistics
from mergeprobe_fast.zoo import Module, Zoo

TOP = 10  # strongest and weakest directions whose overlap is taken, where there are as many
# Factors of the adapters in flight, and sums of their pairs.
FACTOR_BYTES = 1 << 30
PAIR_BYTES = 512 << 20
# Results of one call into the kernels.
RESULT_BYTES = 64 << 20

_LARGEST = ("row_largest", "col_largest", "row_gap", "col_gap", "merged_largest")
_SMALLEST = ("row_smallest", "col_smallest")


@dataclass(eq=False)
class PairAngles:
    """What the columns read, as arrays over pairs (1, 2), for one module or over all.

    ``of``: the statistics by name (csrc/include/mergeprobe/angles.hpp says what each is), added up,
    or the largest or smallest. ``rank``, ``energy``, ``nuclear``, ``largest``: (2, pairs), of each
    of the two, over all modules it has; ``shared``: principal angles there are; ``top``: directions
    in the overlaps of the strongest.
    """

    of: dict[str, np.ndarray]
    rank: np.ndarray
    energy: np.ndarray
    nuclear: np.ndarray
    largest: np.ndarray
    shared: np.ndarray
    top: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.of[name]

    @property
    def directions(self) -> np.ndarray:
        """Cosines of the concatenated deltas, those that are 0 for want of a partner included."""
        return self.rank.min(0)

    @property
    def alone(self) -> np.ndarray:
        """How many those are."""
        return self.directions - self.shared


Value = Callable[[PairAngles], np.ndarray]


@dataclass(frozen=True, eq=False)
class AngleTable:
    """Columns over the pairs (a, b), a < b, in row-major order of the upper triangle."""

    count: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def get(
        self, name: str, a: np.ndarray, b: np.ndarray, mirrored: str | None = None
    ) -> np.ndarray:
        """A column at pairs; where a > b it is that of (b, a), or ``mirrored`` of it."""
        low, high = np.minimum(a, b), np.maximum(a, b)
        at = low * self.count - low * (low + 1) // 2 + (high - low - 1)
        out = np.full(len(at), np.nan)  # an adapter is no pair with itself
        for name_of, here in ((name, a < b), (mirrored or name, a > b)):
            out[here] = self.columns[name_of][at[here]]
        return out


def angles(
    zoo: Zoo, whole: Mapping[str, Value], means: Mapping[str, Value], threads: int
) -> AngleTable:
    """Columns of all pairs: ``whole`` of the concatenated deltas, ``means`` over modules.

    A mean is over the modules that both adapt, weighted by the product of the two norms there.
    NaN where one of the two deltas is zero.

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
    """
    pairs = len(zoo) * (len(zoo) - 1) // 2
    table = AngleTable(len(zoo), {n: np.full(pairs, np.nan) for n in (*whole, *means)})
    kept, start = sums_so_far(), 0
    kept.restore(table.columns)
    for first, second in combinations_with_replacement(_blocks(zoo, len(table.columns)), 2):
        done, start = kept.step - start, start + len(zoo.modules)
        if done > len(zoo.modules):  # a block's columns are not kept before the next one's sums
            continue
        block = _Block(zoo, first, second, whole, means)
        if done > 0:
            kept.restore(block.arrays())
        arrays = table.columns | block.arrays()  # which are added to in place
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


def _blocks(zoo: Zoo, columns: int) -> list[np.ndarray]:
    """Adapter indices in blocks, any two of which fit the memory."""
    entries = zoo.table.entries
    size = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    floats = size[entries["module"]] * entries["rank"]
    # Two chunks as read, and the canonical factors of one.
    most = int((2 * (entries["a_nbytes"] + entries["b_nbytes"]) + 8 * floats).max(initial=1))
    per_pair = 8 * (len(STATISTICS) + 2 * columns + 10)
    side = min(FACTOR_BYTES // (2 * most), isqrt(PAIR_BYTES // per_pair))
    return np.array_split(np.arange(len(zoo)), max(1, -(-len(zoo) // max(2, side))))


class _Block:
    """Pairs (a, b) of adapters ``first`` x ``second``; a < b only when both are the same."""

    def __init__(
        self, zoo: Zoo, first: np.ndarray, second: np.ndarray, whole: Mapping[str, Value],
        means: Mapping[str, Value],
    ) -> None:  # fmt: skip
        self._zoo, self._first, self._second = zoo, first, second
        self._symmetric = first is second
        if self._symmetric:
            self.i, self.j = np.triu_indices(len(first), 1)
        else:
            self.i, self.j = (x.ravel() for x in np.indices((len(first), len(second))))
        n = len(self.i)
        self._total = PairAngles(
            {s: np.full(n, np.inf) if s in _SMALLEST else np.zeros(n) for s in STATISTICS},
            *(np.zeros((2, n)) for _ in range(4)), np.zeros(n), np.zeros(n),
        )  # fmt: skip
        self._whole, self._means = whole, means
        self._mean = {name: np.zeros(n) for name in means}
        self._weight = {name: np.zeros(n) for name in means}

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums, by names that no column has."""
        found = {f"of:{name}": values for name, values in self._total.of.items()}
        for name in ("rank", "energy", "nuclear", "largest", "shared", "top"):
            found[f"total:{name}"] = getattr(self._total, name)
        for kind, sums in (("mean", self._mean), ("weight", self._weight)):
            found |= {f"{kind}:{name}": values for name, values in sums.items()}
        return found

    def fill(self, done: int, threads: int) -> Iterator[int]:
        """Account for every module but the first ``done``. Says how many are done, now and then."""
        zoo = self._zoo
        members = self._first if self._symmetric else np.concatenate([self._first, self._second])
        entries = zoo.table.entries[np.isin(zoo.table.entries["adapter"], members)]
        size = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
        floats = np.bincount(entries["module"], entries["rank"], len(size)).astype(np.int64) * size
        # Plans count canonical factors as float32.
        chunks = plan_chunks(zoo, members, passes.CHUNK_BYTES, 4 * floats)
        chunks = [c for c in chunks if c.last > done]
        canonical = CanonicalFactors(
            max((c.canonical_floats for c in chunks), default=0), np.float64
        )
        for raw in read_ahead(zoo, chunks, threads):
            yield from self._chunk(raw, canonical.compute(raw, threads), done, threads)

    def _chunk(
        self, raw: RawChunk, form: CanonicalChunk, done: int, threads: int
    ) -> Iterator[int]:
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
        out = np.empty((len(STATISTICS), int(bounds[-1])))

        def table(side: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows = slice(side.bounds[part.start], side.bounds[part.stop])
            local = side.bounds[part.start : part.stop + 1] - rows.start
            return side.blocks[rows], local, np.ascontiguousarray(side.sigma[rows])

        _native.core().pair_angles(
            *table(one), *((None,) * 3 if one is two else table(two)),
            np.array([m.d_out for m in modules], np.int64),
            np.array([m.d_in for m in modules], np.int64), out, bounds, TOP, threads, _native.isa(),
        )  # fmt: skip
        for k, module in enumerate(modules):
            index, results = part.start + k, out[:, bounds[k] : bounds[k + 1]]
            self._wide(one, two, index, module, form, results, threads)
            self._add(one, two, index, results)

    def _wide(
        self, one: Side, two: Side, k: int, module: Module, form: CanonicalChunk,
        results: np.ndarray, threads: int,
    ) -> None:  # fmt: skip
        """Pairs that the kernels leave out, by LAPACK."""
        widest = _native.core().WIDEST_ANGLES
        rows1, rows2 = one.rows(k), two.rows(k)
        ranks1, ranks2 = one.rank[rows1], two.rank[rows2]
        if max(ranks1.max(initial=0), ranks2.max(initial=0)) <= widest:
            return

        def forms(side: Side, rows: slice) -> list[Form]:
            return [_form(module, side, i, form) for i in range(rows.start, rows.stop)]

        left = forms(one, rows1)
        right = left if one is two else forms(two, rows2)
        pairs = [
            (i, j) for i, j in _places(len(ranks1), len(ranks2), one is two)
            if ranks1[i] and ranks2[j] and max(ranks1[i], ranks2[j]) > widest
        ]  # fmt: skip

        def compute(pair: tuple[int, int]) -> np.ndarray:
            return pair_statistics(left[pair[0]], right[pair[1]], TOP)

        with _env.one_blas_thread(), ThreadPoolExecutor(threads) as pool:
            for (i, j), values in zip(pairs, pool.map(compute, pairs), strict=True):
                results[:, _place(i, j, len(ranks2), one is two)] = values

    def _add(self, one: Side, two: Side, k: int, results: np.ndarray) -> None:
        rows1, rows2 = one.rows(k), two.rows(k)
        width = rows2.stop - rows2.start
        per_adapter = []
        for side, rows, pair in ((one, rows1, self.i), (two, rows2, self.j)):
            kept = np.arange(side.sigma.shape[1]) < side.rank[rows][:, None]
            sigma = np.where(kept, side.sigma[rows], 0.0)
            values = np.array([
                np.arange(rows.stop - rows.start), side.rank[rows], np.square(sigma).sum(1),
                sigma.sum(1), sigma.max(1, initial=0.0),
            ])  # fmt: skip
            per_adapter.append(side.spread(rows, values)[:, pair])
        (place1, *own1), (place2, *own2) = per_adapter
        rank, energy, nuclear, largest = np.stack([own1, own2], 1)
        total = self._total
        for mine, more in ((total.rank, rank), (total.energy, energy), (total.nuclear, nuclear)):
            mine += more
        np.maximum(total.largest, largest, out=total.largest)
        both = (rank > 0).all(0)
        # Where only one has something, the sum of the two is that.
        total.of["merged_sum"] += np.where(both, 0.0, nuclear.sum(0))
        np.maximum(
            total.of["merged_largest"], np.where(both, 0.0, largest.max(0)),
            out=total.of["merged_largest"],
        )  # fmt: skip
        here = np.flatnonzero(both)
        if len(here) == 0:
            return
        i, j = place1[here].astype(np.int64), place2[here].astype(np.int64)
        found = results[:, _place(i, j, width, self._symmetric)]
        shared = rank[:, here].min(0)
        module = PairAngles(
            dict(zip(STATISTICS, found, strict=True)), rank[:, here], energy[:, here],
            nuclear[:, here], largest[:, here], shared, np.minimum(shared, TOP),
        )  # fmt: skip
        total.shared[here] += shared
        total.top[here] += module.top
        for name, values in module.of.items():
            mine = total.of[name]
            if name in _LARGEST:
                mine[here] = np.maximum(mine[here], values)
            elif name in _SMALLEST:
                mine[here] = np.minimum(mine[here], values)
            else:
                mine[here] += values
        weight = np.sqrt(module.energy[0]) * np.sqrt(module.energy[1])
        for name, value in self._means.items():
            values = value(module)
            defined = ~np.isnan(values)
            self._mean[name][here] += np.where(defined, weight * values, 0.0)
            self._weight[name][here] += np.where(defined, weight, 0.0)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column, one value per pair of the block."""
        zero = (self._total.energy == 0).any(0)
        out = {n: np.where(zero, np.nan, value(self._total)) for n, value in self._whole.items()}
        return out | {n: ratio(self._mean[n], self._weight[n]) for n in self._means}


def _place(i, j, width: int, symmetric: bool):
    """Where a pair's results lie; see ``angle_place`` in angles.hpp."""
    return i * width - i * (i + 1) // 2 + (j - i - 1) if symmetric else i * width + j


def _places(rows: int, columns: int, symmetric: bool) -> Iterator[tuple[int, int]]:
    for i in range(rows):
        for j in range(i + 1 if symmetric else 0, columns):
            yield i, j


def _form(module: Module, side: Side, i: int, form: CanonicalChunk) -> Form:
    """The canonical form of an entry, float64, with vectors orthonormal to rounding."""
    rank = int(side.rank[i])

    def vectors(name: str, rows: int) -> np.ndarray:
        matrix = side.blocks[name][i]
        start = (int(matrix["data"]) - address(form.buffer)) // form.buffer.itemsize
        width = int(matrix["col_stride"])
        return corrected(form.buffer[start : start + rows * width].reshape(rows, width)[:, :rank])

    return Form(vectors("u", module.d_out), side.sigma[i, :rank], vectors("v", module.d_in))
