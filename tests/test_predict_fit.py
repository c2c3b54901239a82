"""What a fitted predictor says of made-up merges whose truth is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from made_merges import BASE, LINEAR, QUICK, made_labels, with_calibration
from scipy.stats import binom, spearmanr

from mergeprobe_fast import InputError
from mergeprobe_fast.features.merge_columns import level_columns
from mergeprobe_fast.features.merge_declare import LEVELS
from mergeprobe_fast.predict import Recipe, fit
from mergeprobe_fast.predict import columns as columns_module
from mergeprobe_fast.predict.columns import levels_of
from mergeprobe_fast.predict.level import inner, outer

pytest.importorskip("xgboost", reason="in the test extra")


@pytest.fixture(scope="module")
def known():
    """Labels with a planted signal, and a predictor of theirs."""
    labels = made_labels(np.random.default_rng(7))
    return labels, fit(labels, recipe=QUICK)


def test_a_planted_signal_is_found_on_new_adapters(known, rng):
    predictor = known[1]
    new = made_labels(rng, pairs=200)
    found = predictor.predict(new.columns, base=BASE)
    assert found.level == "weights" and found.calibrated and found.coverage == 0.9
    assert spearmanr(found.retention, new.y).statistic > 0.9
    # Rows that are ruined are far off, and how many there are is up to the seed.
    far = np.abs(new.y - known[0].y.mean()).mean()
    assert np.abs(found.retention - new.y).mean() < 0.7 * far
    assert np.median(np.abs(found.retention - new.y)) < 0.1


def test_without_a_signal_predictions_say_nothing_and_intervals_stay_wide(rng):
    labels = made_labels(rng, signal=False, pairs=200)
    predictor = fit(labels, recipe=QUICK)
    new = made_labels(rng, signal=False, pairs=200)
    found = predictor.predict(new.columns, base=BASE)
    # Of 400 rows a correlation of nothing has a deviation of 0.05.
    assert abs(spearmanr(found.retention, new.y).statistic) < 0.25
    assert np.median(found.high - found.low) > 2 * 0.2


@pytest.mark.parametrize("signal", [True, False])
def test_intervals_cover_what_they_state(rng, signal):
    covered = rows = 0
    for _ in range(4):
        predictor = fit(made_labels(rng, signal=signal, pairs=200, noise=0.05), recipe=QUICK)
        new = made_labels(rng, signal=signal, pairs=250, noise=0.05)
        found = predictor.predict(new.columns, base=BASE)
        there = ~found.outside
        covered += int(((found.low <= new.y) & (new.y <= found.high))[there].sum())
        rows += int(there.sum())
    # 5 points for what 200 pairs of 20 families leave unsure, and the binomial error of ``rows``.
    low, high = binom.ppf([1e-4, 1 - 1e-4], rows, 0.9) / rows
    assert low - 0.05 < covered / rows < high + 0.05


def test_intervals_are_narrow_where_the_labels_scatter_little(rng):
    labels = made_labels(rng, pairs=400, noise=0.0)
    quiet = labels.columns["change_to_self"] < np.median(labels.columns["change_to_self"])
    error = np.where(quiet, 0.01, 0.15) * rng.normal(size=len(labels))
    labels = dataclasses.replace(labels, y=np.clip(labels.y + error, -1, 1.2))
    found = fit(labels, recipe=QUICK).predict(labels.columns, base=BASE)
    width = found.high - found.low
    assert np.median(width[~quiet]) > 2 * np.median(width[quiet])


def test_the_same_labels_give_the_same_model(known):
    labels, predictor = known
    again = fit(labels, recipe=QUICK)
    for name in ("retention", "low", "high", "outside"):
        both = (p.predict(labels.columns, base=BASE) for p in (predictor, again))
        one, other = (getattr(found, name) for found in both)
        assert np.array_equal(one, other)
    other = fit(labels, recipe=dataclasses.replace(QUICK, seed=1))
    new = other.predict(labels.columns, base=BASE).retention
    assert not np.array_equal(new, predictor.predict(labels.columns, base=BASE).retention)


def test_a_row_beyond_the_range_is_outside_and_the_column_is_named(known):
    labels, predictor = known
    inside = np.flatnonzero(~predictor.predict(labels.columns, base=BASE).outside)[:5]
    columns = {n: v[inside].copy() for n, v in labels.columns.items()}
    columns["member_norm"][3] = 1e3
    found = predictor.predict(columns, base=BASE)
    assert found.outside[3] and found.why(3).startswith("member_norm is 1e+03; training had ")
    assert "member_norm is 1e+03" in found.reason and np.isfinite(found.retention).all()
    assert found.outside.sum() == 1 and found.why(0) == ""


def test_values_that_never_came_together_are_outside(rng):
    labels = made_labels(rng)
    columns = dict(labels.columns)
    columns["kept"] = columns["change_to_self"] * 2 + rng.normal(0, 1e-3, len(labels))
    labels = dataclasses.replace(labels, columns=columns)
    predictor = fit(labels, recipe=LINEAR)
    low, high = (np.quantile(columns["change_to_self"], q) for q in (0.02, 0.98))
    row = {n: np.array([np.median(v)]) for n, v in columns.items()}
    row |= {"change_to_self": np.array([low]), "kept": np.array([2 * high])}
    found = predictor.predict(row, base=BASE)
    assert found.outside[0] and found.why(0) == "no row of training had such values together"


def test_few_rows_of_new_adapters_are_outside(known, rng):
    """2 of 41 adapters are beyond the other 40's norms, so 1 row in 10 has one, less the margin."""
    shares = [known[1].predict(made_labels(rng, pairs=300).columns, base=BASE).outside.mean()
              for _ in range(6)]  # fmt: skip
    assert np.median(shares) < 0.2


