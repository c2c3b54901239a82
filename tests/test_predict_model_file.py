"""The model file: read back as it was written, and refused where it is not."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from made_merges import BASE, QUICK, made_labels, with_calibration

from mergeprobe_fast import InputError
from mergeprobe_fast.predict import RetentionPredictor, evaluate, fit
from mergeprobe_fast.predict.card import model_card
from mergeprobe_fast.predict.extra import fit_extra
from mergeprobe_fast.predict.forest_json import forest_json, read_forest
from mergeprobe_fast.predict.model_json import model_text

pytest.importorskip("xgboost", reason="in the test extra")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Labels with holes, their predictor, and the file of it."""
    rng = np.random.default_rng(3)
    labels = with_calibration(made_labels(rng), rng)
    predictor = fit(labels, recipe=dataclasses.replace(QUICK, boost_rounds=20), notes=["made up"])
    path = tmp_path_factory.mktemp("model") / "deep" / "model.json"
    predictor.save(path)
    return labels, predictor, path


def test_a_model_read_back_predicts_the_same_bits(written):
    labels, predictor, path = written
    loaded = RetentionPredictor.load(path)
    assert loaded.levels == predictor.levels and loaded.facts == predictor.facts
    assert loaded.recipe == predictor.recipe and loaded.coverage == 0.9
    far = {n: v * 3 for n, v in labels.columns.items()}
    for columns in (labels.columns, far):
        one, other = (p.predict(columns, base=BASE) for p in (predictor, loaded))
        for name in ("retention", "low", "high", "outside"):
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        assert one.reason == other.reason
    assert loaded.explain(far, 5) == predictor.explain(far, 5)
    assert model_text(loaded) == path.read_text(encoding="utf-8")


def test_the_file_is_ascii_lines_of_strict_json(written):
    raw = written[2].read_bytes()
    assert raw.isascii() and raw.endswith(b"}\n")
    value = json.loads(raw)
    assert value["format"] == "mergeprobe-predictor" and value["version"] == 1
    assert max(map(len, raw.splitlines())) < 20_000


def test_an_existing_file_is_kept_unless_it_may_be_replaced(written, tmp_path):
    path = tmp_path / "model.json"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        written[1].save(path)
    assert path.read_text() == "mine"
    written[1].save(path, overwrite=True)
    assert path.read_bytes() == written[2].read_bytes()


def tree(value):
    return value["levels"]["weights"]["parts"][0]["trees"]["trees"][0]


def level(value):
    return value["levels"]["weights"]


def inner(value):
    return next(i for i, c in enumerate(tree(value)["column"]) if c >= 0)


def leaf(value):
    return next(i for i, c in enumerate(tree(value)["column"]) if c < 0)


def put(path, new):
    """Sets what lies at this path of keys below the level."""

    def change(v):
        at = level(v)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = new

    return change


