"""Which merges to measure, the table that comes back, and what is fitted to it."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from planning_judges import HarmJudge, HashJudge

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import Costs, make_plan, partition
from mergeprobe_fast.planning.fitted import fitted
from mergeprobe_fast.planning.judging import Judged
from mergeprobe_fast.planning.measure import (
    COLUMNS,
    Measured,
    choose,
    measured_file,
    read_measured,
)
from mergeprobe_fast.planning.result import PlannedAdapter

NAMES = ["a", "b", "c", "d", "e"]
HEAD = ",".join(COLUMNS) + "\n"


class Bent(HarmJudge):
    """What is really kept is another line than what it says."""

    def retention(self, members, action):
        return 0.4 + 0.5 * super().retention(members, action)


class Score(HarmJudge):
    """Ranks, and claims no interval."""

    calibrated, coverage = False, None

    def judge(self, members, action):
        said = super().judge(members, action)
        none = np.full(members.shape, np.nan)
        return Judged(said.retention, none, none, said.outside, said.weights)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def measured_by(judge, sets, action="merge"):
    kept = [judge.retention(np.array([s], np.int32), action)[0] for s in sets]
    return Measured(tuple(sets), (action,) * len(sets), tuple(tuple(k) for k in kept))


def test_the_table_asks_for_every_member_of_k_different_merges():
    judge = HashJudge(NAMES, 1, unavailable={"regmean": "a calibration"})
    plan = make_plan(judge, [PlannedAdapter(n, n) for n in NAMES], Costs())
    rows = rows_of(measured_file(plan, 3))
    merges = {(r["members"], r["operator"]): r["members"].split("+") for r in rows}
    assert len(merges) == 3 and list(rows[0]) == list(COLUMNS)
    for (members, operator), own in merges.items():
        mine = [r for r in rows if (r["members"], r["operator"]) == (members, operator)]
        assert [r["member"] for r in mine] == own
        assert all(len(r["weights"].split("+")) == len(own) for r in mine if r["weights"])
        assert all(r["base"] == r["single"] == r["merged"] == "" for r in mine)
    assert measured_file(plan, 3) == measured_file(plan, 3)
    everything = rows_of(measured_file(plan, 10_000))
    assert len({r["members"] for r in everything}) == 2**5 - 6


def test_merges_near_the_floor_and_different_ones_come_first():
    harm = np.full((6, 6), 2.0)
    harm[0, 1] = harm[1, 0] = 0.1  # at the floor
    harm[2, 3] = harm[3, 2] = 0.11
    harm[0, 4] = harm[4, 0] = 0.11
    judge = HarmJudge([*NAMES, "f"], harm)
    found = partition(judge, judge.names, actions=("merge",))
    chosen = [c.ranks for c in choose(found.book, [(0, 1)], 3)]
    assert chosen == [(0, 1), (2, 3), (0, 4)]  # the last one shares a member with the first


def test_a_filled_table_is_read_as_retention(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        "\ufeff" + HEAD + "a+b,merge,0.5+0.5,a,-2,-1,-1.25\n" + "a+b,merge,0.5+0.5,b,0,2,-9\n"
        + "b+c,reweight,,c,0,1,9\n" + "b+c,reweight,,b,,,\n\n" + "d+c,merge,,c,,,\n"
    )  # fmt: skip
    found = read_measured(path, NAMES)
    assert found.members == ((0, 1), (1, 2)) and found.actions == ("merge", "reweight")
    assert found.retention[0] == (0.75, -1.0) and found.labels == 3
    assert np.isnan(found.retention[1][0]) and found.retention[1][1] == 1.2


def test_weights_of_the_table_go_with_their_members(tmp_path):
    text = HEAD + "c+a,merge,0.7+0.3,a,0,1,0.5\nc+a,merge,0.5+0.5,a,0,1,0.6\n"
    (tmp_path / "m.csv").write_text(text)
    found = read_measured(tmp_path / "m.csv", NAMES)
    assert found.members == ((0, 2),) * 2 and found.weights == ((0.3, 0.7), (0.5, 0.5))
    assert [row[0] for row in found.retention] == [0.5, 0.6]


def test_names_with_a_plus_survive_the_table(tmp_path):
    names = ["a+b", "[c", "d", " e \u00fc "]
    judge = HarmJudge(names, np.full((4, 4), 0.05))
    plan = make_plan(judge, [PlannedAdapter(n, n) for n in names], Costs(), ("merge", "route"))
    rows = rows_of(measured_file(plan, 4))
    with open(tmp_path / "m.csv", "w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        out.writerows({**r, "base": 0, "single": 1, "merged": 0.5} for r in rows)
    found = read_measured(tmp_path / "m.csv", names)
    assert len(found.members) == 4 and set(sum(found.retention, ())) == {0.5}


MALFORMED = {
    "no column": ("members,operator\n", "has no column 'weights'"),
    "column twice": (HEAD.strip() + ",member\n", "has a column twice"),
    "cells": (HEAD + "a+b,merge,,a,1,2\n", "line 2: has 6 cells, not 7"),
    "nothing": (HEAD, "no row is filled in"),
    "nothing filled in": (HEAD + "a+b,merge,,a,,,\n", "no row is filled in"),
    "half filled in": (HEAD + "a+b,merge,,a,1,2,\n", "line 2: merged: expected a number, got ''"),
    "infinite": (HEAD + "a+b,merge,,a,1,inf,2\n", "line 2: single: expected a number"),
    "words": (HEAD + "a+b,merge,,a,low,2,1\n", "line 2: base: expected a number, got 'low'"),
    "learnt nothing": (HEAD + "a+b,merge,,a,2,2,2\n", "line 2: single: is no better than the base"),
    "stranger": (HEAD + "a+x,merge,,a,0,1,1\n", "line 2: members: no adapter 'x' in the zoo"),
    "one": (HEAD + "a,merge,,a,0,1,1\n", "line 2: members: expected at least two"),
    "twice": (HEAD + "a+a,merge,,a,0,1,1\n", "line 2: members: expected at least two different"),
    "not a member": (HEAD + "a+b,merge,,c,0,1,1\n", "line 2: member: 'c' is not among"),
    "operator": (HEAD + "a+b,ties,,a,0,1,1\n", "line 2: operator: 'ties' is none of merge"),
    "again": (HEAD + "a+b,merge,,a,0,1,1\n" * 2, "line 3: member: 'a' was measured in this merge"),
    "list": (HEAD + '"[""a""",merge,,a,0,1,1\n', "line 2: members: is no list of names"),
    "quote": (HEAD + '"a+b,merge\n', "is no table"),
    "weights of words": (HEAD + "a+b,merge,x+y,a,0,1,1\n", "line 2: weights: expected 2 numbers"),
    "a weight missing": (HEAD + "a+b,merge,1,a,0,1,1\n", "line 2: weights: expected 2 numbers"),
    "no weights there": (HEAD + "a+b,regmean,1+1,a,0,1,1\n", "line 2: weights: regmean takes none"),
    "bytes": ("\udcff", "is no table"),
}  # fmt: skip


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_table_is_one_error_with_its_line(tmp_path, how):
    text, said = MALFORMED[how]
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        read_measured(path, NAMES)
    assert str(error.value).startswith(f"{path}: {said}")


