"""Statistics of sets from Gram matrices, against merges that are made and run."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from set_truth import Sets, dual_value, effective_rank
from tolerances import bound

from mergeprobe_fast.engine.sets import RIDGE, set_statistics
from mergeprobe_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("isa")


def padded(sets):
    out = np.full((len(sets), max(map(len, sets))), -1)
    for row, s in zip(out, sets, strict=True):
        row[: len(s)] = s
    return out


def some_sets(rng, n, sizes):
    return [rng.choice(n, k, replace=False) for k in sizes]


def given_weights(rng, members):
    return np.where(members >= 0, rng.normal(0.3, 0.5, members.shape), 7.0)  # negative ones too


def statistics(sets, members, weights, **arguments):
    return set_statistics(sets.totals, members, weights, sets.domain_of, **arguments)


@pytest.fixture
def ragged(rng):
    sets = Sets.drawn(rng, 12)
    members = padded(some_sets(rng, 12, [1, 2, 3, 3, 8, 5, 2, 8, 1, 4, 7, 6, 8]))
    return sets, members, given_weights(rng, members)


def same(name):
    """How far a value may move when nothing but roundings differ."""
    return bound(name.replace("_", " ")) if name.startswith("minimax_") else bound("set weights")


def cases(members, weights):
    for s, (row, w) in enumerate(zip(members, weights, strict=True)):
        yield s, row[row >= 0], w[row >= 0]


def test_geometry_is_that_of_the_merged_deltas(ragged):
    sets, members, weights = ragged
    found = statistics(sets, members, weights)
    for s, who, w in cases(members, weights):
        deltas = sets.deltas[who].reshape(len(who), -1)
        m, norms = w @ deltas, np.linalg.norm(deltas, axis=1)
        assert found["merged_norm"][s] == pytest.approx(np.linalg.norm(m), rel=bound("sets"))
        assert found["superposition"][s] == pytest.approx(
            (m @ m) / (w**2 @ norms**2), rel=bound("sets")
        )
        assert found["gram_rank"][s] == pytest.approx(effective_rank(deltas), rel=bound("sets"))
        assert found["cosine_rank"][s] == pytest.approx(
            effective_rank(deltas / norms[:, None]), rel=bound("sets")
        )
        np.testing.assert_allclose(
            found["leverage"][s, : len(who)], sets.leverages(who), atol=bound("sets")
        )
        assert np.isnan(found["leverage"][s, len(who) :]).all()


def test_errors_and_directions_are_those_of_the_outputs(ragged):
    sets, members, weights = ragged
    found = statistics(sets, members, weights)
    for s, who, w in cases(members, weights):
        k = len(who)
        np.testing.assert_allclose(found["error"][s, :k], sets.errors(who, w), rtol=bound("sets"))
        np.testing.assert_allclose(
            found["direction"][s, :k], sets.directions(who, w), atol=bound("sets")
        )
        assert np.isnan(found["error"][s, k:]).all()


def test_a_wrong_domain_or_weight_or_gram_would_show(ragged):
    """The planted faults of the tolerance "sets"."""
    sets, members, weights = ragged
    found = statistics(sets, members, weights)["error"]

    def agrees(other):
        return np.allclose(found, other, rtol=bound("sets"), equal_nan=True)

    assert agrees(statistics(sets, members, weights)["error"])
    assert not agrees(statistics(sets, members, weights * (1 + 1e-6))["error"])
    moved = Sets(sets.deltas, sets.inputs, (sets.domain_of + 1) % len(sets.inputs))
    assert not agrees(statistics(moved, members, weights)["error"])
    transposed = sets.totals
    transposed.inputs = transposed.inputs * (1 + 1e-6 * np.eye(len(sets.deltas)))
    assert not agrees(set_statistics(transposed, members, weights, sets.domain_of)["error"])


def test_the_optima_are_told_apart(rng):
    """The planted faults of "set weights" and "minimax ...": the other optimum, another set."""
    sets = Sets.drawn(rng, 6)
    found = statistics(sets, [[0, 1, 2], [3, 4, 5]], np.ones((2, 3)))
    for what in ("weights", "error"):
        one, other = found[f"reweighted_{what}"], found[f"minimax_{what}"]
        assert np.abs(one - other).max() > bound(f"minimax {what}")
    assert np.abs(np.diff(found["reweighted_weights"], axis=0)).max() > bound("set weights")


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_mean_weights_are_those_of_least_squares_on_the_outputs(ragged, rng, weighted):
    sets, members, weights = ragged
    lambdas = rng.uniform(0.2, 5, len(sets.deltas)) if weighted else None
    found = statistics(sets, members, weights, lambdas=lambdas)
    for s, who, _ in cases(members, weights):
        k = len(who)
        lam = np.ones(k) if lambdas is None else lambdas[who]
        rows, target = sets.design(who, lam)
        best, *_ = np.linalg.lstsq(rows, target, rcond=None)
        w = found["reweighted_weights"][s, :k]
        np.testing.assert_allclose(w, best, atol=bound("set weights") * np.abs(best).max())
        np.testing.assert_allclose(
            found["reweighted_error"][s, :k], sets.errors(who, w), atol=bound("sets")
        )
        assert lam @ found["reweighted_error"][s, :k] <= lam @ sets.errors(who, best) + 1e-8


def test_no_weights_have_a_smaller_worst_error_than_minimax(ragged):
    """The dual value at the active members' multipliers proves it; SLSQP finds the same."""
    sets, members, weights = ragged
    found = statistics(sets, members, weights)
    for s, who, _ in cases(members, weights):
        k = len(who)
        w, e = found["minimax_weights"][s, :k], found["minimax_error"][s, :k]
        np.testing.assert_allclose(e, sets.errors(who, w), atol=bound("sets"))
        best = slsqp(sets, who)
        assert abs(e.max() - best) <= 2e-6 * best + 1e-9
        assert 0 <= found["minimax_gap"][s] <= 1e-7 * e.max() + 1e-12


