"""Canonical rows of a chunk's modules on a device, and energies of their channels. Needs torch."""

from itertools import accumulate, pairwise

import torch

PIECE = 1 << 28  # bytes of float64 copies of rows at a time


def sent(values, device, dtype=None):
    """A list as a tensor on a device. The host does not wait: pageable memory is staged first."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


class ChunkRows:
    """The rows of every module of a chunk, from a ``kernels.device.Forms``.

    ``bounds``: where each module's entries start, and the end. ``relative`` (entries, height):
    singular values over the largest, zero past the rank.
    """

    def __init__(self, forms, bounds):
        batch = forms.batch
        self.batch, self.weights = batch, forms._weights
        self.device = batch.rows.device
        self.bounds = [int(x) for x in bounds]
        self.heights = batch.heights.tolist()
        self.first = list(accumulate(self.heights, initial=0))  # row of each entry, of one side
        self._first = sent(self.first, self.device)
        self._height = batch.heights.to(self.device, non_blocking=True)
        n, most = batch.sigma.shape
        kept = torch.arange(most, device=self.device) < batch.rank[:, None]
        top = torch.where(kept[:, :1], batch.sigma[:, :1], 1.0)
        self.relative = batch.sigma.new_zeros((n, max([most, *self.heights])))
        self.relative[:, :most] = torch.where(kept, batch.sigma / top, 0.0)

    @property
    def total(self):
        """Rows of one side."""
        return self.first[-1]

    def of(self, k, side, buffer=None):
        """(rows, width) of module k, of side "u" or "v", zeros from d_out or d_in columns on."""
        a, b = self.bounds[k : k + 2]
        start, width = (int(getattr(self.batch, f"{x}_{side}")[a]) for x in ("starts", "widths"))
        rows = self.first[b] - self.first[a]
        buffer = self.batch.rows if buffer is None else buffer
        return buffer[start : start + rows * width].view(rows, width)

    def most(self, a, b):
        """The greatest height of entries [a, b)."""
        return max(self.heights[a:b], default=0)

    def by_entry(self, x, a, b):
        """(entries, height, ...) of the rows (rows of entries [a, b), ...) of ragged entries.

        What stands for the rows that an entry lacks is finite, if x is: ``relative`` is 0 there.
        """
        h = self.most(a, b)
        if h * (b - a) == len(x):
            return x.view(b - a, h, *x.shape[1:])
        within = torch.arange(h, device=self.device).minimum(self._height[a:b, None] - 1)
        place = self._first[a:b, None] - self.first[a] + within
        return x[place.clamp(0, len(x) - 1)]

    def slices(self, k, side, copies=1, buffer=None):
        """(first column, (entries, height, some columns) float64) of a module, at most PIECE."""
        a, b = self.bounds[k : k + 2]
        rows = self.of(k, side, buffer)
        size = 8 * (b - a) * max(self.most(a, b), copies)
        step = max(16, PIECE // max(1, size) // 16 * 16)
        for c in range(0, rows.shape[1], step):
            yield c, self.by_entry(rows[:, c : c + step].double(), a, b)

    def energies(self, k, side):
        """(first column, (entries, some columns) float64): of W's rows ("u") or columns ("v").

        Squared norms, over each entry's largest sigma squared; 0 past d_out or d_in columns.
        """
        a, b = self.bounds[k : k + 2]
        weight = self.relative[a:b, None, : self.most(a, b)].square()
        for c, x in self.slices(k, side):
            yield c, (weight @ x.square())[:, 0]

    def channels(self, side, first, second):
        """Inner products of energies, float64: (results,), and (entries,) of each with itself.

        first, second: of each module the range of entries (first, last); None: the first again.
        """
        out, at = self._results(first, second)
        alone = torch.zeros(self.bounds[-1], dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(pairwise(self.bounds)):
            for _, x in self.energies(k, side) if a < b else ():
                alone[a:b] += x.square().sum(1)
                self._add(out[0], at[k], x, a, first[k], (second or first)[k])
        return out[0], alone

    def profile(self, side):
        """(3, entries): sum, sum of squares and largest of each entry's energies."""
        out = torch.zeros((3, self.bounds[-1]), dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(pairwise(self.bounds)):
            for _, x in self.energies(k, side) if a < b else ():
                out[0, a:b] += x.sum(1)
                out[1, a:b] += x.square().sum(1)
                out[2, a:b].clamp_(min=x.amax(1))
        return out

    def _results(self, first, second, copies=1):
        """Zeros (copies, results), and where each module's n1 x n2 start."""
        second = second or first
        counts = [(b - a) * (d - c) for (a, b), (c, d) in zip(first, second, strict=True)]
        at = list(accumulate(counts, initial=0))
        return torch.zeros((copies, at[-1]), dtype=torch.float64, device=self.device), at

    @staticmethod
    def _add(out, at, x, start, one, two):
        """Add the products of rows of x, (entries from ``start``, columns), to a module's results.

        x may have more dimensions before these two, and out as many before its last.
        """
        (a, b), (c, d) = one, two
        here = out[..., at : at + (b - a) * (d - c)]
        if here.numel():
            made = x[..., a - start : b - start, :] @ x[..., c - start : d - start, :].mT
            here += made.flatten(-2)
