"""What numpy's functions are in torch, for `arrays.py`: the same dtypes, the same rules for NaN."""

from functools import lru_cache

import numpy as np
import torch

DTYPES = {
    torch.bool: np.dtype(bool),
    torch.int64: np.dtype(np.int64),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
TORCH = {numpy: there for there, numpy in DTYPES.items()}


def unmapped(what):
    """The TypeError of what there is no twin of."""
    return TypeError(f"{what} is not there for arrays on a device")


def call(ufunc, inputs):
    """``ufunc(*inputs)`` as a tensor."""
    if ufunc not in UFUNCS:
        raise unmapped(f"numpy.{ufunc.__name__}")
    operands, specs = [], []
    for x in inputs:
        operand, spec = _operand(x)
        operands.append(operand)
        specs.append(spec)
    inner, outer = _dtypes(ufunc, tuple(specs))
    there = TORCH[inner]
    operands = [
        x.to(there) if isinstance(x, torch.Tensor) else inner.type(x).item() for x in operands
    ]
    return UFUNCS[ufunc](*operands).to(TORCH[outer])


def _operand(x):
    """(tensor or Python number, what numpy goes by for the dtype)."""
    if isinstance(getattr(x, "tensor", None), torch.Tensor):
        return x.tensor, x.dtype
    if isinstance(x, (bool, int, float)) and not isinstance(x, np.generic):
        return x, type(x)
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0):
        if x.dtype.kind in "bif":
            return x.item(), np.dtype(x.dtype)
    if isinstance(x, np.ndarray):
        raise unmapped("an operand in the host's memory")
    raise unmapped(f"an operand of {type(x).__name__}")


@lru_cache(maxsize=1024)
def _dtypes(ufunc, specs):
    """The dtypes that numpy computes and answers in: it is asked."""
    outer = ufunc(*_empty(specs)).dtype
    inner = np.result_type(*_empty(specs))
    if outer.kind == "f" and inner.kind != "f":
        inner = outer
    if inner not in TORCH or outer not in TORCH:
        raise unmapped(f"numpy.{ufunc.__name__} of {inner}")
    return inner, outer


def _empty(specs):
    return [s(1) if isinstance(s, type) else np.empty(0, s) for s in specs]


def _of_tensors(function):
    """For functions that take no Python numbers, or round otherwise where one is given: torch on
    CUDA divides by a number by way of its reciprocal."""

    def of(a, b):
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (
            x if isinstance(x, torch.Tensor)
            else torch.full((), x, dtype=like.dtype, device=like.device)
            for x in (a, b)
        )  # fmt: skip
        return function(a, b)

    return of


def _bounded(function, clamp):
    """maximum or minimum, NaN kept: with a number one launch instead of two."""
    of_tensors = _of_tensors(function)

    def of(a, b):
        if isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and b == b:
            return clamp(a, b)
        return of_tensors(a, b)

    return of


def _sign(x):
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else x.sign()


def _power(a, b):
    if isinstance(b, int) and b < 0:
        raise ValueError("integers to negative integer powers are not allowed")
    return torch.pow(a, b)


UFUNCS = {
    np.add: lambda a, b: a + b,
    np.subtract: lambda a, b: a - b,
    np.multiply: lambda a, b: a * b,
    np.true_divide: _of_tensors(torch.true_divide),
    np.power: _power,
    np.maximum: _bounded(torch.maximum, torch.clamp_min),
    np.minimum: _bounded(torch.minimum, torch.clamp_max),
    np.fmax: _of_tensors(torch.fmax),
    np.fmin: _of_tensors(torch.fmin),
    np.hypot: _of_tensors(torch.hypot),
    np.arctan2: _of_tensors(torch.arctan2),
    np.copysign: _of_tensors(torch.copysign),
    np.greater: lambda a, b: a > b,
    np.greater_equal: lambda a, b: a >= b,
    np.less: lambda a, b: a < b,
    np.less_equal: lambda a, b: a <= b,
    np.equal: lambda a, b: a == b,
    np.not_equal: lambda a, b: a != b,
    np.bitwise_and: lambda a, b: a & b,
    np.bitwise_or: lambda a, b: a | b,
    np.bitwise_xor: lambda a, b: a ^ b,
    np.logical_and: _of_tensors(torch.logical_and),
    np.logical_or: _of_tensors(torch.logical_or),
    np.logical_xor: _of_tensors(torch.logical_xor),
    np.invert: torch.bitwise_not,
    np.logical_not: torch.logical_not,
    np.negative: torch.neg,
    np.positive: torch.clone,
    np.absolute: torch.abs,
    np.fabs: torch.abs,
    np.sign: _sign,
    np.signbit: torch.signbit,
    np.square: torch.square,
    np.sqrt: torch.sqrt,
    np.reciprocal: torch.reciprocal,
    np.exp: torch.exp,
    np.exp2: torch.exp2,
    np.expm1: torch.expm1,
    np.log: torch.log,
    np.log2: torch.log2,
    np.log10: torch.log10,
    np.log1p: torch.log1p,
    np.sin: torch.sin,
    np.cos: torch.cos,
    np.tan: torch.tan,
    np.arcsin: torch.arcsin,
    np.arccos: torch.arccos,
    np.arctan: torch.arctan,
    np.sinh: torch.sinh,
    np.cosh: torch.cosh,
    np.tanh: torch.tanh,
    np.degrees: torch.rad2deg,
    np.rad2deg: torch.rad2deg,
    np.radians: torch.deg2rad,
    np.deg2rad: torch.deg2rad,
    np.floor: torch.floor,
    np.ceil: torch.ceil,
    np.trunc: torch.trunc,
    np.rint: torch.round,
    np.isnan: torch.isnan,
    np.isinf: torch.isinf,
    np.isfinite: torch.isfinite,
}


