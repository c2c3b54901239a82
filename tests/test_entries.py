"""Counts and sums over the entries of deltas, against numpy on the entries that merges see."""

from __future__ import annotations

import numpy as np
import pytest
from tile_cases import SHAPES, entries, factors
from tolerances import bound

from mergeprobe_fast import InputError, _native
from mergeprobe_fast.ops import Deltas, NotFinite, entries_reference, order_statistics
from mergeprobe_fast.ops.entries import (
    Sample,
    entry_moments,
    entry_pairs,
    entry_sizes,
    sign_conflicts,
)

WIDE = [*SHAPES, (200, 130), (33, 400)]
COUNTED = ("conflicts", "both", "top")


def definition(x, thresholds, units):
    """Every pair statistic in float64, from the float32 entries (n, entries); counts are exact."""
    n = len(x)
    out = {k: np.zeros((n, n)) for k in (
        *COUNTED, "mass", "conflict_mass", "opposed", "opposing", "cancelled", "squares",
    )}  # fmt: skip
    for i in range(n):
        for j in range(i + 1, n):
            a, b = np.abs(x[i]), np.abs(x[j])
            conflict = np.sign(x[i]) * np.sign(x[j]) < 0
            row = {
                "conflicts": conflict.sum(),
                "both": ((a > 0) & (b > 0)).sum(),
                "top": ((a >= thresholds[i]) & (b >= thresholds[j]) & (a > 0) & (b > 0)).sum(),
                "mass": a @ b,
                "conflict_mass": (a * b)[conflict].sum(),
                "opposed": a[conflict].sum(),
                "opposing": b[conflict].sum(),
                "cancelled": np.minimum(a * 2.0 ** (units[i] - units[j]), b)[conflict].sum(),
                "squares": (a**2) @ (b**2),
            }
            for k, value in row.items():
                out[k][i, j] = value
    np.fill_diagonal(out["mass"], (x**2).sum(1))
    np.fill_diagonal(out["squares"], (x**4).sum(1))
    return out


def off(got, want):
    """Names of statistics that are off; sums are of positive terms, so errors are relative."""
    wrong = []
    for k, true in want.items():
        allowed = 0 if k in COUNTED else bound("entry sums") * true
        if not (np.abs(getattr(got, k) - true) <= allowed).all():
            wrong.append(k)
    return wrong


def with_atoms(rng, shape, n):
    """Deltas with zero entries, a zero one, one twice, its negative, and a few entries alone."""
    given = factors(rng, shape, list(rng.integers(1, 7, n)))
    if n > 3:
        given[1][0][::2] = 0
        given[2][0][:] = 0
        given[3] = (given[0][0].copy(), -given[0][1], given[0][2])
    if n > 4:
        given[4] = given[0]
    if n > 5:
        given[5][1][:, 1:] = 0
    return given


def looked_at(given, sample):
    """float64 (n, entries): the entries of a sample, as every kernel sees them."""
    x = entries(given).astype(float)
    if sample is None:
        return x.reshape(len(x), -1)
    rows, columns = entries_reference.positions(sample)
    return x[:, rows, columns]


def samples(rng, shape):
    seed = int(rng.integers(2**63))
    return [None, Sample.draw(*shape, 1, seed, 7), Sample.draw(*shape, 700, seed, 7)]


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_pairs_are_what_their_definitions_say(rng, isa, shape, n):
    given, units = with_atoms(rng, shape, n), rng.integers(-3, 4, n)
    for sample in samples(rng, shape):
        x = looked_at(given, sample)
        thresholds = np.quantile(np.abs(x), 0.7, axis=1).astype(np.float32)
        want = definition(x, thresholds, units)
        got = entry_pairs(given, thresholds, units=units, sample=sample)
        assert off(got, want) == []
        signs = entry_pairs(given, magnitudes=False, sample=sample)
        assert np.array_equal(signs.conflicts, got.conflicts)
        assert np.array_equal(signs.both, got.both)
        assert not signs.mass.any() and not signs.top.any()
        ref = entry_pairs(given, thresholds, units=units, sample=sample, backend="reference")
        for k in want:  # entries differ by their rounding there, and with them a sign or two
            slack = 2 if k in COUNTED else 1e-5 * (1 + x.size * np.square(x).max(initial=0) ** 2)
            assert np.abs(getattr(ref, k) - want[k]).max() <= slack


