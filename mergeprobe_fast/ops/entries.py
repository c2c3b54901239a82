"""P2 that ends in numbers: statistics of the entries of deltas, and of pairs of deltas.

Entries are the float32 numbers that merges see. Counts are exact integers; sums are float32 over at
most 384 terms in a row, float64 from there on, and no difference of two sums is taken. On one
instruction set, results do not depend on the number of threads, to the bit. A CUDA device has the
same entries, thresholds and counts as an instruction set with fused multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import BackendError, InputError
from mergeprobe_fast.ops import entries_cuda, entries_device, entries_reference
from mergeprobe_fast.ops.canonical import _on_cuda
from mergeprobe_fast.ops.tiles import NotFinite
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import Deltas

Factors = Deltas | list[tuple[Any, Any, float]]
Backend = Literal["auto", "cpu", "triton", "reference"]
SignBackend = Literal["auto", "cpu", "triton", "reference", "cuda"]
_BACKENDS = ("auto", "cpu", "triton", "reference")

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

    def check(self, d_out: int, d_in: int) -> None:
        """InputError: the sample is one of another matrix."""
        if len(self.rows) != d_out or len(self.columns) != d_in:
            raise InputError(f"is not one of {d_out} x {d_in}", key="sample")


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
    factors: Factors, *, threads: int | None = None, backend: Backend = "auto"
) -> np.ndarray:
    """(n,) float64: sqrt(sum over units k of |s b_k|^2 |a_k|^2) of each delta.

    What its Frobenius norm would be if its rank-one units were orthogonal. ``factors`` and
    ``backend``: as for :func:`entry_moments`.
    """
    backend = _backend(factors, backend)
    if backend == "triton":
        return entries_device.entry_sizes(factors)
    deltas = _deltas(factors)
    if backend == "reference":
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
    backend: Backend = "auto",
) -> Moments:
    """Norms, kurtosis, zeros and the largest entries of each delta: see :class:`Moments`.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, numpy or torch, or
            :class:`Deltas`. Fourth powers are float32: scale deltas so that entries are about 1
            (:func:`entry_sizes`).
        density: share of the entries that count as top.
        sample: look at these entries; default all. The threshold is then that of the sample.
        backend: "auto" takes "triton" for tensors (or deltas) on a CUDA device, else "cpu"; a name
            never falls back.

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or that overflow.
        BackendError: "triton" without torch, triton or a CUDA device.
    """
    backend = _backend(factors, backend)
    if not 0 <= density <= 1:
        raise InputError(f"expected 0 to 1, got {density!r}", key="density")
    if backend == "triton":
        return entries_device.entry_moments(factors, float(density), sample)
    deltas = _deltas(factors)
    if backend == "reference":
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
    backend: Backend = "auto",
) -> Pairs:
    """Conflicts of signs and what they weigh, of each pair of deltas: see :class:`Pairs`.

    Args:
        factors, backend: as for :func:`entry_moments`.
        thresholds: (n,) of |x|, for ``top``; None leaves it 0.
        units: (n,) integers: ``cancelled`` compares 2^units[i] |x_i| with 2^units[j] |x_j|.
        magnitudes: False leaves the sums 0 and is many times as fast: signs are kept as bits.
        split: if positive, only pairs i < split <= j.
        sample: look at these entries; default all.

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or that overflow.
        BackendError: as for :func:`entry_moments`.
    """
    backend = _backend(factors, backend)
    given: Any = entries_device.factors_of if backend == "triton" else _deltas
    deltas = given(factors)
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
    if backend == "triton":
        return entries_device.entry_pairs(deltas, thresholds, units, magnitudes, split, sample)
    if backend == "reference":
        return entries_reference.entry_pairs(deltas, thresholds, units, magnitudes, split, sample)
    counts = np.empty((n, n, COUNTS), np.int64)
    sums = np.empty((n, n, SUMS)) if magnitudes else None
    arguments = (*_order(deltas, sample), split, thresholds, units, counts, sums, True)
    _run("entry_pairs", deltas, threads, *arguments)
    if sums is None:
        sums = np.zeros((n, n, SUMS))
    return Pairs(*np.moveaxis(counts, 2, 0), *np.moveaxis(sums, 2, 0))


def sign_conflicts(
    factors: Factors, *, threads: int | None = None, backend: SignBackend = "auto"
) -> np.ndarray:
    """(n, n) float64, symmetric: the share of entries with opposite signs, of those not 0 in both.

    NaN where there are none; 0 on the diagonal. The sizes of the scales do not matter.

    Args:
        factors: as for :func:`entry_moments`; torch tensors on one CUDA device for "cuda".
        backend: "cuda" and "triton" count as the CPU does where that has fused multiply-adds, to
            the last entry; "cuda" needs the module that is built where nvcc is found. "auto" takes
            it for tensors on a CUDA device where it is there, else "triton".

    Raises:
        InputError: factors that are not finite (:class:`NotFinite`), or not where they must be.
        BackendError: "cuda" or "triton" was asked for and cannot run here.
    """
    if backend == "cuda" or (backend == "auto" and _on_cuda(factors) and _has_cuda()):
        return _shares(*entries_cuda.sign_counts(factors))
    if _backend(factors, backend) == "triton":
        on_device = entries_device.factors_of(factors)
        signs = replace(on_device, segments=_near_one(on_device.segments))
        pairs = entries_device.entry_pairs(signs, None, np.zeros(len(signs)), False, 0, None)
        return _shares(pairs.conflicts, pairs.both)
    given = _deltas(factors)
    deltas = Deltas(_near_one(given.segments), given.d_out, given.d_in, given.owner)
    pairs = entry_pairs(deltas, magnitudes=False, threads=threads, backend=backend)
    return _shares(pairs.conflicts, pairs.both)


def _near_one(segments: np.ndarray) -> np.ndarray:
    """Scales to [1, 2) or (-2, -1], where no product is rounded to 0: the CPU's kernel need not
    multiply then."""
    segments = segments.copy()
    segments["scale"] = 2 * np.frexp(segments["scale"])[0]
    return segments


def _shares(conflicts: np.ndarray, both: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        share = np.triu(conflicts / both, 1)
    return share + share.T


def _deltas(factors: Factors) -> Deltas:
    deltas = factors if isinstance(factors, Deltas) else Deltas.of(factors)
    if not len(deltas):
        raise InputError("expected at least one delta", key="factors")
    return deltas


def _backend(factors: Any, backend: str) -> str:
    """What "auto" stands for."""
    if backend not in _BACKENDS:
        known = ", ".join(map(repr, _BACKENDS))
        raise InputError(f"expected one of {known}, got {backend!r}", key="backend")
    if backend != "auto":
        return backend
    return "triton" if getattr(factors, "there", None) is not None or _on_cuda(factors) else "cpu"


def _has_cuda() -> bool:
    try:
        _native.cuda()
    except BackendError:
        return False
    return True


def _order(deltas: Deltas, sample: Sample | None) -> tuple[np.ndarray, np.ndarray, int]:
    if sample is None:
        return _NONE, _NONE, 0
    sample.check(deltas.d_out, deltas.d_in)
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
