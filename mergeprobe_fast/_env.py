"""Every environment variable the package reads, and nothing else.

=======================  =========================================================================
``MERGEPROBE_ISA``       pins the CPU instruction set: ``avx512``, ``avx2`` or ``baseline``
``MERGEPROBE_THREADS``   threads for all native code; default: the cores this process may use
=======================  =========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from mergeprobe_fast.errors import InputError

MAX_THREADS = 1024

_lock = Lock()
_limits: list[Any] = []  # of threadpoolctl, oldest first
_inside: list[None] = []  # one entry per block that runs


def pinned_isa() -> str:
    """The instruction set asked for, or "" for the best one this CPU has."""
    return os.environ.get("MERGEPROBE_ISA", "")


def default_threads() -> int:
    """Threads to use when a caller does not say."""
    text = os.environ.get("MERGEPROBE_THREADS", "")
    if text:
        if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_THREADS:
            raise InputError(f"MERGEPROBE_THREADS must be a positive number, got {text!r}")
        return int(text)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1


def threads_or_default(threads: int | None) -> int:
    """``threads`` checked, or the default for None."""
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads must be a positive integer, got {threads!r}")
    if threads > MAX_THREADS:
        raise InputError(f"threads must be at most {MAX_THREADS}, got {threads}")
    return threads


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """The BLAS of numpy and scipy, as far as loaded, runs on one thread here; also a decorator.

    Modules are worked on side by side instead. The pools of two BLAS libraries would wait for each
    other's cores, small products gain nothing, and last bits would depend on the pool's size.
    """
    from threadpoolctl import threadpool_limits

    # The number of threads is the process's: of calls that overlap, the last one gives it back.
    with _lock:
        _limits.append(threadpool_limits(1, user_api="blas"))
        _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            while _limits and not _inside:
                _limits.pop().restore_original_limits()
