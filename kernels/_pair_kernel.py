"""Device code of P2 that ends in numbers: all pairs of deltas over a strip of their entries.

A strip holds entry e of delta i at ``e * s_x + i``: like the rows of two matrices whose product is
wanted. A program owns BLOCK x BLOCK pairs and a segment of the entries.
"""

import triton
import triton.language as tl


@triton.jit
def two_to(b):
    """2^b in float32, b int32: 0 below its range, inf above."""
    b = tl.minimum(tl.maximum(b, -150), 128)
    normal = (tl.maximum(b, -126) + 127) << 23
    subnormal = tl.where(b < -149, 0, 1 << (tl.minimum(tl.maximum(b, -149), -127) + 149))
    return tl.where(b < -126, subnormal, normal).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tiles", "entries", "per_segment"])
def pair_sums_kernel(
    p_x,
    p_tiles,
    p_units,
    p_out,
    tiles,
    entries,
    per_segment,
    s_x,
    RUN: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (tile of pairs, segment), tiles first, adds to its own six float64 matrices.

    p_out: (segments, tiles, 6, BLOCK, BLOCK), over pairs (i, j) of a tile: sums of |x_i x_j|; over
    conflicts of |x_i x_j|, |x_i|, |x_j|, the smaller of both in units of j; of (x_i x_j)^2. RUN
    terms in float32, STEP at a time, alike for every pair: equal deltas have equal bits. p_tiles:
    int32 (tiles, 2), which blocks of deltas. p_units: int32, exponents of 2. Entries are a multiple
    of RUN.
    """
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    o_i = tl.load(p_tiles + tile * 2) * BLOCK + tl.arange(0, BLOCK)
    o_j = tl.load(p_tiles + tile * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    b_ratio = two_to(tl.load(p_units + o_i)[:, None] - tl.load(p_units + o_j)[None, :])[None, :, :]
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p_o = p_out + tl.program_id(0).to(tl.int64) * (6 * BLOCK * BLOCK) + o
    first = segment * per_segment
    for start in range(first, tl.minimum(first + per_segment, entries), RUN):
        o_e = (tl.cast(start, tl.int64) + tl.arange(0, STEP))[:, None] * s_x
        p_i = p_x + o_e + o_i[None, :]
        p_j = p_x + o_e + o_j[None, :]
        b_mass = tl.zeros((BLOCK, BLOCK), tl.float32)
        b_conflict = tl.zeros((BLOCK, BLOCK), tl.float32)
        b_opposed = tl.zeros((BLOCK, BLOCK), tl.float32)
        b_opposing = tl.zeros((BLOCK, BLOCK), tl.float32)
        b_cancelled = tl.zeros((BLOCK, BLOCK), tl.float32)
        b_squares = tl.zeros((BLOCK, BLOCK), tl.float32)
        # STEP x BLOCK x BLOCK numbers, of which a thread has the STEP of some pairs.
        for _ in range(0, RUN // STEP):
            b_x = tl.load(p_i)[:, :, None]
            b_y = tl.load(p_j)[:, None, :]
            b_product = b_x * b_y
            m = b_product < 0
            b_size = tl.abs(b_product)
            b_mass += tl.sum(b_size, axis=0)
            b_conflict += tl.sum(tl.where(m, b_size, 0.0), axis=0)
            b_opposed += tl.sum(tl.where(m, tl.abs(b_x), 0.0), axis=0)
            b_opposing += tl.sum(tl.where(m, tl.abs(b_y), 0.0), axis=0)
            b_alike = tl.minimum(tl.abs(b_x) * b_ratio, tl.abs(b_y))
            b_cancelled += tl.sum(tl.where(m, b_alike, 0.0), axis=0)
            b_squares += tl.sum(b_size * b_size, axis=0)
            p_i += STEP * s_x
            p_j += STEP * s_x
        add_to(p_o, b_mass)
        add_to(p_o + BLOCK * BLOCK, b_conflict)
        add_to(p_o + 2 * BLOCK * BLOCK, b_opposed)
        add_to(p_o + 3 * BLOCK * BLOCK, b_opposing)
        add_to(p_o + 4 * BLOCK * BLOCK, b_cancelled)
        add_to(p_o + 5 * BLOCK * BLOCK, b_squares)
        tl.debug_barrier()  # another thread may load next what this one stored


@triton.jit
def add_to(p, b):
    tl.store(p, tl.load(p) + b.to(p.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles", "entries", "per_segment"])
def pair_counts_kernel(
    p_x,
    p_tiles,
    p_thresholds,
    p_out,
    tiles,
    entries,
    per_segment,
    s_x,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`pair_sums_kernel`, three int64 counts: conflicts, both not 0, both top.

    Products of the tensor core on zeros and ones, exact in float32 while a segment has less than
    2^24 entries. p_thresholds: float32, or None: nothing counts as top.
    """
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    o_i = tl.load(p_tiles + tile * 2) * BLOCK + tl.arange(0, BLOCK)
    o_j = tl.load(p_tiles + tile * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    b_conflicts = tl.zeros((BLOCK, BLOCK), tl.float32)
    b_both = tl.zeros((BLOCK, BLOCK), tl.float32)
    b_top = tl.zeros((BLOCK, BLOCK), tl.float32)
    if p_thresholds is not None:
        least_i = tl.load(p_thresholds + o_i)[None, :]
        least_j = tl.load(p_thresholds + o_j)[None, :]
    first = segment * per_segment
    for start in range(first, tl.minimum(first + per_segment, entries), STEP):
        o_e = (tl.cast(start, tl.int64) + tl.arange(0, STEP))[:, None] * s_x
        b_x = tl.load(p_x + o_e + o_i[None, :])
        b_y = tl.load(p_x + o_e + o_j[None, :])
        b_conflicts = tl.dot(tl.trans(one(b_x < 0)), one(b_y > 0), b_conflicts)
        b_conflicts = tl.dot(tl.trans(one(b_x > 0)), one(b_y < 0), b_conflicts)
        b_both = tl.dot(tl.trans(one(b_x != 0)), one(b_y != 0), b_both)
        if p_thresholds is not None:
            m_x = (tl.abs(b_x) >= least_i) & (b_x != 0)
            m_y = (tl.abs(b_y) >= least_j) & (b_y != 0)
            b_top = tl.dot(tl.trans(one(m_x)), one(m_y), b_top)
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p_o = p_out + tl.program_id(0).to(tl.int64) * (3 * BLOCK * BLOCK) + o
    add_to(p_o, b_conflicts)
    add_to(p_o + BLOCK * BLOCK, b_both)
    if p_thresholds is not None:
        add_to(p_o + 2 * BLOCK * BLOCK, b_top)


@triton.jit
def one(m):
    return m.to(tl.float16)
