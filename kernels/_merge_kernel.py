"""Device code of P2: one tile of the merged delta, all adapters, and where it goes."""

import triton
import triton.language as tl

from ._delta_tile import delta_tile, draws, not_finite

# Columns of the tables per adapter, which the kernels read by number.
WHOLE = ("first", "last", "fisher_first", "fisher_last", "limit", "keys")  # int64; keys to the end
REAL = ("scale", "fisher_scale", "weight", "low", "high", "rescale")  # float32


@triton.jit
def kept_tile(
    b_x,
    b_y,
    p_w,
    p_r,
    p_limits,
    o_i,
    o_j,
    m,
    d_in,
    KEEP: tl.constexpr,
    HIGH: tl.constexpr,
    ONE_KEY: tl.constexpr,
):
    """b_y where the rule keeps the entry b_x of one delta, 0 elsewhere."""
    if KEEP == "magnitude":
        b_size = tl.abs(b_x)
        dropped = b_size < tl.load(p_r + 3)
        if HIGH:
            dropped = dropped | (b_size > tl.load(p_r + 4))
        b_y = tl.where(dropped, 0.0, b_y)
    elif KEEP == "random":
        b_hash = draws(p_w + 5, o_i, o_j, m, d_in, ONE_KEY=ONE_KEY)
        b_y = tl.where(b_hash.to(tl.int64) < tl.load(p_w + 4), b_y, 0.0)
    elif KEEP == "della":
        b_hash = draws(p_w + 5, o_i, o_j, m, d_in, ONE_KEY=ONE_KEY)
        b_limit = tl.load(p_limits, mask=m, other=0)
        b_y = tl.where(b_hash.to(tl.int64) < b_limit, b_y, 0.0)
    return b_y