def slsqp(sets, who):
    """min t with e_i(w) <= t, from outputs."""
    k = len(who)
    systems = [sets.design([i], [1.0]) for i in who]
    outputs = sets.outputs()
    parts = []
    for i, (_, target) in zip(who, systems, strict=True):
        o = outputs[sets.domain_of[i]]
        parts.append((o[who].T / np.linalg.norm(o[i]), target))

    def each(x):
        return x[-1] - np.array([((r @ x[:-1] - t) ** 2).sum() for r, t in parts])

    def slope(x):
        rows = [np.append(-2 * (r @ x[:-1] - t) @ r, 1.0) for r, t in parts]
        return np.array(rows)

    last = np.eye(k + 1)[-1]
    start = np.append(np.full(k, 1 / k), 0.0)
    start[-1] = -each(start).min()
    solved = minimize(
        lambda x: x[-1], start, jac=lambda x: last, method="SLSQP",
        constraints={"type": "ineq", "fun": each, "jac": slope},
        options={"ftol": 1e-13, "maxiter": 500},
    )  # fmt: skip
    return float(-(each(np.append(solved.x[:-1], 0.0))).min())


def test_the_gap_is_certified_by_multipliers(rng):
    """KKT: some mu on the active members makes w stationary, and its dual value is the worst."""
    sets = Sets.drawn(rng, 6, domains=6)
    who = np.arange(6)
    found = statistics(sets, who[None], np.full((1, 6), 1 / 6))
    w, e = found["minimax_weights"][0], found["minimax_error"][0]
    slopes = []
    for i in who:
        o = sets.outputs()[sets.domain_of[i]]
        slopes.append((o @ (w @ o - o[i])) / (o[i] @ o[i]))
    active = np.flatnonzero(e > e.max() * (1 - 1e-4))
    system = np.vstack([np.array(slopes)[active].T, 1e3 * np.ones(len(active))])
    mu = np.zeros(6)
    mu[active], *_ = np.linalg.lstsq(system, np.append(np.zeros(6), 1e3), rcond=None)
    assert (mu > -1e-4).all()
    mu = np.maximum(mu, 0) / np.maximum(mu, 0).sum()
    assert e.max() - dual_value(sets, who, mu) <= 1e-6 * e.max()
    assert e.max() - dual_value(sets, who, np.full(6, 1 / 6)) > 1e-4 * e.max()  # no other would do