PAIRS = [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (0, 4), (1, 4), (1, 3)]


@pytest.mark.parametrize("n", [5, 9])
def test_measurements_straighten_a_judge_that_is_off(rng, n):
    names = [f"a{i}" for i in range(n)]
    harm = rng.uniform(0, 0.4, (n, n))
    every = [(i, j) for i in range(n) for j in range(i + 1, n)]
    told = every[: len(every) // 2]
    truth = Bent(names, harm)
    judge = fitted(HarmJudge(names, harm), measured_by(truth, told))
    rest = np.array(every[len(told) :], np.int32)
    off = np.abs(HarmJudge(names, harm).retention(rest, "merge") - truth.retention(rest, "merge"))
    now = np.abs(judge.judge(rest, "merge").retention - truth.retention(rest, "merge"))
    assert now.mean() < 0.35 * off.mean()
    assert judge.calibrated and f"{2 * len(told)} measured members" in judge.reason


def test_few_labels_only_shift():
    harm = np.full((5, 5), 0.2)
    judge = fitted(Score(NAMES, harm), measured_by(Bent(NAMES, harm), [(0, 1)]))
    said = judge.judge(np.array([[2, 3]], np.int32), "merge")
    assert judge.coverage is None and np.isnan(said.low).all()
    # Two labels of -0 .. 0.4 + 0.5 * 0.8 = 0.8 against 0.8: nothing to shift.
    np.testing.assert_allclose(said.retention, 0.8)
    assert not judge.calibrated and "too few to tell" in judge.reason
    lower = Measured(((0, 1),), ("merge",), ((0.5, 0.5),))
    said = fitted(HarmJudge(NAMES, harm), lower).judge(np.array([[2, 3]], np.int32), "merge")
    np.testing.assert_allclose(said.retention, 0.8 - 2 * 0.3 / (2 + 4))


def test_few_labels_widen_the_intervals_that_there_are():
    lower = Measured(((0, 1),), ("merge",), ((0.5, 0.5),))
    judge = fitted(HarmJudge(NAMES, np.full((5, 5), 0.2)), lower)
    said = judge.judge(np.array([[2, 3]], np.int32), "merge")
    shift = -2 * 0.3 / (2 + 4)
    assert judge.coverage == 0.9 and judge.calibrated
    np.testing.assert_allclose(said.low, 0.8 - 0.05 + shift)  # where the shift takes it
    np.testing.assert_allclose(said.high, 0.8 + 0.03)  # where it was


def test_merges_measured_with_other_weights_are_predicted_with_those():
    harm = np.full((5, 5), 0.2)

    class Weighs(HarmJudge):
        def weighted(self, members, weights):
            kept = np.where(members >= 0, weights, np.nan)
            return Judged(kept, kept, kept, np.zeros(members.shape, bool), weights)

    own = Measured(((0, 1), (2, 3)), ("merge",) * 2, ((0.8, 0.8),) * 2, ((0.5, 0.5), None))
    as_told = Measured(((0, 1),), ("merge",), ((0.3, 0.9),), ((0.3, 0.9),))
    for labels in (own, as_told):  # what was measured is what was predicted: nothing to shift
        said = fitted(Weighs(NAMES, harm), labels).judge(np.array([[1, 4]], np.int32), "merge")
        np.testing.assert_allclose(said.retention, 0.8)
    with pytest.raises(InputError, match="measured: merge of 2 with other weights than it takes"):
        fitted(HarmJudge(NAMES, harm), as_told)


def test_labels_where_the_judge_abstains_are_left_out():
    class Partly(HarmJudge):
        def outside(self, members, action):
            return np.broadcast_to((members == 0).any(axis=1, keepdims=True), members.shape)

    judge = Partly(NAMES, np.full((5, 5), 0.2))
    labels = Measured(((0, 1), (2, 3)), ("merge",) * 2, ((-1.0, -1.0), (0.8, 0.8)))
    said = fitted(judge, labels).judge(np.array([[1, 4]], np.int32), "merge")
    np.testing.assert_allclose(said.retention, 0.8)
    with pytest.raises(InputError, match="none of the measured merges can be predicted"):
        fitted(Partly(NAMES, judge.harm), Measured(((0, 1),), ("merge",), ((1.0, 1.0),)))
    book = partition(Partly(NAMES, judge.harm), NAMES, Costs(floor=0.9)).book
    assert all(0 not in c.ranks for c in choose(book, [], 50))


def test_intervals_are_of_what_a_fit_without_the_merge_misses(rng):
    harm = rng.uniform(0, 0.3, (5, 5))
    sets = PAIRS
    kept = HarmJudge(NAMES, harm)
    noise = rng.normal(0, 0.05, (len(sets), 2))
    rows = measured_by(kept, sets).retention
    noisy = tuple(tuple(np.array(r) + e) for r, e in zip(rows, noise, strict=True))
    labels = Measured(tuple(sets), ("merge",) * len(sets), noisy)
    judge = fitted(HarmJudge(NAMES, harm), labels)
    said = judge.judge(np.array([[2, 4]], np.int32), "merge")
    half = (said.high - said.low)[0, 0] / 2
    assert judge.coverage == 0.9 and 0.5 * np.abs(noise).max() < half < 4 * np.abs(noise).max()


def test_a_curve_of_many_labels_does_not_fall(rng):
    names = [f"a{i}" for i in range(9)]
    harm = rng.uniform(0, 0.5, (9, 9))
    sets = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    truth = measured_by(HarmJudge(names, harm), sets)
    steps = tuple(tuple(np.where(np.array(r) > 0.75, 0.9, 0.3)) for r in truth.retention)
    judge = fitted(HarmJudge(names, harm), Measured(truth.members, truth.actions, steps))
    # The other way round: what was measured is not judged again.
    said = judge.judge(np.array(sets, np.int32)[:, ::-1], "merge").retention[:, ::-1]
    raw = HarmJudge(names, harm).retention(np.array(sets, np.int32), "merge")
    order = np.argsort(raw, axis=None)
    assert (np.diff(said.ravel()[order]) >= -1e-12).all()
    np.testing.assert_allclose(said[raw > 0.75].mean(), 0.9, atol=0.02)


def test_measurements_of_what_cannot_be_judged_are_refused():
    one = Measured(((0, 1),), ("regmean",), ((0.9, 0.9),))
    with pytest.raises(InputError, match="measured: regmean needs a calibration"):
        fitted(HarmJudge(NAMES, np.zeros((5, 5)), unavailable={"regmean": "a calibration"}), one)
    with pytest.raises(InputError, match="calibrate-with: must be positive"):
        judge = HarmJudge(NAMES, np.zeros((5, 5)))
        choose(partition(judge, NAMES).book, [], 0)


def test_what_was_measured_is_remembered_and_what_was_not_is_asked(rng):
    harm = rng.uniform(0, 0.3, (5, 5))
    made = HarmJudge(NAMES, harm)
    judge = fitted(made, measured_by(HarmJudge(NAMES, harm), [(0, 1), (2, 3)]))
    said = judge.judge(np.array([[1, 0, -1], [4, 2, 0], [3, 2, -1]], np.int32), "merge")
    plain = HarmJudge(NAMES, harm).judge(np.array([[1, 0, -1], [4, 2, 0], [3, 2, -1]], np.int32),
                                         "merge")  # fmt: skip
    there = ~np.isnan(plain.retention)
    np.testing.assert_allclose(said.retention[there], np.clip(plain.retention[there], -1, 1.2))
    np.testing.assert_array_equal(said.weights[there], plain.weights[there])
    assert not said.outside[there].any() and made.calls == 2
