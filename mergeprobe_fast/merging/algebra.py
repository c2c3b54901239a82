"""Products and decompositions of matrices, here or on a device; float64 there, whatever came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def dot(x: np.ndarray, y: np.ndarray, device: Any = None) -> np.ndarray:
    """``x @ y``."""
    if device is None:
        return x @ y
    from mergeprobe_fast.kernels import products

    return products.dot(device, x, y)


def gram(x: np.ndarray, device: Any = None) -> np.ndarray:
    """``x @ x.T``."""
    if device is None:
        return x @ x.T
    from mergeprobe_fast.kernels import products

    return products.gram(device, x)


def eigh(x: np.ndarray, device: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues and the vectors of a symmetric matrix."""
    if device is None:
        return np.linalg.eigh(x)
    from mergeprobe_fast.kernels import products

    return products.eigh(device, x)


def qr(x: np.ndarray, device: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Reduced: Q with orthonormal columns, and R."""
    if device is None:
        return np.linalg.qr(x)
    from mergeprobe_fast.kernels import products

    return products.qr(device, x)


def triangles(matrices: Sequence[np.ndarray], device: Any = None) -> list[np.ndarray]:
    """R of the QR decomposition of each."""
    if device is None:
        return [np.linalg.qr(x, mode="r") for x in matrices]
    from mergeprobe_fast.kernels import products

    return products.triangles(device, matrices)


class Rows:
    """A matrix X (n, d) that many others are multiplied with: on a device it is sent once."""

    def __init__(self, x: np.ndarray, device: Any = None) -> None:
        self.x, self._device = x, device
        self._there: Any = None
        if device is not None:
            from mergeprobe_fast.kernels import products

            self._there = products.Rows(device, x)

    def __len__(self) -> int:
        return len(self.x)

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """``rows @ X.T``."""
        return rows @ self.x.T if self._there is None else self._there.seen(rows)

    def applied(self, columns: np.ndarray) -> np.ndarray:
        """``X @ columns``."""
        return self.x @ columns if self._there is None else self._there.applied(columns)

    def combined(self, columns: np.ndarray) -> np.ndarray:
        """``X.T @ columns``."""
        return self.x.T @ columns if self._there is None else self._there.combined(columns)

    def gram(self) -> Symmetric:
        """``X X^T``, which stays where X is."""
        return Symmetric(self.x @ self.x.T) if self._there is None else self._there.gram()

    def transposed_gram(self, which: np.ndarray) -> Symmetric:
        """``X^T X`` over the rows where ``which`` is true."""
        if self._there is not None:
            return self._there.transposed_gram(which)
        x = self.x[which]
        return Symmetric(x.T @ x)


class Symmetric:
    """A symmetric matrix; ``kernels.products`` has the same on a device."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def restricted(self, which: np.ndarray) -> Symmetric:
        """The rows and columns where ``which`` is true."""
        return Symmetric(self._values[np.ix_(which, which)])

    def trace(self) -> float:
        return float(np.trace(self._values))

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """As :func:`eigh`."""
        return np.linalg.eigh(self._values)

    def operator(self) -> Any:
        """What scipy's iterative solvers take."""
        return self._values