def test_each_optimum_is_best_at_what_it_optimises(rng):
    sets = Sets.drawn(rng, 10, domains=4)
    members = padded(some_sets(rng, 10, [4] * 20 + [7] * 5))
    found = statistics(sets, members, given_weights(rng, members))
    mean = {n: np.nanmean(found[f"{n}error"], 1) for n in ("", "reweighted_", "minimax_")}
    worst = {n: np.nanmax(found[f"{n}error"], 1) for n in ("", "reweighted_", "minimax_")}
    slack = 1e-6
    assert (mean["reweighted_"] <= np.minimum(mean[""], mean["minimax_"]) + slack).all()
    assert (worst["minimax_"] <= np.minimum(worst[""], worst["reweighted_"]) + slack).all()
    assert (mean["reweighted_"] < mean["minimax_"] - slack).any()
    assert (worst["minimax_"] < worst["reweighted_"] - slack).any()


def test_with_one_metric_for_all_the_best_mean_weights_do_not_depend_on_the_deltas(rng):
    """Trap T7, with errors that are not divided: w is lambda over its sum, whatever the Gram."""
    sets = Sets.drawn(rng, 5, domains=1)
    own = np.array([o @ o for o in sets.outputs()[0]])
    lambdas = rng.uniform(0.5, 2, 5)
    found = statistics(sets, np.arange(5)[None], np.ones((1, 5)), lambdas=lambdas * own)
    np.testing.assert_allclose(
        found["reweighted_weights"][0], lambdas / lambdas.sum(), atol=bound("set weights")
    )
    assert np.ptp(found["minimax_weights"][0] - lambdas / lambdas.sum()) > 1e-3


def test_order_of_members_padding_and_company_do_not_matter(ragged, rng):
    sets, members, weights = ragged
    found = statistics(sets, members, weights)
    alone = statistics(sets, members[4:5], weights[4:5])
    for name, values in alone.items():
        assert values.tobytes() == found[name][4:5].tobytes(), name
    wide = np.pad(members, ((0, 0), (0, 3)), constant_values=-1)
    padded_found = statistics(sets, wide, np.pad(weights, ((0, 0), (0, 3))))
    order = rng.permutation(8)
    turned = statistics(sets, members[4:5, order], weights[4:5, order])
    for name, values in found.items():
        there = padded_found[name] if values.ndim == 1 else padded_found[name][:, :8]
        assert values.tobytes() == there.tobytes(), name
        one = values[4] if values.ndim == 1 else values[4, order]
        np.testing.assert_allclose(turned[name][0], one, atol=same(name), rtol=same(name))


def test_threads_do_not_change_a_bit(ragged):
    sets, members, weights = ragged
    many = np.tile(members, (9, 1))
    found = [statistics(sets, many, np.tile(weights, (9, 1)), threads=t) for t in (1, 2, 5)]
    for name, values in found[0].items():
        assert all(values.tobytes() == other[name].tobytes() for other in found), name


def test_equal_adapters_are_redundant_and_share_their_weight(rng):
    sets = Sets.drawn(rng, 4)
    deltas = np.concatenate([sets.deltas, sets.deltas[:1], 3 * sets.deltas[:1]])
    sets = Sets(deltas, sets.inputs, np.array([0, 1, 2, 0, 0, 0]))
    found = statistics(sets, padded([[0, 1, 4], [5, 1, 0], [0, 4], [0, 1, 0]]), np.ones((4, 3)) / 3)
    for s, twins in enumerate(([0, 2], [0, 2], [0, 1], [0, 2])):
        np.testing.assert_allclose(found["leverage"][s, twins], 1.0, atol=1e-11)
    np.testing.assert_allclose(
        found["leverage"][0, 1], sets.leverages([1, 0])[0], atol=bound("sets")
    )
    np.testing.assert_allclose(found["reweighted_weights"][2, :2], 0.5, atol=1e-5)
    np.testing.assert_allclose(found["minimax_error"][2, :2], 0.0, atol=1e-8)
    assert found["cosine_rank"][2] == pytest.approx(1.0, abs=1e-9)
    with_one = statistics(sets, padded([[0, 1]]), np.ones((1, 2)))
    for name in ("reweighted_error", "minimax_error"):  # a second copy changes no worst case
        assert found["minimax_error"][0].max() == pytest.approx(
            with_one["minimax_error"].max(), rel=1e-6
        ), name


