"""Device code of P2: sums over what a rule keeps of each delta."""

import triton
import triton.language as tl

from ._delta_tile import delta_tile
from ._merge_kernel import kept_tile


@triton.jit(do_not_specialize=["first_row", "last_row"])
def norms_kernel(
    p_u,
    p_v,
    p_whole,
    p_real,
    p_limits,
    p_out,
    first_row,
    last_row,
    d_in,
    tiles_j,
    s_u,
    s_v,
    WHOLE_COLUMNS: tl.constexpr,
    REAL_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    HIGH: tl.constexpr,
    ONE_KEY: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Program (tile, i) writes seven float64 numbers of a tile of delta i, in the order of Norms.

    p_out: (deltas, tiles, 7). Rows are [first_row, last_row), row 0 of p_limits is first_row.
    """
    program = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    i_tile = first_row // BLOCK_I + program // tiles_j
    j_tile = program % tiles_j
    o_i = i_tile.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = j_tile.to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i = (o_i >= first_row) & (o_i < last_row)
    m = m_i[:, None] & (o_j < d_in)[None, :]
    p_w = p_whole + i * WHOLE_COLUMNS
    p_r = p_real + i * REAL_COLUMNS
    b_x = delta_tile(
        p_u, p_v, tl.load(p_w), tl.load(p_w + 1), tl.load(p_r), o_i, o_j, s_u, s_v,
        BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=RANK_STEP,
    )  # fmt: skip
    b_x = tl.where(m, b_x, 0.0)
    p_limit = p_limits
    if KEEP == "della":
        rows = last_row - first_row
        p_limit = p_limits + i * rows * d_in + (o_i - first_row)[:, None] * d_in + o_j[None, :]
    # A mark, not what is left: a zero may survive too.
    b_mark = kept_tile(
        b_x, tl.full((BLOCK_I, BLOCK_J), 1.0, tl.float32), p_w, p_r, p_limit, o_i, o_j, m, d_in,
        KEEP=KEEP, HIGH=HIGH, ONE_KEY=ONE_KEY,
    )  # fmt: skip
    b_mark = tl.where(m, b_mark, 0.0).to(tl.float64)
    b_size = tl.abs(b_x).to(tl.float64)
    b_rest = b_size * b_mark
    p_o = p_out + (i * tl.num_programs(0) + program) * 7
    tl.store(p_o, tl.sum(tl.sum(b_size, axis=1), axis=0))
    tl.store(p_o + 1, tl.sum(tl.sum(b_rest, axis=1), axis=0))
    tl.store(p_o + 2, tl.sum(tl.sum(b_size * b_size, axis=1), axis=0))
    tl.store(p_o + 3, tl.sum(tl.sum(b_rest * b_rest, axis=1), axis=0))
    tl.store(p_o + 4, tl.max(tl.max(b_size, axis=1), axis=0))
    tl.store(p_o + 5, tl.max(tl.max(b_rest, axis=1), axis=0))
    tl.store(p_o + 6, tl.sum(tl.sum(b_mark, axis=1), axis=0))
