"""Where a merge gets its factors from: a zoo's files, a chunk at a time, or arrays in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from mergeprobe_fast.engine.chunks import RawChunk, plan_chunks, read_ahead
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.ops._tables import DTYPE_CODE, ITEMSIZE, SEGMENT, address
from mergeprobe_fast.zoo import Module, Zoo

T = TypeVar("T")

_CHUNK_BYTES = 48 << 20
_DTYPE_NAME = {code: name for name, code in DTYPE_CODE.items()}


@dataclass(frozen=True, eq=False)
class Stored:
    """A factor as it is stored: bf16 and f16 are widened only where a method needs numbers."""

    raw: np.ndarray  # 2-D: A (rank, d_in) or B (d_out, rank); BF16 as its uint16 bits
    dtype: str  # "F32", "BF16", "F16" or "F64"
    where: tuple[str | os.PathLike[str] | None, str]  # file and key, for errors

    @property
    def shape(self) -> tuple[int, int]:
        return self.raw.shape  # type: ignore[return-value]

    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        values = self.raw if self.dtype == "F64" else to_f32(self.raw, self.dtype)
        return bool(np.isfinite(values).all())

    def wide(self, kind: type = np.float64) -> np.ndarray:
        """The values, widened exactly. InputError naming the tensor when one is not finite."""
        values = self.raw if self.dtype == "F64" else to_f32(self.raw, self.dtype)
        if not np.isfinite(values).all():
            raise self.refuse("holds NaN or infinite values")
        return values.astype(kind, copy=False)

    def refuse(self, reason: str) -> InputError:
        """An error about this tensor."""
        path, key = self.where
        return InputError(reason, path=path, key=key)

    def describe(self, record: Any, transpose: bool) -> None:
        """Fill a MATRIX record (a numpy void): A by rows, B transposed by its strides."""
        size = ITEMSIZE[self.dtype]
        strides = [stride // size for stride in self.raw.strides]
        record["data"], record["dtype"] = address(self.raw), DTYPE_CODE[self.dtype]
        record["row_stride"], record["col_stride"] = strides[::-1] if transpose else strides


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """One module of all adapters that have it: ``delta_i = scales[i] * b[i] @ a[i]``.

    The arrays may point into a reused buffer: keep copies, not views, past the iteration.
    """

    module: Module
    index: int  # of the module in the source
    adapters: np.ndarray  # indices of the adapters in the source, ascending
    a: Sequence[Stored]  # (rank_i, d_in)
    b: Sequence[Stored]  # (d_out, rank_i)
    scales: np.ndarray  # float64

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def ranks(self) -> np.ndarray:
        return np.array([a.shape[0] for a in self.a], np.int64)

    def segments(self, weights: np.ndarray | None = None) -> np.ndarray:
        """SEGMENT records for the kernels, scale times weight in each."""
        records = np.zeros(len(self), SEGMENT)
        for record, a, b in zip(records, self.a, self.b, strict=True):
            b.describe(record["u"], transpose=True)
            a.describe(record["v"], transpose=False)
        records["rank"] = self.ranks
        records["scale"] = self.scales if weights is None else self.scales * weights
        return records

    def wide(self, kind: type = np.float64) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """(B, A, scale) of every adapter, widened exactly and finite."""
        return [
            (b.wide(kind), a.wide(kind), float(s))
            for b, a, s in zip(self.b, self.a, self.scales, strict=True)
        ]


class Source(Protocol):
    """Adapters whose factors can be had a chunk of modules at a time, as often as asked for."""

    names: Sequence[str]
    modules: Sequence[Module]

    @property
    def largest_rank(self) -> int: ...

    def chunks(self, threads: int) -> Iterator[list[ModuleFactors]]:
        """The modules in order; a chunk is valid until the next one is asked for."""
        ...


class ZooSource:
    """The factors of a zoo's files; the next chunk is read while the caller computes."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo
        self.names: Sequence[str] = zoo.names
        self.modules: Sequence[Module] = zoo.modules

    @property
    def largest_rank(self) -> int:
        return int(self._zoo.table.entries["rank"].max())

    def chunks(self, threads: int) -> Iterator[list[ModuleFactors]]:
        zoo = self._zoo
        plan = plan_chunks(zoo, np.arange(len(zoo)), _CHUNK_BYTES)
        for raw in read_ahead(zoo, plan, threads):
            entries = raw.entries
            bounds = np.searchsorted(
                entries["module"], np.arange(raw.chunk.first, raw.chunk.last + 1)
            )
            yield [
                self._module(raw, raw.chunk.first + k, np.arange(bounds[k], bounds[k + 1]))
                for k in range(raw.chunk.last - raw.chunk.first)
                if bounds[k + 1] > bounds[k]
            ]

    def _module(self, raw: RawChunk, index: int, rows: np.ndarray) -> ModuleFactors:
        e = raw.entries[rows]
        return ModuleFactors(
            self._zoo.modules[index], index, e["adapter"].astype(np.int64),
            [self._factor(raw, int(r), "a") for r in rows],
            [self._factor(raw, int(r), "b") for r in rows],
            e["scale"].copy(),
        )  # fmt: skip

    def _factor(self, raw: RawChunk, row: int, side: str) -> Stored:
        e = raw.entries[row]
        dtype = _DTYPE_NAME[int(e[f"{side}_dtype"])]
        flat = raw.view(row, side).view(STORAGE[dtype])
        adapter, module = raw.names(row)
        factor = getattr(adapter.modules[module], side)
        shape = (int(e["rank"]), -1) if side == "a" else (-1, int(e["rank"]))
        return Stored(flat.reshape(shape), dtype, (factor.file.path, factor.key))


