"""Block Hadamard-Gram on the GPU: what is launched, and how. Derivation: README.md."""

import contextlib

import torch

from . import _arguments, _configs
from ._tiles import cut, cut_rows

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise RuntimeError("the Triton backend needs the package triton, which is missing") from error

from ._fold import fold_arguments, fold_kernel
from ._gram_tile import block_gram_kernel

INTERPRETED = not isinstance(block_gram_kernel, triton.JITFunction)
TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def block_gram(
    U,
    V,
    offsets,
    U2=None,
    V2=None,
    offsets2=None,
    scale=None,
    scale2=None,
    reduce="both",
    accumulate="fp32",
    precision="highest",
    out=None,
):
    """`scale_i scale2_j (U U2^T) * (V V2^T)` summed over segments: float64, on the device of U.

    U (R, p) and V (R, q) have any strides; `offsets` (N + 1) bounds the segments of their rows. The
    second stack (U2, V2, offsets2) is the first one when it is not given; then only half of the
    tiles are computed. `reduce` sums both sides (N, M), columns only (R, M) or nothing (R, R2).
    bf16 and fp16 are read exactly. `precision` is about fp32 factors: "highest" is good to
    2**-20 per product, "high" rounds them to tf32 (2**-10). `accumulate="fp64"` is exact to
    float64 rounding for every dtype.
    """
    first, second = _arguments.check(
        U, V, offsets, U2, V2, offsets2, scale, scale2, reduce, accumulate, precision
    )
    other = second or first
    n_i = first.count if reduce == "both" else first.rows
    n_j = other.rows if reduce == "none" else other.count
    out = _arguments.output(out, (n_i, n_j), U.device)
    on_device = device_guard(U.device)
    if out.numel() == 0 or first.rows == 0 or other.rows == 0:
        return out.zero_()
    with on_device:
        config = _choose(first, second, reduce, accumulate, precision)
        for kernel, grid, arguments in launches(first, second, reduce, accumulate, config, out):
            kernel[grid](**arguments)
    return out


def launches(first, second, reduce, accumulate, config, out):
    """What `block_gram` runs, in order, as (kernel, grid, arguments by name)."""
    symmetric = second is None
    other = first if symmetric else second
    tiles_j = cut_rows(other.rows, config.block)
    if reduce != "none":
        tiles_j = cut(other.bounds, config.block)
    tiles_i = tiles_j
    if not symmetric:
        both = reduce == "both"
        tiles_i = cut(first.bounds, config.block) if both else cut_rows(first.rows, config.block)
    U, U2 = _pack(first.U, other.U, tiles_i, tiles_j)
    V, V2 = _pack(first.V, other.V, tiles_i, tiles_j)
    device = U.device
    rows_i, parts_i, owner_i, parts_of_i = tiles_i.tables(device)
    rows_j, parts_j, owner_j, parts_of_j = tiles_j.tables(device)
    if reduce == "columns":
        parts_of_i = None

    acc = torch.float64 if accumulate == "fp64" else torch.float32
    n_i = first.rows if parts_of_i is None else len(tiles_i.part_rows)
    n_j = other.rows if parts_of_j is None else len(tiles_j.part_rows)
    partial = torch.empty((n_i, n_j), dtype=acc, device=device)
    programs = tiles_i.count * tiles_j.count
    if symmetric:
        programs = tiles_i.count * (tiles_i.count + 1) // 2
    if programs >= 2**31:
        raise ValueError(f"U has too many rows for one launch: {programs} tile pairs")
    yield (
        block_gram_kernel,
        (programs,),
        dict(
            p_u=U,
            p_v=V,
            p_u2=U2,
            p_v2=V2,
            p_rows_i=rows_i,
            p_parts_i=parts_i,
            p_part_of_row_i=owner_i,
            p_rows_j=rows_j,
            p_parts_j=parts_j,
            p_part_of_row_j=owner_j,
            p_out=partial,
            n_tiles_i=tiles_i.count,
            n_tiles_j=tiles_j.count,
            R=first.rows,
            R2=other.rows,
            K_U=U.shape[1],
            K_V=V.shape[1],
            s_u_row=U.stride(0),
            s_u_k=U.stride(1),
            s_v_row=V.stride(0),
            s_v_k=V.stride(1),
            s_u2_row=U2.stride(0),
            s_u2_k=U2.stride(1),
            s_v2_row=V2.stride(0),
            s_v2_k=V2.stride(1),
            s_out=partial.stride(0),
            SYMMETRIC=symmetric,
            REDUCE=reduce,
            CHUNK_I=tiles_i.chunk,
            CHUNK_J=tiles_j.chunk,
            ALIGN_I=tiles_i.align,
            ALIGN_J=tiles_j.align,
            UNIFORM=tiles_i.uniform and tiles_j.uniform,
            PARTS_J=tiles_j.most_parts,
            DOT_U=dot_dtype(U, U2, acc),
            DOT_V=dot_dtype(V, V2, acc),
            ACC=TRITON_DTYPE[acc],
            PRECISION=config.precision,
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            GROUP=config.group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
            enable_fp_fusion=True,  # the default, and so the bits, change with Triton 3.10
        ),
    )
    scales = (
        first.scale if reduce == "both" else first.scale_of_rows(),
        other.scale_of_rows() if reduce == "none" else other.scale,
    )
    mirror = symmetric and reduce != "columns"
    yield fold_kernel, *fold_arguments(partial, out, (parts_of_i, parts_of_j), scales, mirror)


