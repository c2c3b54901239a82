"""Arrays on a device that numpy's own functions take (NEP 13 and 18): code for numpy runs there.

What has a twin in torch is in `_array_functions.py`, with numpy's dtypes and its rules for NaN.
Anything else raises TypeError and names itself; nothing comes to the host unless `download` is
called, and nothing waits for the device before that.
"""

import numpy as np
import torch

from . import _array_functions as functions
from ._array_functions import DTYPES, TORCH, unmapped

__all__ = ["DeviceArray", "Elementwise", "upload"]


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A tensor of bool, int64, float32 or float64 that behaves like a numpy array.

    ``np.zeros(n, like=x)``, ``np.asarray(host, like=x)`` and the like make more on x's device.
    """

    __slots__ = ("tensor",)
    elementwise = False

    def __init__(self, tensor):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"there are no arrays of {tensor.dtype} on a device")
        self.tensor = tensor

    dtype = property(lambda self: DTYPES[self.tensor.dtype])
    shape = property(lambda self: tuple(self.tensor.shape))
    ndim = property(lambda self: self.tensor.ndim)
    size = property(lambda self: self.tensor.numel())

    def __len__(self):
        return len(self.tensor)

    def __repr__(self):
        return f"{type(self).__name__}({self.shape}, {self.dtype}, {self.tensor.device})"

    def __iter__(self):
        if self.ndim < 2:
            raise unmapped("iterating over values")
        return (type(self)(row) for row in self.tensor)

    def __array__(self, dtype=None, copy=None):
        raise unmapped("turning it into an array of numpy")

    def __bool__(self):
        raise unmapped("the truth of an array")

    __hash__ = None

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        if method != "__call__":
            raise unmapped(f"numpy.{ufunc.__name__}.{method}")
        if options:
            raise unmapped(f"numpy.{ufunc.__name__} with {', '.join(options)}")
        found = functions.call(ufunc, inputs)
        if not out:
            return type(self)(found)
        [into] = out
        if not isinstance(into, DeviceArray) or not np.can_cast(
            DTYPES[found.dtype], into.dtype, "same_kind"
        ):
            raise unmapped(f"numpy.{ufunc.__name__} into such an array")
        if into.tensor.shape != found.shape:
            raise ValueError(f"{tuple(found.shape)} does not fit into {into.shape}")
        into.tensor.copy_(found)
        return into

    def __iadd__(self, other):
        found = self._in_place("add_", other)
        return super().__iadd__(other) if found is None else found

    def __imul__(self, other):
        found = self._in_place("mul_", other)
        return super().__imul__(other) if found is None else found

    def _in_place(self, name, other):
        """The sums of a pass, where `out` would write them twice; None: not that simple."""
        if isinstance(other, DeviceArray) and other.dtype == self.dtype and self.dtype != bool:
            getattr(self.tensor, name)(other.tensor)
            return self
        return None

    def __array_function__(self, function, types, arguments, options):
        name = function.__name__
        known = functions.ELEMENTWISE if self.elementwise else functions.FUNCTIONS
        if function not in known:
            raise unmapped(f"numpy.{name}")
        return known[function](self, *arguments, **options)

    def __getitem__(self, key):
        return type(self)(self.tensor[_index(key)])

    def __setitem__(self, key, value):
        if isinstance(value, DeviceArray):
            value = value.tensor
        elif not isinstance(value, (bool, int, float)):
            raise unmapped(f"storing a {type(value).__name__}")
        self.tensor[_index(key)] = value

    def astype(self, dtype, copy=True):
        """As numpy's."""
        if np.dtype(dtype) not in TORCH:
            raise unmapped(f"an array of {np.dtype(dtype)}")
        return type(self)(self.tensor.to(TORCH[np.dtype(dtype)], copy=copy))

    def copy(self):
        """As numpy's."""
        return type(self)(self.tensor.clone())

    def reshape(self, *shape):
        """As numpy's."""
        return type(self)(self.tensor.reshape(*shape))

    def ravel(self):
        """As numpy's."""
        return self.reshape(-1)

    def sum(self, axis=None):
        """As numpy's, as the others: of one axis."""
        return np.sum(self, axis=axis)

    def mean(self, axis=None):
        return np.mean(self, axis=axis)

    def max(self, axis=None):
        return np.max(self, axis=axis)

    def min(self, axis=None):
        return np.min(self, axis=axis)

    def any(self, axis=None):
        return np.any(self, axis=axis)

    def all(self, axis=None):
        return np.all(self, axis=axis)

    def clip(self, low=None, high=None):
        return np.clip(self, low, high)

    def download(self):
        """The values as an array of numpy. Waits for the device."""
        return self.tensor.cpu().numpy()

    def each_alone(self):
        """The same memory as :class:`Elementwise`."""
        return Elementwise(self.tensor)

    def together(self):
        """The same memory as a plain DeviceArray."""
        return DeviceArray(self.tensor)


class Elementwise(DeviceArray):
    """A DeviceArray (..., pairs) whose pairs do not see each other: their axis, the last, can be
    neither indexed nor reduced nor moved. So it does not matter how many are computed at once.
    """

    __slots__ = ()
    elementwise = True

    def __getitem__(self, key):
        if not isinstance(key, (int, slice)) or self.ndim < 2:
            raise unmapped("taking some of the pairs")
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        raise unmapped("storing some of the pairs")

    def reshape(self, *shape):
        raise unmapped("reshape")


def upload(host, device):
    """The values of a numpy array as a tensor there; the array may change at once.

    Not waited for: what is not page-locked is copied before the call returns.
    """
    return torch.from_numpy(np.array(host, order="C")).to(device, non_blocking=True)


def _index(key):
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(_index_part(x) for x in parts)


def _index_part(x):
    if isinstance(x, DeviceArray) and x.dtype == np.int64:
        return x.tensor
    if (isinstance(x, (int, slice)) and not isinstance(x, bool)) or x is None or x is Ellipsis:
        return x
    raise unmapped(f"an index of {x.dtype if hasattr(x, 'dtype') else type(x).__name__}")
