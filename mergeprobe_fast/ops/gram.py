"""P1, the block Hadamard-Gram: checks and dispatch."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import BackendError, InputError
from mergeprobe_fast.ops import reference
from mergeprobe_fast.ops.device import Precision

log = logging.getLogger("mergeprobe_fast")
_said: set[str] = set()

Backend = Literal["auto", "cpu", "triton", "reference"]


def block_gram(
    U: Any,
    V: Any,
    offsets: Any,
    U2: Any = None,
    V2: Any = None,
    offsets2: Any = None,
    scale: Any = None,
    scale2: Any = None,
    *,
    reduce: Literal["both", "columns", "none"] = "both",
    accumulate: Literal["fp32", "fp64"] = "fp32",
    precision: Precision = "highest",
    threads: int | None = None,
    backend: Backend = "auto",
) -> Any:
    """``P[i,j] = s_i s_j sum over a in i, b in j of (U U2^T)[a,b] * (V V2^T)[a,b]``.

    With ``U`` the stacked rows of every B transposed and ``V`` the stacked rows of every A, this is
    the N x N Gram matrix of the deltas ``s B A``; the (R, R) Grams exist only tile by tile.

    Args:
        U: (R, p), V: (R, q); torch tensors or numpy arrays of float32, bfloat16, float16 (or
            float64, which needs ``accumulate="fp64"``), any strides, read in place. A transposed
            view of B (d_out, r) is as fast as a copy.
        offsets: (N + 1,) integers, where each block of rows starts; blocks may be empty.
        U2, V2, offsets2: a second stack; without it the result is symmetric and costs half.
        scale, scale2: (N,) and (M,), applied last, so that bf16 factors are read exactly.
            Without a second stack ``scale2`` must be None.
        reduce: "both" gives (N, M); "columns" sums only within the second stack's blocks, (R, M);
            "none" gives the Hadamard product of the two Grams itself, (R, R2).
        accumulate: "fp64" multiplies and sums in float64 (products of float32 are exact there): for
            distances of near-duplicates, leverage, or a Gram that will be inverted.
        precision: of products of float32 on a CUDA device: "highest" is good to 2^-20 of each, by
            three products in tf32, "high" to 2^-10, by one. The CPU has float32 itself.
        threads: default, the cores this process may use. The result does not depend on it.
        backend: "auto" takes "triton" for CUDA tensors, else "cpu"; a name never falls back.

    Returns:
        float64, a numpy array for numpy input and a torch tensor on the same device for torch.

    Raises:
        InputError: an argument of the wrong kind, dtype or shape; the message names it.
        BackendError: the backend asked for is not available here.
    """
    _one_of(reduce, ("both", "columns", "none"), "reduce")
    _one_of(accumulate, ("fp32", "fp64"), "accumulate")
    _one_of(precision, ("highest", "high"), "precision")
    threads = _env.threads_or_default(threads)
    first = _Stack(U, V, offsets, scale, "")
    second = None
    if U2 is None and V2 is None and offsets2 is None:
        if scale2 is not None:
            raise InputError("given without a second stack", key="scale2")
    elif U2 is None or V2 is None or offsets2 is None:
        raise InputError("a second stack needs all of U2, V2 and offsets2", key="U2")
    else:
        second = _Stack(U2, V2, offsets2, scale2, "2")
        for name, x, other in (("U2", U2, U), ("V2", V2, V)):
            if x.shape[1] != other.shape[1]:
                raise InputError(
                    f"expected {other.shape[1]} columns like {name[0]}, got {x.shape[1]}", key=name
                )
    if accumulate == "fp32":
        for name, x in (("U", U), ("V", V), ("U2", U2), ("V2", V2)):
            if x is not None and _dtype(x) == "float64":
                raise InputError("float64 input needs accumulate='fp64'", key=name)

    chosen = _choose(backend, U)
    other = second or first
    stacks = (U, V, first.bounds, U2, V2, None if second is None else second.bounds)
    if chosen == "triton":
        own_scale = None if second is None else second.scale
        return _triton(
            *stacks, first.scale, own_scale, reduce=reduce, accumulate=accumulate,
            precision=precision,
        )  # fmt: skip
    if chosen == "reference":
        result = reference.block_gram(*stacks, first.scale, other.scale, reduce)
    else:
        result = _cpu(stacks, reduce, accumulate == "fp64", threads)
        if first.scale is not None or other.scale is not None:
            # One product of the two scales, so that a symmetric result stays exactly symmetric.
            result *= np.outer(
                first.factors(per_row=reduce != "both"), other.factors(per_row=reduce == "none")
            )
    if hasattr(U, "detach"):
        import torch

        return torch.from_numpy(result).to(U.device)
    return result


class _Stack:
    """One checked stack of rows; ``suffix`` is "" or "2", as in the arguments' names."""

    def __init__(self, U: Any, V: Any, offsets: Any, scale: Any, suffix: str) -> None:
        u, v = f"U{suffix}", f"V{suffix}"
        self.rows = _rows(U, u)
        if _rows(V, v) != self.rows:
            got = f", got {V.shape[0]}" if not suffix else ""
            raise InputError(f"expected {self.rows} rows like {u}{got}", key=v)
        self.bounds = _bounds(offsets, self.rows, f"offsets{suffix}")
        self.scale = _scale(scale, len(self.bounds) - 1, f"scale{suffix}")

    def factors(self, *, per_row: bool) -> np.ndarray:
        """The scale of each block, or of each row."""
        scale = np.ones(len(self.bounds) - 1) if self.scale is None else self.scale
        return np.repeat(scale, np.diff(self.bounds)) if per_row else scale


