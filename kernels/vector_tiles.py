"""Cosines between singular vectors of all pairs, for the columns of other tools. Needs torch."""

import torch

from ._pass_rows import Rows, padded
from .canonical import singular_values
from .chunk_rows import sent
from .gram_modules import gram_pass

__all__ = ["VectorTiles"]
ROWS = 2048  # singular vectors of a block of entries, those of an entry as `_padded_height` says
LEFT, RIGHT = (1, -1, -1), (2, -1, -1)  # epilogues of gram_pass: sums of squared cosines


class VectorTiles:
    """Of a chunk's ``ChunkRows``; ``rank`` are the ranks of its entries, on the host."""

    def __init__(self, rows, rank, precision):
        self._rows, self._rank, self._precision = rows, [int(r) for r in rank], precision

    def overlaps(self, entries, count, p, q):
        """(3, results) float64: sums of squared cosines among ``count`` singular vectors.

        Of the first left ones, the first right ones and the last right ones. entries: of each
        module those that take part, of at least that rank; n x n results of each module.
        """
        u, v = (self._ends(side, d, entries, count, False) for side, d in (("u", p), ("v", q)))
        last = self._ends("v", q, entries, count, True)
        bounds = [[k * self._padded(count) for k in range(len(few) + 1)] for few in entries]
        first = gram_pass(Rows(u[0], v[0], u[1], v[1], u[2], v[2], bounds), None, p, q,
                          [LEFT, RIGHT], precision=self._precision)  # fmt: skip
        weak = gram_pass(Rows(*last[:1] * 2, *last[1:2] * 2, *last[2:] * 2, bounds), None, p, q,
                         [RIGHT], precision=self._precision)  # fmt: skip
        return torch.cat([first, weak])

    @staticmethod
    def _padded(count):
        """Rows of an entry: a power of two that whole tiles of `gram_pass` take, the rest zeros."""
        return max(4, 1 << (count - 1).bit_length())

    def _ends(self, side, columns, entries, count, last):
        """(buffer, starts, strides) of the first or last vectors of each module's entries."""
        rows, h = self._rows, self._padded(count)
        parts, starts, strides, end = [], [], [], 0
        for k, few in enumerate(entries):
            width = padded(columns[k])
            starts.append(end)
            strides.append(width)
            end += len(few) * h * width
            if few:
                x = rows.of(k, side)
                zero = rows.first[rows.bounds[k]]
                at = [rows.first[e] - zero + (self._rank[e] - count) * last for e in few]
                place = sent(at, x.device)[:, None]
                parts.append((x, place + torch.arange(count, device=x.device)))
        device = rows.device
        buffer = torch.zeros(end, dtype=rows.batch.rows.dtype, device=device)
        filled = [(start, few) for start, few in zip(starts, entries, strict=True) if few]
        for (start, few), (x, place) in zip(filled, parts, strict=True):
            n, width = len(few), x.shape[1]
            buffer[start : start + n * h * width].view(n, h, width)[:, :count] = x[place]
        return buffer, starts, strides

    def agreements(self, k, entries, keep, sigma):
        """What `_agreement` finds of all entries of a module: yields (entries, others, values).

        keep, sigma: of each entry how many singular vectors count, and (entries, values) numpy.
        ``values`` are (3, n, n2), NaN where another yield has them, of: the mean and the greatest
        cosine of principal angles, and what gradience calls the directional agreement.
        """
        h = max(self._rows.most(e, e + 1) for e in entries)
        step = max(1, ROWS // _padded_height(h))
        blocks = [self._block(k, entries[a : a + step], keep[a : a + step], sigma[a : a + step], h)
                  for a in range(0, len(entries), step)]  # fmt: skip
        for i, one in enumerate(blocks):
            left, right = (one.vectors(self._rows, side) for side in "uv")
            for j, two in enumerate(blocks[i:], i):
                same = i == j
                m = left @ (left if same else two.vectors(self._rows, "u")).mT
                n = right @ (right if same else two.vectors(self._rows, "v")).mT
                shape = len(one.entries), h, len(two.entries), h
                m, n = m.view(shape), n.view(shape)
                values = torch.cat([_cosines(m, one, two, same), _directional(m, n, one, two)])
                yield one.entries, two.entries, values
                if not same:
                    m, n = (x.permute(2, 3, 0, 1) for x in (m, n))
                    back = torch.full_like(values.mT, torch.nan)
                    back[2:] = _directional(m, n, two, one)
                    yield two.entries, one.entries, back

    def _block(self, k, entries, keep, sigma, h):
        device = self._rows.device
        return _Block(k, list(entries), h, sent([int(x) for x in keep], device),
                      torch.from_numpy(sigma).to(device, non_blocking=True))  # fmt: skip


class _Block:
    """Some entries of a module; ``sigma`` (entries, h) zero padded."""

    def __init__(self, k, entries, h, keep, sigma):
        self._k, self.entries, self._h, self.keep = k, entries, h, keep
        self.sigma = sigma.new_zeros((len(entries), h))
        few = min(h, sigma.shape[1])
        self.sigma[:, :few] = sigma[:, :few]
        self.inside = torch.arange(h, device=keep.device) < keep[:, None]

    def vectors(self, rows, side):
        """(entries x h, d) float64, zeros past the height of an entry."""
        x = rows.of(self._k, side)
        zero = rows.first[rows.bounds[self._k]]
        at = sent([rows.first[e] - zero for e in self.entries], x.device)
        high = sent([rows.heights[e] for e in self.entries], x.device)
        within = torch.arange(self._h, device=x.device)
        place = (at[:, None] + within).clamp(max=len(x) - 1)
        found = torch.where((within < high[:, None])[:, :, None], x[place].double(), 0.0)
        return found.flatten(0, 1)


def _padded_height(h):
    """What `singular_values` pads h rows to: the SVDs of all pairs of two blocks are in memory."""
    return max(16, 1 << (h - 1).bit_length())


def _directional(m, n, one, two):
    """(1, n, n2): the cosine of S_1 and the diagonal of U_1^T W_2 V_1, of the vectors kept."""
    along = torch.einsum("iajb,jb->iaj", m * n, two.sigma)
    along = torch.where(one.inside[:, :, None], along, 0.0)
    sigma = torch.where(one.inside, one.sigma, 0.0)
    top = torch.einsum("iaj,ia->ij", along, sigma)
    length = along.norm(dim=1) * sigma.norm(dim=1)[:, None]
    return torch.where(length > 0, top / length, torch.nan)[None]


def _cosines(m, one, two, same):
    """(2, n, n2): mean and greatest cosine of the left vectors kept; above the diagonal if same."""
    count, other = m.shape[0], m.shape[2]
    if same:
        i, j = torch.triu_indices(count, count, device=m.device)
    else:
        i, j = (x.flatten() for x in torch.meshgrid(
            torch.arange(count, device=m.device), torch.arange(other, device=m.device),
            indexing="ij"))  # fmt: skip
    inside = one.inside[i][:, :, None] & two.inside[j][:, None, :]
    cut = torch.where(inside, m.transpose(1, 2)[i, j], 0.0)
    cosines = singular_values(cut).clamp(0.0, 1.0)
    values = m.new_full((2, count, other), torch.nan)
    values[0, i, j] = cosines.sum(1) / torch.minimum(one.keep[i], two.keep[j])
    values[1, i, j] = cosines[:, 0]
    return values
