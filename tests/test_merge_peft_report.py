"""The operator table, the noise floor and the report, against loops and against made-up truths."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_labels import draw_pairs, row
from made_runs import make_journal, make_tier, write_lines
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.outcome import noise
from mergeprobe_fast.merge_peft.outcome.labels import label_rows, read_scores, write_labels
from mergeprobe_fast.merge_peft.report import label_noise, report
from mergeprobe_fast.merge_peft.report import operator_table as ot
from mergeprobe_fast.merge_peft.report.tables import tables
from mergeprobe_fast.merge_peft.tiers.plan import MergePlan

EXACT = bound("resamples")


def test_the_table_is_what_loops_say(rng: np.random.Generator) -> None:
    rows = draw_pairs(rng) + [
        {**r, "ll_norm": r["ll_norm"] + 0.1, "row": r["row"].replace("sum", "mean"),
         "operator": "mean"} for r in draw_pairs(rng, 6)
    ]  # fmt: skip
    rows[3]["ll_norm"], rows[5]["ll_norm"], rows[8]["ll_norm"] = -7.0, None, 3.0
    table = {r["operator"]: r for r in ot.operator_table(rows, "sum")}
    for name, record in table.items():
        mine = [r for r in rows if r["operator"] == name]
        have = [r for r in mine if r["ll_norm"] is not None]
        values = {r["row"]: max(-1.0, min(1.2, r["ll_norm"])) for r in have}
        assert record["ll_norm"] == pytest.approx(sum(values.values()) / len(values), abs=EXACT)
        raw = [r["ll_norm"] for r in have]
        assert record["ll_norm_min"] == min(raw) and record["rows"] == len(mine)
        assert record["ll_norm_below"] == pytest.approx(sum(v < 0.8 for v in raw) / len(raw))
        assert record["ll_norm_none"] == len(mine) - len(raw)
        worst = []
        for merge in {r["row"].split("|")[0] for r in mine}:
            both = [values.get(r["row"]) for r in mine if r["row"].startswith(merge)]
            if None not in both:
                worst.append(min(both))
        assert record["merges"] == len(mine) / 2
        assert record["ll_norm_worst"] == pytest.approx(sum(worst) / len(worst), abs=EXACT)
    by = {(r["operator"], frozenset(r["members"]), r["member"]): ot.clipped(r) for r in rows}
    both = [by["mean", s, m] - by["sum", s, m] for o, s, m in by if o == "mean"]
    both = [d for d in both if not math.isnan(d)]
    assert table["mean"]["versus"] == pytest.approx(sum(both) / len(both), abs=EXACT)
    assert table["mean"]["versus_rows"] == len(both) and table["sum"]["versus"] is None
    order = sorted(table.values(), key=lambda r: -r["ll_norm"])
    assert [r["operator"] for r in ot.operator_table(rows)] == [r["operator"] for r in order]


def test_intervals_are_those_of_a_loop_over_drawn_adapters(rng: np.random.Generator) -> None:
    rows = draw_pairs(rng, 7)
    names = sorted({r["member"] for r in rows})
    values = np.array([ot.clipped(r) for r in rows])
    means = []
    for counts in noise.counts_of(7, "sum"):
        times = [counts[names.index(r["member"])] * counts[names.index(r["partner"])] for r in rows]
        if sum(times):
            means.append(sum(t * v for t, v in zip(times, values, strict=True)) / sum(times))
    expected = tuple(np.percentile(means, (2.5, 97.5)))
    assert ot.operator_table(rows)[0]["ll_norm_interval"] == pytest.approx(expected, abs=EXACT)


def test_the_interval_covers_what_other_adapters_would_give(rng: np.random.Generator) -> None:
    inside = alone = 0
    for _ in range(60):
        rows = draw_pairs(rng)
        low, high = ot.operator_table(rows)[0]["ll_norm_interval"]
        inside += low <= 0.7 <= high
        values = np.array([r["ll_norm"] for r in rows])
        alone += abs(values.mean() - 0.7) <= 1.96 * values.std() / math.sqrt(len(values))
    # Percentiles of 12 adapters are narrow, they hold 88 %: of 60 below 40 once in 10^5.
    assert inside >= 40
    assert alone < 48  # the fault: rows taken for independent


def test_few_sets_have_no_interval_and_sets_are_drawn_whole(rng: np.random.Generator) -> None:
    sets = [("a0", "b0", "d0"), ("a1", "b1", "d1"), ("a0", "b0", "c0", "d2"),
            ("a1", "b1", "c1", "d3"), ("a0", "b1", "c0", "d4")]  # fmt: skip
    members = [m for s in sets for m in s]
    others = [tuple(o for o in s if o != m) for s in sets for m in s]
    of_set = [k for k, s in enumerate(sets) for _ in s]
    values = rng.normal(size=len(members))
    crossed = noise.Crossed(members, others, "x")
    names = sorted({*members})
    one, two = noise.counts_of(len(names), "x"), noise.counts_of(5, "x, sets")
    order = sorted(range(5), key=lambda k: tuple(sorted(sets[k])))
    means = []
    for adapters, drawn in zip(one, two, strict=True):
        times = [adapters[names.index(m)] * drawn[order.index(k)]
                 for m, k in zip(members, of_set, strict=True)]  # fmt: skip
        if sum(times):
            means.append(sum(t * v for t, v in zip(times, values, strict=True)) / sum(times))
    expected = tuple(np.percentile(means, (2.5, 97.5)))
    assert crossed.interval(values) == pytest.approx(expected, abs=EXACT)
    # Rows are many, sets are not: of four sets, and of five of which one has no value.
    assert crossed.interval(np.where(np.array(of_set) == 3, np.nan, values)) is None
    pairs = [pair for k in range(4) for pair in ((f"a{k}", "b"), ("b", f"a{k}"))]
    first, second = zip(*pairs, strict=True)
    assert noise.Crossed(first, [(o,) for o in second], "x").interval(np.ones(8)) is None


def test_who_hurts_whom_has_the_victim_in_its_row() -> None:
    math = {"domain": "math", "partner_domain": "code"}
    code = {"domain": "code", "partner_domain": "math"}
    rows = [row(("math1", "code1"), "math1", 0.2, **math),
            row(("math1", "code1"), "code1", 0.9, **code),
            row(("math2", "code1"), "math2", 0.4, **math)]  # fmt: skip
    found = ot.who_hurts_whom(rows)
    assert found["domains"] == ["math", "code"]
    assert found["mean"] == [[None, pytest.approx(0.3)], [0.9, None]]
    assert found["rows"] == [[0, 2], [1, 0]]


def test_tables_keep_studies_apart_and_find_common_sets(rng: np.random.Generator) -> None:
    rows = draw_pairs(rng, 6)
    few = [{**r, "operator": "ties", "row": r["row"].replace("sum", "ties")} for r in rows
           if "math0" in r["members"]]  # fmt: skip
    found = tables([*rows, *few])
    (block,) = found["studies"]
    assert (block["sets"], block["common_sets"], block["rows"]) == (15, 5, 40)
    assert {r["operator"]: r["rows"] for r in block["common"]} == {"sum": 10, "ties": 10}
    assert tables(rows)["studies"][0]["common"] is None
    assert [m["operator"] for m in found["hurts"]] == ["sum", "ties"]
    worst = sorted([*rows, *few], key=lambda r: r["ll_norm"])
    assert [r["ll_norm"] for r in found["worst"]] == [r["ll_norm"] for r in worst[:10]]
    assert tables([])["studies"] == []


def test_a_router_is_compared_with_merges_of_its_set() -> None:
    members = ("math1", "code1", "science1")
    rows = [row(members, m, 0.5, study="capacity", operator="mean") for m in members]
    rows += [row(members, m, 1.0, study="routing", operator="oracle routing", method="routing",
                 resident=3) for m in members]  # fmt: skip
    rows += [row(("math1", "code1"), m, 0.7, operator="mean") for m in members[:2]]
    blocks = {b["study"]: b for b in tables(rows)["studies"]}
    assert [r["operator"] for r in blocks["routing"]["operators"]] == ["oracle routing", "mean"]
    assert [r["resident"] for r in blocks["routing"]["operators"]] == [3, 1]
    assert blocks["routing"]["operators"][0]["versus"] == pytest.approx(0.5)


def test_capacity_has_a_curve_for_each_rank_of_a_family() -> None:
    rows = []
    for size in (2, 5):
        members = tuple(f"math{k}" for k in range(size))
        for name, rank, value in (("sum", 64, 0.9), ("sum-r16", 16, 0.8)):
            rows += [row(members, m, value / size + k / 100, operator=name, rank=rank,
                         study="capacity") for k, m in enumerate(members)]  # fmt: skip
    found = ot.capacity_table(rows)
    assert [(r["family"], r["cut"], r["size"]) for r in found] == [
        ("sum", None, 2), ("sum", None, 5), ("sum", 16, 2), ("sum", 16, 5)
    ]  # fmt: skip
    assert [r["ll_norm_worst"] for r in found] == pytest.approx([0.45, 0.18, 0.4, 0.16])


def test_the_noise_floor_finds_planted_noise(rng: np.random.Generator) -> None:
    rows = []
    for k in range(3000):
        members = (f"math{k}", f"code{k}")
        value = rng.normal(0.6, 0.1) + rng.normal(0, 0.05)
        rows.append(row(members, members[0], value, ll_norm_se=0.05, domain="math"))
    found = label_noise.noise_floor(rows)["measures"]["ll_norm"]
    # .01 of .0125 is real; a variance of 3000 is off by sqrt(2/3000), six times that.
    assert found["reliability"] == pytest.approx(0.8, abs=0.2 * 6 * math.sqrt(2 / 3000))
    assert found["sd"] == pytest.approx(math.sqrt(0.0125), rel=6 / math.sqrt(6000))
    assert (found["se"], found["rows"]) == (0.05, 3000)
    wrong = label_noise.noise_floor([{**r, "ll_norm_se": 0.0} for r in rows])["measures"]["ll_norm"]
    assert wrong["reliability"] == 1


def test_noise_of_seeds_is_between_adapters_that_differ_in_nothing_else(
    rng: np.random.Generator,
) -> None:
    rows = []
    for partner in range(300):
        level = rng.normal(0.5, 0.1)
        for seed, start in ((0, 0), (1, 0), (2, 5)):
            member = f"math{seed}-{start}"
            value = level + (0.2 if start else 0) + rng.normal(0, 0.02)
            rows.append(row((member, f"code{partner}"), member, value, train_seed=seed,
                            train_init_seed=start))  # fmt: skip
        rows.append(row(("math9", f"code{partner}"), "math9", 5.0, train_steps=400))
    found = label_noise.noise_floor(rows)["retrained"]["ll_norm"]
    assert found["order"] == {"sd": pytest.approx(0.02, rel=6 / math.sqrt(600)), "groups": 300}
    # Two starts .2 apart, of one seed each: half the square of their difference.
    assert found["start"]["sd"] == pytest.approx(math.sqrt(0.02 + 0.02**2), rel=0.05)
    assert found["start"]["groups"] == 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a hostile name in every place that has names."""
    folder, tier = tmp_path_factory.mktemp("run"), make_tier(adapters=10, pairs=5)
    evil = "<script>alert(1)</script>&\"'"
    first = next(iter(tier.operators))
    merges = [replace(m, operator=evil if m.operator == first else m.operator)
              for m in tier.merges.values()]  # fmt: skip
    tier = replace(
        tier, about=evil, merges={m.key: m for m in merges},
        operators={**tier.operators, evil: replace(tier.operators[first], name=evil)},
    )  # fmt: skip
    lines = make_journal(folder, make_tier(adapters=10, pairs=5))
    for line in lines:
        if line.get("operator") == first:
            line["operator"] = evil
            line["key"] = MergePlan(evil, tuple(line["members"])).key
        elif str(line.get("key", "")).startswith(f"{first}("):
            line["key"] = line["key"].replace(first, evil, 1)
        if line["kind"] == "failed":
            line["reason"] = evil
    lines[0] |= {"base": evil, "digest": tier.digest}
    write_lines(folder, lines)
    rows = label_rows(read_scores(folder), tier)
    return folder, report.summary(read_scores(folder), rows, tier)


