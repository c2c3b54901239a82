"""Files of labelled merges, as they are read and as they are refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from made_merges import LINEAR

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.predict import fit, read_labels
from mergeprobe_fast.predict.from_zoo import with_columns
from mergeprobe_fast.zoo import open_zoo

ROWS = [
    {"members": ["a", "b"], "member": "a", "ll_norm": 0.9, "ll_norm_se": 0.01, "operator": "sum",
     "weights": [1.0, 2.0], "domain": "math", "train_rank": 8, "train_layers": [2, 5],
     "train_variant": "lora", "train_seed": 0, "base": "m", "extra": 1},
    {"members": ["b", "a"], "member": "b", "ll_norm": -3.0, "ll_norm_se": 0.02, "operator": "sum",
     "weights": [2.0, 1.0], "domain": "code", "train_rank": 8, "train_layers": [2, 5],
     "train_variant": "fly", "train_seed": 1, "base": "m", "extra": None},
    {"members": ["a", "b", "c"], "member": "b", "ll_norm": 0.5, "ll_norm_se": None,
     "operator": "ties", "weights": None, "domain": "code", "train_rank": 8,
     "train_layers": [2, 5], "train_variant": "fly", "train_seed": 1, "base": "m", "extra": 2.5},
    {"members": ["a", "c"], "member": "c", "ll_norm": None, "ll_norm_se": None, "operator": "sum",
     "weights": None, "domain": "x", "train_rank": 4, "train_layers": None, "train_variant": None,
     "train_seed": 2, "base": "m", "extra": 0},
]  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            flat = dict(row, members="+".join(row["members"]))
            if flat.get("weights") is not None:
                flat["weights"] = " ".join(map(str, flat["weights"]))
            flat.pop("train_layers", None)
            writer.writerow({k: "" if v is None else v for k, v in flat.items() if k in row})
    return path


def test_rows_with_a_value_are_read_with_their_members_own_first(tmp_path):
    labels = read_labels(write(tmp_path / "l.parquet", ROWS))
    assert [a.name for a in labels.adapters] == ["a", "b", "c"]
    assert labels.members.tolist() == [[0, 1, -1], [1, 0, -1], [1, 0, 2]]
    assert labels.y.tolist() == [0.9, -1.0, 0.5] and labels.se[:2] == pytest.approx([0.01, 0.0])
    assert labels.merge[0] == labels.merge[1] != labels.merge[2]
    assert labels.sets[0] == labels.sets[1] and labels.size.tolist() == [2, 2, 3]
    assert labels.weights[:2, :2].tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert np.isnan(labels.weights[2]).all() and labels.bases == ("m",)
    assert labels.columns["extra"].tolist()[::2] == [1, 2.5]
    assert np.isnan(labels.columns["extra"][1]) and "domain" not in labels.columns
    a, b, c = labels.adapters
    assert (a.domain, a.seed, a.layers) == ("math", "0", "2-5")
    assert a.recipe == {"train_rank": 8.0, "train_layers": 2.0, "train_variant=lora": 1.0}
    assert a.family != b.family and (c.family, c.domain, c.recipe) == ("c", "", {})


def test_a_csv_says_the_same(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "train_layers"} for row in ROWS]
    one = read_labels(write(tmp_path / "l.parquet", rows))
    other = read_labels(write(tmp_path / "l.csv", rows))
    assert one.members.tolist() == other.members.tolist() and one.y.tolist() == other.y.tolist()
    assert np.array_equal(one.weights, other.weights, equal_nan=True)
    assert [a.family for a in one.adapters] == [a.family for a in other.adapters]
    assert one.digest != other.digest and len(one.digest) == 64


def test_adapters_that_differ_in_seeds_alone_are_one_family(tmp_path):
    rows = [dict(ROWS[0], train_seed=s, member=m, members=[m, o])
            for s, m, o in ((0, "a", "b"), (1, "b", "a"))]  # fmt: skip
    labels = read_labels(write(tmp_path / "l.parquet", rows))
    assert labels.families[0, 0] == labels.families[0, 1]
    rows[1]["train_rank"] = 4
    labels = read_labels(write(tmp_path / "l.parquet", rows))
    assert labels.families[0, 0] != labels.families[0, 1]
    rows = [dict(r, family="same") for r in rows]
    labels = read_labels(write(tmp_path / "l.parquet", rows))
    assert labels.families[0, 0] == labels.families[0, 1]


def test_merges_of_other_ranks_or_methods_are_other_merges(tmp_path):
    for name, values in (("rank", (8, 16)), ("method", ("svd", "cat"))):
        rows = [dict(r, **{name: v}) for v in values for r in ROWS[:2]]
        labels = read_labels(write(tmp_path / f"{name}.parquet", rows))
        assert labels.merge[0] == labels.merge[1] != labels.merge[2] == labels.merge[3]
        assert len({*labels.sets}) == 1


def test_names_that_are_numbers_are_names(tmp_path):
    rows = [dict(r, members=[{"a": "1", "b": "2", "c": "3"}[n] for n in r["members"]],
                 member={"a": 1, "b": 2, "c": 3}[r["member"]]) for r in ROWS[:3]]  # fmt: skip
    labels = read_labels(write(tmp_path / "l.csv", rows))
    assert [a.name for a in labels.adapters] == ["1", "2", "3"] and len(labels) == 3


def test_an_unknown_error_is_as_large_as_the_known_ones(tmp_path):
    rows = [dict(r, ll_norm_se=e) for r, e in zip(ROWS, (0.3, None, 0.4, 0.1), strict=True)]
    rows[1]["ll_norm"] = 0.2
    labels = read_labels(write(tmp_path / "l.parquet", rows))
    assert labels.se == pytest.approx([0.3, (0.125) ** 0.5, 0.4])
    rows = [{k: v for k, v in r.items() if k != "ll_norm_se"} for r in ROWS]
    assert not read_labels(write(tmp_path / "l.parquet", rows)).se.any()


def test_an_error_counts_as_far_as_the_label_may_lie_in_the_range(tmp_path):
    values = (-5.0, -1.1, 0.5, 1.3)
    four = [*ROWS[:3], dict(ROWS[0], operator="x")]
    rows = [dict(r, ll_norm=v, ll_norm_se=0.3) for r, v in zip(four, values, strict=True)]
    labels = read_labels(write(tmp_path / "l.parquet", rows))
    assert labels.y == pytest.approx([-1.0, -1.0, 0.5, 1.2])
    assert labels.se == pytest.approx([0.0, 0.1, 0.3, 0.1])


def test_operators_and_target_are_chosen(tmp_path):
    rows = [dict(r, other=0.25) for r in ROWS]
    path = write(tmp_path / "l.parquet", rows)
    assert len(read_labels(path, operators=["ties"])) == 1
    labels = read_labels(path, target="other")
    assert (labels.y == 0.25).all() and len(labels) == 4


BAD = {
    "nobody": (lambda r: r[0].update(members=[]), "members: row 0 names nobody"),
    "no member named": (lambda r: r[1].update(member=None), "member: row 1 names nobody"),
    "no member": (lambda r: r[0].update(member="z"), "members: row 0: the members do not hold 'z'"),
    "twice": (lambda r: r[0].update(members=["a", "a"]), "members: row 0: the members are"),
    "weights": (lambda r: r[0].update(weights=[1.0]), "weights: row 0: 1 weights of 2 members"),
    "training": (lambda r: r[1].update(member="a", members=["b", "a"]), "a: row 1 says otherwise"),
    "no target": (lambda r: [x.pop("ll_norm") for x in r], "ll_norm: has no such column"),
    "no value": (lambda r: [x.update(ll_norm=None) for x in r], "ll_norm: no row has a value"),
    "text": (lambda r: [x.update(ll_norm="high") for x in r], "ll_norm: is not a column of numb"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_labels_that_contradict_themselves_are_refused(tmp_path, name):
    change, reason = BAD[name]
    rows = [dict(r) for r in ROWS]
    change(rows)
    path = write(tmp_path / "l.parquet", rows)
    with pytest.raises(InputError) as error:
        read_labels(path)
    assert str(error.value).startswith(f"{path}: {reason}")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "l.parquet").write_bytes(b"PAR1 no")
    for path in (tmp_path / "l.parquet", tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_labels(path)


def test_columns_come_from_the_adapters_as_merge_features_has_them(tmp_path):
    for i, name in enumerate("abc"):
        make_adapter(tmp_path / "zoo" / name, seed=i)
    rows = [dict(r, method="cat" if r["operator"] == "sum" else "ties") for r in ROWS[:3]]
    rows[2]["operator"], rows[2]["method"] = "mean", "cat"
    zoo = open_zoo(tmp_path / "zoo")
    path = write(tmp_path / "l.parquet", rows)
    labels = with_columns(read_labels(path), zoo, early=zoo, threads=1)
    merges = [mpf.Merge(["a", "b"], weights=[1, 2]), mpf.Merge(["a", "b", "c"], weights="mean")]
    table = mpf.merge_features(zoo, merges, threads=1)
    expected = np.asarray(table["change_to_self"])[[0, 1, 3]]
    assert labels.columns["change_to_self"] == pytest.approx(expected)
    assert labels.columns["early:change_to_self"][:2] == pytest.approx(expected[:2])
    rows[0]["method"] = rows[1]["method"] = "tis"
    with pytest.raises(InputError, match="'tis' is no merge method"):
        with_columns(read_labels(write(path, rows)), zoo)
    with pytest.raises(InputError, match="c: is in the labels and not in the zoo"):
        with_columns(read_labels(write(path, rows)), open_zoo([tmp_path / "zoo" / n for n in "ab"]))


def test_a_table_of_merges_is_predicted_as_it_is(tmp_path):
    """It says of what base it is, so that nobody has to."""
    for i in range(8):
        make_adapter(tmp_path / "zoo" / f"a{i}", seed=i)
    zoo = open_zoo(tmp_path / "zoo")
    sets = [[i, j] for i in range(8) for j in range(i)]
    table = mpf.merge_features(zoo, sets, threads=1)
    rows = [{"members": m.split("+"), "member": own, "ll_norm": float(k % 7) / 7, "operator": "sum"}
            for k, (m, own) in enumerate(zip(table["members"], table["member"], strict=True))]
    labels = with_columns(read_labels(write(tmp_path / "l.parquet", rows)), zoo, threads=1)
    assert labels.bases == (zoo.base_model,) != (None,)
    predictor = fit(labels, recipe=LINEAR)
    found = predictor.predict(table)
    assert found.calibrated and found.level == "weights" and len(found.retention) == table.rows
    assert predictor.explain(table, 3).retention == pytest.approx(found.retention[3])
    bare = predictor.predict({n: table[n] for n in table})
    assert not bare.calibrated


def test_columns_come_from_a_second_file_by_row(tmp_path):
    rows = ["a+b|a", "a+b|b", "a+c|a"]
    pq.write_table(pa.table({
        "row": rows, "members": [["a", "b"], ["a", "b"], ["a", "c"]], "member": ["a", "b", "a"],
        "ll_norm": [0.5, 0.6, 0.7],
    }), tmp_path / "labels.parquet")  # fmt: skip
    given = {"row": [rows[2], "x|y", rows[0]], "final:error": [0.3, 9.0, 0.1],
             "at10%:error": [3.0, 9.0, None], "at5%:error": [5.0, 5.0, 5.0]}  # fmt: skip
    pq.write_table(pa.table(given), tmp_path / "features.parquet")
    found = read_labels(tmp_path / "labels.parquet", features=tmp_path / "features.parquet", at=0.1)
    np.testing.assert_array_equal(found.columns["error"], [0.1, 0.3])  # the file lacks a+b|b
    np.testing.assert_array_equal(found.columns["early:error"], [np.nan, 3.0])
    np.testing.assert_array_equal(found.y, [0.5, 0.7])
    for change, at, key in (
        ({"row": [rows[0], rows[0], rows[1]]}, None, rows[0]),
        ({"row": None}, None, "row"),
        ({"row": ["x", "y", "z"]}, None, "row"),
        ({}, 0.2, "at20%:"),
        ({"final:ll_norm": [1.0, 1.0, 1.0]}, None, "final:ll_norm"),
    ):
        wrong = {n: v for n, v in {**given, **change}.items() if v is not None}
        pq.write_table(pa.table(wrong), tmp_path / "features.parquet")
        with pytest.raises(InputError) as error:
            read_labels(tmp_path / "labels.parquet", features=tmp_path / "features.parquet", at=at)
        assert error.value.key == key
