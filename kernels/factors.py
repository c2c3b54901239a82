"""Canonical forms of sums of deltas on a device, numpy arrays in and out: what merges end with.

Stacks of up to 64 rows go to `canonical_batch`. Higher ones, of many adapters, are the same steps
by matrix products and torch.linalg in float64, all sums of one shape at a time.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import _canonical_torch, products
from .canonical import REPAIR, _factorise, _times_power, canonical_batch
from .products import download, together, upload

__all__ = ["Form", "canonical_forms"]
SHORT = 64  # rows of a stack that the kernels of canonical_batch hold in registers
GROUP_BYTES = 1 << 28  # of float64 rows that are stacked at a time; 3 to 4 times that with results
MATRICES = 32  # r x r matrices of an entry that live at the same time, at most


class Form(NamedTuple):
    """The canonical form of one sum: what it is asked for, and its whole spectrum.

    ``status`` as in `CanonicalBatch`; left (p, k) and right (k, q) are those of ``scaled``, else
    rows (k, p) and (k, q).
    """

    sigma: np.ndarray  # float64 (min(rows, p, q),), descending
    rank: int  # by the rule of canonical_batch
    status: int
    left: np.ndarray
    right: np.ndarray


def canonical_forms(device, sums, relative, noise, choose, *, scaled):
    """The canonical form of every ``sum_i scale_i B_i A_i``: a list of `Form`.

    Args:
        sums: of each the list of ((B (p, r_i), its dtype), (A (r_i, q), its dtype), scale_i), as
            they are stored: numpy, BF16 as uint16.
        relative, noise: the rank rule of `canonical_batch`.
        choose: (sum, sigma, rank) -> how many components to hand over, at most ``rank``.
        scaled: left times sigma and right, in float32; else both as orthonormal rows, float64.

    The host waits three times for every GROUP_BYTES: which to repair, spectra, results.
    """
    heights = [sum(a.shape[0] for _, (a, _), _ in parts) for parts in sums]
    shapes = [(parts[0][0][0].shape[0], parts[0][1][0].shape[1]) if parts else (0, 0)
              for parts in sums]  # fmt: skip
    forms = [None] * len(sums)
    for which in _groups(heights, shapes):
        make = _tall if heights[which[0]] > SHORT else _short
        raw = _Parts.of_all(device, [sums[e] for e in which])
        there, *found, rows = make(device, raw, relative, noise)
        sigma, rank, status = (download(device, x) for x in (there, *found))
        spectra = [sigma[n, : min(heights[e], *shapes[e])].copy() for n, e in enumerate(which)]
        kept = [
            0 if status[n] else min(choose(e, spectra[n], int(rank[n])), int(rank[n]))
            for n, e in enumerate(which)
        ]
        pieces = []
        for n, k in enumerate(kept):
            left, right = rows(n, k)
            if scaled:
                left, right = (left * there[n, :k, None]).T.float(), right.float()
            pieces += [left, right]
        found = iter(together(device, pieces))
        for n, e in enumerate(which):
            forms[e] = Form(spectra[n], int(rank[n]), int(status[n]), next(found), next(found))
    for e, form in enumerate(forms):
        if form is None:  # no rows at all
            (p, q), kind = shapes[e], np.float32 if scaled else np.float64
            left = np.zeros((p, 0) if scaled else (0, p), kind)
            forms[e] = Form(np.zeros(0), 0, 0, left, np.zeros((0, q), kind))
    return forms


class _Parts(NamedTuple):
    """The parts of one sum on the device, by rows: of B^T (r_i, p) and of A (r_i, q)."""

    u: list
    v: list
    scales: list

    @classmethod
    def of_all(cls, device, sums):
        """Of every sum; all factors travel in one copy."""
        having = [[part for part in parts if part[1][0].shape[0]] for parts in sums]
        factors = [x for parts in having for b, a, _ in parts for x in (b, a)]
        there = iter(products.upload_all(device, factors))
        made = []
        for parts in having:
            pairs = [(next(there).mT, next(there)) for _ in parts]
            scales = [float(scale) for _, _, scale in parts]
            made.append(cls([u for u, _ in pairs], [v for _, v in pairs], scales))
        return made

    @property
    def top(self):
        """The largest scale: set aside, so that squares stay in range."""
        return max(map(abs, self.scales))

    def stacked(self):
        """Rows of both sides in float64, the scales over the largest in those of U."""
        top = self.top or 1.0
        u = [x.double() * (s / top) for x, s in zip(self.u, self.scales, strict=True)]
        return torch.cat(u), torch.cat([x.double() for x in self.v])


def _short(device, sums, relative, noise):
    """(sigma, rank, status, rows) of stacks that fit the kernels: rows(n, k) are on the device."""
    one = [len(s.u) == 1 for s in sums]  # as it is stored, where there is nothing to stack
    stacks = [
        (s.u[0], s.v[0]) if alone else s.stacked() for s, alone in zip(sums, one, strict=True)
    ]
    scale = [s.scales[0] if alone else s.top for s, alone in zip(sums, one, strict=True)]
    batch = canonical_batch(
        [u for u, _ in stacks], [v for _, v in stacks], scale=scale, relative=relative,
        noise=noise, dtype=torch.float64,
    )  # fmt: skip
    widths = [(u.shape[1], v.shape[1]) for u, v in stacks]

    def rows(n, k):
        return (batch.view(n, side)[:k, :d] for side, d in zip("uv", widths[n], strict=True))

    return batch.sigma, batch.rank, batch.status, rows


def _tall(device, sums, relative, noise):
    """The same of stacks of one shape that are higher: matrix products and torch.linalg."""
    sides = [torch.stack(x) for x in zip(*(s.stacked() for s in sums), strict=True)]
    top = upload(device, np.array([s.top for s in sums], np.float64))
    exponent = 0
    for n, x in enumerate(sides):
        most = x.abs().amax((1, 2))
        e = torch.where(most.isfinite() & (most > 0), torch.frexp(most)[1], 0)
        sides[n] = _times_power(x, -e[:, None, None])
        exponent = exponent + e
    stacks = [_Stack(x) for x in sides]
    sigma, rank, status, turned = _factorise(_Library, stacks, top, exponent, relative, noise)

    def rows(n, k):
        return (t[n, :k] @ x[n] for t, x in zip(turned, sides, strict=True))

    return sigma, rank, status, rows


class _Stack:
    """A side of entries of one shape, (n, r, d): what `_factorise` asks of one."""

    def __init__(self, rows):
        self._rows = rows

    def gram(self, which=None, transform=None):
        x = self._rows
        if which is not None:
            x = transform @ x[which.to(x.device, non_blocking=True)]
        return x @ x.mT


class _Library:
    """The small matrices of `_factorise` by torch.linalg; for any height."""

    svd = staticmethod(_canonical_torch.svd)

    @staticmethod
    def cholesky(gram):
        """As `_canonical_torch.cholesky`, whose r steps are taken only where pivots are needed.

        Where the inverse of the equilibrated factor is below 1 / REPAIR, no residual of any order
        of pivots is below REPAIR^2: nothing is dependent, and every order spans the same rows.
        """
        length = gram.diagonal(dim1=1, dim2=2).sqrt()
        live = length > 0
        unit = torch.where(live, length, 1.0)
        equal = gram / unit[:, :, None] / unit[:, None, :]
        equal.diagonal(dim1=1, dim2=2).fill_(1.0)
        low, failed = torch.linalg.cholesky_ex(equal)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(low, eye.expand_as(low), upper=False)
        sound = (failed == 0) & (inverse.square().sum((1, 2)) < REPAIR**-2)
        there = live[:, :, None] & live[:, None, :]
        # torch.linalg gives matrices by columns.
        transform = torch.where(there, inverse / unit[:, None, :], 0.0).contiguous()
        coordinates = torch.where(there, low * unit[:, :, None], 0.0).contiguous()
        least = sound.to(gram.dtype)
        at = (~sound).nonzero().flatten()
        if len(at):
            transform[at], coordinates[at], least[at] = _canonical_torch.cholesky(gram[at])
        return transform, coordinates, least


def _groups(heights, shapes):
    """Lists of sums that are computed together: short ones in turn, tall ones of one shape."""
    short, tall = [], {}
    for e, height in enumerate(heights):
        if 0 < height <= SHORT:
            short.append(e)
        elif height:
            tall.setdefault((height, shapes[e]), []).append(e)
    for which in (short, *tall.values()):
        group, size = [], 0
        for e in which:
            needed = 8 * heights[e] * sum(shapes[e])
            if heights[e] > SHORT:
                needed += 8 * MATRICES * heights[e] ** 2
            if group and size + needed > GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(e)
            size += needed
        if group:
            yield group
