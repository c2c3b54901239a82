"""Operators that were measured on different sets, in tables, pages and the terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_labels import draw_pairs, row
from made_runs import make_journal, make_tier, write_lines
from rich.console import Console
from tolerances import bound

from mergeprobe_fast.merge_peft.outcome.labels import label_rows, read_scores, write_labels
from mergeprobe_fast.merge_peft.report import operator_table as ot
from mergeprobe_fast.merge_peft.report import report
from mergeprobe_fast.merge_peft.report.tables import study_block, tables
from mergeprobe_fast.merge_peft.results import operators, sentences

EXACT = bound("resamples")


def renamed(rows: list[dict], operator: str, change: float = 0.0, **more: Any) -> list[dict]:
    """The same rows of another operator, which keeps so much more."""
    return [{**r, "operator": operator, "row": r["row"].replace(r["operator"], operator, 1),
             "ll_norm": r["ll_norm"] + change, **more} for r in rows]  # fmt: skip


def easiest(rows: list[dict], sets: int) -> list[dict]:
    """The rows of the sets whose members keep most."""
    kept: dict[frozenset[str], float] = {}
    for r in rows:
        kept[frozenset(r["members"])] = kept.get(frozenset(r["members"]), 0) + r["ll_norm"]
    chosen = sorted(kept, key=kept.__getitem__)[-sets:]
    return [r for r in rows if frozenset(r["members"]) in chosen]


def printed(found: dict[str, Any], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report.terminal_table(found, width))
    return out.getvalue()


@pytest.fixture
def unfair(rng: np.random.Generator) -> dict[str, Any]:
    """A worse operator that was measured on the four easiest sets alone."""
    rows = draw_pairs(rng, 8, operator="mean")
    return tables([*rows, *renamed(easiest(rows, 4), "worse", -0.02)])


def test_an_operator_of_easy_sets_is_not_called_the_best(unfair) -> None:
    (block,) = unfair["studies"]
    means = {r["operator"]: r["ll_norm"] for r in block["operators"]}
    assert means["worse"] > means["mean"]  # what a ranking of means would say
    assert not block["comparable"] and block["common"] is None and block["highest"] == []
    assert [r["operator"] for r in block["operators"]] == ["mean", "worse"]
    record = block["operators"][1]
    assert record["versus"] == pytest.approx(-0.02) and record["versus_rows"] == 8
    assert record["versus_interval"] is None  # of four sets


def test_no_page_ranks_operators_of_different_sets(unfair, tmp_path: Path) -> None:
    tier = make_tier(adapters=5, pairs=1, sizes=())
    make_journal(tmp_path, tier)
    found = report.summary(read_scores(tmp_path), [], tier) | unfair
    page = report.render(found)
    assert "operators were measured on different sets" in page.lower()
    text = operators.section(found, [], {})
    assert "means do not compare" in text and "difference to `mean`" in text
    assert "Highest" not in text and "Highest" not in page
    (line,) = sentences.short(found, None).splitlines()
    assert line == "- Pairs: operators were measured on different sets, so that none is the best."
    assert dict(operators.pictures(found)) == {}  # four sets have no interval
    assert "(different sets)" in printed(found, 80)


def test_operators_of_few_sets_are_left_out_until_enough_are_common(
    rng: np.random.Generator,
) -> None:
    rows = draw_pairs(rng, 8, share=0.3, operator="mean")
    sets = sorted({tuple(r["members"]) for r in rows})
    of = lambda chosen: [r for r in rows if tuple(r["members"]) in chosen]  # noqa: E731
    everything = [*rows, *renamed(of(sets[:14]), "svd", 0.05), *renamed(of(sets[4:12]), "ties"),
                  *renamed(of(sets[20:26]), "few", 0.1)]  # fmt: skip
    block = study_block(everything)
    # All four have no set in common; without "few" there are eight.
    assert block["dropped"] == ["few"] and block["common_sets"] == 8 and block["comparable"]
    assert {r["operator"]: r["merges"] for r in block["common"]} == {
        "svd": 8, "mean": 8, "ties": 8
    }  # fmt: skip
    assert [h["operator"] for h in block["highest"]] == ["svd"]
    assert block["highest"][0]["close"] == []  # .05 above on the very same rows
    values = {r["operator"]: r["versus"] for r in block["operators"]}
    assert values == {"mean": None, "svd": pytest.approx(0.05), "few": pytest.approx(0.1),
                      "ties": pytest.approx(0)}  # fmt: skip
    assert [r["operator"] for r in block["operators"]] == ["few", "svd", "mean", "ties"]
    ((name, picture),) = operators.pictures(tables(everything))
    assert name == "operators" and "ll_norm over mean, on the rows both have" in picture
    assert "hollow" not in picture and ">few<" in picture and ">mean<" not in picture
    told = printed(tables(everything), 80)
    assert "8 sets that 3 operators have in common" in told and "not in it: few" in told


def test_operators_of_the_same_sets_are_compared_as_they_are(rng: np.random.Generator) -> None:
    rows = draw_pairs(rng, 8, operator="mean")
    noisy = [
        {**r, "ll_norm": r["ll_norm"] + e}
        for r, e in zip(renamed(rows, "twin"), rng.normal(0, 0.05, len(rows)), strict=True)
    ]
    noisy = renamed(noisy, "twin", -0.001 - np.mean([r["ll_norm"] for r in noisy]).item()
                    + np.mean([r["ll_norm"] for r in rows]).item())  # fmt: skip
    block = study_block([*rows, *noisy, *renamed(rows, "data", 0.1, calibration=48),
                         *renamed(rows, "bad", -0.3)])  # fmt: skip
    assert block["comparable"] and block["common"] is None and block["dropped"] == []
    everything, free = block["highest"]
    assert (everything["operator"], everything["count"], everything["close"]) == ("data", 4, [])
    assert (free["operator"], free["count"], free["close"]) == ("mean", 3, ["twin"])


def test_a_gain_in_accuracy_counts_for_no_more_than_two() -> None:
    rows = [row(("math1", "code1"), m, 0.5, retention=value)
            for m, value in (("math1", 40.0), ("code1", 0.5))]  # fmt: skip
    (record,) = ot.operator_table(rows)
    assert record["retention"] == pytest.approx(1.25) and record["retention_worst"] == 0.5


def test_rows_without_ll_norm_are_told(rng: np.random.Generator, tmp_path: Path) -> None:
    rows = draw_pairs(rng, 6)
    lost = [r for r in rows if r["member"] == "math0"]
    for r in lost:
        r["ll_norm"] = None
    (record,) = ot.operator_table(rows)
    assert (record["ll_norm_none"], record["ll_norm_whole"], record["merges"]) == (5, 10, 15)
    tier = make_tier(adapters=5, pairs=1, sizes=())
    make_journal(tmp_path, tier)
    found = report.summary(read_scores(tmp_path), [], tier) | tables(rows)
    worst = f"{record['ll_norm_worst']:.3f} (10 of 15)"
    page = report.render(found)
    assert "<td>25 of 30</td>" in page and f"<td>{worst}</td>" in page
    text = operators.section(found, [], {})
    assert "| 25 of 30 |" in text and f"| {worst} |" in text


def test_a_curve_over_the_same_tasks_does_not_fall_because_tasks_change() -> None:
    """Tasks that are added are harder; those of the smallest sets keep what they kept."""
    orders = [[f"{order}{k}" for k in range(6)] for order in "ab"]
    rows = []
    for size in (2, 4, 6):
        for names in orders:
            members = tuple(names[:size])
            rows += [row(members, m, 0.9 if int(m[1:]) < 2 else 0.3, study="capacity")
                     for m in members]  # fmt: skip
    both = tuple(orders[0] + orders[1])
    rows += [row(both, m, 0.8 if int(m[1:]) < 2 else 0.3, study="capacity") for m in both]
    found = {r["size"]: r for r in ot.capacity_table(rows)}
    assert [found[s]["core"] for s in (2, 4, 6, 12)] == pytest.approx([0.9, 0.9, 0.9, 0.8])
    assert found[6]["ll_norm"] == pytest.approx(0.5)  # the fault: as if room ran out
    assert all(r["comparable"] for r in found.values())
    part = [r for r in rows if tuple(r["members"]) != tuple(orders[1][:4])]
    part += renamed([r for r in rows if r["size"] == 4], "mean")
    cut = {(r["operator"], r["size"]): r for r in ot.capacity_table(part)}
    assert cut["sum", 4]["core"] is None and cut["mean", 4]["core"] == pytest.approx(0.9)
    assert not cut["sum", 4]["comparable"] and cut["sum", 6]["comparable"]


def test_the_terminal_has_a_line_an_operator_at_any_width(tmp_path: Path) -> None:
    tier = make_tier(adapters=10, pairs=9)
    make_journal(tmp_path, tier)
    run = read_scores(tmp_path)
    found = report.summary(run, label_rows(run, tier), tier)
    for width in (50, 80, 120):
        lines = printed(found, width).splitlines()
        assert max(map(len, lines)) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)  # of cut-off cells
        names = [line.split("  ")[0].rstrip() for line in lines]
        for name in ("regmean-48-r16", "oracle routing", "learned router"):
            assert name in names
    header = next(line for line in printed(found, 80).splitlines() if line.startswith("operator"))
    assert header.split()[1:5] == ["ll_norm", "95", "%", "worst"] and "vs mean" in header
    assert "resident" in printed(found, 120) and "resident" not in printed(found, 50)


def test_a_run_that_is_half_done_says_how_much_of_what_is_in(tmp_path: Path) -> None:
    tier = make_tier(adapters=15, pairs=40)
    lines = make_journal(tmp_path, tier)
    merged = [n for n, line in enumerate(lines) if line["kind"] == "merged"]
    for cut in (merged[0], merged[1], merged[len(merged) // 2], merged[-1]):
        write_lines(tmp_path, lines[:cut])
        with open(tmp_path / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(lines[cut])[:-9])  # torn
        write_labels(tmp_path, tier)
        report.write_report(tmp_path, tier)
        found = json.loads((tmp_path / "summary.json").read_text("utf-8"))
        page = (tmp_path / "report.html").read_text("utf-8")
        run, there = found["run"], sum(n < cut for n in merged)
        assert f"<dd>{there} of {len(tier.merges)}</dd>" in page
        assert sum(s["merges"] for s in run["studies"]) == there
        assert sum(s["planned"] for s in run["studies"]) == len(tier.merges)
        part = next(s for s in run["studies"] if s["study"] == "pairs")
        told = f"{part['merges']} of {part['planned']}"
        assert f"{told} merges are in: pairs of different domains." in page
        facts = operators.what_was_run(found, "an abacus")
        assert "not complete, merges that are in: " in facts
        assert f"pairs of different domains {told}" in facts
        text = operators.section(found, [], {})
        assert not re.search(r"\bnan\b|None", text) and printed(found, 80)
        sentences.short(found, None)


def test_others_are_compared_with_what_shares_most_sets_with_them(
    rng: np.random.Generator,
) -> None:
    rows = draw_pairs(rng, 8)
    sets = sorted({tuple(r["members"]) for r in rows})
    few = [r for r in rows if tuple(r["members"]) in sets[:9]]
    others = [r for r in rows if tuple(r["members"]) in sets[6:20]]
    assert study_block([*rows, *renamed(few, "mean")])["reference"] == "mean"
    found = study_block([*rows, *renamed(few, "mean"), *renamed(others, "ties", 0.1)])
    assert found["reference"] == "sum" and ot.reference_of(renamed(rows, "ties")) is None
    assert {r["operator"]: r["versus_rows"] for r in found["operators"]} == {
        "ties": 28, "mean": 18, "sum": 0
    }  # fmt: skip
    short = study_block([*rows, *renamed(rows, "down", -0.1), *renamed(others[:8], "up", 0.1)])
    assert [r["operator"] for r in short["operators"]] == ["sum", "down", "up"]  # up: four sets
