"""Whole plans: what they say, their file, and their page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from command_line import strict_json
from planning_judges import HarmJudge, HashJudge, planted

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import Costs, Plan, make_plan
from mergeprobe_fast.planning.curve import CURVE_FLOORS
from mergeprobe_fast.planning.plan_file import to_json, to_text
from mergeprobe_fast.planning.result import PlannedAdapter
from mergeprobe_fast.report.plan import write_plan
from mergeprobe_fast.report.plan_page import render_plan

NO_INPUTS = {"reweight": "a calibration", "prune": "a calibration", "regmean": "a calibration"}


def adapters(names):
    return [PlannedAdapter(n, f"zoo/{n}") for n in names]


def planned(judge, costs=None, **options) -> Plan:
    return make_plan(judge, adapters(judge.names), costs or Costs(), **options)


@pytest.fixture
def plan() -> Plan:
    """a and b get along, c is hurt by both, d by all and hurts all."""
    harm = np.full((4, 4), 0.5)
    harm[0, 1] = harm[1, 0] = 0.02
    harm[2, [0, 1]], harm[[0, 1], 2] = 0.06, 0.01
    return planned(HarmJudge("abcd", harm, unavailable=NO_INPUTS), base_model="test/base")


def test_a_plan_says_what_is_merged_what_is_kept_and_what_it_costs(plan):
    assert [(g.name, g.members, g.action, g.method) for g in plan.groups] == [
        ("merged-1", ("a", "b"), "merge", "linear"), ("c", ("c",), "route", None),
        ("d", ("d",), "route", None),
    ]  # fmt: skip
    merged = plan.groups[0]
    assert merged.weights == (0.5, 0.5) and merged.retention == pytest.approx((0.98, 0.98))
    assert merged.cost == pytest.approx(1 + 0.02 * 4 + 0.02 * 2)
    assert plan.cost == pytest.approx(2 + merged.cost) and plan.routed_cost == 4
    assert plan.one_sum.worst == pytest.approx(-0.5) and plan.one_sum.allowed is False
    assert plan.proven and plan.decided and plan.outcome.resident == 3
    assert plan.notes == ("reweight, prune and regmean: not available without a calibration",)


def test_reasons_name_the_group_an_adapter_fits_best_and_who_would_be_hurt(plan):
    assert plan.groups[1].reasons == (
        "fits merged-1 best; merge: c would keep 88.0 % (floor 90.0 %)",
    )
    assert "d would keep" in plan.groups[2].reasons[0] or "would keep" in plan.groups[2].reasons[0]
    assert plan.groups[0].reasons[0] == (
        "2 adapters merged as they are: 98.0 % kept on average, 98.0 % at worst (a), "
        "93.0 % to 101.0 %"
    )


def test_an_adapter_that_could_join_but_does_not_pay_is_told_so():
    harm = np.full((2, 2), 0.05)
    plan = planned(HarmJudge("ab", harm, unavailable=NO_INPUTS), Costs(average=1.0))
    assert [g.action for g in plan.groups] == ["route", "route"]
    assert plan.groups[0].reasons[0].startswith("fits b best, where 95.0 % would be kept at worst")


def test_a_predictor_that_abstains_everywhere_decides_nothing():
    class Abstains(HarmJudge):
        def outside(self, members, action):
            return np.ones(members.shape, bool)

    plan = planned(Abstains("abc", np.zeros((3, 3))))
    assert not plan.decided and not plan.merged
    assert "no prediction for any group" in plan.groups[0].reasons[0]
    assert planned(HarmJudge("abc", np.ones((3, 3)))).decided


@pytest.mark.parametrize("n", [4, 20])
def test_a_plan_of_costly_actions_alone_is_a_plan(rng, n):
    judge = HarmJudge([f"a{i}" for i in range(n)], np.full((n, n), 0.001))
    plan = planned(judge, actions=("regmean", "route"))
    assert plan.decided and len(plan.groups) == 1 and plan.groups[0].action == "regmean"
    assert plan.groups[0].weights is not None or plan.groups[0].method == "regmean"
    assert plan.one_sum is None and {a for a, _ in judge.seen} == {"regmean"}


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_any_plan_comes_back_from_its_file(tmp_path, rng, n):
    names = [f"a/{i} \u00fc+\"'" for i in range(n)]
    plan = planned(HarmJudge(names, planted(n, 5, rng)[0] if n else np.zeros((0, 0))),
                   Costs(traffic={x: 1.0 for x in names}))  # fmt: skip
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path)
    assert to_text(again) == to_text(plan) == (tmp_path / "plan.json").read_text("utf-8")
    assert again.groups == plan.groups and again.costs == plan.costs and again.curve == plan.curve
    with pytest.raises(InputError, match="exists"):
        plan.save(tmp_path / "plan.json")


def test_the_same_plan_is_the_same_bytes(rng):
    seed = int(rng.integers(1 << 30))
    texts = {to_text(planned(HashJudge([f"a{i}" for i in range(9)], seed))) for _ in range(2)}
    assert len(texts) == 1


def put(value, *keys):
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        if value is ...:
            del raw[keys[-1]]
        else:
            raw[keys[-1]] = value

    return change


MALFORMED = {
    "other format": (put("plan", "format"), "format: is not 'mergeprobe-plan'"),
    "newer": (put(3, "version"), "version: is 3, this program reads 2"),
    "unknown key": (put(1, "extra"), "extra: is not a field"),
    "no groups": (put(..., "groups"), "groups: is missing"),
    "groups of words": (put("all", "groups"), "groups: is not a list"),
    "unknown action": (put("drop", "groups", 0, "action"), "groups[0].action: is none of"),
    "unknown method": (put("mege", "groups", 0, "method"), "groups[0].method: is no merge method"),
    "route of two": (put("route", "groups", 0, "action"), "groups[0].members: 2 adapters"),
    "merge of one": (put("merge", "groups", 1, "action"), "groups[1].members: one adapter"),
    "method of one": (put("linear", "groups", 1, "method"), "groups[1].method: nothing is merged"),
    "too few weights": (put([1.0], "groups", 0, "weights"), "groups[0].weights: has 1 numbers"),
    "weight of text": (put(["1", 1], "groups", 0, "weights"), "groups[0].weights[0]: is not a fin"),
    "member twice": (put(["a"], "groups", 1, "members"), "groups[1].members: 'a' is in two groups"),
    "strange member": (put(["x"], "groups", 1, "members"), "groups[1].members: 'x' is no adapter"),
    "member missing": (lambda raw: raw["groups"].pop(), "groups: 'd' is in none"),
    "same name": (put("c", "groups", 2, "name"), "groups[2].name: 'c' is another group's"),
    "adapter twice": (put("a", "adapters", 1, "name"), "adapters: has a name twice"),
    "cost": (put(99.0, "cost"), "cost: is 99.0, and the groups cost"),
    "negative cost": (put(-1.0, "costs", "adapter"), "costs.adapter: is negative"),
    "floor": (put(3.0, "costs", "floor"), "costs: must be at most 1"),
    "floor_on": (put("top", "costs", "floor_on"), "costs: must be prediction or low"),
    "proven of words": (put("yes", "proven"), "proven: is neither true nor false"),
    "curve": (put([{}], "curve"), "curve[0].resident: is missing"),
}


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_plan_is_one_error_with_file_and_key(tmp_path, plan, how):
    change, said = MALFORMED[how]
    raw = copy.deepcopy(json.loads(to_text(plan)))
    change(raw)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "format": 2}', '{"cost": NaN}'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("n", [9, 30])
def test_the_curve_goes_from_all_resident_to_one_sum_and_lower_floors_cost_less(rng, n):
    harm = rng.exponential(0.04, (n, n))
    plan = planned(HarmJudge([f"a{i}" for i in range(n)], harm, unavailable=NO_INPUTS))
    first, *middle, last = plan.curve
    assert (first.resident, first.average, first.cost) == (n, 1.0, float(n))
    assert (last.resident, last.worst) == (1, plan.one_sum.worst)
    assert [o.floor for o in middle] == sorted({*CURVE_FLOORS, 0.9}, reverse=True)
    assert all(a.cost >= b.cost - 1e-5 for a, b in pairwise(middle))
    assert all(o.worst >= o.floor for o in middle)
    mine = next(o for o in middle if o.floor == 0.9)
    assert (mine.resident, mine.cost) == (len(plan.groups), pytest.approx(plan.cost))


def test_the_table_of_pairs_has_both_sides_in_the_order_of_the_zoo(rng):
    names = ["b", "a", "c"]
    harm = np.arange(9).reshape(3, 3) / 100
    pairs = planned(HarmJudge(names, harm, unavailable=NO_INPUTS)).pairs
    np.fill_diagonal(harm, np.nan)
    np.testing.assert_allclose(pairs.matrix("retention_a"), 1 - harm)
    assert list(pairs["a"]) == ["b", "b", "a"] and list(pairs["action"]) == ["merge"] * 3


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("n", [0, 1, 7, 60])
def test_the_page_needs_nothing_else_and_runs_no_script(rng, n):
    names = [f"<script>{i}\u202e & \n" for i in range(n)]
    harm = planted(n, 3, rng, across=0.05)[0] if n else np.zeros((0, 0))
    page = render_plan(planned(HarmJudge(names, harm)), "mergeprobe-fast plan <zoo>")
    page.encode("ascii")
    tags = Page(page).tags
    assert not {"script", "link", "iframe"} & {t for t, _ in tags}
    assert all(v.startswith("data:") for _, a in tags for k, v in a.items() if k in ("src", "href"))
    assert not re.search(r"https?://", page)
    assert ("img" in dict(tags)) == (n > 40) and ("svg" in dict(tags)) == (n > 1)
    assert "default-src 'none'" in page and "\u202e" not in page


def test_the_files_of_a_plan(tmp_path, plan):
    import pyarrow.parquet

    said = write_plan(tmp_path, plan, "mergeprobe-fast plan zoo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.parquet", "plan.html", "plan.json"]
    assert strict_json((tmp_path / "plan.json").read_text()) == said == to_json(plan)
    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet")
    assert table.num_rows == 6 and "retention_a" in table.column_names
