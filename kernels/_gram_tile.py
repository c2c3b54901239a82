"""Tile kernel of the block Gram: two Grams, Hadamard product, sums over parts. See README.md."""

import triton
import triton.language as tl


@triton.jit
def _tile_pair(i_pair, n_tiles_i, n_tiles_j, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr):
    if SYMMETRIC:
        # The upper triangle is folded into a rectangle: row y holds tile row y and, before it, the
        # tile row that completes it, n - y (n odd) or n - 1 - y (n even).
        odd = n_tiles_i % 2
        width = n_tiles_i + 1 - odd
        height = (n_tiles_i + odd) // 2
    else:
        width = n_tiles_j
        height = n_tiles_i
    i_group = i_pair // (GROUP * width)
    i_within = i_pair % (GROUP * width)
    group_height = tl.minimum(height - i_group * GROUP, GROUP)
    i_tile = i_group * GROUP + i_within % group_height
    j_tile = i_within // group_height
    if SYMMETRIC:
        second = j_tile < i_tile + 1 - odd
        j_tile = tl.where(second, n_tiles_i - 1 - j_tile, j_tile - 1 + odd)
        i_tile = tl.where(second, n_tiles_i - 1 + odd - i_tile, i_tile)
    return i_tile, j_tile


@triton.jit
def _as_loaded_wide(b_x):
    # Triton 3.6 mistakes a float64 operand that was loaded as 16 bits; a sum of one element ends
    # its search for how it was loaded.
    if b_x.dtype.primitive_bitwidth == 16:
        b_x = tl.sum(b_x.to(tl.float32)[:, :, None], axis=2)
    return b_x