def _pack(x, y, tiles_x, tiles_y):
    """Both operands of one Gram, copied only where the kernel would have to load single elements.

    Loads are 16 bytes wide when rows, or columns with aligned tiles, lie a multiple of 16 elements
    apart. Anything else is copied once, k-contiguous and padded with zero columns: it is read again
    by every tile pair.
    """
    ragged = x.shape[1] % 16 != 0

    def packed(x, align):
        row, k = x.stride()
        by_row = k == 1 and row % 16 == 0
        by_column = row == 1 and k % 16 == 0 and x.shape[0] % 16 == 0 and align >= 8
        if x.data_ptr() % 16 == 0 and not ragged and (by_row or by_column):
            return x
        copy = x.new_zeros(x.shape[0], -(-x.shape[1] // 16) * 16)
        copy[:, : x.shape[1]] = x
        return copy

    first = packed(x, tiles_x.align)
    return first, (first if y is x else packed(y, tiles_y.align))


def dot_dtype(x, y, acc):
    """What the tensor cores take for operands of two tensors."""
    if acc == torch.float64:
        return tl.float64
    # The interpreter holds bf16 as integers and would multiply their bit patterns.
    return tl.float32 if INTERPRETED else TRITON_DTYPE[torch.promote_types(x.dtype, y.dtype)]


def device_guard(device):
    """The context of a launch on `device`; RuntimeError where there is none."""
    if INTERPRETED:
        return contextlib.nullcontext()
    if not torch.cuda.is_available():
        raise RuntimeError(
            "the Triton backend needs a CUDA device, and torch sees none "
            "(TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU for tests)"
        )
    if device.type != "cuda":
        raise ValueError(f"U must be on a CUDA device, got {device}")
    return torch.cuda.device(device)


def _choose(first, second, reduce, accumulate, precision):
    if INTERPRETED:
        return _configs.INTERPRETER
    other = second or first
    kind = kind_of(((first.U, other.U), (first.V, other.V)), accumulate, precision)

    def tile_pairs(block):
        pairs = -(-first.rows // block) * -(-other.rows // block)
        return pairs if second is not None else pairs / 2

    device = torch.cuda.get_device_properties(first.U.device)
    capability = (device.major, device.minor)
    return _configs.choose(kind, reduce, tile_pairs, capability, device.multi_processor_count)


def kind_of(operands, accumulate, precision):
    """The key of the launch tables: "fp64", "half", or the precision of fp32."""
    if accumulate == "fp64":
        return "fp64"
    dtypes = [torch.promote_types(x.dtype, y.dtype) for x, y in operands]
    return "half" if all(x in (torch.float16, torch.bfloat16) for x in dtypes) else precision
