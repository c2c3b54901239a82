"""The results page of a made-up run: its numbers are the run's, its pictures are there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import make_journal, make_tier

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.outcome.labels import read_labels, write_labels
from mergeprobe_fast.merge_peft.report.operator_table import clipped
from mergeprobe_fast.merge_peft.report.report import write_report
from mergeprobe_fast.merge_peft.results import foretold
from mergeprobe_fast.merge_peft.results import page as results_page
from mergeprobe_fast.merge_peft.study import analysis
from mergeprobe_fast.merge_peft.study.predictors import NAMES as BY_NAMES

NAMES = ("cosine", "norm_a", "norm_b", "row_overlap")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels and a summary; features of which one is the label and the others are noise."""
    folder = tmp_path_factory.mktemp("run")
    tier = make_tier(adapters=15, pairs=70, sizes=(2, 5, 10))
    # Pairs of one domain stand for those that are meant to fail.
    merges = {key: replace(m, study="broken") if m.study == "same" else m
              for key, m in tier.merges.items()}  # fmt: skip
    tier = replace(tier, merges=merges)
    make_journal(folder, tier)
    write_labels(folder, tier)
    write_report(folder, tier)
    rng = np.random.default_rng(1)
    rows = read_labels(folder / "labels.parquet")
    kept = {(r["member"], r["partner"]): r["ll_norm"] for r in rows if r["operator"] == "sum"}
    merged = {tuple(r["members"]) for r in rows if r["size"] == 2}
    pairs = sorted({pair for members in merged for pair in permutations(members, 2)})
    features = []
    for victim, partner in pairs:
        row = {"victim": victim, "partner": partner}
        for time in ("final", "at5%"):
            row |= {f"{time}:{name}": float(rng.lognormal()) for name in NAMES}
        row["final:damage_trained_a_by_b"] = -kept.get((victim, partner), 0.0)
        features.append(row)
    table = pa.Table.from_pylist(features)
    counted = {"at5%": {"missing": 2, "too_early": 1}}
    table = table.replace_schema_metadata({"left_out": json.dumps(counted)})
    pq.write_table(table, folder / "features.parquet")
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory) -> Path:
    return results_page.write_results([run], tmp_path_factory.mktemp("page"), machine="an abacus")


