"""Blocks of base weights and what is added to them, on a device: one rounding, and its cost.

As `merging.add` on the CPU: base + delta in float64, rounded to nearest even, BF16 by way of
float32, F16 at once; where delta is 0 the bits stay. Sums are float64.

Memory: about 64 bytes for every entry of a block, for each of the threads that add.
"""

from typing import NamedTuple

import numpy as np
import torch

from .products import download, upload

__all__ = ["Product", "Sums", "add", "values"]
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Sums(NamedTuple):
    """Over the entries of a block; `merging.add.Added` says of what."""

    delta: float
    error: float
    along: float
    touched: int
    unchanged: int


class Product:
    """``left @ right`` in float64, some rows at a time; float32 (d_out, r) and (r, d_in)."""

    def __init__(self, device, left, right):
        self._left = upload(device, left).double()
        self._right = upload(device, right).double()

    def rows(self, first, last):
        """Rows of the product, on the device."""
        return self._left[first:last] @ self._right


def add(device, stored, dtype, delta):
    """(the bytes of base + delta, `Sums`), or None for the first where a sum is not finite.

    ``stored`` are the bytes of a block of the shape of ``delta``: a tensor on the device, or numpy.
    """
    if isinstance(delta, np.ndarray):
        delta = upload(device, delta)
    host = device.memory(len(stored))
    host[:] = np.frombuffer(stored, np.uint8)
    there, copied = device.upload(host)
    raw = there.view(_STORED[dtype]).view(delta.shape)
    base, delta = raw.double(), delta.double()
    exact = base + delta
    touched = delta != 0
    # -0 + 0 is 0: such a weight stays as it is.
    written = torch.where(touched, _rounded(exact, dtype), raw)
    wide = written.double()
    same = touched & (wide == base)
    sums = torch.stack([
        delta.square().sum(), (wide - exact).square_().sum(), (wide - base).mul_(delta).sum(),
        touched.sum().double(), same.sum().double(), wide.isfinite().all().double(),
    ])  # fmt: skip
    out = device.download(written.contiguous().view(-1).view(torch.uint8))
    *found, finite = download(device, sums).tolist()
    copied()
    if not finite:
        return None, None
    return out(), Sums(*found[:3], int(found[3]), int(found[4]))


def values(device, delta):
    """A delta as a numpy array, float64."""
    if isinstance(delta, np.ndarray):
        return delta.astype(np.float64)
    return download(device, delta.double())


def _rounded(x, dtype):
    """float64 to the type of a base, to nearest even."""
    if dtype != "F16":
        return x.float().to(_STORED[dtype])
    # torch goes by way of float32 here, rounding twice. An odd last bit where the first rounding
    # is not exact makes the second one right: float32 has more than two bits to spare.
    near = x.float()
    bits = near.view(torch.int32)
    wide = near.double()
    bits = torch.where(wide.abs() > x.abs(), bits - 1, bits)
    return torch.where(wide == x, bits, bits | 1).view(torch.float32).half()
