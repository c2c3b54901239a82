"""P2 in numpy, dense and in float64: the definitions, a backend by name.

Entries are float64 products of the factors, not the kernels' float32 ones; chance is the same to
the bit. Every delta of the module is materialised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast.ops._tables import DTYPE_CODE

if TYPE_CHECKING:
    from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule

_STORED = {0: np.float32, 1: np.uint16, 2: np.float16, 3: np.float64}
_MASK = (1 << 64) - 1


def matrix_values(record: np.void, rows: int, columns: int) -> np.ndarray:
    """The float64 values of a MATRIX record, wherever they lie."""
    dtype = np.dtype(_STORED[int(record["dtype"])])
    if rows == 0 or columns == 0:
        return np.zeros((rows, columns))
    steps = [(rows - 1) * int(record["row_stride"]), (columns - 1) * int(record["col_stride"])]
    first, last = sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps)
    address = int(record["data"]) + first * dtype.itemsize
    memory = (ctypes.c_char * ((last - first + 1) * dtype.itemsize)).from_address(address)
    view = np.ndarray(
        (rows, columns), dtype, memory, -first * dtype.itemsize,
        tuple(int(record[s]) * dtype.itemsize for s in ("row_stride", "col_stride")),
    )  # fmt: skip
    if int(record["dtype"]) == DTYPE_CODE["BF16"]:
        return (view.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return view.astype(np.float64)


def dense(deltas: Deltas) -> np.ndarray:
    """(n, d_out, d_in): scale B A of each."""
    out = np.zeros((len(deltas), deltas.d_out, deltas.d_in))
    for delta, s in zip(out, deltas.segments, strict=True):
        u = matrix_values(s["u"], int(s["rank"]), deltas.d_out)
        v = matrix_values(s["v"], int(s["rank"]), deltas.d_in)
        delta[:] = float(s["scale"]) * (u.T @ v)
    return out


def _mix64(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hash_key(seed: int, stream: int, upper: int) -> int:
    """The 64-bit key of all positions that share their upper half."""
    return _mix64(_mix64(_mix64(seed) ^ stream) ^ upper)


def counter_hash(seed: int, stream: int, position: np.ndarray) -> np.ndarray:
    """32 random bits (uint32) for each position, an integer below 2^64 (row * d_in + column).

    The position's upper half, the stream and the seed make a 64-bit key; one half of it goes in
    with the lower half of the position, the other between the second and the third multiplication
    of a finaliser of three rounds (triple32, C. Wellons 2018).
    """
    position = np.asarray(position, np.uint64)
    out = np.empty(position.shape, np.uint32)
    for upper in np.unique(position >> np.uint64(32)):
        at = position >> np.uint64(32) == upper
        key = hash_key(seed, stream, int(upper))
        x = position[at].astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
        x ^= x >> np.uint32(17)
        x *= np.uint32(0xED5AD4BB)
        x ^= x >> np.uint32(11)
        x *= np.uint32(0xAC4C1B51)
        x += np.uint32(key >> 32)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x31848BAB)
        x ^= x >> np.uint32(14)
        out[at] = x
    return out


def _chances(x: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """DELLA's probability of each entry of a delta, from its rank within its row."""
    d_in = x.shape[1]
    ranks = np.argsort(np.argsort(np.abs(x), axis=1, kind="stable"), axis=1, kind="stable")
    norm = ranks / (d_in - 1) if d_in > 1 else np.full(x.shape, 0.5)
    return (density - epsilon) + (2 * epsilon) * norm


def kept(x: np.ndarray, adapters: np.ndarray, rule: ElementwiseRule) -> np.ndarray:
    """Which entries of each delta of x (n, d_out, d_in) survive."""
    masks = np.ones(x.shape, bool)
    position = np.arange(x[0].size, dtype=np.uint64).reshape(x[0].shape)
    for mask, delta, a in zip(masks, x, adapters, strict=True):
        if rule.keep == "magnitude":
            size = np.abs(delta)
            mask[:] = (size >= a["low"]) & (size <= a["high"])
        elif rule.keep in ("random", "della"):
            chance = float(a["density"])
            if rule.keep == "della":
                chance = _chances(delta, chance, rule.epsilon)
            limit = np.floor(np.multiply(chance, 2.0**32))
            mask[:] = counter_hash(int(rule.seed), int(a["stream"]), position) < limit
    return masks


def combine(
    x: np.ndarray, adapters: np.ndarray, rule: ElementwiseRule, fisher: np.ndarray | None = None
) -> np.ndarray:
    """The merged delta from what survived, x (n, d_out, d_in)."""
    w = adapters["weight"].astype(x.dtype)[:, None, None]
    if rule.combine == "fisher":
        f = fisher + rule.floor
        above, below = (w * f * x).sum(0), (w * f).sum(0)
        return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    agree = np.ones(x.shape, bool)
    if rule.combine == "ties":
        e = w * x if rule.elect_weighted else x
        total = (np.sign(e) if rule.elect == "frequency" else e).sum(0)
        sign = np.where(total == 0, rule.zero_sign, np.sign(total))
        agree = (np.sign(e) == sign) & (e != 0)
    merged = np.where(agree, w * x, 0).sum(0)
    if rule.divide == "count":
        return merged / np.maximum(agree.sum(0), 1)
    if rule.divide == "weights":
        divisor = np.where(agree, w, 0).sum(0)
        return merged / np.where(np.abs(divisor) < 1e-8, 1, divisor)
    return merged


def merged(
    deltas: Deltas, adapters: np.ndarray, rule: ElementwiseRule, fisher: Deltas | None = None
) -> np.ndarray:
    """The merged delta, float64."""
    x = dense(deltas)
    x = np.where(kept(x, adapters, rule), x * adapters["rescale"][:, None, None], 0)
    return combine(x, adapters, rule, None if fisher is None else dense(fisher))


def norms(deltas: Deltas, adapters: np.ndarray, rule: ElementwiseRule) -> list[np.ndarray]:
    """The fields of :class:`mergeprobe_fast.ops.tiles.Norms`."""
    size = np.abs(dense(deltas))
    mask = kept(size, adapters, rule)
    rest, axes = size * mask, (1, 2)
    return [
        size.sum(axes), rest.sum(axes), (size**2).sum(axes), (rest**2).sum(axes),
        size.max(axes), rest.max(axes), mask.sum(axes),
    ]  # fmt: skip


def order_statistics(
    groups: Sequence[Sequence[Deltas]], counts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """See :func:`mergeprobe_fast.ops.order_statistics`; rounded to float32."""
    found = []
    for group, ks in zip(groups, counts, strict=True):
        parts = [np.abs(dense(d)).ravel() for d in group]
        x = np.sort(np.concatenate(parts or [np.zeros(0)]))[::-1]
        values = [np.inf if k == 0 else 0.0 if k >= x.size else x[k - 1] for k in ks]
        found.append(np.array(values, np.float32))
    return found