@triton.jit
def _gram_tile(
    p_x,
    p_y,
    o_i,
    o_j,
    m_i,
    m_j,
    K,
    s_x_row,
    s_x_k,
    s_y_row,
    s_y_k,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    p_a = p_x + o_i[:, None] * s_x_row + o_k[None, :].to(tl.int64) * s_x_k
    p_b = p_y + o_j[None, :] * s_y_row + o_k[:, None].to(tl.int64) * s_y_k
    b_gram = tl.zeros((BLOCK, BLOCK), ACC)
    for i_k in range(0, K, BLOCK_K):
        m_k = o_k < K - i_k
        # [BLOCK, BLOCK_K]
        b_a = tl.load(p_a, mask=m_i[:, None] & m_k[None, :], other=0.0)
        if DOT == tl.float64:
            b_a = _as_loaded_wide(b_a)
        b_a = b_a.to(DOT)
        # [BLOCK_K, BLOCK]
        b_b = tl.load(p_b, mask=m_k[:, None] & m_j[None, :], other=0.0)
        if DOT == tl.float64:
            b_b = _as_loaded_wide(b_b)
        b_b = b_b.to(DOT)
        b_gram = tl.dot(b_a, b_b, b_gram, input_precision=PRECISION, out_dtype=ACC)
        p_a += step * s_x_k
        p_b += step * s_y_k
    return b_gram


@triton.jit
def _store_columns(
    b_h,
    p_out,
    s_out,
    o_row,
    m_row,
    p_part_of_row,
    i_row,
    i_row_end,
    i_part,
    i_part_end,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    N_CHUNKS: tl.constexpr = BLOCK // CHUNK
    o_chunk = tl.arange(0, N_CHUNKS)
    # [BLOCK, N_CHUNKS]
    b_h = tl.sum(tl.reshape(b_h, (BLOCK, N_CHUNKS, CHUNK)), axis=2)
    if UNIFORM:
        o_part = i_part + o_chunk
        m_out = m_row[:, None] & (o_part < i_part_end)[None, :]
        tl.store(p_out + o_row[:, None] * s_out + o_part[None, :], b_h, mask=m_out)
    else:
        o_first = i_row + o_chunk * CHUNK
        b_part = tl.load(p_part_of_row + o_first, mask=o_first < i_row_end, other=-1)
        for part in range(i_part, i_part_end):
            # [BLOCK]
            b_sum = tl.sum(tl.where(b_part[None, :] == part, b_h, 0.0), axis=1)
            tl.store(p_out + o_row * s_out + part, b_sum, mask=m_row)


@triton.jit
def _store_both(
    b_h,
    p_out,
    s_out,
    p_part_of_row_i,
    i_row,
    i_row_end,
    i_part,
    i_part_end,
    p_part_of_row_j,
    j_row,
    j_row_end,
    j_part,
    j_part_end,
    b_weight_i,
    b_weight_j,
    BLOCK: tl.constexpr,
    CHUNK_I: tl.constexpr,
    CHUNK_J: tl.constexpr,
    UNIFORM: tl.constexpr,
    PARTS_J: tl.constexpr,
):
    CHUNKS_I: tl.constexpr = BLOCK // CHUNK_I
    CHUNKS_J: tl.constexpr = BLOCK // CHUNK_J
    o_i = tl.arange(0, CHUNKS_I)
    o_j = tl.arange(0, CHUNKS_J)
    # A weight of columns takes many registers on the whole tile: last, where it can be.
    LATE: tl.constexpr = not UNIFORM and CHUNK_J == 1
    if b_weight_j is not None and not LATE:
        b_h *= b_weight_j[None, :]
    # [CHUNKS_I, CHUNKS_J]
    b_h = tl.sum(tl.reshape(b_h, (BLOCK, CHUNKS_J, CHUNK_J)), axis=2)
    if b_weight_i is not None:
        b_h *= b_weight_i[:, None]
    b_h = tl.sum(tl.reshape(b_h, (CHUNKS_I, CHUNK_I, CHUNKS_J)), axis=1)
    if UNIFORM:
        m_out = (o_i < i_part_end - i_part)[:, None] & (o_j < j_part_end - j_part)[None, :]
        p_tile = p_out + tl.cast(i_part, tl.int64) * s_out + j_part
        tl.store(p_tile + (o_i[:, None] * s_out + o_j[None, :]), b_h, mask=m_out)
    else:
        # Select and add, not a product with a one-hot matrix: there 0 * NaN would carry one
        # adapter's NaN into its neighbours.
        o_row_i = i_row + o_i * CHUNK_I
        o_row_j = j_row + o_j * CHUNK_J
        b_part_i = tl.load(p_part_of_row_i + o_row_i, mask=o_row_i < i_row_end, other=-1)
        b_part_j = tl.load(p_part_of_row_j + o_row_j, mask=o_row_j < j_row_end, other=-1)
        o_part_j = j_part + tl.arange(0, PARTS_J)
        m_pick = b_part_j[:, None] == o_part_j[None, :]
        for part in range(i_part, i_part_end):
            # [CHUNKS_J]
            b_row = tl.sum(tl.where(b_part_i[:, None] == part, b_h, 0.0), axis=0)
            if b_weight_j is not None and LATE:
                b_row *= b_weight_j
            # [PARTS_J]
            b_sum = tl.sum(tl.where(m_pick, b_row[:, None], 0.0), axis=0)
            p_row = p_out + tl.cast(part, tl.int64) * s_out
            tl.store(p_row + o_part_j, b_sum, mask=o_part_j < j_part_end)


@triton.jit(do_not_specialize=["n_tiles_i", "n_tiles_j"])
def block_gram_kernel(
    p_u,
    p_v,
    p_u2,
    p_v2,
    p_rows_i,
    p_parts_i,
    p_part_of_row_i,
    p_rows_j,
    p_parts_j,
    p_part_of_row_j,
    p_out,
    n_tiles_i,
    n_tiles_j,
    R,
    R2,
    K_U,
    K_V,
    s_u_row,
    s_u_k,
    s_v_row,
    s_v_k,
    s_u2_row,
    s_u2_k,
    s_v2_row,
    s_v2_k,
    s_out,
    SYMMETRIC: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK_I: tl.constexpr,
    CHUNK_J: tl.constexpr,
    ALIGN_I: tl.constexpr,
    ALIGN_J: tl.constexpr,
    UNIFORM: tl.constexpr,
    PARTS_J: tl.constexpr,
    DOT_U: tl.constexpr,
    DOT_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_tile, j_tile = _tile_pair(tl.program_id(0), n_tiles_i, n_tiles_j, SYMMETRIC, GROUP)
    i_row = tl.multiple_of(tl.load(p_rows_i + i_tile), ALIGN_I)
    j_row = tl.multiple_of(tl.load(p_rows_j + j_tile), ALIGN_J)
    i_row_end = tl.load(p_rows_i + i_tile + 1)
    j_row_end = tl.load(p_rows_j + j_tile + 1)
    i_part = tl.load(p_parts_i + i_tile)
    j_part = tl.load(p_parts_j + j_tile)
    i_part_end = tl.load(p_parts_i + i_tile + 1)
    j_part_end = tl.load(p_parts_j + j_tile + 1)
    o_i = (i_row + tl.arange(0, BLOCK)).to(tl.int64)
    o_j = (j_row + tl.arange(0, BLOCK)).to(tl.int64)
    # Rows after the tile's end are loaded and never stored: masking by the stack's end alone keeps
    # the mask constant over a vector load.
    m_i = o_i < R
    m_j = o_j < R2

    b_u = _gram_tile(
        p_u, p_u2, o_i, o_j, m_i, m_j, K_U, s_u_row, s_u_k, s_u2_row, s_u2_k,
        BLOCK=BLOCK, BLOCK_K=BLOCK_K, DOT=DOT_U, ACC=ACC, PRECISION=PRECISION,
    )  # fmt: skip
    b_v = _gram_tile(
        p_v, p_v2, o_i, o_j, m_i, m_j, K_V, s_v_row, s_v_k, s_v2_row, s_v2_k,
        BLOCK=BLOCK, BLOCK_K=BLOCK_K, DOT=DOT_V, ACC=ACC, PRECISION=PRECISION,
    )  # fmt: skip
    b_h = b_u * b_v

    m_i = o_i < i_row_end
    m_j = o_j < j_row_end
    if REDUCE == "none":
        m_out = m_i[:, None] & m_j[None, :]
        tl.store(p_out + o_i[:, None] * s_out + o_j[None, :], b_h, mask=m_out)
    elif REDUCE == "columns":
        _store_columns(
            b_h, p_out, s_out, o_i, m_i, p_part_of_row_j, j_row, j_row_end, j_part, j_part_end,
            BLOCK=BLOCK, CHUNK=CHUNK_J, UNIFORM=UNIFORM,
        )  # fmt: skip
        if SYMMETRIC and i_tile != j_tile:
            _store_columns(
                tl.trans(b_h), p_out, s_out, o_j, m_j,
                p_part_of_row_i, i_row, i_row_end, i_part, i_part_end,
                BLOCK=BLOCK, CHUNK=CHUNK_I, UNIFORM=UNIFORM,
            )  # fmt: skip
    else:
        _store_both(
            b_h, p_out, tl.cast(s_out, tl.int64),
            p_part_of_row_i, i_row, i_row_end, i_part, i_part_end,
            p_part_of_row_j, j_row, j_row_end, j_part, j_part_end, None, None,
            BLOCK=BLOCK, CHUNK_I=CHUNK_I, CHUNK_J=CHUNK_J, UNIFORM=UNIFORM, PARTS_J=PARTS_J,
        )  # fmt: skip
