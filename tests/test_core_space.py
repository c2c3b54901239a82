"""Core Space against its procedure on balanced factors, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import WIDE, assert_peft_agrees, merge_json, subset, truncated
from small_cores import (
    CASES,
    delta,
    every_case,
    merged_deltas,
    rounding,
    true_deltas,
    two_gauges,
)
from tolerances import TOLERANCES

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import stream

BASIS = TOLERANCES["basis"].value


def balanced(x: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """B = U sqrt(S), A = sqrt(S) V^T at the numerical rank."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = int(np.count_nonzero(s > max(1e-6 * s[0], 1e-12 * size)))
    return u[:, :k] * np.sqrt(s[:k]), np.sqrt(s[:k, None]) * vt[:k]


def cores_of(deltas: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Bases and cores as Panariello et al. make them: SVDs of the two stacks."""
    size = max(map(np.linalg.norm, deltas))
    factors = [balanced(x, size) for x in deltas]
    u, s, _ = np.linalg.svd(np.concatenate([b for b, _ in factors], axis=1), full_matrices=False)
    _, t, vt = np.linalg.svd(np.concatenate([a for _, a in factors]), full_matrices=False)
    u, vt = u[:, s > 1e-6 * s.max(initial=0)], vt[t > 1e-6 * t.max(initial=0)]
    return u, [u.T @ x @ vt.T for x in deltas], vt


def ties(tasks, weights, shares, *, positive_on_zero: bool = False) -> np.ndarray:
    """Yadav et al.: trim, elect by the sum before weights, average what agrees; 0 if it cancels."""
    kept = []
    for x, share in zip(tasks, shares, strict=True):
        count = int(share * x.size)
        limit = np.sort(np.abs(x), axis=None)[::-1][count - 1] if count else np.inf
        kept.append(np.where(np.abs(x) >= limit, x, 0.0))
    total = sum(kept)
    sign = np.sign(total) * (np.abs(total) > 1e-6 * sum(map(np.abs, kept)))
    if positive_on_zero:
        sign = np.where(sign == 0, 1.0, sign)
    agree = [(np.sign(x) == sign) & (x != 0) for x in kept]
    above = sum(w * x * ok for w, x, ok in zip(weights, kept, agree, strict=True))
    return above / np.maximum(sum(ok.astype(int) for ok in agree), 1)


def flat(x: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = int(np.count_nonzero(s > 1e-4 * s[0])) if s.size and s[0] > 0 else 0
    return (u[:, :k] * (s[:k].mean() if k else 0.0)) @ vt[:k]


@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 2.0)])
@every_case
def test_linear_rules_equal_linear(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    w = weights or (1.0, 1.0, 1.0)
    total = merged_deltas(made, "core_space", weights=weights, rule="sum")
    mean = merged_deltas(made, "core_space", weights=weights, rule="mean")
    plain = merged_deltas(made, "linear", weights=w)
    for name, deltas in true_deltas(made).items():
        want = sum(x * d for x, d in zip(w, deltas, strict=True))
        bound = rounding(want, deltas, w)
        assert np.linalg.norm(delta(total[name]) - want) <= bound
        assert np.linalg.norm(delta(total[name]) - delta(plain[name])) <= 2 * bound
        assert np.linalg.norm(delta(mean[name]) - want / 3) <= bound
        assert total[name].rank_before == plain[name].rank_before


@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 2.0)])
@every_case
def test_ties_in_the_core_is_its_definition(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    shares = rng.uniform(0.1, 0.9, 3)
    got = merged_deltas(made, "core_space", weights=weights, density=list(shares))
    w = weights or (1.0, 1.0, 1.0)
    for name, deltas in true_deltas(made).items():
        if not any(d.any() for d in deltas):
            assert not delta(got[name]).any()
            continue
        u, cores, vt = cores_of(deltas)
        want = u @ ties(cores, w, shares) @ vt
        # float64 cores; a basis vector is off by eps kappa^2 / gap
        bound = rounding(want, deltas, w) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound, name
        wrong = u @ ties(cores, w, np.minimum(shares + 0.1, 1)) @ vt
        if np.linalg.norm(wrong - want) > 1e-3 * np.linalg.norm(want):
            assert np.linalg.norm(delta(got[name]) - wrong) > 10 * bound


def test_ties_that_keeps_nothing_or_all(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    none = merged_deltas(made, "core_space", density=0.0)
    every = merged_deltas(made, "core_space", density=1.0)
    for name, deltas in true_deltas(made).items():
        assert not delta(none[name]).any()
        u, cores, vt = cores_of(deltas)
        want = u @ ties(cores, (1, 1, 1), (1, 1, 1)) @ vt
        bound = rounding(want, deltas, (1, 1, 1)) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(every[name]) - want) <= bound


def test_dare_ties_drops_by_a_hash_of_the_position(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    seed = int(rng.integers(1 << 60))
    got = merged_deltas(made, "core_space", rule="dare_ties", density=0.6, seed=seed)
    other = merged_deltas(made, "core_space", rule="dare_ties", density=0.6, seed=seed + 1)
    for name, deltas in true_deltas(made).items():
        u, cores, vt = cores_of(deltas)
        position = np.arange(cores[0].size, dtype=np.uint64).reshape(cores[0].shape)
        dropped = []
        for core, adapter in zip(cores, "abc", strict=True):
            chance = counter_hash(seed, stream(name, adapter), position) / 2.0**32
            dropped.append(np.where(chance < 0.6, core / 0.6, 0.0))
        want = u @ ties(dropped, (1, 1, 1), (1, 1, 1)) @ vt
        bound = rounding(want, deltas, (1, 1, 1)) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound
        assert np.linalg.norm(delta(other[name]) - want) > 100 * bound


@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 0.0)])
@every_case
def test_the_core_is_an_isometry_for_tsv_and_iso(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    tsv = merged_deltas(made, "core_space", weights=weights, rule="tsv")
    same = merged_deltas(made, "tsv_m", weights=weights)
    iso = merged_deltas(made, "core_space", weights=weights, rule="sum", isotropic=True)
    level = merged_deltas(made, "iso_c", weights=weights)
    for name, deltas in true_deltas(made).items():
        for one, two in ((tsv[name], same[name]), (iso[name], level[name])):
            bound = rounding(delta(two), deltas, (1, 1, 1)) + 1e-5 * np.linalg.norm(delta(two))
            assert np.linalg.norm(delta(one) - delta(two)) <= 2 * bound


@pytest.mark.parametrize("rule", ["ties", "tsv"])
def test_isotropic_flattens_what_any_rule_made(tmp_path, rng, rule):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    plain = merged_deltas(made, "core_space", rule=rule)
    level = merged_deltas(made, "core_space", rule=rule, isotropic=True)
    for name in plain:
        want = flat(delta(plain[name]))
        assert np.linalg.norm(delta(level[name]) - want) <= 1e-3 * np.linalg.norm(want)
        assert np.linalg.norm(delta(plain[name]) - want) > 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("rule", ["sum", "ties", "dare_ties", "tsv"])
def test_the_gauge_does_not_matter(tmp_path, rng, rule):
    made, other = two_gauges(tmp_path, rng)
    options = {"rule": rule, "density": 0.4, "weights": [2.0, -1.0, 0.7]}
    first, second = (merged_deltas(some, "core_space", **options) for some in (made, other))
    for name, deltas in true_deltas(made).items():
        bound = 2 * rounding(delta(first[name]), deltas, (2, 1, 1))
        bound += BASIS * np.linalg.norm(delta(first[name]))
        assert np.linalg.norm(delta(first[name]) - delta(second[name])) <= bound


def test_bases_of_the_stored_factors_would_depend_on_the_gauge(tmp_path, rng):
    """Why the balanced ones are taken: ties in the bases of the files' factors moves by tenths."""
    results = []
    for made in two_gauges(tmp_path, rng):
        modules = [a.modules["layers.1.q_proj"] for a in made]
        u = np.linalg.svd(np.concatenate([m.b for m in modules], axis=1), full_matrices=False)[0]
        vt = np.linalg.svd(np.concatenate([m.a for m in modules]), full_matrices=False)[2]
        cores = [u.T @ m.delta @ vt.T for m in modules]
        results.append(u @ ties(cores, (1, 1, 1), (0.4,) * 3) @ vt)
    assert np.linalg.norm(results[0] - results[1]) > 0.05 * np.linalg.norm(results[0])


@pytest.mark.parametrize("rule", ["sum", "mean", "ties", "dare_ties", "tsv"])
def test_the_order_of_adapters_does_not_matter(tmp_path, rng, rule):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    options = {"rule": rule, "density": 0.4}
    first = merged_deltas(made, "core_space", weights=[2.0, -1.0, 0.7], **options)
    second = merged_deltas(made[::-1], "core_space", weights=[0.7, -1.0, 2.0], **options)
    for name, deltas in true_deltas(made).items():
        bound = rounding(delta(first[name]), deltas, (2, 1, 1))
        error = np.linalg.norm(delta(first[name]) - delta(second[name]))
        assert error <= 2 * bound + BASIS * np.linalg.norm(delta(first[name]))


def test_opposite_updates_cancel_whatever_sign_a_zero_sum_would_elect(tmp_path, rng):
    (one,), (other,) = two_gauges(tmp_path, rng, ranks=(4,))
    negated = {name: (m.a, -m.b) for name, m in other.modules.items()}
    two = make_adapter(tmp_path / "negated", subset(*negated, of=WIDE), factors=negated)
    got = merged_deltas([one, two], "core_space", density=1.0)
    for name, deltas in true_deltas([one, two]).items():
        assert np.linalg.norm(delta(got[name])) <= 1e-6 * np.linalg.norm(deltas[0])
        u, cores, vt = cores_of(deltas)
        elected = u @ ties(cores, (1, 1), (1, 1), positive_on_zero=True) @ vt
        assert np.linalg.norm(elected) > 0.1 * np.linalg.norm(deltas[0])


def test_the_result_is_truncated_saved_and_read_by_peft(tmp_path, rng):
    made = CASES["modules missing"](tmp_path, rng)
    zoo = mpf.open_zoo([a.path for a in made])
    cut = mpf.merge(zoo, "core_space", rank=2)
    for one, two in zip(mpf.merge(zoo, "core_space").modules, cut.modules, strict=True):
        want = truncated(delta(one), 2)
        assert np.linalg.norm(delta(two) - want) <= 1e-4 * np.linalg.norm(want)
    cut.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    assert merge_json(tmp_path / "out")["arguments"]["rule"] == "ties"
    assert mpf.MERGE_METHODS["core_space"].summary
    for options in ({"rule": "median"}, {"density": 2}, {"seed": -1}, {"isotropic": 1}):
        with pytest.raises(InputError, match="must be"):
            mpf.merge(zoo, "core_space", **options)


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "tsv"])
def test_threads_do_not_change_a_byte(tmp_path, rng, rule):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    one, two = (merged_deltas(made, "core_space", rule=rule, threads=n) for n in (1, 3))
    for name in one:
        assert one[name].a.tobytes() == two[name].a.tobytes()
        assert one[name].b.tobytes() == two[name].b.tobytes()