def test_a_value_that_training_always_had_is_missed(known):
    labels, predictor = known
    columns = {n: v[:3].copy() for n, v in labels.columns.items()}
    columns["change_cosine"][1] = np.nan
    found = predictor.predict(columns, base=BASE)
    assert found.outside[1] and np.isfinite(found.retention).all()
    assert found.why(1) == "change_cosine is unknown; all rows of training had it"


def test_a_row_without_any_value_stays_undefined(known):
    labels, predictor = known
    columns = {n: np.stack([v[:2], [v[2], np.nan]]) for n, v in labels.columns.items()}
    found = predictor.predict(columns, base=BASE)
    assert found.retention.shape == (2, 2)
    for values in (found.retention, found.low, found.high):
        assert np.isnan(values).tolist() == [[False, False], [False, True]]
    assert not found.outside[1, 1]


def test_the_richest_level_with_its_columns_answers(rng):
    labels = with_calibration(made_labels(rng), rng)
    late = ("error", "disturbance")
    early = {f"early:{n}": v for n, v in labels.columns.items() if n not in late}
    labels = dataclasses.replace(labels, columns={**labels.columns, **early})
    predictor = fit(labels, recipe=QUICK)
    assert predictor.levels == ("weights", "calibration", "early:weights")
    columns = dict(labels.columns)
    assert predictor.predict(columns, base=BASE).level == "calibration"
    some = predictor.predict({n: v[:4] for n, v in columns.items()} | {
        "error": np.array([np.nan, 1, 1, 1.0]), "disturbance": np.ones(4)}, base=BASE)  # fmt: skip
    assert some.level == "calibration" and np.isfinite(some.retention).all()
    assert "level weights for 1 of 4 rows, which lack columns" in some.reason
    unknown = {n: v for n, v in columns.items() if n != "error"}
    assert predictor.predict(unknown, base=BASE).level == "weights"
    bare = {n: v for n, v in columns.items() if not n.startswith("early:")}
    assert predictor.predict(bare, base=BASE, early=True).level == "early:weights"


def test_what_a_row_gets_does_not_depend_on_the_rows_beside_it(rng):
    labels = with_calibration(made_labels(rng), rng)
    full = dict(labels.columns, disturbance=np.ones(len(labels)) * labels.columns["size"])
    predictor = fit(dataclasses.replace(labels, columns=full), recipe=QUICK)
    columns = {n: v[:30].copy() for n, v in full.items()}
    columns["disturbance"][:7] = np.nan  # which all rows of training had
    found = predictor.predict(columns, base=BASE)
    assert found.level == "calibration"
    assert "level weights for 7 of 30 rows, which lack columns" in found.reason
    for row in range(30):
        alone = predictor.predict({n: v[row : row + 1] for n, v in columns.items()}, base=BASE)
        assert alone.level == ("weights" if row < 7 else "calibration")
        for name in ("retention", "low", "high"):
            assert getattr(alone, name)[0] == pytest.approx(getattr(found, name)[row], abs=1e-12)
        assert alone.outside[0] == found.outside[row] and alone.why(0) == found.why(row)
        told = predictor.explain(columns, row)
        assert told.level == alone.level
        assert told.retention == pytest.approx(found.retention[row], abs=1e-9)


def test_an_unseen_base_gets_a_score_that_claims_nothing(known):
    labels, predictor = known
    for base in ("other/base", None):
        found = predictor.predict(labels.columns, base=base)
        assert not found.calibrated and found.level == "score" and np.isnan(found.coverage)
        assert np.isnan(found.low).all() and np.isnan(found.high).all()
        expected = 1 / (1 + labels.columns["change_to_self"] ** 2)
        assert np.array_equal(found.retention, expected)
        assert "uncalibrated" in found.reason and BASE in found.reason
    richer = labels.columns | {"error": np.full(len(labels), 0.3)}
    assert predictor.predict(richer, base="other/base").retention == pytest.approx(0.7)
    richer |= {"damage_trained": np.full(len(labels), 0.5)}
    assert predictor.predict(richer, base="x").retention == pytest.approx(np.exp(-0.5))


