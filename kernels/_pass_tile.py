"""Kernels of `gram_pass`: tiles of many modules, every epilogue, and the sums of their parts."""

import triton
import triton.language as tl

from ._fold import _parts, _sum_parts
from ._gram_tile import _gram_tile, _store_both, _tile_pair
from ._pass_plan import MODULE, SIDE

# Columns of the tables, see _pass_plan.py.
PAIR = tl.constexpr(MODULE.index("pair"))
PAIR_END = tl.constexpr(MODULE.index("pair_end"))
P = tl.constexpr(MODULE.index("p"))
Q = tl.constexpr(MODULE.index("q"))
PARTIAL = tl.constexpr(MODULE.index("partial"))
PARTIAL_ROW = tl.constexpr(MODULE.index("partial_row"))
OUT = tl.constexpr(MODULE.index("out"))
BLOCK_FIRST = tl.constexpr(MODULE.index("block"))
MODULE_WIDTH = tl.constexpr(len(MODULE))
U = tl.constexpr(SIDE.index("u"))
U_ROW = tl.constexpr(SIDE.index("u_row"))
V = tl.constexpr(SIDE.index("v"))
V_ROW = tl.constexpr(SIDE.index("v_row"))
ROWS = tl.constexpr(SIDE.index("rows"))
WEIGHT = tl.constexpr(SIDE.index("weight"))
TILES = tl.constexpr(SIDE.index("tiles"))
OWNER = tl.constexpr(SIDE.index("owner"))
PARTS_OF = tl.constexpr(SIDE.index("parts_of"))
N_TILES = tl.constexpr(SIDE.index("n_tiles"))
COUNT = tl.constexpr(SIDE.index("count"))
SIDE_WIDTH = tl.constexpr(len(SIDE))
ROW_WIDTH = tl.constexpr(len(MODULE) + 2 * len(SIDE))


@triton.jit
def _tile_bounds(p_side, i_tile, p_rows, p_parts):
    at = tl.load(p_side + TILES) + i_tile
    i_row = tl.load(p_rows + at)
    i_row_end = tl.load(p_rows + at + 1)
    i_part = tl.load(p_parts + at)
    i_part_end = tl.load(p_parts + at + 1)
    return i_row, i_row_end, i_part, i_part_end


