"""Where statistics of pairs of canonical forms are computed: C++ and LAPACK, or a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.engine import device as on_device
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import (
    CanonicalChunk,
    CanonicalFactors,
    Chunk,
    Memory,
    RawChunk,
    plan_chunks,
)
from mergeprobe_fast.engine.kept_sums import Sums
from mergeprobe_fast.engine.p1 import Side
from mergeprobe_fast.ops._tables import address
from mergeprobe_fast.ops.angles import STATISTICS, Form, corrected, pair_statistics
from mergeprobe_fast.zoo import Module, Zoo

TOP = 10  # strongest and weakest directions whose overlap is taken, where there are as many


class Backend(Protocol):
    """One of :class:`OnCpu` and :class:`OnDevice`."""

    memory: Memory | None  # for ``read_ahead``
    joins: bool  # whether calls on many arrays cost more than they compute
    room: int  # for blocks of adapters; see ``_blocks`` of engine.angles

    def plan(self, zoo: Zoo, members: np.ndarray, done: int) -> list[Chunk]:
        """Chunks of the modules from ``done`` on."""

    def forms(self, raw: RawChunk, threads: int) -> CanonicalChunk:
        """Canonical forms of a chunk, float64."""

    def release(self) -> None:
        """Wait until the last chunk's bytes are no longer needed."""

    def statistics(
        self, one: Side, two: Side, form: CanonicalChunk, modules: Sequence[Module], part: slice,
        bounds: np.ndarray, threads: int,
    ) -> Any:  # fmt: skip
        """(STATISTICS, pairs) of modules ``part`` of a chunk.

        ``bounds``: where the pairs of each module start; their order is that of :func:`place`.
        """

    def array(self, values: np.ndarray) -> Any:
        """The same values where sums are added up."""

    def host(self, values: Any) -> np.ndarray:
        """The other way round."""

    def restore(self, kept: Sums, arrays: Mapping[str, Any]) -> None:
        """Fill arrays with what was kept of them."""


class OnHost(Mapping[str, np.ndarray]):
    """Arrays of a backend, which come to the host one by one, when they are asked for."""

    def __init__(self, where: Backend, arrays: Mapping[str, Any]) -> None:
        self._where, self._arrays = where, arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where.host(self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def backend(device: Any) -> Backend:
    """``device``: from :func:`mergeprobe_fast.ops.open_device`; None: the CPU."""
    return OnCpu() if device is None else OnDevice(device)


def place(i: Any, j: Any, width: int, symmetric: bool) -> Any:
    """Where a pair's results lie; see ``angle_place`` in angles.hpp."""
    return i * width - i * (i + 1) // 2 + (j - i - 1) if symmetric else i * width + j


def _floats(zoo: Zoo, members: np.ndarray) -> np.ndarray:
    """Of the canonical factors of each module."""
    entries = zoo.table.entries[np.isin(zoo.table.entries["adapter"], members)]
    size = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    return np.bincount(entries["module"], entries["rank"], len(size)).astype(np.int64) * size


class OnCpu:
    """C++ up to ranks of 32, LAPACK above."""

    memory = None
    joins = False
    room = 1

    def plan(self, zoo: Zoo, members: np.ndarray, done: int) -> list[Chunk]:
        # Plans count canonical factors as float32.
        chunks = plan_chunks(zoo, members, passes.CHUNK_BYTES, 4 * _floats(zoo, members))
        chunks = [c for c in chunks if c.last > done]
        most = max((c.canonical_floats for c in chunks), default=0)
        self._canonical = CanonicalFactors(most, np.float64)
        return chunks

    def forms(self, raw: RawChunk, threads: int) -> CanonicalChunk:
        return self._canonical.compute(raw, threads)

    def release(self) -> None:
        pass

    def array(self, values: np.ndarray) -> np.ndarray:
        return values

    def host(self, values: np.ndarray) -> np.ndarray:
        return values

    def restore(self, kept: Sums, arrays: Mapping[str, np.ndarray]) -> None:
        kept.restore(arrays)

    def statistics(
        self, one: Side, two: Side, form: CanonicalChunk, modules: Sequence[Module], part: slice,
        bounds: np.ndarray, threads: int,
    ) -> np.ndarray:  # fmt: skip
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
            results = out[:, bounds[k] : bounds[k + 1]]
            _wide(one, two, part.start + k, module, form, results, threads)
        return out


class OnDevice:
    """A CUDA device: factors go there once a chunk, and sums stay there until all are added up."""

    joins = True
    room = 8  # 1,000 adapters of rank 16, d_in + d_out = 15,104, are one block

    def __init__(self, device: Any) -> None:
        from mergeprobe_fast.kernels.arrays import DeviceArray
        from mergeprobe_fast.kernels.pair_angles import PairAngles

        self._device, self.memory = device, device.memory
        self._forms = on_device.DeviceForms(device, "float64")
        self._kernel = PairAngles(device.torch, TOP)
        self._wrap = DeviceArray

    def plan(self, zoo: Zoo, members: np.ndarray, done: int) -> list[Chunk]:
        # Plans count canonical factors as float32.
        extra = 4 * _floats(zoo, members)
        chunks = plan_chunks(zoo, members, on_device.CHUNK_BYTES, extra)
        return [c for c in chunks if c.last > done]

    def forms(self, raw: RawChunk, threads: int) -> CanonicalChunk:
        return self._forms.compute(raw, threads)

    def release(self) -> None:
        self._forms.release()

    def array(self, values: np.ndarray) -> Any:
        return self._device.array(values)

    def host(self, values: Any) -> np.ndarray:
        return values if isinstance(values, np.ndarray) else values.download()

    def restore(self, kept: Sums, arrays: Mapping[str, Any]) -> None:
        found = {name: np.empty(x.shape, x.dtype) for name, x in arrays.items()}
        kept.restore(found)
        for name, values in found.items():
            arrays[name][:] = self.array(values)

    def statistics(
        self, one: Side, two: Side, form: CanonicalChunk, modules: Sequence[Module], part: slice,
        bounds: np.ndarray, threads: int,
    ) -> Any:  # fmt: skip
        first = on_device.entry_ranges(one)[part]
        second = None if one is two else on_device.entry_ranges(two)[part]
        batch = cast(on_device.DeviceChunk, form).forms.batch
        return self._wrap(self._kernel(batch, form.rank, first, second))


def _wide(
    one: Side, two: Side, k: int, module: Module, form: CanonicalChunk, results: np.ndarray,
    threads: int,
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
            results[:, place(i, j, len(ranks2), one is two)] = values


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
