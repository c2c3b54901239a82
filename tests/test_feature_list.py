"""mpf.FEATURES, the page made from it, the command, costs and progress."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter
from test_features import MODULES, NAMES

import mergeprobe_fast as mpf
from mergeprobe_fast import screening
from mergeprobe_fast.engine.work import gram_work
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import ADAPTER_FEATURES, FAMILIES, PAIR_FEATURES, Family, select
from mergeprobe_fast.features.cost import cost, measured_rate, roughly
from mergeprobe_fast.features.declare import AdapterColumn, PairColumn
from mergeprobe_fast.features.entries import entry_features
from mergeprobe_fast.features.listing import AGGREGATES
from mergeprobe_fast.report.feature_page import YOURS, feature_page

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
EXAMPLES = Path(__file__).parents[1] / "examples" / "zoo"


@pytest.fixture
def zoo(tmp_path):
    for i in range(4):
        make_adapter(tmp_path / "zoo" / f"adapter_{i}", MODULES, seed=i)
    return mpf.open_zoo(tmp_path / "zoo")


def test_every_statistic_is_there_once_and_says_what_it_is():
    declared = {*PAIR_FEATURES, *ADAPTER_FEATURES, *(c.name for f in FAMILIES for c in f.adapters)}
    assert set(mpf.FEATURES) == {name for name in declared if "." not in name}
    listed = {f"{n}.{how}" for n, s in mpf.FEATURES.items() for how in s.aggregates}
    assert {name for name in declared if "." in name} < listed
    for name, s in mpf.FEATURES.items():
        assert s.name == name and s.of in ("pair", "adapter") and s.title and s.group
        assert s.definition.endswith((".", ")")), name
        assert s.range and s.needs
        assert s.source or s.group == "Early training", name
        assert s.twin is None or mpf.FEATURES[s.twin].twin == name
        assert s.low is None or s.high is None or s.low < s.high


def test_what_all_computes_is_what_is_listed(zoo):
    pairs = {n.partition(".")[0] for n in mpf.pair_features(zoo, "all")} - {"a", "b"}
    alone = {n for n, s in mpf.FEATURES.items() if s.needs == "the adapters"}
    assert pairs == {n for n in alone if mpf.FEATURES[n].of == "pair"}
    adapters = set(mpf.adapter_features(zoo, "all"))
    assert {n for n in alone if mpf.FEATURES[n].of == "adapter"} <= adapters
    default = set(mpf.adapter_features(zoo))
    listed = {n for n in alone if mpf.FEATURES[n].of == "adapter" and mpf.FEATURES[n].default}
    assert listed == default & set(mpf.FEATURES) and listed < adapters
    for table in (mpf.pair_features(zoo, "all"), mpf.adapter_features(zoo, "all")):
        for name, s in mpf.FEATURES.items():
            if name in table:
                found = {key.partition(".")[2] for key in table if key.startswith(f"{name}.")}
                assert found == set(s.aggregates), name


def test_values_stay_in_the_ranges_that_are_said(zoo):
    for table in (mpf.pair_features(zoo, "all"), mpf.adapter_features(zoo, "all")):
        for name, s in mpf.FEATURES.items():
            if name in table:
                values = np.asarray(table[name], float)
                assert s.low is None or (values >= s.low).all(), name
                assert s.high is None or (values <= s.high).all(), name


def test_adapter_features_by_name(zoo):
    table = mpf.adapter_features(zoo, ["log_volume", "depth_centre"])
    names = set(table) & set(mpf.FEATURES)
    assert names == {"log_volume", "depth_centre"}
    whole = mpf.adapter_features(zoo, "all")
    for name in names:
        assert list(table[name]) == list(whole[name])
    with pytest.raises(InputError, match="no feature 'cosine'; there are: norm, "):
        mpf.adapter_features(zoo, "cosine")
    with pytest.raises(InputError, match="features: drift needs a calibration"):
        mpf.adapter_features(zoo, ["drift"])


def test_the_page_is_what_the_declarations_say():
    assert PAGE.read_text("utf-8") == feature_page(), (
        "stale: mergeprobe-fast features --markdown > docs/features.md"
    )


def test_the_page_has_every_name_and_whole_tables():
    page = feature_page()
    for name in mpf.FEATURES:
        assert f"| `{name}`" in page
    for crossings in mpf.CROSSWALK.values():
        for crossing in crossings.values():
            assert f"| `{crossing.name}` |" in page
    width = 0
    for line in page.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert cells in (0, width) or width == 0, line
        width = cells


def test_the_examples_of_your_own_run_as_they_stand(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parents[1])
    code = re.findall(r"```python\n(.*?)```", YOURS, re.DOTALL)
    assert len(code) == 2
    feature, family = ({}, {})
    exec(code[0], feature)
    table = feature["pairs"]
    norms = mpf.adapter_features("examples/zoo")["norm"]
    a, b, c = norms[table.a], norms[table.b], table["cosine"]
    want = np.sqrt(a**2 + b**2 + 2 * a * b * c) / (a + b)
    np.testing.assert_allclose(table["shrinkage"], want, atol=1e-6)
    assert all(f"shrinkage.{how}" in table for how in AGGREGATES)
    exec(code[1], family)
    table = family["pairs"]
    assert "cosine" in table and ((table["same_peak"] >= 0) & (table["same_peak"] <= 1)).all()
    assert 0 < table["same_peak"].mean() < 1
    # its statement is ten lines or so
    assert len(code[0].split("shrinkage = ")[1].splitlines()) <= 10


def test_a_family_of_ones_own_gives_its_columns_of_adapters_too(zoo):
    seen = []

    def compute(zoo, recorded, threads):
        seen.append(threads)
        return np.arange(len(zoo), dtype=float)

    mine = Family(
        "mine", lambda recorded: None, compute,
        pairs=(
            PairColumn("order", "Order", "b - a.", lambda d, a, b: d[b] - d[a], bounded=(0, 2)),
        ),
        adapters=(AdapterColumn("place", "Place", "Place.", lambda d: d),),
        work=lambda zoo: 1e6, pace=3.0,
    )  # fmt: skip
    found = screening.screen(zoo, ["cosine", mine], threads=2)
    assert list(found.adapters["place"]) == [0, 1, 2, 3] and seen == [2]
    assert list(found.pairs["order"]) == [1, 2, 2, 1, 2, 1] and found.pairs.clipped == 1
    assert list(mpf.pair_features(zoo, mine)) == ["a", "b", "order"]
    assert cost(zoo, select(mine)).parts["mine"] == 3e6
    with pytest.raises(InputError, match="a feature is named twice"):
        mpf.pair_features(zoo, [mine, mine])
    lacking = Family("lacking", lambda recorded: "a wand", compute, mine.pairs)
    with pytest.raises(InputError, match="features: order needs a wand"):
        mpf.pair_features(zoo, lacking)
    with pytest.raises(InputError, match="order is a column of no family"):
        mpf.pair_features(zoo, mine.pairs[0])


@pytest.mark.parametrize("features", ["default", "all", "2601.22285", ["cosine", "gradience"]])
def test_progress_adds_up_to_what_is_announced(zoo, features, monkeypatch):
    for pair_bytes, chunk_bytes in ((512 << 20, 192 << 20), (1, 1)):
        monkeypatch.setattr("mergeprobe_fast.engine.passes.PAIR_BYTES", pair_bytes)
        monkeypatch.setattr("mergeprobe_fast.engine.passes.CHUNK_BYTES", chunk_bytes)
        for call in (mpf.pair_features, screening.screen):
            seen = []
            call(zoo, features, progress=seen.append)
            assert sum(seen) == screening.steps(zoo, select(features)) and min(seen) > 0
    families = [f for f in select(features).families if f.compute is not None]
    assert len(seen) >= len(NAMES) * (1 + len(families))  # a chunk a module, heard of one by one


def test_work_is_what_the_formula_says(zoo):
    tiles = sum((4 * 4) ** 2 / 2 * sum(MODULES[n][:2]) for n in NAMES)
    assert gram_work(zoo) == pytest.approx(tiles)
    assert mpf.FEATURES["cosine"].work(zoo) == pytest.approx(tiles)
    assert mpf.FEATURES["norm_ratio"].work(zoo) == 0
    assert mpf.FEATURES["drift"].work(zoo) is None
    every = cost(zoo, select("all"))
    assert every.parts["tiles of all pairs"] == pytest.approx(tiles)
    assert every.work == sum(every.parts.values()) > cost(zoo, select("default")).work
    assert every.read > cost(zoo, select("default")).read == sum(
        4 * 4 * sum(MODULES[n][:2]) for n in NAMES for _ in zoo
    )
    assert every.seconds(2.0) == every.work / 2
    assert measured_rate(1) > 1e6


@pytest.mark.parametrize(("seconds", "said"), [
    (0.2, "less than a second"), (1.2, "about 1 second"), (34, "about 30 seconds"),
    (88, "about 90 seconds"), (130, "about 2 minutes"), (3000, "about 50 minutes"),
    (9000, "about 2 hours"), (2e5, "about 2 days"),
])  # fmt: skip
def test_a_prediction_is_no_more_precise_than_it_is(seconds, said):
    assert roughly(seconds) == said


def test_screen_says_what_all_will_cost_before_it_starts(zoo, capsys, monkeypatch, tmp_path):
    from mergeprobe_fast.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    assert main(["screen", "zoo", "--features", "all", "--out", "out"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    count = len(list(select("all")))
    assert first.startswith(f"{count} statistics of 6 pairs: less than a second, most of it ")
    assert main(["screen", "zoo", "--out", "other"]) == 0
    assert "statistics of" not in capsys.readouterr().out
    assert main(["screen", "zoo", "--features", "all", "--json", "--out", "third"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 6
    assert main(["screen", "zoo", "--features", "2601.22285,cosine", "--out", "fourth"]) == 0


def test_the_command_lists_and_explains(zoo, capsys, monkeypatch, tmp_path):
    from mergeprobe_fast.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main(["features", *words]) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "80")
    listed = run()
    for name, s in mpf.FEATURES.items():
        assert f"  {name}{'' if s.default else '*'} " in listed, name
    assert max(map(len, listed.splitlines())) <= 80
    for name in ("row_rv", "log_volume", "layer_profile_cosine"):
        shown = " ".join(run(name).split())
        s = mpf.FEATURES[name]
        assert s.definition in shown and s.range in shown and s.source in shown
    assert "of this zoo" in run("cosine", "--zoo", "zoo")
    described = json.loads(run("--json", "--zoo", "zoo"))
    assert [d["name"] for d in described] == list(mpf.FEATURES)
    assert {d["name"]: d["work"] for d in described}["cosine"] == gram_work(zoo)
    theirs = json.loads(run("2601.22285", "--json"))
    assert len(theirs) == 28 and sum(not d["offered"] for d in theirs) == 3
    assert "not offered" in run("2601.22285") and "rank_utilisation" in run("gradience")
    assert run("--markdown") == feature_page()


@pytest.mark.parametrize(("words", "said"), [
    (["cosin"], "features: no feature 'cosin'; there are: 2601.22285, gradience, cosine, "),
    (["cosine", "--markdown"], "--markdown: is the whole page, and nothing else"),
])  # fmt: skip
def test_the_command_refuses(words, said, capsys):
    from mergeprobe_fast.cli import main

    assert main(["features", *words]) == 2
    assert capsys.readouterr().err.startswith(f"mergeprobe-fast: {said}")


def test_entries_may_be_looked_at_in_other_numbers(zoo, monkeypatch, tmp_path, capsys):
    from pyarrow import parquet

    from mergeprobe_fast.cli import main

    monkeypatch.chdir(tmp_path)
    exact = entry_features("exact")
    whole = mpf.pair_features(zoo, ["cosine", exact])
    beside = mpf.pair_features(zoo, ["all", exact])
    assert list(beside["sign_conflict"]) == list(whole["sign_conflict"])
    assert set(beside) == set(mpf.pair_features(zoo, "all"))
    assert main(["screen", "zoo", "--entries", "exact", "--out", "out"]) == 0
    table = parquet.read_table("out/pairs.parquet")
    assert table["sign_conflict"].to_pylist() == list(whole["sign_conflict"])
    assert "cosine.p10" in table.column_names
    assert main(["screen", "zoo", "--entries", "9000", "--features", "all", "--out", "some"]) == 0
    capsys.readouterr()
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit):
            main(["screen", "zoo", "--entries", wrong, "--out", "no"])
        assert f"expected exact or how many, got '{wrong}'" in capsys.readouterr().err


def test_aggregates_of_families_come_with_their_column(zoo):
    names = [f.name for f in select(["row_geodesic", "cosine"])]
    assert set(names) == {"row_geodesic", "row_geodesic.mean", "cosine"}
    both = select(["row_geodesic", "row_geodesic.mean"])
    assert len(list(both)) == 2
    assert [f.name for f in select(["row_geodesic.mean"])] == ["row_geodesic.mean"]
    assert "entry_kurtosis.mean" in mpf.adapter_features(zoo, ["entry_kurtosis"])
