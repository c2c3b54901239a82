"""The weighted sum of deltas, cut where the inputs notice least."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration
from dense_merge import (
    RAGGED,
    WIDE,
    assert_peft_agrees,
    exact_sums,
    merge_json,
    seed_from,
    subset,
    zoo_of,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.weighted_svd import Basis

DOMAINS = ("a", "b", "c")
WEIGHTS = np.array([0.7, -0.4, 1.5])


def roots(calibration, domains, off=0.9, ridge=1e-6):
    """Cholesky factor of the mean C of the domains, per module."""
    found = {}
    for name in WIDE:
        mean = sum(calibration.moments[g, name] for g in domains) / len(domains)
        c = sum(calibration.second_moment(g, name, off, ridge * mean) for g in domains)
        found[name] = np.linalg.cholesky(c / len(domains))
    return found


def setting(folder, rng):
    recipes = [dict(RAGGED[0]), dict(RAGGED[1], dtype="BF16"), dict(RAGGED[2])]
    recipes[0]["modules"] = subset("head", "layers.1.q_proj", of=WIDE)
    made = zoo_of(*recipes)(folder, seed_from(rng))
    return made, make_calibration(folder / "cal", WIDE, DOMAINS, rng, samples=11)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"rank": 3}, {"energy": 0.7}, {"rank": 2, "energy": 0.99}, {"rank": 33},
        {"off_diagonal": 0.0, "rank": 3},
    ],
    ids=str,
)  # fmt: skip
def test_it_is_the_optimum_of_the_dense_problem(tmp_path, rng, options):
    made, calibration = setting(tmp_path, rng)
    paths = [m.path for m in made]
    merged = mpf.merge(paths, "weighted_svd", WEIGHTS, calibration=calibration.path, **options)
    metric = roots(calibration, DOMAINS, options.get("off_diagonal", 0.9))
    sums = exact_sums(made, WEIGHTS)
    for m in merged.modules:
        name = m.module.name
        whole, lost = sums[name], sums[name] - m.b.astype(np.float64) @ m.a
        sigma = np.linalg.svd(whole @ metric[name], compute_uv=False)
        full = int((sigma > 1e-10 * sigma[0]).sum())
        k = options.get("rank", 7) if options.get("energy") is None else full
        if "energy" in options:
            shares = np.cumsum(sigma**2) / (sigma**2).sum()
            k = min(options.get("rank", full), 1 + int(np.argmax(shares >= options["energy"])))
        best = np.linalg.norm(sigma[k:])
        size = np.linalg.norm(sigma)
        assert abs(np.linalg.norm(lost @ metric[name]) - best) <= 1e-6 * size, name
        assert m.details["activation_error_relative"] == pytest.approx(best / size, abs=1e-6)
        assert m.truncation_error == pytest.approx(np.linalg.norm(lost), abs=1e-6 * m.norm)
        assert m.norm == pytest.approx(np.linalg.norm(whole), rel=1e-9)
        assert m.rank_before == full
        assert len(m.a) == k


def test_plain_truncation_is_worse_on_the_inputs_and_the_bound_sees_it(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    paths = [m.path for m in made]
    ours = mpf.merge(paths, "weighted_svd", WEIGHTS, 3, calibration=calibration.path)
    plain = mpf.merge(paths, "svd", WEIGHTS, 3)
    metric, sums = roots(calibration, DOMAINS), exact_sums(made, WEIGHTS)
    for one, other in zip(ours.modules, plain.modules, strict=True):
        name = one.module.name
        loss = [
            np.linalg.norm((sums[name] - m.b.astype(np.float64) @ m.a) @ metric[name])
            for m in (one, other)
        ]
        assert loss[0] < loss[1] * (1 - 1e-4)
        assert one.truncation_error > other.truncation_error


def test_the_gauge_and_the_order_do_not_matter(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    factors = {}
    for name, m in made[2].modules.items():
        turn = np.eye(len(m.a)) + 0.2 * rng.standard_normal((len(m.a), len(m.a)))
        factors[name] = turn @ m.a, m.b @ np.linalg.inv(turn) * 2.0**-30
    turned = make_adapter(
        tmp_path / "turned", factors=factors, modules=WIDE, alpha=8 * 2.0**30,
        alphas={"head": 5.5 * 2.0**30},
    )  # fmt: skip
    options = {"calibration": calibration.path, "rank": 4, "dtype": "F32"}

    def merged(order, zoo):
        result = mpf.merge([zoo[i].path for i in order], "weighted_svd", WEIGHTS[order],
                           domains=[DOMAINS[i] for i in order], **options)  # fmt: skip
        return [m.b.astype(np.float64) @ m.a for m in result.modules]

    before = merged([0, 1, 2], made)
    for after in (merged([2, 0, 1], made), merged([0, 1, 2], [*made[:2], turned])):
        for one, two in zip(before, after, strict=True):
            assert np.linalg.norm(one - two) <= 1e-4 * np.linalg.norm(one)


def test_duplicates_cancelling_weights_and_zero_updates(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE}, {"modules": WIDE, "zero_b": True})(
        tmp_path, 3
    )
    twin = make_adapter(tmp_path / "twin", modules=WIDE, seed=3)
    calibration = make_calibration(tmp_path / "cal", WIDE, ["all"], rng)

    def merged(adapters, weights):
        return mpf.merge([m.path for m in adapters], "weighted_svd", weights,
                         calibration=calibration.path, domains=["all"] * len(weights))  # fmt: skip

    for m in merged([made[0], twin], [0.5, 0.5]).modules:
        truth = made[0].modules[m.module.name].delta
        assert np.linalg.norm(m.b @ m.a - truth) <= 1e-6 * np.linalg.norm(truth)
        assert m.rank_before == len(made[0].modules[m.module.name].a)
    for m in merged([made[2]], [1.0]).modules:
        assert m.norm == 0 and m.rank_before == 0 and not m.a.any()
    for m in merged([made[0], twin], [1.0, -1.0]).modules:
        size = np.linalg.norm(made[0].modules[m.module.name].delta)
        assert np.linalg.norm(m.b.astype(np.float64) @ m.a) <= 1e-7 * size


def test_a_basis_is_orthonormal_and_gives_the_columns_back_however_they_depend(rng):
    cases = {
        "plain": rng.standard_normal((50, 12)),
        "graded": rng.standard_normal((50, 12)) * 10.0 ** rng.uniform(-12, 12, 12),
        "dependent": rng.standard_normal((50, 3)) @ rng.standard_normal((3, 12)),
        "nearly": rng.standard_normal((50, 1)) + 1e-5 * rng.standard_normal((50, 12)),
        "wide": rng.standard_normal((5, 12)),
        "zero": np.zeros((50, 4)),
        "one row": rng.standard_normal((1, 4)),
    }
    cases["zero column"] = cases["plain"] * (np.arange(12) != 4)
    for name, b in cases.items():
        basis = Basis(b)
        q = basis.expand(np.eye(len(basis.r)))
        np.testing.assert_allclose(q.T @ q, np.eye(len(basis.r)), atol=1e-8, err_msg=name)
        size = np.linalg.norm(b, axis=0)
        assert (np.linalg.norm(q @ basis.r - b, axis=0) <= 1e-7 * size).all(), name


def test_files_are_read_by_peft_and_data_is_asked_for(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    paths = [m.path for m in made]
    mpf.merge(paths, "weighted_svd", rank=4, calibration=calibration.path).save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    assert merge_json(tmp_path / "out")["method"] == "weighted_svd"
    with pytest.raises(InputError, match="needs a calibration"):
        mpf.merge(paths, "weighted_svd")
    assert mpf.MERGE_METHODS["weighted_svd"].summary