@triton.jit
def _weight(
    p_weights,
    s_weights,
    p_side,
    i_row,
    i_row_end,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    p_row = p_weights + tl.cast(s_weights, tl.int64) * INDEX + tl.load(p_side + WEIGHT) + i_row
    return tl.load(p_row + o, mask=o < i_row_end - i_row, other=0.0).to(ACC)


@triton.jit
def _gram_of(
    p_x,
    p_y,
    p_side_i,
    p_side_j,
    o_i,
    o_j,
    m_i,
    m_j,
    K,
    START: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Multiples of 16 elements, which the caller checked: loads are 16 bytes wide.
    s_x = tl.multiple_of(tl.load(p_side_i + STRIDE), 16)
    s_y = tl.multiple_of(tl.load(p_side_j + STRIDE), 16)
    start_x = tl.multiple_of(tl.load(p_side_i + START), 16)
    start_y = tl.multiple_of(tl.load(p_side_j + START), 16)
    return _gram_tile(
        p_x + start_x, p_y + start_y, o_i, o_j, m_i, m_j, K, s_x, 1, s_y, 1,
        BLOCK=BLOCK, BLOCK_K=BLOCK_K, DOT=DOT, ACC=ACC, PRECISION=PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs", "s_partial", "s_weights_i", "s_weights_j"])
def gram_pass_kernel(
    p_u,
    p_v,
    p_u2,
    p_v2,
    p_weights_i,
    p_weights_j,
    s_weights_i,
    s_weights_j,
    p_modules,
    p_rows,
    p_parts,
    p_part_of_row,
    p_partial,
    s_partial,
    n_pairs,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK_I: tl.constexpr,
    CHUNK_J: tl.constexpr,
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
    i_module = tl.full((), 0, tl.int32)
    for i_pair in range(tl.program_id(0), n_pairs, tl.num_programs(0)):
        while tl.load(p_modules + i_module * ROW_WIDTH + PAIR_END) <= i_pair:
            i_module += 1
        p_m = p_modules + i_module * ROW_WIDTH
        p_i = p_m + MODULE_WIDTH
        p_j = p_i + SIDE_WIDTH
        i_tile, j_tile = _tile_pair(
            i_pair - tl.load(p_m + PAIR).to(tl.int32), tl.load(p_i + N_TILES).to(tl.int32),
            tl.load(p_j + N_TILES).to(tl.int32), SYMMETRIC, GROUP,
        )  # fmt: skip
        i_row, i_row_end, i_part, i_part_end = _tile_bounds(p_i, i_tile, p_rows, p_parts)
        j_row, j_row_end, j_part, j_part_end = _tile_bounds(p_j, j_tile, p_rows, p_parts)
        o_i = (i_row + tl.arange(0, BLOCK)).to(tl.int64)
        o_j = (j_row + tl.arange(0, BLOCK)).to(tl.int64)
        # Rows after the tile's end are loaded and never stored, as in block_gram_kernel.
        m_i = o_i < tl.load(p_i + ROWS)
        m_j = o_j < tl.load(p_j + ROWS)
        if p_u is not None:
            K = tl.multiple_of(tl.load(p_m + P).to(tl.int32), 16)
            b_u = _gram_of(
                p_u, p_u2, p_i, p_j, o_i, o_j, m_i, m_j, K, START=U, STRIDE=U_ROW,
                BLOCK=BLOCK, BLOCK_K=BLOCK_K, DOT=DOT_U, ACC=ACC, PRECISION=PRECISION,
            )  # fmt: skip
        if p_v is not None:
            K = tl.multiple_of(tl.load(p_m + Q).to(tl.int32), 16)
            b_v = _gram_of(
                p_v, p_v2, p_i, p_j, o_i, o_j, m_i, m_j, K, START=V, STRIDE=V_ROW,
                BLOCK=BLOCK, BLOCK_K=BLOCK_K, DOT=DOT_V, ACC=ACC, PRECISION=PRECISION,
            )  # fmt: skip

        p_out = p_partial + tl.load(p_m + PARTIAL)
        s_out = tl.load(p_m + PARTIAL_ROW).to(tl.int32)  # times rows of a tile: checked by plan
        p_owner_i = p_part_of_row
        p_owner_j = p_part_of_row
        if UNIFORM:
            # Parts counted from the tile's first: fewer registers through all sums.
            p_out += i_part.to(tl.int64) * s_out + j_part
            i_part_end -= i_part
            j_part_end -= j_part
            i_part = tl.full((), 0, tl.int32)
            j_part = i_part
            i_row_end = i_row + i_part_end * CHUNK_I
            j_row_end = j_row + j_part_end * CHUNK_J
        else:
            p_owner_i += tl.load(p_i + OWNER)
            p_owner_j += tl.load(p_j + OWNER)
        for i_sum in tl.static_range(len(SUMS)):
            # 0: uv, 1: uu, 2: vv
            b_h = b_v if SUMS[i_sum][0] == 2 else b_u
            b_h *= b_u if SUMS[i_sum][0] == 1 else b_v
            b_weight_i = None
            b_weight_j = None
            if SUMS[i_sum][1] >= 0:
                b_weight_i = _weight(
                    p_weights_i, s_weights_i, p_i, i_row, i_row_end, SUMS[i_sum][1], BLOCK, ACC
                )
            if SUMS[i_sum][2] >= 0:
                b_weight_j = _weight(
                    p_weights_j, s_weights_j, p_j, j_row, j_row_end, SUMS[i_sum][2], BLOCK, ACC
                )
            _store_both(
                b_h, p_out + tl.cast(s_partial, tl.int64) * i_sum, s_out,
                p_owner_i, i_row, i_row_end, i_part, i_part_end,
                p_owner_j, j_row, j_row_end, j_part, j_part_end, b_weight_i, b_weight_j,
                BLOCK=BLOCK, CHUNK_I=CHUNK_I, CHUNK_J=CHUNK_J, UNIFORM=UNIFORM, PARTS_J=PARTS_J,
            )  # fmt: skip


@triton.jit(do_not_specialize=["s_partial", "s_out"])
def pass_fold_kernel(
    p_partial,
    s_partial,
    p_modules,
    p_parts_of,
    p_module_of_block,
    p_sum_of,
    p_out,
    s_out,
    MIRROR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i_epilogue = tl.program_id(1)
    i_module = tl.load(p_module_of_block + tl.program_id(0))
    p_m = p_modules + i_module * ROW_WIDTH
    p_i = p_m + MODULE_WIDTH
    p_j = p_i + SIDE_WIDTH
    n_i = tl.load(p_i + COUNT).to(tl.int32)
    n_j = tl.load(p_j + COUNT).to(tl.int32)
    i_block = tl.program_id(0) - tl.load(p_m + BLOCK_FIRST).to(tl.int32)
    blocks_j = tl.cdiv(n_j, BLOCK_J)
    o_i = (i_block // blocks_j) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = (i_block % blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i = o_i < n_i
    m_j = o_j < n_j
    b_first_i, b_count_i = _parts(p_parts_of + tl.load(p_i + PARTS_OF), o_i, m_i)
    b_first_j, b_count_j = _parts(p_parts_of + tl.load(p_j + PARTS_OF), o_j, m_j)

    # The sum that an epilogue is, and the one it is in the transposed tile.
    sum_of = tl.load(p_sum_of + 2 * i_epilogue)
    step = tl.cast(s_partial, tl.int64)
    p_sum = p_partial + tl.load(p_m + PARTIAL) + sum_of * step
    s_mirrored = None
    if MIRROR:
        s_mirrored = (tl.load(p_sum_of + 2 * i_epilogue + 1) - sum_of) * step
    b_sum = _sum_parts(
        p_sum, tl.load(p_m + PARTIAL_ROW), s_mirrored, b_first_i, b_count_i, b_first_j, b_count_j,
        o_i[:, None] <= o_j[None, :], MIRROR=MIRROR, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J,
    )  # fmt: skip
    p_o = p_out + i_epilogue * tl.cast(s_out, tl.int64) + tl.load(p_m + OUT)
    p_o += o_i[:, None].to(tl.int64) * n_j + o_j[None, :]
    tl.store(p_o, b_sum, mask=m_i[:, None] & m_j[None, :])
