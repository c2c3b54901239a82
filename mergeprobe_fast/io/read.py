"""Reads weights into memory the caller owns: many ranges of many files in one native call."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import FactorRef, FileStamp
from mergeprobe_fast.io.dtypes import STORAGE


def read_into(
    files: Sequence[FileStamp],
    file_index: np.ndarray,
    offsets: np.ndarray,
    nbytes: np.ndarray,
    targets: np.ndarray,
    *,
    threads: int | None = None,
) -> None:
    """Read ``nbytes[r]`` bytes at ``offsets[r]`` of file ``file_index[r]`` to ``targets[r]``.

    ``targets`` are addresses of memory that must stay alive and be large enough. Plain reads, not
    a mapping: a file that changed since its header was read, or that shrinks meanwhile, is an
    error, not a crash.

    Raises:
        InputError: naming the file and what happened to it.
    """
    order = np.lexsort((offsets, file_index))
    used, counts = np.unique(file_index, return_counts=True)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    stamps = [files[i] for i in used]
    failure = _native.core().read_files(
        [os.fsencode(s.path) for s in stamps],
        np.array(
            [(s.size, s.mtime_ns, s.ctime_ns, s.inode) for s in stamps], np.uint64
        ).astype(np.int64),
        bounds,
        np.ascontiguousarray(offsets[order], np.int64),
        np.ascontiguousarray(nbytes[order], np.int64),
        np.ascontiguousarray(targets[order], np.int64),
        _env.threads_or_default(threads),
    )
    if failure is not None:
        index, reason = failure
        raise InputError(reason, path=stamps[index].path)


def read_tensor(ref: FactorRef) -> np.ndarray:
    """One tensor as it is stored, BF16 as its uint16 bits; errors as of :func:`read_into`."""
    out = np.empty(ref.shape, STORAGE[ref.dtype])
    read_into(
        [ref.file], np.zeros(1, np.int64), np.array([ref.offset]), np.array([ref.nbytes]),
        np.array([out.ctypes.data]), threads=1,
    )  # fmt: skip
    return out
