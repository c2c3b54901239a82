"""``fit`` and ``evaluate`` from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from command_line import Run, assert_refused, runner, strict_json
from dense_merge import digests
from made_merges import made_labels

from mergeprobe_fast.predict import RetentionPredictor
from mergeprobe_fast.predict.card import model_card

pytest.importorskip("xgboost", reason="in the test extra")
QUICK = [f"--set={choice}" for choice in (
    "boost_rounds=10", "boost_seeds=1", "extra_count=4", "folds=3", "scale_rounds=5")]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    return runner(capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng) -> Path:
    """The current folder, with labels.parquet in it."""
    monkeypatch.chdir(tmp_path)
    labels = made_labels(rng, pairs=100, operators=("sum", "mean"))
    names = [a.name for a in labels.adapters]
    rows = []
    for i, members in enumerate(labels.members):
        own = labels.adapters[members[0]]
        rows.append({
            "members": [names[m] for m in members], "member": own.name, "base": "made/base",
            "ll_norm": labels.y[i], "ll_norm_se": labels.se[i], "operator": labels.operator[i],
            "domain": own.domain, "train_seed": int(own.seed), "family": own.family,
            "train_rank": own.recipe["train_rank"], **{n: v[i] for n, v in labels.columns.items()},
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), "labels.parquet")
    return tmp_path


def test_fit_writes_a_model_and_its_card(run, folder):
    ran = run("fit", "labels.parquet", "--out", "deep/model.json", *QUICK)
    assert ran.code == 0 and "deep/model.json" in ran.out and "weights" in ran.out
    model = RetentionPredictor.load("deep/model.json")
    assert model.facts.bases == ("made/base",) and model.facts.operators == ("mean", "sum")
    assert model.recipe.boost_rounds == 10 and model.facts.rows == 400
    assert Path("deep/model.md").read_text(encoding="utf-8") == model_card(model)
    assert sorted(os.listdir("deep")) == ["model.json", "model.md"]
    before = digests(folder)
    assert_refused(run("fit", "labels.parquet", "--out", "deep/model.json", *QUICK), "exists")
    assert digests(folder) == before
    ran = run("fit", "labels.parquet", "--out", "deep/model.json", "--overwrite", "--json", *QUICK)
    assert ran.code == 0 and digests(folder) == before
    assert strict_json(ran.out)["levels"]["weights"]["rows"] == 400


def test_the_scores_of_a_fit_are_in_the_model_and_on_its_card(run, folder):
    ran = run("fit", "labels.parquet", "--operators", "sum", "--evaluate", "domain,seed",
              "--note", "made up", "--out", "m.json", *QUICK)  # fmt: skip
    assert ran.code == 0
    facts = RetentionPredictor.load("m.json").facts
    assert facts.operators == ("sum",) and facts.notes == ("made up",)
    assert [*facts.evaluation["levels"]["weights"]["splits"]] == ["domain", "seed"]
    assert "leave one seed out" in Path("m.md").read_text(encoding="utf-8")


def test_evaluate_prints_its_table_within_100_cells_and_writes_it(run, folder):
    words = ("evaluate", "labels.parquet", "--splits", "domain,layers", "--out", "scores", *QUICK)
    ran = run(*words)
    assert ran.code == 0 and max(map(len, ran.out.splitlines())) <= 100
    for part in ("leave one domain out", "ours", "metadata + domains", "regret", "only, or none"):
        assert part in ran.out
    found = json.loads(Path("scores/evaluation.json").read_text())
    assert "| ours |" in Path("scores/evaluation.md").read_text()
    assert_refused(run(*words), "scores: ")
    ran = run(*words[:4], "--json", *QUICK)
    assert ran.code == 0 and strict_json(ran.out) == found


def test_a_model_is_evaluated_on_other_labels(run, folder):
    assert run("fit", "labels.parquet", "--out", "m.json", *QUICK).code == 0
    ran = run("evaluate", "labels.parquet", "--model", "m.json")
    assert ran.code == 0 and "as it is" in ran.out and "scores mean nothing" in ran.out
    assert strict_json(run("evaluate", "labels.parquet", "--model", "m.json", "--json").out)[
        "same_labels"]  # fmt: skip


REFUSED = {
    "no labels": (("fit", "nowhere.parquet", "--out", "m.json"), "nowhere.parquet: is not there"),
    "no zoo": (("fit", "labels.parquet", "--calibration", "c", "--out", "m.json"), "needs --zoo"),
    "no probes": (
        ("fit", "labels.parquet", "--zoo", "z", "--at", "5%", "--out", "m.json"), "needs --probes"
    ),
    "an unknown choice": (
        ("fit", "labels.parquet", "--set", "trees=3", "--out", "m.json"), "no choice 'trees'"
    ),
    "a choice of words": (
        ("fit", "labels.parquet", "--set", "folds=x", "--out", "m.json"), "folds: expected an int"
    ),
    "an unknown split": (
        ("fit", "labels.parquet", "--evaluate", "side", "--out", "m.json"), "'side' is none of"
    ),
    "an unknown column": (
        ("fit", "labels.parquet", "--columns", "x", "--out", "m.json"), "x: the labels have no"
    ),
    "an unknown operator": (
        ("fit", "labels.parquet", "--operators", "x", "--out", "m.json"), "no row of x has a value"
    ),
    "the card's name": (("fit", "labels.parquet", "--out", "m.md"), "is the name of the card"),
    "a folder for a model": (("fit", "labels.parquet", "--out", "."), "is a folder"),
    "a folder above for a model": (("fit", "labels.parquet", "--out", "x/.."), "is a folder"),
    "splits of a model": (
        ("evaluate", "labels.parquet", "--model", "m", "--splits", "seed"), "--splits: says how"
    ),
    "a model that is none": (("evaluate", "labels.parquet", "--model", "labels.parquet"), "UTF-8"),
    "splits": (("evaluate", "labels.parquet", "--splits", "side"), "'side' is none of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_one_line_and_writes_nothing(run, folder, name):
    words, reason = REFUSED[name]
    before = digests(folder)
    assert_refused(run(*words), reason)
    assert digests(folder) == before


def test_columns_are_computed_from_a_zoo(run, folder, rng):
    for i in range(12):
        make_adapter(folder / "zoo" / f"a{i}", seed=i)
    sets = [rng.choice(12, 2, replace=False) for _ in range(30)]
    rows = [{"members": f"a{s[k]}+a{s[1 - k]}", "member": f"a{s[k]}", "retention": rng.uniform(),
             "operator": "sum"} for s in sets for k in (0, 1)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), "bare.parquet")
    assert_refused(run("fit", "bare.parquet", "--out", "m.json", *QUICK), "no level has 20 rows")
    ran = run("fit", "bare.parquet", "--zoo", "zoo", "--out", "m.json", *QUICK)
    assert ran.code == 0, ran.err
    model = RetentionPredictor.load("m.json")
    assert model.levels == ("weights",) and "change_to_self" in model.models["weights"].columns
    assert np.isfinite(model.models["weights"].bounds.low).any()
