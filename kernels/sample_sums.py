"""Sums over the samples of domains for whole adapters: derivatives of the loss, drift. Needs torch.

All is float64. ``rows`` is a chunk's ``ChunkRows``; ``x`` and ``y`` are samples of one module as
``SampleRows.upload`` gives them, what they were divided by in ``factor`` by domain.
"""

import torch

from .chunk_rows import PIECE, sent
from .domain_views import SampleRows

__all__ = ["DerivativeSums", "drift", "shifts"]


def _projected(rows, k, side, samples, a, b):
    """(entries, height, columns): rows of entries [a, b) of module k times samples."""
    zero = rows.first[rows.bounds[k]]
    part = rows.of(k, side)[rows.first[a] - zero : rows.first[b] - zero]
    return rows.by_entry(part.double() @ samples.mT, a, b)


def _sigma(rows, a, b):
    """(entries, height): singular values, zero past the rank."""
    return rows.relative[a:b, : rows.most(a, b)] * rows.batch.sigma[a:b, :1]


def _pieces(rows, k, width, least=1):
    """Ranges of a module's entries that have rows: at most PIECE bytes with so many columns, and
    with ``least`` elements an entry."""
    first, last = rows.bounds[k : k + 2]
    step = max(1, PIECE // (8 * max(least, width * max(1, rows.most(first, last)))))
    for a in range(first, last, step):
        b = min(a + step, last)
        if rows.first[a] < rows.first[b]:
            yield a, b


class DerivativeSums:
    """What ``engine.gradients`` adds up; ``starts`` of the sequences of each domain, and the end.

    phi (adapters, columns of ``samples``); atoms (3, adapters): sum, sum of squares, maximum;
    gram (domains, domains), its lower half; square and dot: (sequences,) of each domain.
    """

    def __init__(self, device, adapters, starts):
        self._device = device.torch
        self.samples = SampleRows(device, [int(s[-1]) for s in starts])
        counts, columns = self.samples.counts, self.samples.columns
        self.phi = self._zeros(adapters, columns)
        self.atoms = self._zeros(3, adapters)
        self.gram = self._zeros(len(starts), len(starts))
        self.square, self.dot = ([self._zeros(len(s) - 1) for s in starts] for _ in range(2))
        self._share = self._zeros(len(starts), columns)
        self._within = []
        for d, (s, at, t) in enumerate(zip(starts, self.samples.offsets, counts, strict=True)):
            self._share[d, at : at + t] = 1.0 / t
            inside = torch.zeros((len(s) - 1, t), dtype=torch.float64)
            for row, a, b in zip(inside, s[:-1], s[1:], strict=True):
                row[a:b] = 1.0
            self._within.append(inside.to(self._device, non_blocking=True))

    def _zeros(self, *shape):
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def _of(self, x, d):
        at = self.samples.offsets[d]
        return x[at : at + self.samples.counts[d]]

    def add(self, rows, k, who, x, y, factor, own=None):
        """Account for a module. who: the adapter of each entry of the chunk, on the device; own:
        each adapter's domain, there too, -1 for none: of that domain are the atoms."""
        scale = sent(factor, self._device, torch.float64)
        by_column = scale @ (self._share > 0).double()
        for a, b in _pieces(rows, k, max(x.shape)):
            each = _projected(rows, k, "u", y, a, b) * _projected(rows, k, "v", x, a, b)
            each = each * _sigma(rows, a, b)[:, :, None] * by_column
            self.phi[who[a:b]] += each.sum(1)
            if own is not None:
                mine = own[who[a:b]]
                means = (each @ self._share.mT).abs_()  # (entries, height, domains)
                at = mine.clamp(min=0)[:, None, None].expand(-1, means.shape[1], 1)
                found = torch.where(mine[:, None] >= 0, means.gather(2, at)[:, :, 0], 0.0)
                self.atoms[0, who[a:b]] += found.sum(1)
                self.atoms[1, who[a:b]] += found.square().sum(1)
                top = torch.maximum(self.atoms[2, who[a:b]], found.amax(1))
                self.atoms[2, who[a:b]] = top

    def add_gradients(self, x, y, factor):
        """Account for the gradients of a module themselves."""
        counts = self.samples.counts
        for d, here in enumerate(counts):
            for e, there in enumerate(counts[: d + 1]):
                product = self._of(y, d) @ self._of(y, e).mT
                product *= self._of(x, d) @ self._of(x, e).mT
                product *= factor[d] * factor[e]
                self.gram[d, e] += product.sum() / (here * there)
                if d == e:
                    by_sequence = self._within[d] @ product @ self._within[d].mT
                    self.square[d] += by_sequence.diagonal()
                    self.dot[d] += by_sequence.sum(1)


def drift(rows, k, x, counts, offsets, factor, own, moments):
    """(entries, 3 + domains) of a module: energy, largest eigenvalue and effective rank of W C W^T.

    C is the second moment on the ``own`` domain of each entry of the module (a tensor of the
    device); then of every domain the median over channels of the mean squared output over
    ``moments``, where that is positive: numpy (domains, d_out). NaN where there is none.
    """
    moments = torch.from_numpy(moments)
    used = [row.nonzero()[:, 0].to(x.device, non_blocking=True) for row in moments > 0]
    moments = moments.to(x.device, non_blocking=True)
    first, last = rows.bounds[k : k + 2]
    out = rows.relative.new_zeros((last - first, 3 + len(counts)))
    for a, b in _pieces(rows, k, max(*x.shape, rows.of(k, "u").shape[1])):
        here = slice(a - first, b - first)
        zero = rows.first[first]
        seen = _projected(rows, k, "v", x, a, b) * _sigma(rows, a, b)[:, :, None]
        inner = torch.stack([
            (p := seen[:, :, at : at + t]) @ p.mT * (f * f / t)
            for at, t, f in zip(offsets, counts, factor, strict=True)
        ])  # fmt: skip  # (domains, entries, height, height)
        mine = inner[own[here], torch.arange(b - a, device=x.device)]
        values = torch.linalg.eigvalsh(mine).clamp(min=0.0)
        energy = values.sum(1)
        share = values / torch.where(energy > 0, energy, 1.0)[:, None]
        entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum(1)
        out[here, 0], out[here, 1] = energy, values[:, -1]
        out[here, 2] = torch.where(energy > 0, entropy.exp(), 0.0)
        u = rows.of(k, "u")[rows.first[a] - zero : rows.first[b] - zero].double()
        u = rows.by_entry(u, a, b)
        for d, columns in enumerate(used):
            channels = ((inner[d] @ u) * u).sum(1)[:, columns] / moments[d, columns]
            out[here, 3 + d] = _median(channels)
    return out


def _median(x):
    """Of each row, as numpy's: the mean of the two in the middle."""
    count = x.shape[1]
    if count == 0:
        return x.new_full((len(x),), torch.nan)
    ordered = x.sort(dim=1).values
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def shifts(rows, k, entries, x, y):
    """1 - CKA of the outputs y (T, d_out) and y + x W^T of some entries of a module; (entries,).

    x (T, d_in) and y are padded to the widths of the rows. T is 4 or more. As ``_Base.shift`` of
    ``features.drift``, which says why it is not the difference of two nearly equal numbers.
    """
    y = y - y.mean(0)
    gram = _u_centred((y @ y.mT)[None])[0]
    square = gram.square().sum()
    found = rows.relative.new_full((len(entries),), torch.nan)
    place = {e: n for n, e in enumerate(entries)}
    for a, b in _pieces(rows, k, max(*x.shape, y.shape[1]), len(x) ** 2):
        chosen = [e for e in range(a, b) if e in place]
        if not chosen:
            continue
        at = sent([e - a for e in chosen], x.device)
        p = (_projected(rows, k, "v", x, a, b) * _sigma(rows, a, b)[:, :, None])[at]
        p = p - p.mean(2, keepdim=True)
        moved = _projected(rows, k, "u", y, a, b)[at]
        cross = moved.mT @ p
        change = _u_centred(cross + cross.mT + p.mT @ p)
        size = (gram + change).square().sum((1, 2))
        along = (gram * change).sum((1, 2)) / square
        cosine = (1 + along) * (square / size).sqrt()
        sine = (change - along[:, None, None] * gram).square().sum((1, 2)) / size / (1 + cosine)
        value = torch.where(cosine <= 0, 1 - cosine, sine)
        value = torch.where((square > 0) & (size > 0), value, torch.nan)
        found[sent([place[e] for e in chosen], x.device)] = value
    return found


def _u_centred(gram):
    """(n, T, T) U-centred (Szekely and Rizzo 2014): their inner products are unbiased HSIC."""
    t = gram.shape[1]
    gram = gram.clone()
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(1) / (t - 2)
    gram += (rows.sum(1) / (t - 1))[:, None, None] - rows[:, :, None] - rows[:, None, :]
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram
