"""Device code of P2: one pass of the search for order statistics of |x|."""

import triton
import triton.language as tl

from ._delta_tile import delta_tile


@triton.jit(do_not_specialize=["tiles_j"])
def order_kernel(
    p_u,
    p_v,
    p_deltas,
    p_scales,
    p_searches,
    p_above,
    p_bins,
    d_out,
    d_in,
    tiles_j,
    s_u,
    s_v,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TILES: tl.constexpr,
):
    """Counts of one delta's entries, by key: the bits of |x|, in the order of |x|.

    p_deltas: int64 (deltas, 4): first and last packed row, first and last search. p_searches: int64
    (searches, 3): first and last key of the range, and the bits that a bin spans. Keys above the
    range count in p_above (searches, SLOTS), those within in p_bins (searches, BINS). All are
    integers: the order in which programs add them does not matter.
    """
    strips = tl.cdiv(tiles_j, TILES)
    i_delta = tl.program_id(1)
    i_tile = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    slot = tl.program_id(0) % SLOTS
    first = tl.load(p_deltas + i_delta * 4)
    last = tl.load(p_deltas + i_delta * 4 + 1)
    first_search = tl.load(p_deltas + i_delta * 4 + 2).to(tl.int32)
    last_search = tl.load(p_deltas + i_delta * 4 + 3).to(tl.int32)
    scale = tl.load(p_scales + i_delta)
    o_i = i_tile.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    for j_tile in range(strip * TILES, tl.minimum(strip * TILES + TILES, tiles_j)):
        o_j = tl.cast(j_tile, tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
        m = (o_i < d_out)[:, None] & (o_j < d_in)[None, :]
        b_x = delta_tile(
            p_u, p_v, first, last, scale, o_i, o_j, s_u, s_v,
            BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, RANK_STEP=RANK_STEP,
        )  # fmt: skip
        b_key = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        b_key = tl.where(m, b_key, -1)  # below every range
        for search in range(first_search, last_search):
            low = tl.load(p_searches + search * 3).to(tl.int32)
            high = tl.load(p_searches + search * 3 + 1).to(tl.int32)
            shift = tl.load(p_searches + search * 3 + 2).to(tl.int32)
            above = tl.sum(tl.sum((b_key > high).to(tl.int32), axis=1), axis=0)
            if above > 0:
                p_a = p_above + search * SLOTS + slot
                tl.atomic_add(p_a, above.to(tl.int64), sem="relaxed")
            inside = (b_key >= low) & (b_key <= high)
            p_b = p_bins + tl.cast(search, tl.int64) * BINS
            if low == high:
                # Perhaps all entries are alike: one addition, not one each to the same place.
                count = tl.sum(tl.sum(inside.to(tl.int32), axis=1), axis=0)
                tl.atomic_add(p_b, count.to(tl.int64), sem="relaxed")
            else:
                b_bin = tl.where(inside, (b_key - low) >> shift, 0)
                b_one = tl.full((BLOCK_I, BLOCK_J), 1, tl.int64)
                tl.atomic_add(p_b + b_bin, b_one, mask=inside, sem="relaxed")