def _values(like, *values):
    """Operands as tensors of the dtype that numpy would give an array of them all."""
    found = [_operand(v) for v in values]
    dtype = np.result_type(*_empty([spec for _, spec in found]))
    if dtype not in TORCH:
        raise unmapped(f"an array of {dtype}")
    return [
        x.to(TORCH[dtype]) if isinstance(x, torch.Tensor)
        else torch.full((), x, dtype=TORCH[dtype], device=like.tensor.device) for x, _ in found
    ]  # fmt: skip


def _where(like, condition, x=None, y=None):
    if x is None or y is None or not hasattr(condition, "tensor"):
        raise unmapped("numpy.where of such arguments")
    return type(like)(torch.where(condition.tensor.bool(), *_values(like, x, y)))


def _clip(like, a, a_min=None, a_max=None, **options):
    if options:
        raise unmapped(f"numpy.clip with {', '.join(options)}")
    a = a if a_min is None else np.maximum(a, a_min)
    return a if a_max is None else np.minimum(a, a_max)


def _stack(like, arrays, axis=0):
    parts = _values(like, *arrays)
    axis = _axis(like, axis, parts[0].ndim + 1)
    return type(like)(torch.stack(parts, axis))


def _concatenate(like, arrays, axis=0):
    parts = _values(like, *arrays)
    return type(like)(torch.cat(parts, _axis(like, axis, parts[0].ndim)))


def _axis(like, axis, ndim):
    """An axis from 0 on, which is not that of the pairs."""
    if not isinstance(axis, int):
        raise unmapped(f"axis={axis!r}")
    axis = range(ndim)[axis]
    if like.elementwise and axis == ndim - 1:
        raise unmapped("a sum over pairs, their order or the like")
    return axis


def _reduced(function, dtype=None):
    def of(like, a, axis=None, **options):
        if options:
            raise unmapped(f"a reduction with {', '.join(options)}")
        x = a.tensor
        if dtype is not None and x.dtype == torch.int64:
            x = x.to(dtype)
        return type(like)(function(x, _axis(like, axis, x.ndim)))

    return of


def _nan_to_num(like, x, copy=True, nan=0.0, posinf=None, neginf=None):
    return type(like)(torch.nan_to_num(x.tensor, nan, posinf, neginf))


def _filled(like, shape, value, dtype):
    return type(like)(
        torch.full(shape, value, dtype=TORCH[np.dtype(dtype)], device=like.tensor.device)
    )


def _full(like, shape, fill_value, dtype=None, order="C", device=None):
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    dtype = np.result_type(fill_value) if dtype is None else dtype
    return _filled(like, shape, np.dtype(dtype).type(fill_value).item(), dtype)


def _full_like(like, x, fill_value, dtype=None):
    return _full(like, x.shape, fill_value, x.dtype if dtype is None else dtype)


def _asarray(like, x, dtype=None):
    if not hasattr(x, "tensor"):
        from .arrays import upload  # which imports this file

        x = np.asarray(x, dtype)
        if x.dtype not in TORCH:
            raise unmapped(f"an array of {x.dtype}")
        return type(like)(upload(x, like.tensor.device))
    return x if dtype is None else x.astype(dtype, copy=False)


def _sort(like, x, axis=-1):
    return type(like)(torch.sort(x.tensor, _axis(like, axis, x.ndim)).values)


# What keeps pairs apart, and all.
ELEMENTWISE = {
    np.where: _where,
    np.clip: _clip,
    np.stack: _stack,
    np.nan_to_num: _nan_to_num,
    np.sum: _reduced(torch.sum),
    np.mean: _reduced(torch.mean, torch.float64),
    np.prod: _reduced(torch.prod),
    np.max: _reduced(torch.amax),
    np.min: _reduced(torch.amin),
    np.any: _reduced(torch.any),
    np.all: _reduced(torch.all),
    np.zeros_like: lambda like, x, dtype=None: _full_like(like, x, 0, dtype),
    np.ones_like: lambda like, x, dtype=None: _full_like(like, x, 1, dtype),
    np.full_like: _full_like,
    np.copy: lambda like, x: x.copy(),
    np.shape: lambda like, x: x.shape,
    np.ndim: lambda like, x: x.ndim,
}
FUNCTIONS = {
    **ELEMENTWISE,
    np.concatenate: _concatenate,
    np.sort: _sort,
    np.take: lambda like, x, indices: x[indices],
    np.asarray: _asarray,
    np.zeros: lambda like, shape, dtype=float: _full(like, shape, 0, dtype),
    np.ones: lambda like, shape, dtype=float: _full(like, shape, 1, dtype),
    np.full: _full,
    np.arange: lambda like, *a, **o: _asarray(like, np.arange(*a, **o)),
}
for one, other in (("amax", "max"), ("amin", "min")):  # names of one function since numpy 1.25
    ELEMENTWISE[getattr(np, one)] = FUNCTIONS[getattr(np, one)] = FUNCTIONS[getattr(np, other)]