def test_zero_adapters_are_undefined_and_leave_the_others_what_they_are(rng):
    sets = Sets.drawn(rng, 4)
    sets.deltas[1] = 0.0
    members = padded([[0, 1, 2], [0, 2, 3], [1], [0, 2]])
    found = statistics(sets, members, np.ones((4, 3)))
    np.testing.assert_allclose(found["leverage"][0, [0, 2]], found["leverage"][3, :2], rtol=1e-12)
    np.testing.assert_allclose(found["error"][0, [0, 2]], found["error"][3, :2], rtol=1e-12)
    for name in ("leverage", "error", "direction"):
        assert np.isnan(found[name][0, 1]) and np.isnan(found[name][2, 0]), name
    for name in ("reweighted_weights", "reweighted_error", "minimax_weights", "minimax_error"):
        assert np.isnan(found[name][[0, 2]]).all() and not np.isnan(found[name][1]).any(), name
    assert np.isnan(found["minimax_gap"][[0, 2]]).all()
    assert np.isnan(found["cosine_rank"][[0, 2]]).all()
    assert found["gram_rank"][0] == pytest.approx(found["gram_rank"][3], rel=1e-12)
    assert np.isnan(found["gram_rank"][2]) and np.isnan(found["superposition"][2])
    assert found["merged_norm"][2] == 0


def test_energies_that_are_undefined_stay_so_and_touch_nothing_else(rng):
    """As where the base module's output, to which they are relative, is zero on a domain."""
    sets = Sets.drawn(rng, 4)
    sets.domain_of[:] = [0, 1, 2, 2]
    totals = sets.totals
    totals.inputs[1, 2, 2] = totals.inputs[2, 3, :] = totals.inputs[2, :, 3] = np.nan
    members = padded([[0, 1, 2], [0, 3], [0, 2]])
    found = set_statistics(totals, members, np.ones((3, 3)), sets.domain_of)
    truth = statistics(sets, members, np.ones((3, 3)))
    undefined = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 0]], bool) | (members < 0)
    assert (np.isnan(found["error"]) == undefined).all()
    np.testing.assert_array_equal(found["error"][~undefined], truth["error"][~undefined])
    for name in ("reweighted_weights", "minimax_error"):
        assert np.isnan(found[name][:2]).all()
        assert found[name][2].tobytes() == truth[name][2].tobytes()


def test_a_set_of_one_is_itself(rng):
    sets = Sets.drawn(rng, 2)
    found = statistics(sets, np.array([[1]]), np.array([[0.25]]))
    assert found["leverage"][0, 0] == 0
    assert found["superposition"][0] == pytest.approx(1.0, rel=1e-14)
    assert found["error"][0, 0] == pytest.approx(0.75**2, rel=1e-14)
    assert found["direction"][0, 0] == pytest.approx(1.0, rel=1e-14)
    for name in ("reweighted", "minimax"):
        assert found[f"{name}_weights"][0, 0] == pytest.approx(1.0, abs=2 * RIDGE)
        assert found[f"{name}_error"][0, 0] < 1e-18
    assert np.isnan(statistics(sets, [[1]], [[0.0]])["direction"][0, 0])


@pytest.mark.parametrize("k", [33, 64])
def test_large_sets_too(rng, k):
    sets = Sets.drawn(rng, k, domains=5, d_out=9, d_in=12)
    found = statistics(sets, np.arange(k)[None], np.full((1, k), 1 / k))
    who = np.arange(k)
    np.testing.assert_allclose(found["leverage"][0], sets.leverages(who), atol=1e-8)
    rows, target = sets.design(who, np.ones(k))
    least = ((rows @ np.linalg.lstsq(rows, target, rcond=None)[0] - target) ** 2).sum()
    assert found["reweighted_error"].sum() == pytest.approx(least, rel=1e-6)
    assert found["minimax_gap"][0] <= 1e-7 * found["minimax_error"].max() + 1e-12
    assert found["minimax_error"].max() <= found["reweighted_error"].max() + 1e-9


