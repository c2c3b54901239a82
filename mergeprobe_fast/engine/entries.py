"""Statistics of the entries of all updates of a zoo, and of all pairs, module by module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import Chunk, RawFactors, plan_chunks, read_ahead
from mergeprobe_fast.engine.entry_modules import EntryModule, Factors, Measured, OfPairs
from mergeprobe_fast.engine.kept_sums import sums_so_far
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops.entries import COLUMNS, ROWS, Sample
from mergeprobe_fast.ops.tiles_rule import stream
from mergeprobe_fast.zoo import Module, Zoo

# Adapters whose pairs are added up at a time, at most: partial sums of 65,536 pairs are 4.5 MiB a
# stripe. Fewer where factors are large: those of the blocks in flight, as read and packed, take
# FACTOR_BYTES.
BLOCK = 256
# The same on a device, whose partial sums are another matter.
DEVICE_BLOCK = 1024
FACTOR_BYTES = 1 << 30
# Entries of a module that are looked at, at least: thresholds are its own.
FEWEST = 8192


@dataclass(frozen=True)
class Looking:
    """Which entries are looked at, and which of them count as top.

    ``entries``: about how many of each adapter, over all modules of the zoo and in proportion to
    their sizes (at least FEWEST of each module); None: all. ``density``: share of the entries of a
    module that are top. ``seed``: which sample; it is the same for all adapters, and depends on
    which there are only by the modules that the zoo has.
    """

    entries: int | None = None
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        entries = self.entries
        whole = isinstance(entries, (int, np.integer)) and not isinstance(entries, bool)
        if entries is not None and not (whole and entries > 0):
            raise InputError(f"expected a positive integer or None, got {entries!r}", key="entries")
        number = isinstance(self.density, (int, float, np.integer, np.floating))
        if not (number and 0 < self.density <= 1):
            raise InputError(f"expected above 0, at most 1, got {self.density!r}", key="density")
        whole = isinstance(self.seed, (int, np.integer)) and not isinstance(self.seed, bool)
        if not (whole and 0 <= self.seed < 2**64):
            raise InputError(f"must be an integer in [0, 2^64), got {self.seed!r}", key="seed")

    def wanted(self, module: Module, total: int) -> int:
        """Of a module of a zoo with ``total`` (:func:`total_entries`); may be more than it has."""
        size = module.d_out * module.d_in
        if self.entries is None:
            return size
        return max(FEWEST, int(np.ceil(self.entries * (size / total))))

    def sample(self, module: Module, total: int) -> Sample | None:
        """The entries of a module, None for all."""
        if self.entries is None:
            return None
        wanted, name = self.wanted(module, total), stream("entries", module.name)
        return Sample.draw(module.d_out, module.d_in, wanted, int(self.seed), name)


def total_entries(zoo: Zoo) -> int:
    """Entries of all modules of a zoo."""
    return sum(m.d_out * m.d_in for m in zoo.modules)


@dataclass(frozen=True, eq=False)
class OfAdapters:
    """Per adapter, added up over its modules, as if every entry had been looked at; (N,) each.

    A delta that counts as zero is left out, as is a module that an adapter lacks.
    """

    entries: np.ndarray
    l1: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray
    zeros: np.ndarray
    top: np.ndarray
    top_squares: np.ndarray
    modules: np.ndarray  # how many
    seen: np.ndarray  # modules of whose entries that were looked at some are not 0
    kurtosis: np.ndarray  # sum over those
    thresholds: np.ndarray  # those that have a threshold: some have too few entries
    threshold: np.ndarray  # sum over those, each over the root mean square of its entries
    looked_at: np.ndarray  # entries that were looked at


@dataclass(frozen=True, eq=False)
class EntrySums:
    """What :func:`entry_sums` gives."""

    adapters: OfAdapters
    pairs: OfPairs


def entry_sums(
    zoo: Zoo, looking: Looking, *, threads: int | None = None, device: Any = None
) -> EntrySums:
    """Sums over the entries of every adapter and of every pair of a zoo.

    Thresholds of top entries are those of each module. Results do not depend on the number of
    threads, and those of a pair on other adapters only where a sample does (:class:`Looking`), or,
    with more than 85 adapters, by the rounding of float64.

    ``device``: from :func:`mergeprobe_fast.ops.device.open_device`; entries and pairs are there,
    counts are the CPU's. Deltas that may be nothing but rounding are looked at on the CPU.

    Memory: FACTOR_BYTES for factors, 192 MiB of partial sums at most, and 9 N^2 numbers. On a
    device FACTOR_BYTES, 9 N^2 numbers, and what ``kernels.entry_statistics`` says.

    Raises:
        InputError: a file that changed, a factor that is not finite, a delta that overflows
            float32; names file and key.
    """
    work = _Work(zoo, looking, _env.threads_or_default(threads), device)
    work.run()
    return EntrySums(work.adapters, work.pairs)


@dataclass(frozen=True, eq=False)
class _Read:
    """A chunk to read: some modules as a whole, or one block of adapters of one module, to measure
    it or, where ``held`` is another block, for the pairs of the two."""

    chunk: Chunk
    module: int | None = None
    block: int = 0
    held: int | None = None


class _Work:
    """A pass over all entries, in steps: module by module the pairs within each block of adapters,
    and then those of two blocks."""

    def __init__(
        self, zoo: Zoo, looking: Looking, threads: int, device: Any = None
    ) -> None:
        self._zoo, self._looking, self._threads, self._device = zoo, looking, threads, device
        self._total = total_entries(zoo)
        n = len(zoo)
        self.adapters, self.pairs = OfAdapters(*np.zeros((13, n))), OfPairs(*np.zeros((9, n, n)))
        self._blocks = [self._split(k) for k in range(len(zoo.modules))]
        counts = [len(b) * (len(b) + 1) // 2 for b in self._blocks]
        self._first = np.concatenate([[0], np.cumsum(counts)])  # step of each module
        self._measured: list[Measured] = []  # blocks of the module that it is at
        self._totals: Any = self.pairs  # or those on the device
        self._kept = sums_so_far()
        self._kept.restore(self._arrays())
        if device is not None:
            from mergeprobe_fast.kernels.entry_totals import PairTotals

            self._totals = PairTotals(device, n, vars(self.pairs) if self._kept.step else None)

    def _arrays(self) -> dict[str, np.ndarray]:
        """Of adapters and pairs by name, what has been added up."""
        if self._totals is not self.pairs:
            for name, values in self._totals.arrays().items():
                getattr(self.pairs, name)[...] = values
        return {
            f"{kind}.{name}": values
            for kind, sums in (("adapters", self.adapters), ("pairs", self.pairs))
            for name, values in vars(sums).items()
        }

    def _split(self, k: int) -> list[np.ndarray]:
        """Rows of the problem table at a module, in blocks of adapters."""
        first, last = self._zoo.table.module_bounds[k : k + 2]
        raw, packed = self._bytes(k)
        # As read: one that is held, one in use, one being read. Packed: two.
        most = BLOCK if self._device is None else DEVICE_BLOCK
        side = min(most, max(2, FACTOR_BYTES // max(1, 3 * raw + 2 * packed)))
        return np.array_split(np.arange(first, last), max(1, -(-(last - first) // side)))

    def _bytes(self, k: int) -> tuple[int, int]:
        """What an adapter's factors at a module take at most: as read, and packed."""
        module, bounds = self._zoo.modules[k], self._zoo.table.module_bounds
        here = self._zoo.table.entries[slice(*bounds[k : k + 2])]
        d_out, d_in = module.d_out, module.d_in
        if self._looking.entries is not None:
            tiles = -(-self._looking.wanted(module, self._total) // (ROWS * COLUMNS))
            d_out, d_in = min(d_out, ROWS * tiles), min(d_in, COLUMNS * tiles)
        raw = int((here["a_nbytes"] + here["b_nbytes"]).max(initial=0))
        return raw, 4 * int(here["rank"].max(initial=0)) * (d_out + d_in)

    def run(self) -> None:
        """Account for every module."""
        plan = self._plan()
        chunks = [read.chunk for read in plan]
        held, memory = None, None
        room = None if self._device is None else self._device.memory
        ahead = read_ahead(self._zoo, chunks, self._threads, room)
        for raw, read in zip(ahead, plan, strict=True):
            here = Factors(raw, self._device)
            if read.module is None:
                for k in range(raw.chunk.first, raw.chunk.last):
                    self._whole(k, here)
            elif read.held is None:
                self._measure(read.module, read.block, here)
            else:
                if held is None or held[:2] != (read.module, read.held):
                    chunk = self._chunk(read.module, read.held)
                    if memory is None:
                        memory = RawFactors(self._zoo, max(c.raw_bytes for c in chunks), room)
                    block = Factors(memory.read(chunk, self._threads), self._device)
                    block.release()
                    held = read.module, read.held, block
                self._two(read.module, read.held, read.block, held[2], here)
            here.release()
        self._arrays()

    def _plan(self) -> list[_Read]:
        """What is to be read: nothing of what was kept."""
        plan: list[_Read] = []
        for chunk in plan_chunks(self._zoo, np.arange(len(self._zoo)), passes.CHUNK_BYTES):
            k, blocks = chunk.first, self._blocks[chunk.first]
            packed = 2 * max(map(len, blocks)) * self._bytes(k)[1]
            fits = 2 * chunk.raw_bytes + packed <= FACTOR_BYTES
            if self._first[chunk.last] <= self._kept.step:
                continue
            if fits or chunk.last > k + 1 or len(blocks) == 1:
                plan.append(_Read(chunk))
                continue
            plan += [_Read(self._chunk(k, b), k, b) for b in range(len(blocks))]
            plan += [
                _Read(self._chunk(k, b), k, b, held)
                for held, b in combinations(range(len(blocks)), 2)
                if self._step(k, held, b) >= self._kept.step
            ]
            # Whoever listens to chunks is told of a module when it is done.
            plan[-1] = replace(plan[-1], chunk=replace(plan[-1].chunk, first=k))
        return plan

    def _chunk(self, k: int, block: int) -> Chunk:
        rows = self._blocks[k][block]
        here = self._zoo.table.entries[rows]
        padded = int((here["a_nbytes"] + here["b_nbytes"]).sum()) + 128 * len(rows)
        return Chunk(k + 1, k + 1, rows, padded, 0)

    def _step(self, k: int, one: int, two: int | None = None) -> int:
        """The number of a step, from 0: the pairs of a block, or of two."""
        count = len(self._blocks[k])
        if two is None:
            return int(self._first[k]) + one
        return int(self._first[k]) + count + one * count - one * (one + 1) // 2 + two - one - 1

    def _whole(self, k: int, here: Factors) -> None:
        count = len(self._blocks[k])
        if self._first[k + 1] <= self._kept.step or not len(self._blocks[k][0]):
            return
        for b in range(count):
            self._measure(k, b, here)
        for one, two in combinations(range(count), 2):
            self._two(k, one, two, here, here)

    def _module(self, k: int) -> EntryModule:
        sample = self._looking.sample(self._zoo.modules[k], self._total)
        density = self._looking.density
        return EntryModule(self._zoo, k, density, sample, self._threads, self._device)

    def _measure(self, k: int, block: int, here: Factors) -> None:
        if block == 0:
            self._at, self._measured = self._module(k), []
        found = self._at.measure(here, self._blocks[k][block])
        self._measured.append(found)
        if (step := self._step(k, block)) >= self._kept.step:
            self._at.add(found, self.adapters)
            self._at.add_pairs(found, here, None, None, self._totals)
            self._kept.reached(step + 1, self._arrays)

    def _two(self, k: int, one: int, two: int, held: Factors, here: Factors) -> None:
        if (step := self._step(k, one, two)) >= self._kept.step:
            self._at.add_pairs(self._measured[one], held, self._measured[two], here, self._totals)
            self._kept.reached(step + 1, self._arrays)
