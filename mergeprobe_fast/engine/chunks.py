"""Factors of some modules, read and brought to canonical form in reused memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.read import read_into
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE, JOB, SEGMENT, address
from mergeprobe_fast.ops.canonical import NOISE, RELATIVE, STATUS
from mergeprobe_fast.zoo import Zoo

_LARGEST = 1e60  # of a singular value: its fourth power still fits float64, sums included
_LINE = 64  # bytes; factors start on a cache line
Memory = Callable[[int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows ``rows`` of the problem table: modules [first, last), some of the adapters."""

    first: int
    last: int
    rows: np.ndarray  # indices into table.entries, sorted by module, then adapter
    raw_bytes: int
    canonical_floats: int


def plan_chunks(
    zoo: Zoo, adapters: np.ndarray, limit: int, extra: np.ndarray | None = None
) -> list[Chunk]:  # fmt: skip
    """Consecutive modules whose factors of ``adapters`` take at most ``limit`` bytes in memory.

    A single module that is larger is a chunk of its own. ``extra``: other bytes, per module.
    """
    table = zoo.table
    wanted = np.zeros(len(zoo), bool)
    wanted[adapters] = True
    rows = np.flatnonzero(wanted[table.entries["adapter"]])
    entries = table.entries[rows]
    raw = _padded(entries["a_nbytes"]) + _padded(entries["b_nbytes"])
    sizes = np.array([(m.d_out + m.d_in) for m in zoo.modules], np.int64)
    floats = sizes[entries["module"]] * entries["rank"]
    bounds = np.searchsorted(entries["module"], np.arange(len(zoo.modules) + 1))
    chunks: list[Chunk] = []
    first = 0
    while first < len(zoo.modules):
        last, used = first, 0
        while last < len(zoo.modules):
            part = slice(bounds[last], bounds[last + 1])
            more = int(raw[part].sum() + 4 * floats[part].sum())
            more += 0 if extra is None else int(extra[last])
            if last > first and used + more > limit:
                break
            used += more
            last += 1
        part = slice(bounds[first], bounds[last])
        if part.stop > part.start:
            chunks.append(
                Chunk(first, last, rows[part], int(raw[part].sum()), int(floats[part].sum()))
            )
        first = last
    return chunks


def _padded(nbytes: np.ndarray) -> np.ndarray:
    return (nbytes + _LINE - 1) // _LINE * _LINE