def test_the_bound_sees_a_term_left_out_and_sides_exchanged(rng):
    given = factors(rng, (40, 50), [3, 5, 4])
    x = looked_at(given, None)
    thresholds = np.quantile(np.abs(x), 0.7, axis=1).astype(np.float32)
    got = entry_pairs(given, thresholds)
    assert off(got, definition(x, thresholds, [0, 0, 0])) == []
    without = x.copy()
    without[:, (x[0] * x[1]).argmin()] = 0  # a conflict of the first two
    wrong = {*COUNTED, "mass", "conflict_mass", "opposed", "opposing", "cancelled", "squares"}
    assert {*off(got, definition(without, thresholds, [0, 0, 0])), "top"} == wrong
    swapped = got._replace(opposed=got.opposing, opposing=got.opposed)
    assert off(swapped, definition(x, thresholds, [0, 0, 0])) == ["opposed", "opposing"]
    assert "cancelled" in off(got, definition(x, thresholds, [0, 1, 0]))


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_moments_are_what_their_definitions_say(rng, isa, shape):
    given = with_atoms(rng, shape, 7)
    for sample in samples(rng, shape):
        x = np.abs(looked_at(given, sample))
        for density in (0.0, 0.2, 1.0):
            got = entry_moments(given, density, sample=sample)
            k = int(density * x.shape[1])
            threshold = np.sort(x, axis=1)[:, -k] if k else np.full(7, np.inf)
            top = (x >= threshold[:, None]) & (x > 0)
            # All entries: 0 stands for "every entry", as in order_statistics.
            if sample is None and density == 1:
                threshold = np.zeros(7)
            assert np.array_equal(got.threshold, threshold)
            assert np.array_equal(got.top, top.sum(1))
            assert np.array_equal(got.zeros, (x == 0).sum(1))
            assert (got.entries == x.shape[1]).all()
            for mine, true in (
                (got.l1, x.sum(1)), (got.squares, (x**2).sum(1)), (got.fourths, (x**4).sum(1)),
                (got.top_squares, (x**2 * top).sum(1)),
            ):  # fmt: skip
                assert (np.abs(mine - true) <= bound("entry sums") * true).all()


def test_thresholds_of_all_entries_are_those_of_ties(rng, isa):
    given = Deltas.of(factors(rng, (90, 110), [4, 4]))
    got = entry_moments(given, 0.3)
    want = order_statistics([[given[0]], [given[1]]], [[int(0.3 * 9900)]] * 2)
    assert got.threshold.tolist() == [float(w[0]) for w in want]
    assert got.top.tolist() == [2970, 2970]


def test_a_threshold_among_entries_that_are_alike(rng, isa):
    """The quick search finds nothing between its bounds there."""
    b, a = np.ones((300, 1), np.float32), np.ones((1, 300), np.float32)
    b[::3] = 2
    sample = Sample.draw(300, 300, 30000, 1, 1)
    for density in (0.01, 0.3, 0.9):
        got = entry_moments([(b, a, 1.0), (0 * b, a, 1.0)], density, sample=sample)
        x = looked_at([(b, a, 1.0)], sample)[0]
        threshold = np.sort(x)[-int(density * x.size)]
        assert got.threshold.tolist() == [threshold, 0]
        assert got.top.tolist() == [(x >= threshold).sum(), 0]


@pytest.mark.parametrize("split", [1, 3, 6])
def test_pairs_across_a_split_are_those_of_all(rng, isa, split):
    given = with_atoms(rng, (50, 60), 7)
    whole, part = entry_pairs(given), entry_pairs(given, split=split)
    for one, other in zip(whole, part, strict=True):
        kept = np.eye(7, dtype=bool)
        kept[:split, split:] = True
        assert np.array_equal(np.where(kept, one, 0), other)


def test_bits_do_not_depend_on_threads_nor_on_company(rng, isa):
    given = with_atoms(rng, (300, 200), 9)
    thresholds = entry_moments(given, 0.2).threshold
    for sample in (None, Sample.draw(300, 200, 5000, 3, 4)):
        one = entry_pairs(given, thresholds, sample=sample, threads=1)
        some = entry_pairs(given[:2] + given[6:8], thresholds[[0, 1, 6, 7]], sample=sample)
        picked = np.ix_([0, 1, 6, 7], [0, 1, 6, 7])
        for threads in (2, 5):
            other = entry_pairs(given, thresholds, sample=sample, threads=threads)
            assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
        assert all(np.array_equal(x[picked], y) for x, y in zip(one, some, strict=True))
        first = entry_moments(given, 0.2, sample=sample, threads=1)
        second = entry_moments(given, 0.2, sample=sample, threads=3)
        assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_every_stored_type_in_any_order_of_memory(rng, isa, dtype):
    from mergeprobe_fast.ops._tables import DTYPE_CODE, SEGMENT, address

    stored = {
        "F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": np.uint16
    }[dtype]  # fmt: skip
    made, wide = [], []
    for _ in range(3):
        b, a = (rng.standard_normal(s).astype(np.float32) for s in ((70, 5), (5, 90)))
        if dtype == "BF16":
            b, a = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (b, a))
            wide.append([(x.astype(np.uint32) << 16).view(np.float32) for x in (b, a)])
        else:
            b, a = b.astype(stored), a.astype(stored)
            wide.append([x.astype(np.float32) for x in (b, a)])
        made.append((np.asfortranarray(b) if len(made) == 1 else b, a))
    segments = np.zeros(3, SEGMENT)
    for s, (b, a) in zip(segments, made, strict=True):
        for side, x in (("u", b.T), ("v", a)):
            steps = tuple(step // x.itemsize for step in x.strides)
            s[side] = (address(x), *steps, DTYPE_CODE[dtype], 0)
        s["rank"], s["scale"] = 5, 0.5
    deltas = Deltas(segments, 70, 90, made)
    same = [(b, a, 0.5) for b, a in wide]
    for sample in (None, Sample.draw(70, 90, 2000, 1, 1)):
        got, want = entry_pairs(deltas, sample=sample), entry_pairs(same, sample=sample)
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))
    assert np.allclose(entry_sizes(deltas), entry_sizes(deltas, backend="reference"), rtol=1e-12)