BAD = {
    "another format": (lambda v: v.update(format="other"), "format: is not"),
    "a later version": (lambda v: v.update(version=2), "version: is 2, this program reads 1"),
    "an unknown key": (lambda v: v.update(extra=1), "extra: is not a field of this format"),
    "a key that is missing": (lambda v: v.pop("recipe"), "recipe: is missing"),
    "no level": (lambda v: v["levels"].clear(), "levels: is empty"),
    "an unknown choice": (lambda v: v["recipe"].update(x=1), "recipe.x: is not a field"),
    "a choice out of range": (lambda v: v["recipe"].update(folds=1), "recipe.folds: must be"),
    "a choice of words": (lambda v: v["recipe"].update(folds="2"), "recipe.folds: expected"),
    "another soft": (put(["soft"], 0.5), "levels.weights.soft: is not the recipe's"),
    "a tree cut short": (
        lambda v: tree(v).update({k: tree(v)[k][:-1] for k in tree(v)}), "trees[0].column: is not o"
    ),
    "two trees in one": (
        lambda v: tree(v).update({k: tree(v)[k] * 2 for k in tree(v)}), "trees[0].column: is not o"
    ),
    "a leaf that asks": (lambda v: tree(v)["column"].__setitem__(leaf(v), 0), "trees.trees[0]."),
    "a column out of range": (
        lambda v: tree(v)["column"].__setitem__(inner(v), 99), "trees[0].column: asks for a column"
    ),
    "a column by halves": (
        lambda v: tree(v)["column"].__setitem__(inner(v), 0.5), "beyond the 6"
    ),
    "a column below": (lambda v: tree(v)["column"].__setitem__(leaf(v), -2), "beyond the 6"),
    "a leaf's rows less": (lambda v: tree(v)["rows"].pop(), "trees[0].rows: is not one number"),
    "rows below 0": (lambda v: tree(v)["rows"].__setitem__(0, -1), "trees[0].rows: is no number"),
    "rows beyond": (lambda v: tree(v)["rows"].__setitem__(0, 2**31), "trees[0].rows: are too many"),
    "a node less": (lambda v: tree(v)["at"].pop(), "trees[0].at: has "),
    "a threshold of text": (
        lambda v: tree(v)["at"].__setitem__(0, "1"), "trees[0].at: is not a list of numbers"
    ),
    "a threshold that is true": (
        lambda v: tree(v)["at"].__setitem__(0, True), "trees[0].at: is not a list of numbers"
    ),
    "a threshold beyond": (
        lambda v: tree(v)["at"].__setitem__(0, 1e300), "trees[0].at: is beyond float32"
    ),
    "a threshold without end": (
        lambda v: tree(v)["at"].__setitem__(0, 10**300), "trees[0].at: is not a list of finite"
    ),
    "a side of a leaf": (
        lambda v: tree(v).update(missing="l" * len(tree(v)["missing"])), "has a side for a leaf"
    ),
    "a side unknown": (lambda v: tree(v).update(missing="x"), "missing: is not a text of l, r and"),
    "a tree without nodes": (
        lambda v: tree(v).update(column=[], at=[], missing="", rows=[]), "is not a list of numbers"
    ),
    "trees and linear": (
        lambda v: level(v)["parts"][0].update(linear={"intercept": 0, "coefficients": [0] * 6}),
        "needs trees or linear",
    ),
    "shares of more than 1": (put(["parts", 0, "share"], 0.9), "shares do not add up"),
    "a negative interval": (put(["intervals", "below"], -1), "below: is negative"),
    "a matrix that is not square": (
        lambda v: level(v)["distance"]["inverse"].pop(), "inverse: is not square"
    ),
    "a column twice": (put(["columns", 0, "name"], "change_to_self"), "a column appears twice"),
    "a column without end": (put(["columns", 1, "low"], None), "do not go together"),
    "knots that fall": (put(["columns", 1, "values"], [2.0, 1.0]), "values: is not ascending"),
    "knots without ranks": (put(["columns", 1, "ranks"], [0.5]), "are not as many as values"),
    "deviation 0": (put(["columns", 1, "deviation"], 0), "deviation: is not positive"),
    "too few coefficients": (
        lambda v: level(v)["parts"][-1]["linear"]["coefficients"].pop(), "are not one a column"
    ),
    "rows that are none": (lambda v: v["facts"].update(rows=-1), "facts.rows: is not an integer"),
    "an empty base": (lambda v: v["facts"].update(bases=[""]), "facts.bases[0]: is not a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_by_name(written, tmp_path, name):
    change, reason = BAD[name]
    value = json.loads(written[2].read_bytes())
    before = copy.deepcopy(value)
    change(value)
    assert value != before
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError) as error:
        RetentionPredictor.load(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_an_evaluation_as_deep_as_json_may_be_is_refused_or_read(written, tmp_path):
    path = tmp_path / "deep.json"
    for depth in (50, 450, 900, 3000):
        value = json.loads(written[2].read_bytes())
        value["facts"]["evaluation"] = {"x": "HERE"}
        path.write_text(json.dumps(value).replace('"HERE"', "[" * depth + "]" * depth))
        try:
            assert RetentionPredictor.load(path).facts.evaluation
        except InputError as error:
            assert depth > 50 and "nested too deeply" in str(error)


def test_a_file_of_many_trees_is_linked_as_it_was(rng):
    """Trees are linked all at once; here they are, one by one, by their definition."""
    x = rng.normal(size=(300, 5)).round(2)
    x[rng.random(x.shape) < 0.1] = np.nan
    forest = fit_extra(x, np.nan_to_num(x).sum(axis=1), np.ones(300), count=9, leaf=2, columns=0.5,
                       seed=0)  # fmt: skip
    read = read_forest(json.loads(json.dumps(forest_json(forest))), "", 5)
    assert np.array_equal(read.predict(x), forest.predict(x))
    for tree in read.trees:

        def follow(node, tree=tree):
            if tree.column[node] < 0:
                assert tree.left[node] == tree.right[node] == -1
                return node + 1, tree.rows[node]
            assert tree.left[node] == node + 1
            middle, one = follow(node + 1)
            assert tree.right[node] == middle
            end, other = follow(middle)
            assert tree.rows[node] == one + other
            return end, one + other

        assert follow(0) == (len(tree), 300)
    assert [len(t) for t in read.trees] == [len(t) for t in forest.trees]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"), (b"[]", "not a JSON object"), (b'{"format": NaN}', "NaN is not"),
        (b'{"a": 1, "a": 2}', "key appears twice"), (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"), (b"\x80\x04pickle", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(tmp_path, raw, reason):
    path = tmp_path / "model.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=reason):
        RetentionPredictor.load(path)


def test_a_file_cut_short_anywhere_is_refused(written, tmp_path, rng):
    raw = written[2].read_bytes()
    path = tmp_path / "model.json"
    for at in rng.integers(0, len(raw) - 2, 10):
        path.write_bytes(raw[:at])
        with pytest.raises(InputError):
            RetentionPredictor.load(path)


def test_the_card_says_what_the_file_says(written):
    labels, predictor, path = written
    found = evaluate(labels, recipe=QUICK, splits=["domain"], levels={
        "weights": predictor.models["weights"].columns}, resamples=20)  # fmt: skip
    predictor = dataclasses.replace(
        predictor, facts=dataclasses.replace(predictor.facts, evaluation=found)
    )
    card = model_card(predictor)
    rho = found["levels"]["weights"]["splits"]["domain"]["predictors"][0]["rho"]["value"]
    for part in (BASE, "made up", "change_to_self", "leave one domain out", f"{rho:.3f}",
                 "calibration", f"{len(labels)} labels"):  # fmt: skip
        assert part in card
    assert "Not evaluated" in model_card(RetentionPredictor.load(path))
    again = path.with_name("evaluated.json")
    predictor.save(again)
    assert model_card(RetentionPredictor.load(again)) == card
