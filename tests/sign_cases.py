"""Factors for the CUDA kernels of sign statistics, and what the CPU counts on them."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.ops import Deltas
from mergeprobe_fast.ops.entries import entry_pairs

# Of x86, the baseline alone rounds products before it adds them.
FUSED = [isa for isa in _native.core().available_isas() if isa != "baseline"]


def bfloat(x):
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(x, dtype=np.float32):
    """A view with more columns in memory than it has, and live numbers in them."""
    whole = np.concatenate([x, 1 + np.abs(x[:, :1]), -1 - np.abs(x[:, :1])], axis=1)
    return np.ascontiguousarray(whole, dtype)[:, : x.shape[1]]


def mixed(rng, d_out, d_in, ranks, *, zeros=False):
    """Every dtype and layout; with ``zeros``, rank 0, zero rows, a zero factor, a zero scale."""
    made = []
    for i, rank in enumerate(ranks):
        b, a = rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))
        if zeros:
            b[rng.random(d_out) < 0.3] = 0
            a[:, rng.random(d_in) < 0.2] = 0
            b *= i != 2
        kind = i % 5
        if kind == 0:
            b, a = np.float32(b), wide(a)
        elif kind == 1:
            b, a = bfloat(b), bfloat(a)
        elif kind == 2:
            b, a = wide(b, np.float16), np.float16(a * 2.0**-15)  # many are subnormal
        elif kind == 3:
            b, a = b, np.asfortranarray(a.astype(np.float32))
        else:
            b, a = bfloat(b), np.float16(a)
        made.append((b, a, [1.5, -0.25, 1e-30, -7.0, 0.0 if zeros else 3.0][kind]))
    return made


def cancelling(rng, d_out, d_in, n):
    """Units that cancel: entries are what rounding leaves, and 0 where products are not fused."""
    made = []
    for i in range(n):
        b, a = rng.standard_normal((d_out, 2)), rng.standard_normal((2, d_in))
        if i % 2:
            b, a = b * 1e-22, a * 1e-20  # and subnormal
        b, a = np.float32(b), np.float32(a)
        made.append((np.hstack([b, -b[:, ::-1]]), np.vstack([a, a[::-1]]), 1.0))
    return made


def as_cpu(factors, monkeypatch, isa):
    """Counts of the CPU kernel, which multiplies by a scale only where that changes nothing."""
    monkeypatch.setenv("MERGEPROBE_ISA", isa)
    widened = [
        (*((x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x for x in f),
         float(np.sign(scale)))
        for *f, scale in factors
    ]  # fmt: skip
    pairs = entry_pairs(Deltas.of(widened), magnitudes=False, threads=1)
    return pairs.conflicts, pairs.both
