"""P1, block_gram: the reference against its definition, the kernels against the reference."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from tolerances import U32, bound, gram_bound

from mergeprobe_fast.ops import block_gram, reference

REDUCE = ("both", "columns", "none")
ACCUMULATE = ("fp32", "fp64")


def draw(rng, ranks, p, q, dtype=np.float32):
    """(U, V, offsets) of normal rows."""
    offsets = np.concatenate([[0], np.cumsum(np.asarray(ranks, dtype=int))])
    u = rng.standard_normal((offsets[-1], p)).astype(dtype)
    v = rng.standard_normal((offsets[-1], q)).astype(dtype)
    return u, v, offsets


def wide(x):
    return reference.float64(x)


def absolute(
    U, V, offsets, U2=None, V2=None, offsets2=None, scale=None, scale2=None, reduce="both"
):
    """The same sum over absolute values: what errors are relative to."""

    def positive(x):
        return None if x is None else np.abs(wide(x))

    return reference.block_gram(
        positive(U), positive(V), offsets, positive(U2), positive(V2), offsets2,
        positive(scale), positive(scale2), reduce,
    )  # fmt: skip


def allowed(accumulate, *stacks, **options):
    """Allowed error of each entry."""
    U, V, offsets = stacks[:3]
    widest = int(np.diff(offsets).max(initial=0))
    if len(stacks) > 3:
        widest = max(widest, int(np.diff(stacks[5]).max(initial=0)))
    relative = gram_bound(accumulate, U.shape[1], V.shape[1], widest, U.shape[0])
    return relative * absolute(*stacks, **options)


def check(*stacks, accumulate="fp32", reduce="both", scale=None, scale2=None, **options):
    """Compute, compare with the reference, return the result."""
    got = block_gram(
        *stacks, scale=scale, scale2=scale2, reduce=reduce, accumulate=accumulate, **options
    )
    values = wide(got)
    want = reference.block_gram(
        *stacks[:3], *(stacks[3:] or (None,) * 3), scale, scale2, reduce
    )  # fmt: skip
    assert values.shape == want.shape and values.dtype == np.float64
    assert np.isfinite(values).all()
    slack = allowed(accumulate, *stacks, scale=scale, scale2=scale2, reduce=reduce)
    worst = np.abs(values - want) - slack
    assert (worst <= 0).all(), f"exceeds its bound by {worst.max():.3g}"
    return values


def ragged(rng, n, most):
    ranks = rng.integers(0, most + 1, n)
    ranks[rng.integers(n)] = 0
    return ranks


# name: (ranks, p, q); a tile has 320 rows and a k-block 128 (float32) or 64 (float64) columns.
SHAPES = {
    "no_adapters": ((), 5, 4),
    "only_empty_blocks": ((0, 0, 0), 5, 4),
    "one_rank1_1x1": ((1,), 1, 1),
    "one_adapter": ((5,), 33, 17),
    "rank1_each": ((1,) * 40, 19, 1),
    "p_is_1": ((3, 0, 2, 7), 1, 130),
    "across_k_blocks": ((4, 4, 4), 129, 257),
    "exact_k_blocks": ((8, 8), 256, 128),
    "blocks_larger_than_a_tile": ((3, 700, 0, 311), 7, 5),
    "exactly_one_tile": ((160, 0, 160), 6, 9),
    "one_row_more_than_a_tile": ((160, 161), 6, 9),
}


@pytest.mark.parametrize("reduce", REDUCE)
def test_reference_is_the_definition(rng, reduce):
    b, a = [rng.standard_normal((7, r)) for r in (2, 0, 3)], []
    a = [rng.standard_normal((x.shape[1], 5)) for x in b]
    b2, a2 = [rng.standard_normal((7, r)) for r in (1, 4)], []
    a2 = [rng.standard_normal((x.shape[1], 5)) for x in b2]
    s, s2 = rng.standard_normal(3), rng.standard_normal(2)
    # Deltas, or their rank-1 atoms where a side is not reduced; each formed as a matrix.
    full = [x * (y @ z) for x, y, z in zip(s, b, a, strict=True)]
    full2 = [x * (y @ z) for x, y, z in zip(s2, b2, a2, strict=True)]

    def atoms(scales, left, right):
        return [
            x * np.outer(y[:, k], z[k])
            for x, y, z in zip(scales, left, right, strict=True)
            for k in range(len(z))
        ]

    rows = full if reduce == "both" else atoms(s, b, a)
    columns = atoms(s2, b2, a2) if reduce == "none" else full2
    want = np.array([[np.sum(x * y) for y in columns] for x in rows])
    got = reference.block_gram(
        np.hstack(b).T, np.vstack(a), [0, 2, 2, 5], np.hstack(b2).T, np.vstack(a2), [0, 1, 5],
        s, s2, reduce,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_shapes(rng, isa, accumulate, reduce, shape):
    ranks, p, q = SHAPES[shape]
    one = draw(rng, ranks, p, q)
    check(*one, accumulate=accumulate, reduce=reduce)
    two = draw(rng, (2, 0, 331) if sum(ranks) > 100 else (2, 0, 5), p, q)
    check(*one, *two, accumulate=accumulate, reduce=reduce)
    check(*two, *one, accumulate=accumulate, reduce=reduce)
    empty = draw(rng, (0,), p, q)
    assert not check(*one, *empty, accumulate=accumulate, reduce=reduce).any()


@pytest.mark.parametrize("tiles", ["one_tile", "many_tiles"])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_random_ragged(rng, isa, accumulate, tiles):
    most = 9 if tiles == "one_tile" else 35
    one = draw(rng, ragged(rng, 30, most), *rng.integers(1, 300, 2))
    two = draw(rng, ragged(rng, 17, most), one[0].shape[1], one[1].shape[1])
    s, s2 = rng.standard_normal(30), rng.standard_normal(17)
    for reduce in REDUCE:
        check(*one, accumulate=accumulate, reduce=reduce, scale=s)
        check(*one, *two, accumulate=accumulate, reduce=reduce, scale=s, scale2=s2)
        check(*one, *two, accumulate=accumulate, reduce=reduce, scale2=s2)


DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_dtypes(rng, isa, library, dtype):
    if (library, dtype) == ("numpy", "bfloat16"):
        library = "torch"  # numpy has none; run torch again rather than nothing
    u, v, offsets = draw(rng, (3, 17, 0, 1), 45, 131, np.float64)
    u[0] *= 1e-6  # subnormal in float16
    u, v = (torch.from_numpy(x).to(DTYPES[dtype]) for x in (u, v))
    if library == "numpy":
        u, v = u.numpy(), v.numpy()
    for accumulate in ACCUMULATE[dtype == "float64" :]:
        result = block_gram(u, v, offsets, accumulate=accumulate)
        assert isinstance(result, torch.Tensor if library == "torch" else np.ndarray)
        check(u, v, offsets, accumulate=accumulate)
        check(u, v, torch.from_numpy(offsets), accumulate=accumulate)


def test_mixed_dtypes(rng, isa):
    u, v, offsets = draw(rng, (3, 2), 20, 30)
    tu, tv = torch.from_numpy(u), torch.from_numpy(v)
    check(tu.bfloat16(), tv.half(), offsets, tu, tv.bfloat16(), offsets)
    check(tu.double(), tv.half(), offsets, tu, tv.bfloat16(), offsets, accumulate="fp64")


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "column_step": lambda x: np.repeat(x, 3, axis=1)[:, ::3],
    "row_step": lambda x: np.repeat(x, 2, axis=0)[1::2],
    "reversed_rows": lambda x: x[::-1].copy()[::-1],
    "reversed_columns": lambda x: x[:, ::-1].copy()[:, ::-1],
    "inside_a_larger": lambda x: np.pad(x, ((2, 1), (3, 5)), constant_values=np.nan)[2:-1, 3:-5],
    "transposed_step": lambda x: np.repeat(x.T, 2, axis=0)[::2].T,
    "read_only": frozen,
    "torch": torch.from_numpy,
    "torch_transposed": lambda x: torch.from_numpy(np.ascontiguousarray(x.T)).t(),
    "torch_slice": lambda x: torch.from_numpy(np.pad(x, 4, constant_values=np.nan))[4:-4, 4:-4],
    "torch_step": lambda x: torch.from_numpy(np.repeat(x, 2, axis=1))[:, ::2],
    "torch_requires_grad": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
    "torch_parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x.copy())),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_strides_give_the_same_bytes(rng, isa, accumulate, layout):
    u, v, offsets = draw(rng, (5, 0, 16, 40, 3), 150, 37)
    make = LAYOUTS[layout]
    su, sv = make(u), make(v)
    before = wide(su).copy(), wide(sv).copy()
    for reduce in REDUCE:
        want = block_gram(u, v, offsets, reduce=reduce, accumulate=accumulate)
        got = wide(block_gram(su, sv, offsets, reduce=reduce, accumulate=accumulate))
        assert got.tobytes() == want.tobytes()
        got = wide(block_gram(u, sv, offsets, su, v, offsets, reduce=reduce, accumulate=accumulate))
        want = block_gram(u, v, offsets, u, v, offsets, reduce=reduce, accumulate=accumulate)
        assert got.tobytes() == want.tobytes()
    assert wide(su).tobytes() == before[0].tobytes(), "U was modified"
    assert wide(sv).tobytes() == before[1].tobytes(), "V was modified"


def test_repeated_rows_by_stride_zero(rng, isa):
    row = rng.standard_normal((1, 40)).astype(np.float32)
    check(np.broadcast_to(row, (6, 40)), np.broadcast_to(row, (6, 40)), [0, 2, 6])


@pytest.mark.parametrize("tiles", ["one_tile", "many_tiles"])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_threads_and_runs_do_not_change_bytes(rng, isa, accumulate, tiles):
    ranks = rng.integers(0, 8 if tiles == "one_tile" else 60, 25)
    one, two = draw(rng, ranks, 40, 45), draw(rng, ranks[::-1], 40, 45)
    s = rng.standard_normal(25)
    for reduce in REDUCE:
        for stacks in (one, (*one, *two)):
            first, *others = (
                block_gram(*stacks, scale=s, reduce=reduce, accumulate=accumulate, threads=t)
                for t in (1, 2, 3, 7, 1, 7)
            )
            assert all(x.tobytes() == first.tobytes() for x in others)


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("most", [8, 60])
def test_symmetric_exactly_and_equal_to_itself_as_second_stack(
    rng, isa, accumulate, most, scaled
):
    one = draw(rng, ragged(rng, 21, most), 33, 65)
    s = rng.standard_normal(21) if scaled else None
    for reduce in ("both", "none"):
        p = check(*one, accumulate=accumulate, reduce=reduce, scale=s)
        assert np.array_equal(p, p.T)
    both = check(*one, accumulate=accumulate, scale=s)
    asymmetric = check(*one, *one, accumulate=accumulate, scale=s, scale2=s)
    slack = allowed(accumulate, *one, scale=s)
    assert (np.abs(both - asymmetric) <= 2 * slack).all()
    assert (np.diag(both) >= 0).all()


def test_permutation_of_adapters(rng, isa):
    u, v, offsets = draw(rng, ragged(rng, 12, 50), 20, 31)
    s, order = rng.standard_normal(12), rng.permutation(12)
    rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
    moved = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
    p = block_gram(u, v, offsets, scale=s)
    q = block_gram(u[rows], v[rows], moved, scale=s[order])
    slack = allowed("fp32", u, v, offsets, scale=s)[np.ix_(order, order)]
    assert (np.abs(q - p[np.ix_(order, order)]) <= 2 * slack).all()


def gauge(rng, u, v, offsets):
    """B M^-1 and M A of every block, M orthogonal times singular values 1 to 5."""
    u, v = u.copy(), v.copy()
    for i, j in itertools.pairwise(offsets):
        left, _ = np.linalg.qr(rng.standard_normal((j - i, j - i)))
        right, _ = np.linalg.qr(rng.standard_normal((j - i, j - i)))
        m = left @ np.diag(np.geomspace(1, 5, j - i)) @ right if j > i else left
        v[i:j], u[i:j] = m @ v[i:j], np.linalg.solve(m.T, u[i:j]) if j > i else u[i:j]
    return u, v


def test_gauge_invariance(rng, isa):
    u, v, offsets = draw(rng, (4, 0, 9, 1), 50, 60, np.float64)
    p = block_gram(u, v, offsets, accumulate="fp64")
    moved_u, moved_v = gauge(rng, u, v, offsets)
    q = block_gram(moved_u, moved_v, offsets, accumulate="fp64")
    slack = bound("exact_algebra") * np.abs(p).max()
    assert np.abs(p - q).max() <= slack
    assert np.abs(block_gram(u, moved_v, offsets, accumulate="fp64") - p).max() > slack


def test_additive_over_columns(rng, isa):
    u, v, offsets = draw(rng, ragged(rng, 9, 30), 200, 41)
    cut = int(rng.integers(1, 200))
    whole = block_gram(u, v, offsets)
    parts = sum(block_gram(x, v, offsets) for x in (u[:, :cut], u[:, cut:]))
    assert (np.abs(whole - parts) <= 2 * allowed("fp32", u, v, offsets)).all()


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_zero_and_duplicate_adapters(rng, isa, accumulate):
    u, v, offsets = draw(rng, (3, 3, 3, 3), 40, 30)
    u[0:3] = 0  # B = 0
    u[6:9], v[6:9] = u[3:6], v[3:6]
    u[9:12], v[9:12] = -u[3:6], v[3:6]
    p = check(u, v, offsets, accumulate=accumulate)
    assert not p[0].any() and not p[:, 0].any()
    assert np.array_equal(np.abs(p[1:, 1:]), np.full((3, 3), p[1, 1]))
    assert p[1, 3] == -p[1, 1]


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_badly_balanced_factors(rng, isa, accumulate):
    u, v, offsets = draw(rng, (4, 5, 2), 60, 70)
    u[4:9] *= 1e15
    v[4:9] *= 1e-15
    u[9:] *= 1e-15
    v[9:] *= 1e15
    check(u, v, offsets, accumulate=accumulate, scale=np.array([1.0, 1e30, 1e-30]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["U", "V"])
@pytest.mark.parametrize("many", [False, True], ids=["one_tile", "many_tiles"])
def test_not_finite_touches_its_adapter_only(rng, isa, many, where, bad):
    u, v, offsets = draw(rng, (5, 0, 330, 3) if many else (5, 0, 3, 3), 140, 70)
    good = block_gram(u, v, offsets)
    i = 2
    row, last = offsets[i + 1] - 2, -1
    (u if where == "U" else v)[row, last] = bad
    p = block_gram(u, v, offsets)
    touched = np.zeros((4, 4), bool)
    touched[i, [0, 2, 3]] = touched[[0, 2, 3], i] = True  # block 1 is empty: a sum of nothing
    assert not np.isfinite(p[touched]).any()
    assert p[~touched].tobytes() == good[~touched].tobytes()
    rows = block_gram(u, v, offsets, reduce="none")
    bad_row = np.arange(len(u)) == row
    assert not np.isfinite(rows[bad_row]).any() and not np.isfinite(rows[:, bad_row]).any()
    assert np.isfinite(rows[~bad_row][:, ~bad_row]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reference_keeps_not_finite_apart_too(rng, bad):
    u, v, offsets = draw(rng, (2, 3, 1), 6, 5, np.float64)
    good = block_gram(u, v, offsets, accumulate="fp64", backend="reference")
    u[0, 0] = bad
    with np.errstate(invalid="ignore"):
        p = block_gram(u, v, offsets, accumulate="fp64", backend="reference")
    assert not np.isfinite(p[0]).any() and not np.isfinite(p[:, 0]).any()
    np.testing.assert_allclose(p[1:, 1:], good[1:, 1:], rtol=1e-13)


def test_numpy_inputs_are_not_copied(rng):
    u, v, offsets = draw(rng, (4, 4), 500_000, 10)
    block_gram(u, v, offsets)
    strided = np.asfortranarray(u)[:, ::2]
    tracemalloc.start()
    block_gram(strided, v, offsets)
    block_gram(u, v, offsets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, f"{peak} bytes allocated for inputs of {u.nbytes}"


def test_torch_inputs_are_not_copied(rng, monkeypatch):
    u, v, offsets = draw(rng, (4, 4), 50, 10)
    tensors = torch.from_numpy(u).bfloat16().t().contiguous().t(), torch.from_numpy(v)
    want = block_gram(*tensors, offsets)

    def refuse(*_args, **_options):
        raise AssertionError("the input was copied")

    for name in ("contiguous", "clone", "float", "double", "numpy", "tolist", "type", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert torch.equal(block_gram(*tensors, offsets), want)


def cosines(p):
    n = np.sqrt(np.diag(p))
    return p / np.outer(n, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cosine_error_of_200_adapters(rng, dtype):
    ranks = rng.choice([1, 4, 8, 16, 17], 200)
    u, v, offsets = draw(rng, ranks, 512, 384)
    v[offsets[100] :] += 3 * v[0]  # some alike, so that cosines are not all near zero
    s = rng.uniform(0.1, 10, 200)
    u, v = (torch.from_numpy(x).to(DTYPES[dtype]) for x in (u, v))
    want = cosines(reference.block_gram(u, v, offsets, scale=s, scale2=s))
    got = cosines(wide(block_gram(u, v, offsets, scale=s)))
    assert np.abs(got - want).max() <= bound("cosine")


def rounded(x, bits=8):
    """x with that many significant bits; 8 is bf16."""
    mantissa, exponent = np.frexp(wide(x))
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent)


def gram_in_bf16(u, v, offsets):
    ones = np.repeat(np.eye(len(offsets) - 1), np.diff(offsets), axis=0)
    return ones.T @ (rounded(wide(u) @ wide(u).T) * rounded(wide(v) @ wide(v).T)) @ ones


def symmetric(u, v, offsets, scale):
    return reference.block_gram(u, v, offsets, scale=scale)


def swap(x, i, j):
    order = np.arange(len(x))
    order[[i, j]] = j, i
    return x[order]


FAULTS = {
    "last_column_dropped": lambda u, v, o, s: symmetric(u[:, :-1], v, o, s),
    "last_row_dropped": lambda u, v, o, s: symmetric(u[:-1], v[:-1], [*o[:-1], o[-1] - 1], s),
    "offsets_off_by_one": lambda u, v, o, s: symmetric(u, v, [0, *(o[1:-1] + 1), o[-1]], s),
    "two_scales_swapped": lambda u, v, o, s: symmetric(u, v, o, swap(s, 0, 1)),
    "scale_on_one_side": lambda u, v, o, s: reference.block_gram(u, v, o, u, v, o, s),
    "two_rows_of_u_swapped": lambda u, v, o, s: symmetric(swap(u, 0, 1), v, o, s),
    "gram_in_bf16": lambda u, v, o, s: gram_in_bf16(u, v, o) * np.outer(s, s),
    "inputs_in_bf16": lambda u, v, o, s: symmetric(rounded(u), v, o, s),
    "v_used_for_u": lambda u, v, o, s: symmetric(v, v, o, s),
    "triangle_unwritten": lambda u, v, o, s: np.triu(symmetric(u, v, o, s)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_float32_bound_catches(rng, fault):
    u, v, offsets = draw(rng, (8, 3, 16, 5), 300, 260)
    s = rng.uniform(0.5, 2, 4)
    slack = allowed("fp32", u, v, offsets, scale=s, scale2=s)
    assert (np.abs(FAULTS[fault](u, v, offsets, s) - symmetric(u, v, offsets, s)) > slack).any()


def test_float64_bound_catches_float32_accumulation(rng):
    one = draw(rng, (8, 3, 16), 300, 260)
    want = reference.block_gram(*one)
    slack = allowed("fp64", *one)
    assert (np.abs(block_gram(*one, accumulate="fp32") - want) > slack).any()
    assert (np.abs(want * (1 + U32 / 1000) - want) > slack).any()


def test_cosine_bound_catches_a_bf16_gram(rng):
    u, v, offsets = draw(rng, (8,) * 20, 300, 260)
    want = cosines(reference.block_gram(u, v, offsets))
    assert np.abs(cosines(gram_in_bf16(u, v, offsets)) - want).max() > bound("cosine")
