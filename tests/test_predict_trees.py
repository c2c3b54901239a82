"""Trees as arrays, against xgboost itself and against their definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mergeprobe_fast import _native
from mergeprobe_fast.predict.boosted import fit_boosted, forest_of
from mergeprobe_fast.predict.extra import _ranks, fit_extra
from mergeprobe_fast.predict.forest import Forest, Tree, rounded
from mergeprobe_fast.predict.linear import fit_linear, ranks_of

xgb = pytest.importorskip("xgboost", reason="in the test extra")
SETTINGS = {"rounds": 40, "depth": 4, "rate": 0.1, "rows": 0.7, "columns": 0.5,
            "child_weight": 2.0, "ridge": 1.0, "seed": 3}  # fmt: skip


def table(rng, n=300, columns=6, holes=0.15):
    x = rng.normal(size=(n, columns)) * 10.0 ** rng.integers(-6, 7, columns)
    x[:, 0] = np.round(rng.normal(size=n))  # ties
    x[rng.random(x.shape) < holes] = np.nan
    x[:, -1] = 3.0
    t = np.nan_to_num(np.sign(x[:, 1])) + rng.normal(0, 0.1, n) + np.isnan(x[:, 2])
    return x, t


def below(tree, row):
    """The leaf of one row, walked as the definition says."""
    node = 0
    while tree.column[node] >= 0:
        value = np.float32(row[tree.column[node]])
        left = tree.missing_left[node] if np.isnan(value) else value < tree.at[node]
        node = tree.left[node] if left else tree.right[node]
    return node


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_converted_trees_predict_what_xgboost_does(rng, depth, holes):
    x, t = table(rng, holes=holes)
    booster = xgb.train(
        {"max_depth": depth, "eta": 0.2, "subsample": 0.8, "nthread": 1, "base_score": 0.25,
         "tree_method": "hist", "verbosity": 0},
        xgb.DMatrix(x, label=t, nthread=1), 50,
    )  # fmt: skip
    forest = forest_of(booster, 0.25, x)
    new, _ = table(rng, n=2000, holes=0.4)
    expected = booster.predict(xgb.DMatrix(new, nthread=1))
    # xgboost adds up 51 numbers in float32: each sum rounds once.
    size = 0.25 + sum(np.abs(tree.at[tree.column < 0]).max() for tree in forest.trees)
    bound = 51 * 2.0**-24 * size
    assert bound < 5e-5 and np.abs(forest.predict(new) - expected).max() < bound
    wrong = Forest(forest.trees[1:], forest.start, 1.0)
    assert np.abs(wrong.predict(new) - expected).max() > 20 * bound


def test_fitting_twice_gives_the_same_trees(rng):
    x, t = table(rng)
    w = rng.uniform(0.5, 2, len(t))
    for fit in (
        lambda: fit_boosted(x, t, w, **SETTINGS),
        lambda: fit_extra(x, t, w, count=7, leaf=3, columns=0.4, seed=5),
    ):
        one, other = fit(), fit()
        assert np.array_equal(one.predict(x), other.predict(x))
        for a, b in zip(one.trees, other.trees, strict=True):
            assert all(np.array_equal(v, vars(b)[n]) for n, v in vars(a).items() if n[0] != "_"
                       and isinstance(v, np.ndarray))  # fmt: skip


@pytest.mark.parametrize("kind", ["boosted", "extra"])
def test_a_forest_is_walked_row_by_row_as_its_trees_say(rng, kind):
    x, t = table(rng)
    w = np.ones(len(t))
    forest = (fit_boosted(x, t, w, **SETTINGS) if kind == "boosted"
              else fit_extra(x, t, w, count=9, leaf=4, columns=0.5, seed=1))  # fmt: skip
    new, _ = table(rng, n=50, holes=0.3)
    sums = np.array([sum(float(tree.at[below(tree, r)]) for tree in forest.trees) for r in new])
    expected = forest.start + forest.scale * sums
    assert np.allclose(forest.predict(new), expected, rtol=0, atol=1e-12)
    for tree in forest.trees:
        assert (tree.left[tree.column >= 0] > np.flatnonzero(tree.column >= 0)).all()
        rows = np.bincount([below(tree, r) for r in x], minlength=len(tree))
        leaf = tree.column < 0
        assert np.array_equal(rows[leaf], tree.rows[leaf]) and tree.rows[0] == len(x)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 128, 129, 300])
def test_all_trees_at_once_are_each_tree_after_the_other_to_the_bit(rng, rows):
    x, t = table(rng)
    w = np.ones(len(t))
    new = table(rng, n=300, holes=0.3)[0][:rows]
    for forest in (fit_boosted(x, t, w, **SETTINGS),
                   fit_extra(x, t, w, count=9, leaf=1, columns=0.5, seed=1)):  # fmt: skip
        sums = np.zeros(rows)
        for tree in forest.trees:
            sums += tree.at[tree.leaves(np.asarray(new, np.float32))]
        assert np.array_equal(forest.predict(new), forest.start + forest.scale * sums)
        if rows > 1:
            swapped = dataclasses.replace(forest.trees[0], left=forest.trees[0].right,
                                          right=forest.trees[0].left)  # fmt: skip
            fault = Forest([swapped, *forest.trees[1:]], forest.start, forest.scale)
            assert not np.array_equal(fault.predict(new), forest.predict(new))


def test_the_walk_down_a_forest_refuses_what_would_leave_it(rng):
    x, t = table(rng)
    nodes, roots, depths = fit_boosted(x, t, np.ones(len(t)), **SETTINGS)._nodes
    new, out = np.zeros((3, x.shape[1]), np.float32), np.zeros(3)
    sums = _native.core().forest_sums
    sums(nodes, roots, depths, new, out)
    for field, value, said in (("child", len(nodes), "no such child"), ("child", -1, "no such"),
                               ("column", x.shape[1], "no such column")):  # fmt: skip
        bad = nodes.copy()
        bad[field][0] = value
        with pytest.raises(ValueError, match=said):
            sums(bad, roots, depths, new, out)
    with pytest.raises(ValueError, match="roots: no such node"):
        sums(nodes, roots + len(nodes), depths, new, out)
    with pytest.raises(ValueError, match="one per tree"):
        sums(nodes, roots, depths[1:], new, out)
    with pytest.raises(ValueError, match="one value per row"):
        sums(nodes, roots, depths, new, out[1:])


def test_contributions_and_a_constant_add_up_to_the_prediction(rng):
    x, t = table(rng)
    w = np.ones(len(t))
    models = [fit_boosted(x, t, w, **SETTINGS), fit_extra(x, t, w, count=9, leaf=4, columns=0.5,
              seed=1), fit_linear(x, t, w, [], 0.5)]  # fmt: skip
    for model in models:
        for row in x[:20]:
            constant, each = model.contributions(row)
            assert np.isclose(constant + each.sum(), model.predict(row[None])[0], atol=1e-9)
            assert each[-1] == 0  # a constant column


def test_an_attribution_is_what_a_question_changes_the_mean_by():
    tree = Tree(
        np.array([1, -1, 0, -1, -1], np.int32), np.array([0.5, 1.0, 2.0, 5.0, 9.0], np.float32),
        np.array([1, -1, 3, -1, -1], np.int32), np.array([2, -1, 4, -1, -1], np.int32),
        np.zeros(5, bool), np.array([10, 6, 4, 1, 3], np.int32),
    )  # fmt: skip
    # Node 2: (5 + 3 * 9) / 4 = 8; root: (6 * 1 + 4 * 8) / 10 = 3.8.
    constant, each = Forest([tree], 0.1, 2.0).contributions(np.array([1.0, 0.7]))
    assert constant == pytest.approx(0.1 + 2 * 3.8)
    assert each == pytest.approx([2 * (5 - 8), 2 * (8 - 3.8)])


def test_extra_trees_part_rows_by_rank_and_keep_leaves_large(rng):
    x, t = table(rng, n=200)
    w = rng.uniform(0.5, 2, len(t))
    forest = fit_extra(x, t, w, count=11, leaf=5, columns=0.5, seed=2)
    for tree in forest.trees:
        leaves = tree.leaves(x.astype(np.float32))
        for leaf in np.unique(leaves):
            rows = leaves == leaf
            assert rows.sum() >= 5
            mean = np.average(t[rows], weights=w[rows])
            assert tree.at[leaf] == pytest.approx(mean, rel=1e-4, abs=1e-12)
    assert np.corrcoef(forest.predict(x), t)[0, 1] > 0.8  # of 11 trees, on their own rows


def test_ranks_of_missing_values_are_the_middle():
    ranks, known = _ranks(np.array([[1.0], [np.nan], [3.0], [3.0]], np.float32))
    assert ranks[:, 0] == pytest.approx([1 / 6, 0.5, 4 / 6, 4 / 6])
    assert known[0][0].tolist() == [1.0, 3.0]


def test_a_lasso_leaves_noise_at_zero_and_solves_its_own_equations(rng):
    x = rng.normal(size=(400, 8))
    t = 2 * ranks_of(x)(x)[:, 0] - ranks_of(x)(x)[:, 3] + rng.normal(0, 0.1, 400)
    folds = [(np.arange(400) % 4 == k,) * 2 for k in range(4)]
    model = fit_linear(x, t, np.ones(400), folds, 1.0)
    assert model.coefficients[[0, 3]] == pytest.approx([2, -1], abs=0.05)
    assert np.abs(np.delete(model.coefficients, [0, 3])).max() < 0.03
    # Where a coefficient is 0, the residual pulls at it less than at those that are not.
    pull = np.abs(ranks_of(x)(x).T @ (t - model.predict(x)))
    zero = model.coefficients == 0
    assert not zero.any() or pull[zero].max() <= pull[~zero].max() * 1.02


def test_standardised_ranks_have_mean_0_and_stay_at_the_ends(rng):
    x = np.exp(rng.normal(size=(500, 2)) * 3)
    x[::7, 1] = np.nan
    ranks = ranks_of(x)
    z = ranks(x)
    known = np.isfinite(x)
    for j in range(2):
        assert abs(z[known[:, j], j].mean()) < 1e-6 and z[known[:, j], j].std() == pytest.approx(1)
    assert (z[~known] == 0).all()
    far = ranks(np.array([[1e9, 1e9], [-1e9, -1e9]]))
    assert far[0] == pytest.approx(z.max(axis=0)) and far[1] == pytest.approx(z.min(axis=0))


def test_without_xgboost_the_extra_is_named(monkeypatch):
    import sys

    from mergeprobe_fast import InputError

    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(InputError, match=r"mergeprobe-fast\[fit\]"):
        fit_boosted(np.zeros((3, 1)), np.zeros(3), np.ones(3), **SETTINGS)


def test_rounding_a_tree_moves_no_row_of_training(rng):
    x = rng.normal(size=(400, 3)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    forest = fit_extra(x, np.nan_to_num(x).sum(axis=1), np.ones(400), count=5, leaf=3, columns=1.0,
                       seed=0)  # fmt: skip
    for tree in forest.trees:
        exact = Tree(tree.column, np.nextafter(tree.at, np.float32(np.inf)), tree.left, tree.right,
                     tree.missing_left, tree.rows)  # fmt: skip
        short = rounded(exact, x)
        assert np.array_equal(short.leaves(x), exact.leaves(x))
        assert short.at[short.column < 0] == pytest.approx(exact.at[exact.column < 0], rel=1e-4)
        digits = [len(str(v).strip("-0").replace(".", "")) for v in short.at]
        assert np.mean(digits) < np.mean([len(str(v).strip("-0").replace(".", ""))
                                          for v in exact.at])  # fmt: skip
