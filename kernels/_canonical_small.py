"""Small float64 matrices, one program each: pivoted Cholesky and Jacobi SVD. See canonical.py."""

import triton
import triton.language as tl


@triton.jit
def cholesky_kernel(
    p_gram, p_transform, p_coordinates, p_least, DEPENDENT: tl.constexpr, R: tl.constexpr
):
    """`_canonical_torch.cholesky` in registers. Every matrix is (R, R), row-major."""
    i_first = tl.program_id(0).to(tl.int64) * (R * R)
    o = tl.arange(0, R)
    b_length = tl.sqrt(tl.load(p_gram + i_first + o * (R + 1)))
    live = b_length > 0
    b_residual = tl.where(live, 1.0, -1.0).to(tl.float64)  # -1: done
    limit = DEPENDENT * tl.sum(live.to(tl.float64), axis=0)
    least = tl.full((), 1.0, tl.float64)
    b_order = tl.full((R,), -1, tl.int32)
    b_low = tl.zeros((R, R), tl.float64)
    for k in range(0, R):
        top = tl.max(b_residual, axis=0)
        going = top > limit
        diagonal = tl.sqrt(tl.where(going, top, 1.0))
        least = tl.where(going, tl.minimum(least, diagonal), least)
        pivot = tl.argmax(b_residual, axis=0)
        b_order = tl.where(o == k, tl.where(going, pivot, -1), b_order)
        here = o == pivot
        todo = (b_residual > -0.5) & (o != pivot)
        # [R]; the pivot's row of the Gram is read again, because registers are few
        b_unit = tl.where(live, b_length, 1.0)
        b_column = tl.load(p_gram + i_first + pivot * R + o) / b_unit
        b_column /= tl.sum(tl.where(here, b_unit, 0.0), axis=0)
        b_row = tl.sum(tl.where(here[:, None], b_low, 0.0), axis=0)
        b_column = (b_column - tl.sum(b_low * b_row[None, :], axis=1)) / diagonal
        b_column = tl.where(here, diagonal, tl.where(todo, b_column, 0.0))
        b_column = tl.where(going, b_column, 0.0)
        b_low = tl.where(o[None, :] == k, b_column[:, None], b_low)
        b_residual = tl.where(todo, b_residual - b_column * b_column, -1.0)
    o_all = i_first + o[:, None] * R + o[None, :]
    tl.store(p_coordinates + o_all, b_low * b_length[:, None])
    tl.store(p_least + tl.program_id(0), least)

    b_transform = tl.zeros((R, R), tl.float64)
    for k in range(0, R):
        pivot = tl.sum(tl.where(o == k, b_order, 0), axis=0)
        # [R]
        b_row = tl.sum(tl.where((o == pivot)[:, None], b_low, 0.0), axis=0)
        diagonal = tl.sum(tl.where(o == k, b_row, 0.0), axis=0)
        b_solved = tl.where(o == pivot, 1.0, 0.0) - tl.sum(b_row[:, None] * b_transform, axis=0)
        b_solved = tl.where(pivot >= 0, b_solved / tl.where(pivot >= 0, diagonal, 1.0), 0.0)
        b_transform = tl.where(o[:, None] == k, b_solved[None, :], b_transform)
    b_unit = tl.where(live, b_length, 1.0)
    tl.store(p_transform + o_all, b_transform / b_unit[None, :])


@triton.jit
def jacobi_kernel(
    p_core, p_left, p_right, p_converged, WITH_RIGHT: tl.constexpr, SWEEPS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """One-sided Jacobi (Hestenes): core V = left, columns of left orthogonal and not yet unit.

    In step s of a sweep column i meets column i ^ s: R / 2 disjoint pairs, every pair once a sweep.
    """
    EPS: tl.constexpr = 2.220446049250313e-16
    i_first = tl.program_id(0).to(tl.int64) * (R * R)
    o = tl.arange(0, R)
    o_all = i_first + o[:, None] * R + o[None, :]
    # [R, R]
    b_w = tl.load(p_core + o_all)
    b_v = tl.where(o[:, None] == o[None, :], 1.0, 0.0).to(tl.float64)
    # Columns of pure rounding never become orthogonal to their own rounding.
    rounding = EPS * EPS * tl.sum(tl.sum(b_w * b_w, axis=0), axis=0)
    tolerance = EPS * tl.sqrt(tl.full((), R, tl.float64))
    turned = tl.full((), 1, tl.int32)
    sweep = tl.full((), 0, tl.int32)
    while (turned > 0) & (sweep < SWEEPS):
        turned = tl.full((), 0, tl.int32)
        for s in range(1, R):
            o_other = o ^ s
            lower = o < o_other
            o_others = tl.broadcast_to(o_other[None, :], (R, R))
            b_w2 = tl.gather(b_w, o_others, 1)
            # [R]
            b_own = tl.sum(b_w * b_w, axis=0)
            b_other = tl.gather(b_own, o_other, 0)
            b_dot = tl.sum(b_w * b_w2, axis=0)
            # Both columns of a pair take one and the same number.
            b_dot = tl.where(lower, b_dot, tl.gather(b_dot, o_other, 0))
            turn = tl.abs(b_dot) > tolerance * tl.sqrt(b_own) * tl.sqrt(b_other)
            turn = turn & (tl.minimum(b_own, b_other) > rounding)
            b_zeta = (b_other - b_own) / (2.0 * tl.where(turn, b_dot, 1.0))
            up = (b_zeta > 0) | ((b_zeta == 0) & lower)
            b_tan = tl.where(up, 1.0, -1.0) / (tl.abs(b_zeta) + tl.sqrt(1.0 + b_zeta * b_zeta))
            b_tan = tl.where(turn, b_tan, 0.0)
            b_cos = 1.0 / tl.sqrt(1.0 + b_tan * b_tan)
            b_sin = b_cos * b_tan
            # [R, R]
            b_w = b_cos[None, :] * b_w - b_sin[None, :] * b_w2
            if WITH_RIGHT:
                b_v2 = tl.gather(b_v, o_others, 1)
                b_v = b_cos[None, :] * b_v - b_sin[None, :] * b_v2
            turned += tl.sum(turn.to(tl.int32), axis=0)
        sweep += 1
    tl.store(p_left + o_all, b_w)
    if WITH_RIGHT:
        tl.store(p_right + o_all, b_v)
    tl.store(p_converged + tl.program_id(0), (turned == 0).to(tl.int32))
