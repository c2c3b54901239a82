"""Sequences in several threads, with the same bits for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


def in_order(
    pool: Executor, one: Callable[[int], Any], count: int, take: Callable[[Any], None]
) -> None:
    """Run ``one(0)``, ``one(1)``, ... several at a time; ``take`` gets the results in this order.

    What is summed there is summed in one order, whatever the number of workers.
    """
    running = [pool.submit(one, at) for at in range(count)]
    try:
        for at in range(count):
            take(running[at].result())
            running[at] = None  # its result is not kept
    finally:
        for future in running:
            if future is not None:
                future.cancel()


@contextmanager
def one_thread_each(count: int) -> Iterator[Executor]:
    """So many workers, in each of which torch runs on one thread.

    How torch splits a product among threads changes its last bits. A sequence on one thread has
    the same bits however many go at a time, and short ones are faster so.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