def _cpu(stacks: tuple[Any, ...], reduce: str, fp64: bool, threads: int) -> np.ndarray:
    U, _, bounds, U2, _, bounds2 = stacks
    last, rows2 = (bounds, len(U)) if bounds2 is None else (bounds2, len(U2))
    out = np.empty(
        (
            len(bounds) - 1 if reduce == "both" else len(U),
            rows2 if reduce == "none" else len(last) - 1,
        )
    )
    # DLPack refuses tensors that require grad.
    plain = (x.detach() if getattr(x, "requires_grad", False) else x for x in stacks)
    try:
        _native.core().block_gram(*plain, reduce, fp64, threads, _native.isa(), 0, out)
    except (ValueError, TypeError) as error:
        raise InputError(str(error).splitlines()[0]) from None
    return out


def _triton(U: Any, *arguments: Any, **options: Any) -> Any:
    if not hasattr(U, "detach"):
        raise InputError("backend 'triton' needs torch tensors", key="U")
    try:
        from mergeprobe_fast.kernels.gram import block_gram as kernel

        return kernel(U, *arguments, **options)
    except (ImportError, RuntimeError) as error:
        if type(error) is not RuntimeError and not isinstance(error, ImportError):
            raise  # torch's own: the device is there, and out of memory, or failed
        raise BackendError(f"backend 'triton' is not available: {error}") from error


def _choose(backend: str, U: Any) -> str:
    on_gpu = getattr(getattr(U, "device", None), "type", "cpu") == "cuda"
    if backend == "auto":
        chosen = "triton" if on_gpu else "cpu"
        if chosen not in _said:
            _said.add(chosen)
            where = "on a CUDA device" if on_gpu else f"on the CPU, {_native.isa()}"
            log.info("block_gram: backend %s (input %s)", chosen, where)
        return chosen
    _one_of(backend, ("auto", "cpu", "triton", "reference"), "backend")
    if backend == "cpu" and on_gpu:
        raise BackendError("backend 'cpu' was asked for, but U lies on a CUDA device")
    return backend


def _one_of(value: Any, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        *most, last = map(repr, known)
        raise InputError(f"expected {', '.join(most)} or {last}, got {value!r}", key=name)


def _dtype(x: Any) -> str:
    """The dtype's name without its library's."""
    return str(x.dtype).rpartition(".")[2]


def _rows(x: Any, name: str) -> int:
    shape = getattr(x, "shape", None)
    if shape is None or not hasattr(x, "dtype"):
        raise InputError(
            f"expected a torch tensor or numpy array, got {type(x).__name__}", key=name
        )
    if len(shape) != 2:
        raise InputError(f"expected 2 dimensions, got {len(shape)}", key=name)
    if _dtype(x) not in ("float32", "bfloat16", "float16", "float64"):
        raise InputError("expected float32, bfloat16, float16 or float64", key=name)
    return int(shape[0])


def _bounds(offsets: Any, rows: int, name: str) -> np.ndarray:
    if hasattr(offsets, "detach"):
        offsets = offsets.detach().cpu().numpy()
    raw = np.asarray(offsets)
    if raw.ndim != 1 or raw.size == 0 or raw.dtype.kind not in "iu":
        raise InputError("expected one axis of integers, starting with 0", key=name)
    bounds = np.ascontiguousarray(raw, dtype=np.int64)
    if bounds[0] != 0 or bounds[-1] != rows or np.any(np.diff(bounds) < 0):
        raise InputError(f"must rise from 0 to the number of rows, {rows}", key=name)
    return bounds


def _scale(scale: Any, blocks: int, name: str) -> np.ndarray | None:
    if scale is None:
        return None
    values = scale.detach().cpu().numpy() if hasattr(scale, "detach") else np.asarray(scale)
    if values.dtype.kind not in "fiu":
        raise InputError(f"expected real numbers, got {values.dtype}", key=name)
    if values.shape != (blocks,):
        raise InputError(f"expected {blocks} values, got shape {values.shape}", key=name)
    return values.astype(np.float64)
