"""Canonical form in plain torch: any device, dtype and rank. See canonical.py."""

import torch

from ._canonical_entries import RANK, D

# Residual of an equilibrated row below which it is taken as dependent: the square is what the
# float64 Gram resolves, the root (1e-7) is the rounding of float32 factors.
DEPENDENT = 1e-14
SLAB = 2**23  # float64 elements of factors that are widened at a time: 64 MiB

LEAST_HEIGHT, MOST_HEIGHT = 4, 2**31  # ranks are padded to a power of two in between


class Side:
    """The rows of one side of some `Entries`, of at most ``height`` rows each."""

    def __init__(self, entries, height):
        self.entries, self.height = entries, height

    def gram(self, which=None, transform=None):
        """(n, height, height) float64: X X^T of every entry, or of ``transform`` X of ``which``."""
        which = torch.arange(len(self.entries)) if which is None else which
        shape = (len(which), self.height, self.height)
        out = torch.empty(shape, dtype=torch.float64, device=self.entries.device)
        for places, slab in self._slabs(which):
            if transform is not None:
                slab = transform[places] @ slab
            out[places] = slab @ slab.mT
        return out

    def write(self, transform, kept, out, starts, widths):
        """``transform`` X to ``out`` (1-D): row a of entry e at starts[e] + a * widths[e].

        Rows from ``kept[e]`` on, and columns that X lacks, are zeros.
        """
        rows = torch.arange(self.height, device=out.device)
        starts, widths = starts.tolist(), widths.tolist()
        for places, slab in self._slabs(torch.arange(len(self.entries))):
            keep = rows < kept[places, None]
            made = torch.where(keep[:, :, None], transform[places] @ slab, 0.0)
            for x, e in zip(made, places, strict=True):
                rank, d = self.entries.table[e, (RANK, D)].tolist()
                to = out[starts[e] : starts[e] + rank * widths[e]].view(rank, widths[e])
                to[:, :d] = x[:rank, :d]
                to[:, d:] = 0

    def _slabs(self, which):
        """(places in ``which``, (m, height, d) float64), zero padded, of entries alike in d."""
        d = self.entries.d[which]
        order = d.argsort().tolist()
        while order:
            few = []
            for place in order:  # the last is the widest
                if few and (len(few) + 1) * self.height * int(d[place]) > SLAB:
                    break
                few.append(place)
            order = order[len(few) :]
            shape = (len(few), self.height, int(d[few[-1]]))
            slab = torch.zeros(shape, dtype=torch.float64, device=self.entries.device)
            for to, place in zip(slab, few, strict=True):
                x = self.entries.view(int(which[place]))
                to[: x.shape[0], : x.shape[1]] = x
            yield few, slab


def cholesky(gram):
    """Column-equilibrated, diagonally pivoted Cholesky; dependent rows end it.

    Args:
        gram: (n, r, r) float64 of rows X, zero rows anywhere.

    Returns:
        transform (n, r, r) with Q = transform X orthonormal, rows past the rank zero; coordinates
        (n, r, r) with X = coordinates Q; and (n,) the least diagonal element, 1 where there is
        none: its inverse estimates the condition of the equilibrated rows.
    """
    n, r, _ = gram.shape
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    live = length > 0
    unit = torch.where(live, length, 1.0)
    residual = torch.where(live, 1.0, -1.0).to(gram.dtype)  # -1: done
    limit = DEPENDENT * live.sum(1)
    low, transform = torch.zeros_like(gram), torch.zeros_like(gram)
    least = torch.ones(n, dtype=gram.dtype, device=gram.device)
    for k in range(r):
        top, pivot = residual.max(1, keepdim=True)
        going = top > limit[:, None]
        diagonal = torch.where(going, top, 1.0).sqrt()
        least = torch.where(going, torch.minimum(least[:, None], diagonal), least[:, None])[:, 0]
        here = torch.zeros_like(live).scatter_(1, pivot, True)
        todo = (residual > -0.5) & ~here
        at = pivot[:, :, None].expand(n, 1, r)
        row = low.gather(1, at)
        solved = (here.to(gram.dtype) - (row @ transform)[:, 0]) / diagonal
        column = gram.gather(1, at)[:, 0] / unit / unit.gather(1, pivot)
        column = (column - (low @ row.mT)[:, :, 0]) / diagonal
        column = torch.where(here, diagonal, torch.where(todo, column, 0.0))
        low[:, :, k] = torch.where(going, column, 0.0)
        transform[:, k] = torch.where(going, solved, 0.0)
        residual = torch.where(todo, residual - low[:, :, k].square(), -1.0)
    return transform / unit[:, None, :], low * length[:, :, None], least


def svd(core, with_right=True):
    """(left, sigma, right, converged) of (n, r, r): columns of left and right are the vectors.

    Without ``with_right``, left and right are None.
    """
    converged = torch.ones(len(core), dtype=torch.bool, device=core.device)
    if not with_right:
        return None, torch.linalg.svdvals(core), None, converged
    try:
        left, sigma, right = torch.linalg.svd(core)
    except torch.linalg.LinAlgError:  # which does not say of which entries
        if len(core) == 1:
            return core, core.new_zeros(core.shape[:2]), core, ~converged
        parts = [svd(one) for one in core.split(1)]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))
    return left, sigma, right.mT, converged
