"""Spectra of many small float64 matrices, for `pair_angles`: Jacobi in Triton, or torch.linalg.

Both give squares, those of `Eigen` to 1e-15 of the largest, as the CPU's kernels have them.
"""

import torch

from ._canonical_torch import DEPENDENT

__all__ = ["Eigen", "Jacobi"]


class Jacobi:
    """By the kernels of the canonical form, matrices up to 64 x 64; nothing waits."""

    def __init__(self):
        from . import _canonical_triton

        self._kernels = _canonical_triton
        self.most = _canonical_triton.MOST_HEIGHT

    def height(self, size):
        """What matrices of `size` rows and columns are padded to."""
        return max(1 << (size - 1).bit_length(), self._kernels.LEAST_HEIGHT)

    def squares(self, x):
        """((n, min(m, k)), converged (n,)): squared singular values of (n, m, k), descending."""
        few, height = min(x.shape[1:]), self.height(max(x.shape[1:]))
        left, converged = self._rotated(_padded(x, height))
        squares, _ = left.square().sum(1).sort(dim=1, descending=True)
        return squares[:, :few], converged

    def left(self, x):
        """(squares (n, k), u (n, k, k), converged (n,)) of square matrices, in any order.

        Columns of u are left singular vectors, zeros where the singular value is 0.
        """
        k = x.shape[1]
        left, converged = self._rotated(_padded(x, self.height(k)))
        squares = left.square().sum(1)
        u = left / torch.where(squares > 0, squares, 1.0).sqrt()[:, None]
        return squares, u[:, :k], converged

    def root(self, x):
        """L (n, k, k) with L L^T = x, which is positive but for rounding; rows of zeros where the
        diagonal is nothing else."""
        k = x.shape[1]
        live = x.diagonal(dim1=1, dim2=2) > DEPENDENT
        x = torch.where(live[:, :, None] & live[:, None, :], x, 0.0)
        _, coordinates, _ = self._kernels.cholesky(_padded(x, self.height(k)))
        return coordinates[:, :k, :k]

    def _rotated(self, x):
        left = torch.empty_like(x)
        converged = torch.empty(len(x), dtype=torch.int32, device=x.device)
        launch = self._kernels.jacobi_launch(x, left, None, converged)
        self._kernels._run([launch], x.device)
        return left, converged.bool()


class Eigen:
    """By symmetric eigenvalues in torch.linalg: any size and device. On CUDA devices it waits."""

    most = 2**31

    def height(self, size):
        return size

    def squares(self, x):
        gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
        return torch.linalg.eigvalsh(gram).flip(1), _all(x)

    def left(self, x):
        squares, u = torch.linalg.eigh(x @ x.mT)
        return squares.clamp(min=0.0), u, _all(x)

    def root(self, x):
        values, vectors = torch.linalg.eigh(x)
        return vectors * torch.where(values > DEPENDENT, values, 0.0).sqrt()[:, None]


def _all(x):
    return torch.ones(len(x), dtype=torch.bool, device=x.device)


def _padded(x, height):
    """(n, height, height), contiguous, zeros behind."""
    n, rows, columns = x.shape
    if rows == columns == height:
        return x.contiguous()
    out = x.new_zeros((n, height, height))
    out[:, :rows, :columns] = x
    return out
