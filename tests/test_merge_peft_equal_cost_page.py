"""Equal numbers of resident adapters: what is said of strategies, with intervals."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from mergeprobe_fast.merge_peft.equal_cost import page, rows, summary
from mergeprobe_fast.merge_peft.equal_cost.partitions import ONE
from mergeprobe_fast.merge_peft.equal_cost.strategies import CHOICES, OURS, PLAN, REGMEAN


def made_up(kept: dict[tuple[str, int, str, str], list[float]], seed: int = 0) -> rows.Found:
    """Rows of strategies whose adapters keep so much, with errors of 0.01 shared by all."""
    rng = np.random.default_rng(seed)
    noise = {n: rng.normal(0, 0.01, summary.RESAMPLES) for n in range(50)}
    told, draws = [], []
    for (zoo, allowed, partition, operator), values in kept.items():
        for n, value in enumerate(values):
            told.append({
                "zoo": zoo, "adapters": len(values), "allowed": allowed, "partition": partition,
                "operator": operator, "resident": allowed, "total_rank": 8 * len(values),
                "member": f"m{n}", "exam": f"m{n}", "domain": "math", "group": 0,
                "group_size": len(values), "merged_with": "sum", "predicted": value + 0.1,
                "low": value, "high": value + 0.2, "ll_norm": value, "retention": value,
            })  # fmt: skip
            draws.append(np.clip(value + noise[n], -1.0, 1.2))
    return rows.Found(told, np.array(draws), {})


def record(records, **wanted):
    (found,) = [r for r in records if all(r[k] == v for k, v in wanted.items())]
    return found


def test_curves_average_over_draws_and_compare_on_the_zoos_that_both_have():
    found = summary.Measured(made_up({
        ("a", 2, OURS, PLAN): [1.0, 0.9, 0.8], ("b", 2, OURS, PLAN): [0.5, 0.5, 0.5],
        ("a", 2, "random-0", "sum"): [0.9, 0.8, 0.7], ("a", 2, "random-1", "sum"): [0.7, 0.8, -3.0],
        ("b", 2, "domain", "ties"): [0.4, 0.4, 0.4], ("a", 2, "domain", "ties"): [1.0, 1.0, 1.0],
        ("c", 2, "domain", "knots"): [0.4, 0.4, 0.4],
    }))  # fmt: skip
    records = summary.curves(found)
    r = record(records, way="random", operator="sum")
    assert r["mean"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.7 + 0.8 - 1.0) / 6)  # clipped
    assert r["worst"] == pytest.approx((0.7 - 1.0) / 2)
    assert r["below"] == pytest.approx(3 / 6)
    assert r["over_mean"] == pytest.approx(0.9 - r["mean"])
    assert r["over_worst"] == pytest.approx(0.8 - r["worst"])
    r = record(records, operator="ties")
    assert r["over_mean"] == pytest.approx((0.9 + 0.5) / 2 - (0.4 + 1.0) / 2)
    assert record(records, operator="knots")["over_mean"] is None
    ours = record(records, operator=PLAN)
    assert ours["over_mean"] == 0.0
    assert ours["over_mean_interval"] == (0.0, 0.0)


def test_differences_are_paired_so_that_what_strategies_share_cancels():
    shared = {("a", 2, OURS, PLAN): [1.0, 0.2, 0.6], ("a", 2, "domain", "sum"): [0.95, 0.15, 0.55]}
    r = record(summary.curves(summary.Measured(made_up(shared))), operator="sum")
    low, high = r["over_mean_interval"]
    assert low == pytest.approx(0.05) == high
    wide = np.ptp(r["mean_interval"])
    assert wide > 0.3  # the means themselves are not sure at all
    other = {**shared, ("a", 2, "domain", "sum"): [0.15, 0.95, 0.55]}  # the same values, exchanged
    r = record(summary.curves(summary.Measured(made_up(other))), operator="sum")
    assert np.ptp(r["over_mean_interval"]) > 0.3


def test_one_group_is_a_point_of_every_way_and_enough_must_hold_from_there_on():
    values = {1: 0.96, 2: 0.90, 3: 0.97, 5: 0.99}
    kept = {("a", k, ONE if k == 1 else "domain", "ties"): [v] * 4 for k, v in values.items()}
    records = summary.curves(summary.Measured(made_up(kept)))
    assert [r["allowed"] for r in records if r["way"] == "domain"] == [1, 2, 3, 5]
    assert [r["allowed"] for r in records if r["way"] == "random"] == [1]
    assert summary.needed([r for r in records if r["way"] == "domain"]) == 3
    low = {key: [0.5] * 4 for key in kept}
    records = summary.curves(summary.Measured(made_up(low)))
    assert summary.needed([r for r in records if r["way"] == "domain"]) is None


def test_pooled_differences_and_the_spread_of_groups_leave_one_resident_out():
    kept = {("a", 1, ONE, REGMEAN): [0.1] * 3, ("a", 1, OURS, PLAN): [0.1] * 3}
    for k, shift in ((2, 0.0), (3, 0.1)):
        for n, partition in enumerate(("random-0", "random-1", "domain", OURS)):
            kept["a", k, partition, REGMEAN] = [0.5 + shift + 0.05 * n, 0.5, 0.6]
        kept["a", k, OURS, PLAN] = [0.7 + shift, 0.4, 0.6]
    kept["a", 3, "domain", REGMEAN] = [0.9, 0.55, 0.6]
    found = summary.Measured(made_up(kept))
    over = summary.pooled(found, 3, "random", REGMEAN)
    assert over["allowed"] == [2, 3]
    assert over["over_mean"] == pytest.approx((0.2 + 0.15 + 0.2 + 0.15 - 4 * 0.1) / 12)
    assert over["over_worst"] == pytest.approx(-0.1)
    assert summary.pooled(found, 3, "domain", "ties") is None
    groups = summary.spread(found, 3, REGMEAN)
    assert groups["cases"] == 2
    assert groups["range_mean"] == pytest.approx((0.15 / 3 + (0.3 + 0.05) / 3) / 2)
    assert groups["range_worst"] == pytest.approx(0.05 / 2)
    assert (groups["first_mean"], groups["first_worst"]) == (1, 1)
    assert summary.spread(found, 3, "ties") is None


def test_regret_is_what_the_best_operator_of_each_zoo_keeps_more():
    kept = {}
    for zoo, shift in (("a", 0.0), ("b", 0.1)):
        for n, name in enumerate(CHOICES):
            kept[zoo, 1, ONE, name] = [0.5 + 0.05 * n + shift, 0.5]
        kept[zoo, 1, ONE, "knots"] = [0.2, 0.2]
        kept[zoo, 1, OURS, PLAN] = kept[zoo, 1, ONE, CHOICES[2]]
    kept["b", 1, ONE, "sum"] = [0.9, 0.4]  # best in the mean there
    kept["c", 1, OURS, PLAN] = [0.9, 0.9]  # without the others: not compared
    records = summary.choices(summary.Measured(made_up(kept)))
    ours = record(records, operator=PLAN)
    assert ours["zoos"] == ["a", "b"]
    best = [np.mean(kept["a", 1, ONE, REGMEAN]), max(np.mean(kept["b", 1, ONE, REGMEAN]), 0.65)]
    own = [np.mean(kept[z, 1, OURS, PLAN]) for z in "ab"]
    assert ours["regret_mean"] == pytest.approx(np.mean(np.subtract(best, own)))
    assert ours["regret_worst"] == pytest.approx(0.0)
    assert ours["chosen"] == {"a": "sum", "b": "sum"}  # as the rows say
    r = record(records, operator="sum")
    assert r["regret_worst"] == pytest.approx((0.0 + 0.1) / 2)
    assert r["over_worst"] == pytest.approx((0.5 + 0.5) / 2 - (0.5 + 0.4) / 2)
    assert summary.choices(summary.Measured(made_up({("a", 1, ONE, "sum"): [1.0]}))) == []


def test_foretold_counts_what_lies_in_its_interval():
    found = made_up({("a", 2, OURS, PLAN): [0.9, 0.8, 0.7]})
    found.rows[0]["low"] = 0.95
    found.rows[1]["merged_with"] = ""
    said = summary.foretold(summary.Measured(found))
    assert (said["rows"], said["intervals"], said["inside"]) == (2, 2, 1)
    assert said["error"] == pytest.approx(0.1)
    assert summary.foretold(summary.Measured(made_up({})))["rows"] == 0


def test_the_page_has_the_numbers_of_the_rows_and_a_picture_that_is_svg(tmp_path):
    kept = {}
    for k in (1, 2, 3):
        for partition in ("random-0", "random-1") if k > 1 else (ONE,):
            kept["9-0", k, partition, REGMEAN] = [0.7 + 0.1 * k] * 9
        kept["9-0", k, OURS, PLAN] = [0.76 + 0.1 * k] * 9
    found = made_up(kept)
    measured = summary.Measured(found)
    told = {"base": "a base", "items": 64, "texts": 48, "model": "shipped"}
    text = page.page(measured, [], {("9-0", 2, "domain", "fisher"): "no <gradients>"},
                     {("9-0", 1): "outside"}, told)  # fmt: skip
    assert "K = 2 by MergeProbe; 3 by regmean-48, random groups (measured at 1, 2, 3)" in text
    assert "K = 2, 3 together: +0.060 [0.060, 0.060] on average" in text
    line = next(x for x in text.splitlines() if x.startswith("| random groups | regmean-48 | 2 "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5].startswith("0.900 [")
    assert cells[10].startswith("0.060 [")
    assert "no <gradients>" in text
    assert "| 9-0 | 1 | MergeProbe |  | outside |" in text
    svg = page.picture(summary.curves(measured))
    root = ElementTree.fromstring(svg)
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "9 adapters" in words
    assert {"MergeProbe", "regmean-48, random"} <= {*words}
    rows.write(found, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == len(found.rows)
