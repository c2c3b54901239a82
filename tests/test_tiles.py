"""P2, elementwise merges: against dense float64 definitions and PEFT's own functions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tile_cases import SHAPES, definition, entries, factors, survivors
from tolerances import bound, entry_bound, rule_bound, sketch_bound

from mergeprobe_fast.ops import (
    Deltas,
    ElementwiseRule,
    magnitude_thresholds,
    merge_dense,
    merge_sketch,
    pruned_norms,
)

RANKS = [3, 0, 5, 17]
WEIGHTS = [1.0, -0.5, 2.0, 0.3]
CHANCE = {
    "density": [0.4, 0.9, 0.2, 0.5], "epsilon": 0.1, "streams": [5, 6, 2**64 - 1, 0], "seed": 9,
}  # fmt: skip
KEEPS = {
    "all": {},
    "magnitude": {"low": [0.5, 0.0, 1.0, 3.0], "high": [np.inf, np.inf, 2.5, 40.0]},
    "random": CHANCE,
    "della": CHANCE,
}
COMBINES = {
    "sum": {"combine": "sum"},
    "sum_weights": {"combine": "sum", "divide": "weights"},
    **{
        f"ties_{elect}_{'after' if after else 'before'}_{zero}_{divide}": {
            "combine": "ties", "elect": elect, "elect_weighted": after, "zero_sign": zero,
            "divide": divide,
        }
        for elect, after, zero, divide in itertools.product(
            ("total", "frequency"), (False, True), (-1, 0, 1), ("none", "count", "weights")
        )
    },
    "fisher": {"combine": "fisher"},
    "fisher_floor": {"combine": "fisher", "floor": 0.5},
}  # fmt: skip


def check(got, x, weights, rule, fisher=None):
    """Every entry within the bound of the definition; those nobody can decide are few."""
    want, slack, undecided = definition(x.astype(float), weights, rule, fisher)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.isfinite(got).all()
    off = np.abs(got - want) > rule_bound(len(x)) * slack + 1e-38
    assert not (off & ~undecided).any()
    assert undecided.sum() <= 2 + 0.01 * undecided.size


def positive(rng, shape):
    return [(abs(b), abs(a), abs(s)) for b, a, s in factors(rng, shape, RANKS)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_are_the_product_of_the_factors(rng, isa, shape):
    given = factors(rng, shape, RANKS)
    for got, (b, a, s) in zip(entries(given), given, strict=True):
        size = abs(s) * (np.abs(b).astype(float) @ np.abs(a))
        want = s * (b.astype(float) @ a.astype(float))
        assert (np.abs(got - want) <= entry_bound(a.shape[0]) * size).all()
        if a.shape[0] > 3:  # the bound is no wider than a rank-one unit
            short = s * (b[:, 1:].astype(float) @ a[1:])
            assert (np.abs(short - want) > entry_bound(a.shape[0]) * size).any()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("combine", COMBINES)
def test_rules_against_their_definition(rng, isa, keep, combine):
    arguments = {**KEEPS[keep], **COMBINES[combine]}
    rule = ElementwiseRule(keep=keep, rescale=[1.0, 2.0, 0.5, 3.0], **arguments)
    for shape in ((33, 130), SHAPES[int(rng.integers(len(SHAPES)))]):
        given = factors(rng, shape, RANKS)
        f = positive(rng, shape) if combine.startswith("fisher") else None
        got = merge_dense(given, WEIGHTS, rule, fisher=f)
        check(got, entries(given), WEIGHTS, rule, None if f is None else entries(f))


FAULTS = {
    "sign elected after the weights": ({"elect_weighted": True}, {}),
    "sign by frequency": ({"elect": "frequency"}, {}),
    "zero elects minus": ({"zero_sign": -1}, {"rows": "opposed"}),
    "divided by nothing": ({"divide": "none"}, {}),
    "divided by the weights": ({"divide": "weights"}, {}),
    "no rescaling": ({"rescale": 1.0}, {}),
    "threshold a hair too high": ({"low": 1 + 2.0**-23}, {"rows": "one"}),
    "no upper threshold": ({"high": np.inf}, {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_catches(rng, fault):
    changed, options = FAULTS[fault]
    good = {"keep": "magnitude", "low": 1.0, "high": 5.0, "combine": "ties", "divide": "count",
            "rescale": 2.0}  # fmt: skip
    given = factors(rng, (33, 130), [4, 4])
    if options.get("rows") == "opposed":  # equal and opposite: only zero_sign decides
        given[1] = (-given[0][0], given[0][1], given[0][2])
    if options.get("rows") == "one":
        given[0] = (np.ones((33, 1), np.float32), np.ones((1, 130), np.float32), 1.0)
    weights = [1.0, -0.5]
    check(merge_dense(given, weights, ElementwiseRule(**good)), entries(given), weights,
          ElementwiseRule(**good))  # fmt: skip
    wrong = merge_dense(given, weights, ElementwiseRule(**{**good, **changed}))
    with pytest.raises(AssertionError):
        check(wrong, entries(given), weights, ElementwiseRule(**good))


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_ties_and_magnitude_prune_are_pefts(rng, isa, density, n):
    from peft.utils import merge_utils

    given = factors(rng, (60, 111), [4] * n)
    x = [torch.from_numpy(e) for e in entries(given)]
    weights = rng.uniform(0.2, 2.0, n).astype(np.float32)
    low = magnitude_thresholds(given, density)
    pruned = [merge_utils.prune(t, density, "magnitude") if density < 1 else t for t in x]
    stacked, w = torch.stack(pruned), torch.from_numpy(weights)
    for method in ("total", "frequency"):
        mask = merge_utils.calculate_majority_sign_mask(stacked, method)
        theirs = merge_utils.disjoint_merge(stacked * w[:, None, None], mask).numpy()
        rule = ElementwiseRule("magnitude", "ties", low=low, elect=method, divide="count")
        ours = merge_dense(given, weights, rule)
        size = np.abs(stacked.numpy() * weights[:, None, None]).sum(0)
        off = np.abs(ours - theirs) > rule_bound(n) * size
        assert off.sum() <= (0 if n <= 2 else 1)  # a float32 sum that is 0 in one order only
        if density < 1:
            whole = merge_utils.ties([*x], w, density, method).numpy()
            assert np.array_equal(whole, theirs)
    ours = merge_dense(given, weights, ElementwiseRule("magnitude", "sum", low=low))
    theirs = (stacked * w[:, None, None]).sum(0).numpy()
    assert (np.abs(ours - theirs) <= rule_bound(n) * size).all()


def test_dare_is_pefts_with_the_same_masks(rng, isa, monkeypatch):
    from peft.utils import merge_utils

    given = factors(rng, (40, 77), [3, 3, 3])
    x = entries(given)
    rule = ElementwiseRule("random", density=0.3, rescale=1 / 0.3, streams=[1, 2, 3], seed=4)
    masks = iter(survivors(x, rule))
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.from_numpy(next(masks)).to(p.dtype))
    weights = [0.5, 1.5, 1.0]
    theirs = merge_utils.dare_linear([torch.from_numpy(e) for e in x], torch.tensor(weights), 0.3)
    ours = merge_dense(given, weights, rule)
    size = np.abs(x / 0.3 * np.array(weights)[:, None, None]).sum(0)
    assert (np.abs(ours - theirs.numpy()) <= (rule_bound(3) + 2.0**-23) * size).all()


@pytest.mark.parametrize("keep", ["magnitude", "random", "della"])
def test_bits_do_not_depend_on_threads_or_pieces(rng, isa, keep):
    given = factors(rng, (600, 75), RANKS)
    rule = ElementwiseRule(keep, "ties", divide="count", **KEEPS[keep])
    x = rng.standard_normal((75, 20)).astype(np.float32)
    whole = merge_dense(given, WEIGHTS, rule, threads=1)
    sketch = merge_sketch(given, WEIGHTS, rule, x, transpose=True, threads=1)
    norms = pruned_norms(given, rule, threads=1)
    for threads in (1, 2, 3, 7):
        assert merge_dense(given, WEIGHTS, rule, threads=threads).tobytes() == whole.tobytes()
        again = merge_sketch(given, WEIGHTS, rule, x, transpose=True, threads=threads)
        assert all(np.array_equal(p, q) for p, q in zip(sketch, again, strict=True))
        assert all(np.array_equal(p, q) for p, q in zip(
            norms, pruned_norms(given, rule, threads=threads), strict=True
        ))  # fmt: skip
    cuts = [0, *sorted(rng.integers(0, 601, 5)), 600]
    pieces = [merge_dense(given, WEIGHTS, rule, rows=(p, q)) for p, q in itertools.pairwise(cuts)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (7, 5), (800, 520), (33, 6200)], ids=str)
@pytest.mark.parametrize("columns", [0, 1, 16, 37, 80])
def test_sketch_against_the_dense_merge(rng, isa, shape, columns):
    given = factors(rng, shape, RANKS)
    rule = ElementwiseRule("magnitude", "ties", low=1.0, divide="count")
    merged = merge_dense(given, WEIGHTS, rule).astype(float)
    x = rng.standard_normal((shape[1], columns)).astype(np.float32)
    b, a = (rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 3), (3, shape[1])))
    y, z, squares = merge_sketch(given, WEIGHTS, rule, x, transpose=True)
    off = sketch_bound(shape[1]) * (np.abs(merged) @ np.abs(x))
    assert (np.abs(y - merged @ x) <= off).all()
    off = sketch_bound(shape[1], shape[0]) * (np.abs(merged.T) @ np.abs(y))
    assert (np.abs(z - merged.T @ y) <= off).all()
    assert abs(squares - np.square(merged).sum()) <= bound("tile_squares") * squares
    plain = merge_sketch(given, WEIGHTS, rule, x)
    assert plain.z is None and np.array_equal(plain.y, y) and plain.squares == squares

    less = merge_sketch(given, WEIGHTS, rule, x, minus=(b, a))
    rest = merged - b.astype(float) @ a
    rounding = entry_bound(3) * (np.abs(b) @ np.abs(a)) + 2.0**-24 * np.abs(rest)
    off = (sketch_bound(shape[1]) * np.abs(rest) + 2 * rounding) @ np.abs(x)
    assert (np.abs(less.y - rest @ x) <= off).all()
    assert less.squares == pytest.approx(np.square(rest).sum(), rel=1e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(rng, isa, dtype):
    given = []
    for i, (b, a, s) in enumerate(factors(rng, (29, 53), [4, 4, 4])):
        b, a = torch.from_numpy(b).to(dtype), torch.from_numpy(a).to(dtype)
        if i == 1:
            b, a = b.t().contiguous().t(), a.t().contiguous().t()
        given.append((b, a, s))
    plain = [(b.float().numpy().copy(), a.float().numpy().copy(), s) for b, a, s in given]
    rule, weights = ElementwiseRule("magnitude", "ties", low=0.7, divide="count"), WEIGHTS[:3]
    assert np.array_equal(merge_dense(given, weights, rule), merge_dense(plain, weights, rule))


@pytest.mark.parametrize("name", ["BF16", "F16", "F64"])
def test_records_of_stored_dtypes_are_read_in_place(rng, isa, name):
    from mergeprobe_fast.ops._tables import DTYPE_CODE, address

    b, a = torch.randn(21, 5), torch.randn(5, 50)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[name]
    b, a = b.to(kind), a.to(kind)
    stored = [t.view(torch.int16).numpy() if t.itemsize == 2 else t.numpy() for t in (b, a)]
    deltas = Deltas.of([(b.float(), a.float(), 0.5)])
    records = deltas.segments.copy()
    for side, raw, strides in (("u", stored[0], (1, 5)), ("v", stored[1], (50, 1))):
        records[0][side] = (address(raw), *strides, DTYPE_CODE[name], 0)
    again = Deltas(records, 21, 50, stored)
    assert np.array_equal(entries(again), entries(deltas))
    assert np.array_equal(
        merge_dense(again, [1.0], ElementwiseRule(), backend="reference"),
        merge_dense(deltas, [1.0], ElementwiseRule(), backend="reference"),
    )


def test_out_is_written_in_place_with_its_own_stride(rng, isa):
    given = factors(rng, (30, 40), [4])
    room = np.full((30, 64), np.nan, np.float32)
    got = merge_dense(given, [1.0], ElementwiseRule(), out=room[:, 8:48])
    assert np.shares_memory(got, room)
    assert np.array_equal(room[:, 8:48], merge_dense(given, [1.0], ElementwiseRule()))
    assert np.isnan(room[:, :8]).all() and np.isnan(room[:, 48:]).all()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_scale_of_the_entries_does_not_matter(rng, isa, size):
    given = factors(rng, (30, 40), [4, 4])
    scaled = [(b, a, s * size) for b, a, s in given]
    low = magnitude_thresholds(given, 0.4)
    rule = ElementwiseRule("magnitude", "ties", low=low, divide="count")
    other = ElementwiseRule(
        "magnitude", "ties", low=magnitude_thresholds(scaled, 0.4), divide="count"
    )
    one, two = merge_dense(given, [1, 1], rule), merge_dense(scaled, [1, 1], other)
    assert np.count_nonzero((one != 0) != (two != 0)) == 0
    np.testing.assert_allclose(two, one * size, rtol=1e-4)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("combine", ["sum", "sum_weights", "ties_total_before_1_count", "fisher"])
def test_reference_against_the_definition(rng, keep, combine):
    given = factors(rng, (20, 31), RANKS)
    f = positive(rng, (20, 31)) if combine == "fisher" else None
    rule = ElementwiseRule(keep=keep, **KEEPS[keep], **COMBINES[combine])
    dense = [np.stack([s * (b.astype(float) @ a) for b, a, s in g]) for g in (given, f or given)]
    want, _, _ = definition(dense[0], WEIGHTS, rule, dense[1] if f else None)
    got = merge_dense(given, WEIGHTS, rule, fisher=f, backend="reference")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    sketch = merge_sketch(given, WEIGHTS, rule, np.eye(31, dtype=np.float32), fisher=f,
                          transpose=True, backend="reference")  # fmt: skip
    np.testing.assert_allclose(sketch.y, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sketch.z, want.T @ want, rtol=1e-5, atol=1e-5)
    assert sketch.squares == pytest.approx(np.square(want).sum(), rel=1e-9)


def test_weights_of_zero_and_adapters_of_rank_zero(rng, isa):
    given = factors(rng, (20, 60), [4, 0, 4])
    given[2] = (np.zeros((20, 4), np.float32), given[2][1], 1.0)
    x = entries(given)
    assert not x[1].any() and not x[2].any()
    rule = ElementwiseRule("all", "ties", divide="count")
    assert np.array_equal(merge_dense(given, [1, 1, 1], rule), x[0])  # zeros never vote nor count
    assert not merge_dense(given, [0, 1, 1], rule).any()
