"""Device code of P2: entries of deltas, the hash of chance, what a rule keeps. See README.md.

An entry is one chain of fused multiply-adds over the rank, in order, and then the scale, whatever
the tile: a threshold found by one kernel holds exactly in the next. From factors packed in half
precision it is a product of the tensor core, alike in every kernel too, but summed its own way.
"""

import triton
import triton.language as tl


@triton.jit
def factor_row(p_rows, i_row, o, m, BLOCK: tl.constexpr):
    """Elements o of a row of a factor, wherever it lies, in float32; 0 where the mask m is not.

    p_rows: int64 (rows, 4): address, stride in elements, dtype code (-1: a row of zeros), and where
    to note that it is not finite.
    """
    address = tl.load(p_rows + i_row * 4)
    offset = o.to(tl.int64) * tl.load(p_rows + i_row * 4 + 1)
    code = tl.load(p_rows + i_row * 4 + 2)
    b = tl.zeros((BLOCK,), tl.float32)
    if code == 0:
        b = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=m, other=0.0)
    elif code == 1:
        p = address.to(tl.pointer_type(tl.bfloat16)) + offset
        b = tl.load(p, mask=m, other=0.0).to(tl.float32)
    elif code == 2:
        p = address.to(tl.pointer_type(tl.float16)) + offset
        b = tl.load(p, mask=m, other=0.0).to(tl.float32)
    elif code == 3:
        p = address.to(tl.pointer_type(tl.float64)) + offset
        b = tl.load(p, mask=m, other=0.0).to(tl.float32)
    return b


@triton.jit
def pack_kernel(p_rows, p_index, p_out, p_bad, d, s_out, BLOCK: tl.constexpr):
    """Row i of the output: a row of a factor, and zeros after its end.

    p_rows: as :func:`factor_row` has them. p_index: which d elements of a row; None: the first.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < d
    o_from = o
    if p_index is not None:
        o_from = tl.load(p_index + o, mask=m, other=0)
    b = factor_row(p_rows, i_row, o_from, m, BLOCK=BLOCK)
    if tl.max(not_finite(b), axis=0) > 0:  # whoever notes it writes the same
        tl.store(p_bad + tl.load(p_rows + i_row * 4 + 3), 1)
    tl.store(p_out + i_row * s_out + o, b.to(p_out.dtype.element_ty), mask=o < s_out)


@triton.jit
def not_finite(b_x):
    bits = b_x.to(tl.int32, bitcast=True) & 0x7F800000
    return (bits == 0x7F800000).to(tl.int32)


@triton.jit
def counter_hash(lower, key):
    """32 random bits: ops.tiles_reference.counter_hash, from its 64-bit key (as int64)."""
    x = lower ^ key.to(tl.uint32)
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= x >> 11
    x *= 0xAC4C1B51
    x += (key >> 32).to(tl.uint32)
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return x


# The interpreter holds bf16 as integers and would multiply their bit patterns.
INTERPRETED = not isinstance(counter_hash, triton.JITFunction)
_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def delta_tile(
    p_u,
    p_v,
    first,
    last,
    scale,
    o_i,
    o_j,
    s_u,
    s_v,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    RANK_STEP: tl.constexpr,
):
    """Entries (o_i, o_j) of the delta in rows [first, last) of the packed factors.

    No masks: columns of the buffers are padded to whole tiles, and ranks to RANK_STEP, with zeros.
    """
    steps = ((last - first) // RANK_STEP).to(tl.int32)
    b_x = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if p_u.dtype.element_ty == tl.float32:
        p_b = p_u + first * s_u + o_i
        p_a = p_v + first * s_v + o_j
        for _ in range(0, steps):
            for _k in tl.static_range(RANK_STEP):
                b_b = tl.load(p_b)
                b_a = tl.load(p_a)
                b_x = tl.fma(b_b[:, None], b_a[None, :], b_x)
                p_b += s_u
                p_a += s_v
    else:
        o_k = (first + tl.arange(0, RANK_STEP))[:, None]
        p_b = p_u + o_k * s_u + o_i[None, :]
        p_a = p_v + o_k * s_v + o_j[None, :]
        for _ in range(0, steps):
            b_b = tl.load(p_b)
            b_a = tl.load(p_a)
            if _EMULATED:
                b_b, b_a = b_b.to(tl.float32), b_a.to(tl.float32)
            b_x = tl.dot(tl.trans(b_b), b_a, b_x)
            p_b += RANK_STEP * s_u
            p_a += RANK_STEP * s_v
    return b_x * scale


@triton.jit
def draws(p_keys, o_i, o_j, m, d_in, ONE_KEY: tl.constexpr):
    """The hash at every position of a tile. p_keys: one key per upper half of a position."""
    if ONE_KEY:
        lower = (o_i * d_in).to(tl.uint32)[:, None] + o_j.to(tl.uint32)[None, :]
        key = tl.load(p_keys)
    else:
        position = (o_i * d_in)[:, None] + o_j[None, :]
        lower = position.to(tl.uint32)
        key = tl.load(p_keys + (position >> 32), mask=m, other=0)
    return counter_hash(lower, key)
