"""Planners against every partition there is, and what must hold of any plan."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from planning_judges import HarmJudge, HashJudge, dense_cost, partitions, planted

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import ACTIONS, Costs, partition
from mergeprobe_fast.planning.book import Book, Exhausted
from mergeprobe_fast.planning.exact import best_partition
from mergeprobe_fast.planning.search import Search

# Half a billionth a group, and the millionths of losses that decide between equal costs.
SLACK = 1e-5
ALL = ("merge", "reweight", "prune", "regmean")
NO_INPUTS = {"reweight": "a calibration", "prune": "a calibration", "regmean": "a calibration"}


def made(n: int) -> list[str]:
    return [f"a{i}" for i in range(n)]


def brute_force(judge, costs, actions=ALL) -> float:
    own = type(judge).__new__(type(judge))
    own.__dict__ = dict(judge.__dict__)
    return min(dense_cost(own, g, costs, actions) for g in partitions(range(len(judge.names))))


@pytest.mark.parametrize("steps", [0, 3], ids=["no ties", "many ties"])
@pytest.mark.parametrize("floor_on", ["prediction", "low"])
@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_a_small_zoo_gets_the_cheapest_of_all_partitions(rng, n, steps, floor_on):
    for _ in range(4 if n < 7 else 1):
        costs = Costs(
            adapter=rng.uniform(0, 1.5), request=rng.uniform(0, 2), average=rng.uniform(0, 0.05),
            worst=rng.uniform(0, 0.05), floor=rng.uniform(0.7, 0.9), floor_on=floor_on,
            traffic=dict(zip(made(n), rng.uniform(0.1, 1, n), strict=True)),
        )  # fmt: skip
        judge = HashJudge(made(n), int(rng.integers(1 << 30)), steps=steps)
        found = partition(judge, judge.names, costs, costly=10_000)
        assert found.proven
        assert found.cost == pytest.approx(brute_force(judge, costs), abs=SLACK)


@pytest.mark.parametrize("missing", [("reweight",), ("prune", "regmean"), ALL[1:]])
def test_actions_that_are_not_allowed_or_not_available_are_not_asked_for(rng, missing):
    seed = int(rng.integers(1 << 30))
    left = [a for a in ALL if a not in missing]
    judge = HashJudge(made(6), seed, unavailable={a: "a calibration" for a in missing})
    by_lack = partition(judge, judge.names, costly=10_000)
    judge = HashJudge(made(6), seed)
    by_choice = partition(judge, judge.names, actions=[*left, "route"], costly=10_000)
    assert by_lack.cost == by_choice.cost == pytest.approx(brute_force(judge, Costs(), left),
                                                           abs=SLACK)  # fmt: skip
    assert {action for action, _ in judge.seen} <= set(left)


def test_costly_actions_are_asked_only_where_they_could_matter(rng):
    judge = HarmJudge(made(8), np.full((8, 8), 0.2), better={"regmean": 0.001, "prune": 1.0})
    found = partition(judge, judge.names, costly=10_000)
    assert found.groups == [tuple(range(8))] and found.verdicts[0].action == "regmean"
    assert found.book.asked["regmean"] == 1 < found.book.asked["merge"]


def test_without_leave_to_ask_more_the_best_known_partition_is_not_called_proven():
    judge = HarmJudge(made(6), np.full((6, 6), 0.2), better={"regmean": 0.001})
    found = partition(judge, judge.names, costly=0)
    assert not found.proven and len(found.groups) == 6 and found.book.asked["regmean"] == 0


def test_a_set_may_be_allowed_where_its_subsets_are_not():
    class Whole(HarmJudge):
        def retention(self, members, action):
            full = np.count_nonzero(members >= 0, axis=1) == 5
            return np.where(full[:, None], 0.99, 0.1) * np.ones(members.shape)

    for exact_up_to in (12, 0):
        judge = Whole(made(5), np.zeros((5, 5)), unavailable=NO_INPUTS)
        found = partition(judge, judge.names, exact_up_to=exact_up_to)
        assert found.groups == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize("exact_up_to", [12, 0], ids=["exact", "search"])
@pytest.mark.parametrize("n", [4, 9])
def test_the_plan_does_not_depend_on_the_order_of_the_adapters(rng, n, exact_up_to):
    seed = int(rng.integers(1 << 30))
    plans = []
    for _ in range(3):
        names = rng.permutation(made(n)).tolist()
        judge = HashJudge(names, seed, steps=4)
        found = partition(judge, names, exact_up_to=exact_up_to)
        named = {tuple(sorted(names[i] for i in g)): v and v.action
                 for g, v in zip(found.groups, found.verdicts, strict=True)}  # fmt: skip
        plans.append((named, found.cost))
    assert plans[0][0] == plans[1][0] == plans[2][0]
    assert plans[0][1] == pytest.approx(plans[1][1], rel=1e-12)


@pytest.mark.parametrize("floor_on", ["prediction", "low"])
@pytest.mark.parametrize("n", [6, 40])
def test_no_member_of_a_merged_group_is_below_the_floor(rng, n, floor_on):
    harm = rng.exponential(0.05, (n, n))
    costs = Costs(floor=0.85, floor_on=floor_on)
    judge = HarmJudge(made(n), harm, better={"regmean": 0.5})
    found = partition(judge, judge.names, costs)
    assert sorted(i for g in found.groups for i in g) == list(range(n))
    assert any(v is not None for v in found.verdicts)
    for group, verdict in zip(found.groups, found.verdicts, strict=True):
        if verdict is None:
            assert len(group) == 1
            continue
        row = np.array([group], np.int32)
        kept = judge.retention(row, verdict.action)[0]
        # The judge was given the members by name: a sum in another order.
        np.testing.assert_allclose(kept, verdict.retention, rtol=1e-12)
        assert (kept - (0.05 if floor_on == "low" else 0) >= 0.85 - 1e-12).all()
    assert found.cost == pytest.approx(
        sum(dense_cost(judge, [g], costs, ALL if len(g) == 1 else (v.action,))
            for g, v in zip(found.groups, found.verdicts, strict=True))
    )  # fmt: skip


def test_a_lower_floor_never_costs_more(rng):
    seed = int(rng.integers(1 << 30))
    cost = [
        partition(HashJudge(made(7), seed), made(7), Costs(floor=f), costly=10_000).cost
        for f in (0.98, 0.95, 0.9, 0.8, 0.5)
    ]
    assert all(a >= b - SLACK for a, b in pairwise(cost))


def test_members_of_whom_nothing_is_predicted_are_never_merged(rng):
    class Abstains(HarmJudge):
        def outside(self, members, action):
            return members == 2

    class Unknown(HarmJudge):
        def retention(self, members, action):
            return np.where(members == 2, np.nan, super().retention(members, action))

    for kind in (Abstains, Unknown):
        for exact_up_to in (12, 0):
            judge = kind(made(6), np.zeros((6, 6)), unavailable=NO_INPUTS)
            found = partition(judge, judge.names, exact_up_to=exact_up_to)
            assert found.groups == [(0, 1, 3, 4, 5), (2,)]


@pytest.mark.parametrize("exact_up_to", [12, 0], ids=["exact", "search"])
def test_the_smallest_zoos(exact_up_to):
    for n in (0, 1):
        judge = HarmJudge(made(n), np.zeros((n, n)))
        found = partition(judge, judge.names, exact_up_to=exact_up_to)
        assert found.groups == [(0,)][:n] and found.cost == n and judge.calls == 0
        assert found.proven


@pytest.mark.parametrize("n", [5, 30])
def test_all_conflict_and_none_conflicts(n):
    judge = HarmJudge(made(n), np.ones((n, n)), unavailable=NO_INPUTS)
    found = partition(judge, judge.names)
    assert found.groups == [(i,) for i in range(n)] and found.cost == n
    judge = HarmJudge(made(n), np.zeros((n, n)))
    found = partition(judge, judge.names)
    assert found.groups == [tuple(range(n))] and found.cost == 1 and found.proven


def test_duplicates_are_merged_and_the_rest_is_not():
    harm = np.ones((6, 6))
    harm[np.ix_([0, 3], [0, 3])] = harm[np.ix_([1, 2, 5], [1, 2, 5])] = 0
    judge = HarmJudge(made(6), harm, unavailable=NO_INPUTS)
    assert partition(judge, judge.names).groups == [(1, 2, 5), (0, 3), (4,)]


@pytest.mark.parametrize("n", [30, 80])
def test_families_that_get_along_are_found_in_a_large_zoo(rng, n):
    harm, family = planted(n, 6, rng, within=0.0005)  # so little that no family pays for two
    judge = HarmJudge(made(n), harm, unavailable=NO_INPUTS)
    found = partition(judge, judge.names)
    want = [tuple(np.flatnonzero(family == f).tolist()) for f in range(6)]
    assert sorted(found.groups) == sorted(g for g in want if g)


def test_the_search_comes_near_the_best_there_is(rng):
    excess = []
    for _ in range(6):
        harm = rng.exponential(0.03, (8, 8)) * rng.uniform(0.2, 1.8, 8)
        judge = HarmJudge(made(8), harm, unavailable=NO_INPUTS)
        found = partition(judge, judge.names, exact_up_to=0)
        best = brute_force(judge, Costs(), ("merge",))
        assert found.cost >= best - SLACK  # no partition is cheaper than the cheapest
        excess.append(found.cost - best)
    assert np.mean(excess) < 0.25  # of an adapter; in the mean of many zoos it is 0.02


def test_a_large_zoo_asks_no_more_than_it_may_and_says_so_as_it_goes(rng):
    harm = rng.exponential(0.05, (60, 60))
    judge = HarmJudge(made(60), harm, unavailable=NO_INPUTS)
    told = []
    found = partition(judge, judge.names, effort=5_000, progress=told.append)
    assert judge.cells <= 5_000 + 2 * 60 * 59
    assert told[-1].judged == judge.cells and told[-1].cost >= found.cost - SLACK
    assert all(a.cost >= b.cost for a, b in pairwise(told))
    more = partition(HarmJudge(made(60), harm, unavailable=NO_INPUTS), made(60))
    assert more.cost <= found.cost + SLACK


def test_costly_actions_help_a_large_zoo_within_their_own_limit(rng):
    harm, _ = planted(30, 3, rng, within=0.02, across=0.2)
    cheap = HarmJudge(made(30), harm, unavailable=NO_INPUTS)
    judge = HarmJudge(made(30), harm, better={"regmean": 0.01})
    without, found = partition(cheap, made(30)), partition(judge, made(30), costly=40)
    assert found.cost < without.cost and found.groups == [tuple(range(30))]
    assert found.book.asked["regmean"] + found.book.asked["prune"] <= 40


def test_an_interrupt_leaves_the_planner_at_once(rng):
    judge = HarmJudge(made(30), rng.exponential(0.05, (30, 30)), unavailable=NO_INPUTS)

    def stop(progress):
        if progress.judged:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partition(judge, judge.names, progress=stop)
    assert judge.calls == 1


def test_other_costs_use_what_was_judged_before(rng):
    judge = HashJudge(made(6), 5)
    first = partition(judge, judge.names, Costs(floor=0.9))
    cells = judge.cells
    again = partition(judge, judge.names, Costs(floor=0.8), known=first, costly=0)
    assert judge.cells == cells
    fresh = partition(HashJudge(made(6), 5), made(6), Costs(floor=0.8), costly=0)
    assert again.cost <= fresh.cost + SLACK


def test_an_unknown_action_and_too_many_adapters_are_refused():
    with pytest.raises(InputError, match="no action 'mege'; there are: merge, reweight"):
        partition(HarmJudge(made(2), np.zeros((2, 2))), made(2), actions=["mege"])
    with pytest.raises(InputError, match="has 1001 adapters"):
        partition(HarmJudge([], np.zeros((0, 0))), made(1001))
    assert ACTIONS[-1] == "route"


def test_a_planner_that_would_ask_twice_is_found_out():
    judge = HarmJudge(made(3), np.zeros((3, 3)))
    judge.judge(np.array([[0, 1]], np.int32), "merge")
    with pytest.raises(AssertionError, match="twice"):
        judge.judge(np.array([[1, 0]], np.int32), "merge")


def test_the_brute_force_finds_out_a_wrong_optimum(rng):
    judge = HashJudge(made(5), 1)
    costs = Costs(floor=0.8)
    book = Book(judge, costs, np.arange(5), costs.shares(judge.names), ("merge",))
    book.ask([tuple(range(5))])
    best, _ = best_partition(book, 5)
    worse = next(g for g in partitions(range(5)) if sorted(g) != sorted(best))
    dense = HashJudge(made(5), 1)
    assert dense_cost(dense, worse, costs, ("merge",)) > dense_cost(dense, best, costs, ("merge",))
    book.effort = 1
    with pytest.raises(Exhausted):
        Book(HashJudge(made(5), 2), costs, np.arange(5), book.shares, ("merge",), effort=1).ask(
            [(0, 1)]
        )


def test_asking_for_many_groups_at_once_changes_no_plan(rng, monkeypatch):
    harm = rng.exponential(0.04, (40, 40))
    judge = HarmJudge(made(40), harm, unavailable=NO_INPUTS)
    found = partition(judge, judge.names, effort=10**7)
    monkeypatch.setattr(Search, "_foresee", lambda *_: None)
    slow = HarmJudge(made(40), harm, unavailable=NO_INPUTS)
    same = partition(slow, slow.names, effort=10**7)
    assert (same.groups, same.cost) == (found.groups, found.cost)
    assert slow.seen <= judge.seen and judge.calls < slow.calls


def test_a_book_forgets_a_price_that_another_book_of_the_same_judge_changes():
    judge = HarmJudge(made(3), np.full((3, 3), 0.08), better={"regmean": 0.1})
    shares = np.full(3, 1 / 3)
    book = Book(judge, Costs(), np.arange(3), shares, ("merge", "regmean"), costly=9)
    other = book.with_costs(Costs(floor=0.5), effort=None, costly=9)
    book.ask([(0, 1)])
    before = other.price((0, 1))
    book.ask([(0, 1)], ["regmean"])
    fresh = book.with_costs(Costs(floor=0.5), effort=None, costly=9)
    assert other.price((0, 1)) == fresh.price((0, 1)) < before
    other._best_of[0, 1] = before, "merge"  # a fault: it was not forgotten
    assert other.price((0, 1)) != fresh.price((0, 1))
