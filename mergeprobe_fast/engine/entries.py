"""Statistics of the entries of all updates of a zoo, and of all pairs, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import RawChunk, plan_chunks, read_ahead
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.ops._tables import DTYPE_CODE, SEGMENT
from mergeprobe_fast.ops.canonical import canonical
from mergeprobe_fast.ops.entries import (
    Moments,
    Pairs,
    Sample,
    entry_moments,
    entry_pairs,
    entry_sizes,
)
from mergeprobe_fast.ops.tiles import NotFinite
from mergeprobe_fast.ops.tiles_rule import Deltas, stream
from mergeprobe_fast.zoo import Module, Zoo

# Adapters whose pairs are added up at a time: partial sums of 65,536 pairs are 4.5 MiB a stripe.
BLOCK = 256
# Entries of a module that are looked at, at least: thresholds are its own.
FEWEST = 8192
# A delta this far below the size of what it is a sum of may be nothing but rounding.
_SUSPECT = 1e-5
_DTYPE = {code: name for name, code in DTYPE_CODE.items()}


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
class OfPairs:
    """Per pair (a, b), over the modules that both have, as if every entry had been looked at.

    (N, N) float64, symmetric but for ``opposed``; the diagonal is 0.
    """

    conflicts: np.ndarray
    both: np.ndarray  # entries where neither is 0
    expected: np.ndarray  # conflicts of Gaussian entries with the cosine of each module
    mass: np.ndarray  # sum |w_a w_b|
    conflict_mass: np.ndarray
    opposed: np.ndarray  # sum |w_a| over conflicts
    cancelled: np.ndarray  # sum of the smaller of |w_a|, |w_b| over conflicts
    squares: np.ndarray  # sum (w_a w_b)^2
    top: np.ndarray  # entries that are top in both


@dataclass(frozen=True, eq=False)
class EntrySums:
    """What :func:`entry_sums` gives."""

    adapters: OfAdapters
    pairs: OfPairs


def entry_sums(zoo: Zoo, looking: Looking, *, threads: int | None = None) -> EntrySums:
    """Sums over the entries of every adapter and of every pair of a zoo.

    Thresholds of top entries are those of each module. Results do not depend on the number of
    threads, and those of a pair on other adapters only where a sample does (:class:`Looking`).

    Memory: two chunks of ``passes.CHUNK_BYTES``, the factors of one module in float32, 192 MiB of
    partial sums at most, and 9 N^2 numbers.

    Raises:
        InputError: a file that changed, a factor that is not finite, a delta that overflows
            float32; names file and key.
    """
    threads = _env.threads_or_default(threads)
    n = len(zoo)
    adapters = OfAdapters(*np.zeros((13, n)))
    pairs = OfPairs(*np.zeros((9, n, n)))
    total = total_entries(zoo)
    for raw in read_ahead(zoo, plan_chunks(zoo, np.arange(n), passes.CHUNK_BYTES), threads):
        for module in _modules(raw, looking, total, threads):
            module.add(adapters, pairs)
    return EntrySums(adapters, pairs)


def _modules(raw: RawChunk, looking: Looking, total: int, threads: int) -> Iterator[_Module]:
    segments = raw.fill(np.zeros(len(raw.entries), SEGMENT))
    segments["scale"] = raw.entries["scale"]
    place = raw.entries["module"] - raw.chunk.first
    bounds = np.searchsorted(place, np.arange(raw.chunk.last - raw.chunk.first + 1))
    for k in range(len(bounds) - 1):
        if bounds[k + 1] > bounds[k]:
            rows = np.arange(*bounds[k : k + 2])
            yield _Module(raw, rows, segments, looking, total, threads)


class _Module:
    """One module: its deltas that are not zero, in units in which their entries are about 1."""

    def __init__(
        self, raw: RawChunk, rows: np.ndarray, segments: np.ndarray, looking: Looking, total: int,
        threads: int,
    ) -> None:  # fmt: skip
        self._raw, self._threads = raw, threads
        self._module = raw.zoo.modules[int(raw.entries["module"][rows[0]])]
        self._sample = looking.sample(self._module, total)
        self._rows, self._segments = rows, segments[rows]
        self._sizes = self._call(entry_sizes)
        self._keep(self._sizes > 0)
        if not len(self._rows):
            return
        root = np.sqrt(self._module.d_out * self._module.d_in)
        # In such units a fourth power neither over- nor underflows; powers of 2 change no digit.
        # The scale must fit float32; entries that it cannot lift from below 1e-38 are next to 0.
        least = np.frexp(self._segments["scale"])[1] - 127
        self._unit = np.maximum(np.frexp(self._sizes / root)[1], least)
        self._segments["scale"] = np.ldexp(self._segments["scale"], -self._unit)
        self.moments: Moments = self._call(entry_moments, looking.density, sample=self._sample)
        energy = np.ldexp(self.moments.squares * self._factor(), 2 * self._unit)
        suspect = np.flatnonzero(np.sqrt(energy) <= _SUSPECT * self._sizes)
        alive = np.ones(len(self._rows), bool)
        alive[suspect] = [not self._is_zero(i) for i in suspect]
        if not alive.all():
            self._keep(alive)
            self._unit = self._unit[alive]
            self.moments = Moments(*(x[alive] for x in self.moments))

    def _keep(self, which: np.ndarray) -> None:
        self._rows, self._sizes = self._rows[which], self._sizes[which]
        self._segments = self._segments[which]

    def _factor(self) -> np.ndarray:
        """Entries there are, over entries that were looked at."""
        return self._module.d_out * self._module.d_in / self.moments.entries

    def _call(self, function, *arguments, which: np.ndarray | None = None, **options):
        """A function of ops on the module's deltas, or on some; names what it refuses."""
        chosen = np.arange(len(self._rows)) if which is None else which
        segments = np.ascontiguousarray(self._segments[chosen])
        deltas = Deltas(segments, self._module.d_out, self._module.d_in, self._raw.buffer)
        try:
            return function(deltas, *arguments, threads=self._threads, **options)
        except NotFinite as error:
            adapter, name = self._raw.names(int(self._rows[chosen[error.segment]]))
            module = adapter.modules[name]
            factor = module.b if error.side == "B" else module.a
            reason = f"{error.side} holds NaN or infinite values".split(" ", 1)[1]
            raise InputError(reason, path=factor.file.path, key=factor.key) from None
        except InputError as error:
            for i in chosen:
                if self._overflows(i):
                    adapter, name = self._raw.names(int(self._rows[i]))
                    raise InputError(error.reason, path=adapter.path, key=name) from None
            reason = f"{self._module.name}: {error.reason}"
            raise InputError(reason, path=self._raw.zoo.root) from None

    def _overflows(self, i: int) -> bool:
        segments = self._segments[i : i + 1]
        deltas = Deltas(segments, self._module.d_out, self._module.d_in, self._raw.buffer)
        try:
            entry_moments(deltas, sample=self._sample, threads=self._threads)
        except InputError:
            return True
        return False

    def _is_zero(self, i: int) -> bool:
        """Whether a delta is below the rounding of its factors."""
        e = self._raw.entries[self._rows[i]]
        factors = []
        for side, shape in (("b", (self._module.d_out, -1)), ("a", (-1, self._module.d_in))):
            name = _DTYPE[int(e[f"{side}_dtype"])]
            values = self._raw.view(int(self._rows[i]), side).view(STORAGE[name])
            factors.append(to_f32(values, name).reshape(shape))
        return canonical([(*factors, float(e["scale"]))]).rank == 0

    def add(self, adapters: OfAdapters, pairs: OfPairs) -> None:
        """Account for the module."""
        if not len(self._rows):
            return
        who, m, factor = self._raw.entries["adapter"][self._rows], self.moments, self._factor()
        for name, power in (("l1", 1), ("squares", 2), ("fourths", 4), ("top_squares", 2)):
            values = np.ldexp(getattr(m, name) * factor, power * self._unit)
            getattr(adapters, name)[who] += values
        for name in ("zeros", "top"):
            getattr(adapters, name)[who] += getattr(m, name) * factor
        adapters.entries[who] += m.entries * factor
        adapters.looked_at[who] += m.entries
        adapters.modules[who] += 1
        with np.errstate(divide="ignore", invalid="ignore"):
            kurtosis = m.entries * m.fourths / m.squares**2
            relative = m.threshold / np.sqrt(m.squares / m.entries)
        adapters.seen[who] += m.squares > 0
        adapters.kurtosis[who] += np.where(m.squares > 0, kurtosis, 0.0)
        adapters.thresholds[who] += np.isfinite(relative)
        adapters.threshold[who] += np.where(np.isfinite(relative), relative, 0.0)
        block = who // BLOCK
        for one, two in combinations_with_replacement(np.unique(block), 2):
            first, second = np.flatnonzero(block == one), np.flatnonzero(block == two)
            both = first if one == two else np.concatenate([first, second])
            split = 0 if one == two else len(first)
            if len(both) > 1:
                self._add_pairs(both, split, who, pairs)

    def _add_pairs(self, which: np.ndarray, split: int, who: np.ndarray, pairs: OfPairs) -> None:
        thresholds = self.moments.threshold[which].astype(np.float32)
        found: Pairs = self._call(
            entry_pairs, thresholds, units=self._unit[which], split=split, sample=self._sample,
            which=which,
        )  # fmt: skip
        if split:
            i, j = (x.ravel() for x in np.indices((split, len(which) - split)))
            j = j + split
        else:
            i, j = np.triu_indices(len(which), 1)
        a, b, unit = who[which[i]], who[which[j]], self._unit[which]
        got = Pairs(*(x[i, j].astype(np.float64) for x in found))
        factor = self._factor()[which[i]]
        # Not those of the moments: the cosine of a copy must be 1, as its arccosine is wanted.
        squares = np.diagonal(found.mass)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (got.mass - 2 * got.conflict_mass) / np.sqrt(squares[i] * squares[j])
        expected = got.both * np.arccos(np.clip(np.nan_to_num(cosine), -1, 1)) / np.pi
        both_units = unit[i] + unit[j]
        for name, values in (
            ("conflicts", got.conflicts), ("both", got.both), ("expected", expected),
            ("top", got.top), ("mass", np.ldexp(got.mass, both_units)),
            ("conflict_mass", np.ldexp(got.conflict_mass, both_units)),
            ("squares", np.ldexp(got.squares, 2 * both_units)),
            ("cancelled", np.ldexp(got.cancelled, unit[j])),
        ):  # fmt: skip
            to = getattr(pairs, name)
            to[a, b] += values * factor
            to[b, a] += values * factor
        pairs.opposed[a, b] += np.ldexp(got.opposed * factor, unit[i])
        pairs.opposed[b, a] += np.ldexp(got.opposing * factor, unit[j])