def test_both_ways_of_counting_bits_agree(rng):
    deltas = Deltas.of(with_atoms(rng, (200, 300), 7))
    none, found = np.zeros(0, np.int32), []
    for vpopcnt in (True, False):
        counts = np.empty((7, 7, 3), np.int64)
        status, _ = _native.core().entry_pairs(
            deltas.segments, 200, 300, none, none, 0, 0, np.full(7, 0.5, np.float32),
            np.zeros(7, np.int32), counts, None, vpopcnt, 1, _native.isa(),
        )  # fmt: skip
        assert status == 0
        found.append(counts)
    assert np.array_equal(*found) and found[0].any()


def test_sign_conflicts_of_opposite_and_of_equal_deltas(rng, isa):
    given = factors(rng, (60, 70), [3, 4])
    b, a, s = given[0]
    got = sign_conflicts([given[0], given[1], (b, a, -s), given[0], (0 * b, a, s)])
    assert (got == got.T)[:4, :4].all() and (np.diag(got) == 0).all()
    assert got[0, 2] == 1 and got[0, 3] == 0 and np.isnan(got[4, :4]).all()
    assert 0.3 < got[0, 1] < 0.7 and got[0, 1] + got[1, 2] == 1


def test_what_is_refused(rng, isa):
    given = factors(rng, (20, 30), [2, 2, 2])
    bad = [(b.copy(), a.copy(), s) for b, a, s in given]
    bad[1][0][19, 1] = np.nan
    sample = Sample.draw(20, 30, 128, 1, 1)
    for call in (entry_sizes, entry_pairs, entry_moments):
        with pytest.raises(NotFinite) as caught:
            call(bad)
        assert (caught.value.segment, caught.value.side) == (1, "B")
    huge = [(b * 1e30, a * 1e30, s) for b, a, s in given]
    for options in ({}, {"sample": sample}):
        for call in (entry_pairs, entry_moments):
            with pytest.raises(InputError, match="overflow float32"):
                call(huge, **options)
    for options, key in (
        ({"split": 4}, "split"), ({"thresholds": [1.0]}, "thresholds"), ({"units": [1]}, "units"),
        ({"backend": "x"}, "backend"), ({"sample": Sample.draw(90, 30, 9, 1, 1)}, "sample"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            entry_pairs(given, **options)
        assert caught.value.key == key
    with pytest.raises(InputError, match="0 to 1"):
        entry_moments(given, 1.5)
    with pytest.raises(InputError, match="at least one"):
        entry_sizes([])


@pytest.mark.parametrize("shape", [(64, 96), (32, 160), (33, 130), (100, 17)], ids=str)
def test_a_sample_uses_rows_and_columns_evenly_and_no_entry_twice(rng, shape):
    groups, panels = -(-shape[0] // 8), -(-shape[1] // 16)
    whole = shape[0] % 8 == 0 and shape[1] % 16 == 0
    for tiles in (1, 3, groups, panels, groups * panels - 1):
        sample = Sample.draw(*shape, 128 * tiles, int(rng.integers(2**63)), 5)
        rows, columns = entries_reference.positions(sample)
        assert len(np.unique(rows * shape[1] + columns)) == len(rows)
        if whole:
            assert len(rows) == 128 * tiles
            assert np.ptp(np.bincount(rows, minlength=shape[0])) in (0, 16)
            assert np.ptp(np.bincount(columns, minlength=shape[1])) in (0, 8)
    assert Sample.draw(*shape, 128 * groups * panels, 1, 1) is None


def test_a_sample_is_a_function_of_its_seed_and_stream():
    a, b, c, d = (Sample.draw(70, 90, 128, s, t) for s, t in ((1, 2), (1, 2), (1, 4), (3, 2)))
    assert np.array_equal(a.rows, b.rows) and np.array_equal(a.columns, b.columns)
    assert not np.array_equal(a.rows, c.rows) and not np.array_equal(a.rows, d.rows)
    assert np.array_equal(np.sort(a.rows), np.arange(70))
    assert np.array_equal(np.sort(a.columns), np.arange(90))


def test_every_entry_is_as_likely_as_any_other():
    hits, draws = np.zeros((20, 40)), 1500
    for seed in range(draws):
        hits[entries_reference.positions(Sample.draw(20, 40, 256, seed, 9))] += 1
    chance = hits.mean() / draws
    assert np.abs(hits - draws * chance).max() < 6 * np.sqrt(draws * chance * (1 - chance))
