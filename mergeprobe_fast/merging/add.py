"""Adding a delta to a tensor of a checkpoint, a block at a time, and what the rounding costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.checkpoint import CheckpointCopy
from mergeprobe_fast.io.dtypes import STORAGE, from_float, itemsize, to_f32
from mergeprobe_fast.merging.methods import DenseModule, MergedModule
from mergeprobe_fast.merging.targets import Target

_BLOCK = 1 << 17  # entries added at a time by one thread: arrays of 1 MiB stay in its cache
_STRIP = 1 << 21  # entries of a dense delta asked for at a time
_WIDE_STRIP = 1 << 24  # and of one that is added by columns, where few rows mean tiny reads
_THERE = 1 << 22  # entries added at a time on a device: 64 bytes each, and copies of 8 MiB and more
_STRIP_THERE = 1 << 24
_ADDING_THERE = 4  # threads: one reads, one writes, two wait for copies


@dataclass(frozen=True)
class Added:
    """Sums over the entries of what was added, in float64."""

    delta: float = 0.0  # delta^2
    error: float = 0.0  # (written - (base + delta))^2
    along: float = 0.0  # (written - base) * delta
    touched: int = 0  # entries with delta != 0
    unchanged: int = 0  # of these, those where written == base

    def __add__(self, other: Added) -> Added:
        return Added(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def norm(self) -> float:
        """||delta||_F."""
        return math.sqrt(self.delta)

    def numbers(self) -> dict[str, float]:
        """What a report says of it; :func:`mergeprobe_fast.merging.into.merge_into` explains."""
        return {
            "norm": self.norm,
            "rounding_error_relative": math.sqrt(self.error / self.delta) if self.delta else 0.0,
            "delta_kept": self.along / self.delta if self.delta else 1.0,
            "unchanged": self.unchanged / self.touched if self.touched else 0.0,
        }


class Adder:
    """Context manager: adds deltas to the tensors of a copy, ``threads`` blocks at once.

    Blocks are cut by the shape of a tensor alone and their sums are added in order: bytes and
    numbers do not depend on the number of threads. On a device (1 GB of its memory) bytes are the
    CPU's wherever delta is: that of a dense rule, and of a product but for its last place, which
    decides where base + delta lies as near to the middle between two weights.
    """

    def __init__(self, copy: CheckpointCopy, threads: int, device: Any = None) -> None:
        self._copy, self._device = copy, device
        here = device is None
        self._pool = ThreadPoolExecutor(threads if here else min(threads, _ADDING_THERE))
        self._block, self._strip = (_BLOCK, _STRIP) if here else (_THERE, _STRIP_THERE)

    def __enter__(self) -> Adder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, target: Target, update: MergedModule | DenseModule) -> Added:
        """Write base + delta for a whole tensor.

        Raises:
            InputError: base or delta is not finite, or their sum is not in the tensor's dtype.
        """
        if isinstance(update, MergedModule):
            parts = self._add_product(target, update)
        elif target.transposed:
            parts = self._add_columns(target, update)
        else:
            parts = self._add_rows(target, update)
        return sum(parts, Added())

    def leave(self, target: Target) -> None:
        """Write a tensor as it is in the base."""
        ref, step = target.tensor, _BLOCK * itemsize(target.tensor.dtype)
        for start in range(0, ref.nbytes, step):
            nbytes = min(step, ref.nbytes - start)
            self._copy.write(ref, start, self._copy.read(ref, start, nbytes))

    def _add_product(self, target: Target, m: MergedModule) -> Iterable[Added]:
        # In float64, the product errs less than the float32 factors do.
        pair = (m.a.T, m.b.T) if target.transposed else (m.b, m.a)
        rows = self._product(*pair)

        def block(first: int, last: int) -> Added:
            return self._add_block(target, first, rows(first, last))

        return self._each(block, _cuts(target.rows, self._block // target.cols))

    def _product(self, left: np.ndarray, right: np.ndarray) -> Callable[[int, int], Any]:
        """Rows of ``left @ right`` in float64, where they are added."""
        if self._device is not None:
            from mergeprobe_fast.kernels.base_weights import Product

            return Product(self._device, left, right).rows
        wide_left, wide_right = (np.ascontiguousarray(f, np.float64) for f in (left, right))
        return lambda first, last: wide_left[first:last] @ wide_right

    def _add_rows(self, target: Target, m: DenseModule) -> Iterator[Added]:
        rows = m.rows if self._device is None or m.there is None else m.there
        for top, end in _cuts(target.rows, self._strip // target.cols):
            strip = rows(top, end)

            def block(first: int, last: int, strip: Any = strip, top: int = top) -> Added:
                return self._add_block(target, top + first, strip[first:last])

            yield from self._each(block, _cuts(end - top, self._block // target.cols))

    def _add_columns(self, target: Target, m: DenseModule) -> Iterator[Added]:
        rows = m.rows if self._device is None or m.there is None else m.there
        for left, right in _cuts(target.cols, _WIDE_STRIP // target.rows):
            strip = rows(left, right).T

            def block(first: int, last: int, strip: Any = strip, left: int = left) -> Added:
                return self._add_part(target, first, left, strip[first:last])

            yield from self._each(block, _cuts(target.rows, self._block // (right - left)))

    def _each(
        self, block: Callable[[int, int], Added], cuts: Iterator[tuple[int, int]]
    ) -> Iterator[Added]:
        # What is added was made on this thread's stream: on theirs it might not be there yet.
        joined = nullcontext if self._device is None else self._device.joined()

        def add(cut: tuple[int, int]) -> Added:
            with joined():
                return block(*cut)

        return self._pool.map(add, cuts)

    def _add_block(self, target: Target, first: int, delta: Any) -> Added:
        """Whole rows of the tensor, from row ``first``."""
        ref = target.tensor
        start = first * target.cols * itemsize(ref.dtype)
        stored = self._copy.read(ref, start, math.prod(delta.shape) * itemsize(ref.dtype))
        written, added = self._sum(target, stored, delta)
        self._copy.write(ref, start, written)
        return added

    def _sum(self, target: Target, stored: bytes, delta: Any) -> tuple[np.ndarray, Added]:
        """round(base + delta), of the shape of delta, and the sums over its entries."""
        dtype = target.tensor.dtype
        raw = np.frombuffer(stored, STORAGE[dtype]).reshape(tuple(delta.shape))
        if self._device is None:
            return _rounded_sum(target, raw, delta)
        from mergeprobe_fast.kernels import base_weights

        written, sums = base_weights.add(self._device, stored, dtype, delta)
        if written is None:
            raise _refusal(target, to_f32(raw, dtype), base_weights.values(self._device, delta))
        return written.view(raw.dtype).reshape(raw.shape), Added(*sums)

    def _add_part(self, target: Target, first: int, left: int, delta: Any) -> Added:
        """Some columns of rows of the tensor, from (``first``, ``left``)."""
        ref, size = target.tensor, itemsize(target.tensor.dtype)
        starts = [((first + i) * target.cols + left) * size for i in range(len(delta))]
        stored = b"".join(self._copy.read(ref, at, delta.shape[1] * size) for at in starts)
        written, added = self._sum(target, stored, delta)
        for at, row in zip(starts, written, strict=True):
            self._copy.write(ref, at, row)
        return added


def _cuts(total: int, step: int) -> Iterator[tuple[int, int]]:
    step = max(1, step)
    return ((first, min(first + step, total)) for first in range(0, total, step))


def _rounded_sum(target: Target, raw: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, Added]:
    """round(base + delta) in the storage of the tensor, and the sums over its entries."""
    ref = target.tensor
    base = to_f32(raw, ref.dtype)
    delta = np.asarray(delta, np.float64)
    with np.errstate(invalid="ignore"):  # of infinities, refused below
        exact = base + delta
    written = from_float(exact, ref.dtype)
    touched = delta != 0
    np.copyto(written, raw, where=~touched)  # -0 + 0 is 0: such a weight stays as it is
    wide = to_f32(written, ref.dtype)
    if not np.isfinite(wide).all():
        raise _refusal(target, base, delta)
    same = np.count_nonzero(touched & (wide == base))
    error = np.subtract(wide, exact, out=exact)
    change = np.subtract(wide, base, dtype=np.float64)
    added = Added(
        _dot(delta, delta), _dot(error, error), _dot(change, delta),
        int(np.count_nonzero(touched)), int(same),
    )  # fmt: skip
    return written, added


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    # Not BLAS, whose sums depend on its threads.
    return float(np.einsum("ij,ij->", x, y))


def _refusal(target: Target, base: np.ndarray, delta: np.ndarray) -> InputError:
    ref = target.tensor
    if not np.isfinite(base).all():
        return InputError("holds NaN or infinite values", path=ref.file.path, key=ref.key)
    if not np.isfinite(delta).all():
        return InputError("the merged update overflows float32", key=target.module.name)
    reason = f"base + update of {target.module.name} overflows {ref.dtype}"
    return InputError(reason, path=ref.file.path, key=ref.key)
