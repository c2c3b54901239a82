"""P2 that ends in numbers: order statistics, norms, and the chance behind DARE and DELLA."""

from __future__ import annotations

import numpy as np
import pytest
from tile_cases import SHAPES, entries, factors, survivors
from tolerances import bound, entry_bound

from mergeprobe_fast import InputError
from mergeprobe_fast.ops import (
    Deltas,
    ElementwiseRule,
    magnitude_thresholds,
    merge_dense,
    order_statistics,
    pruned_norms,
    stream,
    tiles_reference,
)


def kth(values, k):
    """The definition: by sorting everything."""
    if k == 0:
        return np.float32(np.inf)
    return np.sort(np.abs(values).ravel())[::-1][k - 1] if k < values.size else np.float32(0)


def counts_of(size, rng):
    some = int(rng.integers(size))
    return sorted({0, 1, 2, size // 3, size // 2, some, size - 1, size, size + 5})


@pytest.mark.parametrize("shape", [*SHAPES, (200, 300), (1, 9000), (9000, 1)], ids=str)
def test_order_statistics_are_those_of_the_sorted_entries(rng, isa, shape):
    deltas = Deltas.of(factors(rng, shape, [3, 0, 8]))
    x, ks = entries(deltas), counts_of(deltas.size, rng)
    got = order_statistics([[deltas[i]] for i in range(3)] + [[deltas]], [ks] * 3 + [[7, 3]])
    for found, values in zip(got, x, strict=False):
        assert found.dtype == np.float32
        assert found.tolist() == [kth(values, k) for k in ks]
    assert got[3].tolist() == [kth(x, 7), kth(x, 3)]


def test_a_group_spans_modules_of_any_shape(rng, isa):
    blocks = [Deltas.of(factors(rng, shape, [2]))[0] for shape in ((90, 80), (1, 7), (400, 33))]
    everything = np.concatenate([entries(b).ravel() for b in blocks])
    ks = counts_of(everything.size, rng)
    for threads in (1, 2, 3):
        (got,) = order_statistics([blocks], [ks], threads=threads)
        assert got.tolist() == [kth(everything, k) for k in ks]
    assert order_statistics([], []) == []
    assert order_statistics([[], blocks], [[0, 1], [1]])[0].tolist() == [np.inf, 0]


def ones(d_out, d_in):
    return np.ones((d_out, 1), np.float32), np.ones((1, d_in), np.float32)


def half_zero(b, a):
    b[::2] = 0
    return b, a


def two_values(b, a):
    b[::3] = 2
    return b, a


def one_loud_row(b, a):
    b[b.shape[0] // 2] = 1e6
    return b, a * np.arange(1, a.shape[1] + 1, dtype=np.float32)


ATOMS = {
    "zero": lambda b, a: (b * 0, a), "constant": lambda b, a: (b, a), "half_zero": half_zero,
    "two_values": two_values, "one_loud_row": one_loud_row,
    "integers": lambda b, a: (np.round(b * np.arange(len(b))[:, None] % 7).astype("f4"), a),
    "denormal": lambda b, a: (b * np.float32(1e-30), a * np.float32(1e-12)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ATOMS)
def test_order_statistics_where_many_entries_are_alike(rng, isa, kind):
    b, a = ATOMS[kind](*ones(700, 650))
    deltas = Deltas.of([(b, a, 1.0)])
    x = entries(deltas)
    ks = counts_of(x.size, rng)
    (got,) = order_statistics([[deltas]], [ks])
    assert got.tolist() == [kth(x, k) for k in ks]


def test_the_check_catches_a_rank_that_is_off_by_one(rng):
    deltas = Deltas.of(factors(rng, (200, 300), [3]))
    (got,) = order_statistics([[deltas]], [[1001]])
    assert got[0] != kth(entries(deltas), 1000)


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.3, 0.5, 1.0, 2.0])
def test_thresholds_keep_int_of_density_times_size(rng, isa, density):
    given = factors(rng, (90, 110), [4, 4])
    low = magnitude_thresholds(given, density)
    kept = (np.abs(entries(given)) >= low[:, None, None]).sum((1, 2))
    assert kept.tolist() == [int(min(density, 1) * 9900)] * 2
    each = magnitude_thresholds(given, [0.1, density])
    assert each[1] == low[1] and each[0] == magnitude_thresholds(given[:1], 0.1)[0]


def test_equal_entries_at_the_threshold_are_all_kept(rng, isa):
    b, a = ones(30, 50)
    low = magnitude_thresholds([(b, a, -2.0)], 0.3)
    assert low.tolist() == [2.0]
    rule = ElementwiseRule("magnitude", low=low)
    assert (merge_dense([(b, a, -2.0)], [1.0], rule) == -2).all()


@pytest.mark.parametrize("scale", [1.0, 0.0])  # infinity, and NaN
@pytest.mark.parametrize("d_out", [3, 90])
def test_products_that_overflow_are_refused(isa, scale, d_out):
    given = [(np.full((d_out, 1), 1e30, "f4"), np.full((1, 80), 1e30, "f4"), scale)]
    calls = [
        lambda: magnitude_thresholds(given, 0.3),
        lambda: pruned_norms(given, ElementwiseRule()),
        lambda: merge_dense(given, [1.0], ElementwiseRule()),
    ]
    for call in calls:
        with pytest.raises(InputError, match="the deltas overflow float32"):
            call()


CHANCE = {"density": 0.4, "epsilon": 0.2, "seed": 3, "streams": [1, 2, 3]}
KEEPS = {
    "all": {}, "magnitude": {"low": [0.5, 0.0, 2.0], "high": [2.0, np.inf, np.inf]},
    "random": CHANCE, "della": CHANCE,
}  # fmt: skip


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_before_and_after_pruning(rng, isa, keep, shape):
    given = factors(rng, shape, [3, 0, 8])
    rule = ElementwiseRule(keep, rescale=7.0, **KEEPS[keep])
    x = entries(given).astype(float)
    mask = survivors(x, rule)
    got, size = pruned_norms(given, rule), np.abs(x)
    rest = size * mask
    for mine, true in zip(got, (
        size.sum((1, 2)), rest.sum((1, 2)), (size**2).sum((1, 2)), (rest**2).sum((1, 2)),
    ), strict=False):  # fmt: skip
        assert (np.abs(mine - true) <= bound("tile_squares") * true).all()
    assert got.largest.tolist() == size.max((1, 2)).tolist()
    assert got.largest_kept.tolist() == rest.max((1, 2)).tolist()
    assert got.kept.tolist() == mask.sum((1, 2)).tolist()
    ref = pruned_norms(given, rule, backend="reference")
    if keep in ("all", "random"):  # elsewhere float32 and float64 may rank neighbours differently
        for mine, other in zip(got, ref, strict=True):
            # Products cancel: an entry may be a small share of its terms, which are below 100.
            off = 100 * entry_bound(8) * x[0].size
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=off)


def unit(d_out, d_in):
    """A delta of ones, however large: nothing of that size is allocated."""
    b = np.broadcast_to(np.float32(1), (d_out, 1))
    return [(b, np.ones((1, d_in), np.float32), 1.0)]


@pytest.mark.parametrize("d_in", [2000, 4096])
def test_random_bits_are_those_of_the_reference_also_beyond_32_bits_of_position(isa, d_in):
    wrap = 2**32 // d_in
    for keep in ("random", "della"):
        rule = ElementwiseRule(keep, density=0.37, seed=2**63 + 5, streams=[stream("m", "a")])
        for first in (0, wrap - 1, 2 * wrap - 1):
            got = merge_dense(unit(2 * wrap + 9, d_in), [1.0], rule, rows=(first, first + 3)) != 0
            position = np.arange(first * d_in, (first + 3) * d_in, dtype=np.uint64).reshape(3, d_in)
            draw = tiles_reference.counter_hash(rule.seed, rule.streams[0], position)
            assert np.array_equal(got, draw < np.floor(0.37 * 2**32))


def deviation(hits, chance, trials):
    """In standard deviations of a binomial."""
    return abs(np.mean(hits) - chance) * np.sqrt(trials / (chance * (1 - chance)))


def test_random_bits_are_uniform_and_every_bit_is_fair(rng):
    n = 1 << 20
    for start in (0, int(rng.integers(2**40))):
        at = np.arange(start, start + n, dtype=np.uint64)
        draw = tiles_reference.counter_hash(int(rng.integers(2**62)), int(rng.integers(2**62)), at)
        for part in (draw >> np.uint32(24), draw & np.uint32(255)):
            seen = np.bincount(part, minlength=256)
            chi = ((seen - n / 256) ** 2 / (n / 256)).sum()
            assert abs(chi - 255) < 6 * np.sqrt(2 * 255)
        for bit in range(32):
            assert deviation(draw >> np.uint32(bit) & np.uint32(1), 0.5, n) < 6


def test_draws_of_other_streams_seeds_and_neighbours_are_independent(rng):
    n, seed, name = 1 << 20, int(rng.integers(2**62)), int(rng.integers(2**62))
    at = np.arange(n, dtype=np.uint64)

    def kept(seed, name, shift=0):
        return tiles_reference.counter_hash(seed, name, at + np.uint64(shift)) < 0.3 * 2**32

    mine = kept(seed, name)
    others = [
        kept(seed, name + 1), kept(seed + 1, name), kept(name, seed), kept(seed ^ 1 << 40, name),
        kept(seed, name ^ 1 << 63), *(kept(seed, name, s) for s in (1, 2, 48, 1000, 4096, 2**32)),
    ]  # fmt: skip
    for other in others:
        assert deviation(mine & other, 0.09, n) < 6
    same = kept(seed, name)
    assert deviation(mine & same, 0.09, n) > 6, "the test would not see a repeated stream"


def test_dare_is_unbiased(rng):
    given = factors(rng, (20, 30), [4])
    x, draws = entries(given)[0].astype(float), 3000
    mean = np.mean([
        merge_dense(given, [1.0], ElementwiseRule(
            "random", density=0.25, rescale=4.0, seed=int(rng.integers(2**63)), streams=[7]
        ), threads=1)
        for _ in range(draws)
    ], axis=0)  # fmt: skip
    spread = np.abs(x) * np.sqrt(0.75 / 0.25 / draws)
    assert (np.abs(mean - x) <= 6 * spread).all()


def test_della_keeps_larger_entries_more_often_as_its_paper_says(rng):
    d_in, rows, density, epsilon = 11, 20000, 0.5, 0.3
    a = rng.permutation(np.arange(1, d_in + 1)).astype(np.float32)[None]
    rule = ElementwiseRule("della", density=density, epsilon=epsilon, seed=1, streams=[2])
    merged = merge_dense([(np.ones((rows, 1), np.float32), a, 1.0)], [1.0], rule)
    for column, magnitude in enumerate(a[0]):
        chance = density - epsilon + 2 * epsilon * (magnitude - 1) / (d_in - 1)
        assert deviation(merged[:, column] != 0, chance, rows) < 6


def test_streams_are_distinct_and_stable():
    names = [("m", "a"), ("m", "b"), ("n", "a"), ("ma",), ("m", "", "a")]
    assert len({stream(*n) for n in names}) == len(names)
    assert stream("m", "a") == stream("m", "a") < 2**64
