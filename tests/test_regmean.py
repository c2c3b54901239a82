"""RegMean in factor form against its dense definition, and what it promises to users."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration, stored
from dense_merge import (
    RAGGED,
    U32,
    WIDE,
    assert_peft_agrees,
    deltas,
    merge_json,
    seed_from,
    subset,
    zoo_of,
)
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import activation

RIDGE = 1e-6
DOMAINS = ("a", "b", "c")


def dense_regmean(made, calibration, lam, off=0.9, *, absent="zero"):
    """(sum lam_i W_i C_i) (sum lam_i C_i)^-1, every matrix formed; and the metric."""
    results, metrics = {}, {}
    for name in {name for m in made for name in m.modules}:
        part = [i for i, m in enumerate(made) if absent == "zero" or name in m.modules]
        mean = sum(lam[i] * calibration.moments[DOMAINS[i], name] for i in part) / lam[part].sum()
        c = {i: calibration.second_moment(DOMAINS[i], name, off, RIDGE * mean) for i in part}
        metrics[name] = sum(lam[i] * c[i] for i in part)
        right = sum(
            lam[i] * made[i].modules[name].delta @ c[i] for i in part if name in made[i].modules
        )
        results[name] = np.linalg.solve(metrics[name], right.T).T
    return results, metrics


def result(merged):
    return {m.module.name: m.b.astype(np.float64) @ m.a for m in merged.modules}


def close(ours, truth, room=1.0):
    """Equal within float32 rounding of A', which is all that rounds: B is written as it was."""
    assert set(ours) == set(truth)
    for name, matrix in truth.items():
        assert np.linalg.norm(ours[name] - matrix) <= room * bound("regmean") * np.linalg.norm(
            matrix
        ), name


def zoo_and_calibration(folder, rng, samples=9, modules=WIDE):
    recipes = [dict(r, modules=modules) for r in RAGGED[:2]] + [dict(RAGGED[2])]
    recipes[1]["dtype"] = "BF16"
    made = zoo_of(*recipes)(folder, seed_from(rng))
    return made, make_calibration(folder / "cal", WIDE, DOMAINS, rng, samples=samples)


def paths(made):
    return [m.path for m in made]