def row_of(text: str, name: str, after: str) -> list[str]:
    """The cells of a table's row, the first after a heading."""
    line = next(x for x in text[text.index(after) :].splitlines() if x.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_numbers_of_an_operator_are_those_of_its_labels(run, page):
    text = page.read_text("utf-8")
    mine = [r for r in read_labels(run / "labels.parquet")
            if (r["operator"], r["study"]) == ("ties", "pairs")]  # fmt: skip
    cells = row_of(text, "ties", "### Pairs of different domains")
    values = np.array([clipped(r) for r in mine])
    assert cells[1].split()[0] == f"{values.mean():.3f}"
    assert cells[3] == f"{min(r['ll_norm'] for r in mine):.2f}"
    assert cells[7] == str(len(mine))
    assert "an abacus" in text and f"{len(read_labels(run / 'labels.parquet'))} labels" in text


def test_of_merges_that_are_meant_to_fail_each_is_shown(run, page):
    text = page.read_text("utf-8")
    row = next(r for r in read_labels(run / "labels.parquet")
               if (r["operator"], r["study"]) == ("regmean-48", "broken"))  # fmt: skip
    header = row_of(text, "merged", "meant to fail")
    line = f"| {' + '.join(row['members'])} | {row['member']} |"
    cells = next(x for x in text.splitlines() if x.startswith(line)).strip("|").split("|")
    assert cells[header.index("regmean-48")].strip() == f"{row['ll_norm']:.2f}"


def test_what_signals_say_is_what_they_say(page):
    """One is the label itself, and nothing else says anything."""
    text = page.read_text("utf-8")
    damage = row_of(text, "`damage_trained_a_by_b`", "### What single signals say")
    assert damage[1].startswith("-1.00") and damage[2].startswith("-1.00")
    noise = row_of(text, "`cosine`", "### What single signals say")
    assert abs(float(noise[2].split()[0])) < 0.5
    mean = row_of(text, "domain pair, its mean", "**The victim's adapter held out**")
    assert mean[2].startswith("0.00")
    assert re.search(r"Weights and domains (show no gain over|do worse than)", text)
    # To add to metadata is what only signals and metadata together can.
    assert not re.search(r"(?<!All signals)(?<!at 5%) add to", text)
    assert "3 adapters have no usable snapshot at 5%: 1 too early, 2 missing" in text
    assert "**at5%, the victim's adapter held out**" in text


def test_every_predictor_is_told_beside_one_that_knows_names_only(page):
    found = json.loads((page.parent / "analysis-made.json").read_text("utf-8"))
    text = page.read_text("utf-8")
    assert "compare with *which adapters + domains, ridge*" in text
    for split, title in foretold.TITLES.items():
        by_name = {s["name"]: s for s in found["splits"][split]}
        if BY_NAMES not in by_name:  # one seed, which leaves nothing to learn from
            assert f"**{title} held out**: " in text
            continue
        for scored in by_name.values():
            for key, of in (("over_names", "rho"), ("within_over_names", "within")):
                if scored["name"] == BY_NAMES or scored[of] is None:
                    assert scored[key] is None
                else:
                    assert scored[key] == pytest.approx(scored[of] - by_name[BY_NAMES][of])
        cells = row_of(text, BY_NAMES, f"**{title} held out**")
        assert cells[1].startswith(f"{by_name[BY_NAMES]['rho']:.2f}")


def test_pictures_are_there_and_are_xml(page):
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8"))
    assert sorted(named) == ["made-capacity.svg", "made-operators.svg", "made-predictors.svg"]
    for name in named:
        root = ElementTree.fromstring((page.parent / name).read_text("utf-8"))
        assert root.tag.endswith("svg")
        drawn = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert {"circle", "line", "text", "title"} <= drawn
        assert not re.search(r"nan|inf|None", ElementTree.tostring(root, "unicode"))
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root.iter():
            for key, limit in (("cx", width), ("x1", width), ("cy", height), ("y1", height)):
                assert 0 <= float(element.get(key, 0)) <= limit


def test_what_is_known_is_not_worked_out_again_until_labels_or_code_change(
    run, page, monkeypatch, tmp_path
):
    before = {p.name: p.read_bytes() for p in page.parent.iterdir()}

    def never(*given, **named):
        raise AssertionError("worked out again")

    monkeypatch.setattr(results_page, "analyse", never)
    results_page.write_results([run], page.parent, machine="an abacus")
    assert {p.name: p.read_bytes() for p in page.parent.iterdir()} == before
    own = Path(analysis.__file__)
    assert own in results_page.sources() and own.with_name("models.py") in results_page.sources()
    other = tmp_path / "analysis.py"
    other.write_text(own.read_text("utf-8") + "\n", encoding="utf-8")
    with monkeypatch.context() as changed:
        changed.setattr(results_page, "sources", lambda: [other])
        with pytest.raises(AssertionError, match="worked out again"):
            results_page.write_results([run], page.parent)
    kept = page.parent / "analysis-made.json"
    kept.write_text(kept.read_text("utf-8").replace('"of": "', '"of": "0'), encoding="utf-8")
    with pytest.raises(AssertionError, match="worked out again"):
        results_page.write_results([run], page.parent)


def test_a_run_without_features_has_operators_only(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("labels.parquet", "summary.json"):
        (bare / name).write_bytes((run / name).read_bytes())
    text = results_page.write_results([bare], tmp_path / "page").read_text("utf-8")
    assert "### Pairs of different domains" in text and "### What can be foretold" not in text


def test_of_a_few_pairs_nothing_is_foretold(tmp_path):
    folder = tmp_path / "run"
    tier = make_tier(adapters=5, pairs=10, sizes=(2,))
    make_journal(folder, tier)
    write_labels(folder, tier)
    write_report(folder, tier)
    rows = [r for r in read_labels(folder / "labels.parquet") if r["partner"]]
    pairs = sorted({(r["member"], r["partner"]) for r in rows})
    features = [{"victim": v, "partner": p, "final:cosine": 0.5} for v, p in pairs]
    pq.write_table(pa.Table.from_pylist(features), folder / "features.parquet")
    text = results_page.write_results([folder], tmp_path / "page").read_text("utf-8")
    assert "What can be foretold is not asked" in text and "### What is noise" not in text
    with pytest.raises(InputError, match=r"only \d+ labels of sum"):
        analysis.analyse(folder)


def test_what_cannot_be_used_is_named(run, tmp_path, capsys):
    with pytest.raises(InputError, match="second run of tier made"):
        results_page.write_results([run, run], tmp_path / "page")
    assert results_page.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "summary.json" in capsys.readouterr().err
