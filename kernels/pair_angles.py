"""P3 on pairs: principal angles, alignment and merged spectra, on the device of the factors.

For every pair of two deltas W = U diag(sigma) V^T of a module, in canonical form, the statistics of
csrc/include/mergeprobe/angles.hpp come from M = U_1^T U_2 and N = V_1^T V_2, all in float64:

1. rows made orthonormal to rounding by one step of Newton's, a copy of a module's;
2. M and N of a strip of adapters against all others by one matrix product each, cut into pairs;
3. pairs of all modules, a tenth of the memory at a time, through `_pair_angles_statistics`.

Adapters go in classes of ranks, powers of two from 8 on, and so do pairs: their matrices are padded
to the classes of both. Spectra are by Jacobi's method in Triton up to sums of two classes of 64,
principal angles up to a class of 64, by torch.linalg (which waits for the device) above.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ._pair_angles_small import Eigen, Jacobi
from ._pair_angles_statistics import COUNT, pair_statistics
from .arrays import upload

__all__ = ["PairAngles"]
BYTES = None  # of the matrices of the pairs that are computed at once; None: by the memory there is
SHARE = 10  # part of a device's memory for them
MATRICES = 16  # of (2 max(R1, R2))^2 elements a pair that live at the same time, at most
LEAST_CLASS = 8
KEPT = 8  # tables of pairs, of 24 bytes each: modules alike in their ranks share one


class PairAngles:
    """Statistics of all pairs; one object for many calls, whose tables of pairs it keeps.

    ``top``: directions in the overlaps of the strongest and of the weakest. ``backend``: "torch",
    "triton", or "auto": triton on CUDA devices.
    """

    def __init__(self, device, top, backend="auto"):
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
        self._device, self._top = device, top
        use = backend == "triton" or (backend == "auto" and device.type == "cuda")
        self._solvers = [Jacobi(), Eigen()] if use else [Eigen()]
        self._layouts, self._tables = {}, {}

    def __call__(self, batch, rank, first, second=None):
        """(COUNT, pairs) float64 on the device.

        Of each module its pairs (i, j), row by row: of the entries ``first[m]`` against those of
        ``second[m]``, ranges (first, last) of entries of a float64 `CanonicalBatch`; without
        ``second`` those with i < j. ``rank``: the batch's, a numpy array. A pair with a rank of 0
        has zeros, and one whose iteration does not converge NaN.
        """
        symmetric = second is None
        pairs = [
            (b - a) * (b - a - 1) // 2 if symmetric else (b - a) * (d - c)
            for (a, b), (c, d) in zip(first, first if symmetric else second, strict=True)
        ]
        out = torch.zeros((COUNT, sum(pairs)), dtype=torch.float64, device=self._device)
        queues, start = {}, 0
        for m, count in enumerate(pairs):
            if count:
                ones = list(self._groups(batch, rank, first[m]))
                twos = ones if symmetric else list(self._groups(batch, rank, second[m]))
                width = first[m][1] - first[m][0] if symmetric else second[m][1] - second[m][0]
                for one in ones:
                    for two in twos:
                        shape = one.height, two.height
                        if shape not in queues:
                            queues[shape] = _Queue(self._limit(*shape), self._queued(out))
                        queue = queues[shape]
                        table = self._table(one.layout, two.layout, symmetric, width)
                        for tile in table.tiles(queue.limit):
                            queue.add(start, *_cosines(one, two, table, tile))
            start += count
        for queue in queues.values():
            queue.flush()
        return out

    def _limit(self, r1, r2):
        """Pairs at once."""
        there = BYTES or 1 << 30
        if BYTES is None and self._device.type == "cuda":
            there = torch.cuda.mem_get_info(self._device)[1] // SHARE
        return max(1, there // (8 * MATRICES * (2 * max(r1, r2)) ** 2))

    def _queued(self, out):
        def statistics(place, *pieces):
            out.index_copy_(1, place, pair_statistics(*pieces, self._top, self._solver))

        return statistics

    def _solver(self, size):
        return next(x for x in self._solvers if x.height(size) <= x.most)

    def _groups(self, batch, rank, entries):
        """A module's entries of every class of ranks, as `_Group`."""
        first, last = entries
        heights = batch.heights[first:last].numpy()
        key = heights.tobytes(), rank[first:last].tobytes()
        if key not in self._layouts:
            if len(self._layouts) == KEPT:
                self._layouts.clear()
            self._layouts[key] = _layouts(heights, rank[first:last], self._device)
        rows = [
            batch.rows[start : start + int(heights.sum()) * width].view(-1, width)
            for start, width in (
                (int(x[first]), int(w[first]))
                for x, w in ((batch.starts_u, batch.widths_u), (batch.starts_v, batch.widths_v))
            )
        ]
        for layout in self._layouts[key]:
            yield _Group(layout, rows, batch.sigma[first:last], batch.rank[first:last])

    def _table(self, one, two, symmetric, width):
        key = one.members.tobytes(), two.members.tobytes(), symmetric, width
        if key not in self._tables:
            if len(self._tables) == KEPT:
                self._tables.clear()
            self._tables[key] = _Table(one, two, symmetric, width, self._device)
        return self._tables[key]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Entries of one module whose ranks are of one class."""

    height: int
    members: np.ndarray  # among the module's entries
    places: torch.Tensor | None  # the same on the device; None: all of them
    rows: torch.Tensor | None  # (members, height): which of the module's rows; None: all, in order
    valid: torch.Tensor | None  # whether there is such a row


def _layouts(heights, rank, device):
    """Of every class of ranks but 0."""
    classes = np.where(rank > 0, 1 << np.ceil(np.log2(np.maximum(rank, 1))).astype(np.int64), 0)
    classes = np.where(rank > 0, np.maximum(classes, LEAST_CLASS), 0)
    ends = np.cumsum(heights)
    made = []
    for height in np.unique(classes[classes > 0]).tolist():
        members = np.flatnonzero(classes == height)
        if len(members) == len(heights) and (heights == height).all():
            made.append(_Layout(height, members, None, None, None))
            continue
        at = np.arange(height)
        last = (heights[members] - 1)[:, None]
        rows = (ends - heights)[members][:, None] + np.minimum(at, last)
        made.append(_Layout(
            height, members, *(upload(x, device) for x in (members, rows, at <= last))
        ))  # fmt: skip
    return made


class _Group:
    """Vectors of the entries of a layout, (entries, height, width), zeros beyond their ranks."""

    def __init__(self, layout, rows, sigma, rank):
        self.layout, self.height = layout, layout.height
        if layout.places is not None:
            sigma, rank = sigma[layout.places], rank[layout.places]
        kept = torch.arange(layout.height, device=rank.device) < rank[:, None]
        wide = F.pad(sigma, (0, max(0, layout.height - sigma.shape[1])))[:, : layout.height]
        self.sigma, self.rank = torch.where(kept, wide, 0.0), rank
        self.u, self.v = (self._vectors(x) for x in rows)

    def _vectors(self, rows):
        """Orthonormal to 1e-15, where they were to 1e-8: by one step of Newton's."""
        height, width = self.height, rows.shape[1]
        if self.layout.rows is None:
            x = rows.view(-1, height, width)
        else:
            x = torch.where(self.layout.valid[:, :, None], rows[self.layout.rows], 0.0)
        eye = torch.eye(height, dtype=x.dtype, device=x.device)
        return torch.baddbmm(1.5 * eye, x, x.mT, alpha=-0.5) @ x


