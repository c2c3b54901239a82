"""What the commands write and print when all is well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter, make_zoo
from command_line import WEIGHTS, Run, assert_refused, runner, spoil, strict_json
from dense_merge import deltas, digests, exact_sums

import mergeprobe_fast as mpf
from mergeprobe_fast.features import select
from mergeprobe_fast.io import safetensors

SCREEN_FILES = ["adapters.parquet", "pairs.parquet", "report.html", "summary.json"]
MERGE_FILES = ["adapter_config.json", WEIGHTS, "merge.json"]
REAL_ZOO = Path(__file__).parents[1] / "examples" / "zoo"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    return runner(capsys)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three adapters; the current folder is the one above it."""
    make_zoo(tmp_path / "zoo", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


@pytest.mark.parametrize(
    ("command", "files"), [("screen", SCREEN_FILES), ("merge", MERGE_FILES)], ids=lambda v: str(v)
)
def test_overwrite_replaces_the_folder_as_a_whole(run, zoo, command, files):
    Path("out").mkdir()
    Path("out", "thesis").write_text("not ours")
    assert run(command, "zoo", "--out", "out", "--overwrite").code == 2
    assert os.listdir("out") == ["thesis"], "what somebody else put there is not ours to remove"
    Path("out", "thesis").unlink()
    for _ in range(2):  # into an empty folder, and over an earlier result
        assert run(command, "zoo", "--out", "out", "--overwrite").code == 0
    Path("out", "thesis").write_text("kept beside a result")
    assert_refused(run(command, "zoo", "--out", "out", "--overwrite"), "thesis", "not overwritten")
    assert sorted(os.listdir("out")) == sorted([*files, "thesis"])
    Path("out", "thesis").unlink()
    assert sorted(os.listdir("out")) == files
    assert sorted(os.listdir()) == ["out", "zoo"]
    good = digests(Path("out"))
    spoil(zoo / "adapter_000", "NaN")
    assert run(command, "zoo", "--out", "out", "--overwrite").code == 2
    assert digests(Path("out")) == good, "a failed run must leave the old result"
    assert sorted(os.listdir()) == ["out", "zoo"]


def test_screen_writes_four_files(run, zoo):
    ran = run("screen", "zoo", "--out", "deep/er/out")
    assert (ran.code, ran.err) == (0, "")
    assert sorted(os.listdir("deep/er/out")) == SCREEN_FILES
    assert "\x1b" not in ran.out and "\r" not in ran.out
    assert "3 adapters, 3 pairs" in ran.out and "adapter_002" in ran.out
    page = Path("deep/er/out/report.html").read_text("ascii")
    assert page.lstrip().lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
    assert all(name in page for name in ("adapter_000", "adapter_001", "adapter_002"))


@pytest.mark.parametrize("features", ["default", "all", "cosine", "norm_ratio,shared_energy_a"])
def test_the_columns_of_pairs_parquet(run, zoo, features):
    from pyarrow import parquet

    if features == "norm_ratio,shared_energy_a":
        names = ["norm_ratio", "shared_energy_a", "shared_energy_b"]  # the twin comes along
    else:
        names = [features] if features in mpf.FEATURES else [f.name for f in select(features)]
    assert run("screen", "zoo", "--out", "out", "--features", features).code == 0
    table = parquet.read_table("out/pairs.parquet")
    expected = ["a", "b"]
    for name in names:
        expected.append(name)
        if name in mpf.FEATURES and mpf.FEATURES[name].declared.per_module:
            expected += [f"{name}.{how}" for how in ("mean", "max", "min", "p10", "p90")]
    assert sorted(table.column_names) == sorted(expected)
    assert table.column_names[:2] == ["a", "b"]
    ours = mpf.pair_features(mpf.open_zoo("zoo"), names)
    assert table.num_rows == 3
    for column in expected:
        values = table[column].to_pylist()
        if column in "ab":
            assert values == list(ours[column])
        else:
            np.testing.assert_array_equal(np.array(values, float), ours[column], err_msg=column)
    pairs = list(zip(table["a"].to_pylist(), table["b"].to_pylist(), strict=True))
    assert pairs == [(f"adapter_00{i}", f"adapter_00{j}") for i, j in ((0, 1), (0, 2), (1, 2))]


def test_adapters_parquet_and_summary(run, zoo):
    from pyarrow import parquet

    ran = run("screen", "zoo", "--out", "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    table = parquet.read_table("out/adapters.parquet").to_pydict()
    made = [make_adapter(zoo.parent / "again", seed=seed) for seed in range(3)]
    assert table["name"] == [f"adapter_00{i}" for i in range(3)]
    assert table["path"] == [f"zoo/adapter_00{i}" for i in range(3)]
    assert table["norm"] == pytest.approx([m.norm for m in made], rel=1e-9)
    assert table["modules"] == [4] * 3 and table["rank"] == ["4"] * 3
    assert table["parameters"] == [4 * (12 + 10 + 6 + 10 + 12 + 10 + 10 + 24)] * 3
    summary = strict_json(Path("out/summary.json").read_text("utf-8"))
    assert strict_json(ran.out) == {**summary, "out": "out"}
    assert (summary["adapters"], summary["pairs"], summary["modules"]) == (3, 3, 4)
    assert summary["features"] == [f.name for f in select("default")]
    assert summary["base_model"] == "test/base" and summary["skipped"] == []


def test_near_duplicates_are_listed(run, zoo):
    shutil.copytree(zoo / "adapter_001", zoo / "copy")
    make_adapter(zoo / "negative", seed=1, alpha=-8)
    lists = strict_json(run("screen", "zoo", "--out", "out", "--json").out)["lists"]
    twins = [(row["a"], row["b"]) for row in lists["near_duplicates"]]
    assert twins == [("adapter_001", "copy")]
    against = {(row["a"], row["b"]) for row in lists["most_conflicting"]}
    assert against == {("adapter_001", "negative"), ("copy", "negative")}


def test_a_zoo_of_one(run, zoo):
    ran = run("screen", zoo / "adapter_000", "--out", "out")
    assert (ran.code, ran.err) == (0, "") and "1 adapter, 0 pairs" in ran.out
    from pyarrow import parquet

    pairs = parquet.read_table("out/pairs.parquet")
    assert pairs.num_rows == 0 and {"a", "b", "cosine", "cosine.mean"} <= set(pairs.column_names)
    assert {str(pairs.schema.field(side).type) for side in "ab"} <= {"string", "large_string"}
    assert parquet.read_table("out/adapters.parquet").num_rows == 1
    assert run("merge", zoo / "adapter_000", "--out", "merged").code == 0


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_skip_bad_lists_and_goes_on(run, zoo, command):
    expected = spoil(zoo / "adapter_001", "dora").replace(str(zoo), "zoo")
    ran = run(command, "zoo", "--out", "out", "--skip-bad", "--json")
    assert ran.code == 0
    assert ran.err.startswith(f"mergeprobe-fast: left out: {expected}") and ran.err.count("\n") == 1
    result = strict_json(ran.out)
    if command == "screen":
        assert result["adapters"] == 2
        assert [row["path"] for row in result["skipped"]] == ["zoo/adapter_001"]
        assert any("left out" in note for note in result["notes"])
    else:
        assert [a["name"] for a in result["adapters"]] == ["adapter_000", "adapter_002"]
        assert {a["weight"] for a in result["adapters"]} == {0.5}


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_skip_bad_with_nothing_left(run, zoo, command):
    for adapter in zoo.iterdir():
        spoil(adapter, "truncated")
    ran = run(command, "zoo", "--out", "out", "--skip-bad")
    assert ran.code == 2 and "none of 3 adapters can be used" in ran.err
    assert os.listdir() == ["zoo"]


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_same_base(run, zoo, command):
    spoil(zoo / "adapter_001", "other base")
    assert_refused(run(command, "zoo", "--out", "out"), "pass --same-base")
    ran = run(command, "zoo", "--out", "out", "--same-base", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert "taken as one base model: other/base, test/base" in strict_json(ran.out)["notes"]


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("--weights 1 -0.5 0.25", [1, -0.5, 0.25]),
        ("--weights 1,-0.5,0.25", [1, -0.5, 0.25]),
        ("--weights=1,-0.5,0.25", [1, -0.5, 0.25]),
        ("--weights 1, -0.5, 0.25", [1, -0.5, 0.25]),
        ("--weights -0.5 1 0.25", [-0.5, 1, 0.25]),
        ("--weights -0.5,1,0.25", [-0.5, 1, 0.25]),
        ("--weights=-0.5,1,0.25", [-0.5, 1, 0.25]),
        ("--weights 1e0 -5e-1 25e-2", [1, -0.5, 0.25]),
        ("--weights 0 -0.0 .5", [0, 0, 0.5]),
    ],
)
def test_weights_as_people_write_them(run, zoo, words, weights):
    ran = run("merge", "zoo", "--out", "out", "--method", "linear", "--json", *words.split())
    assert (ran.code, ran.err) == (0, "")
    report = strict_json(ran.out)
    assert [a["weight"] for a in report["adapters"]] == weights
    made = [make_adapter(zoo.parent / "again", seed=seed) for seed in range(3)]
    written = deltas("out")
    for name, exact in exact_sums(made, weights).items():
        assert np.linalg.norm(written[name] - exact) <= 1e-6 * np.linalg.norm(exact)


def test_adapters_one_by_one_in_the_order_given(run, zoo):
    names = ["adapter_002", "adapter_000"]
    paths = [f"zoo/{name}" for name in names]
    ran = run("merge", *paths, "--out", "out", "--weights", "3", "1", "--rank", "2", "--json")
    report = strict_json(ran.out)
    assert [(a["name"], a["path"], a["weight"]) for a in report["adapters"]] == [
        ("adapter_002", "zoo/adapter_002", 3.0), ("adapter_000", "zoo/adapter_000", 1.0)
    ]  # fmt: skip
    assert (report["method"], report["rank"], report["dtype"]) == ("svd", 2, "F32")
    assert report == strict_json(Path("out/merge.json").read_text("utf-8"))
    shutil.copytree(zoo / "adapter_001", "other/adapter_001")
    ran = run("screen", "zoo", "other", "--out", "screened", "--json")
    assert strict_json(ran.out)["adapters"] == 4
    assert strict_json(ran.out)["lists"]["near_duplicates"][0]["cosine"] == pytest.approx(1)


def test_check_says_yes_with_0_and_no_with_1(run, zoo):
    ran = run("check", "zoo")
    assert (ran.code, ran.err) == (0, "") and "3 adapters, 0 refused" in ran.out
    assert "\x1b" not in ran.out
    spoil(zoo / "adapter_001", "half a pair")
    ran = run("check", "zoo", "--json")
    assert (ran.code, ran.err) == (1, "")
    result = strict_json(ran.out)
    assert [a["ok"] for a in result["adapters"]] == [True, False, True] and not result["ok"]
    assert result["adapters"][1]["problems"][0]["key"] == "base_model.model.x.lora_A.weight"
    assert run("check", "nowhere").code == 1
    make_adapter(zoo / "adapter_001", base_model="other/base")
    ran = run("check", "zoo")
    assert ran.code == 1 and "not one zoo" in ran.out and "--same-base" in ran.out


def test_doctor_says_what_is_active(run, monkeypatch):
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "") and "instruction set" in ran.out
    facts = strict_json(run("doctor", "--json").out)
    assert facts["ok"] and facts["instruction_set"]["active"] in facts["build"]["instruction_sets"]
    monkeypatch.setenv("MERGEPROBE_ISA", "baseline")
    monkeypatch.setenv("MERGEPROBE_THREADS", "3")
    facts = strict_json(run("doctor", "--json").out)
    assert facts["instruction_set"]["active"] == "baseline" and facts["threads"] == 3
    monkeypatch.setenv("MERGEPROBE_ISA", "sse9")
    ran = run("doctor", "--json")
    assert ran.code == 1 and "MERGEPROBE_ISA=sse9" in strict_json(ran.out)["backends"]["cpu"]["why"]


def real_adapters() -> list[Path]:
    return sorted(p.parent for p in REAL_ZOO.glob("*/" + WEIGHTS)) if REAL_ZOO.is_dir() else []


@pytest.mark.skipif(len(real_adapters()) < 8, reason="examples/zoo is not complete")
def test_the_real_zoo(run, tmp_path):
    ran = run("screen", REAL_ZOO, "--out", tmp_path / "out", "--json")
    assert ran.code == 0
    result = strict_json(ran.out)
    twins = [(row["a"], row["b"]) for row in result["lists"]["near_duplicates"]]
    assert twins == [("math-a", "math-b")]
    assert run("merge", REAL_ZOO, "--out", tmp_path / "merged").code == 0
    modules = safetensors.read_header(tmp_path / "merged" / WEIGHTS).tensors
    assert len(modules) == 2 * result["modules"]
