"""TIES and DARE on blocks of float64 entries on a device; `merging.disjoint` says what and why.

A block is a task in a shared basis: k x d numbers that are formed, pruned, and merged here.
Memory: 8 bytes of every entry of all blocks, and 6 blocks more.
"""

import math

import torch

from ..ops.tiles_reference import hash_key
from .products import download, upload

_CANCELLED = 1e-6  # a sum this small beside its terms has cancelled
_HALF = 0xFFFFFFFF


def merge_blocks(device, left, right, parts, keep, weights):
    """The merged block, float64 (k, d), of blocks ``left[:, part] @ right[part]``.

    left: (k, K) and right (K, d), numpy. keep: of each block ("all",), ("largest", density) or
    ("chance", density, seed, stream).
    """
    left, right = upload(device, left).double(), upload(device, right).double()
    blocks = []
    for part, (how, *given) in zip(parts, keep, strict=True):
        block = left[:, part] @ right[part]
        blocks.append(_KEEP[how](block, *given))
    total, size = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
    for x in blocks:
        total += x
        size += x.abs()
    sign = total.sign() * (total.abs() > _CANCELLED * size)
    merged, count = total.zero_(), size.zero_()
    for x, weight in zip(blocks, weights, strict=True):
        agree = x * sign > 0
        merged += torch.where(agree, float(weight) * x, 0.0)
        count += agree
    return download(device, merged / count.clamp(min=1.0))


def _largest(x, density):
    """int(density * size) largest by magnitude, and all that equal the smallest of them."""
    count = int(density * x.numel())
    if count >= x.numel():
        return x
    if count == 0:
        return torch.zeros_like(x)
    size = x.abs()
    threshold = size.view(-1).kthvalue(x.numel() - count + 1).values
    return torch.where(size >= threshold, x, 0.0)


def _by_chance(x, density, seed, stream):
    if density == 0:
        return torch.zeros_like(x)
    position = torch.arange(x.numel(), device=x.device).view(x.shape)
    kept = hashes(seed, stream, position) < math.floor(density * 2.0**32)
    return torch.where(kept, x / density, 0.0)


def hashes(seed, stream, position):
    """`ops.tiles_reference.counter_hash` of positions below 2^32, int64: 32 bits in 64."""
    key = hash_key(seed, stream, 0)
    x = position ^ (key & _HALF)
    x = x ^ (x >> 17)
    x = (x * 0xED5AD4BB) & _HALF
    x = x ^ (x >> 11)
    x = (x * 0xAC4C1B51) & _HALF
    x = (x + (key >> 32)) & _HALF
    x = x ^ (x >> 15)
    x = (x * 0x31848BAB) & _HALF
    return x ^ (x >> 14)


_KEEP = {"all": lambda x: x, "largest": _largest, "chance": _by_chance}