def test_a_base_is_known_by_its_fingerprint_first(known):
    predictor = known[1]
    facts = dataclasses.replace(predictor.facts, fingerprints=("ab" * 32,))
    told = dataclasses.replace(predictor, facts=facts)
    assert told.knows("renamed", "ab" * 32) and not told.knows(BASE, "cd" * 32)
    assert told.knows(BASE) and not told.knows(None)
    anything = dataclasses.replace(facts, bases=(), fingerprints=())
    assert dataclasses.replace(predictor, facts=anything).knows(None)


def test_an_explanation_adds_up_and_names_what_matters(known):
    labels, predictor = known
    found = predictor.predict(labels.columns, base=BASE)
    worst = int(np.argmax(labels.columns["change_to_self"]))
    told = predictor.explain(labels.columns, worst)
    assert told.retention == pytest.approx(found.retention[worst], abs=1e-9)
    total = told.constant + sum(share for *_, share in told.contributions)
    assert total == pytest.approx(told.total) == pytest.approx(inner(told.retention, QUICK.soft))
    sizes = [abs(share) for *_, share in told.contributions]
    assert sizes == sorted(sizes, reverse=True)
    name, value, share = told.contributions[0]
    assert name == "change_to_self" and share < 0
    assert value == labels.columns[name][worst]
    assert "(change_to_self)" in told.sentence and "against" in told.sentence


def test_what_is_learnt_is_undone(rng):
    y = rng.uniform(-1, 1, 100)
    assert outer(inner(y, 0.07), 0.07) == pytest.approx(y)
    assert outer(inner(np.array([1.15]), 0.07), 0.07) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"kept": np.ones(3), "size": np.ones(2)}, "different shapes"),
        ({}, "no columns"),
        ({"disturbance": np.ones(3)}, "no closed form has its column"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(known, columns, reason):
    with pytest.raises(InputError, match=reason):
        known[1].predict(columns, base=BASE)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"soft": 0.0}, "soft"), ({"boost_rounds": 0}, "boost_rounds"),
        ({"coverage": 1.0}, "coverage"),
        ({"folds": 1}, "folds"), ({"boost_rounds": 1.5}, "boost_rounds"), ({"soft": True}, "soft"),
        ({"boosted_share": 0.0, "extra_share": 0.0, "linear_share": 0.0}, "boosted_share"),
        ({"soft": float("nan")}, "soft"),
    ],
)  # fmt: skip
def test_a_recipe_out_of_range_is_refused(change, key):
    with pytest.raises(InputError, match=key):
        Recipe(**change)


def test_labels_that_leave_nothing_to_fit_are_refused(rng):
    labels = made_labels(rng, pairs=5)
    with pytest.raises(InputError, match="no level has 20 rows"):
        fit(labels, recipe=QUICK)
    labels = made_labels(rng)
    with pytest.raises(InputError, match="no such column"):
        fit(labels, recipe=QUICK, own=["nowhere"])
    nothing = dataclasses.replace(labels, columns={"other": labels.y})
    with pytest.raises(InputError, match="no level has"):
        fit(nothing, recipe=QUICK)
    assert "other" in fit(nothing, recipe=LINEAR, own=["other"]).models["weights"].columns


def test_levels_hold_their_columns_and_those_before():
    found = levels_of(["kept", "error", "member_gain", "early:kept", "mine", "early:yours"],
                      ["mine", "early:yours"])  # fmt: skip
    assert found == {
        "weights": ("kept", "mine"), "calibration": ("kept", "error", "mine"),
        "points": ("kept", "error", "member_gain", "mine"), "early:weights": ("kept", "yours"),
    }  # fmt: skip


def test_the_closed_forms_read_columns_of_merges():
    for name, _, text in columns_module._SCORES:
        assert name in level_columns("points") and name in text
    for level in LEVELS:
        assert "your own" not in " ".join(map(columns_module.meaning, level_columns(level)))


def test_families_that_leave_nothing_to_learn_from_are_refused(rng):
    labels = made_labels(rng, pairs=40, adapters=40)
    two = [dataclasses.replace(a, family=str(i % 2)) for i, a in enumerate(labels.adapters)]
    both = dataclasses.replace(labels, adapters=tuple(two))
    mixed = both.part(both.families[:, 0] != both.families[:, 1])
    with pytest.raises(InputError, match="no fold of families leaves 10 rows"):
        fit(mixed, recipe=LINEAR)
