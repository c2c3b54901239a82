"""Device code of P2 that ends in numbers: the entries of one module's deltas, and what they are."""

import triton
import triton.language as tl

from ._delta_tile import delta_tile, factor_row, not_finite


@triton.jit
def row_squares_kernel(p_rows, p_out, p_bad, d, BLOCK: tl.constexpr):
    """Program i writes the sum of squares of row i of a factor, float64, of its float32 elements.

    p_rows: as :func:`._delta_tile.factor_row` has them.
    """
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    b_bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, d, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b = factor_row(p_rows, i_row, o, o < d, BLOCK=BLOCK)
        b_bad |= not_finite(b)
        b_wide = b.to(tl.float64)
        b_sum += b_wide * b_wide
    if tl.max(b_bad, axis=0) > 0:  # whoever notes it writes the same
        tl.store(p_bad + tl.load(p_rows + i_row * 4 + 3), 1)
    tl.store(p_out + i_row, tl.sum(b_sum, axis=0))


@triton.jit
def entry_tile(
    p_u,
    p_v,
    p_deltas,
    p_scales,
    i,
    t,
    groups,
    panels,
    period,
    s_u,
    s_v,
    SAMPLED: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Tile t of delta i. Of a sample they go along diagonals, as csrc's entries.hpp has them.

    p_deltas: int64 (deltas, 2): first and last packed row. Outside the matrix entries are 0.
    """
    if SAMPLED:
        group = t % groups
        panel = (t + t // period) % panels
    else:
        group = t // panels
        panel = t % panels
    return delta_tile(
        p_u, p_v, tl.load(p_deltas + i * 2), tl.load(p_deltas + i * 2 + 1), tl.load(p_scales + i),
        group * BLOCK_I + tl.arange(0, BLOCK_I), panel * BLOCK_J + tl.arange(0, BLOCK_J), s_u, s_v,
        BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=RANK_STEP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile", "tiles", "groups", "panels", "period"])
def strip_kernel(
    p_u,
    p_v,
    p_deltas,
    p_scales,
    p_out,
    first_tile,
    tiles,
    groups,
    panels,
    period,
    s_u,
    s_v,
    s_entry,
    s_delta,
    SAMPLED: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Program (tile, delta), tiles first, writes one tile of a strip of them.

    Entry e of delta i goes to ``e * s_entry + i * s_delta``.
    """
    here = (tl.program_id(0) % tiles).to(tl.int64)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    b_x = entry_tile(
        p_u, p_v, p_deltas, p_scales, i, here + first_tile, groups, panels, period, s_u, s_v,
        SAMPLED=SAMPLED, RANK_STEP=RANK_STEP, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J,
    )  # fmt: skip
    o = tl.arange(0, BLOCK_I)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    o_e = here * (BLOCK_I * BLOCK_J) + o
    tl.store(p_out + o_e * s_entry + i * s_delta, b_x)


@triton.jit(do_not_specialize=["tiles", "programs", "groups", "panels", "period"])
def moments_kernel(
    p_u,
    p_v,
    p_deltas,
    p_scales,
    p_thresholds,
    p_out,
    tiles,
    programs,
    groups,
    panels,
    period,
    s_u,
    s_v,
    SAMPLED: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (strip, delta), strips first, writes six float64 numbers of TILES tiles of a delta.

    Sums of |x|, x^2, x^4 and of x^2 over the top entries, in float32 over TILES terms; how many are
    not 0, and how many top: |x| >= threshold and not 0.
    """
    strip = (tl.program_id(0) % programs).to(tl.int64)
    i = (tl.program_id(0) // programs).to(tl.int64)
    least = tl.load(p_thresholds + i)
    b_l1 = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_squares = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_fourths = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_top_squares = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_some = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    b_top = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for t in range(strip * TILES, tl.minimum(strip * TILES + TILES, tiles)):
        b_x = entry_tile(
            p_u, p_v, p_deltas, p_scales, i, tl.cast(t, tl.int64), groups, panels, period, s_u, s_v,
            SAMPLED=SAMPLED, RANK_STEP=RANK_STEP, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J,
        )  # fmt: skip
        b_size = tl.abs(b_x)
        b_square = b_x * b_x
        m_top = (b_size >= least) & (b_x != 0)
        b_l1 += b_size
        b_squares += b_square
        b_fourths += b_square * b_square
        b_top_squares += tl.where(m_top, b_square, 0.0)
        b_some += (b_x != 0).to(tl.int32)
        b_top += m_top.to(tl.int32)
    p_o = p_out + tl.program_id(0).to(tl.int64) * 6
    tl.store(p_o, total(b_l1.to(tl.float64)))
    tl.store(p_o + 1, total(b_squares.to(tl.float64)))
    tl.store(p_o + 2, total(b_fourths.to(tl.float64)))
    tl.store(p_o + 3, total(b_top_squares.to(tl.float64)))
    tl.store(p_o + 4, total(b_some).to(tl.float64))
    tl.store(p_o + 5, total(b_top).to(tl.float64))


@triton.jit
def total(b):
    return tl.sum(tl.sum(b, axis=1), axis=0)
