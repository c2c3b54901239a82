"""Skinny products with factor rows where they lie, one entry a program. See canonical.py."""

import triton
import triton.language as tl

FIELDS = 7  # of an entry: address, stride, rank, d, place, start of the output, its width


@triton.jit
def rows_kernel(
    p_table,
    p_transform,
    p_kept,
    p_gram,
    p_out,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    K_MAJOR: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """X is (rank, d): of each entry, Y Y^T to p_gram or Y to p_out; Y is X or transform X.

    The matrices of p_transform and p_gram are (R, R) at `place`, and so is the number of rows
    of Y to keep in p_kept; the others become zeros. Without p_gram program (e, j)
    stores SPAN columns. K_MAJOR: element (a, k) at a * stride + k, or else at a + k * stride.
    """
    p_entry = p_table + tl.program_id(0).to(tl.int64) * FIELDS
    # Products with constants, because that is how the compiler learns what loads may be wide.
    p_x = (tl.load(p_entry) * UNIT).to(tl.pointer_type(DTYPE))
    s_x = tl.load(p_entry + 1) * ALIGN
    rank = tl.load(p_entry + 2)
    d = tl.load(p_entry + 3)
    if K_MAJOR:
        d *= ALIGN
    else:
        rank *= ALIGN
    i_place = tl.load(p_entry + 4) * (R * R)
    first = tl.full((), 0, tl.int64)
    last = d
    if p_gram is None:
        i_out = tl.load(p_entry + 5) * 16
        width = tl.load(p_entry + 6) * 16
        first += tl.program_id(1).to(tl.int64) * SPAN
        last = tl.minimum(first + SPAN, width)
        kept = tl.load(p_kept + tl.load(p_entry + 4))
    o_row = tl.arange(0, R)
    o_all = o_row[:, None] * R + o_row[None, :]
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < rank
    if p_transform is not None:
        # [R, R]
        b_transform = tl.load(p_transform + i_place + o_all)
    b_gram = tl.zeros((R, R), tl.float64)
    for i_k in range(first, last, BLOCK_K):
        o_here = tl.multiple_of(i_k, BLOCK_K) + o_k
        m_x = m_row[:, None] & (o_here < d)[None, :]
        if K_MAJOR:
            p_here = p_x + o_row[:, None].to(tl.int64) * s_x + o_here[None, :]
            p_here = tl.max_contiguous(tl.multiple_of(p_here, (UNIT, UNIT)), (1, ALIGN))
        else:
            p_here = p_x + o_row[:, None] + o_here[None, :] * s_x
            p_here = tl.max_contiguous(tl.multiple_of(p_here, (UNIT, UNIT)), (ALIGN, 1))
        # [R, BLOCK_K]; float32 first, because the interpreter widens bf16 only to that
        b_y = tl.load(p_here, mask=m_x, other=0.0)
        if DTYPE != tl.float64:
            b_y = b_y.to(tl.float32)
        if DTYPE.primitive_bitwidth == 16:
            # Triton 3.6 mistakes a float64 operand that was loaded as 16 bits; a sum of one ends
            # its search for how it was loaded.
            b_y = tl.sum(b_y[:, :, None], axis=2)
        b_y = b_y.to(tl.float64)
        if p_transform is not None:
            b_y = tl.dot(b_transform, b_y, out_dtype=tl.float64)
        if p_gram is not None:
            b_gram = tl.dot(b_y, tl.trans(b_y), b_gram, out_dtype=tl.float64)
        else:
            p_y = p_out + i_out + o_row[:, None].to(tl.int64) * width + o_here[None, :]
            m_y = m_row[:, None] & (o_here < width)[None, :]
            b_y = tl.where(o_row[:, None] < kept, b_y, 0.0)  # what is not finite stays inside
            tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_y)
    if p_gram is not None:
        tl.store(p_gram + i_place + o_all, b_gram)
