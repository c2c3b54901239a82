"""What to do with one set: by cost, and by the deterministic rule of the catalogue."""

from __future__ import annotations

import numpy as np
import pytest
from planning_judges import HarmJudge, HashJudge, dense_cost

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import ACTIONS, Costs, decide

NAMES = ["a", "b", "c", "d"]
ALL = ("merge", "reweight", "prune", "regmean")


def test_the_cheapest_action_is_taken_as_a_dense_comparison_finds_it(rng):
    for _ in range(20):
        seed = int(rng.integers(1 << 30))
        costs = Costs(floor=rng.uniform(0.75, 0.95), worst=rng.uniform(0, 0.2))
        found = decide(HashJudge(NAMES, seed), (0, 2, 3), costs, names=NAMES)
        each = {a: dense_cost(HashJudge(NAMES, seed), [(0, 2, 3)], costs, (a,)) for a in ALL}
        each["route"] = dense_cost(HashJudge(NAMES, seed), [(0,), (2,), (3,)], costs, ALL)
        assert each[found.action] == pytest.approx(min(each.values()), abs=1e-5)
        assert found.routed == ((0, 2, 3) if found.action == "route" else ())


def test_the_rule_takes_the_first_action_that_keeps_to_the_floor_even_if_a_later_one_is_better():
    harm = np.full((4, 4), 0.1)
    for first in ALL:
        better = {a: 1.0 if ALL.index(a) < ALL.index(first) else 0.3 for a in ALL}
        better["regmean"] = min(better["regmean"], 0.2)
        judge = HarmJudge(NAMES, harm, better=better)
        found = decide(judge, (0, 1, 2), names=NAMES, rule="deterministic")
        assert found.action == first and found.members == (0, 1, 2)
        assert len(found.reasons) == 1 + ALL.index(first)  # what was taken, and every refusal


def test_the_rule_routes_the_member_that_keeps_least_and_looks_at_the_rest_again():
    harm = np.full((4, 4), 0.02)
    harm[2] = 0.9
    judge = HarmJudge(NAMES, harm)
    found = decide(judge, (0, 1, 2, 3), names=NAMES, rule="deterministic")
    assert (found.action, found.members, found.routed) == ("merge", (0, 1, 3), (2,))
    harm[:] = 0.9
    found = decide(HarmJudge(NAMES, harm), (0, 1, 2), names=NAMES, rule="deterministic")
    assert (found.action, found.members) == ("route", ()) and found.routed == (0, 1, 2)


def test_a_redundant_member_is_not_the_one_that_the_rule_routes():
    class Spanned(HarmJudge):
        def leverage(self, members):
            return np.array([1.0 if i == 2 else 0.0 for i in members])

    harm = np.full((4, 4), 0.02)
    harm[2, 3], harm[3, :3] = 0.9, 0.2
    found = decide(HarmJudge(NAMES, harm), (0, 1, 2, 3), names=NAMES, rule="deterministic")
    assert found.routed == (2, 3)
    found = decide(Spanned(NAMES, harm), (0, 1, 2, 3), names=NAMES, rule="deterministic")
    assert found.routed == (3,)


def test_without_a_calibration_the_decision_says_what_is_not_available():
    lacking = {"reweight": "a calibration", "prune": "a calibration", "regmean": "a calibration"}
    for rule in ("cost", "deterministic"):
        judge = HarmJudge(NAMES, np.full((4, 4), 0.5), unavailable=lacking)
        found = decide(judge, (0, 1), names=NAMES, rule=rule)
        assert found.action == "route"
        assert found.reasons[-1] == (
            "reweight, prune and regmean: not available without a calibration"
        )


def test_a_judge_that_abstains_leaves_the_set_undecided():
    class Abstains(HarmJudge):
        def outside(self, members, action):
            return np.ones(members.shape, bool)

    for rule in ("cost", "deterministic"):
        found = decide(Abstains(NAMES, np.zeros((4, 4))), (0, 1), names=NAMES, rule=rule)
        assert found.action == "route" and not found.decided
    assert decide(HarmJudge(NAMES, np.ones((4, 4))), (0, 1), names=NAMES).decided


def test_one_adapter_stays_as_it_is_and_actions_can_be_forbidden():
    judge = HarmJudge(NAMES, np.zeros((4, 4)))
    assert decide(judge, (1,), names=NAMES).action == "route"
    found = decide(judge, (0, 1), names=NAMES, actions=("regmean", "route"))
    assert found.action == "regmean" and ACTIONS.index("regmean") == 3


@pytest.mark.parametrize("members", [(), (0, 0), (4,), (-1, 2)])
def test_members_that_are_none_are_refused(members):
    with pytest.raises(InputError, match="members"):
        decide(HarmJudge(NAMES, np.zeros((4, 4))), members, names=NAMES)
    with pytest.raises(InputError, match="no rule 'coin'"):
        decide(HarmJudge(NAMES, np.zeros((4, 4))), (0, 1), names=NAMES, rule="coin")