class _Table:
    """The pairs of two layouts, row by row: indices in both, and where results go."""

    def __init__(self, one, two, symmetric, width, device):
        n1, n2 = len(one.members), len(two.members)
        self.first = np.zeros(n1, np.int64)  # column of every row
        if symmetric:
            self.first = np.searchsorted(two.members, one.members, side="right")
        self.counts = n2 - self.first
        self.bounds = np.concatenate([[0], np.cumsum(self.counts)])
        self.columns = n2
        data = np.stack([one.members, self.counts, self.first - self.bounds[:-1]]).astype(np.int64)
        members, counts, shift = upload(data, device)
        total = int(self.bounds[-1])
        self.i = torch.repeat_interleave(torch.arange(n1, device=device), counts, output_size=total)
        self.j = torch.arange(total, device=device) + shift[self.i]
        i, j = members[self.i], upload(two.members, device)[self.j]
        if symmetric:
            self.place = i * width - i * (i + 1) // 2 + (j - i - 1)
        else:
            self.place = i * width + j

    def tiles(self, limit):
        """(rows, columns, pairs), slices: of consecutive pairs, at most ``limit`` at a time."""
        row = 0
        while row < len(self.counts):
            last = int(np.searchsorted(self.bounds, self.bounds[row] + limit, side="right")) - 1
            if last <= row:  # one row is too long
                for at in range(int(self.first[row]), self.columns, limit):
                    end = min(at + limit, self.columns)
                    start = int(self.bounds[row]) + at - int(self.first[row])
                    yield slice(row, row + 1), slice(at, end), slice(start, start + end - at)
                last = row + 1
            elif self.bounds[last] > self.bounds[row]:
                columns = slice(int(self.first[row]), self.columns)
                yield slice(row, last), columns, slice(*self.bounds[[row, last]].tolist())
            row = last


def _cosines(one, two, table, tile):
    """What a `_Queue` takes, of the pairs of a tile."""
    rows, columns, pairs = tile
    i, j = table.i[pairs], table.j[pairs]

    def product(x, y):
        x, y = x[rows], y[columns]
        both = (x.flatten(0, 1) @ y.flatten(0, 1).mT).view(*x.shape[:2], *y.shape[:2])
        return both[i - rows.start, :, j - columns.start]

    return (
        table.place[pairs], product(one.u, two.u), product(one.v, two.v), one.sigma[i],
        two.sigma[j], one.rank[i], two.rank[j],
    )  # fmt: skip


class _Queue:
    """Pairs of one shape, whose statistics are computed when there are ``limit`` of them."""

    def __init__(self, limit, compute):
        self.limit = limit
        self._compute, self._pieces, self._count = compute, [], 0

    def add(self, start, place, *pieces):
        if self._count + len(place) > self.limit:
            self.flush()
        self._pieces.append((place + start, *pieces))
        self._count += len(place)

    def flush(self):
        if self._count:
            columns = zip(*self._pieces, strict=True)
            found = [x[0] if len(x) == 1 else torch.cat(x) for x in columns]
            self._pieces, self._count = [], 0
            self._compute(*found)