@triton.jit(do_not_specialize=["n", "first_row", "last_row"])
def merge_kernel(
    p_u,
    p_v,
    p_f_u,
    p_f_v,
    p_m_u,
    p_m_v,
    p_whole,
    p_real,
    p_limits,
    p_base,
    p_out,
    p_status,
    p_squares,
    n,
    first_row,
    last_row,
    d_in,
    tiles_j,
    minus_rows,
    s_u,
    s_v,
    s_f_u,
    s_f_v,
    s_m_u,
    s_m_v,
    s_base_i,
    s_base_j,
    s_out_i,
    s_out_j,
    WHOLE_COLUMNS: tl.constexpr,
    REAL_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    HIGH: tl.constexpr,
    RESCALE: tl.constexpr,
    COMBINE: tl.constexpr,
    FREQUENCY: tl.constexpr,
    ELECT_WEIGHTED: tl.constexpr,
    ZERO_SIGN: tl.constexpr,
    DIVIDE: tl.constexpr,
    ONE_KEY: tl.constexpr,
    RANK_STEP: tl.constexpr,
    FISHER_STEP: tl.constexpr,
    MINUS_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Merged rows [first_row, last_row): row 0 of base, limits and out is first_row.

    p_status: [merged entries not finite, sums not finite in the type of out]. p_squares: the
    squares of a tile, at the tile's number.
    """
    program = tl.program_id(0)
    # Tiles lie on multiples of the block: the packed factors are padded to those.
    i_tile = first_row // BLOCK_I + program // tiles_j
    j_tile = program % tiles_j
    o_i = i_tile.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = j_tile.to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i = (o_i >= first_row) & (o_i < last_row)
    m = m_i[:, None] & (o_j < d_in)[None, :]
    o_row = o_i - first_row

    b_zero = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    # For "ties" of the positive entries; "down" are the negative ones, for when those are elected:
    # every delta is rebuilt once.
    b_total, b_divisor = b_zero, b_zero
    b_down, b_divisor_down, b_balance = b_zero, b_zero, b_zero
    for i in range(0, n):
        p_w = p_whole + i * WHOLE_COLUMNS
        p_r = p_real + i * REAL_COLUMNS
        b_x = delta_tile(
            p_u, p_v, tl.load(p_w), tl.load(p_w + 1), tl.load(p_r), o_i, o_j, s_u, s_v,
            BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=RANK_STEP,
        )  # fmt: skip
        p_limit = p_limits
        if KEEP == "della":
            rows = (last_row - first_row).to(tl.int64)
            p_limit = p_limits + i * rows * d_in + o_row[:, None] * d_in + o_j[None, :]
        b_y = b_x
        if RESCALE:
            b_y = b_x * tl.load(p_r + 5)
        b_x = kept_tile(
            b_x, b_y, p_w, p_r, p_limit, o_i, o_j, m, d_in,
            KEEP=KEEP, HIGH=HIGH, ONE_KEY=ONE_KEY,
        )  # fmt: skip
        weight = tl.load(p_r + 2)
        if COMBINE == "sum":
            b_total += weight * b_x
        elif COMBINE == "ties":
            b_wx = weight * b_x
            b_e = b_wx if ELECT_WEIGHTED else b_x
            up, down = b_e > 0.0, b_e < 0.0
            if FREQUENCY:
                b_balance += tl.where(up, 1.0, tl.where(down, -1.0, 0.0))
            else:
                b_balance += b_e
            b_total += tl.where(up, b_wx, 0.0)
            b_down += tl.where(down, b_wx, 0.0)
            if DIVIDE == "count":
                b_divisor += tl.where(up, 1.0, 0.0)
                b_divisor_down += tl.where(down, 1.0, 0.0)
            elif DIVIDE == "weights":
                b_divisor += tl.where(up, weight, 0.0)
                b_divisor_down += tl.where(down, weight, 0.0)
        else:
            b_f = delta_tile(
                p_f_u, p_f_v, tl.load(p_w + 2), tl.load(p_w + 3), tl.load(p_r + 1),
                o_i, o_j, s_f_u, s_f_v, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=FISHER_STEP,
            )  # fmt: skip
            b_wf = weight * (b_f + tl.load(p_real + n * REAL_COLUMNS + 1))
            b_total += b_wf * b_x
            b_divisor += b_wf

    # Divisions are rounded as IEEE has it; `/` is not.
    if COMBINE == "ties":
        up = (b_balance > 0.0) | ((b_balance == 0.0) & (ZERO_SIGN == 1))
        down = (b_balance < 0.0) | ((b_balance == 0.0) & (ZERO_SIGN == -1))
        b_total = tl.where(up, b_total, tl.where(down, b_down, 0.0))
        b_divisor = tl.where(up, b_divisor, tl.where(down, b_divisor_down, 0.0))
        if DIVIDE == "count":
            b_total = tl.div_rn(b_total, tl.where(b_divisor > 1.0, b_divisor, 1.0))
        elif DIVIDE == "weights":
            b_total = tl.div_rn(b_total, tl.where(tl.abs(b_divisor) < 1e-8, 1.0, b_divisor))
    elif COMBINE == "fisher":
        some = tl.abs(b_divisor) > 0.0
        b_total = tl.where(some, tl.div_rn(b_total, tl.where(some, b_divisor, 1.0)), 0.0)
    elif DIVIDE == "weights":
        b_total = tl.div_rn(b_total, b_zero + tl.load(p_real + n * REAL_COLUMNS))
    if p_m_u is not None:
        b_total -= delta_tile(
            p_m_u, p_m_v, 0, minus_rows, 1.0, o_i, o_j, s_m_u, s_m_v,
            BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=MINUS_STEP,
        )  # fmt: skip

    b_total = tl.where(m, b_total, 0.0)
    if tl.max(tl.max(not_finite(b_total), axis=1), axis=0) > 0:
        tl.store(p_status, 1)  # every program writes the same
    if p_squares is not None:
        b_wide = b_total.to(tl.float64)
        tl.store(p_squares + program, tl.sum(tl.sum(b_wide * b_wide, axis=1), axis=0))
    p_o = p_out + o_row[:, None] * s_out_i + o_j[None, :] * s_out_j
    if p_base is not None:
        b_base = tl.load(
            p_base + o_row[:, None] * s_base_i + o_j[None, :] * s_base_j, mask=m, other=0.0
        )
        if p_base.dtype.element_ty == tl.float16:
            # One rounding: in float32 the sum would be rounded before.
            b_sum = b_base.to(tl.float64) + b_total.to(tl.float64)
        else:
            b_sum = b_base.to(tl.float32) + b_total
        b_sum = b_sum.to(p_out.dtype.element_ty)
        # A weight without an update keeps its bits: -0 + 0 is 0.
        b_sum = tl.where(b_total == 0.0, b_base, b_sum)
        if tl.max(tl.max(not_finite(b_sum.to(tl.float32)), axis=1), axis=0) > 0:
            tl.store(p_status + 1, 1)
        tl.store(p_o, b_sum, mask=m)
    else:
        tl.store(p_o, b_total, mask=m)
