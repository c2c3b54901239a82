"""Plans of at most so many resident adapters, against every partition there is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planning_judges import HarmJudge, HashJudge, dense_cost, partitions, planted

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import Costs, Plan, make_plan, partition
from mergeprobe_fast.planning.plan_file import to_text
from mergeprobe_fast.planning.result import PlannedAdapter
from mergeprobe_fast.report.plan import certainty, headline
from mergeprobe_fast.report.plan_page import render_plan

ALL = ("merge", "reweight", "prune", "regmean")
NO_INPUTS = dict.fromkeys(ALL[1:], "a calibration")
SLACK = 1e-5


def made(n: int) -> list[str]:
    return [f"a{i}" for i in range(n)]


def kept_at_worst(judge, groups, actions, floor_on="prediction", anything=False) -> float:
    """By definition: of every group the action that leaves its worst member most; 1 of one."""
    least = 1.0
    for group in groups:
        if len(group) < 2:
            continue
        row = np.array([group], np.int32)
        most = -math.inf
        for action in actions:
            kept = judge.retention(row, action)[0]
            if judge.outside(row, action).any() and not anything:
                continue
            most = max(most, float(kept.min()) - (0.05 if floor_on == "low" else 0.0))
        least = min(least, most)
    return least


def brute_force(judge, k, costs, actions=ALL) -> tuple[float, float]:
    """What the worst member keeps at most in k groups or fewer, and what that costs at least."""
    few = [g for g in partitions(range(len(judge.names))) if len(g) <= k]
    kept = [kept_at_worst(judge, g, actions, costs.floor_on, costs.floor == 0) for g in few]
    best = max(kept)
    floored = Costs(**{**costs.as_json(), "floor": max(best - 1e-12, 0.0)})
    return best, min(dense_cost(judge, g, floored, actions) for g in few)


@pytest.mark.parametrize("steps", [0, 3], ids=["no ties", "many ties"])
@pytest.mark.parametrize("floor_on", ["prediction", "low"])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_a_small_zoo_gets_what_keeps_most_and_of_equals_the_cheapest(rng, n, steps, floor_on):
    for k in range(1, n + 1):
        judge = HashJudge(made(n), int(rng.integers(1 << 30)), steps=steps, low=0.3)
        costs = Costs(
            adapter=rng.uniform(0, 1.5), request=rng.uniform(0, 2), average=rng.uniform(0, 0.05),
            worst=rng.uniform(0, 0.05), floor_on=floor_on,
            traffic=dict(zip(made(n), rng.uniform(0.1, 1, n), strict=True)),
        )  # fmt: skip
        found = partition(judge, judge.names, costs, resident=k, costly=10_000)
        assert found.proven and len(found.groups) <= k
        best, cost = brute_force(judge, k, costs)
        kept = kept_at_worst(judge, found.groups, ALL, floor_on)
        assert kept == pytest.approx(best, abs=1e-12)
        assert found.book.floor == pytest.approx(best, abs=1e-12)
        assert found.cost == pytest.approx(cost, abs=SLACK)


@pytest.mark.parametrize("floor", [0.5, 0.7, 0.85])
def test_with_a_floor_too_it_is_the_cheapest_or_says_what_the_least_is(rng, floor):
    refused = 0
    for _ in range(12):
        judge = HashJudge(made(5), int(rng.integers(1 << 30)), low=0.0)
        costs = Costs(floor=floor)
        every = [(len(g), dense_cost(judge, g, costs, ALL)) for g in partitions(range(5))]
        k = int(rng.integers(1, 5))
        best = min(cost for size, cost in every if size <= k)
        if math.isfinite(best):
            found = partition(judge, judge.names, costs, resident=k, costly=10_000)
            assert found.proven and len(found.groups) <= k
            assert found.cost == pytest.approx(best, abs=SLACK)
            continue
        refused += 1
        least = min(size for size, cost in every if math.isfinite(cost))
        with pytest.raises(InputError, match=f"no plan with {k} or fewer: a.*the least is {least}"):
            partition(judge, judge.names, costs, resident=k, costly=10_000)
    assert floor < 0.7 or refused


def test_what_the_predictor_abstains_from_is_no_plan_unless_the_floor_is_0():
    class Abstains(HarmJudge):
        def outside(self, members, action):
            return (members == 2) | (members == 5)

    for exact_up_to in (12, 0):
        judge = Abstains(made(6), np.full((6, 6), 0.02), unavailable=NO_INPUTS)
        with pytest.raises(InputError) as error:
            partition(judge, judge.names, resident=2, exact_up_to=exact_up_to)
        assert error.value.key == "resident"
        is_least = "is 3" if exact_up_to else "that was found is 3"
        assert error.value.reason == (
            f"no plan with 2 or fewer: no prediction for {hit_of(error)} in the best of them, "
            f"outside what the model has seen; the least {is_least}; a floor of 0 takes "
            "predictions as they are"
        )
        judge = Abstains(made(6), np.full((6, 6), 0.02), unavailable=NO_INPUTS)
        found = partition(judge, judge.names, resident=3, exact_up_to=exact_up_to)
        assert found.groups == [(0, 1, 3, 4), (2,), (5,)]
        judge = Abstains(made(6), np.full((6, 6), 0.02), unavailable=NO_INPUTS)
        found = partition(judge, judge.names, Costs(floor=0), resident=2, exact_up_to=exact_up_to)
        assert sorted(map(len, found.groups)) == [3, 3]


def hit_of(error) -> str:
    return error.value.reason.split("prediction for ")[1].split(" in the best")[0]


def test_what_is_not_a_number_is_never_planned_with():
    class Unknown(HarmJudge):
        def retention(self, members, action):
            return np.where(members == 0, np.nan, super().retention(members, action))

    for floor in (None, 0):
        judge = Unknown(made(4), np.zeros((4, 4)), unavailable=NO_INPUTS)
        with pytest.raises(InputError, match=r"a0 .*a value is undefined; the least is 2"):
            partition(judge, judge.names, Costs(floor=floor), resident=1)


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_the_search_comes_near_what_can_be_kept(rng, k):
    short = []
    for _ in range(5):
        harm = rng.exponential(0.03, (8, 8)) * rng.uniform(0.2, 1.8, 8)
        judge = HarmJudge(made(8), harm, unavailable=NO_INPUTS)
        found = partition(judge, judge.names, exact_up_to=0, resident=k)
        best, _ = brute_force(judge, k, Costs(), ("merge",))
        assert len(found.groups) <= k
        kept = kept_at_worst(judge, found.groups, ("merge",))
        assert kept == pytest.approx(found.book.floor) and kept <= best + 1e-12
        short.append(best - kept)
    assert np.mean(short) < 0.01  # of retention


def test_families_that_get_along_are_found_in_a_large_zoo(rng):
    harm, family = planted(60, 5, rng)
    judge = HarmJudge(made(60), harm, unavailable=NO_INPUTS)
    found = partition(judge, judge.names, resident=5)
    want = [tuple(np.flatnonzero(family == f).tolist()) for f in range(5)]
    assert sorted(found.groups) == sorted(g for g in want if g)


@pytest.mark.parametrize("n", [9, 30])
def test_costly_actions_are_asked_for_the_groups_of_the_plan(rng, n):
    """No sum of many keeps anything, and RegMean does where it is asked."""
    harm, _ = planted(n, 4, rng, within=0.02, across=0.9)
    judge = HarmJudge(made(n), harm, better={"regmean": 0.01, "prune": 0.9})
    found = partition(judge, judge.names, resident=3, costly=40)
    assert {v.action for v in found.verdicts if v} == {"regmean"} and len(found.groups) <= 3
    assert found.book.floor > 0.9
    asked = found.book.asked
    assert asked["regmean"] + asked["prune"] <= 40


def test_costly_actions_choose_the_shape_too():
    """Sums want {0, 1}, {2, 3}; RegMean keeps all of {0, 2}, {1, 3}, and is asked for that."""

    class Crossed(HarmJudge):
        def retention(self, members, action):
            out = np.full(members.shape, 0.1)
            for row, own in zip(out, members, strict=True):
                group = tuple(own[own >= 0].tolist())
                if action == "merge" and group in ((0, 1), (2, 3)):
                    row[:] = 0.6
                if action == "regmean" and group in ((0, 2), (1, 3)):
                    row[:] = 0.95
            return out

    lack = {"reweight": "x", "prune": "x"}
    for exact_up_to in (12, 0):
        judge = Crossed(made(4), np.zeros((4, 4)), unavailable=lack)
        found = partition(judge, judge.names, resident=2, exact_up_to=exact_up_to)
        assert found.book.floor == (0.95 if exact_up_to else pytest.approx(found.book.floor))
        assert not exact_up_to or found.groups == [(0, 2), (1, 3)]


@pytest.mark.parametrize("n", [3, 15])
def test_as_many_as_there_are_need_no_merge(rng, n):
    judge = HarmJudge(made(n), np.full((n, n), 0.5), unavailable=NO_INPUTS)
    for k in (n, n + 5):
        judge = HarmJudge(made(n), np.full((n, n), 0.5), unavailable=NO_INPUTS)
        found = partition(judge, judge.names, resident=k)
        assert found.groups == [(i,) for i in range(n)] and found.book.floor == 1.0


@pytest.mark.parametrize("n", [8, 20])
def test_a_floor_that_few_keep_anyway_is_the_plan_without_a_limit(rng, n):
    harm, _ = planted(n, 2, rng, within=0.001)
    free = partition(HarmJudge(made(n), harm), made(n), Costs(floor=0.9))
    few = partition(HarmJudge(made(n), harm), made(n), Costs(floor=0.9), resident=n - 1)
    assert few.groups == free.groups and few.cost == free.cost


def test_more_residents_never_keep_less(rng):
    seed = int(rng.integers(1 << 30))
    kept = [partition(HashJudge(made(7), seed, low=0.0), made(7), resident=k, costly=10_000)
            .book.floor for k in range(1, 8)]  # fmt: skip
    assert kept == sorted(kept) and kept[-1] == 1.0


def test_what_was_judged_before_is_not_asked_again(rng):
    judge = HarmJudge(made(20), rng.exponential(0.05, (20, 20)), unavailable=NO_INPUTS)
    first = partition(judge, judge.names)
    # The judge fails when asked twice.
    again = partition(judge, judge.names, resident=4, known=first)
    assert len(again.groups) <= 4


def test_far_more_than_there_are_takes_no_memory():
    judge = HarmJudge(made(4), np.full((4, 4), 0.5), unavailable=NO_INPUTS)
    assert len(partition(judge, judge.names, resident=10**12).groups) == 4


def test_the_least_that_is_said_to_be_is(rng):
    found = 0
    for _ in range(20):
        judge = HashJudge(made(5), int(rng.integers(1 << 30)), low=0.0)
        costs = Costs(floor=0.85)
        kept = [g for g in partitions(range(5)) if math.isfinite(dense_cost(judge, g, costs, ALL))]
        least = min(map(len, kept))
        try:
            partition(judge, judge.names, costs, resident=1, costly=12)
        except InputError as error:
            said = error.reason.split("; ")[1]
            if said.startswith("the least is"):
                assert said == f"the least is {least}"
            else:  # not all merges could be tried
                assert int(said.removeprefix("the least that was found is ")) >= least
                found += 1
    assert found


@pytest.mark.parametrize("exact_up_to", [12, 0])
def test_a_limit_that_does_not_bind_leaves_no_question_unasked(rng, exact_up_to):
    unproven = 0
    for _ in range(8):
        judge = HashJudge(made(8), int(rng.integers(1 << 30)), low=0.0)
        found = partition(judge, judge.names, Costs(floor=0.6), costly=20, resident=8,
                          exact_up_to=exact_up_to)  # fmt: skip
        if not found.proven:
            unproven += 1
            assert found.book.asked["prune"] + found.book.asked["regmean"] > 10
    assert unproven


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_a_number_of_residents_that_is_none_is_refused(k):
    with pytest.raises(InputError, match="resident: must be a positive integer"):
        partition(HarmJudge(made(2), np.zeros((2, 2))), made(2), resident=k)


@pytest.mark.parametrize("floor", [None, 0, 0.3])
@pytest.mark.parametrize("n", [7, 16])
def test_a_plan_with_a_limit_comes_back_from_its_file_and_says_so(tmp_path, rng, n, floor):
    judge = HarmJudge(made(n), rng.exponential(0.04, (n, n)), unavailable=NO_INPUTS)
    adapters = [PlannedAdapter(name, f"zoo/{name}") for name in judge.names]
    plan = make_plan(judge, adapters, Costs(floor=floor), resident=3)
    assert plan.resident == 3 and plan.highest == (not floor) and len(plan.groups) <= 3
    assert plan.costs.floor == (plan.outcome.worst if floor is None else floor)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path)
    assert to_text(again) == to_text(plan) and again.groups == plan.groups
    assert "resident of at most 3" in headline(plan)
    best = "keeps more at worst" if plan.highest else "costs less"
    said = f"no other plan of 3 adapters or fewer {best}" if n == 7 else "of 3 adapters or fewer, "
    assert said in certainty(plan)
    page = render_plan(plan, "plan")
    assert "At most 3 adapters were to be resident" in page and 'class="limit"' in page
    assert page.count('class="here"') == 2
    raw = (tmp_path / "plan.json").read_text().replace('"resident": 3,', '"resident": 1,', 1)
    (tmp_path / "plan.json").write_text(raw)
    if len(plan.groups) > 1:
        with pytest.raises(InputError, match="resident: is 1, and there are"):
            Plan.load(tmp_path)


def test_the_same_limit_gives_the_same_bytes(rng):
    harm = rng.exponential(0.05, (25, 25))
    texts = set()
    for _ in range(2):
        judge = HarmJudge(made(25), harm, unavailable=NO_INPUTS)
        adapters = [PlannedAdapter(name, name) for name in judge.names]
        texts.add(to_text(make_plan(judge, adapters, Costs(), resident=6)))
    assert len(texts) == 1
