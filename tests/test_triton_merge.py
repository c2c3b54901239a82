"""P2 in Triton: elementwise merges in the interpreter, against float64 and against the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")
from test_tiles import COMBINES, KEEPS, WEIGHTS, check  # noqa: E402
from tile_cases import entries as cpu_entries  # noqa: E402
from tile_cases import factors, survivors  # noqa: E402
from tolerances import bound, entry_bound, sketch_bound  # noqa: E402
from triton_merge_child import DEVICE  # noqa: E402
from triton_merge_child import interpreter as child  # noqa: E402
from triton_views import VIEWS  # noqa: E402

from mergeprobe_fast import ops  # noqa: E402
from mergeprobe_fast.errors import BackendError, InputError  # noqa: E402
from mergeprobe_fast.ops import ElementwiseRule, tiles_reference  # noqa: E402

pytestmark = pytest.mark.triton
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
RANKS = [3, 0, 5, 2]
SHAPES = [(1, 37), (37, 1), (1, 1), (5, 33), (17, 30)]  # tiles are 16 x 32
PLAIN = ElementwiseRule()
# What combines is one kernel for everything that keeps: all of it is tried with one of them.
SOME = ("sum_weights", "ties_total_after_1_weights", "ties_frequency_before_0_count", "fisher")


@pytest.fixture(scope="module")
def interpreter():
    return child()


def tensors(given):
    return [(torch.from_numpy(b), torch.from_numpy(a), s) for b, a, s in given]


def entries(interpreter, given):
    """float32 (n, d_out, d_in): the entries of each delta as the merge kernel sees them."""
    asked = [("merge_dense", ([one], [1.0], PLAIN), {}) for one in given]
    return np.stack([x.numpy() for x in interpreter.batch(asked)])


@pytest.fixture(scope="module")
def fused_alike(interpreter):
    """Whether the interpreter and this CPU both round a multiply-add once, or both twice."""
    half = np.float32(2**-12)
    one = (np.array([[-1, 1 + half]], np.float32), np.array([[1], [1 + half]], np.float32), 1.0)
    here = ops.merge_dense([one], [1.0], PLAIN)
    there = interpreter.merge_dense(tensors([one]), [1.0], PLAIN).numpy()
    assert {*here.ravel(), *there.ravel()} <= {2.0**-11, 2.0**-11 + 2.0**-24}
    return np.array_equal(here, there)


@pytest.mark.parametrize("keep", KEEPS)
def test_rules_are_their_definition_and_the_cpus_to_the_bit(rng, interpreter, fused_alike, keep):
    cases, asked = [], []
    for i, combine in enumerate(COMBINES if keep == "magnitude" else SOME):
        arguments = {**KEEPS[keep], **COMBINES[combine]}
        rule = ElementwiseRule(keep=keep, rescale=[1.0, 2.0, 0.5, 3.0], **arguments)
        shape = SHAPES[i % len(SHAPES)]
        given = factors(rng, shape, RANKS)
        if i % 7 == 1:
            given[2] = (0 * given[2][0], *given[2][1:])
        f = None
        if combine.startswith("fisher"):
            f = [(abs(b), abs(a), abs(s)) for b, a, s in factors(rng, shape, RANKS)]
        cases.append((given, rule, f))
        options = {} if f is None else {"fisher": tensors(f)}
        asked.append(("merge_dense", (tensors(given), WEIGHTS, rule), options))
    for (given, rule, f), got in zip(cases, interpreter.batch(asked), strict=True):
        got = got.numpy()
        if fused_alike:
            same = ops.merge_dense(given, WEIGHTS, rule, fisher=f)
            assert np.array_equal(got, same)
            x, y = (None if g is None else cpu_entries(g) for g in (given, f))
        else:
            x, y = (None if g is None else entries(interpreter, tensors(g)) for g in (given, f))
        check(got, x, WEIGHTS, rule, y)


FAULTS = {
    "a step of the rank dropped": {},
    "one tile short": {},
    "one adapter short": {},
    "one draw for all": {"keep": "random", **KEEPS["random"]},
    "one weight off by a thousandth": {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_catch(rng, interpreter, fault):
    rule = ElementwiseRule(**{"combine": "ties", "divide": "count", **FAULTS[fault]})
    given = factors(rng, (20, 30), RANKS)
    x = entries(interpreter, tensors(given))
    good = interpreter.merge_dense(tensors(given), WEIGHTS, rule)
    check(good.numpy(), x, WEIGHTS, rule)
    wrong = interpreter.merge_dense(tensors(given), WEIGHTS, rule, fault=fault).numpy()
    with pytest.raises(AssertionError):
        check(wrong, x, WEIGHTS, rule)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_tiny_and_huge_entries(rng, interpreter, fused_alike, size):
    given = [(b, a, s * size) for b, a, s in factors(rng, (9, 33), [2, 2, 3])]
    rule = ElementwiseRule("magnitude", "ties", low=0.7 * size, divide="count")
    got = interpreter.merge_dense(tensors(given), WEIGHTS[:3], rule).numpy()
    if fused_alike:
        assert np.array_equal(got, ops.merge_dense(given, WEIGHTS[:3], rule))
    elif size < 1e-40:
        pytest.skip("denormal entries are comparable to equal chains only")
    if size > 1e-40:
        check(got, entries(interpreter, tensors(given)), WEIGHTS[:3], rule)
    assert got.any() and not got.all()


@pytest.mark.parametrize("tensor_core", [False, True])
def test_entries_are_the_product_of_factors_of_any_type_and_stride(rng, interpreter, tensor_core):
    kinds = [(view, BF16) for view in VIEWS]
    kinds += [("B_transposed", dtype) for dtype in ([F16] if tensor_core else [F16, F32, F64])]
    cases = []
    for view, dtype in kinds:
        b, a, scale = tensors(factors(rng, (5, 35), [5]))[0]
        cases.append((*(VIEWS[view](x.to(dtype)) for x in (b, a)), scale))
    asked = [("merge_dense", ([one], [1.0], PLAIN), {"tensor_core": tensor_core}) for one in cases]
    for (b, a, s), got in zip(cases, interpreter.batch(asked), strict=True):
        b, a = (x.float().double().numpy() for x in (b, a))
        size = entry_bound(a.shape[0]) * abs(s) * (np.abs(b) @ np.abs(a))
        assert (np.abs(got.numpy() - s * (b @ a)) <= size).all()
        assert (np.abs(s * (b[:, 1:] @ a[1:]) - s * (b @ a)) > size).any()


def test_the_tensor_core_is_asked_for_and_may_be_refused(rng, interpreter):
    mixed = [(b.to(BF16), a.to(F16), s) for b, a, s in tensors(factors(rng, (5, 6), [2, 3]))]
    with pytest.raises(InputError, match=r"^factors: tensor_core needs all bfloat16"):
        interpreter.merge_dense(mixed, [1.0, 1.0], PLAIN, tensor_core=True)


def test_draws_are_the_reference_hash(rng, interpreter):
    seed, stream = (int(x) for x in rng.integers(0, 2**64, 2, np.uint64, endpoint=False))
    for d_in, rows, first in ((50, [0, 1000], 30), (2**31 - 5, [0, 2, 9], 2**31 - 20)):
        found = interpreter.draws(seed, stream, d_in, rows, first, 32)
        for row, got in zip(rows, found, strict=True):
            at = np.arange(row, row + 4, dtype=np.uint64)[:, None] * np.uint64(d_in)
            position = at + np.arange(first, min(first + 32, d_in), dtype=np.uint64)
            want = tiles_reference.counter_hash(seed, stream, position)
            assert np.array_equal(got.numpy(), want.astype(np.int64))
            other = tiles_reference.counter_hash(seed, stream + 1, position)
            assert not np.array_equal(got.numpy(), other.astype(np.int64))


@pytest.mark.parametrize("keep", ["random", "della"])
def test_rows_and_pieces_are_the_whole(rng, interpreter, keep):
    given = tensors(factors(rng, (21, 34), RANKS))
    rule = ElementwiseRule(keep, "ties", divide="count", **KEEPS[keep])
    cuts = [0, *sorted(rng.integers(0, 22, 1).tolist()), 21]
    asked = [("merge_dense", (given, WEIGHTS, rule), {"configs": {"WORKSPACE": 20_000}})]
    asked += [
        ("merge_dense", (given, WEIGHTS, rule), {"rows": rows}) for rows in itertools.pairwise(cuts)
    ]
    whole, *pieces = interpreter.batch([*asked, ("merge_dense", (given, WEIGHTS, rule), {})])
    *pieces, again = pieces
    assert torch.equal(whole, again) and torch.equal(torch.cat(pieces), whole)


def rounded(base, delta):
    """base + delta rounded once, bfloat16 by way of float32, as merge_into has it."""
    exact = base.double().numpy() + delta.double().numpy()
    kind = np.float16 if base.dtype == F16 else np.float32
    return torch.from_numpy(exact.astype(kind)).to(base.dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_base_is_added_and_rounded_once(rng, interpreter, dtype):
    given = tensors(factors(rng, (18, 20), RANKS))
    rule = ElementwiseRule("magnitude", "ties", low=1.0, divide="count")
    delta = interpreter.merge_dense(given, WEIGHTS, rule)
    base = torch.from_numpy(rng.standard_normal((18, 20)) * 30).to(dtype)
    base[delta == 0] = -0.0
    want = torch.where(delta == 0, base, rounded(base, delta))
    if dtype == BF16 and DEVICE == "cpu":
        # The interpreter cuts off what the device rounds (test_triton_merge_compiled.py).
        cut = ((base.float() + delta).view(torch.int32) >> 16 << 16).view(F32).to(BF16)
        assert not torch.equal(cut, want)
        want = torch.where(delta == 0, base, cut)
    wide = torch.full((20, 20), 7.0, dtype=dtype)
    wide[:, :18] = base.T
    view = wide.T[:18]  # one object, also in the child
    asked = [
        ("merge_dense", (given, WEIGHTS, rule), {"base": base}),
        ("merge_dense", (given, WEIGHTS, rule), {"base": view, "out": view}),
        ("merge_dense", (given, WEIGHTS, rule), {"base": base[3:7], "rows": (3, 7)}),
    ]
    (fresh, kept), (inside, same), (piece, _) = interpreter.batch(asked)
    assert fresh.dtype == dtype and torch.equal(kept, base) and same is inside
    for got, part in ((fresh, want), (inside, want), (piece, want[3:7])):
        assert torch.equal(got, part) and torch.equal(got.signbit(), part.signbit())
    assert (delta == 0).any() and not torch.equal(want, base)


def test_float16_is_not_rounded_twice(interpreter):
    # 2048 + 1 + 2^-13: the sum in float32 is half way, and would go to even, down.
    one = (torch.ones(1, 1), torch.full((1, 1), 1 + 2.0**-13), 1.0)
    base = torch.full((1, 1), 2048.0, dtype=F16)
    got, _ = interpreter.merge_dense([one], [1.0], PLAIN, base=base)
    assert got.item() == 2050.0 and (base.float() + one[1]).to(F16).item() == 2048.0


@pytest.mark.parametrize("keep", ["magnitude", "della"])
def test_sketch_against_the_dense_merge(rng, interpreter, keep):
    shape = (18, 33)
    given = tensors(factors(rng, shape, RANKS))
    rule = ElementwiseRule(keep, "ties", divide="count", **KEEPS[keep])
    x = torch.from_numpy(rng.standard_normal((shape[1], 5)).astype(np.float32))
    minus = [
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((18, 3), (3, 33))
    ]
    small = {"configs": {"WORKSPACE": 4 * 33 * (12 if keep == "magnitude" else 98)}}  # two pieces
    merged, whole, again, less = interpreter.batch(
        [
            ("merge_dense", (given, WEIGHTS, rule), {}),
            ("merge_sketch", (given, WEIGHTS, rule, x), {"transpose": True, **small}),
            ("merge_sketch", (given, WEIGHTS, rule, x), {"transpose": True, **small}),
            ("merge_sketch", (given, WEIGHTS, rule, x), {"minus": minus}),
        ]
    )
    merged, x = merged.double().numpy(), x.double().numpy()
    y, z = whole.y.double().numpy(), whole.z.double().numpy()
    assert (np.abs(y - merged @ x) <= sketch_bound(33) * (np.abs(merged) @ np.abs(x))).all()
    size = np.abs(merged.T) @ np.abs(y)
    assert (np.abs(z - merged.T @ y) <= sketch_bound(33, 18) * size).all()
    short = merged[:-1].T @ y[:-1]
    assert (np.abs(short - merged.T @ y) > sketch_bound(33, 18) * size).any()
    squares = np.square(merged).sum()
    assert abs(whole.squares - squares) <= bound("tile_squares") * squares
    assert torch.equal(whole.y, again.y) and torch.equal(whole.z, again.z)
    assert whole.squares == again.squares and less.z is None
    b, a = (m.double().numpy() for m in minus)
    rest = merged - b @ a
    rounding = entry_bound(3) * (np.abs(b) @ np.abs(a)) + 2.0**-24 * np.abs(rest)
    size = (sketch_bound(33) * np.abs(rest) + 2 * rounding) @ np.abs(x)
    assert (np.abs(less.y.numpy() - rest @ x) <= size).all()
    assert less.squares == pytest.approx(np.square(rest).sum(), rel=1e-5)


@pytest.mark.parametrize("keep", KEEPS)
def test_norms_of_what_is_kept(rng, interpreter, keep):
    given = tensors(factors(rng, (18, 33), RANKS))
    rule = ElementwiseRule(keep, rescale=3.0, **KEEPS[keep])
    small = {"configs": {"WORKSPACE": 4 * 33 * 150}}  # two pieces for "della"
    (found,) = interpreter.batch([("pruned_norms", (given, rule), small)])
    x = entries(interpreter, given).astype(np.float64)
    mask = survivors(x, rule)
    size, axes = np.abs(x), (1, 2)
    rest = size * mask
    sums = (size, rest, size**2, rest**2)
    want = [*(s.sum(axes) for s in sums), size.max(axes), rest.max(axes), mask.sum(axes)]
    for got, value in zip(found[:4], want, strict=False):
        assert (np.abs(got - value) <= bound("tile_squares") * value).all()
    for got, value in zip(found[4:], want[4:], strict=True):
        assert np.array_equal(got, value)
    wrong = survivors(x, ElementwiseRule(keep, **{**KEEPS[keep], "low": 0.6, "seed": 10}))
    assert keep == "all" or not np.array_equal(wrong.sum(axes), want[6])


def test_errors_name_the_argument(rng, interpreter):
    given = tensors(factors(rng, (4, 6), [2, 3]))
    b, a, s = given[1]
    bad = a.clone()
    bad[2, 5] = torch.nan
    expected = {
        "factors.1.: B .4, 3. and A .2, 6. are not 4 x 6": (([given[0], (b, a[:2], s)], {})),
        "factors.1.: A must be a matrix of float32": ([given[0], (b, a.long(), s)], {}),
        "factors.1.: scale must be finite": ([given[0], (b, a, torch.inf)], {}),
        "factors.1.: A .*holds": ([given[0], (b, bad, s)], {}),
        "factors.0.: B .*holds": ([(b * torch.inf, a, s)] * 2, {}),
        "factors: expected at least one": ([], {}),
        "factors: the deltas overflow float32": ([(b * 1e38, a * 1e38, s)] * 2, {}),
        "out: expected float32 .4, 6. on c": (given, {"out": torch.empty(4, 6, dtype=BF16)}),
        "out: its entries share memory": (given, {"out": torch.zeros(1, 6).expand(4, 6)}),
        "base: expected float32, bfloat16 or float16 .4, 6.": (given, {"base": torch.zeros(3, 6)}),
        "base: base . update is not finite": (
            given, {"base": torch.full((4, 6), torch.inf, dtype=F16)},
        ),
        "rows: expected 0 <= first <= last <= 4": (given, {"rows": (2, 5)}),
        "fisher: goes with combine='fisher'": (given, {"fisher": given}),
    }  # fmt: skip
    asked = [("merge_dense", (f, [1.0] * 2, PLAIN), options) for f, options in expected.values()]
    for match, error in zip(expected, interpreter.batch(asked), strict=True):
        with pytest.raises(InputError, match=match):
            raise error
    with pytest.raises(InputError, match="the deltas overflow float32"):
        interpreter.found_status([(b * 1e38, a * 1e38, s)] * 2, [1.0] * 2, PLAIN)
    interpreter.found_status(given, [1.0] * 2, PLAIN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_clear_error(rng):
    from mergeprobe_fast.kernels.merge_tiles import merge_dense

    with pytest.raises(BackendError, match="needs a CUDA device, and torch sees none"):
        merge_dense(tensors(factors(rng, (4, 6), [2])), [1.0], PLAIN)