@pytest.mark.parametrize("off", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("samples", [1, 9, 40], ids="T={}".format)
def test_it_is_the_dense_definition(tmp_path, rng, samples, off):
    """T = 40 a domain is more than d_in: then S itself is factorised, not the samples' Gram."""
    made, calibration = zoo_and_calibration(tmp_path, rng, samples)
    lam = np.array([1.0, 2.5, 0.3])
    merged = mpf.merge(paths(made), "regmean", lam, calibration=calibration.path,
                       off_diagonal=off, dtype="F32")  # fmt: skip
    truth, _ = dense_regmean(made, calibration, lam, off)
    close(result(merged), truth)
    for m in merged.modules:
        assert m.norm == pytest.approx(np.linalg.norm(truth[m.module.name]), rel=1e-7)
        assert m.truncation_error == 0.0
        assert len(m.a) == sum(len(a.modules[m.module.name].a) for a in made)


def test_a_wrong_second_moment_would_show(tmp_path, rng):
    """The planted faults: moments of the samples only, one lam off by a thousandth, no ridge."""
    made, calibration = zoo_and_calibration(tmp_path, rng)
    lam = np.array([1.0, 2.5, 0.3])
    ours = result(mpf.merge(paths(made), "regmean", lam, calibration=calibration.path))
    for wrong in (lam * [1, 1.001, 1], lam[[1, 0, 2]]):
        with pytest.raises(AssertionError):
            close(ours, dense_regmean(made, calibration, wrong)[0])
    with pytest.raises(AssertionError):
        close(ours, dense_regmean(made, calibration, lam, 0.9001)[0])
    for key, x in calibration.samples.items():
        calibration.moments[key] = (x**2).mean(axis=0)
    with pytest.raises(AssertionError):
        close(ours, dense_regmean(made, calibration, lam)[0])


def test_the_factors_b_are_kept(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    for m in mpf.merge(paths(made), "regmean", calibration=calibration.path).modules:
        b = np.concatenate([a.modules[m.module.name].b for a in made], axis=1)
        assert (m.b == b).all()


@pytest.mark.parametrize("absent", ["zero", "skip"])
def test_an_adapter_without_the_module_is_zero_there_or_left_out(tmp_path, rng, absent):
    made = zoo_of(
        {"modules": WIDE}, {"modules": subset("head", of=WIDE)}, {"modules": WIDE, "rank": 2}
    )(tmp_path, seed_from(rng))
    calibration = make_calibration(tmp_path / "cal", WIDE, DOMAINS, rng)
    merged = mpf.merge(paths(made), "regmean", calibration=calibration.path, absent=absent)
    truth, _ = dense_regmean(made, calibration, np.ones(3), absent=absent)
    close(result(merged), truth)
    other, _ = dense_regmean(
        made, calibration, np.ones(3), absent="skip" if absent == "zero" else "zero"
    )
    with pytest.raises(AssertionError):
        close(result(merged), other)


@pytest.mark.parametrize("absent", ["zero", "skip"])
def test_one_adapter_and_equal_adapters_stay_what_they_are(tmp_path, rng, absent):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE})(tmp_path, 5)
    made.append(make_adapter(tmp_path / "c", modules=WIDE, seed=5))
    calibration = make_calibration(tmp_path / "cal", WIDE, DOMAINS, rng)
    truth = {name: m.delta for name, m in made[0].modules.items()}
    for members in ([made[0]], [made[0], made[2]]):
        merged = mpf.merge(
            paths(members), "regmean", calibration=calibration.path, absent=absent, ridge=0.5
        )
        close(result(merged), truth)
        for m in merged.modules:
            outputs = m.details["outputs"]
            assert max(outputs["error"]) < 1e-20 * max(outputs["energy"])


def test_equal_inputs_give_the_weighted_average(tmp_path, rng):
    made = zoo_of(*RAGGED)(tmp_path, seed_from(rng))
    calibration = make_calibration(tmp_path / "cal", WIDE, ["all"], rng)
    lam = np.array([1.0, 2.0, 5.0])
    merged = mpf.merge(paths(made), "regmean", lam, calibration=calibration.path,
                       domains=["all"] * 3)  # fmt: skip
    for name, matrix in result(merged).items():
        truth = sum(w * m.modules[name].delta for w, m in zip(lam / 8, made, strict=True))
        assert np.linalg.norm(matrix - truth) <= bound("regmean") * np.linalg.norm(truth)


def test_adapters_of_one_domain_pool_their_weights(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    domains = ("a", "b", "a")
    merged = mpf.merge(paths(made), "regmean", [1, 2, 3], calibration=calibration.path,
                       domains=domains)  # fmt: skip
    for name, matrix in result(merged).items():
        mean = sum(lam * calibration.moments[g, name] for lam, g in ((4, "a"), (2, "b"))) / 6
        c = {g: calibration.second_moment(g, name, 0.9, RIDGE * mean) for g in "ab"}
        right = sum(
            lam * m.modules[name].delta @ c[g]
            for lam, m, g in zip((1, 2, 3), made, domains, strict=True)
        )
        truth = np.linalg.solve(4 * c["a"] + 2 * c["b"], right.T).T
        assert np.linalg.norm(matrix - truth) <= bound("regmean") * np.linalg.norm(truth)


def test_domains_that_share_no_direction_lose_nothing(tmp_path, rng):
    """C_i C_j = 0, off-diagonals in full: M x = W_i x for every x of domain i."""
    made = zoo_of({"modules": WIDE}, {"modules": WIDE})(tmp_path, seed_from(rng))
    given = {}
    for name, (_, d, _) in WIDE.items():
        x = stored(rng.standard_normal((10, d)))
        for g, mine in (("a", np.arange(d) % 2 == 0), ("b", np.arange(d) % 2 == 1)):
            given[g, name] = np.where(mine, x, 0.0)
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng, samples=10, given=given)
    merged = mpf.merge(paths(made), "regmean", calibration=calibration.path, off_diagonal=1.0)
    for name, matrix in result(merged).items():
        for made_one, g in zip(made, "ab", strict=True):
            x, delta = calibration.samples[g, name], made_one.modules[name].delta
            assert np.linalg.norm(x @ (matrix - delta).T) <= 1e-5 * np.linalg.norm(x @ delta.T)


