"""Judges of real adapters: what they ask the tables and the predictor, and what they make of it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import delta_of
from probes import make_run
from set_zoo import MODULES, Made

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.merges import merge_tables
from mergeprobe_fast.planning import Costs, Plan, decide, plan
from mergeprobe_fast.planning import judge as judge_module
from mergeprobe_fast.planning.judge import ErrorJudge, PredictorJudge
from mergeprobe_fast.planning.judging import padded
from mergeprobe_fast.planning.words import refusal
from mergeprobe_fast.predict.predictor import Facts
from mergeprobe_fast.predict.recipe import Recipe
from mergeprobe_fast.recorded import NOTHING, open_recorded

CHEAP_LOSS = {"floor": 0.05, "average": 0.001, "worst": 0.0}
SETS = padded([(0, 1), (1, 2, 4), (0, 1, 2, 3, 4), (3, 4)])


class ByError:
    """A predictor that says 1 - E6, or without inputs 1 - |D|^2 / |W|^2, and where it is asked."""

    def __init__(self, outside_above: float = np.inf) -> None:
        self.outside_above = outside_above
        self.asked: list[dict] = []
        self.rows: list[int] = []

    def predict(self, columns, **rest):
        self.asked.append(rest)
        self.rows.append(next(iter(columns.values())).size)
        level = "calibration" if "error" in columns else "weights"
        kept = 1 - (columns["error"] if "error" in columns else columns["change_to_self"] ** 2)
        return SimpleNamespace(
            retention=kept, low=kept - 0.1, high=kept + 0.1, level=level, calibrated=True,
            outside=np.nan_to_num(columns["change_to_self"]) > self.outside_above, coverage=0.9,
            reason="made",
        )  # fmt: skip


@pytest.fixture
def made(tmp_path, rng) -> Made:
    return Made(tmp_path, rng)


def tables_of(made, with_calibration=True):
    recorded = open_recorded(made.zoo, made.calibration.path) if with_calibration else NOTHING
    return merge_tables(made.zoo, recorded, threads=1)


def proxies(made, sets, weights=None):
    return mpf.set_features(made.zoo, [[int(i) for i in s if i >= 0] for s in sets], weights,
                            calibration=made.calibration.path)  # fmt: skip


def test_a_plain_merge_is_the_better_of_sum_and_mean(made):
    said = PredictorJudge(tables_of(made), ByError()).judge(SETS, "merge")
    both = [proxies(made, SETS, w).per_member("retention") for w in ("one", None)]
    worst = [np.nanmin(b, axis=1) for b in both]
    takes = worst[1] > worst[0]
    want = np.where(takes[:, None], both[1], both[0])
    np.testing.assert_allclose(said.retention, want, rtol=1e-9, atol=1e-12)
    size = (SETS >= 0).sum(axis=1)
    first = np.where(takes, 1 / size, 1.0)
    np.testing.assert_allclose(said.weights[:, 0], first)
    assert np.isnan(said.weights[SETS < 0]).all() and takes.any()


def test_reweighting_takes_the_better_of_best_mean_and_best_worst_case_weights(made):
    said = PredictorJudge(tables_of(made), ByError()).judge(SETS, "reweight")
    table = proxies(made, SETS)
    want = np.nanmin(table.per_member("minimax_retention"), axis=1)
    np.testing.assert_allclose(np.nanmin(said.retention, axis=1), want, atol=1e-5)
    np.testing.assert_allclose(
        said.weights, table.per_member("minimax_weights"), rtol=1e-3, atol=1e-4
    )


def test_regmean_is_really_merged(made):
    judge = PredictorJudge(tables_of(made), ByError())
    said = judge.judge(SETS, "regmean")
    for row, s in enumerate(SETS):
        own = [int(i) for i in s if i >= 0]
        zoo = mpf.open_zoo([made.zoo[i].path for i in own])
        merged = mpf.merge(zoo, "regmean", calibration=made.calibration.path, dtype="F32",
                           domains=[made.domains[i] for i in own])  # fmt: skip
        found = judge.tables.of_merged([(own, merged)])["error"][0, : len(own)]
        np.testing.assert_allclose(said.retention[row, : len(own)], 1 - found, rtol=1e-6, atol=1e-9)
    assert np.isnan(said.weights).all()


def test_without_a_calibration_only_plain_merges_are_judged(made):
    judge = PredictorJudge(tables_of(made, False), ByError())
    assert judge.level == "weights"
    assert judge.unavailable == dict.fromkeys(("reweight", "prune", "regmean"), "a calibration")
    found = plan(made.zoo, model=ByError())
    assert {g.action for g in found.groups} <= {"merge", "route"}
    assert "not available without a calibration" in found.notes[-1]


def test_early_adapters_are_told_apart_and_not_fitted_to(made):
    predictor = ByError()
    judge = PredictorJudge(tables_of(made), predictor, early=True)
    assert predictor.asked[0]["early"] is True
    assert judge.unavailable["regmean"] == "finished adapters"


def test_a_set_with_a_member_outside_yields_to_one_without(made):
    tables = tables_of(made)
    there = SETS >= 0
    sums, means = (PredictorJudge(tables, ByError()).weighted(SETS, np.where(there, w, np.nan))
                   for w in (1.0, 1 / there.sum(axis=1, keepdims=True)))  # fmt: skip
    size = np.nanmax(tables.features(SETS, np.ones(SETS.shape))["change_to_self"], axis=1)
    limit = float(np.median(size))
    judge = PredictorJudge(tables, ByError(outside_above=limit))
    said = judge.judge(SETS, "merge")
    out_mean = np.nanmax(
        tables.features(SETS, np.where(SETS >= 0, 1 / (SETS >= 0).sum(1)[:, None], 0))[
            "change_to_self"
        ],
        axis=1,
    ) > limit  # fmt: skip
    for row in np.flatnonzero((size > limit) & ~out_mean):
        np.testing.assert_array_equal(said.retention[row], means.retention[row])
    assert sums.retention.shape == said.retention.shape


def test_the_rule_of_the_catalogue_by_errors(made):
    tables = tables_of(made)
    judge = ErrorJudge(tables)
    table = mpf.set_features(
        made.zoo, [[int(i) for i in s if i >= 0] for s in SETS], features="all",
        calibration=made.calibration.path,
    )  # fmt: skip
    for action, name in (("prune", "pruned_retention"), ("regmean", "regmean_retention")):
        np.testing.assert_allclose(judge.judge(SETS, action).retention, table.per_member(name))
    np.testing.assert_allclose(judge.leverage((1, 2, 4)), table.per_member("leverage")[1, :3])
    worst = {a: float(np.nanmin(judge.judge(SETS[2:3], a).retention))
             for a in ("merge", "reweight", "prune", "regmean")}  # fmt: skip
    for action in worst:
        earlier = [worst[a] for a in worst if list(worst).index(a) < list(worst).index(action)]
        if worst[action] <= max(earlier, default=-np.inf) or worst[action] <= 0:
            continue
        floor = (worst[action] + max([*earlier, 0.0])) / 2
        found = decide(judge, range(5), Costs(floor=floor), names=made.zoo.names,
                       rule="deterministic")  # fmt: skip
        assert found.action == action and found.routed == ()
    with pytest.raises(InputError, match="calibration"):
        ErrorJudge(tables_of(made, False))


def test_a_plan_of_real_adapters_holds_what_the_judge_says(made):
    found = plan(made.zoo, calibration=made.calibration.path, model=ByError(), costs=CHEAP_LOSS)
    assert sorted(m for g in found.groups for m in g.members) == sorted(made.zoo.names)
    assert found.merged and found.proven and found.level == "calibration"
    for g in found.merged:
        assert min(g.retention) >= 0.05
        assert (g.weights is None) == (g.action in ("prune", "regmean"))
    assert [a.domain for a in found.adapters] == made.domains


def test_the_plan_is_the_same_in_any_order_and_for_any_number_of_threads(made):
    both = []
    for order, threads in ((range(5), 1), ([3, 0, 4, 2, 1], 2)):
        zoo = mpf.open_zoo([made.zoo[i].path for i in order])
        found = plan(zoo, calibration=made.calibration.path, model=ByError(),
                     costs=CHEAP_LOSS, threads=threads)  # fmt: skip
        both.append({(frozenset(g.members), g.action) for g in found.groups})
    assert both[0] == both[1]


def test_probes_judge_every_adapter_by_its_snapshot(made, tmp_path, rng):
    for name in made.zoo.names:
        make_run(tmp_path / "runs" / name, rng, MODULES, steps=(5, 10))
    predictor = ByError()
    found = plan(made.zoo, probes=tmp_path / "runs", at=0.05, model=predictor)
    assert predictor.asked[-1]["early"] is True and found.early
    snapshots = mpf.open_zoo([tmp_path / "runs" / n / "step-0000005" for n in made.zoo.names])
    columns = merge_tables(snapshots, NOTHING, threads=1).features(
        np.array([[0, 1]], np.int32), np.full((1, 2), 0.5)
    )
    want = 1 - columns["change_to_self"][0] ** 2
    kept = found.pairs["retention_a"][0], found.pairs["retention_b"][0]
    sums = 1 - merge_tables(snapshots, NOTHING, threads=1).features(
        np.array([[0, 1]], np.int32), np.ones((1, 2))
    )["change_to_self"][0] ** 2  # fmt: skip
    assert min(kept) == pytest.approx(max(min(want), min(sums)))
    with pytest.raises(InputError, match="unfinished adapters"):
        found.apply(tmp_path / "out")
    (tmp_path / "runs" / made.zoo.names[0]).rename(tmp_path / "runs" / "other")
    with pytest.raises(InputError, match=f"none is named like '{made.zoo.names[0]}'"):
        plan(made.zoo, probes=tmp_path / "runs", at=0.05, model=predictor)


def test_a_set_is_scored_alike_alone_and_among_others(made, monkeypatch):
    tables = tables_of(made)
    whole = type(tables).features

    def without_the_last(self, members, weights):
        columns = whole(self, members, weights)
        if "error" in columns:
            lost = (members == 4).any(axis=1)[:, None]
            columns["error"] = np.where(lost, np.nan, columns["error"])
        return columns

    monkeypatch.setattr(type(tables), "features", without_the_last)
    predictor = mpf.RetentionPredictor({}, Recipe(), Facts(bases=("another",)))
    judge = PredictorJudge(tables, predictor)
    assert judge.level == "score"
    together = judge.judge(SETS, "merge")
    for row, s in enumerate(SETS):
        alone = judge.judge(s[None, s >= 0], "merge")
        np.testing.assert_array_equal(alone.retention[0], together.retention[row, s >= 0])
    judge._witness = {}  # a fault: nothing is asked along, and the batch decides what answers
    alone = judge.judge(SETS[:1, :2], "merge")
    assert not np.array_equal(alone.retention[0], together.retention[0, :2], equal_nan=True)


def test_a_fitted_level_is_asked_for_the_members_and_no_more(made):
    predictor = ByError()
    judge = PredictorJudge(tables_of(made), predictor)
    judge.judge(SETS[:1], "merge")
    assert predictor.rows[-1] == 2 * SETS[:1].size  # the sum's weights and the mean's


class Refuses(PredictorJudge):
    """RegMean of math-a and math-b together is refused."""

    error: Exception = InputError("is singular there", path="cal/x", key="layers.0.q")

    def _run(self, members, action):
        if action == "regmean" and {"math-a", "math-b"} <= {self.tables.zoo.names[i]
                                                            for i in members}:  # fmt: skip
            raise self.error
        return super()._run(members, action)


def test_a_refused_merge_is_not_available_for_its_set_and_the_rest_goes_on(made, monkeypatch):
    monkeypatch.setattr(judge_module, "PredictorJudge", Refuses)
    found = plan(made.zoo, calibration=made.calibration.path, model=ByError(), costs=CHEAP_LOSS,
                 actions=("regmean", "route"), costly=100)  # fmt: skip
    note = next(n for n in found.notes if n.startswith("regmean: not available for"))
    assert "math-a" in note and "math-b" in note and "): layers.0.q: is singular there" in note
    assert found.decided and len(found.groups) > 1
    for g in found.groups:
        assert not {"math-a", "math-b"} <= set(g.members)
    book = found.book
    both = tuple(sorted(int(np.flatnonzero(book.order == made.zoo.names.index(n))[0])
                        for n in ("math-a", "math-b")))  # fmt: skip
    book.costly_left = 1
    book.ask([both], ["regmean"])
    verdict = book.verdict(both, "regmean")
    assert verdict.refused and not verdict.allowed and not verdict.known
    assert refusal(verdict, book, ["math-a", "math-b"]) == (
        "regmean: not available for this set (layers.0.q: is singular there)"
    )


def test_a_refused_merge_among_others_does_not_change_what_they_keep(made):
    whole = PredictorJudge(tables_of(made), ByError()).judge(SETS, "regmean")
    judge = Refuses(tables_of(made), ByError())
    part = judge.judge(SETS, "regmean")
    names = judge.tables.zoo.names
    gone = np.array([{"math-a", "math-b"} <= {names[i] for i in s if i >= 0} for s in SETS])
    assert gone.any() and not gone.all() and len(judge.refused) == gone.sum()
    np.testing.assert_array_equal(part.retention[~gone], whole.retention[~gone])
    assert np.isnan(part.retention[gone]).all()


def test_broken_files_and_broken_programs_are_no_refusals(made, monkeypatch):
    path = made.zoo[made.zoo.names.index("math-a")].path
    for error in (InputError("changed", path=path / "adapter_model.safetensors"),
                  RuntimeError("a fault"), ValueError("another")):  # fmt: skip
        monkeypatch.setattr(Refuses, "error", error)
        with pytest.raises(type(error), match=str(error).rpartition(": ")[2]):
            Refuses(tables_of(made), ByError()).judge(SETS, "regmean")


class Levels(ByError):
    levels = ("weights", "calibration", "points")


def test_a_poorer_level_than_the_predictor_has_is_explained(made, tmp_path, rng):
    found = plan(made.zoo, calibration=made.calibration.path, model=Levels(), curve=False)
    assert found.level == "calibration"
    assert [n for n in found.notes if n.startswith("predicted from")] == [
        "predicted from level calibration: the calibration has no losses at the adapters; one made "
        "with --adapters ZOO gives level points"
    ]
    older = Made(tmp_path / "older", rng, version=1)  # inputs and nothing else

    class Falls(Levels):
        def predict(self, columns, **rest):
            kept = {n: v for n, v in columns.items() if n != "error"}
            return super().predict(kept, **rest)

    found = plan(older.zoo, calibration=older.calibration.path, model=Falls(), curve=False)
    assert found.level == "weights"
    assert [n for n in found.notes if n.startswith("predicted from")] == [
        "predicted from weights alone: the calibration has inputs and no output moments, as those "
        "of older versions; one that 'calibrate' makes now gives level calibration, with "
        "--adapters ZOO level points"
    ]
    assert not [n for n in plan(made.zoo, model=Levels(), curve=False).notes if "level" in n]


def test_any_weights_can_be_judged(made):
    judge = PredictorJudge(tables_of(made), ByError())
    said = judge.judge(SETS, "reweight")
    again = judge.weighted(SETS, said.weights)
    np.testing.assert_allclose(again.retention, said.retention)
    other = judge.weighted(SETS[:1], np.array([[0.3, 0.9, np.nan, np.nan, np.nan]]))
    want = proxies(made, SETS[:1], [[0.3, 0.9]]).per_member("retention")
    np.testing.assert_allclose(other.retention[0, :2], want[0, :2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("action", ["merge", "reweight", "prune", "regmean"])
def test_what_is_written_keeps_what_the_plan_says(made, tmp_path, monkeypatch, action):
    """Predicted from the tables, against dense deltas of the files; planned by relative paths."""
    monkeypatch.chdir(tmp_path)
    found = plan(
        [os.path.relpath(a.path) for a in made.zoo], model=ByError(), actions=(action,),
        calibration=os.path.relpath(made.calibration.path), costs={**CHEAP_LOSS, "floor": 0.0},
    )  # fmt: skip
    assert found.merged
    found.save(tmp_path / "plan.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    served = Plan.load(tmp_path / "plan.json").apply(tmp_path / "out")
    for group in found.merged:
        written = open_adapter(served.folder(group.name)).modules
        deltas = {name: delta_of(written[name]) for name in written}
        for member, kept in zip(group.members, group.retention, strict=True):
            error = made.error(made.zoo.names.index(member), lambda name: deltas[name])  # noqa: B023
            assert kept == pytest.approx(1 - error, abs=1e-5)
        # A fault, so large that the best weights, where no error moves at first, show it.
        moved = {name: 1.2 * delta for name, delta in deltas.items()}
        error = [made.error(made.zoo.names.index(m), lambda name: moved[name])  # noqa: B023
                 for m in group.members]  # fmt: skip
        assert group.retention != pytest.approx(1 - np.array(error), abs=1e-5)
