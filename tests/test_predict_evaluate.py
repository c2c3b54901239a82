"""Evaluation: nothing of what is held out is seen, and scores are what they are called."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from made_merges import BASE, LINEAR, QUICK, changed, made_labels
from scipy.stats import spearmanr

from mergeprobe_fast import InputError
from mergeprobe_fast.predict import evaluate, fit
from mergeprobe_fast.predict.evaluate import evaluate_model, steps
from mergeprobe_fast.predict.fit import matrix
from mergeprobe_fast.predict.labels import codes
from mergeprobe_fast.predict.level import fit_level
from mergeprobe_fast.predict.rivals import CELL, CLOSED, COSINE, MEAN, METADATA, NORM, rivals
from mergeprobe_fast.predict.scores import (
    Held,
    auc,
    ceiling,
    centred_ranks,
    mean,
    regret,
    regret_of_fixed,
    resampled,
    spearman,
    spearman_within,
)
from mergeprobe_fast.predict.splits import (
    SPLITS,
    domain_folds,
    family_folds,
    held_out,
    predict_held_out,
)

pytest.importorskip("xgboost", reason="in the test extra")
TINY = dataclasses.replace(QUICK, boost_rounds=5, extra_count=2, folds=4, scale_rounds=2)


@pytest.fixture
def labels(rng):
    return made_labels(rng, pairs=60, triples=12, operators=("sum", "mean"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_predicted_once_and_no_merge_with_what_is_held_out_is_learnt(labels, split):
    folds = held_out(labels, split)
    asked = sum(test.astype(int) for test, _ in folds)
    assert np.array_equal(asked, (labels.size == 2) if split == "domain pair" else asked**0)
    about = {"adapter": "family", "seed": "seed", "domain": "domain", "layers": "layers"}
    for test, gone in folds:
        assert (gone | ~test).all()
        if split in about:
            values = labels.of(about[split])
            (own,) = {*values[test, 0]}
            for row in range(len(labels)):
                assert gone[row] == (own in {*values[row]} - {""})
        elif split == "operator":
            assert len({*labels.operator[test]}) == 1 and (gone == test).all()
        else:
            (own,) = {tuple(sorted(r[:2])) for r in labels.of("domain")[test]}
            for row, there in enumerate(labels.of("domain")):
                pairs = {tuple(sorted(p)) for p in combinations([d for d in there if d], 2)}
                assert gone[row] == (own in pairs)
    assert not any(t.all() for t, _ in folds)
    merges = {m for test, gone in folds[:1] for m in labels.merge[gone]}
    if split != "operator":  # all members of a merge go together
        assert not merges & {*labels.merge[~folds[0][1]]}


@pytest.mark.parametrize("split", ["adapter", "domain", "operator"])
def test_labels_of_what_is_held_out_reach_no_prediction(labels, rng, split):
    """Whatever the held-out labels are, what is predicted there is the same to the last bit."""
    folds = held_out(labels, split)[:2]
    spoilt = labels.y.copy()
    gone = folds[0][1]
    spoilt[gone] = rng.permutation(spoilt[gone]) * rng.uniform(-1, 1)
    se = labels.se.copy()
    se[gone] = 10.0

    def predicted(these):
        from mergeprobe_fast.predict.evaluate import _held

        fold, held = _held(these, folds, "weights", list(these.columns), TINY, (), None)
        return {h.name: [v[fold == 0] for v in (h.value, h.low, h.high) if v is not None]
                for h in held}  # fmt: skip

    before, after = predicted(labels), predicted(changed(labels, y=spoilt, se=se))
    assert before.keys() == after.keys() == {"ours", MEAN, CELL, METADATA, COSINE, NORM, CLOSED}
    for name, values in before.items():
        for one, other in zip(values, after[name], strict=True):
            assert np.array_equal(one, other), name
    # And it is no accident: labels that are learnt from do move the predictions.
    moved = changed(labels, y=np.where(gone, labels.y, rng.permutation(labels.y)))
    assert not np.array_equal(predicted(moved)["ours"][0], before["ours"][0])


def test_what_is_asked_has_no_label(labels):
    def learn(seen, asked):
        assert np.isnan(asked.y).all() and np.isnan(asked.se).all() and np.isfinite(seen.y).all()
        return {"": np.zeros(len(asked))}

    predict_held_out(labels, held_out(labels, "adapter"), learn)


def test_family_folds_deal_whole_families(labels):
    for count in (2, 5, 1000):
        folds = family_folds(labels, count, 0)
        assert (sum(t.astype(int) for t, _ in folds) == 1).all()
        for test, gone in folds:
            own = {*labels.families[test, 0]}
            assert not own & {*labels.families[~gone].ravel()}
            assert not own & {*labels.families[~test, 0]}


def test_domain_folds_deal_whole_pairs_of_domains(labels):
    met = {tuple(sorted(d for d in row if d)) for row in labels.of("domain")[labels.size == 2]}
    assert 5 < len(met) <= 10  # of 4 domains, each with itself, too
    for count in (2, 5, 1000):
        folds = domain_folds(labels, count, 0)
        assert len(folds) == min(count, len(met))
        assert np.array_equal(sum(t.astype(int) for t, _ in folds), labels.size == 2)
        for test, gone in folds:
            pairs = [{tuple(sorted(p)) for p in combinations([d for d in row if d], 2)}
                     for row in labels.of("domain")]  # fmt: skip
            own = set().union(*(pairs[i] for i in np.flatnonzero(test)))
            assert np.array_equal(gone, [bool(own & p) for p in pairs])
    one = tuple(dataclasses.replace(a, domain="") for a in labels.adapters)
    assert domain_folds(changed(labels, adapters=one), 5, 0) == []


def test_intervals_cover_unseen_pairs_of_domains_as_stated(rng):
    """Labels that pairs of domains move together: folds of families alone say nothing of that."""
    trees = dataclasses.replace(
        QUICK, extra_share=0.0, linear_share=0.0, boost_columns=1.0, boost_rate=0.2, scale_rounds=0
    )
    columns = ["change_to_self", "change_cosine", "foreign"]
    covered, rows = {"both": 0, "families": 0}, 0
    for _ in range(2):
        labels = made_labels(rng, pairs=300, noise=0.01)
        pair = codes(*np.sort(labels.of("domain").astype(str), axis=1).T)
        moved = labels.y + rng.normal(0, 0.15, pair.max() + 1)[pair]
        labels = changed(labels, y=np.clip(moved, -1, 1.2), columns=labels.columns | {
            "foreign": pair + rng.uniform(0, 0.9, len(labels))})  # fmt: skip
        for test, gone in held_out(labels, "domain pair"):
            seen, y = labels.part(~gone), labels.y[test]
            for name, apart in (("both", domain_folds(seen, 4, 0)), ("families", ())):
                model = fit_level(
                    columns, matrix(seen, "weights", columns), seen.y, seen.se,
                    family_folds(seen, 4, 0), apart, trees,
                )  # fmt: skip
                _, low, high, _ = model.answer(matrix(labels.part(test), "weights", columns))
                covered[name] += int(((low <= y) & (y <= high)).sum())
            rows += len(y)
    # Of few pairs of domains, whose moves are drawn: a share that varies by a tenth.
    assert covered["both"] / rows > max(0.55, covered["families"] / rows + 0.1)


def test_scores_are_what_they_are_called(labels, rng):
    p = labels.y + rng.normal(0, 0.1, len(labels))
    weights = resampled(labels, 200)
    assert spearman(p, labels.y, weights).value == pytest.approx(spearmanr(p, labels.y).statistic)
    low = labels.y < np.quantile(labels.y, 0.25)
    pairs = [(p[i] < p[j]) + 0.5 * (p[i] == p[j]) for i in np.flatnonzero(low)
             for j in np.flatnonzero(~low)]  # fmt: skip
    assert auc(p, labels.y, weights).value == pytest.approx(np.mean(pairs))
    assert mean(np.abs(p - labels.y), weights).value == pytest.approx(np.abs(p - labels.y).mean())
    low, high = spearman(p, labels.y, weights).json()["interval"]
    assert low < spearman(p, labels.y, weights).value < high


def test_within_compares_inside_cells_only(rng):
    cell = np.repeat(np.arange(6), 10)
    y = rng.normal(size=60)
    weights = np.ones((3, 60))
    # Between the cells everything is wrong, inside all is right.
    assert spearman_within(y - 100 * cell, y, cell, weights).value == pytest.approx(1)
    assert spearman_within(cell.astype(float), y, cell, weights).value == 0
    assert np.isnan(centred_ranks(np.arange(4.0), np.array([0, 0, 1, 1]))).all()


def test_resamples_draw_families_and_count_a_family_of_both_once(labels):
    weights = resampled(labels, 500, seed=1)
    assert (weights[0] == 1).all() and abs(weights[1:].mean() - 1) < 0.2
    families = labels.families
    same = (families[:, 0] == families[:, 1]) & (families[:, 2] < 0)
    alone = {f: w for f, w in zip(families[same, 0], weights[:, same].T, strict=True)}
    for row in range(len(labels)):
        own, others = families[row, 0], {*families[row]} - {-1, families[row, 0]}
        if {own, *others} <= {*alone}:
            beside = np.mean([alone[f] for f in others], axis=0) if others else 1.0
            assert weights[:, row] == pytest.approx(alone[own] * beside)


def test_large_sets_count_in_resamples(rng):
    labels = made_labels(rng, pairs=30)
    many = len(labels.adapters)
    others = np.array([[i, *(j for j in range(many) if j != i)] for i in range(many)], np.int32)
    sets = changed(labels.part(np.arange(many)), members=others)
    weights = resampled(sets, 200)
    # As a product over all of them nearly every draw would be without any row.
    assert (weights[1:].sum(axis=1) > 0).all() and abs(weights[1:].mean() - 1) < 0.15


def test_the_ceiling_is_the_correlation_of_the_truth_with_its_labels(rng):
    truth = rng.normal(size=20_000)
    se = np.full(20_000, 0.75)
    y = truth + rng.normal(size=20_000) * se
    assert ceiling(y, se) == pytest.approx(np.corrcoef(truth, y)[0, 1], abs=0.02)
    shifted = y + np.repeat(np.arange(10), 2000) * 50
    cell = np.repeat(np.arange(10), 2000)
    assert ceiling(shifted, se, cell) == pytest.approx(ceiling(y, se), abs=0.01)
    assert np.isnan(ceiling(y, np.zeros(20_000))) and np.isnan(ceiling(y * 0, se))


def test_regret_is_what_the_choice_loses_against_the_best(rng):
    labels = made_labels(rng, pairs=30, operators=("one", "two", "three"))
    weights = resampled(labels, 50)
    assert regret(Held("", labels.y), labels, weights)["regret_worst"].value == 0
    p = rng.normal(size=len(labels))
    worst, middle = [], []
    for s in np.unique(labels.sets):
        of = [m for m in np.unique(labels.merge) if (labels.sets[labels.merge == m] == s).all()]
        measured = {m: labels.y[labels.merge == m] for m in of}
        chosen = max(of, key=lambda m: p[labels.merge == m].min())
        for out, kind in ((worst, np.min), (middle, np.mean)):
            out.append(max(map(kind, measured.values())) - kind(measured[chosen]))
    found = regret(Held("", p), labels, weights)
    assert found["regret_worst"].value == pytest.approx(np.mean(worst))
    assert found["regret_mean"].value == pytest.approx(np.mean(middle))
    # What cannot tell them apart is as good as drawing lots.
    lots = regret(Held("", np.zeros(len(labels))), labels, weights)["regret_worst"].value
    by_set = [
        [labels.y[labels.merge == m].min() for m in np.unique(labels.merge[labels.sets == s])]
        for s in np.unique(labels.sets)
    ]
    assert lots == pytest.approx(np.mean([max(w) - np.mean(w) for w in by_set]))
    assert regret(Held("", p[:60]), made_labels(rng, pairs=30), weights[:, :60]) == {}


def test_the_regret_of_one_operator_is_held_against_choosing_on_the_same_sets(rng):
    labels = made_labels(rng, pairs=40, operators=("one", "two", "three"))
    # "three" is there for every other set only.
    there = (labels.operator != "three") | (labels.sets % 2 == 0)
    labels = labels.part(there)
    weights, p = resampled(labels, 50), rng.normal(size=int(there.sum()))
    found = {row["name"]: row for row in regret_of_fixed(Held("", p), labels, weights)}
    for name in ("one", "two", "three"):
        its, ours = [], []
        for s in np.unique(labels.sets):
            of = {str(labels.operator[labels.merge == m][0]): m
                  for m in np.unique(labels.merge[labels.sets == s])}  # fmt: skip
            if name not in of:
                continue
            worst = {n: labels.y[labels.merge == m].min() for n, m in of.items()}
            chosen = max(of, key=lambda n: p[labels.merge == of[n]].min())
            its.append(max(worst.values()) - worst[name])
            ours.append(max(worst.values()) - worst[chosen])
        assert found[name]["sets"] == len(its)
        assert found[name]["worst"].value == pytest.approx(np.mean(its))
        assert found[name]["worst_above"].value == pytest.approx(np.mean(its) - np.mean(ours))
    perfect = regret_of_fixed(Held("", labels.y), labels, weights)
    assert all(row["worst_above"].value == row["worst"].value >= 0 for row in perfect)
    assert found.keys() == {"one", "two", "three"}
    assert len(regret_of_fixed(Held("", p), labels, weights, least=len(its) + 1)) == 2


def test_a_mean_of_the_domain_pair_falls_back_where_there_is_none(rng):
    labels = made_labels(rng, pairs=120)
    seen, asked = labels.part(np.arange(200)), labels.part(np.arange(200, 240))
    found = rivals(seen, asked, "weights", LINEAR)
    domains = seen.of("domain")
    for row, (own, other) in enumerate(asked.of("domain")):
        of = seen.y[(domains[:, 0] == own) & (domains[:, 1] == other)]
        if len(of) < 3:
            of = seen.y[domains[:, 0] == own]
        assert found[CELL][row] == pytest.approx(of.mean())
    assert found[CLOSED] == pytest.approx(1 / (1 + asked.columns["change_to_self"] ** 2))
    assert (found[MEAN] == seen.y.mean()).all()


def test_metadata_knows_the_operator(rng):
    """Which is known before anything is measured: a rival without it would be a weak one."""
    labels = made_labels(rng, pairs=100, operators=("sum", "mean"))
    moved = labels.y - np.where(labels.operator == "sum", 0.0, 0.5)
    labels = changed(labels, y=moved)
    test, gone = held_out(labels, "adapter")[0]
    found = rivals(labels.part(~gone), labels.part(test), "weights", TINY)
    one, other = (found[CELL][labels.operator[test] == o].mean() for o in ("sum", "mean"))
    assert one - other > 0.2
    found = rivals(labels.part(~gone), labels.part(test), "weights", QUICK)
    one, other = (found[METADATA][labels.operator[test] == o].mean() for o in ("sum", "mean"))
    assert one - other > 0.2


def test_a_planted_signal_beats_metadata_and_noise_does_not(rng):
    found = evaluate(made_labels(rng, pairs=250), recipe=LINEAR, splits=["adapter"], resamples=200)
    ours, *others = found["levels"]["weights"]["splits"]["adapter"]["predictors"]
    assert ours["name"] == "ours" and ours["rho"]["value"] > 0.9
    assert ours["over_metadata"]["interval"][0] > 0
    assert {p["name"] for p in others} == {MEAN, CELL, METADATA, COSINE, NORM, CLOSED}
    noise = made_labels(rng, pairs=250, signal=False)
    found = evaluate(noise, recipe=LINEAR, splits=["adapter"], resamples=200)
    ours = found["levels"]["weights"]["splits"]["adapter"]["predictors"][0]
    assert ours["rho"]["value"] < 0.25 and 0.8 < ours["coverage"]["value"] < 0.97


def test_an_evaluation_has_every_split_or_says_why_not(labels):
    calls = []
    shown = changed(labels, columns=labels.columns | {"test_16": labels.y})
    alone = changed(shown, adapters=tuple(
        dataclasses.replace(a, seed="0") for a in labels.adapters))  # fmt: skip
    splits = ("seed", "operator", "layers")
    found = evaluate(
        alone, recipe=TINY, splits=splits, shown=["test_16"], resamples=30, progress=calls.append
    )
    level = found["levels"]["weights"]
    assert level["splits"]["seed"] == {"reason": "the labels have one seed only, or none"}
    assert sum(calls) == steps(alone, splits=splits)
    for split in ("operator", "layers"):
        by_name = {p["name"]: p for p in level["splits"][split]["predictors"]}
        assert by_name["test_16"]["rho"]["value"] == pytest.approx(1)
        assert by_name["test_16"]["regret_worst"]["value"] == 0
        assert by_name["ours"]["coverage"]["value"] is not None
        assert {*level["splits"][split]["sizes"]} == {"2", "3"}
    assert level["operators"] == ["mean", "sum"] and level["ceiling"] > 0.9


def test_a_model_is_scored_as_it_is_on_other_labels(rng):
    predictor = fit(made_labels(rng), recipe=LINEAR)
    new = made_labels(rng)
    found = evaluate_model(predictor, new, resamples=30)
    ours = found["levels"]["weights"]["splits"]["as it is"]["predictors"][0]
    expected = predictor.predict(new.columns, base=BASE).retention
    assert ours["rho"]["value"] == pytest.approx(spearmanr(expected, new.y).statistic, abs=1e-6)
    assert not found["same_labels"]
    facts = dataclasses.replace(predictor.facts, fingerprints=("ab" * 32,))
    told = dataclasses.replace(predictor, facts=facts)
    renamed = changed(new, bases=("other",), fingerprints=("ab" * 32,))
    assert [*evaluate_model(told, renamed, resamples=30)["levels"]] == ["weights"]
    unseen = evaluate_model(predictor, changed(new, bases=("other",)), resamples=30)
    assert "coverage" not in unseen["levels"]["score"]["splits"]["as it is"]["predictors"][0]
    with pytest.raises(InputError, match="no level"):
        evaluate_model(predictor, changed(new, columns={"x": new.y}))


def test_an_unknown_split_is_refused(labels):
    with pytest.raises(InputError, match="'sides' is none of adapter, seed"):
        held_out(labels, "sides")
