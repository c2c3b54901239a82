"""P2 that ends in numbers: statistics of the entries of deltas, and of pairs of deltas.

Entries are the float32 numbers that merges see. Counts are exact integers; sums are float32 over at
most 96 terms in a row, float64 from there on, and no difference of two sums is taken. On one
instruction set, results do not depend on the number of threads, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops import entries_cuda, entries_reference
from mergeprobe_fast.ops.tiles import NotFinite
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import Deltas

Factors = Deltas | list[tuple[Any, Any, float]]
Backend = Literal["cpu", "reference"]
SignBackend = Literal["cpu", "reference", "cuda"]

ROWS, COLUMNS = 8, 16  # of a tile of a sample
COUNTS, SUMS = 3, 6  # per pair, as csrc/include/mergeprobe/entries.hpp has them
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Sample:
    """Entries of a matrix to look at: ``tiles`` tiles of 8 rows x 16 columns.

    Rows and columns are put in random order, and tiles lie along the diagonals of the result. So
    every row is looked at as often as any other (give or take a tile), every column too, and what
    rows or columns as such contribute is not left to chance. Each entry is as likely as any other.
    """

    rows: np.ndarray  # int32 permutation of d_out
    columns: np.ndarray  # int32 permutation of d_in
    tiles: int

    @classmethod
    def draw(cls, d_out: int, d_in: int, entries: int, seed: int, stream: int) -> Sample | None:
        """About ``entries`` of d_out x d_in, or None, for all of them, where a sample is no less.

        ``stream``: which random numbers, as for :class:`ElementwiseRule`.
        """
        tiles = -(-entries // (ROWS * COLUMNS))
        if tiles >= -(-d_out // ROWS) * -(-d_in // COLUMNS):
            return None
        orders = [
            np.argsort(counter_hash(seed, stream ^ side, np.arange(n)), kind="stable")
            for side, n in ((0, d_out), (1, d_in))
        ]
        return cls(*(o.astype(np.int32) for o in orders), tiles)


class Moments(NamedTuple):
    """Per delta, over the entries looked at; float64 and int64 arrays."""

    l1: np.ndarray  # sum |x|
    squares: np.ndarray  # sum x^2
    fourths: np.ndarray  # sum x^4
    top_squares: np.ndarray  # sum x^2 over the top entries
    threshold: np.ndarray  # the int(density * entries)-th largest |x|; inf where that is the 0th
    entries: np.ndarray
    zeros: np.ndarray  # entries that are exactly 0
    top: np.ndarray  # entries with |x| >= threshold that are not 0


class Pairs(NamedTuple):
    """Per pair i < j, in the upper triangle of (n, n) arrays; the rest is 0.

    A conflict is an entry with x_i x_j < 0. An entry that is exactly 0 is on neither side. The
    diagonals of the sums are those of each delta with itself.
    """

    conflicts: np.ndarray  # int64, how many
    both: np.ndarray  # int64, entries where neither is 0
    top: np.ndarray  # int64, entries that are top in both
    mass: np.ndarray  # sum |x_i x_j|
    conflict_mass: np.ndarray  # the same over conflicts
    opposed: np.ndarray  # sum |x_i| over conflicts
    opposing: np.ndarray  # sum |x_j| over conflicts
    cancelled: np.ndarray  # sum of the smaller of |x_i| and |x_j| over conflicts, in units of j
    squares: np.ndarray  # sum (x_i x_j)^2


def entry_sizes(
    factors: Factors, *, threads: int | None = None, backend: Backend = "cpu"
) -> np.ndarray:
    """(n,) float64: sqrt(sum over units k of |s b_k|^2 |a_k|^2) of each delta.

    What its Frobenius norm would be if its rank-one units were orthogonal.
    """
    deltas = _deltas(factors)
    if _reference(backend):
        return entries_reference.entry_sizes(deltas)
    out = np.empty(len(deltas))
    _run("entry_sizes", deltas, threads, out)
    return np.sqrt(out)


def entry_moments(
    factors: Factors,
    density: float = 0.2,
    *,
    sample: Sample | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> Moments:
    """Norms, kurtosis, zeros and the largest entries of each delta: see :class:`Moments`.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, or :class:`Deltas`. Fourth
            powers are float32: scale deltas so that entries are about 1 (:func:`entry_sizes`).
        density: share of the entries that count as top.
        sample: look at these entries; default all. The threshold is then that of the sample.

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or that overflow.
    """
    deltas = _deltas(factors)
    if not 0 <= density <= 1:
        raise InputError(f"expected 0 to 1, got {density!r}", key="density")
    if _reference(backend):
        return entries_reference.entry_moments(deltas, density, sample)
    out = np.empty((8, len(deltas)))
    _run("entry_moments", deltas, threads, *_order(deltas, sample), float(density), out)
    return Moments(*out[:5], *out[5:].astype(np.int64))


def entry_pairs(
    factors: Factors,
    thresholds: np.ndarray | None = None,
    *,
    units: np.ndarray | None = None,
    magnitudes: bool = True,
    split: int = 0,
    sample: Sample | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> Pairs:
    """Conflicts of signs and what they weigh, of each pair of deltas: see :class:`Pairs`.

    Args:
        factors: as for :func:`entry_moments`.
        thresholds: (n,) of |x|, for ``top``; None leaves it 0.
        units: (n,) integers: ``cancelled`` compares 2^units[i] |x_i| with 2^units[j] |x_j|.
        magnitudes: False leaves the sums 0 and is many times as fast: signs are kept as bits.
        split: if positive, only pairs i < split <= j.
        sample: look at these entries; default all.

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or that overflow.
    """
    deltas = _deltas(factors)
    n = len(deltas)
    if not 0 <= split <= n:
        raise InputError(f"expected 0 to {n}, got {split!r}", key="split")
    if thresholds is not None:
        thresholds = np.ascontiguousarray(thresholds, np.float32)
        if thresholds.shape != (n,):
            raise InputError(f"expected {n}, got {thresholds.shape}", key="thresholds")
    units = np.zeros(n, np.int32) if units is None else np.ascontiguousarray(units, np.int32)
    if units.shape != (n,):
        raise InputError(f"expected {n}, got {units.shape}", key="units")
    if _reference(backend):
        return entries_reference.entry_pairs(deltas, thresholds, units, magnitudes, split, sample)
    counts = np.empty((n, n, COUNTS), np.int64)
    sums = np.empty((n, n, SUMS)) if magnitudes else None
    arguments = (*_order(deltas, sample), split, thresholds, units, counts, sums, True)
    _run("entry_pairs", deltas, threads, *arguments)
    if sums is None:
        sums = np.zeros((n, n, SUMS))
    return Pairs(*np.moveaxis(counts, 2, 0), *np.moveaxis(sums, 2, 0))


def sign_conflicts(
    factors: Factors, *, threads: int | None = None, backend: SignBackend = "cpu"
) -> np.ndarray:
    """(n, n) float64, symmetric: the share of entries with opposite signs, of those not 0 in both.

    NaN where there are none; 0 on the diagonal. The sizes of the scales do not matter.

    Args:
        factors: as for :func:`entry_moments`; torch tensors on one CUDA device for "cuda".
        backend: "cuda" counts as the CPU does where that has fused multiply-adds, to the last
            entry; it needs the module that is built where nvcc is found.

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or not where they must be.
        BackendError: "cuda" was asked for and cannot run here.
    """
    if backend == "cuda":
        return _shares(*entries_cuda.sign_counts(factors))
    given = _deltas(factors)
    segments = given.segments.copy()
    # To [1, 2) or (-2, -1], where no product is rounded to 0: the kernel need not multiply then.
    segments["scale"] = 2 * np.frexp(segments["scale"])[0]
    deltas = Deltas(segments, given.d_out, given.d_in, given.owner)
    pairs = entry_pairs(deltas, magnitudes=False, threads=threads, backend=backend)
    return _shares(pairs.conflicts, pairs.both)


def _shares(conflicts: np.ndarray, both: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        share = np.triu(conflicts / both, 1)
    return share + share.T


def _deltas(factors: Factors) -> Deltas:
    deltas = factors if isinstance(factors, Deltas) else Deltas.of(factors)
    if not len(deltas):
        raise InputError("expected at least one delta", key="factors")
    return deltas


def _reference(backend: str) -> bool:
    if backend not in ("cpu", "reference"):
        raise InputError(f"expected 'cpu' or 'reference', got {backend!r}", key="backend")
    return backend == "reference"


def _order(deltas: Deltas, sample: Sample | None) -> tuple[np.ndarray, np.ndarray, int]:
    if sample is None:
        return _NONE, _NONE, 0
    if len(sample.rows) != deltas.d_out or len(sample.columns) != deltas.d_in:
        raise InputError(f"is not one of {deltas.d_out} x {deltas.d_in}", key="sample")
    return sample.rows, sample.columns, sample.tiles


def _run(name: str, deltas: Deltas, threads: int | None, *arguments: Any) -> None:
    status, which = getattr(_native.core(), name)(
        deltas.segments, deltas.d_out, deltas.d_in, *arguments,
        _env.threads_or_default(threads), _native.isa(),
    )  # fmt: skip
    if status == 3:
        raise InputError("the deltas overflow float32", key="factors")
    if status:
        raise NotFinite(status, which, "factors")
