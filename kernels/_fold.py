"""Second stage of the block Gram: partial sums to scaled, mirrored float64 output."""

import triton
import triton.language as tl

from . import _configs


@triton.jit
def _parts(p_parts_of, o, m):
    if p_parts_of is None:
        b_first = o
        b_count = m.to(tl.int32)
    else:
        b_first = tl.load(p_parts_of + o, mask=m, other=0)
        b_count = tl.load(p_parts_of + o + 1, mask=m, other=0) - b_first
    return b_first, b_count


@triton.jit
def _sum_parts(
    p_partial,
    s_partial,
    s_mirrored,
    b_first_i,
    b_count_i,
    b_first_j,
    b_count_j,
    upper,
    MIRROR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # [BLOCK_I, BLOCK_J]
    b_sum = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
    most_i = tl.max(b_count_i, axis=0)
    most_j = tl.max(b_count_j, axis=0)
    if MIRROR:
        # Both (i, j) and (j, i) walk the parts of the smaller index first, so that their sums have
        # the same order and the same bits.
        most_i = tl.maximum(most_i, most_j)
        most_j = most_i
        b_first_a = tl.where(upper, b_first_i[:, None], b_first_j[None, :])
        b_first_b = tl.where(upper, b_first_j[None, :], b_first_i[:, None])
        b_count_a = tl.where(upper, b_count_i[:, None], b_count_j[None, :])
        b_count_b = tl.where(upper, b_count_j[None, :], b_count_i[:, None])
    else:
        b_first_a, b_first_b = b_first_i[:, None], b_first_j[None, :]
        b_count_a, b_count_b = b_count_i[:, None], b_count_j[None, :]
    for a in range(0, most_i):
        for b in range(0, most_j):
            o_a = b_first_a + a
            o_b = b_first_b + b
            if MIRROR:
                o_row = tl.minimum(o_a, o_b).to(tl.int64)
                o_column = tl.maximum(o_a, o_b)
            else:
                o_row, o_column = o_a.to(tl.int64), o_b
            m_part = (a < b_count_a) & (b < b_count_b)
            p_part = p_partial + o_row * s_partial + o_column
            if s_mirrored is not None:
                # A part below the diagonal is the mirrored sum of the one above.
                p_part += tl.where(upper & (o_a <= o_b), 0, s_mirrored)
            b_sum += tl.load(p_part, mask=m_part, other=0.0).to(tl.float64)
    return b_sum


@triton.jit
def fold_kernel(
    p_partial,
    s_partial,
    p_parts_of_i,
    p_parts_of_j,
    p_scale_i,
    p_scale_j,
    p_out,
    s_out_i,
    s_out_j,
    n_i,
    n_j,
    MIRROR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    blocks_j = tl.cdiv(n_j, BLOCK_J)
    o_i = (tl.program_id(0) // blocks_j) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = (tl.program_id(0) % blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i = o_i < n_i
    m_j = o_j < n_j
    b_first_i, b_count_i = _parts(p_parts_of_i, o_i, m_i)
    b_first_j, b_count_j = _parts(p_parts_of_j, o_j, m_j)

    upper = o_i[:, None] <= o_j[None, :]
    b_sum = _sum_parts(
        p_partial, s_partial, None, b_first_i, b_count_i, b_first_j, b_count_j, upper,
        MIRROR=MIRROR, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J,
    )  # fmt: skip

    # The two scales are multiplied first: that product is the same for (i, j) and (j, i).
    b_scale = tl.full((BLOCK_I, BLOCK_J), 1.0, tl.float64)
    if p_scale_i is not None:
        b_scale *= tl.load(p_scale_i + o_i, mask=m_i, other=0.0)[:, None]
    if p_scale_j is not None:
        b_scale *= tl.load(p_scale_j + o_j, mask=m_j, other=0.0)[None, :]
    b_sum *= b_scale
    p_o = p_out + o_i[:, None].to(tl.int64) * s_out_i + o_j[None, :].to(tl.int64) * s_out_j
    tl.store(p_o, b_sum, mask=m_i[:, None] & m_j[None, :])


def fold_arguments(partial, out, parts_of, scales, mirror, config=_configs.FOLD):
    """Arguments by name of the second stage. `parts_of` and `scales` hold one entry per axis;
    None means one part per row of the output, and no scale."""
    n_i, n_j = out.shape
    programs = -(-n_i // config.block_i) * -(-n_j // config.block_j)
    return (programs,), dict(
        p_partial=partial,
        s_partial=partial.stride(0),
        p_parts_of_i=parts_of[0],
        p_parts_of_j=parts_of[1],
        p_scale_i=scales[0],
        p_scale_j=scales[1],
        p_out=out,
        s_out_i=out.stride(0),
        s_out_j=out.stride(1),
        n_i=n_i,
        n_j=n_j,
        MIRROR=mirror,
        BLOCK_I=config.block_i,
        BLOCK_J=config.block_j,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
