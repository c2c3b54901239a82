"""P2 on the GPU that ends in numbers: statistics of entries of deltas and of pairs. See README.md.

As ``mergeprobe_fast.ops.entries`` has them; every count is the CPU's to the last entry.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import InputError
from . import _configs
from ._deltas import INTERPRETED, guard
from ._pair_kernel import pair_counts_kernel, pair_sums_kernel
from .entry_factors import EntryFactors, Looked
from .order_statistics import order_statistics

__all__ = ["EntryFactors", "entry_moments", "entry_pairs"]

OVERFLOW = "the deltas overflow float32"
SUMS, COUNTS = 6, 3
MOST = 1 << 22  # entries of a segment: counts are float32 on the way


def entry_moments(factors: EntryFactors, density, sample=None):
    """``Moments`` by field, numpy arrays; as ``ops.entry_moments``.

    Memory besides the packed factors: ``_configs.WORKSPACE``, or of a sample its entries of one
    delta four times over if those are more.
    """
    looked = Looked(factors, sample)
    n, size = len(factors), looked.valid
    kept = min(size, int(density * size))
    with guard(looked.device):
        thresholds = _thresholds(looked, kept)
        programs = -(-looked.tiles // looked.config.tiles)
        parts = []
        for first, last in _groups(n, 48 * programs):
            kernel, grid, named = looked.moments_launch(first, last, thresholds[first:last])
            kernel[grid](**named)
            parts.append(named["p_out"].sum(1))
        found = torch.cat(parts).cpu().numpy().T
        threshold = thresholds.double().cpu().numpy()
    if not np.isfinite(found[2]).all():
        raise InputError(OVERFLOW, key="factors")
    counts = found[4:].astype(np.int64)
    return (*found[:4], threshold, np.full(n, size), size - counts[0], counts[1])


def _thresholds(looked, kept):
    """float32 (n,) on the device: the kept-th largest |x| of each delta."""
    n = len(looked.deltas)
    if kept == 0:
        return torch.full((n,), math.inf, dtype=torch.float32, device=looked.device)
    if not looked.sampled:
        try:
            found = order_statistics([[looked.deltas[i]] for i in range(n)], [[kept]] * n)
        except InputError as error:
            raise InputError(error.reason, key="factors") from None
        return torch.from_numpy(np.concatenate(found)).to(looked.device)
    entries = looked.tiles * looked.tile_size
    found = []
    for first, last in _groups(n, 16 * entries):  # entries, and the largest with their places
        x = torch.empty((last - first, entries), dtype=torch.float32, device=looked.device)
        kernel, grid, named = looked.strip_launch(first, last, (0, looked.tiles), x, 1, entries)
        kernel[grid](**named)
        # Zeros outside the matrix come after every entry.
        found.append(torch.topk(x.abs_(), kept, dim=1, sorted=False).values.amin(1))
    return torch.cat(found)


def _groups(n, size):
    """Deltas [first, last) whose ``size`` bytes each fit into the workspace."""
    step = max(_configs.WORKSPACE // size // 4 * 4, 1)
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def entry_pairs(factors: EntryFactors, thresholds, units, magnitudes, split, sample=None):
    """(counts, sums): int64 (3, n, n) and float64 (6, n, n) on the device; as ``ops.entry_pairs``.

    thresholds: float32 (n,) or None; units: int32 (n,), on the host. Memory besides the packed
    factors: four times ``_configs.WORKSPACE`` and 5 n^2 x 72 bytes. Waits for the device.
    """
    looked = Looked(factors, sample)
    device, n = looked.device, len(factors)
    with guard(device):
        pairs = _Pairs(looked, thresholds, units, magnitudes, split)
        for first in range(0, looked.tiles, pairs.strip_tiles):
            last = min(first + pairs.strip_tiles, looked.tiles)
            for kernel, grid, named in pairs.launches(first, last):
                kernel[grid](**named)
        counts, sums = pairs.gathered()
        if sums is None:
            sums = torch.zeros((SUMS, n, n), dtype=torch.float64, device=device)
        elif not bool(sums.isfinite().all()):
            raise InputError(OVERFLOW, key="factors")
    return counts, sums


class _Pairs:
    """Tiles of pairs, the strip of entries that they are at, and what they have added up."""

    def __init__(self, looked, thresholds, units, magnitudes, split):
        self.looked, self.n, self.split = looked, len(looked.deltas), split
        self.config = c = _configs.PAIR_INTERPRETER if INTERPRETED else _configs.PAIR
        self.across = -(-self.n // c.block)
        self.width = self.across * c.block
        self.tiles = _tiles_of_pairs(self.across, c.block, split)
        device = looked.device
        # Whole runs: segments of every strip start at one.
        least = math.lcm(looked.tile_size, c.run) // looked.tile_size
        fits = _configs.WORKSPACE // (4 * self.width * looked.tile_size) // least * least
        self.strip_tiles = min(max(fits, least), -(-looked.tiles // least) * least)
        entries = self.strip_tiles * looked.tile_size
        self.strip = torch.zeros((entries, self.width), dtype=torch.float32, device=device)
        room = 8 * (SUMS + COUNTS) * len(self.tiles) * c.block**2
        segments = min(
            max(-(-c.programs // len(self.tiles)), 1), max(2 * _configs.WORKSPACE // room, 1)
        )
        segments = max(segments, -(-entries // MOST))
        self.per_segment = -(-entries // segments // c.run) * c.run
        self.segments = -(-entries // self.per_segment)
        shape = (self.segments, len(self.tiles))
        tail = (c.block, c.block)
        self.counts = torch.zeros((*shape, COUNTS, *tail), dtype=torch.int64, device=device)
        self.sums = None
        if magnitudes:
            self.sums = torch.zeros((*shape, SUMS, *tail), dtype=torch.float64, device=device)
        self.table = torch.from_numpy(self.tiles).to(device)
        self.units = _filled(units, self.width, 0, np.int32, device)
        self.thresholds = None
        if thresholds is not None:
            self.thresholds = _filled(thresholds, self.width, np.inf, np.float32, device)

    def launches(self, first, last):
        """Of one strip, tiles [first, last): its entries, then what pairs have of them."""
        looked, c = self.looked, self.config
        yield looked.strip_launch(0, self.n, (first, last), self.strip, self.width, 1)
        entries = (last - first) * looked.tile_size
        whole = -(-entries // c.run) * c.run
        self.strip[entries:whole].zero_()
        common = dict(
            p_x=self.strip,
            p_tiles=self.table,
            tiles=len(self.tiles),
            entries=whole,
            per_segment=self.per_segment,
            s_x=self.width,
            BLOCK=c.block,
            enable_fp_fusion=False,
        )
        grid = (-(-whole // self.per_segment) * len(self.tiles),)
        yield (
            pair_counts_kernel,
            grid,
            dict(
                **common, p_thresholds=self.thresholds, p_out=self.counts, STEP=c.counts_step,
                num_warps=c.counts_warps,
            ),
        )  # fmt: skip
        if self.sums is not None:
            yield (
                pair_sums_kernel,
                grid,
                dict(
                    **common, p_units=self.units, p_out=self.sums, RUN=c.run, STEP=c.sums_step,
                    num_warps=c.sums_warps,
                ),
            )  # fmt: skip

    def gathered(self):
        """Both as matrices over pairs, 0 but for the pairs wanted and the sums' diagonals."""
        n = self.n
        wanted = torch.ones((n, n), dtype=torch.bool, device=self.looked.device).triu_(1)
        if self.split:
            wanted[self.split :] = False
            wanted[:, : self.split] = False
        counts = self._matrices(self.counts.sum(0)) * wanted
        if self.sums is None:
            return counts, None
        wanted.fill_diagonal_(True)
        # Not a product: what is not wanted may be more than a number.
        return counts, torch.where(wanted, self._matrices(self.sums.sum(0)), 0.0)

    def _matrices(self, parts):
        """(k, n, n) from the tiles' (tiles, k, block, block)."""
        i, j = self.table.long().unbind(1)
        k, across = parts.shape[1], self.across
        whole = parts.new_zeros((across, across, *parts.shape[1:]))
        whole[i, j] = parts
        whole = whole.permute(2, 0, 3, 1, 4).reshape(k, self.width, self.width)
        return whole[:, : self.n, : self.n]


def _tiles_of_pairs(across, block, split):
    """int32 (tiles, 2): blocks of deltas with a pair i < j, or i < split <= j, and the diagonal."""
    i, j = np.triu_indices(across)
    wanted = np.ones(len(i), bool) if not split else (i * block < split) & ((j + 1) * block > split)
    return np.ascontiguousarray(np.stack([i, j], 1)[wanted | (i == j)], np.int32)


def _filled(values, width, value, dtype, device):
    whole = np.full(width, value, dtype)
    whole[: len(values)] = values
    return torch.from_numpy(whole).to(device)