def test_a_dimension_that_no_domain_uses_is_the_average_there(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE})(tmp_path, seed_from(rng))
    given = {}
    for name, (_, d, _) in WIDE.items():
        for g in "ab":
            given[g, name] = stored(rng.standard_normal((10, d)) * (np.arange(d) != 3))
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng, samples=10, given=given)
    merged = mpf.merge(paths(made), "regmean", [1, 3], calibration=calibration.path)
    for name, matrix in result(merged).items():
        truth = sum(w * m.modules[name].delta for w, m in zip((0.25, 0.75), made, strict=True))
        np.testing.assert_allclose(matrix[:, 3], truth[:, 3], rtol=0, atol=1e-6)


def test_scale_of_weights_order_and_gauge_do_not_matter(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    factors = {}
    for name, m in made[0].modules.items():
        turn = np.diag(2.0 ** rng.integers(-20, 20, len(m.a))) @ (
            np.eye(len(m.a)) + 0.2 * rng.standard_normal((len(m.a), len(m.a)))
        )
        factors[name] = turn @ m.a, m.b @ np.linalg.inv(turn)
    turned = make_adapter(tmp_path / "turned", factors=factors, modules=WIDE, alpha=3)
    options = {"calibration": calibration.path, "domains": DOMAINS, "dtype": "F32"}
    lam = np.array([1.0, 2.5, 0.3])
    before = result(mpf.merge(paths(made), "regmean", lam, **options))
    close(result(mpf.merge(paths(made), "regmean", lam * 1e-30, **options)), before, 2)
    moved = [turned, *made[1:]]
    close(result(mpf.merge(paths(moved), "regmean", lam, **options)), before, 20)
    order = [2, 0, 1]
    options["domains"] = [DOMAINS[i] for i in order]
    again = mpf.merge(paths([made[i] for i in order]), "regmean", lam[order], **options)
    close(result(again), before, 2)


@pytest.mark.parametrize("truncation", ["activation", "plain"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.8}, {"rank": 30}], ids=str)
def test_a_rank_cut_is_the_best_there_is(tmp_path, rng, truncation, options):
    made, calibration = zoo_and_calibration(tmp_path, rng, samples=20)
    lam = np.array([1.0, 2.5, 0.3])
    merged = mpf.merge(paths(made), "regmean", lam, **options, truncation=truncation,
                       calibration=calibration.path)  # fmt: skip
    truth, metrics = dense_regmean(made, calibration, lam)
    for m in merged.modules:
        name = m.module.name
        root = np.linalg.cholesky(metrics[name] / lam.sum())
        size = np.linalg.norm(truth[name] @ root)
        lost = truth[name] - m.b.astype(np.float64) @ m.a
        target = truth[name] @ root if truncation == "activation" else truth[name]
        sigma = np.linalg.svd(target, compute_uv=False)
        shares = np.cumsum(sigma**2) / (sigma**2).sum()
        k = options.get("rank") or 1 + int(np.argmax(shares >= options["energy"]))
        best = np.sqrt((sigma[k:] ** 2).sum())
        measured = np.linalg.norm(lost @ root if truncation == "activation" else lost)
        assert abs(measured - best) <= 1e-6 * np.linalg.norm(sigma), name
        assert m.truncation_error == pytest.approx(np.linalg.norm(lost), abs=1e-6 * m.norm)
        relative = np.linalg.norm(lost @ root) / size
        assert m.details["activation_error_relative"] == pytest.approx(relative, abs=1e-6)
        assert len(m.a) == (k if k <= m.rank_before or "rank" in options else m.rank_before)