class Page(HTMLParser):
    """Tags that are open, and all that are there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_whole_and_harmless(made) -> None:
    page = report.render(made[1])
    assert page.isascii() and "{{" not in page and "nan" not in page.lower().split()
    parsed = Page(page)
    assert parsed.open == [] and {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img"})
    for _, attributes in parsed.tags:
        assert not {"style", "src", "href", "onclick"} & {*attributes}
    assert "alert(1)" in page and "<script" not in page
    assert not re.search(r"https?:|url\(", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page
    for title in ("Operators", "Capacity", "Who hurts whom", "Noise", "Merges that failed",
                  "What single adapters learned", "Again"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    used = {c for _, a in parsed.tags for c in (a.get("class") or "").split()}
    styled = {*re.findall(r"\.([a-z]\w*)", style)}
    assert used <= styled


def test_every_operator_is_in_the_page_and_in_the_terminal(made) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(report.terminal_table(made[1]))
    page = report.render(made[1])
    for name in ("ties", "regmean-48", "oracle routing", "learned router"):
        assert name in out.getvalue() and name in page
    record = made[1]["studies"][0]["operators"][0]
    assert f"{record['ll_norm']:.3f}" in out.getvalue()
    assert f"<td>{record['ll_norm']:.3f}</td>" in page


def test_a_report_is_written_again_with_the_same_bytes(tmp_path: Path) -> None:
    tier = make_tier(adapters=10, pairs=3)
    make_journal(tmp_path, tier)
    with pytest.raises(InputError, match="cannot be read"):
        report.write_report(tmp_path, tier)
    write_labels(tmp_path, tier)
    report.write_report(tmp_path, tier)
    names = ("summary.json", "report.html")
    first = [(tmp_path / name).read_bytes() for name in names]
    report.write_report(tmp_path, tier)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    found = json.loads(first[0])
    assert found["run"]["adapters"] == 10 and found["run"]["rows"] > 0
    assert {f["operator"] for f in found["failed"]} <= {"ties"}
    assert report.render(found) == first[1].decode()


def test_a_run_that_measured_nothing_has_a_report(tmp_path: Path) -> None:
    tier = make_tier(adapters=10, pairs=3)
    write_lines(tmp_path, make_journal(tmp_path, tier)[:1])
    write_labels(tmp_path, tier)
    report.write_report(tmp_path, tier)
    page = (tmp_path / "report.html").read_text()
    assert "Nothing is measured yet" in page and "not complete" in page
    assert Page(page).open == []