class MemorySource:
    """Factors that are in memory already.

    ``factors`` maps (module, adapter), both by position, to ``(B, A, scale)`` with B (d_out, rank)
    and A (rank, d_in) as :class:`Stored`; a module that an adapter lacks has no entry.
    """

    def __init__(
        self,
        names: Sequence[str],
        modules: Sequence[Module],
        factors: Mapping[tuple[int, int], tuple[Stored, Stored, float]],
    ) -> None:
        self.names, self.modules, self._factors = names, modules, factors

    @property
    def largest_rank(self) -> int:
        return max(a.shape[0] for _, a, _ in self._factors.values())

    def chunks(self, threads: int) -> Iterator[list[ModuleFactors]]:
        for index, module in enumerate(self.modules):
            adapters = [i for i in range(len(self.names)) if (index, i) in self._factors]
            if not adapters:
                continue
            found = [self._factors[index, i] for i in adapters]
            yield [
                ModuleFactors(
                    module,
                    index,
                    np.array(adapters),
                    [a for _, a, _ in found],
                    [b for b, _, _ in found],
                    np.array([s for _, _, s in found], np.float64),
                )
            ]


def each_module(
    chunks: Iterable[list[ModuleFactors]],
    function: Callable[[ModuleFactors], T],
    threads: int,
    together: Callable[[ModuleFactors], Hashable] | None = None,
) -> Iterator[T]:
    """``function`` of every module in order, computed on ``threads`` modules at a time.

    Modules of a chunk for which ``together`` is equal are one thread's, one after another: what
    they share is then made once. The first error that a module raises is raised here.
    """

    def run(group: list[ModuleFactors]) -> list[T]:
        return [function(m) for m in group]

    with ThreadPoolExecutor(threads) as pool:
        for chunk in chunks:  # all of it is done before the next one may reuse its memory
            groups: dict[Hashable, list[ModuleFactors]] = {}
            for m in chunk:
                groups.setdefault(together(m) if together else m.index, []).append(m)
            running = [(group, pool.submit(run, group)) for group in groups.values()]
            try:
                done = {
                    m.index: result
                    for group, future in running
                    for m, result in zip(group, future.result(), strict=True)
                }
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            yield from (done[m.index] for m in chunk)
