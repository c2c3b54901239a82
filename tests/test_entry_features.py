"""Columns of entries against their definitions (CATALOGUE A10, B18-B23) on materialised deltas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from tolerances import bound, entry_bound

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine import entries as engine
from mergeprobe_fast.features.entries import FAMILY, SPREAD, entry_features
from mergeprobe_fast.recorded import NOTHING

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.mlp.down_proj": (20, 31, 4),
    "model.layers.1.self_attn.q_proj": (24, 20, 4),
    "model.layers.2.self_attn.v_proj": (9, 20, 4),
    "model.layers.10.mlp.up_proj": (33, 60, 4),
}
NAMES = list(MODULES)
DENSITY = 0.3


def columns(zoo, family=None, threads=2):
    """Every column of the family, pairs in row-major order of the upper triangle."""
    family = family or entry_features("exact", density=DENSITY)
    data = family.compute(zoo, NOTHING, threads)
    a, b = np.triu_indices(len(zoo), 1)
    pairs = {c.name: c.finish(data, a, b) for c in family.pairs}
    return pairs, {c.name: c.finish(data) for c in family.adapters}


def whole(made, fill=0.0):
    """All entries of the concatenated delta, module by module, ``fill`` where one is absent."""
    parts = []
    for name, (d_out, d_in, _) in MODULES.items():
        there = name in made.modules and made.modules[name].delta.any()
        parts.append(made.modules[name].delta.ravel() if there else np.full(d_out * d_in, fill))
    return parts


def top(x):
    """int(density * size) of the entries of one module, and equal ones."""
    size, k = np.abs(x), int(DENSITY * x.size)
    return (size >= np.sort(size)[-k]) & (size > 0) if k else np.zeros(x.shape, bool)


def definitions(a, b):
    """Every pair column from the entries of two lists of modules."""
    x, y = np.concatenate(a), np.concatenate(b)
    if not x.any() or not y.any():
        return dict.fromkeys((c.name for c in FAMILY.pairs), math.nan)
    p, q = np.abs(x), np.abs(y)
    conflict, both = x * y < 0, (x != 0) & (y != 0)
    expected = 0.0
    for u, v in zip(a, b, strict=True):
        if u.any() and v.any():
            cosine = np.clip(u @ v / np.sqrt((u @ u) * (v @ v)), -1, 1)
            expected += ((u != 0) & (v != 0)).sum() * math.acos(cosine) / math.pi
    s, t = (np.concatenate([top(u) for u in side]) for side in (a, b))
    share = lambda part, all: part / all if all > 0 else math.nan  # noqa: E731
    return {
        "sign_conflict": share(conflict.sum(), both.sum()),
        "sign_conflict_residual": share(conflict.sum() - expected, both.sum()),
        "product_weighted_sign_conflict": share((p * q)[conflict].sum(), (p * q).sum()),
        "opposed_mass_a_by_b": p[conflict].sum() / p.sum(),
        "opposed_mass_b_by_a": q[conflict].sum() / q.sum(),
        "l1_cancellation": 1 - np.abs(x + y).sum() / (p.sum() + q.sum()),
        "ties_overlap": (s & t).sum() / (s | t).sum(),
        "ties_cosine": (s & t).sum() / math.sqrt(s.sum() * t.sum()),
        "magnitude_colocation": (x**2 @ y**2) / math.sqrt((x**4).sum() * (y**4).sum()),
    }


def definitions_of_one(made):
    there = [x for x in whole(made) if x.any()]
    if not there:
        return {c.name: 0.0 if c.name == "l1_norm" else math.nan for c in FAMILY.adapters}
    x = np.concatenate(there)
    kurtosis = [u.size * (u**4).sum() / (u**2).sum() ** 2 for u in there]
    least = [np.abs(u)[top(u)].min() / np.sqrt(np.mean(u**2)) for u in there]
    high = np.concatenate([top(u) for u in there])
    return {
        "l1_norm": np.abs(x).sum(),
        "entry_kurtosis": x.size * (x**4).sum() / (x**2).sum() ** 2,
        "entry_kurtosis.mean": np.mean(kurtosis),
        "zero_share": (x == 0).mean(),
        "top_energy": (x**2)[high].sum() / (x**2).sum(),
        "top_threshold": np.mean(least),
    }


def expected(made):
    parts = [whole(m) for m in made]
    rows = [definitions(a, b) for a, b in itertools.combinations(parts, 2)]
    alone = [definitions_of_one(m) for m in made]
    return (
        {k: np.array([r[k] for r in rows]) for k in rows[0]},
        {k: np.array([r[k] for r in alone]) for k in alone[0]},
    )


def undecided(made):
    """Entries whose sign, or side of the threshold, float32 may see otherwise: how many at most."""
    worst = 0
    for m in made:
        count = 0
        for x in m.modules.values():
            size = np.abs(x.delta)
            if not size.any():
                continue
            error = entry_bound(x.a.shape[0]) * abs(x.scale) * (np.abs(x.b) @ np.abs(x.a))
            k = int(DENSITY * size.size)
            threshold = np.sort(size.ravel())[-k] if k else np.inf
            near = (size > 0) & (size <= error)
            count += (near | ((np.abs(size - threshold) <= 2 * error) & (size != threshold))).sum()
        worst = max(worst, count)
    return worst


def differences(got, want, made):
    """Names of columns that are off, and by how much; entries that are undecided count for some."""
    smallest = min((x.delta.size for m in made for x in m.modules.values()), default=1)
    some = 8 * undecided(made) / smallest
    wrong = {}
    for mine, true in zip(got, want, strict=True):
        for name, values in true.items():
            error, size = np.abs(mine[name] - values), np.maximum(1, np.abs(values))
            if name == "sign_conflict_residual":  # arccos has no derivative at 1
                error = np.maximum(0, error - math.sqrt(2 * bound("entry sums")) / math.pi)
            if (np.isnan(mine[name]) != np.isnan(values)).any():
                wrong[name] = f"NaN: {mine[name]} {values}"
            elif (np.nan_to_num(error) > (bound("entry columns") + some) * size).any():
                wrong[name] = float(np.nanmax(error))
    return wrong


def from_factors(folder, factors, **options):
    """An adapter of these factors (A, B) and no other module."""
    sizes = {n: (b.shape[0], a.shape[1], a.shape[0]) for n, (a, b) in factors.items()}
    return make_adapter(folder, sizes, factors=factors, **options)


def rank_1_written_as_3(m):
    return np.vstack([m.a[:1], m.a[:1], 0 * m.a[:1]]), np.repeat(m.b[:, :1], 3, axis=1)


def sparse(m):
    b = m.b.copy()
    b[::3] = 0
    return m.a, b


def random_zoo(folder, rng, dtype="F32"):
    """Subsets of modules, mixed ranks, and every special relation to the first."""

    def make(i, names=NAMES, **options):
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 7))) for n in names}
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
        like(3, first, lambda m: (m.a, m.b)),
        like(4, first, lambda m: (m.a, -2 * m.b)),
        like(5, first, rank_1_written_as_3),
        like(6, make(9), sparse),
        make(7, NAMES[1:4], zero_b=(NAMES[1],)),
        make(8, NAMES, zero_b=True),
    ]


@pytest.fixture
def zoo_of():
    return lambda made: mpf.open_zoo([m.path for m in made])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_column_is_what_its_definition_says(tmp_path, rng, isa, zoo_of, dtype):
    made = random_zoo(tmp_path, rng, dtype)
    assert differences(columns(zoo_of(made)), expected(made), made) == {}


def planted(made, want):
    """Columns by other definitions, each by its name."""
    pairs, alone = want
    # The mean of the modules' shares is not the share of all their entries.
    parts = [definitions([u], [v])["sign_conflict"] for u, v in zip(
        whole(made[0])[:3], whole(made[1])[:3], strict=True
    )]  # fmt: skip
    mean = pairs["sign_conflict"].copy()
    mean[0] = np.mean(parts)
    return [
        ("opposed_mass_a_by_b", pairs["opposed_mass_b_by_a"]),
        ("sign_conflict", pairs["product_weighted_sign_conflict"]),
        ("ties_overlap", pairs["ties_cosine"]),
        ("top_energy", alone["top_energy"] * 1.001),
        ("entry_kurtosis", alone["entry_kurtosis.mean"]),
        ("sign_conflict", mean),
    ]


def test_the_bound_sees_other_definitions(tmp_path, rng, zoo_of):
    for attempt in range(30):  # until none is the same by chance, and no entry is undecided
        every = random_zoo(tmp_path / str(attempt), rng)
        made = every[:3]
        want = expected(made)
        known = {**want[0], **want[1]}
        wrong = planted(made, want)
        if not undecided(every) and all(np.nanmax(np.abs(x - known[n])) > 5e-4 for n, x in wrong):
            break
    else:
        raise AssertionError("no zoo of 30 tells the definitions apart")
    got = columns(zoo_of(made))
    for name, values in wrong:
        changed = [{n: values if n == name else x for n, x in part.items()} for part in want]
        assert set(differences(got, changed, made)) == {name}
    made = [every[0], every[4]]  # opposites: at a cosine near 0 both residuals are the same
    got, (pairs, alone) = columns(zoo_of(made)), expected(made)
    pairs["sign_conflict_residual"] = pairs["sign_conflict"] - 0.5
    assert set(differences(got, (pairs, alone), made)) == {"sign_conflict_residual"}


def test_copies_and_opposites(tmp_path, rng, zoo_of):
    made = random_zoo(tmp_path, rng)
    pairs, _ = columns(zoo_of(made))
    at = {p: k for k, p in enumerate(itertools.combinations(range(9), 2))}
    same, opposite, apart = at[0, 3], at[0, 4], at[1, 2]
    for name in ("sign_conflict", "product_weighted_sign_conflict", "opposed_mass_a_by_b",
                 "opposed_mass_b_by_a", "l1_cancellation"):  # fmt: skip
        assert pairs[name][same] == 0
    for name in ("sign_conflict", "product_weighted_sign_conflict"):
        assert pairs[name][opposite] == 1
    for name in ("ties_overlap", "ties_cosine"):
        assert pairs[name][same] == pairs[name][opposite] == 1
        assert pairs[name][apart] == 0
    # Nothing shared: no entry in which both are anything, and no mass that is opposed.
    assert np.isnan(pairs["sign_conflict"][apart]) and pairs["opposed_mass_a_by_b"][apart] == 0


def test_columns_are_those_of_the_updates_not_of_their_factors(tmp_path, rng, zoo_of):
    def moved(m):
        r = m.a.shape[0]
        q = np.linalg.qr(rng.standard_normal((r, r)))[0] * 2.0 ** rng.integers(-2, 3, r)
        return np.linalg.solve(q, m.a), m.b @ q

    made = random_zoo(tmp_path, rng)[:3]
    again = [
        from_factors(
            tmp_path / f"moved_{i}", {n: moved(m) for n, m in x.modules.items()},
            alphas={n: m.scale * m.a.shape[0] for n, m in x.modules.items()},
        )
        for i, x in enumerate(made)
    ]  # fmt: skip
    for one, other in zip(columns(zoo_of(made)), columns(zoo_of(again)), strict=True):
        for name, values in one.items():
            # A sign or two may differ, of an entry that is next to nothing, in some 2000.
            few = 5e-3 if "conflict" in name or "opposed" in name or "ties" in name else 1e-4
            error = np.abs(other[name] - values) / np.maximum(1, np.abs(values))
            assert np.nan_to_num(error).max() <= few, name


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e12])
def test_scale_does_not_matter_but_where_it_should(tmp_path, rng, isa, zoo_of, size):
    made = random_zoo(tmp_path, rng)[:3]
    scaled = [made[0], *(
        from_factors(
            tmp_path / f"scaled_{i}",
            {n: (m.a, m.scale * m.b * size) for n, m in x.modules.items()},
            alphas={n: m.a.shape[0] for n, m in x.modules.items()},
        )
        for i, x in enumerate(made[1:])
    )]  # fmt: skip
    got = columns(zoo_of(scaled))
    assert differences(got, expected(scaled), scaled) == {}
    before = columns(zoo_of(made))
    for name in ("sign_conflict", "ties_overlap", "product_weighted_sign_conflict"):
        assert np.allclose(got[0][name], before[0][name], atol=5e-3, equal_nan=True)
    assert np.allclose(got[1]["l1_norm"][1:], before[1]["l1_norm"][1:] * size, rtol=1e-5)


def test_a_delta_below_the_rounding_of_its_factors_counts_as_zero(tmp_path, rng, zoo_of):
    made = random_zoo(tmp_path, rng)[:2]
    a, b = rng.standard_normal((3, 20)), rng.standard_normal((24, 3))
    nearly = a.astype(np.float32)
    nearly[0, 0] = np.nextafter(nearly[0, 0], np.float32(9))
    cancelling = np.vstack([a, nearly]), np.hstack([b, -b])
    almost = np.vstack([a, a * (1 + 2.0**-12)]), np.hstack([b, -b])
    made += [
        from_factors(tmp_path / f"tiny_{i}", {NAMES[0]: f})
        for i, f in enumerate((cancelling, almost))
    ]
    pairs, alone = columns(zoo_of(made))
    with_zero = [k for k, p in enumerate(itertools.combinations(range(4), 2)) if 2 in p]
    for values in pairs.values():
        assert np.isnan(values[with_zero]).all()
        assert not np.isnan(np.delete(values, with_zero)).any()
    assert np.isnan(alone["entry_kurtosis"][2]) and alone["l1_norm"][2] == 0
    assert alone["entry_kurtosis"][3] > 1


@pytest.mark.parametrize("entries", ["exact", 1500])
def test_bits_do_not_depend_on_threads_blocks_chunks_nor_company(
    tmp_path, rng, monkeypatch, zoo_of, entries
):
    monkeypatch.setattr(engine, "FEWEST", 128)
    made, family = random_zoo(tmp_path, rng), entry_features(entries, density=DENSITY)
    want = columns(zoo_of(made), family, 1)

    def same(got, rows=slice(None), ones=slice(None)):
        return all(
            np.array_equal(v[part], g[name], equal_nan=True)
            for w, g, part in zip(want, got, (rows, ones), strict=True)
            for name, v in w.items()
        )

    assert same(columns(zoo_of(made), family, 4))
    monkeypatch.setattr(engine, "BLOCK", 2)
    assert same(columns(zoo_of(made), family, 2))
    monkeypatch.setattr("mergeprobe_fast.engine.passes.CHUNK_BYTES", 1)
    assert same(columns(zoo_of(made), family, 2))
    chosen = [0, 1, 5, 7]  # which have all modules between them
    rows = [k for k, p in enumerate(itertools.combinations(range(9), 2)) if set(p) <= set(chosen)]
    assert same(columns(zoo_of([made[i] for i in chosen]), family), rows, chosen)
    other = columns(zoo_of(made), entry_features(entries, density=DENSITY, seed=1))
    assert same(other) == (entries == "exact")


def test_a_sample_is_right_on_average_and_off_by_what_is_said(tmp_path, rng, monkeypatch, zoo_of):
    """60 samples: their root mean square error is off by 1/sqrt(120), four times that at most."""
    monkeypatch.setattr(engine, "FEWEST", 128)
    sizes = {f"model.layers.{i}.q": (160 + 40 * i, 240, 4) for i in range(3)}
    made = [make_adapter(tmp_path / str(i), sizes, seed=int(rng.integers(2**32))) for i in range(3)]
    zoo, seeds, entries = zoo_of(made), 60, 12000
    true, _ = columns(zoo, entry_features("exact"))
    found = [columns(zoo, entry_features(entries, seed=s))[0] for s in range(seeds)]
    for name, values in true.items():
        error = np.array([f[name] for f in found]) - values
        spread = SPREAD[name.removesuffix("_a_by_b").removesuffix("_b_by_a")][0]
        said, found_error = spread / math.sqrt(entries), np.sqrt(np.square(error).mean(0)).max()
        assert said / 6 <= found_error <= said * (1 + 4 / math.sqrt(2 * seeds)), name
        assert np.abs(error.mean(0)).max() <= 5 * said / math.sqrt(seeds), name


def test_nulls_are_those_of_independent_gaussian_entries(tmp_path, rng, zoo_of):
    made = [
        make_adapter(tmp_path / str(i), {"m.0": (300, 300, 300)}, seed=int(rng.integers(2**32)))
        for i in range(6)
    ]
    pairs, alone = columns(zoo_of(made), entry_features("exact"))
    entries = 300 * 300 * 15
    for c in entry_features("exact").pairs:
        of_gaussian = {"l1_cancellation": 1 - math.sqrt(0.5), "magnitude_colocation": 1 / 3}
        null = of_gaussian.get(c.name, c.null)
        assert null is not None
        spread = SPREAD[c.name.removesuffix("_a_by_b").removesuffix("_b_by_a")][0]
        # Rows and columns of products of few factors are not quite independent.
        allowed = 6 * spread / math.sqrt(entries) + (0.01 if "colocation" in c.name else 0)
        assert abs(pairs[c.name].mean() - null) <= allowed, c.name
    assert np.abs(alone["entry_kurtosis"] - 3 * (1 + 2 / 300)).max() < 0.3


def test_files_that_are_not_finite_or_overflow_are_named(tmp_path, rng, zoo_of):
    made = random_zoo(tmp_path, rng)[:2]
    for value, reason in ((np.nan, "A holds|holds NaN"), (1e30, "overflow float32")):
        m = made[0].modules[NAMES[0]]
        a, b = m.a.copy(), m.b.copy()
        a[0, 3], b[2, 0] = value, 1e30
        bad = from_factors(tmp_path / f"bad_{value}", {NAMES[0]: (a, b)})
        for entries in ("exact", 128):
            with pytest.raises(InputError, match=reason) as caught:
                columns(zoo_of([*made, bad]), entry_features(entries))
            assert str(NAMES[0]) in str(caught.value)
            assert str(bad.path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"entries": 0}, "entries"), ({"entries": 1.5}, "entries"), ({"entries": True}, "entries"),
        ({"density": 0}, "density"), ({"density": 1.1}, "density"), ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(options, key):
    with pytest.raises(InputError) as caught:
        entry_features(**options)
    assert caught.value.key == key


def test_what_a_report_says_of_the_columns(tmp_path, rng, zoo_of):
    zoo = zoo_of(random_zoo(tmp_path, rng))
    assert not FAMILY.by_default and FAMILY.missing(NOTHING) is None
    assert FAMILY.work(zoo) > 0
    exact = entry_features("exact")
    for sampled, all_of_them in zip(FAMILY.pairs, exact.pairs, strict=True):
        assert sampled.name == all_of_them.name
        assert "Standard error with 4,194,304 entries: " in sampled.definition
        assert "Standard error" not in all_of_them.definition
    assert "0.0003" in FAMILY.pairs[0].definition
