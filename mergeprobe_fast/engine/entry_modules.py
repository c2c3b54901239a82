"""The entries of the updates of one module, a block of adapters or two at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergeprobe_fast.engine.chunks import RawChunk
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.ops._tables import DTYPE_CODE, SEGMENT, address
from mergeprobe_fast.ops.canonical import canonical
from mergeprobe_fast.ops.entries import (
    Moments,
    Pairs,
    Sample,
    entry_moments,
    entry_pairs,
    entry_sizes,
)
from mergeprobe_fast.ops.entries_device import entry_pairs_there
from mergeprobe_fast.ops.tiles import NotFinite
from mergeprobe_fast.ops.tiles_rule import Deltas
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.engine.entries import OfAdapters
    from mergeprobe_fast.kernels.entry_totals import PairTotals

# A delta this far below the size of what it is a sum of may be nothing but rounding.
_SUSPECT = 1e-5
_DTYPE = {code: name for name, code in DTYPE_CODE.items()}


class Factors:
    """The factors of a chunk in memory, and on ``device``: see :meth:`release`."""

    def __init__(self, raw: RawChunk, device: Any = None) -> None:
        self.raw = raw
        self._segments = raw.fill(np.zeros(len(raw.entries), SEGMENT))
        self._copy: Any = None
        self._shift = 0
        self.release: Callable[[], None] = lambda: None  # before the chunk's bytes go
        if device is not None:
            start = int(min(raw.a.min(), raw.b.min()))
            first = start - address(raw.buffer)
            last = first + raw.chunk.raw_bytes
            self._copy, self.release = device.upload(raw.buffer[first:last])
            self._shift = self._copy.data_ptr() - start

    def of(self, rows: np.ndarray, scale: np.ndarray) -> _Some:
        """Deltas of rows of the problem table, with these scales."""
        places = np.searchsorted(self.raw.chunk.rows, rows)
        segments = self._segments[places]
        segments["scale"] = scale
        shift = np.full(len(rows), self._shift, np.int64)
        return _Some(segments, [(self.raw, int(i)) for i in places], shift, [self._copy])


class _Some(NamedTuple):
    """Deltas of one module, and where in which chunk each lies; and on a device: so many bytes
    from there, in ``copies``."""

    segments: np.ndarray
    places: list[tuple[RawChunk, int]]
    shift: np.ndarray
    copies: list[Any]

    def and_of(self, other: _Some) -> _Some:
        segments = np.concatenate([self.segments, other.segments])
        shift = np.concatenate([self.shift, other.shift])
        return _Some(segments, self.places + other.places, shift, self.copies + other.copies)

    def only(self, which: np.ndarray) -> _Some:
        places = [self.places[i] for i in np.arange(len(self))[which]]
        return _Some(self.segments[which], places, self.shift[which], self.copies)

    def there(self) -> np.ndarray:
        """The segments with addresses on the device."""
        segments = self.segments.copy()
        for side in "uv":
            data = segments[side]["data"].astype(np.int64) + self.shift
            segments[side]["data"] = data.astype(np.uint64)
        return segments

    def __len__(self) -> int:
        return len(self.places)


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
class Measured:
    """The adapters of a block whose deltas are not zero, in units in which entries are about 1.

    ``rows`` of the problem table; ``who``, the adapters; ``scale`` of each, times 2^-``unit``.
    """

    rows: np.ndarray
    who: np.ndarray
    scale: np.ndarray
    unit: np.ndarray
    moments: Moments


class EntryModule:
    """Module ``k`` of a zoo: the top entries are a share ``density``; ``sample`` None is all.

    ``device``: None is the CPU; else factors must be there. What may be nothing but rounding is
    looked at on the CPU, delta by delta.
    """

    def __init__(
        self, zoo: Zoo, k: int, density: float, sample: Sample | None, threads: int,
        device: Any = None,
    ) -> None:  # fmt: skip
        self._zoo, self._module, self._density = zoo, zoo.modules[k], density
        self._sample, self._threads, self._device = sample, threads, device

    def measure(self, factors: Factors, rows: np.ndarray) -> Measured:
        """A block of adapters by itself. Its factors are in the chunk.

        Raises:
            InputError: a factor that is not finite, a delta that overflows; names file and key.
        """
        entries = self._zoo.table.entries
        some = factors.of(rows, entries["scale"][rows])
        sizes = self._call(entry_sizes, some)
        alive = sizes > 0
        some, sizes, rows = some.only(alive), sizes[alive], rows[alive]
        if not len(rows):
            none = Moments(*(np.zeros(0) for _ in Moments._fields))
            return Measured(rows, rows, np.zeros(0), np.zeros(0, np.int64), none)
        scale = entries["scale"][rows]
        root = np.sqrt(self._module.d_out * self._module.d_in)
        # In such units a fourth power neither over- nor underflows; powers of 2 change no digit.
        # The scale must fit float32; entries that it cannot lift from below 1e-38 are next to 0.
        unit = np.maximum(np.frexp(sizes / root)[1], np.frexp(scale)[1] - 127)
        scale = np.ldexp(scale, -unit)
        some.segments["scale"] = scale
        moments: Moments = self._call(entry_moments, some, self._density, sample=self._sample)
        energy = np.ldexp(moments.squares * self._factor(moments), 2 * unit)
        alive = np.ones(len(rows), bool)
        suspect = np.flatnonzero(np.sqrt(energy) <= _SUSPECT * sizes)
        alive[suspect] = [not self._is_zero(*some.places[i]) for i in suspect]
        rows, moments = rows[alive], Moments(*(x[alive] for x in moments))
        return Measured(rows, entries["adapter"][rows], scale[alive], unit[alive], moments)

    def _factor(self, moments: Moments) -> np.ndarray:
        """Entries there are, over entries that were looked at."""
        return self._module.d_out * self._module.d_in / moments.entries

    def _deltas(self, some: _Some) -> Deltas:
        buffers = [raw.buffer for raw, _ in some.places]
        segments = np.ascontiguousarray(some.segments)
        d_out, d_in, there = self._module.d_out, self._module.d_in, None
        if self._device is not None:
            from mergeprobe_fast.kernels.entry_factors import EntryFactors

            there = EntryFactors(some.there(), d_out, d_in, self._device.torch, some.copies)
        return Deltas(segments, d_out, d_in, buffers, there)

    def _call(self, function: Callable, some: _Some, *arguments: Any, **options: Any) -> Any:
        """A function of ops on deltas; names what it refuses."""
        try:
            return function(self._deltas(some), *arguments, threads=self._threads, **options)
        except NotFinite as error:
            raw, place = some.places[error.segment]
            adapter, name = raw.names(place)
            module = adapter.modules[name]
            factor = module.b if error.side == "B" else module.a
            reason = f"{error.side} holds NaN or infinite values".split(" ", 1)[1]
            raise InputError(reason, path=factor.file.path, key=factor.key) from None
        except InputError as error:
            for i, (raw, place) in enumerate(some.places):
                if self._overflows(some.only(np.array([i]))):
                    adapter, name = raw.names(place)
                    raise InputError(error.reason, path=adapter.path, key=name) from None
            reason = f"{self._module.name}: {error.reason}"
            raise InputError(reason, path=self._zoo.root) from None

    def _overflows(self, one: _Some) -> bool:
        try:
            entry_moments(self._deltas(one), sample=self._sample, threads=self._threads)
        except InputError:
            return True
        return False

    def _is_zero(self, raw: RawChunk, place: int) -> bool:
        """Whether a delta is below the rounding of its factors."""
        e = raw.entries[place]
        factors = []
        for side, shape in (("b", (self._module.d_out, -1)), ("a", (-1, self._module.d_in))):
            name = _DTYPE[int(e[f"{side}_dtype"])]
            values = raw.view(place, side).view(STORAGE[name])
            factors.append(to_f32(values, name).reshape(shape))
        return canonical([(*factors, float(e["scale"]))]).rank == 0

    def add(self, block: Measured, adapters: OfAdapters) -> None:
        """Account for the adapters of a block."""
        if not len(block.rows):
            return
        who, m, factor = block.who, block.moments, self._factor(block.moments)
        for name, power in (("l1", 1), ("squares", 2), ("fourths", 4), ("top_squares", 2)):
            values = np.ldexp(getattr(m, name) * factor, power * block.unit)
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

    def add_pairs(
        self, one: Measured, factors: Factors, two: Measured | None, others: Factors | None,
        pairs: OfPairs | PairTotals,
    ) -> None:  # fmt: skip
        """Account for the pairs of a block, whose factors are in ``factors``, by itself or with a
        second one, whose are in ``others``. On a device ``pairs`` are there."""
        if not len(one.rows) or (two is not None and not len(two.rows)):
            return
        some, blocks = factors.of(one.rows, one.scale), [one]
        if two is not None and others is not None:
            some, blocks = some.and_of(others.of(two.rows, two.scale)), [one, two]
        if len(some) < 2:
            return
        who, unit = (np.concatenate([getattr(b, x) for b in blocks]) for x in ("who", "unit"))
        thresholds = np.concatenate([b.moments.threshold for b in blocks]).astype(np.float32)
        split = 0 if two is None else len(one.rows)
        factor_of = np.concatenate([self._factor(b.moments) for b in blocks])
        options = {"units": unit, "split": split, "sample": self._sample}
        if not isinstance(pairs, OfPairs):
            counts, sums = self._call(entry_pairs_there, some, thresholds, **options)
            pairs.add(counts, sums, who, unit, factor_of)
            return
        found: Pairs = self._call(entry_pairs, some, thresholds, **options)
        if split:
            i, j = (x.ravel() for x in np.indices((split, len(some) - split)))
            j = j + split
        else:
            i, j = np.triu_indices(len(some), 1)
        a, b = who[i], who[j]
        got = Pairs(*(x[i, j].astype(np.float64) for x in found))
        factor = factor_of[i]
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