@pytest.mark.parametrize("magnitude", [1e-60, 1e60])
def test_no_scale_of_the_deltas_matters_but_for_the_norm(ragged, magnitude):
    sets, members, weights = ragged
    found = statistics(sets, members, weights)
    scaled = Sets(sets.deltas * magnitude, sets.inputs, sets.domain_of)
    other = statistics(scaled, members, weights)
    other["merged_norm"] = other["merged_norm"] / magnitude
    for name, values in found.items():
        tolerance = same(name)
        np.testing.assert_allclose(other[name], values, rtol=tolerance, atol=tolerance)


def test_members_of_very_different_norm_still_have_an_optimum(rng):
    sets = Sets.drawn(rng, 6, spread=4.0)
    found = statistics(sets, padded(some_sets(rng, 6, [2, 3, 4, 5, 6])), np.ones((5, 6)))
    worst = np.nanmax(found["minimax_error"], axis=1)
    assert (worst <= 1 + 1e-7).all()  # no weights at all have 1; and the gap
    assert (found["minimax_gap"] <= 1e-7 * worst + 1e-12).all()


def test_relative_sums_are_taken_unless_raw_ones_are_asked_for(ragged, rng):
    sets, members, weights = ragged
    totals = sets.totals
    other = Sets.drawn(rng, 12).totals.inputs
    totals.relative, raw = totals.inputs, other
    totals.inputs = raw
    found = set_statistics(totals, members, weights, sets.domain_of)
    expected = statistics(sets, members, weights)
    assert found["error"].tobytes() == expected["error"].tobytes()
    asked = set_statistics(totals, members, weights, sets.domain_of, raw=True)
    assert not np.allclose(asked["error"], expected["error"], equal_nan=True)


def test_only_what_is_asked_for_is_computed(ragged):
    sets, members, weights = ragged
    whole = statistics(sets, members, weights)
    for name in ("geometry", "retention", "reweighted", "minimax"):
        part = statistics(sets, members, weights, which=[name])
        assert 0 < len(part) < len(whole)
        for key, values in part.items():
            assert values.tobytes() == whole[key].tobytes()
    assert set(set_statistics(sets.totals, members, weights)) == {
        "merged_norm", "superposition", "gram_rank", "cosine_rank", "leverage",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"members": [[0, 99]]}, "members"),
        ({"members": [[-1, 0]]}, "members"),
        ({"members": [[0.0, 1.0]]}, "members"),
        ({"members": [0, 1]}, "members"),
        ({"weights": [[1.0]]}, "weights"),
        ({"weights": [[1.0, np.nan]]}, "weights"),
        ({"domain_of": [0, 1]}, "domain_of"),
        ({"domain_of": np.full(12, 3)}, "domain_of"),
        ({"domain_of": None, "which": ["minimax"]}, "domain_of"),
        ({"lambdas": np.zeros(12)}, "lambdas"),
        ({"which": ["sorcery"]}, "which"),
        ({"ridge": -1.0}, "ridge"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_name(rng, change, key):
    sets = Sets.drawn(rng, 12)
    arguments = {"members": [[0, 1]], "weights": [[1.0, 1.0]], "domain_of": sets.domain_of}
    with pytest.raises(InputError) as error:
        set_statistics(sets.totals, **(arguments | change))
    assert error.value.key == key


@pytest.mark.parametrize("fault", ["inf", "negative", "shape"])
def test_grams_that_are_none_are_refused(rng, fault):
    sets = Sets.drawn(rng, 3)
    totals = sets.totals
    if fault == "inf":
        totals.inputs[0, 1, 2] = np.inf
    elif fault == "negative":
        totals.inputs[0, 1, 1] = -1.0
    else:
        totals.inputs = totals.inputs[:, :2]
    with pytest.raises(InputError, match="inputs"):
        set_statistics(totals, [[0, 1]], [[1.0, 1.0]], sets.domain_of)