def test_the_weighted_cut_beats_the_plain_one_on_the_inputs(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng, samples=20)
    errors = [
        mpf.merge(paths(made), "regmean", rank=3, calibration=calibration.path, truncation=how)
        for how in ("activation", "plain")
    ]
    for weighted, plain in zip(*(e.modules for e in errors), strict=True):
        gain = plain.details["activation_error_relative"]
        assert weighted.details["activation_error_relative"] < gain
        assert weighted.truncation_error > plain.truncation_error


@pytest.mark.parametrize("rank", [None, 5])
def test_peft_loads_what_was_written_and_the_report_says_what_data_bought(tmp_path, rng, rank):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    merged = mpf.merge(paths(made), "regmean", None, rank, calibration=calibration.path)
    merged.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    written = deltas(tmp_path / "out")
    report = merge_json(tmp_path / "out")
    for row in report["outputs"]["adapters"]:
        assert row["error_relative"] < 0.9 * row["average_relative"]
        assert (row["error_relative"] == row["full_relative"]) == (rank is None)
    for m in merged.modules:
        name, row = m.module.name, m.details
        for i, g in enumerate(DOMAINS):
            x = calibration.samples[g, name]
            delta = made[i].modules[name].delta
            average = sum(m.modules[name].delta for m in made) / 3
            found = {c: v[i] for c, v in row["outputs"].items()}
            energy = np.square(x @ delta.T).sum() / len(x)
            assert found["energy"] == pytest.approx(energy, rel=1e-9)
            for c, m in (("error", written[name]), ("average", average)):
                error = np.square(x @ (m - delta).T).sum() / len(x)
                assert found[c] == pytest.approx(error, abs=1e-5 * energy), c
            assert (found["full"] == found["error"]) == (rank is None)


def test_large_modules_in_float32_stay_close_to_float64(tmp_path, rng, monkeypatch):
    """Realistic inputs: a mean, massive dimensions, rare spikes. bfloat16 does far more harm."""
    d, modules = 200, {"m": (60, 200, 8)}
    made = zoo_of(*[{"modules": modules, "rank": 8}] * 3)(tmp_path, seed_from(rng))
    given = {}
    for g in DOMAINS:
        x = rng.standard_normal((50, 40)) @ rng.standard_normal((40, d))
        x += 0.3 * rng.standard_normal(d)
        x[:, :3] = x[:, :3] * 20 + [300, -150, 80]
        x[:, 5:8] *= 1 + 500 * (rng.random((50, 3)) < 0.05)
        given[g, "m"] = x
    calibration = make_calibration(tmp_path / "cal", modules, DOMAINS, rng, samples=50, given=given)
    exact = result(mpf.merge(paths(made), "regmean", calibration=calibration.path))["m"]
    monkeypatch.setattr(activation, "LARGE", 0)
    rounded = result(mpf.merge(paths(made), "regmean", calibration=calibration.path))["m"]
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert U32 / 4 < difference < bound("regmean float32")
    for key, x in given.items():
        given[key] = x * (1 + 2.0**-9 * rng.uniform(-1, 1, x.shape))
    again = make_calibration(tmp_path / "again", modules, DOMAINS, rng, samples=50, given=given)
    moved = result(mpf.merge(paths(made), "regmean", calibration=again.path))["m"]
    assert np.linalg.norm(moved - exact) > 10 * bound("regmean float32") * np.linalg.norm(exact)


