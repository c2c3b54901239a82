"""Profiles over layers, channels and spectra, and the rest of the weight statistics, against
definitions written on materialised deltas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from bases import make_base
from test_engine import cut
from test_features import MODULES, NAMES, block_diagonal, gauge, random_zoo
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine.base_norms import spectral_norm

SHAPES = {n: shape[:2] for n, shape in MODULES.items()}
LAYERS = {"0": NAMES[:2], "1": NAMES[2:3], "2": NAMES[3:4], "10": NAMES[4:]}


def energy(w):
    return float((w**2).sum())


def cosine(x, y):
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y) / length if length else math.nan


def stacked(a, b):
    """Singular values of the matrix with the two deltas as rows."""
    return np.linalg.svd(np.stack([a.ravel(), b.ravel()]), compute_uv=False)


def of_weights(a, b):
    """What is a function of two matrices."""
    s = stacked(a, b)
    p = s / s.sum()
    both = math.sqrt(energy(a)), math.sqrt(energy(b))
    return {
        "dot": float((a * b).sum()),
        "angle": math.degrees(math.acos(np.clip(cosine(a.ravel(), b.ravel()), -1, 1))),
        "norm_gain": math.sqrt(energy(a + b)) / max(both),
        "stacked_singular_ratio": s[1] / s[0],
        "stacked_effective_rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
        "stacked_stable_rank": s.sum() ** 2 / (s**2).sum(),
        "out_channel_cosine": cosine((a**2).sum(1), (b**2).sum(1)),
        "in_channel_cosine": cosine((a**2).sum(0), (b**2).sum(0)),
    }


def slack(name, a, b):
    """A cosine within bound("cosine") moves these by so much: the derivative, times it.

    The ratio r of the stacked pair has r^2 ~ 1 - cosine^2: near twins half of the digits are gone,
    and sqrt(2 bound) is what is left; ranks move like r log r at most.
    """
    c = bound("cosine")
    lengths = math.sqrt(energy(a) * energy(b))
    root = math.sqrt(2 * c)
    return {
        "dot": c * lengths, "angle": math.degrees(root), "norm_gain": root,
        "stacked_singular_ratio": root, "stacked_stable_rank": 4 * root,
        "stacked_effective_rank": -8 * root * math.log(root),
    }.get(name, bound("feature"))  # fmt: skip


OF_PAIRS = [*of_weights(np.eye(2), np.ones((2, 2)))]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("pair_bytes", ["one_block", "blocks_of_2"])
def test_pairs(rng, isa, tmp_path, monkeypatch, dtype, pair_bytes):
    made = random_zoo(tmp_path, rng, dtype)
    cut(monkeypatch, pair_bytes, "two_modules_or_so")
    table = mpf.pair_features(mpf.open_zoo(tmp_path), OF_PAIRS)
    for row, (x, y) in enumerate(itertools.combinations(made, 2)):
        a, b = block_diagonal(x, SHAPES), block_diagonal(y, SHAPES)
        want = of_weights(a, b) if a.any() and b.any() else dict.fromkeys(OF_PAIRS, math.nan)
        shared = [n for n in NAMES if n in x.modules and n in y.modules]
        local = [(x.modules[n].delta, y.modules[n].delta) for n in shared]
        local = [(v, w) for v, w in local if v.any() and w.any()]
        for name, value in want.items():
            allowed = slack(name, a, b)
            assert table[name][row] == pytest.approx(value, abs=allowed, nan_ok=True), name
            values = [of_weights(v, w)[name] for v, w in local]
            wide = max([slack(name, v, w) for v, w in local], default=0) + 1e-6 * max(
                map(abs, values), default=0
            )
            for key, reduce in (("max", max), ("min", min)):
                expected = reduce(values) if values else math.nan
                got = table[f"{name}.{key}"][row]
                assert got == pytest.approx(expected, abs=wide, nan_ok=True), f"{name}.{key}"


def test_bound_catches_signed_channels(tmp_path):
    # Row sums in place of the squared norms of rows.
    made = [make_adapter(tmp_path / str(i), MODULES, seed=i) for i in range(2)]
    a, b = (block_diagonal(x, SHAPES) for x in made)
    right = mpf.pair_features(mpf.open_zoo(tmp_path), ["out_channel_cosine"])["out_channel_cosine"]
    assert abs(right[0] - cosine(a.sum(1), b.sum(1))) > bound("feature")


def depth_of(made):
    """Statistics of one adapter over layers and modules."""
    by_module = np.array([energy(made.modules[n].delta) if n in made.modules else 0.0
                          for n in NAMES])  # fmt: skip
    by_layer = np.array([
        sum(by_module[NAMES.index(n)] for n in names) for names in LAYERS.values()
    ])  # fmt: skip
    if not by_layer.sum():
        return None
    p, q = by_layer / by_layer.sum(), by_module / by_module.sum()
    depth = np.arange(len(LAYERS)) / (len(LAYERS) - 1)
    stable = []
    for m in made.modules.values():
        s = np.linalg.svd(m.delta, compute_uv=False)
        if s[0] > 0:
            stable.append((s**2).sum() / s[0] ** 2 / len(m.a))
    return {
        "layers_used": math.exp(-sum(x * math.log(x) for x in p if x)),
        "modules_used": math.exp(-sum(x * math.log(x) for x in q if x)),
        "layer_concentration": (p**2).sum(),
        "layer_top_share": p.max(),
        "depth_centre": (p * depth).sum(),
        "depth_spread": math.sqrt((p * (depth - (p * depth).sum()) ** 2).sum()),
        "rank_utilisation": np.mean(stable),
    }


def channels_of(made):
    deltas = [m.delta for m in made.modules.values()]
    if not any(w.any() for w in deltas):
        return None
    out = {}
    for side, axis in (("out", 1), ("in", 0)):
        p = [(w**2).sum(axis) for w in deltas]
        flat = sum(x.sum() ** 2 / len(x) for x in p)
        out[f"{side}_channels_used"] = flat / sum((x**2).sum() for x in p)
        out[f"{side}_channel_peak"] = max(x.max() / x.mean() for x in p if x.any())
    return out


def test_adapters(rng, isa, tmp_path):
    made = random_zoo(tmp_path, rng)
    table = mpf.adapter_features(mpf.open_zoo(tmp_path), "all")
    for of, allowed in ((depth_of, bound("spectrum")), (channels_of, 8 * bound("feature"))):
        for i, x in enumerate(made):
            want = of(x) or dict.fromkeys(of(made[0]), math.nan)
            for name, value in want.items():
                assert table[name][i] == pytest.approx(value, rel=allowed, nan_ok=True), name


def test_pairs_of_profiles(rng, tmp_path):
    made = random_zoo(tmp_path, rng)
    names = ["spectrum_cosine", "layer_profile_cosine", "module_profile_cosine"]
    table = mpf.pair_features(mpf.open_zoo(tmp_path), names)

    def profiles(x):
        sigma = np.zeros((len(NAMES), 8))
        for k, n in enumerate(NAMES):
            if n in x.modules:
                s = np.linalg.svd(x.modules[n].delta, compute_uv=False)[:8]
                sigma[k, : len(s)] = s
        by_module = (sigma**2).sum(1)
        by_layer = np.array([
            sum(by_module[NAMES.index(n)] for n in names) for names in LAYERS.values()
        ])  # fmt: skip
        return sigma.ravel(), by_layer, by_module

    for row, (x, y) in enumerate(itertools.combinations(made, 2)):
        for name, p, q in zip(names, profiles(x), profiles(y), strict=True):
            assert table[name][row] == pytest.approx(cosine(p, q), rel=1e-9, nan_ok=True), name


def test_no_rotation_makes_a_cosine_larger_than_that_of_the_spectra(rng, tmp_path):
    for i in range(5):
        make_adapter(tmp_path / str(i), MODULES, seed=int(rng.integers(2**32)))
    table = mpf.pair_features(mpf.open_zoo(tmp_path), ["cosine", "spectrum_cosine"])
    assert (np.abs(table["cosine"]) <= table["spectrum_cosine"] + bound("cosine")).all()
    copy = make_adapter(tmp_path / "0", MODULES, seed=3)
    turned = {}
    for n, m in copy.modules.items():
        left = np.linalg.qr(rng.standard_normal((len(m.b), len(m.b))))[0]
        turned[n] = (m.a, left @ m.b)
    make_adapter(tmp_path / "1", MODULES, factors=turned)
    table = mpf.pair_features(mpf.open_zoo(tmp_path), ["cosine", "spectrum_cosine"])
    assert table["cosine"][0] < 0.9
    assert table["spectrum_cosine"][0] == pytest.approx(1, abs=1e-6)


def spectral(sigma):
    """More of one spectrum, down to its numerical rank."""
    sigma = np.sort(sigma[sigma > 1e-12 * sigma.max(initial=0)])[::-1]
    if len(sigma) == 0:
        return None
    p = sigma**2 / (sigma**2).sum()
    return {
        "energy_rank_95": 1 + int((np.cumsum(p) < 0.95 - 1e-12).sum()),
        "effective_rank_energy": math.exp(-(p * np.log(p)).sum()),
        **{f"energy_top_{k}": p[:k].sum() for k in (1, 2, 4, 8)},
        "log_volume": np.log(sigma).sum(),
        "log_sigma_mean": np.log(sigma).mean(),
    }


def test_spectra(rng, isa, tmp_path):
    made = random_zoo(tmp_path, rng)
    table = mpf.adapter_features(mpf.open_zoo(tmp_path), "all")
    for i, x in enumerate(made):
        parts = [np.linalg.svd(m.delta, compute_uv=False) for m in x.modules.values()]
        want = spectral(np.concatenate(parts)) or dict.fromkeys(spectral(np.ones(1)), math.nan)
        local = [v for v in map(spectral, parts) if v]
        for name, value in want.items():
            close = {"rel": bound("spectrum"), "abs": bound("spectrum") * 100, "nan_ok": True}
            assert table[name][i] == pytest.approx(value, **close), name
            mean = np.mean([v[name] for v in local]) if local else math.nan
            assert table[f"{name}.mean"][i] == pytest.approx(mean, **close), name


def test_log_volume_leaves_out_what_is_rounding(tmp_path):
    a, b = np.ones((3, 20)), np.ones((24, 3))
    a[1] *= 1 + 1e-7  # float32 keeps a trace of it
    made = make_adapter(tmp_path / "a", {NAMES[0]: MODULES[NAMES[0]]}, factors={NAMES[0]: (a, b)})
    sigma = np.linalg.svd(made.modules[NAMES[0]].delta, compute_uv=False)
    found = mpf.adapter_features(mpf.open_zoo(tmp_path), ["log_volume"])["log_volume"][0]
    assert found == pytest.approx(math.log(sigma[0]), rel=1e-6)
    assert abs(found - np.log(sigma[:3] + 1e-300).sum()) > 1  # three of them would be off by this


def test_gauge_and_size_change_nothing(rng, tmp_path):
    for i in range(3):
        made = make_adapter(tmp_path / "one" / str(i), MODULES, seed=i)
        factors = {n: gauge(rng, m) for n, m in made.modules.items()}
        make_adapter(tmp_path / "two" / str(i), MODULES, factors=factors)
        make_adapter(tmp_path / "big" / str(i), MODULES, seed=i, alpha=8e25)
    names = [n for n in OF_PAIRS if n != "dot"]
    names += ["spectrum_cosine", "layer_profile_cosine", "module_profile_cosine"]
    one, two, big = (mpf.pair_features(mpf.open_zoo(tmp_path / x), names)
                     for x in ("one", "two", "big"))  # fmt: skip
    for name in names:
        scale = 100 if name == "angle" else 1
        for other in (two, big):
            np.testing.assert_allclose(other[name], one[name], atol=scale * bound("gauge"))
    one, two = (mpf.adapter_features(mpf.open_zoo(tmp_path / x), "all") for x in ("one", "two"))
    for name in ("out_channels_used", "in_channel_peak", "depth_centre", "rank_utilisation"):
        np.testing.assert_allclose(two[name], one[name], rtol=bound("gauge"))


def test_nulls(rng, tmp_path):
    """Of independent Gaussian updates, over 190 pairs; bounds are five times the standard
    deviations of 40 runs (0.009, 0.025, 1, 0.05, 0.05 and 0.006 in the order of the lines)."""
    shape = (300, 260)
    ranks = rng.integers(2, 9, 20)
    for i, r in enumerate(ranks):
        make_adapter(tmp_path / str(i), {NAMES[0]: (*shape, int(r))}, seed=int(rng.integers(2**32)))
    zoo = mpf.open_zoo(tmp_path)
    table, adapters = mpf.pair_features(zoo, "all"), mpf.adapter_features(zoo, "all")
    a, b = table.a, table.b
    pr = adapters["participation"]
    channel = 1 / np.sqrt((1 + 2 / pr[a]) * (1 + 2 / pr[b]))
    for name in ("out_channel_cosine", "in_channel_cosine"):
        assert (table[name] / channel).mean() == pytest.approx(1, abs=0.05)
    for name, d in (("row_rv", shape[1]), ("col_rv", shape[0])):
        assert (table[name] * d / np.sqrt(pr[a] * pr[b])).mean() == pytest.approx(1, rel=0.13)
    off = table["angle"] - 90
    assert abs(off.mean()) < 5 * 57.3 / math.sqrt(np.prod(shape) * 190)
    assert off.std() == pytest.approx(57.3 / math.sqrt(np.prod(shape)), rel=0.25)
    product = adapters["norm"][a] * adapters["norm"][b]
    assert (table["dot"] / product).std() == pytest.approx(1 / math.sqrt(np.prod(shape)), rel=0.25)
    small = table["norm_ratio"]
    np.testing.assert_allclose(table["norm_gain"], np.sqrt(1 + small**2), atol=0.02)
    np.testing.assert_allclose(table["stacked_singular_ratio"], small, atol=0.02)
    used = adapters["out_channels_used"] * (1 + 2 / pr)
    assert used.mean() == pytest.approx(1, abs=0.05)


def test_beside_the_base(rng, tmp_path):
    made = random_zoo(tmp_path / "zoo", rng)
    weights = {n: rng.standard_normal(SHAPES[n]) for n in NAMES}
    weights[NAMES[1]] = np.zeros(SHAPES[NAMES[1]])
    stored = {
        f"{n}.weight": ("F32", w.shape, w.astype(np.float32)) for n, w in weights.items()
    } | {"model.norm.weight": ("F32", (8,))}
    make_base(tmp_path / "base", stored, shards=2)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    table = mpf.adapter_features(zoo, base=tmp_path / "base")
    for i, x in enumerate(made):
        both = [(m.delta, weights[n].astype(np.float32)) for n, m in x.modules.items()]
        for kind, order, whole in (
            ("norm", "fro", lambda v: math.sqrt(sum(y**2 for y in v))), ("spectral", 2, max),
        ):  # fmt: skip
            sizes = [(np.linalg.norm(a, order), np.linalg.norm(b, order)) for a, b in both]
            local = [a / b for a, b in sizes if b]
            top, bottom = (whole(side) for side in zip(*sizes, strict=True))
            name = f"base_{kind}_ratio"
            for key, want in (
                (name, top / bottom), (f"{name}.mean", np.mean(local)), (f"{name}.max", max(local)),
            ):  # fmt: skip
                assert table[key][i] == pytest.approx(want, rel=2e-4), key
    assert not {n for n in mpf.adapter_features(zoo, "all") if n.startswith("base_")}
    with pytest.raises(InputError, match="base_norm_ratio needs the base model's weights"):
        mpf.adapter_features(zoo, ["base_norm_ratio"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (40, 1), (50, 70), (300, 200)])
def test_spectral_norm_of_a_base_weight(rng, shape):
    for matrix in (rng.standard_normal(shape), np.ones(shape), np.eye(*shape)):
        found = spectral_norm(matrix.astype(np.float32))
        assert found == pytest.approx(np.linalg.norm(matrix, 2), rel=2e-4)
        assert found <= np.linalg.norm(matrix, 2) * (1 + 1e-6)


def test_threads_do_not_change_a_byte(rng, isa, tmp_path):
    modules = {NAMES[0]: (600, 500, 1), NAMES[1]: (70, 600, 1)}
    for i in range(7):
        make_adapter(tmp_path / str(i), modules, rank=int(rng.integers(2, 14)), seed=i)
    zoo = mpf.open_zoo(tmp_path)
    for call in (
        lambda n: mpf.pair_features(zoo, ["2601.22285", "gradience", *OF_PAIRS], threads=n),
        lambda n: mpf.adapter_features(zoo, "all", threads=n),
    ):
        first, *others = (call(n) for n in (1, 2, 5, 1))
        for table in others:
            for name in first:
                assert np.asarray(table[name]).tobytes() == np.asarray(first[name]).tobytes() or (
                    list(table[name]) == list(first[name])
                ), name
