"""P2, delta tiles: elementwise merges of deltas that are never formed as a whole.

Each entry of each delta is rebuilt in float32 in a tile that stays in cache, by one fixed chain of
operations whatever the tile, so that a threshold found in one pass holds exactly in the next. On
one instruction set, results do not depend on the number of threads, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops import tiles_device, tiles_reference
from mergeprobe_fast.ops._tables import SEGMENT
from mergeprobe_fast.ops.canonical import STATUS, matrix_record
from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule, per_adapter

Factors = Deltas | list[tuple[Any, Any, float]]
Backend = Literal["cpu", "reference"]


class NotFinite(InputError):
    """A factor holds NaN or infinite values: ``segment`` says which delta, ``side`` "B" or "A"."""

    def __init__(self, status: int, segment: int, what: str) -> None:
        super().__init__(STATUS[status], key=f"{what}[{segment}]")
        self.segment, self.side = segment, "BA"[status - 1]


class Norms(NamedTuple):
    """Per adapter, before and after ``keep`` (without ``rescale``); float64 and int64 arrays."""

    l1: np.ndarray  # sum |x|
    l1_kept: np.ndarray
    squares: np.ndarray  # sum x^2
    squares_kept: np.ndarray
    largest: np.ndarray  # max |x|
    largest_kept: np.ndarray
    kept: np.ndarray  # how many entries survive


class Sketch(NamedTuple):
    """A merged delta M seen through X: ``y = M X``, ``z = M^T y`` if asked for, ``||M||_F^2``."""

    y: np.ndarray  # (d_out, l) float32
    z: np.ndarray | None  # (d_in, l) float32
    squares: float


def merge_dense(
    factors: Factors,
    weights: Sequence[float] | np.ndarray,
    rule: ElementwiseRule,
    *,
    rows: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
    fisher: Factors | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> np.ndarray:
    """Rows of the merged delta, float32 (last - first, d_in).

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, numpy or CPU torch, or
            :class:`Deltas`. Ranks may differ and may be 0.
        weights: one per adapter, any sign, used as float32.
        rule: what happens to each entry.
        rows: (first, last), half open; default all. Pieces are equal to the whole, bit for bit.
        out: written and returned; float32 (last - first, d_in) with contiguous rows.
        fisher: for ``combine="fisher"``: one delta per adapter, F_i = scale_i U_i^T V_i.
        backend: "reference" is float64 (rounded to float32), dense and slow.

    Raises:
        InputError: arguments that do not fit, factors that are not finite (:class:`NotFinite`).
    """
    call = _Call(factors, weights, rule, fisher, threads, backend)
    first, last = (0, call.deltas.d_out) if rows is None else rows
    if not 0 <= first <= last <= call.deltas.d_out:
        raise InputError(
            f"expected 0 <= first <= last <= {call.deltas.d_out}, got {first}, {last}", key="rows"
        )
    shape = (last - first, call.deltas.d_in)
    if out is None:
        out = np.empty(shape, np.float32)
    elif (
        not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != shape
        or not out.flags.writeable or (out.size and out.strides[1] != 4) or out.strides[0] % 4
        or (shape[0] > 1 and out.strides[0] < 4 * shape[1])
    ):  # fmt: skip
        raise InputError(f"expected writeable float32 {shape} with contiguous rows", key="out")
    if backend == "reference":
        with np.errstate(over="ignore"):
            out[:] = call.reference()[first:last]
    elif call.deltas.there is not None:
        out[:] = tiles_device.merge_dense(call, first, last)
    else:
        call.merge(first, last, out=out)
    return out


def merge_sketch(
    factors: Factors,
    weights: Sequence[float] | np.ndarray,
    rule: ElementwiseRule,
    x: np.ndarray,
    *,
    transpose: bool = False,
    minus: tuple[np.ndarray, np.ndarray] | None = None,
    fisher: Factors | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> Sketch:
    """``M X``, with ``transpose`` also ``M^T M X``, and ``||M||_F^2``, M the merged delta.

    One pass; M exists a few rows at a time. Sums over d_in are float32 in blocks of 256, those over
    d_out in blocks of 256 rows added in order, the squares are float64.

    Args:
        x: float32 (d_in, l), l >= 0.
        minus: (b (d_out, k), a (k, d_in)), float32: M is the merged delta less ``b @ a``.
        Other arguments are those of :func:`merge_dense`.
    """
    call = _Call(factors, weights, rule, fisher, threads, backend)
    d_out, d_in = call.deltas.d_out, call.deltas.d_in
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 2 or len(x) != d_in:
        raise InputError(f"expected float32 ({d_in}, l)", key="x")
    if minus is not None:
        b, a = minus
        if b.dtype != np.float32 or a.dtype != np.float32:
            raise InputError("expected float32 factors", key="minus")
        if b.shape != (d_out, len(a)) or a.shape != (b.shape[1], d_in):
            raise InputError(f"b {b.shape} and a {a.shape} are not {d_out} x {d_in}", key="minus")
    if backend == "reference":
        merged = call.reference()
        if minus is not None:
            merged = merged - minus[0].astype(np.float64) @ minus[1].astype(np.float64)
        y = merged @ x
        z = (merged.T @ y).astype(np.float32) if transpose else None
        return Sketch(y.astype(np.float32), z, float(np.square(merged).sum()))
    if call.deltas.there is not None:
        return Sketch(*tiles_device.merge_sketch(call, x, transpose, minus))
    width = x.shape[1]
    padded = -(-width // 16) * 16  # whole registers on every instruction set
    if padded != width or not x.flags.c_contiguous:
        x = np.concatenate([x, np.zeros((d_in, padded - width), np.float32)], axis=1)
    y = np.empty((d_out, padded), np.float32)
    z = np.empty((d_in, padded), np.float32) if transpose else None
    squares = call.merge(0, d_out, x=x, y=y, z=z, minus=minus)
    return Sketch(y[:, :width], None if z is None else z[:, :width], squares)


def pruned_norms(
    factors: Factors,
    rule: ElementwiseRule,
    *,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> Norms:
    """What ``rule.keep`` leaves of each delta: see :class:`Norms`. Sums are float64."""
    call = _Call(factors, None, rule, None, threads, backend)
    if backend == "reference":
        return Norms(*tiles_reference.norms(call.deltas, call.adapters, rule))
    if call.deltas.there is not None:
        return tiles_device.pruned_norms(call)
    out = np.empty((7, len(call.deltas)))
    call.run("tiles_norms", out)
    return Norms(*out[:6], out[6].astype(np.int64))


def order_statistics(
    groups: Sequence[Sequence[Deltas]],
    counts: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> list[np.ndarray]:
    """For each group and each of its counts k, the k-th largest ``|x|`` among all its entries.

    A group holds every entry of every delta of its list: one adapter's delta of one module
    (``[deltas[i]]``), or an adapter over all modules. k = 0 gives inf, k >= the number of entries
    gives 0, so that ``|x| >= result`` keeps k entries, or more where several equal the result.

    The float32 entries are the very ones that the merges see. One pass as a rule: a sample
    brackets the k-th largest, entries within the bracket are collected. About 4.5 n / sqrt(S) of n
    entries are, with S the sample's size: 0.6 million (2.4 MB) for n = 2^24, 30 million for 7
    billion; entries that are alike (a zero delta) are counted in further passes, not collected.

    Returns:
        One float32 array per group.

    Raises:
        InputError: negative counts; factors that are not finite, or whose products overflow.
    """
    if len(groups) != len(counts):
        raise InputError(f"expected one list for each of {len(groups)} groups", key="counts")
    wanted = [np.asarray(c, np.int64).reshape(-1) for c in counts]
    if any((c < 0).any() for c in wanted):
        raise InputError("must not be negative", key="counts")
    if _checked_backend(backend) == "reference":
        return tiles_reference.order_statistics(groups, wanted)
    blocks = [d for group in groups for d in group]
    if blocks and all(d.there is not None for d in blocks):
        return tiles_device.order_statistics(groups, wanted)
    threads = _env.threads_or_default(threads)
    segments = np.concatenate([d.segments for d in blocks] or [np.zeros(0, SEGMENT)])
    shapes = np.array([(d.d_out, d.d_in) for d in blocks for _ in range(len(d))], np.int64)
    bounds = np.cumsum([0, *(sum(map(len, group)) for group in groups)], dtype=np.int64)
    count_bounds = np.cumsum([0, *map(len, wanted)], dtype=np.int64)
    out = np.empty(count_bounds[-1], np.float32)
    flat = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
    status, which = _native.core().tiles_order(
        segments, shapes.reshape(-1, 2), bounds, flat, count_bounds, out, threads, _native.isa()
    )
    if status:
        raise _failure(status, which, "segments")
    return np.split(out, count_bounds[1:-1]) if groups else []


def magnitude_thresholds(
    factors: Factors, density: Any, *, threads: int | None = None
) -> np.ndarray:
    """float32 (n,): each delta's threshold for keeping ``int(density * size)`` entries (PEFT).

    ``density`` is one number or one per adapter, 1 or more keeps all. Entries equal to the
    threshold are all kept, where PEFT's ``topk`` keeps an arbitrary choice of them.
    """
    deltas = factors if isinstance(factors, Deltas) else Deltas.of(factors)
    values = per_adapter(density, len(deltas), "density")
    if (values < 0).any():
        raise InputError("must not be negative", key="density")
    groups = [[deltas[i]] for i in range(len(deltas))]
    counts = [[int(min(float(v), 1.0) * deltas.size)] for v in values]
    found = order_statistics(groups, counts, threads=threads)
    return np.concatenate(found) if found else np.zeros(0, np.float32)


class _Call:
    """Checked arguments of one module, and the native calls on them."""

    def __init__(
        self, factors: Factors, weights: Any, rule: ElementwiseRule, fisher: Factors | None,
        threads: int | None, backend: str,
    ) -> None:  # fmt: skip
        _checked_backend(backend)
        self.deltas = factors if isinstance(factors, Deltas) else Deltas.of(factors)
        if not len(self.deltas):
            raise InputError("expected at least one delta", key="factors")
        self.weights = weights
        self.rule, self.threads = rule, _env.threads_or_default(threads)
        self.adapters = rule.adapters(len(self.deltas), weights)
        self.fisher = fisher if fisher is None or isinstance(fisher, Deltas) else Deltas.of(fisher)
        if (self.fisher is None) == (rule.combine == "fisher") and weights is not None:
            raise InputError("goes with combine='fisher', and only with it", key="fisher")
        if self.fisher is not None:
            want = (len(self.deltas), self.deltas.d_out, self.deltas.d_in)
            got = (len(self.fisher), self.fisher.d_out, self.fisher.d_in)
            if got != want:
                raise InputError(
                    f"expected {want[0]} of {want[1]} x {want[2]}, got {got[0]} of "
                    f"{got[1]} x {got[2]}", key="fisher",
                )  # fmt: skip

    def reference(self) -> np.ndarray:
        return tiles_reference.merged(self.deltas, self.adapters, self.rule, self.fisher)

    def merge(
        self, first: int, last: int, *, out: Any = None, x: Any = None, y: Any = None,
        z: Any = None, minus: Any = None,
    ) -> float:  # fmt: skip
        """The merge pass; returns ||M||_F^2 of those rows."""
        record = None
        if minus is not None:
            record = np.zeros(1, SEGMENT)
            record[0]["u"], record[0]["v"] = matrix_record(minus[0].T), matrix_record(minus[1])
            record["rank"], record["scale"] = len(minus[1]), 1.0
        squares = np.zeros(1)
        segments = None if self.fisher is None else self.fisher.segments
        self.run("tiles_merge", segments, record, first, last, out, x, y, z, squares)
        return float(squares[0])

    def run(self, name: str, *arguments: Any) -> None:
        d = self.deltas
        status, which = getattr(_native.core(), name)(
            d.segments, self.adapters, self.rule.record(), d.d_out, d.d_in, *arguments,
            self.threads, _native.isa(),
        )  # fmt: skip
        if status:
            # Fisher factors are numbered after the deltas, what is subtracted comes last.
            what, segment = divmod(which, len(d))
            raise _failure(status, segment, ("factors", "fisher", "minus")[what])


def _failure(status: int, which: int, what: str) -> InputError:
    if status == 3:
        return InputError("the deltas overflow float32", key=what)
    return NotFinite(status, which, what)


def _checked_backend(backend: str) -> str:
    if backend not in ("cpu", "reference"):
        raise InputError(f"expected 'cpu' or 'reference', got {backend!r}", key="backend")
    return backend
