"""The deltas of one module where their factors lie on a device, and the entries to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ops._tables import DTYPE_CODE, ITEMSIZE, SEGMENT
from ..ops.tiles import NotFinite
from . import _configs
from ._deltas import CODE, INTERPRETED, DeviceDeltas, _check, guard, pack_launch
from ._entry_kernel import moments_kernel, row_squares_kernel, strip_kernel

__all__ = ["EntryFactors", "Looked"]

_SIZE = np.array([ITEMSIZE[name] for name in sorted(DTYPE_CODE, key=DTYPE_CODE.get)])


@dataclass(frozen=True, eq=False)
class EntryFactors:
    """``delta_i = scale_i * B_i A_i``, d_out x d_in, by reference.

    ``segments``: SEGMENT records (u = B transposed, v = A) whose addresses are on ``device``;
    ``owner`` keeps that memory alive.
    """

    segments: np.ndarray
    d_out: int
    d_in: int
    device: torch.device
    owner: Any = None

    @classmethod
    def of(cls, factors) -> EntryFactors:
        """From (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, torch tensors on one device.

        Or from DeviceDeltas. InputError: what does not fit, see :meth:`DeviceDeltas.of`.
        """
        if isinstance(factors, DeviceDeltas):
            d = factors
            factors = [
                (d.U[first:last, : d.d_out].T, d.V[first:last, : d.d_in], scale)
                for (first, last), scale in zip(d.bounds, d.scales, strict=True)
            ]
        _check(factors, "factors")
        segments = np.zeros(len(factors), SEGMENT)
        for s, (b, a, scale) in zip(segments, factors, strict=True):
            for side, x in (("u", b.T), ("v", a)):
                s[side]["data"], s[side]["dtype"] = x.data_ptr(), CODE[x.dtype]
                s[side]["row_stride"], s[side]["col_stride"] = x.stride()
            s["rank"], s["scale"] = a.shape[0], scale
        b, a, _ = factors[0]
        return cls(segments, b.shape[0], a.shape[1], b.device, factors)

    def __len__(self) -> int:
        return len(self.segments)

    def sizes(self) -> np.ndarray:
        """As ``ops.entry_sizes``. Waits for the device."""
        bad = torch.zeros(2 * len(self), dtype=torch.int32, device=self.device)
        found = []
        with guard(self.device):
            for side, d in (("u", self.d_out), ("v", self.d_in)):
                kernel, grid, named = squares_launch(self._rows(side, 1), d, bad)
                if grid[0]:
                    kernel[grid](**named)
                found.append(named["p_out"])
        self._refuse(bad)
        u, v = (x.cpu().numpy()[: self.segments["rank"].sum()] for x in found)
        owner = np.repeat(np.arange(len(self)), self.segments["rank"])
        squares = np.bincount(owner, weights=u * v, minlength=len(self))
        return np.sqrt(squares * self.segments["scale"] ** 2)

    def packed(self, index_u=None, index_v=None) -> DeviceDeltas:
        """Float32 rows of both sides, of all or some of their elements. Waits for the device."""
        bad = torch.zeros(2 * len(self), dtype=torch.int32, device=self.device)
        buffers = []
        with guard(self.device):
            for side, d, index in (("u", self.d_out, index_u), ("v", self.d_in, index_v)):
                if index is not None:
                    d = len(index)
                    index = torch.from_numpy(np.array(index, np.int32)).to(self.device)
                kernel, grid, named = pack_launch(
                    self._rows(side, _configs.RANK_STEP), d, bad, torch.float32, index
                )
                if grid[0]:
                    kernel[grid](**named)
                buffers.append(named["p_out"])
        self._refuse(bad)
        ends = np.cumsum(_padded(self.segments["rank"], _configs.RANK_STEP)).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        scales = self.segments["scale"].tolist()
        return DeviceDeltas(*buffers, bounds, scales, self.d_out, self.d_in)

    def _rows(self, side, step):
        """The table of pack_kernel: a line per row, ranks filled up to a multiple of ``step``."""
        x, rank = self.segments[side], self.segments["rank"]
        count = _padded(rank, step)
        owner = np.repeat(np.arange(len(self)), count)
        k = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        size = _SIZE[x["dtype"]]
        start = x["data"].astype(np.int64)
        return np.stack(
            [
                start[owner] + k * (x["row_stride"] * size)[owner],
                x["col_stride"][owner],
                np.where(k < rank[owner], x["dtype"][owner], -1),
                2 * owner + (side == "v"),
            ],
            axis=1,
        )

    def _refuse(self, bad):
        for at in torch.nonzero(bad).flatten().tolist()[:1]:
            raise NotFinite(1 + at % 2, at // 2, "factors")


class Looked:
    """The entries of deltas that are looked at, packed, in tiles: all, or those of a sample.

    ``deltas``: the factors, if they are packed so already.
    """

    def __init__(self, factors: EntryFactors, sample=None, deltas=None):
        d_out, d_in = factors.d_out, factors.d_in
        self.sampled = sample is not None
        config = _configs.ENTRY_SAMPLE
        if not self.sampled:
            config = _configs.ENTRY_INTERPRETER if INTERPRETED else _configs.ENTRY
        self.config, index = config, (None, None)
        groups, panels = -(-d_out // config.block_i), -(-d_in // config.block_j)
        self.tiles = groups * panels
        if self.sampled:
            self.tiles = min(sample.tiles, self.tiles)
            index = (
                sample.rows[: self.tiles * config.block_i],
                sample.columns[: self.tiles * config.block_j],
            )
        self.groups, self.panels = groups, panels
        self.period = math.lcm(groups, panels)
        self.valid = self._valid(d_out, d_in)
        self.deltas = deltas or factors.packed(*index)
        self.device = factors.device
        self.bounds = torch.tensor(self.deltas.bounds, dtype=torch.int64).to(self.device)
        # As the CPU rounds: an infinite scale shows in the entries.
        self.scales = torch.tensor(self.deltas.scales, dtype=torch.float64).float().to(self.device)

    @property
    def tile_size(self) -> int:
        return self.config.block_i * self.config.block_j

    def _valid(self, d_out, d_in):
        """How many entries of a delta the tiles hold: less than the tiles' own where they end."""
        if not self.sampled:
            return d_out * d_in
        t = np.arange(self.tiles)
        group, panel = t % self.groups, (t + t // self.period) % self.panels
        high = np.minimum(self.config.block_i, d_out - group * self.config.block_i)
        return int(high @ np.minimum(self.config.block_j, d_in - panel * self.config.block_j))

    def strip_launch(self, first, last, tiles, out, s_entry, s_delta):
        """Entries of deltas [first, last) at tiles [tiles[0], tiles[1]): entry e of the i-th of
        them to ``out`` at ``e * s_entry + i * s_delta``."""
        start, end = tiles
        return (
            strip_kernel,
            ((end - start) * (last - first),),
            dict(
                **self._common(first, last),
                p_out=out,
                first_tile=start,
                tiles=end - start,
                s_entry=s_entry,
                s_delta=s_delta,
            ),
        )

    def moments_launch(self, first, last, thresholds):
        programs = -(-self.tiles // self.config.tiles)
        return (
            moments_kernel,
            (programs * (last - first),),
            dict(
                **self._common(first, last),
                p_thresholds=thresholds,
                p_out=torch.empty(
                    (last - first, programs, 6), dtype=torch.float64, device=self.device
                ),
                tiles=self.tiles,
                programs=programs,
                TILES=self.config.tiles,
            ),
        )

    def _common(self, first, last):
        d = self.deltas
        return dict(
            p_u=d.U,
            p_v=d.V,
            p_deltas=self.bounds[first:last],
            p_scales=self.scales[first:last],
            groups=self.groups,
            panels=self.panels,
            period=self.period,
            s_u=d.U.stride(0),
            s_v=d.V.stride(0),
            SAMPLED=self.sampled,
            RANK_STEP=d.rank_step,
            BLOCK_I=self.config.block_i,
            BLOCK_J=self.config.block_j,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            enable_fp_fusion=False,
        )


def squares_launch(rows, d, bad):
    """The launch that sums the squares of rows: (kernel, grid, arguments by name)."""
    config, device = _configs.PACK, bad.device
    return (
        row_squares_kernel,
        (len(rows),),
        dict(
            p_rows=torch.from_numpy(rows).to(device),
            p_out=torch.empty(max(len(rows), 1), dtype=torch.float64, device=device),
            p_bad=bad,
            d=d,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        ),
    )


def _padded(rank, step):
    return rank + -rank % step
