"""Matrix products and decompositions of numpy arrays on a device; see factors.py.

All in float64: such products depend on no setting of torch, and have the rate of those in float32
on the devices this is for. Nothing larger than arguments and results is made.
"""

import math

import numpy as np
import torch

_NUMPY = {"f": torch.float32, "d": torch.float64, "e": torch.float16, "h": torch.int16,
          "H": torch.int16, "B": torch.uint8, "l": torch.int64}  # fmt: skip
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
           "F64": torch.float64}  # fmt: skip
_ALIGN = 16  # bytes; loads of 16 for every dtype


def upload(device, array, dtype=None):
    """A numpy array on the device; ``dtype`` "BF16": its bits. Nothing waits."""
    host = torch.empty(
        array.shape, dtype=torch.int16 if dtype == "BF16" else _NUMPY[array.dtype.char],
        pin_memory=device.copies is not None,
    )  # fmt: skip
    host.numpy()[...] = array.view(np.int16) if dtype == "BF16" else array
    # Page-locked memory of torch's own is not given to anybody else before the copy is made.
    there = host.to(device.torch, non_blocking=True)
    return there.view(torch.bfloat16) if dtype == "BF16" else there


def download(device, tensor):
    """The tensor as a numpy array of its own; waits for it."""
    return device.download(tensor.contiguous())().copy()


def upload_all(device, arrays):
    """Tensors of (array, dtype), in one copy; dtypes are "F32", "BF16", "F16" and "F64"."""
    ends = np.cumsum([0, *(-(-x.nbytes // _ALIGN) * _ALIGN for x, _ in arrays)]).tolist()
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.copies is not None)
    flat = host.numpy()
    for (x, _), start in zip(arrays, ends[:-1], strict=True):
        flat[start : start + x.nbytes].view(x.dtype).reshape(x.shape)[...] = x
    there = host.to(device.torch, non_blocking=True)
    if device.copies is None:
        there = there.clone()
    return [
        there[start : start + x.nbytes].view(_STORED[dtype]).view(x.shape)
        for (x, dtype), start in zip(arrays, ends[:-1], strict=True)
    ]


def together(device, tensors):
    """All of them (of one dtype) as numpy arrays, in one copy."""
    if not tensors:
        return []
    flat = device.download(torch.cat([x.reshape(-1) for x in tensors]))()
    ends = np.cumsum([0, *(math.prod(x.shape) for x in tensors)])
    return [
        flat[a:b].reshape(tuple(x.shape)).copy()
        for x, a, b in zip(tensors, ends[:-1], ends[1:], strict=True)
    ]


def dot(device, x, y):
    """x @ y in float64."""
    return download(device, _wide(device, x) @ _wide(device, y))


def gram(device, x):
    """x @ x.T in float64."""
    x = _wide(device, x)
    return download(device, x @ x.mT)


def eigh(device, x):
    """Ascending eigenvalues and vectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(_wide(device, x))
    return download(device, values), download(device, vectors)


def qr(device, x):
    """The reduced QR decomposition."""
    return tuple(download(device, part) for part in torch.linalg.qr(_wide(device, x)))


def triangles(device, matrices):
    """R of the QR decomposition of each matrix; those of one shape are one batch."""
    by_shape, out = {}, [None] * len(matrices)
    for n, x in enumerate(matrices):
        by_shape.setdefault(x.shape, []).append(n)
    for which in by_shape.values():
        stack = torch.stack([_wide(device, matrices[n]) for n in which])
        found = download(device, torch.linalg.qr(stack, mode="r").R)
        for n, r in zip(which, found, strict=True):
            out[n] = r
    return out


class Rows:
    """A matrix X (n, d) in the dtype it came in, that others are multiplied with."""

    def __init__(self, device, x):
        self._device, self._x = device, upload(device, x)

    def seen(self, rows):
        """rows X^T."""
        return download(self._device, _wide(self._device, rows) @ self._x.double().mT)

    def applied(self, columns):
        """X columns."""
        return download(self._device, self._x.double() @ _wide(self._device, columns))

    def combined(self, columns):
        """X^T columns."""
        return download(self._device, self._x.double().mT @ _wide(self._device, columns))

    def gram(self):
        """X X^T: a `Symmetric`."""
        x = self._x.double()
        return Symmetric(self._device, x @ x.mT)

    def transposed_gram(self, which):
        """X^T X over the rows where ``which`` (numpy, bool) is true."""
        x = self._x[_places(self._device, which)].double()
        return Symmetric(self._device, x.mT @ x)


class Metric:
    """``S = I + off Z^T Z`` of `merging.activation`, Z (T, d) float64 on the device.

    Memory: 8 T d bytes, and 8 min(T, d)^2 from the first solve on; three times the latter then.
    """

    def __init__(self, device, shape, off):
        self._device, self._off = device, off
        self._z = torch.empty(shape, dtype=torch.float64, device=device.torch)
        self._by_samples = shape[0] <= shape[1]
        self._factor = None

    def put(self, rows, x, factor):
        """Those rows of Z: the samples x (float32) times ``factor``, one for every column."""
        torch.mul(
            upload(self._device, np.asarray(x, np.float32)), upload(self._device, factor),
            out=self._z[rows],
        )  # fmt: skip

    def seen(self, rows):
        """rows Z^T."""
        return download(self._device, _wide(self._device, rows) @ self._z.mT)

    def solve(self, own, diag):
        """x = (off own Z + diag) S^-1 and x Z^T; None where S is singular."""
        own, diag = _wide(self._device, own), _wide(self._device, diag)
        if self._factor is None and not self._factorised():
            return None
        if self._by_samples:
            change = self._solved(own - diag @ self._z.mT)
            x, seen = diag + self._off * (change @ self._z), own - change
        else:
            x = self._solved(self._off * (own @ self._z) + diag)
            seen = x @ self._z.mT
        return download(self._device, x), download(self._device, seen)

    def _factorised(self):
        z = self._z if self._by_samples else self._z.mT
        k = z @ z.mT
        k.mul_(self._off).diagonal().add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(k)
        if int(failed):
            return False
        self._factor = factor
        return True

    def _solved(self, right):
        return torch.cholesky_solve(right.mT, self._factor).mT


class Symmetric:
    """A symmetric matrix (n, n) that stays on the device."""

    def __init__(self, device, values):
        self._device, self._values = device, values

    def __len__(self):
        return len(self._values)

    def restricted(self, which):
        """The rows and columns where ``which`` (numpy, bool) is true."""
        at = _places(self._device, which)
        return Symmetric(self._device, self._values[at][:, at])

    def trace(self):
        return float(self._values.trace())

    def eigh(self):
        """As the function."""
        values, vectors = torch.linalg.eigh(self._values)
        return download(self._device, values), download(self._device, vectors)

    def operator(self):
        """For scipy's iterative solvers: products are made here, one wait for each."""
        from scipy.sparse.linalg import LinearOperator

        def matvec(x):
            there = upload(self._device, np.ascontiguousarray(x, np.float64).reshape(-1))
            return download(self._device, self._values @ there)

        return LinearOperator(tuple(self._values.shape), matvec=matvec, dtype=np.float64)


def _places(device, which):
    return upload(device, np.flatnonzero(which).astype(np.int64))


def _wide(device, x):
    """float64 on the device; what is narrower is widened there."""
    return upload(device, np.asarray(x)).double()
