"""TIES and DARE on small float64 matrices: tasks in a shared basis, not whole deltas.

A basis is unique up to the sign of its vectors, so that nothing here may depend on the sign of a
row or column that flips in all tasks at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergeprobe_fast.merging.methods import MergeRequest
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import stream

# A sum this small beside its terms has cancelled: what sign is left is that of rounding.
_CANCELLED = 1e-6
_CHUNK = 1 << 14  # entries at a time, so that what they become stays in cache


def merged_blocks(
    request: MergeRequest, m: ModuleFactors, left: np.ndarray, right: np.ndarray,
    parts: Sequence[slice],
) -> np.ndarray:  # fmt: skip
    """The blocks ``left[:, part] @ right[part]`` of the members, pruned and merged, on a device."""
    from mergeprobe_fast.kernels import disjoint

    rule, seed = request.arguments["rule"], request.arguments["seed"]
    keep: list[tuple] = []
    for share, name in zip(request.value_of("density", m), request.members(m), strict=True):
        if rule == "ties":
            keep.append(("largest", float(share)))
        elif rule == "dare_ties":
            keep.append(("chance", float(share), seed, stream(m.module.name, name)))
        else:
            keep.append(("all",))
    weights = request.weights_of(m)
    return disjoint.merge_blocks(request.device, left, right, parts, keep, weights)


def pruned(
    tasks: Sequence[np.ndarray], request: MergeRequest, m: ModuleFactors
) -> list[np.ndarray]:
    """The tasks' entries that the arguments ``rule`` and ``density`` keep, the others 0.

    "ties" keeps the int(density * size) largest by magnitude of each task, and all that equal the
    smallest of them; "dare_ties" keeps each with probability density, divided by it, by a hash of
    (``seed``, module and adapter name, position). Any other rule keeps all.
    """
    rule, density = request.arguments["rule"], request.value_of("density", m)
    if rule == "ties":
        return [_largest(x, float(share)) for x, share in zip(tasks, density, strict=True)]
    if rule == "dare_ties":
        seed, names = request.arguments["seed"], request.members(m)
        return [
            _by_chance(x, float(share), seed, stream(m.module.name, name))
            for x, share, name in zip(tasks, density, names, strict=True)
        ]
    return list(tasks)


def disjoint_mean(tasks: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Entries of the elected sign, weighted, over their number (Yadav et al. 2023).

    The sign is that of the unweighted sum, as in PEFT and KnOTS. A sum of zero elects none and the
    entry is 0 (PEFT elects +, KnOTS the majority of all entries, which a flipped basis would show).
    """
    merged = np.empty_like(tasks[0])
    step = max(1, _CHUNK // max(1, merged.shape[1]))
    for first in range(0, len(merged), step):
        rows = slice(first, first + step)
        merged[rows] = _elected([x[rows] for x in tasks], weights)
    return merged


def _elected(tasks: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    total, size = np.zeros_like(tasks[0]), np.zeros_like(tasks[0])
    for x in tasks:
        total += x
        size += np.abs(x)
    sign = np.sign(total) * (np.abs(total) > _CANCELLED * size)
    merged, count = np.zeros_like(total), np.zeros_like(total)
    for x, weight in zip(tasks, weights, strict=True):
        agree = x * sign > 0
        merged += agree * (weight * x)
        count += agree
    return merged / np.maximum(count, 1.0)


def _largest(x: np.ndarray, density: float) -> np.ndarray:
    count = int(density * x.size)
    if count >= x.size:
        return x
    if count == 0:
        return np.zeros_like(x)
    size = np.abs(x)
    threshold = np.partition(size, x.size - count, axis=None)[x.size - count]
    return np.where(size >= threshold, x, 0.0)


def _by_chance(x: np.ndarray, density: float, seed: int, stream: int) -> np.ndarray:
    if density == 0:
        return np.zeros_like(x)
    position = np.arange(x.size, dtype=np.uint64).reshape(x.shape)
    kept = counter_hash(seed, stream, position) < np.floor(density * 2.0**32)
    return np.where(kept, x / density, 0.0)
