"""The launches of statistics of entries that `_inspect` compiles, on tensors without memory."""

import numpy as np
import torch

from ..ops._tables import SEGMENT
from ..ops.entries import Sample
from ._deltas import DeviceDeltas
from .entry_factors import EntryFactors, Looked, squares_launch
from .entry_statistics import _Pairs

D = 4096


def entry_launches():
    """{name: launch} of every kernel, of all entries and of a sample, of 100 deltas of rank 16."""
    meta = torch.device("meta")
    n, rows = 100, 1600
    bad = torch.empty(2 * n, dtype=torch.int32, device=meta)
    found = {"row squares": squares_launch(np.zeros((rows, 4), np.int64), D, bad)}
    sample = Sample.draw(D, D, 20_000, 0, 0)
    for name, which in (("all", None), ("sample", sample)):
        width = D if which is None else 2560
        packed = torch.empty((rows, width), dtype=torch.float32, device=meta)
        bounds = [(16 * i, 16 * i + 16) for i in range(n)]
        deltas = DeviceDeltas(packed, packed, bounds, [1.0] * n, D, D)
        looked = Looked(EntryFactors(np.zeros(n, SEGMENT), D, D, meta), which, deltas)
        some = torch.empty(n, dtype=torch.float32, device=meta)
        found[f"moments of {name}"] = looked.moments_launch(0, n, some)
        pairs = _Pairs(looked, np.zeros(n), np.zeros(n), True, 0)
        kernels = pairs.launches(0, min(pairs.strip_tiles, looked.tiles))
        found[f"strip of {name}"] = next(kernels)
        if which is None:
            found["counts"], found["sums"] = kernels
    return found
