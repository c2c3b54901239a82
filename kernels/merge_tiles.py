"""P2 on the GPU: elementwise merges of deltas that are never formed as a whole. See README.md."""

from __future__ import annotations

import contextlib

import torch

from ..errors import InputError
from ..ops.tiles import Sketch
from . import _configs
from ._deltas import DeviceDeltas, guard
from ._merge_call import MergeCall, check_matrix

OUT = (torch.float32, torch.bfloat16, torch.float16)


def merge_dense(
    factors, weights, rule, *, rows=None, out=None, base=None, fisher=None, status=None
):
    """Rows of the merged delta, or of ``base`` with it added, on the device of the factors.

    The same operations in the same order as ``ops.merge_dense``: equal bits where both have fused
    multiply-adds, for rows as for the whole.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, or :class:`DeviceDeltas`.
        weights: one per adapter, any sign, used as float32.
        rule: an ``ops.ElementwiseRule``.
        rows: (first, last), half open; default all.
        out: written and returned, any strides, (last - first, d_in): float32, or like ``base``;
            it may be ``base``, and may not overlap with it otherwise.
        base: (last - first, d_in) float32, bfloat16 or float16, any strides: the delta is added and
            the sum rounded once (bfloat16 by way of float32).
        fisher: for ``combine="fisher"``: one delta per adapter, F_i = scale_i B_i A_i.
        status: int32 (2,) zeros on the device: left for the caller to give to
            :func:`raise_for_status`, and nothing waits for the device here.

    Raises:
        InputError: arguments that do not fit, factors or results that are not finite. ``out`` is
            then written nonetheless.
        BackendError: there is no CUDA device.
    """
    call = MergeCall(factors, weights, rule, fisher)
    first, last = call.rows(rows)
    shape = (last - first, call.deltas.d_in)
    if base is not None:
        check_matrix("base", base, shape, OUT, call.device)
    dtype = torch.float32 if base is None else base.dtype
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=call.device)
    else:
        check_matrix("out", out, shape, (dtype,), call.device)
        if any(s == 0 and d > 1 for s, d in zip(out.stride(), shape, strict=True)):
            raise InputError("its entries share memory", key="out")
    if status is not None:
        check_matrix("status", status, (2,), (torch.int32,), call.device)
    found = torch.zeros(2, dtype=torch.int32, device=call.device) if status is None else status
    with guard(call.device):
        for top, end in call.pieces(first, last):
            piece = slice(top - first, end - first)
            call.launch(top, end, out[piece], found, base=None if base is None else base[piece])
    if status is None:
        raise_for_status(found)
    return out


def merge_sketch(factors, weights, rule, x, *, transpose=False, minus=None, fisher=None):
    """``y = M X``, with ``transpose`` also ``z = M^T y``, and ``||M||_F^2``, M the merged delta.

    M exists ``_configs.WORKSPACE`` bytes at a time. Products are float32 matrix products of torch,
    never tf32, added over pieces in order; the squares are float64.

    Args:
        x: float32 (d_in, l), l >= 0, on the device of the factors.
        minus: (b (d_out, k), a (k, d_in)): M is the merged delta less ``b @ a``.
        Other arguments are those of :func:`merge_dense`.

    Returns:
        ``ops.Sketch`` with tensors: y (d_out, l), z (d_in, l) or None, squares a float.
    """
    call = MergeCall(factors, weights, rule, fisher)
    d_out, d_in = call.deltas.d_out, call.deltas.d_in
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise InputError(f"expected float32 ({d_in}, l)", key="x")
    check_matrix("x", x, (d_in, x.shape[1]), (torch.float32,), call.device)
    if minus is not None:
        minus = DeviceDeltas.of([(*minus, 1.0)], "minus")
        if (minus.d_out, minus.d_in, minus.device) != (d_out, d_in, call.device):
            raise InputError(f"b and a are not {d_out} x {d_in} on {call.device}", key="minus")
    y = torch.empty((d_out, x.shape[1]), dtype=torch.float32, device=call.device)
    z = torch.zeros((d_in, x.shape[1]), dtype=torch.float32, device=call.device)
    step = max(_configs.WORKSPACE // (4 * d_in), 1)
    workspace = torch.empty((min(step, d_out), d_in), dtype=torch.float32, device=call.device)
    status = torch.zeros(2, dtype=torch.int32, device=call.device)
    squares = torch.zeros((), dtype=torch.float64, device=call.device)
    with guard(call.device), _float32_products():
        for top, end in call.pieces(0, d_out, step):
            part, m = call.squares(top, end), workspace[: end - top]
            call.launch(top, end, m, status, minus=minus, squares=part)
            squares += part.sum()
            torch.mm(m, x, out=y[top:end])
            if transpose:
                z.addmm_(m.T, y[top:end])
    raise_for_status(status)
    return Sketch(y, z if transpose else None, float(squares))


def raise_for_status(status):
    """InputError if a :func:`merge_dense` with this ``status`` met numbers that are not finite."""
    delta, total = status.tolist()
    if delta:
        raise InputError("the deltas overflow float32", key="factors")
    if total:
        raise InputError("base + update is not finite in the type of the base", key="base")


@contextlib.contextmanager
def _float32_products():
    """torch.mm in float32 as it is written, whatever the program chose for its own products."""
    flags = torch.backends.cuda.matmul
    name, plain = ("fp32_precision", "ieee") if hasattr(flags, "fp32_precision") else (
        "allow_tf32", False)  # fmt: skip
    before = getattr(flags, name)
    setattr(flags, name, plain)
    try:
        yield
    finally:
        setattr(flags, name, before)
