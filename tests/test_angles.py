"""Columns from principal angles against their definitions on materialised deltas, float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from angle_truth import MODULES, NAMES, block_diagonal, definitions, expected, of_logs
from small_cores import two_gauges
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast import _native
from mergeprobe_fast.engine import angles, passes
from mergeprobe_fast.features.angles import FAMILY
from mergeprobe_fast.ops.angles import STATISTICS
from mergeprobe_fast.recorded import NOTHING


def columns(zoo, threads=2, pairs=None):
    data = FAMILY.compute(zoo, NOTHING, threads)
    a, b = pairs or np.triu_indices(len(zoo), 1)
    return {c.name: c.finish(data, a, b) for c in FAMILY.pairs}


def differences(found, want, made):
    """Names of columns that are off, with by how much of what they can be."""
    off, logs = {}, of_logs(made)
    assert set(found) == set(want)
    for name, values in want.items():
        if (np.isnan(found[name]) != np.isnan(values)).any():
            off[name] = "NaN"
            continue
        allowed = bound("angles") * np.maximum(1.0, np.abs(values))
        error = np.abs(found[name] - values) - allowed - (logs if "martin" in name else 0.0)
        if np.nanmax(error, initial=0) > 0:
            off[name] = float(np.nanmax(error))
    return off


def rank_1_written_as_3(m):
    """A row twice and a row of zeros."""
    return np.vstack([m.a[:1], m.a[:1], 0 * m.a[:1]]), np.repeat(m.b[:, :1], 3, axis=1)


def random_zoo(folder, rng, dtype="F32", ranks=(1, 7)):
    """Ten adapters: subsets of modules, mixed ranks, and every special relation to the first."""

    def make(i, names=NAMES, **options):
        sizes = {n: (*MODULES[n][:2], int(rng.integers(*ranks))) for n in names}
        return make_adapter(
            folder / f"adapter_{i}", sizes, alpha=float(rng.uniform(1, 30)), dtype=dtype,
            seed=int(rng.integers(2**32)), magnitude=float(rng.uniform(0.1, 10)), **options,
        )  # fmt: skip

    def like(i, other, change):
        factors = {n: change(m) for n, m in other.modules.items()}
        return make(i, list(factors), factors=factors)

    first = make(0)
    return [
        first,
        make(1, NAMES[:3]),
        make(2, NAMES[3:]),
        make(3, NAMES[1:4], zero_b=(NAMES[2],)),
        make(4, zero_b=True),
        like(5, first, lambda m: (m.a, m.b)),
        like(6, first, lambda m: (m.a, -m.b)),
        like(7, first, rank_1_written_as_3),
        make(8, NAMES[:4]),
        like(9, first, lambda m: (m.a, rng.standard_normal(m.b.shape))),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_columns_are_their_definitions(rng, isa, tmp_path, dtype):
    made = random_zoo(tmp_path, rng, dtype)
    assert not differences(columns(mpf.open_zoo(tmp_path)), expected(made), made)


def test_ranks_beyond_the_kernels_go_to_lapack(rng, tmp_path):
    # Nothing square: its smallest singular value might be what the truth takes for rounding.
    modules = {"a.b.c": (70, 60, 1), "a.b.d": (58, 80, 1)}
    made = [
        make_adapter(tmp_path / str(i), modules, ranks=dict(zip(modules, ranks, strict=True)),
                     seed=int(rng.integers(2**32)))
        for i, ranks in enumerate([(40, 5), (32, 33), (4, 45), (34, 8)])
    ]  # fmt: skip
    made.append(make_adapter(tmp_path / "4", modules, factors={
        n: (m.a, m.b) for n, m in made[0].modules.items()}))  # fmt: skip
    assert not differences(columns(mpf.open_zoo(tmp_path)), expected(made), made)


def test_more_rows_than_a_tile_holds(rng, isa, tmp_path, monkeypatch):
    made = [
        make_adapter(tmp_path / f"{i:02d}", {"m.0.x": (40, 36, int(rng.integers(9, 17)))},
                     seed=int(rng.integers(2**32)))
        for i in range(26)
    ]  # fmt: skip
    assert sum(len(m.modules["m.0.x"].a) for m in made) > 256
    zoo = mpf.open_zoo(tmp_path)
    found, alone = columns(zoo, threads=3), columns(zoo, threads=1)
    assert not differences(found, expected(made), made)
    for name, values in alone.items():
        np.testing.assert_array_equal(values, found[name], err_msg=name)


def test_blocks_chunks_threads_and_small_calls_change_nothing(rng, tmp_path, monkeypatch):
    random_zoo(tmp_path, rng)
    zoo = mpf.open_zoo(tmp_path)
    want = columns(zoo)
    for name, values in columns(zoo, threads=1).items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
    monkeypatch.setattr(angles, "RESULT_BYTES", 1)
    for name, values in columns(zoo).items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
    monkeypatch.setattr(angles, "FACTOR_BYTES", 1)
    assert len(angles._blocks(zoo, 1)) == 5
    for name, values in columns(zoo).items():
        np.testing.assert_allclose(values, want[name], atol=1e-7, err_msg=name)


def test_a_pair_the_other_way_round_has_its_twins(rng, tmp_path):
    random_zoo(tmp_path, rng)
    zoo = mpf.open_zoo(tmp_path)
    a, b = np.triu_indices(len(zoo), 1)
    found, turned = columns(zoo), columns(zoo, pairs=(b, a))
    twin = {c.name: c.directed_twin or c.name for c in FAMILY.pairs}
    for name, values in turned.items():
        np.testing.assert_array_equal(values, found[twin[name]], err_msg=name)
    alone = columns(zoo, pairs=(a, a))
    assert all(np.isnan(v).all() for v in alone.values())


def test_moved_factors_change_nothing(rng, isa, tmp_path):
    # The deltas are the same to the bit; singular vectors are those of float64.
    made, _ = two_gauges(tmp_path, rng)
    one, two = (columns(mpf.open_zoo(tmp_path / x)) for x in ("first", "second"))
    assert not differences(one, two, made)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_angles_of_a_space_with_itself_are_zero(rng, isa, tmp_path, condition):
    left, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    right, _ = np.linalg.qr(rng.standard_normal((40, 6)))
    a = (left * np.geomspace(1, 1 / condition, 6)) @ right.T
    size = {"m.0.x": (30, 40, 6)}
    for i in range(2):
        make_adapter(tmp_path / str(i), size, factors={"m.0.x": (a, rng.standard_normal((30, 6)))})
    found = columns(mpf.open_zoo(tmp_path))
    for name in ("geodesic", "geodesic_full", "chordal", "procrustes", "gap", "binet_cauchy"):
        assert found[f"row_{name}"][0] < 1e-6, name
    assert found["row_cosine_smallest"][0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-1, 1e-3, 1e-4, 1e-5])
def test_small_angles_are_right(rng, isa, tmp_path, angle):
    basis, _ = np.linalg.qr(rng.standard_normal((40, 6)))
    turned = basis[:, :3] * np.cos(angle) + basis[:, 3:] * np.sin(angle)
    b = np.linalg.qr(rng.standard_normal((30, 3)))[0] * [3, 2, 1]
    size = {"m.0.x": (30, 40, 3)}
    made = [make_adapter(tmp_path / str(i), size, factors={"m.0.x": (x.T, b)})
            for i, x in enumerate((basis[:, :3], turned))]  # fmt: skip
    found = columns(mpf.open_zoo(tmp_path))
    want = expected(made)
    assert want["row_geodesic"][0] == pytest.approx(angle * 3**0.5, rel=1e-2)
    assert found["row_geodesic"][0] == pytest.approx(want["row_geodesic"][0], abs=bound("angles"))
    cosines = made[0].modules["m.0.x"].a.astype(np.float32) @ made[1].modules["m.0.x"].a.T
    naive = np.arccos(np.clip(np.linalg.svd(cosines.astype(np.float32), compute_uv=False), 0, 1))
    if angle < 1e-2:
        assert abs(np.linalg.norm(naive) - want["row_geodesic"][0]) > bound("angles")


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_distances_of_near_duplicates_are_right(rng, isa, tmp_path, apart):
    first = make_adapter(tmp_path / "0", MODULES, seed=int(rng.integers(2**32)))
    factors = {n: (m.a, m.b * (1 + apart * rng.standard_normal(m.b.shape)))
               for n, m in first.modules.items()}  # fmt: skip
    made = [first, make_adapter(tmp_path / "1", MODULES, factors=factors)]
    want = expected(made)["distance"][0]
    found = columns(mpf.open_zoo(tmp_path))["distance"][0]
    assert abs(found - want) < 1e-7 * first.norm
    # From cosines in float32: 3e-4 of the norm.
    w = [block_diagonal(x, {n: m.delta.shape for n, m in x.modules.items()}) for x in made]
    gram = np.float32([[(x * y).sum() for y in w] for x in w])
    naive = math.sqrt(max(float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]), 0.0))
    if apart < 1e-4:
        assert abs(naive - want) > 1e-7 * first.norm


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_size_changes_no_ratio(rng, tmp_path, size):
    root = math.sqrt(size)
    for i in range(4):
        for folder, magnitude, alpha in (("plain", 1, 8), ("sized", root, 8 * size / root)):
            options = {"magnitude": magnitude, "alpha": alpha}
            make_adapter(tmp_path / folder / str(i), MODULES, seed=i, **options)
    plain, sized = (columns(mpf.open_zoo(tmp_path / x)) for x in ("plain", "sized"))
    sized["distance"] = sized["distance"] / size
    for name, values in plain.items():
        np.testing.assert_allclose(sized[name], values, rtol=1e-5, err_msg=name)


def test_one_row_and_one_column(rng, isa, tmp_path):
    sizes = {"row": (1, 17, 1), "column": (19, 1, 1), "narrow": (5, 4, 3)}
    made = [make_adapter(tmp_path / str(i), sizes, seed=int(rng.integers(2**32))) for i in range(3)]
    found = columns(mpf.open_zoo(tmp_path))
    assert not differences(found, expected(made), made)
    assert found["spectral_gain"].max() <= 2


def test_disjoint_modules(tmp_path):
    for i, names in enumerate((NAMES[:2], NAMES[2:])):
        make_adapter(tmp_path / str(i), {n: MODULES[n] for n in names}, seed=i)
    found = columns(mpf.open_zoo(tmp_path))
    for name, value in {
        "row_cosine_largest": 0, "col_cosine_mean": 0, "row_gap": 1, "two_sided_a_by_b": 0,
        "row_geodesic": math.pi / 2 * 8**0.5, "col_chordal": 8**0.5, "task_interference": 0,
        "spectral_gain": 1, "counted_a": 1,
    }.items():  # fmt: skip
        assert found[name][0] == pytest.approx(value), name
    assert np.isnan(found["row_gap.mean"][0]) and np.isnan(found["col_overlap_top"][0])


def test_independent_updates_have_the_null_means(rng, tmp_path):
    ranks = rng.integers(2, 7, 24)
    d_out, d_in = 60, 45
    for i, r in enumerate(ranks):
        make_adapter(tmp_path / str(i), {"m.0.x": (d_out, d_in, int(r))},
                     seed=int(rng.integers(2**32)))  # fmt: skip
    found = columns(mpf.open_zoo(tmp_path))
    a, b = (ranks[i] for i in np.triu_indices(24, 1))
    least, most = np.minimum(a, b), np.maximum(a, b)
    for name, value in {
        "two_sided_a_by_b": b * b / (d_out * d_in),
        "tangent_a_by_b": b / d_in + b / d_out - b * b / (d_out * d_in),
        "row_overlap_top": least / d_in,
    }.items():  # fmt: skip
        assert found[name].mean() == pytest.approx(value.mean(), rel=0.15), name
    assert found["row_chordal"].mean() == pytest.approx(
        np.sqrt(least * (1 - most / d_in)).mean(), rel=0.02
    )
    assert found["relative_distance"].mean() == pytest.approx(1 / 2**0.5, abs=0.03)


def test_nulls_of_flat_spectra(rng, tmp_path):
    k, d_out, d_in = 6, 500, 400
    for i in range(16):
        b, a = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in (d_out, d_in))
        make_adapter(tmp_path / str(i), {"m.0.x": (d_out, d_in, k)}, factors={"m.0.x": (a.T, b)})
    found = columns(mpf.open_zoo(tmp_path))
    root = math.sqrt(d_out * d_in)
    # Of 120 pairs; what is said for d much larger than k, square matrices of k Gaussian columns.
    for name, value, within in (
        ("row_cosine_mean", 0.85 * math.sqrt(k / d_in), 0.08),
        ("row_cosine_largest", 0.9 * 2 * math.sqrt(k / d_in), 0.13),
        ("row_geodesic", math.sqrt(k) * math.pi / 2, 0.1),
        ("row_procrustes", math.sqrt(2 * k), 0.1),
        ("row_martin", math.log(d_in / k) + 1, 0.1),
        ("col_aligned_cosine", 0.85 * math.sqrt(k / d_out), 0.08),
        ("task_interference", 0.77 * k**1.5 / root, 0.1),
        ("task_interference_square", k / root, 0.12),
        ("spectral_gain", 1.13, 0.05),
        ("nuclear_gain", 2, 0.05),
        ("col_binet_cauchy", 1, 1e-6),
    ):
        assert found[name].mean() == pytest.approx(value, rel=within), name


FAULTS = {
    "row_cosine_mean": lambda d: d["col_cosine_mean"],
    "row_geodesic": lambda d: d["row_chordal"],
    "row_geodesic_full": lambda d: d["row_geodesic"],
    "row_procrustes": lambda d: d["row_chordal"],
    "row_martin": lambda d: -2 * math.log(d["row_cosine_mean"]),
    "row_aligned_cosine": lambda d: d["col_aligned_cosine"],
    "two_sided_a_by_b": lambda d: d["two_sided_b_by_a"],
    "tangent_a_by_b": lambda d: d["tangent_b_by_a"],
    "task_interference": lambda d: d["task_interference_square"],
    "nuclear_gain": lambda d: d["spectral_gain"],
    "over_counted_a": lambda d: max(d["counted_a"] - 1, 0),
    "cancelled_a": lambda d: max(1 - d["counted_a"], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_bound_catches(rng, tmp_path, name):
    size = {"m.0.x": (24, 20, 1)}
    made = [make_adapter(tmp_path / str(i), size, rank=3 + 2 * i, seed=int(rng.integers(2**32)))
            for i in range(2)]  # fmt: skip
    found = columns(mpf.open_zoo(tmp_path))
    wrong = FAULTS[name](definitions(*(x.modules["m.0.x"].delta for x in made)))
    assert abs(found[name][0] - wrong) > bound("angles")


def test_names_and_counts_agree_with_the_kernels():
    assert len(STATISTICS) == _native.core().ANGLE_STATISTICS
    assert not FAMILY.by_default


def test_the_work_is_that_of_every_pair(rng, tmp_path):
    made = random_zoo(tmp_path, rng)
    want = 0
    for a, b in itertools.combinations(made, 2):
        for n in set(a.modules) & set(b.modules):
            x, y = a.modules[n], b.modules[n]
            want += len(x.a) * len(y.a) * sum(x.delta.shape) + 4 * (len(x.a) + len(y.a)) ** 3
    assert FAMILY.work(mpf.open_zoo(tmp_path)) == want
