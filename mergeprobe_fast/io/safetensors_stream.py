"""A safetensors file written piece by piece, for tensors that never fit in memory together."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np

from ..errors import InputError
from . import safetensors
from .dtypes import STORAGE


class StreamWriter:
    """Context manager: a safetensors file whose tensors arrive in pieces and in any order.

    ``declared`` maps each key to (dtype name, shape). The file has its header and its final size at
    once, and in the end the bytes that ``safetensors.write`` gives. Leaving the block without an
    exception raises ``InputError`` when a tensor is incomplete. Write inside an ``AtomicFolder``:
    before the end the file is readable, but wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        declared: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._declared = {
            key: (dtype, [int(n) for n in shape]) for key, (dtype, shape) in declared.items()
        }
        for key, (dtype, _) in self._declared.items():
            if dtype not in STORAGE:
                raise InputError(f"dtype {dtype!r} cannot be streamed", path=path, key=key)
        text, starts, total = safetensors.plan(self._declared, metadata, path)
        self._start = {key: len(text) + start for key, start in starts.items()}
        self._left = {
            key: math.prod(shape) * STORAGE[dtype].itemsize
            for key, (dtype, shape) in self._declared.items()
        }
        self._file = open(path, "wb")
        try:
            self._file.write(text)
            self._file.truncate(len(text) + total)
        except BaseException:
            self._file.close()
            raise

    def write(self, key: str, rows: np.ndarray, first: int = 0) -> None:
        """Write rows ``first``, ``first + 1``, ... of a tensor, each of them once.

        ``rows`` has the storage of the dtype (BF16 as uint16 bits) and the shape of the tensor but
        for the number of rows. Raises ``InputError`` for what is no part of the tensor.
        """
        dtype, shape = self._declared[key]
        fits = (
            rows.dtype == STORAGE[dtype]
            and rows.ndim == len(shape) > 0
            and list(rows.shape[1:]) == shape[1:]
            and 0 <= first <= shape[0] - rows.shape[0]
            and rows.nbytes <= self._left[key]
        )
        if not fits:
            reason = f"{rows.dtype} {rows.shape} at row {first} is no part of {dtype} {shape}"
            raise InputError(reason, path=self.path, key=key)
        stride = math.prod(shape[1:]) * rows.dtype.itemsize
        self._file.seek(self._start[key] + first * stride)
        self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        self._left[key] -= rows.nbytes

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        missing = [key for key, left in self._left.items() if left]
        if kind is None and missing:
            reason = f"{self._left[missing[0]]} bytes were never written"
            raise InputError(reason, path=self.path, key=missing[0])