class RawFactors:
    """The bytes of a chunk's factors as they lie in the files, in one reusable buffer."""

    def __init__(self, zoo: Zoo, capacity: int, memory: Memory | None = None) -> None:
        """``memory(bytes)`` gives uint8 arrays; default: plain ones."""
        self._zoo = zoo
        size = capacity + _LINE
        self._buffer = np.empty(size, np.uint8) if memory is None else memory(size)
        self._base = -(-address(self._buffer) // _LINE) * _LINE

    def read(self, chunk: Chunk, threads: int) -> RawChunk:
        """Read the chunk. The result is valid until the next read into the same buffer."""
        table = self._zoo.table
        e = table.entries[chunk.rows]
        n = len(e)
        nbytes = np.concatenate([e["a_nbytes"], e["b_nbytes"]])
        starts = np.concatenate([[0], np.cumsum(_padded(nbytes))[:-1]]).astype(np.int64)
        targets = self._base + starts
        read_into(
            table.files,
            np.concatenate([e["a_file"], e["b_file"]]),
            np.concatenate([e["a_offset"], e["b_offset"]]),
            nbytes,
            targets,
            threads=threads,
        )
        return RawChunk(chunk, e, targets[:n], targets[n:], self._buffer, self._zoo)


@dataclass(frozen=True, eq=False)
class RawChunk:
    """A chunk in memory: where each entry's A and B start."""

    chunk: Chunk
    entries: np.ndarray  # of zoo.ENTRY
    a: np.ndarray  # addresses
    b: np.ndarray
    buffer: np.ndarray
    zoo: Zoo

    def names(self, row: int) -> tuple[AdapterRef, str]:
        """The adapter of an entry, and its module's name."""
        e = self.entries[row]
        return self.zoo[int(e["adapter"])], self.zoo.modules[int(e["module"])].name

    def view(self, row: int, side: str) -> np.ndarray:
        """The bytes of an entry's factor "a" or "b"."""
        start = int(getattr(self, side)[row]) - address(self.buffer)
        return self.buffer[start : start + int(self.entries[f"{side}_nbytes"][row])]

    def fill(self, records: np.ndarray) -> np.ndarray:
        """Describe the factors in BLOCK or SEGMENT records: A by rows, B transposed by strides."""
        d_in = np.array([m.d_in for m in self.zoo.modules], np.int64)[self.entries["module"]]
        records["u"]["data"], records["v"]["data"] = self.b, self.a
        records["u"]["row_stride"], records["u"]["col_stride"] = 1, self.entries["rank"]
        records["v"]["row_stride"], records["v"]["col_stride"] = d_in, 1
        records["u"]["dtype"], records["v"]["dtype"] = (
            self.entries["b_dtype"],
            self.entries["a_dtype"],
        )
        records["rank"] = self.entries["rank"]
        return records

    def blocks(self) -> np.ndarray:
        """The factors as they are, for a pass that needs no canonical form."""
        return self.fill(np.zeros(len(self.entries), BLOCK))


@dataclass(frozen=True, eq=False)
class CanonicalChunk:
    """Canonical factors of a chunk: blocks of orthonormal rows, and every spectrum."""

    blocks: np.ndarray  # of BLOCK, rank = numerical rank
    sigma: np.ndarray  # (entries, widest rank), descending, zero padded
    rank: np.ndarray  # numerical rank of each entry
    buffer: np.ndarray  # what the blocks point into


class CanonicalFactors:
    """Reusable memory for canonical factors, float32 or float64."""

    def __init__(self, capacity: int, dtype: type[np.floating] = np.float32) -> None:
        self._buffer = np.empty(capacity, dtype)

    def compute(self, raw: RawChunk, threads: int) -> CanonicalChunk:
        """Canonical form of every entry. InputError naming the tensor that is not finite."""
        zoo, e = raw.zoo, raw.entries
        n = len(e)
        segments = raw.fill(np.zeros(n, SEGMENT))
        segments["scale"] = e["scale"]
        d_out = np.array([m.d_out for m in zoo.modules], np.int64)[e["module"]]
        d_in = np.array([m.d_in for m in zoo.modules], np.int64)[e["module"]]
        starts = np.concatenate([[0], np.cumsum((d_out + d_in) * e["rank"])[:-1]]).astype(np.int64)
        widest = int(e["rank"].max(initial=0))
        sigma = np.zeros((n, widest))
        jobs = np.zeros(n, JOB)
        jobs["d_out"], jobs["d_in"], jobs["max_rank"] = d_out, d_in, e["rank"]
        base = address(self._buffer)
        # Dimension-major, so that packing for P1 is a copy without a transpose.
        size = self._buffer.itemsize
        jobs["u_out"], jobs["u_row"], jobs["u_col"] = base + size * starts, 1, e["rank"]
        jobs["v_out"] = base + size * (starts + d_out * e["rank"])
        jobs["v_row"], jobs["v_col"] = 1, e["rank"]
        jobs["sigma"] = np.arange(n) * widest
        _native.core().canonicalise(
            segments, np.arange(n + 1), jobs, sigma.reshape(-1), size == 8, False, RELATIVE, NOISE,
            threads, _native.isa(),
        )  # fmt: skip
        refuse_failed(jobs, np.arange(n + 1), raw)
        refuse_absurd(sigma, raw)
        blocks = np.zeros(n, BLOCK)
        for side in "uv":
            blocks[side]["data"] = jobs[f"{side}_out"]
            blocks[side]["row_stride"], blocks[side]["col_stride"] = 1, e["rank"]
            blocks[side]["dtype"] = DTYPE_CODE["F64" if size == 8 else "F32"]
        blocks["rank"] = jobs["rank"]
        return CanonicalChunk(blocks, sigma, jobs["rank"].copy(), self._buffer)


def refuse_absurd(sigma: np.ndarray, raw: RawChunk) -> None:
    """Raise for the first spectrum (entries, values) whose sums would leave float64."""
    for i in np.flatnonzero(sigma[:, 0] > _LARGEST)[:1] if sigma.shape[1] else ():
        adapter, name = raw.names(int(i))
        reason = f"the update is absurdly large (spectral norm {sigma[i, 0]:.3g}): wrong scale?"
        raise InputError(reason, path=adapter.path, key=name)


def refuse_failed(jobs: np.ndarray, bounds: np.ndarray, raw: RawChunk) -> None:
    """Raise for the first canonical form that failed, naming the tensor.

    ``bounds``: where each job's entries start in the chunk.
    """
    for i in np.flatnonzero(jobs["status"])[:1]:
        row = int(bounds[i]) + max(0, int(jobs["bad_segment"][i]))
        raise failure(raw, row, int(jobs["status"][i]))


def failure(raw: RawChunk, row: int, status: int) -> InputError:
    """What is wrong with an entry whose canonical form has this status."""
    adapter, name = raw.names(row)
    module = adapter.modules[name]
    factor = module.b if status == 1 else module.a
    reason = STATUS[status].removeprefix("B ").removeprefix("A ")
    return InputError(reason, path=factor.file.path, key=factor.key)


_listener: ContextVar[Callable[[int], None] | None] = ContextVar("chunks done", default=None)


@contextmanager
def told_of_chunks(listener: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, ``listener`` gets the modules of every chunk that is done with."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def read_ahead(
    zoo: Zoo, chunks: Sequence[Chunk], threads: int, memory: Memory | None = None
) -> Iterator[RawChunk]:
    """Each chunk's bytes in turn; the next one is read while the caller computes.

    A chunk is valid until the next one is asked for. ``memory``: as for :class:`RawFactors`.
    """
    capacity = max((c.raw_bytes for c in chunks), default=0)
    buffers = [RawFactors(zoo, capacity, memory) for _ in range(min(2, len(chunks)))]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(buffers[0].read, chunks[0], threads) if chunks else None
        for i in range(len(chunks)):
            current = pending.result()
            if i + 1 < len(chunks):
                pending = pool.submit(buffers[(i + 1) % 2].read, chunks[i + 1], threads)
            yield current
            told = _listener.get()
            if told is not None:
                told(chunks[i].last - chunks[i].first)
