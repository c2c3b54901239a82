"""P1, the block Hadamard-Gram: checks and dispatch."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import BackendError, InputError
from mergeprobe_fast.ops import reference

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
    threads: int | None = None,
    backend: Backend = "auto",
) -> Any:
    """``P[i,j] = s_i s_j sum over a in i, b in j of (U U2^T)[a,b] * (V V2^T)[a,b]``.

    With ``U`` the stacked rows of every B transposed and ``V`` the stacked rows of every A, this is
    the N x N Gram matrix of the deltas ``s B A``; the (R, R) Grams exist only tile by tile.
    CATALOGUE.md, section 7 (P1, P1a, P1r, P1t).

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
        threads: default, the cores this process may use. The result does not depend on it.
        backend: "auto" takes "triton" for CUDA tensors, else "cpu"; a name never falls back.

    Returns:
        float64, a numpy array for numpy input and a torch tensor on the same device for torch.

    Raises:
        InputError: an argument of the wrong kind, dtype or shape; the message names it.
        BackendError: the backend asked for is not available here.
    """
    if reduce not in ("both", "columns", "none"):
        raise InputError(f"expected 'both', 'columns' or 'none', got {reduce!r}", key="reduce")
    if accumulate not in ("fp32", "fp64"):
        raise InputError(f"expected 'fp32' or 'fp64', got {accumulate!r}", key="accumulate")
    second = (U2, V2, offsets2)
    if any(x is None for x in second) and any(x is not None for x in second):
        raise InputError("a second stack needs all of U2, V2 and offsets2", key="U2")
    if U2 is None and scale2 is not None:
        raise InputError("given without a second stack", key="scale2")
    threads = _env.threads_or_default(threads)
    bounds = _bounds(offsets, _rows(U, "U"), "offsets")
    if _rows(V, "V") != _rows(U, "U"):
        raise InputError(f"expected {_rows(U, 'U')} rows like U, got {_rows(V, 'V')}", key="V")
    bounds2 = None
    if U2 is not None:
        bounds2 = _bounds(offsets2, _rows(U2, "U2"), "offsets2")
        if _rows(V2, "V2") != _rows(U2, "U2"):
            raise InputError(f"expected {_rows(U2, 'U2')} rows like U2", key="V2")
        for name, x, other in (("U2", U2, U), ("V2", V2, V)):
            if x.shape[1] != other.shape[1]:
                raise InputError(
                    f"expected {other.shape[1]} columns like {name[0]}, got {x.shape[1]}", key=name
                )
    if accumulate == "fp32" and any(str(x.dtype).endswith("float64") for x in (U, V)):
        raise InputError("float64 input needs accumulate='fp64'", key="U")
    scales = _scale(scale, len(bounds) - 1, "scale")
    scales2 = scales if U2 is None else _scale(scale2, len(bounds2) - 1, "scale2")

    chosen = _choose(backend, U)
    if chosen == "reference":
        result = reference.block_gram(U, V, bounds, U2, V2, bounds2, scales, scales2, reduce)
    elif chosen == "triton":
        return _triton(
            U, V, bounds, U2, V2, bounds2, scales, None if U2 is None else scales2,
            reduce=reduce, accumulate=accumulate,
        )  # fmt: skip
    else:
        result = _cpu(U, V, bounds, U2, V2, bounds2, reduce, accumulate == "fp64", threads)
        _apply_scale(result, bounds, scales, rows_reduced=reduce == "both", axis=0)
        columns = bounds if bounds2 is None else bounds2
        _apply_scale(result, columns, scales2, rows_reduced=reduce != "none", axis=1)
    if hasattr(U, "detach"):
        import torch

        return torch.from_numpy(result).to(U.device)
    return result


def _cpu(
    U: Any, V: Any, bounds: np.ndarray, U2: Any, V2: Any, bounds2: np.ndarray | None,
    reduce: str, fp64: bool, threads: int,
) -> np.ndarray:  # fmt: skip
    last, rows2 = (bounds, len(U)) if bounds2 is None else (bounds2, len(U2))
    shape = (
        len(bounds) - 1 if reduce == "both" else len(U),
        rows2 if reduce == "none" else len(last) - 1,
    )
    out = np.empty(shape)
    stacks = (
        x.detach() if getattr(x, "requires_grad", False) else x for x in (U, V, U2, V2)
    )  # DLPack refuses tensors that require grad
    u, v, u2, v2 = stacks
    try:
        _native.core().block_gram(
            u, v, bounds, u2, v2, bounds2, reduce, fp64, threads, _native.isa(), 0, out
        )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    return out


def _triton(U: Any, *arguments: Any, **options: Any) -> Any:
    if not hasattr(U, "detach"):
        raise InputError("backend 'triton' needs torch tensors", key="U")
    try:
        from mergeprobe_fast.kernels.gram import block_gram as kernel

        return kernel(U, *arguments, **options)
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"backend 'triton' is not available: {error}") from error


def _apply_scale(
    result: np.ndarray, bounds: np.ndarray, scale: np.ndarray | None, *, rows_reduced: bool,
    axis: int,
) -> None:  # fmt: skip
    if scale is None:
        return
    factor = scale if rows_reduced else np.repeat(scale, np.diff(bounds))
    result *= factor[:, None] if axis == 0 else factor[None, :]


def _choose(backend: str, U: Any) -> str:
    on_gpu = getattr(getattr(U, "device", None), "type", "cpu") == "cuda"
    if backend == "auto":
        chosen = "triton" if on_gpu else "cpu"
        if chosen not in _said:
            _said.add(chosen)
            where = "on a CUDA device" if on_gpu else f"on the CPU, {_native.isa()}"
            log.info("block_gram: backend %s (input %s)", chosen, where)
        return chosen
    if backend not in ("cpu", "triton", "reference"):
        raise InputError(
            f"expected 'auto', 'cpu', 'triton' or 'reference', got {backend!r}", key="backend"
        )
    if backend == "cpu" and on_gpu:
        raise BackendError("backend 'cpu' was asked for, but U lies on a CUDA device")
    return backend


def _rows(x: Any, name: str) -> int:
    shape = getattr(x, "shape", None)
    if shape is None or not hasattr(x, "dtype"):
        raise InputError(
            f"expected a torch tensor or numpy array, got {type(x).__name__}", key=name
        )
    if len(shape) != 2:
        raise InputError(f"expected 2 dimensions, got {len(shape)}", key=name)
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
    values = reference.float64(scale)
    if values.shape != (blocks,):
        raise InputError(f"expected {blocks} values, got shape {values.shape}", key=name)
    return values
