"""Statistics of many pairs of deltas from their matrices of cosines. See pair_angles.py."""

import torch

# As in csrc/include/mergeprobe/angles.hpp, in its order: these of `row`, of `col`, then the rest.
PER_SIDE, COUNT = 11, 34
LEAST_SQUARE = 1e-12  # squared cosines below are not told from 0
_NOTHING = 1e-14  # of the largest square: what rounding leaves of a zero


def pair_statistics(m, n, s1, s2, k1, k2, top, choose):
    """(COUNT, pairs) float64; NaN throughout where an iteration did not converge.

    m, n: (pairs, R1, R2) cosines between left and between right singular vectors, zeros beyond the
    ranks. s1 (pairs, R1) and s2 (pairs, R2): singular values, descending, zeros beyond the ranks k1
    and k2 (pairs,), which are 1 or more. ``choose(size)``: what takes matrices of that size.
    """
    scale = torch.maximum(s1[:, 0], s2[:, 0])
    s1, s2 = s1 / scale[:, None], s2 / scale[:, None]
    out = m.new_empty((COUNT, len(m)))
    x = torch.stack([n, m])
    done = _spectra(x, s1, s2, torch.minimum(k1, k2), choose, out)
    _energies(x, s1, s2, k1, k2, top, out)
    _inner(m, n, s1, s2, out)
    done = done & _merged(x, s1, s2, choose, out)
    out[29:33] *= scale
    for first, last in ((8, 9), (19, 20), (22, 29), (33, 34)):
        out[first:last] *= scale.square()
    return torch.where(done, out, torch.nan)


def _spectra(x, s1, s2, least, choose, out):
    """Statistics 0 to 8 of both sides: of principal angles, and the aligned nuclear norm."""
    pairs, (r1, r2) = x.shape[1], x.shape[2:]
    both = torch.cat([x, s1[:, :, None] * x * s2[:, None, :]]).view(-1, r1, r2)
    squares, converged = choose(max(r1, r2)).squares(both)
    squares = squares.view(4, pairs, -1)
    valid = torch.arange(squares.shape[2], device=x.device) < least[:, None]
    square = squares[:2].clamp(0.0, 1.0)
    cosine = torch.where(valid, square, 0.0).sqrt()
    sine2 = torch.where(valid, 1.0 - square, 0.0)
    logs = torch.where(valid, square, 1.0).clamp(min=LEAST_SQUARE).log()
    last = (least - 1).expand(2, -1)[:, :, None]
    found = torch.stack([
        cosine.sum(2), cosine[:, :, 0], cosine.gather(2, last)[:, :, 0],
        torch.atan2(sine2.sqrt(), cosine).square().sum(2), sine2.sum(2),
        (2.0 * sine2 / (1.0 + cosine)).sum(2), sine2.gather(2, last)[:, :, 0], -logs.sum(2),
        squares[2:].clamp(min=0.0).sqrt().sum(2),
    ], 1)  # fmt: skip
    out[: 2 * PER_SIDE].view(2, PER_SIDE, pairs)[:, :9] = found
    return converged.view(4, pairs).all(0)


def _energies(x, s1, s2, k1, k2, top, out):
    """Sums of squared cosines: weighted, and of the `top` strongest and weakest directions."""
    pairs, few = x.shape[1], torch.minimum(k1, k2).clamp(max=top)[:, None]

    def weights(s, k):
        at = torch.arange(s.shape[1], device=s.device)
        last = (at >= k[:, None] - few) & (at < k[:, None])
        return torch.stack([torch.ones_like(s), s.square(), (at < few).to(s), last.to(s)], 1)

    # [2, pairs, 4, 4]
    sums = weights(s1, k1) @ x.square() @ weights(s2, k2).mT
    ends = torch.stack([sums[:, :, 2, 2], sums[:, :, 3, 3]], 1)
    out[: 2 * PER_SIDE].view(2, PER_SIDE, pairs)[:, 9:] = ends
    out[23:27] = torch.stack([sums[:, :, 1, 0], sums[:, :, 0, 1]], 1).view(4, pairs)


def _inner(m, n, s1, s2, out):
    """Of U_2^T W_1 V_2 and U_1^T W_2 V_1: Frobenius norms, sums of absolute entries; <W_1, W_2>."""
    one, two = s1[:, :, None], s2[:, None, :]
    out[22] = (one * m * n * two).sum((1, 2))
    for i, inner in enumerate((m.mT @ (one * n), (m * two) @ n.mT)):
        out[27 + i] = inner.square().sum((1, 2))
        out[29 + i] = inner.abs().sum((1, 2))


def _merged(x, s1, s2, choose, out):
    """Of the sum W_1 + W_2: its largest singular value, their sum, and what both agree on.

    With Q orthonormal and spanning U_1 and U_2, rows of [1 0; M^T L], L L^T = 1 - M^T M, are their
    vectors in that basis; V alike. The SVD of the sum is that of a (R1 + R2) square core.
    """
    pairs, (r1, r2) = x.shape[1], x.shape[2:]
    k = r1 + r2
    gram = torch.eye(r2, dtype=x.dtype, device=x.device) - x.mT @ x
    basis = x.new_zeros((2, pairs, k, k))
    basis[:, :, :r1, :r1].diagonal(dim1=2, dim2=3).fill_(1.0)
    basis[:, :, r1:, :r1] = x.mT
    basis[:, :, r1:, r1:] = choose(r2).root(gram.view(-1, r2, r2)).view_as(gram)
    sigma = torch.cat([s1, s2], 1)[:, :, None]
    right, left = basis
    squares, u, converged = choose(k).left(left.mT @ (sigma * right))
    energy = (sigma * left @ u).square().sum(1)
    largest = squares.amax(1)
    out[31] = largest.sqrt()
    out[32] = torch.where(squares > _NOTHING * largest[:, None], squares, 0.0).sqrt().sum(1)
    out[33] = ((squares - energy) / 2).clamp(min=0.0).sum(1)
    return converged
