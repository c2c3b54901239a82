"""What passes over a zoo cost, in multiply-adds of the block Gram."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.zoo import Zoo

# Time of r^2 (d_out + d_in) of a canonical form, reading included, over one multiply-add of the
# block Gram: ratio of CPU times, r = 8, d = 4096 + 1024, two cores.
CANONICAL_PACE = 20.0


def sizes(zoo: Zoo) -> np.ndarray:
    """d_out + d_in of every module."""
    return np.array([m.d_out + m.d_in for m in zoo.modules], np.float64)


def ranks(zoo: Zoo) -> np.ndarray:
    """Sum of all adapters' ranks in every module."""
    entries = zoo.table.entries
    return np.bincount(entries["module"], entries["rank"], len(zoo.modules))


def gram_work(zoo: Zoo) -> float:
    """Multiply-adds of the block Gram of all pairs: both tiles of each, half by symmetry."""
    return float((ranks(zoo) ** 2 / 2 * sizes(zoo)).sum())


def canonical_work(zoo: Zoo) -> float:
    """Reading all factors and bringing them to canonical form, in those of the block Gram."""
    entries = zoo.table.entries
    square = entries["rank"].astype(np.float64) ** 2
    return CANONICAL_PACE * float((square * sizes(zoo)[entries["module"]]).sum())


def factor_work(zoo: Zoo) -> float:
    """Numbers in all factors."""
    return float((ranks(zoo) * sizes(zoo)).sum())