def test_modules_that_share_inputs_share_the_factorisation(tmp_path, rng, monkeypatch):
    modules = {f"layers.0.{n}": (8, 12, 3) for n in ("k", "o", "q", "v")}
    made = zoo_of({"modules": modules}, {"modules": modules})(tmp_path, seed_from(rng))
    shared = {f"layers.0.{n}": "layers.0.k" for n in "qv"}
    calibration = make_calibration(tmp_path / "cal", modules, "ab", rng, shared=shared)
    built = []
    original = activation.Metric.__init__
    monkeypatch.setattr(
        activation.Metric, "__init__",
        lambda self, *args: (built.append(1), original(self, *args))[1],
    )  # fmt: skip
    merged = mpf.merge(paths(made), "regmean", calibration=calibration.path)
    assert len(built) == 2
    monkeypatch.undo()
    # Kept for no one: everything is made anew.
    monkeypatch.setattr(activation.Recent, "get", lambda self, key, make: make())
    apart = mpf.merge(paths(made), "regmean", calibration=calibration.path)
    for one, two in zip(merged.modules, apart.modules, strict=True):
        assert (one.a == two.a).all()


def test_the_same_bytes_for_any_number_of_threads(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    results = [
        mpf.merge(paths(made), "regmean", None, 4, calibration=calibration.path, threads=threads)
        for threads in (1, 2, 3)
    ]
    for first, *others in zip(*(r.modules for r in results), strict=True):
        for m in others:
            assert m.a.tobytes() == first.a.tobytes() and m.b.tobytes() == first.b.tobytes()


@pytest.mark.parametrize("n", [1, 255, 600])
def test_the_cholesky_solve_is_a_solve(rng, n):
    z = rng.standard_normal((n, 2 * n)) * 3
    k = np.eye(n) + z @ z.T
    right = rng.standard_normal((n, 4))
    solution = activation.Cholesky(k.copy()).solve(right)
    residual = np.linalg.norm(k @ solution - right)
    assert residual <= 1e-12 * np.linalg.norm(k, 2) * np.linalg.norm(solution)
    with pytest.raises(InputError, match="ridge: too small"):
        activation.Cholesky(k - 2 * np.trace(k) * np.eye(n))


def test_bad_input_is_refused_with_its_reason(tmp_path, rng):
    made, calibration = zoo_and_calibration(tmp_path, rng)
    zoo, cal = paths(made), calibration.path
    for weights in ([1, 0, 1], [1, -1, 1]):
        with pytest.raises(InputError, match="positive weights only, not that of b"):
            mpf.merge(zoo, "regmean", weights, calibration=cal)
    with pytest.raises(InputError, match="needs a calibration"):
        mpf.merge(zoo, "regmean")
    for key, value in (("off_diagonal", 1.1), ("ridge", 0), ("absent", "no"), ("truncation", "x")):
        with pytest.raises(InputError, match=key):
            mpf.merge(zoo, "regmean", calibration=cal, **{key: value})
    short = make_calibration(tmp_path / "short", subset("head", of=WIDE), DOMAINS, rng)
    with pytest.raises(InputError, match=r"layers\.1\.q_proj: the calibration did not record"):
        mpf.merge(zoo, "regmean", calibration=short.path)
    other = dict(WIDE, head=(21, 41, 3))
    narrow = make_calibration(tmp_path / "narrow", other, DOMAINS, rng)
    with pytest.raises(InputError, match="head: is 21 x 41 in the calibration, and 21 x 40"):
        mpf.merge(zoo, "regmean", calibration=narrow.path)


def test_huge_and_tiny_updates_and_zero_ones(tmp_path, rng):
    made = zoo_of(
        {"modules": WIDE, "magnitude": 1e12}, {"modules": WIDE, "magnitude": 1e-12},
        {"modules": WIDE, "zero_b": True},
    )(tmp_path, seed_from(rng))  # fmt: skip
    calibration = make_calibration(tmp_path / "cal", WIDE, DOMAINS, rng)
    merged = mpf.merge(paths(made), "regmean", calibration=calibration.path)
    close(result(merged), dense_regmean(made, calibration, np.ones(3))[0])
    nothing = mpf.merge([made[2].path], "regmean", rank=2, calibration=calibration.path)
    assert all(not m.a.any() and m.norm == 0 for m in nothing.modules)
