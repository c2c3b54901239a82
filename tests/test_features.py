"""Features against their definitions (CATALOGUE 1 and 2), written on materialised deltas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import passes
from mergeprobe_fast.features import Feature, select

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.mlp.down_proj": (20, 31, 4),
    "model.layers.1.self_attn.q_proj": (24, 20, 4),
    "model.layers.2.self_attn.v_proj": (9, 20, 4),
    "model.layers.10.mlp.up_proj": (33, 20, 4),
}
NAMES = list(MODULES)


def spaces(w):
    """(U, V) with orthonormal columns spanning the column and the row space."""
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    k = int((sigma > 1e-5 * sigma[0]).sum()) if sigma[0] > 0 else 0
    return u[:, :k], vt[:k].T


def energy(w):
    return float((w**2).sum())


def overlap(p, q):
    return energy(p.T @ q) / min(p.shape[1], q.shape[1])


def rv(x, y):
    return float((x * y).sum()) / math.sqrt(energy(x) * energy(y))


def definitions(a, b):
    """Every feature that is a function of two matrices."""
    cosine = float((a * b).sum()) / math.sqrt(energy(a) * energy(b))
    (ua, va), (ub, vb) = spaces(a), spaces(b)
    norms = sorted([math.sqrt(energy(a)), math.sqrt(energy(b))])
    return {
        "cosine": cosine,
        "cosine_z": cosine * math.sqrt(a.size),
        "norm_ratio": norms[0] / norms[1],
        "over_amplification": energy(a + b) / (energy(a) + energy(b)) - 1,
        "row_overlap": overlap(va, vb),
        "col_overlap": overlap(ua, ub),
        "row_rv": rv(a.T @ a, b.T @ b),
        "col_rv": rv(a @ a.T, b @ b.T),
        "row_capture_a_by_b": energy(a @ vb @ vb.T) / energy(a),
        "row_capture_b_by_a": energy(b @ va @ va.T) / energy(b),
        "col_capture_a_by_b": energy(ub @ ub.T @ a) / energy(a),
        "col_capture_b_by_a": energy(ua @ ua.T @ b) / energy(b),
    }


LOCAL = list(definitions(np.eye(2), np.eye(2)))


def block_diagonal(made, modules):
    """The concatenated delta: one diagonal block a module, zero where the adapter lacks it."""
    blocks = [
        made.modules[n].delta if n in made.modules else np.zeros(modules[n]) for n in modules
    ]
    out = np.zeros(np.sum([x.shape for x in blocks], axis=0))
    row = column = 0
    for x in blocks:
        out[row : row + x.shape[0], column : column + x.shape[1]] = x
        row, column = row + x.shape[0], column + x.shape[1]
    return out


def expected_pair(a, b, modules):
    """All columns of one pair."""
    nothing = dict.fromkeys(LOCAL, math.nan)
    shared = [n for n in modules if n in a.modules and n in b.modules]
    local, weight = [], []
    for n in shared:
        x, y = a.modules[n].delta, b.modules[n].delta
        defined = x.any() and y.any()
        local.append(definitions(x, y) if defined else nothing)
        weight.append(math.sqrt(energy(x) * energy(y)))
    wa, wb = block_diagonal(a, modules), block_diagonal(b, modules)
    out = definitions(wa, wb) if wa.any() and wb.any() else dict(nothing)
    null = sum(
        energy(a.modules[n].delta) * energy(b.modules[n].delta) / np.prod(modules[n])
        for n in shared
    )
    out["cosine_z"] = float((wa * wb).sum()) / math.sqrt(null) if null else math.nan
    for side, x in (("a", a), ("b", b)):
        total = sum(energy(m.delta) for m in x.modules.values())
        part = sum(energy(x.modules[n].delta) for n in shared)
        out[f"shared_energy_{side}"] = part / total if total else math.nan
    for name in LOCAL:
        values = np.array([x[name] for x in local])
        some = bool(len(values)) and not np.isnan(values).all()
        known = ~np.isnan(values) if some else None
        for key, reduce in {
            "mean": lambda v, k=known: np.average(v[k], weights=np.array(weight)[k]),
            "max": np.nanmax, "min": np.nanmin,
            "p10": lambda v: np.nanpercentile(v, 10), "p90": lambda v: np.nanpercentile(v, 90),
        }.items():  # fmt: skip
            out[f"{name}.{key}"] = float(reduce(values)) if some else math.nan
    return out


def expected(made):
    """All columns, pairs in row-major order of the upper triangle."""
    modules = {}
    for x in made:
        modules |= {n: m.delta.shape for n, m in x.modules.items()}
    rows = [expected_pair(a, b, modules) for a, b in itertools.combinations(made, 2)]
    return {name: np.array([r[name] for r in rows]) for name in rows[0]}


def slack(name):
    """Allowed error of a column; cosine_z is a cosine in units of 1 / sqrt(d_out d_in) < 1/10."""
    base = name.partition(".")[0]
    if base in ("cosine", "over_amplification"):
        return bound("cosine")
    return bound("feature") * (40 if base == "cosine_z" else 1)


def differences(table, want, allowed=slack):
    """Names of columns that are off, with by how much."""
    off = {}
    for name, values in want.items():
        error = np.abs(np.asarray(table[name]) - values)
        if (np.isnan(table[name]) != np.isnan(values)).any():
            off[name] = f"NaN at {np.flatnonzero(np.isnan(table[name]) != np.isnan(values))}"
        elif np.nanmax(error, initial=0) > allowed(name):
            off[name] = float(np.nanmax(error))
    return off


def rank_1_written_as_3(m):
    """A row twice and a row of zeros."""
    return np.vstack([m.a[:1], m.a[:1], 0 * m.a[:1]]), np.repeat(m.b[:, :1], 3, axis=1)


def random_zoo(folder, rng, dtype="F32", rslora=False):
    """Nine adapters: subsets of modules, mixed ranks, and every special relation to the first."""

    def make(i, names=NAMES, **options):
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 7))) for n in names}
        return make_adapter(
            folder / f"adapter_{i}", sizes, alpha=float(rng.uniform(1, 30)), rslora=rslora,
            dtype=dtype, seed=int(rng.integers(2**32)), magnitude=float(rng.uniform(0.1, 10)),
            **options,
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
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "rslora"])
def test_pair_features(rng, isa, tmp_path, kind):
    made = random_zoo(tmp_path, rng, "F32" if kind == "rslora" else kind, kind == "rslora")
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    assert table.names == [f"adapter_{i}" for i in range(9)]
    want = expected(made)
    assert set(table) == {"a", "b", *want}
    assert not differences(table, want)
    pair = list(itertools.combinations(range(9), 2)).index
    for name in ("cosine", "row_overlap", "col_overlap", "row_rv", "cosine.min", "row_overlap.min"):
        assert table[name][pair((0, 5))] == pytest.approx(1, abs=1e-6)


def test_duplicate_and_negated_copy(tmp_path, isa):
    made = make_adapter(tmp_path / "a", MODULES, seed=1)
    copy = {n: (m.a, m.b) for n, m in made.modules.items()}
    make_adapter(tmp_path / "b", MODULES, factors=copy)
    make_adapter(tmp_path / "c", MODULES, factors={n: (a, -b) for n, (a, b) in copy.items()})
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    for name, values in {
        "cosine": (1, -1, -1), "over_amplification": (1, -1, -1), "norm_ratio": (1, 1, 1),
        "row_overlap": (1, 1, 1), "col_overlap.min": (1, 1, 1), "row_rv": (1, 1, 1),
        "row_capture_a_by_b": (1, 1, 1), "shared_energy_a": (1, 1, 1), "cosine.max": (1, -1, -1),
    }.items():  # fmt: skip
        np.testing.assert_allclose(table[name], values, atol=1e-6, err_msg=name)
        assert (np.abs(table[name]) <= 1).all(), f"{name} is outside its range"


def test_disjoint_modules(tmp_path):
    for i, names in enumerate((NAMES[:2], NAMES[2:])):
        make_adapter(tmp_path / str(i), {n: MODULES[n] for n in names}, seed=i)
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    for name in ("cosine", "over_amplification", "row_overlap", "col_rv", "shared_energy_b"):
        assert table[name][0] == 0
    assert np.isnan(table["cosine_z"][0]) and np.isnan(table["cosine.mean"][0])
    assert table["norm_ratio"][0] > 0


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_size_of_the_deltas_changes_no_ratio(rng, tmp_path, size):
    b = float(10 ** (math.log10(size) / 2))
    for i in range(3):
        for folder, magnitude, alpha in (("plain", 1, 8), ("sized", b, 8 * size / b)):
            options = {"magnitude": magnitude, "alpha": alpha}
            make_adapter(tmp_path / folder / str(i), MODULES, seed=i, **options)
    plain = mpf.pair_features(mpf.open_zoo(tmp_path / "plain"))
    sized = mpf.pair_features(mpf.open_zoo(tmp_path / "sized"))
    want = {n: v for n, v in plain.items() if n not in ("a", "b")}
    assert not differences(sized, want)


def gauge(rng, m):
    """(M A, B M^-1) with singular values of M from 1 to 5."""
    r = len(m.a)
    left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
    matrix = left @ np.diag(np.geomspace(1, 5, r)) @ right
    return matrix @ m.a, m.b @ np.linalg.inv(matrix)


def test_gauge_invariance(rng, isa, tmp_path):
    for i in range(4):
        made = make_adapter(tmp_path / "one" / str(i), MODULES, seed=i)
        factors = {n: gauge(rng, m) for n, m in made.modules.items()}
        moved = make_adapter(tmp_path / "two" / str(i), MODULES, factors=factors)
        imbalance = [np.linalg.norm(x.modules[NAMES[0]].a) for x in (made, moved)]
        assert abs(math.log(imbalance[0] / imbalance[1])) > bound("gauge")
    one, two = (mpf.open_zoo(tmp_path / x) for x in ("one", "two"))
    pairs = {n: v for n, v in mpf.pair_features(one).items() if n not in ("a", "b")}
    factor = {"cosine_z": 40}
    assert not differences(
        mpf.pair_features(two), pairs, lambda n: bound("gauge") * factor.get(n.partition(".")[0], 1)
    )
    adapters = [mpf.adapter_features(z) for z in (one, two)]
    for name in SPECTRAL:
        np.testing.assert_allclose(adapters[0][name], adapters[1][name], rtol=bound("gauge"))


def test_null_distributions(rng, tmp_path):
    # 276 pairs: the standard error of the sd is 0.043, that of the mean overlap 2%.
    ranks = rng.integers(2, 7, 24)
    modules = {NAMES[0]: (40, 30, 1), NAMES[1]: (25, 35, 1)}
    for i, r in enumerate(ranks):
        make_adapter(tmp_path / str(i), modules, rank=int(r), seed=int(rng.integers(2**32)))
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    for name in ("cosine_z", "cosine_z.max", "cosine_z.min"):
        shift = {"cosine_z": 0, "cosine_z.max": 0.56, "cosine_z.min": -0.56}[name]
        assert abs(table[name].mean() - shift) < 0.3
    assert 0.8 < table["cosine_z"].std() < 1.2
    widest = np.maximum(ranks[table.a], ranks[table.b])
    for name, d in (("row_overlap", 65), ("col_overlap", 65)):
        assert table[name].mean() == pytest.approx(widest.mean() * 2 / d, rel=0.12)
    capture = 2 * ranks[table.b] / 65
    assert table["row_capture_a_by_b"].mean() == pytest.approx(capture.mean(), rel=0.12)


SPECTRAL = (
    "norm", "spectral_norm", "nuclear_norm", "stable_rank", "effective_rank", "participation",
)  # fmt: skip

ENERGY_RANKS = ("energy_rank_90", "energy_rank_99")


def spectrum(sigma):
    """Adapter features of singular values, in the words of CATALOGUE A1 to A7."""
    sigma = np.sort(sigma)[::-1]
    if not sigma.any():
        return {k: 0.0 if k.endswith("norm") else math.nan for k in (*SPECTRAL, *ENERGY_RANKS)}
    share = np.cumsum(sigma**2) / (sigma**2).sum()
    p = sigma[sigma > 1e-14 * sigma[0]] / sigma.sum()
    return {
        "norm": math.sqrt((sigma**2).sum()),
        "spectral_norm": sigma[0],
        "nuclear_norm": sigma.sum(),
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "participation": (sigma**2).sum() ** 2 / (sigma**4).sum(),
        "energy_rank_90": 1 + int((share < 0.90).sum()),
        "energy_rank_99": 1 + int((share < 0.99).sum()),
    }


def test_adapter_features(rng, isa, tmp_path):
    made = random_zoo(tmp_path, rng)
    table = mpf.adapter_features(mpf.open_zoo(tmp_path))
    assert list(table["name"]) == [f"adapter_{i}" for i in range(9)]
    for i, x in enumerate(made):
        deltas = [m.delta for m in x.modules.values()]
        per_module = [np.linalg.svd(w, compute_uv=False) for w in deltas]
        want = spectrum(np.concatenate(per_module))
        local = [spectrum(s) for s in per_module]
        for name, value in want.items():
            assert table[name][i] == pytest.approx(value, rel=bound("spectrum"), nan_ok=True), name
            values = [v[name] for v in local if not math.isnan(v[name])] or [math.nan]
            if name != "norm":
                for key, reduced in (("mean", np.mean(values)), ("max", max(values))):
                    assert table[f"{name}.{key}"][i] == pytest.approx(
                        reduced, rel=bound("spectrum"), nan_ok=True
                    ), f"{name}.{key}"
        assert table["modules"][i] == len(deltas)
        assert table["parameters"][i] == sum(m.a.size + m.b.size for m in x.modules.values())
        ranks = {len(m.a) for m in x.modules.values()}
        low, high = min(ranks), max(ranks)
        assert table["rank"][i] == (str(low) if low == high else f"{low}-{high}")
        assert table["zero_modules"][i] == sum(not w.any() for w in deltas)


def test_adapters_alone_are_read_once(tmp_path, monkeypatch):
    for i in range(7):
        make_adapter(tmp_path / f"adapter_{i}", seed=i)
    zoo = mpf.open_zoo(tmp_path)
    want, seen = mpf.adapter_features(zoo), []
    monkeypatch.setattr(passes, "PAIR_BYTES", 1)  # blocks of two adapters
    found = mpf.adapter_features(zoo, progress=seen.append)
    for name in want:
        np.testing.assert_array_equal(found[name], want[name], err_msg=name)
    assert sum(seen) == 4 * len(zoo.modules)



def test_spectrum_bound_catches_the_other_effective_rank(tmp_path):
    made = make_adapter(tmp_path / "a", {NAMES[0]: MODULES[NAMES[0]]}, seed=3)
    p = np.linalg.svd(made.modules[NAMES[0]].delta, compute_uv=False)[:4] ** 2
    p /= p.sum()
    wrong = math.exp(-(p * np.log(p)).sum())
    right = mpf.adapter_features(mpf.open_zoo(tmp_path))["effective_rank"][0]
    assert abs(wrong / right - 1) > bound("spectrum")


def test_equal_singular_values_hold_equal_energy(tmp_path):
    factors = {NAMES[0]: (np.eye(10, 20), np.eye(24, 10))}
    make_adapter(tmp_path / "a", {NAMES[0]: MODULES[NAMES[0]]}, factors=factors, alpha=10)
    table = mpf.adapter_features(mpf.open_zoo(tmp_path))
    for name, value in {
        "norm": 10**0.5, "stable_rank": 10, "effective_rank": 10, "participation": 10,
        "energy_rank_90": 9, "energy_rank_99": 10,
    }.items():  # fmt: skip
        assert table[name][0] == pytest.approx(value, rel=1e-6)


def test_clips_are_counted(tmp_path):
    for i in range(4):
        make_adapter(tmp_path / str(i), MODULES, seed=i)
    zoo = mpf.open_zoo(tmp_path)

    def finish(s):
        values = np.full(len(s.energy_a), 0.5)
        values[:3] = 2.0, -2.0, np.nan
        return values

    table = mpf.pair_features(
        zoo, [Feature("x", "X", "x", finish, per_module=False, bounded=(-1.0, 1.0))]
    )
    assert table.clipped == 2
    np.testing.assert_array_equal(table["x"], [1, -1, np.nan, 0.5, 0.5, 0.5])


FAULTS = {
    "cosine": lambda a, b: float((a * b).sum()) / energy(a),
    "over_amplification": lambda a, b: energy(a + b) / (energy(a) + energy(b)),
    "norm_ratio": lambda a, b: math.sqrt(energy(a) / energy(b)),
    "row_overlap": lambda a, b: overlap(spaces(a)[0], spaces(b)[0]),
    "col_overlap": lambda a, b: energy(spaces(a)[0].T @ spaces(b)[0]) / spaces(b)[0].shape[1],
    "row_rv": lambda a, b: rv(a @ a.T, b @ b.T),
    "row_capture_a_by_b": lambda a, b: definitions(a, b)["row_capture_b_by_a"],
    "col_capture_b_by_a": lambda a, b: definitions(a, b)["col_capture_a_by_b"],
    "col_rv": lambda a, b: float((a @ a.T * (b @ b.T)).sum()) / (energy(a) * energy(b)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bounds_catch(rng, tmp_path, name):
    a, b = (
        make_adapter(tmp_path / str(i), {"m.0.x": (24, 20, 3 + 2 * i)}, seed=i, magnitude=2.0 - i)
        for i in range(2)
    )
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    wrong = FAULTS[name](*(x.modules["m.0.x"].delta for x in (a, b)))
    assert abs(table[name][0] - wrong) > slack(name)


def test_every_feature_is_tested():
    assert {f.name for f in select("default")} == {*LOCAL, "shared_energy_a", "shared_energy_b"}
