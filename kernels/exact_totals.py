"""Inner products of whole updates in float64, from factors as they are stored. Needs torch.

<W_i, W_j> = s_i s_j sum_ab (B_i^T B_j)[a, b] (A_i A_j^T)[a, b], on samples X with A X^T in place
of A: two Grams of blocks of rows by torch.matmul, multiplied and added up over ranks. They lie in
memory, unlike those of `gram_pass`, so that all domains share the left one, and float64 products of
cuBLAS are near the roof.
"""

import torch

from ._canonical_entries import FLOATS
from .chunk_rows import sent
from .domain_views import SampleRows

__all__ = ["ExactTotals"]
PIECE = 1 << 26  # bytes of the rows of one side of a block of entries; of a Gram of two blocks


class ExactTotals:
    """Sums over modules, on the device: ``gram`` (N, N); by domain ``inputs`` and ``relative``.

    ``relative`` is None unless asked for. ``counts``: samples of each domain.
    """

    def __init__(self, device, adapters, counts, *, relative):
        self._device, self._samples = device, SampleRows(device, counts)
        shape = (len(counts), adapters, adapters)
        self.gram = self._zeros(adapters, adapters)
        self.inputs = self._zeros(*shape)
        self.relative = self._zeros(*shape) if relative else None

    def _zeros(self, *shape):
        return torch.zeros(shape, dtype=torch.float64, device=self._device.torch)

    def samples(self, values):
        """The samples (T, d_in) of every domain, numpy float32, for modules that are fed them."""
        return self._samples.upload(values, values[0].shape[1])

    def add(self, raw, shape, b, a, rank, scale, who, samples, square, base):
        """Account for a module; (entries,) whether the sum of each with itself is finite.

        raw: uint8, on the device, where every B (d_out, rank) and A (rank, d_in) lies by rows.
        b, a: (start in bytes, index in FLOATS) of each entry; rank, scale, who: lists, ``who`` its
        adapter. samples: as `samples` gave them, or None, and by domain what A X^T A'^T is to be
        multiplied by (``square``), and, or None, divided by for ``relative``.
        """
        # Entries of one height together: of the same rank, or padded to a power of two.
        uniform = len(set(rank)) == 1
        height = [r if uniform or r == 0 else 1 << (r - 1).bit_length() for r in rank]
        order = sorted(range(len(rank)), key=lambda e: height[e])
        blocks = self._blocks(raw, shape, [b[e] for e in order], [a[e] for e in order],
                              [rank[e] for e in order], [height[e] for e in order])  # fmt: skip
        seen = [None if samples is None else block.rows("v") @ samples.mT for block in blocks]
        n, domains = len(rank), 0 if samples is None else len(self._samples.counts)
        out = self._zeros(1 + domains, n, n)
        for i, one in enumerate(blocks):
            left, right = one.rows("u"), one.rows("v")
            for j, two in enumerate(blocks[: i + 1]):
                gram = left @ (left if i == j else two.rows("u")).mT
                place = slice(one.first, one.last), slice(two.first, two.last)
                out[0][place] = one.folded(gram * (right @ two.rows("v").mT), two)
                for d in range(domains):
                    at = self._samples.offsets[d]
                    x, y = (s[:, at : at + self._samples.counts[d]] for s in (seen[i], seen[j]))
                    out[1 + d][place] = one.folded(gram * (x @ y.mT), two)
        out = out.tril() + out.tril(-1).mT
        finite = out[0].diagonal().isfinite()
        sizes = self._vector([scale[e] for e in order])
        out *= sizes[:, None] * sizes
        self._account(out, [who[e] for e in order], square, base)
        return finite[self._vector(order, torch.int64).argsort()]

    def _account(self, out, who, square, base):
        at = self._vector(who, torch.int64)
        at = at[:, None], at
        self.gram[at] += out[0]
        if square is None:
            return
        on_inputs = out[1:] * self._vector(square)[:, None, None]
        divisor = None if base is None else self._vector(base)
        for d, values in enumerate(on_inputs):
            self.inputs[d][at] += values
            if divisor is not None:
                relative = torch.where(divisor[d] > 0, values / divisor[d], torch.nan)
                self.relative[d][at] += relative

    def _vector(self, values, dtype=torch.float64):
        return sent(values, self._device.torch, dtype)

    def _blocks(self, raw, shape, b, a, rank, height):
        """Entries in blocks of one height, of at most PIECE bytes a side and so many in a Gram."""
        found, first = [], 0
        most = min(PIECE // (8 * max(shape)), int((PIECE / 8) ** 0.5))
        while first < len(rank):
            h = height[first]
            last = first + 1
            while last < len(rank) and height[last] == h and (last + 1 - first) * h <= most:
                last += 1
            here = slice(first, last)
            found.append(_Block(raw, shape, b[here], a[here], rank[here], h, first, last))
            first = last
        return found


class _Block:
    """Entries [first, last) of a module, ranks padded to one height."""

    def __init__(self, raw, shape, b, a, rank, height, first, last):
        self._raw, self._shape, self._rank, self._height = raw, shape, rank, height
        self._places = {"u": b, "v": a}
        self.first, self.last = first, last

    def rows(self, side):
        """Columns of all B ("u") or rows of all A, float64 (entries x height, d)."""
        d = self._shape["uv".index(side)]
        count, h = self.last - self.first, self._height
        out = torch.zeros((count, h, d), dtype=torch.float64, device=self._raw.device)
        at = 0
        while at < count:
            last, view = self._run(side, at, d)
            out[at:last, : self._rank[at]] = view
            at = last
        return out.view(count * h, d)

    def _run(self, side, at, d):
        """Entries alike from ``at`` on that lie at equal distances: their end, one view of them."""
        places, ranks = self._places[side], self._rank
        start, code = places[at]
        r, last, step = ranks[at], at + 1, 0
        while last < len(ranks) and ranks[last] == r and places[last][1] == code:
            distance = places[last][0] - places[last - 1][0]
            if last > at + 1 and distance != step:
                break
            step, last = distance, last + 1
        dtype = FLOATS[code]
        size = dtype.itemsize
        whole = self._raw[: len(self._raw) // size * size].view(dtype)
        strides = (d, 1) if side == "v" else (1, r)
        where = whole.storage_offset() + start // size
        return last, whole.as_strided((last - at, r, d), (step // size, *strides), where)

    def folded(self, product, other):
        """(entries, entries of other): sums over both ranks."""
        counts = [x.last - x.first for x in (self, other)]
        if 0 in product.shape:
            return product.new_zeros(counts)
        shape = (counts[0], self._height, counts[1], other._height)
        return product.view(shape).sum((1, 3))
