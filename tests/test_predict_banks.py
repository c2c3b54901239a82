"""Several files of labels are one."""

from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from made_merges import LINEAR

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict import fit, read_banks, read_labels
from mergeprobe_fast.predict.evaluate import evaluate_model


def bank(path, rng, names, sizes, column, base="m", **more):
    """Labels of random sets of ``names``, of which every member is a row."""
    rows = []
    for number, size in enumerate(sizes):
        members = [str(n) for n in rng.permutation(names)[:size]]
        weights = rng.random(size).tolist()
        rows += [
            {"row": f"{number}|{m}", "members": members, "member": m, "weights": weights,
             "operator": "sum", "ll_norm": float(rng.random()), "base": base,
             "domain": m[0], "train_rank": 8, column: float(rng.random()), **more}
            for m in members
        ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_keep_their_members_weights_and_values(tmp_path, rng):
    one = bank(tmp_path / "1.parquet", rng, ["a1", "a2", "b1"], [2, 3, 2], "x")
    two = bank(tmp_path / "2.parquet", rng, ["c1", "b1", "d1", "d2"], [2, 4], "y", base="n")
    each, both = [read_labels(p) for p in (one, two)], read_banks([one, two])
    assert len(both) == sum(map(len, each)) and both.bases == ("m", "n")
    at = 0
    for labels in each:
        rows = np.arange(at, at + len(labels))
        at += len(labels)
        for mine, its in zip(rows, range(len(labels)), strict=True):
            names = [both.adapters[i] for i in both.members[mine] if i >= 0]
            own = labels.members[its][labels.members[its] >= 0]
            assert names == [labels.adapters[i] for i in own]
            found = both.weights[mine][: len(own)]
            assert found.tolist() == labels.weights[its][: len(own)].tolist()
        assert np.isnan(both.weights[rows][both.members[rows] < 0]).all()
        part = both.part(rows)
        assert part.y.tolist() == labels.y.tolist() and part.se.tolist() == labels.se.tolist()
        same = labels.merge[:, None] == labels.merge
        assert ((part.merge[:, None] == part.merge) == same).all()
        assert part.size.tolist() == labels.size.tolist()
    first = len(each[0])
    assert not set(both.merge[:first]) & set(both.merge[first:])
    assert np.isnan(both.columns["y"][:first]).all() and np.isnan(both.columns["x"][first:]).all()
    assert both.columns["x"][:first].tolist() == each[0].columns["x"].tolist()
    assert sorted(a.name for a in both.adapters) == ["a1", "a2", "b1", "c1", "d1", "d2"]
    assert both.digest not in (each[0].digest, each[1].digest)


def test_one_file_is_itself(tmp_path, rng):
    path = bank(tmp_path / "1.parquet", rng, ["a1", "a2"], [2], "x")
    assert read_banks([path]).digest == read_labels(path).digest


def test_labels_that_are_given_twice_are_refused(tmp_path, rng):
    one = bank(tmp_path / "one.parquet", rng, ["a", "b", "c"], [2, 2], "x")
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(one.read_bytes())
    with pytest.raises(InputError, match=r"holds the same labels as .*one\.parquet") as error:
        read_banks([one, copy])
    assert error.value.path == str(copy)


def test_a_model_knows_every_file_it_was_fitted_on(tmp_path, rng):
    each = [bank(tmp_path / f"{n}.parquet", rng, ["a", "b", "c", "d"], [2] * 40, "change_cosine")
            for n in ("one", "two", "other")]  # fmt: skip
    model = fit(read_banks(each[:2]), recipe=LINEAR)
    for paths, same in (
        ([0, 1], True), ([1, 0], True), ([1], True), ([2, 0], True), ([2], False),
    ):  # fmt: skip
        found = evaluate_model(model, read_banks([each[i] for i in paths]), resamples=2)
        assert found["same_labels"] is same


def test_an_adapter_that_files_tell_differently_is_refused(tmp_path, rng):
    one = bank(tmp_path / "1.parquet", rng, ["a1", "a2"], [2], "x")
    two = bank(tmp_path / "2.parquet", rng, ["a1", "b1"], [2], "x", train_lr=0.5)
    with pytest.raises(InputError, match=r"2\.parquet: a1: says otherwise"):
        read_banks([one, two])


def test_what_a_file_says_of_an_adapter_counts_where_another_only_names_it(tmp_path, rng):
    one = bank(tmp_path / "1.parquet", rng, ["a1", "a2"], [2], "x")
    rows = [r for r in pyarrow.parquet.read_table(one).to_pylist() if r["member"] == "a2"]
    two = tmp_path / "2.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), two)
    for order in ((one, two), (two, one)):
        told = {a.name: a for a in read_banks(order).adapters}
        assert told["a1"].domain == "a" and told["a1"].recipe == {"train_rank": 8.0}


def test_feature_files_belong_to_label_files_in_their_order(tmp_path, rng):
    paths, beside = [], []
    for k, names in enumerate((["a1", "a2"], ["b1", "b2"])):
        paths.append(bank(tmp_path / f"{k}.parquet", rng, names, [2], "x"))
        rows = pyarrow.parquet.read_table(paths[-1]).column("row").to_pylist()
        table = pyarrow.table({"row": rows, "final:error": [float(k)] * len(rows)})
        beside.append(tmp_path / f"{k}.features.parquet")
        pyarrow.parquet.write_table(table, beside[-1])
    assert read_banks(paths, features=beside).columns["error"].tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="2 files of labels and 1 of columns"):
        read_banks(paths, features=beside[:1])
