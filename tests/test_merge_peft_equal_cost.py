"""Equal numbers of resident adapters: who is put together, what is measured, what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import make_journal, make_tier

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.equal_cost import __main__ as command
from mergeprobe_fast.merge_peft.equal_cost import measure, planned, rows
from mergeprobe_fast.merge_peft.equal_cost.partitions import (
    ONE,
    ZOOS,
    Zoo,
    domain_groups,
    ordered,
    random_groups,
)
from mergeprobe_fast.merge_peft.equal_cost.strategies import (
    CHOICES,
    MAIN,
    MANY,
    OURS,
    PLAN,
    REGMEAN,
    SEVERAL,
    Resident,
    Strategy,
    by_hand,
    fixed,
    on_groups_of,
    tier_of,
)
from mergeprobe_fast.merge_peft.outcome.journal import read_journal
from mergeprobe_fast.merge_peft.outcome.scores import read_scores
from mergeprobe_fast.merge_peft.tiers import capacity
from mergeprobe_fast.planning import Group

DOMAINS = {name: plan.recipe.domain for name, plan in capacity.ADAPTERS.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_random_groups_hold_everyone_once_and_differ_by_one_in_size(count):
    members = [f"m{n}" for n in range(10)]
    groups = random_groups(members, count, "a")
    assert sorted(m for group in groups for m in group) == members
    sizes = [len(group) for group in groups]
    assert len(groups) == count
    assert max(sizes) - min(sizes) <= 1
    assert groups == random_groups(members, count, "a")
    assert count in (1, 10) or groups != random_groups(members, count, "b")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 17])
def test_groups_by_domain_mix_domains_only_where_there_are_fewer_groups(count):
    groups = domain_groups(DOMAINS, count, "a")
    assert sorted(m for group in groups for m in group) == sorted(DOMAINS)
    assert len(groups) == count
    of = [{DOMAINS[m] for m in group} for group in groups]
    if count >= 5:
        assert all(len(domains) == 1 for domains in of)
    else:  # nobody's domain is torn apart
        assert sum(map(len, of)) == 5
    sizes = [len(group) for group in groups]
    if count > 5:
        assert max(sizes) <= 4  # instruct has 11 of 35: five groups or so


def test_members_have_the_order_of_the_run_so_that_its_rows_are_found_again():
    for zoo in ZOOS.values():
        assert [*zoo.members] == [name for name in capacity.ADAPTERS if name in zoo.members]
    for name in ("5-0", "5-1", "10-0", "10-1", "20-0", "35-0"):
        zoo = ZOOS[name]
        for operator in capacity.CAPACITY_NAMES:
            made = fixed(zoo, 1, ONE, operator, ordered(zoo.members, [zoo.members[::-1]]))
            assert made.residents[0].merge.key in capacity.merges()


def test_by_hand_every_partition_has_the_main_operators_and_each_strategy_comes_once():
    for zoo in (ZOOS["10-0"], ZOOS["35-0"]):
        told = [(s.allowed, s.partition, s.operator) for s in by_hand(zoo, DOMAINS)]
        assert len(set(told)) == len(told)
        for allowed in zoo.residents[1:]:
            for partition in ("random-0", "random-1", "domain"):
                assert {(allowed, partition, o) for o in MAIN} <= {*told}
        for operator in (*MAIN, *SEVERAL, *(CHOICES if len(zoo) <= MANY else ())):
            assert (1, ONE, operator) in told


# --- a made-up run -------------------------------------------------------------------------------

MADE = ("sum", "mean", "ties", REGMEAN)


@pytest.fixture
def made(tmp_path):
    """A run of ten adapters, and a zoo of five of them, one a domain."""
    tier = make_tier(adapters=10, pairs=40, sizes=(2, 5))
    make_journal(tmp_path / "run", tier)
    zoo = Zoo("5-0", tuple(list(tier.adapters)[:5]), (1, 2))
    return SimpleNamespace(folder=tmp_path / "run", tier=tier, zoo=zoo, out=tmp_path / "work")


def of_pair(made, operator="sum") -> Strategy:
    """Two of the zoo in one, the others alone: as far as the run has measured such a pair."""
    pair = next(m.members for m in made.tier.merges.values()
                if m.operator == operator and {*m.members} <= {*made.zoo.members}
                and len(m.members) == 2)  # fmt: skip
    rest = [(name,) for name in made.zoo.members if name not in pair]
    return fixed(made.zoo, 4, "random-0", operator, ordered(made.zoo.members, [pair, *rest]))


def collected(made, strategies) -> rows.Found:
    tier = tier_of(made.tier, strategies)
    return rows.collect(strategies, tier, read_scores(made.folder))


def test_rows_are_those_of_the_labels_and_whoever_stays_alone_keeps_everything(made):
    strategy = of_pair(made)
    found = collected(made, [strategy])
    assert len(found.rows) == 5
    run = read_scores(made.folder)
    for row in found.rows:
        exam = row["exam"]
        base, alone = (run.scores[key, exam].loglik.mean()
                       for key in ("base", f"single({row['member']})"))  # fmt: skip
        if not row["merged_with"]:
            assert row["ll_norm"] == 1.0
            assert row["group_size"] == 1
            continue
        key = next(r.merge.key for r in strategy.residents if r.merge)
        left = run.scores[key, exam].loglik.mean()
        assert row["ll_norm"] == pytest.approx((left - base) / (alone - base), rel=1e-12)
        assert row["merged_with"] == "sum"
    ranks = {r.members[0]: made.tier.adapters[r.members[0]].recipe.rank
             for r in strategy.residents if not r.merge}  # fmt: skip
    merged = run.merged[key]["rank"]
    assert found.rows[0]["total_rank"] == sum(ranks.values()) + merged
    assert found.rows[0]["resident"] == 4


def test_a_strategy_with_a_merge_that_nobody_measured_has_no_rows(made):
    unknown = fixed(made.zoo, 1, ONE, "tsv_m", (made.zoo.members,))
    assert collected(made, [unknown]).rows == []
    assert collected(made, [unknown]).failed == {}


def test_a_strategy_with_a_merge_that_was_refused_is_told_with_the_reason(made):
    refused = next(m for m in made.tier.merges.values()
                   if m.operator == "ties" and m.study == "same")  # fmt: skip
    zoo = Zoo("2-0", refused.members, (1,))
    found = collected(made, [fixed(zoo, 1, ONE, "ties", (refused.members,))])
    assert found.rows == []
    assert found.failed == {("2-0", 1, ONE, "ties"): "made to <fail> & tell"}


def test_what_the_run_or_the_folder_has_is_not_measured_again(made):
    known = fixed(made.zoo, 1, ONE, "sum", (made.zoo.members,))
    new = fixed(made.zoo, 1, ONE, "tsv_m", (made.zoo.members,))
    tier = tier_of(made.tier, [known, new, new])
    journal = read_journal(made.folder)
    own = SimpleNamespace(scores={}, failed={})
    (unit,) = measure.missing(tier, [known, new, new], journal, own)
    assert unit.key == new.residents[0].merge.key
    assert {*unit.exams} == {made.tier.adapters[m].exam for m in made.zoo.members}
    own.failed[unit.key] = {}
    assert measure.missing(tier, [known, new], journal, own) == []
    own = SimpleNamespace(scores={(unit.key, exam): {} for exam in unit.exams}, failed={})
    assert measure.missing(tier, [known, new], journal, own) == []
    del own.scores[unit.key, unit.exams[0]]  # a part is none
    assert len(measure.missing(tier, [known, new], journal, own)) == 1


def half(tier, unit, run):
    """Lines of a merge that keeps half of what each adapter gains."""
    merge = tier.merges[unit.key]
    lines = [{"kind": "merged", "key": unit.key, "operator": merge.operator,
              "members": list(merge.members), "weights": [1.0] * len(merge.members),
              "study": merge.study, "rank": 8, "parameters": 10, "seconds": 0.1}]  # fmt: skip
    scores = read_scores(run).scores
    for exam in unit.exams:
        alone = scores[f"single({exam.partition('-')[0]}-0)", exam]
        ll = ((scores["base", exam].loglik + alone.loglik) / 2).tolist()
        lines.append({"kind": "scores", "key": unit.key, "exam": exam, "loglik": ll,
                      "option_loglik": ll,
                      "correct": alone.correct.astype(int).tolist()})  # fmt: skip
    return lines


def test_measuring_is_journalled_and_a_rerun_does_only_what_is_new(made, monkeypatch):
    monkeypatch.setattr(
        measure, "_Worker",
        lambda tier, *rest: SimpleNamespace(run=lambda unit: half(tier, unit, made.folder)),
    )  # fmt: skip
    bench = measure.Bench(made.tier, made.folder, made.out)
    asked = [fixed(made.zoo, 1, ONE, name, (made.zoo.members,)) for name in ("sum", "tsv_m")]
    asked.append(fixed(made.zoo, 2, "domain", "knots",
                       random_groups(made.zoo.members, 2, "a")))  # fmt: skip
    told: list[str] = []
    with bench.journal() as journal:
        assert bench.measure(asked, None, journal, -1.0, told.append) == 3  # no time at all
        assert bench.measure(asked, None, journal, 100.0, told.append) == 0
    assert len(told) == 3
    with bench.journal() as journal:
        assert bench.measure(asked, None, journal, 100.0, told.append) == 0
    assert len(told) == 3
    found = rows.collect(asked, tier_of(made.tier, asked), bench.scores())
    assert {r["operator"] for r in found.rows} == {"sum", "tsv_m", "knots"}
    halves = [r["ll_norm"] for r in found.rows if r["operator"] != "sum"]
    assert halves == pytest.approx([0.5] * 10, rel=1e-9)


def test_a_folder_of_another_run_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="another run"):
        measure.Bench(replace(made.tier, seed=99), made.folder, made.out)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "adapters").mkdir()
    bench = measure.Bench(made.tier, made.folder, made.out)
    with pytest.raises(InputError, match="not a link"):
        bench.prepare(None, 1, lambda words: None)


# --- plans ---------------------------------------------------------------------------------------


def planner(made, monkeypatch, groups, **fields):
    """A planner whose plan has these groups."""
    told = []

    def plan(zoo, **arguments):
        told.append(arguments)
        adapters = [SimpleNamespace(name=name) for name in fields.get("names", made.zoo.members)]
        save = lambda path: Path(path).write_text(json.dumps("a plan"))  # noqa: E731
        return SimpleNamespace(groups=groups, adapters=adapters, save=save)

    monkeypatch.setattr(planned, "plan", plan)
    monkeypatch.setattr(planned, "open_zoo", lambda paths: paths)
    make = fields.get("make", True)
    found = planned.Planner(made.tier, made.out, None, make=make, costs={"floor": 0.0})
    return found, told


def group(members, action, weights=None, method="linear") -> Group:
    kept = tuple(0.1 * n for n, _ in enumerate(members))
    return Group("g", tuple(members), action, method, weights, {}, kept, kept, kept)


def test_a_plan_becomes_the_operators_that_its_weights_are(made, monkeypatch):
    a, b, c, d, e = made.zoo.members
    found, told = planner(made, monkeypatch, (
        group([c, a], "merge", (0.5, 0.5)), group([e, d], "reweight", (0.7, 0.3)),
        group([b], "route"),
    ))  # fmt: skip
    weights = {"minimax": [0.5, 0.5], "reweighted": [0.3, 0.7]}
    monkeypatch.setattr(planned, "combine",
                        lambda tier, out, plan: (None, weights[plan.operator]))  # fmt: skip
    zoo = replace(made.zoo, residents=(3,))
    (strategy,) = found.strategies([zoo], lambda words: None)
    assert [(r.members, r.operator) for r in strategy.residents] == [
        ((a, c), "mean"), ((b,), ""), ((d, e), "reweighted"),
    ]  # fmt: skip
    assert strategy.residents[0].predicted == ((0.1,) * 3, (0.0,) * 3)  # c was told first
    assert told[0]["resident"] == 3
    assert (strategy.partition, strategy.operator) == (OURS, PLAN)
    on_ours = [s for s in on_groups_of(strategy) if s.operator == REGMEAN]
    assert [r.operator for r in on_ours[0].residents] == [REGMEAN, "", REGMEAN]


def test_weights_and_arguments_that_no_operator_has_are_merged_with_as_they_are(made, monkeypatch):
    a, b, c, d, e = made.zoo.members
    uneven = group([c, a, b], "regmean", (0.2, 0.5, 0.3), method="regmean")
    asked = replace(group([e, d], "prune", method="prune"), arguments={"rank": 4, "ridge": 0.1})
    found, _ = planner(made, monkeypatch, (uneven, asked))
    (strategy,) = found.strategies([replace(made.zoo, residents=(2,))], lambda words: None)
    one, two = strategy.residents
    assert one.members == (a, b, c)
    assert one.own.weights == (0.5, 0.3, 0.2)
    assert two.own.operator.arguments == {"ridge": 0.1}
    assert two.own.operator.rank == 4
    other = found._resident(group([a, b, c], "regmean", (0.2, 0.5, 0.3), method="regmean"))
    assert other.merge.key != one.merge.key
    tier = tier_of(made.tier, [strategy])
    assert tier.merges[one.merge.key].operator == one.own.operator.name
    used = {}
    monkeypatch.setattr(measure, "combine", lambda tier, out, plan, given: used.update(
        {plan.operator: given}) or (None, given))  # fmt: skip
    worker = measure._Worker(tier, made.out, None, {one.merge.key: one.own.weights})
    worker._combined(one.merge)
    worker._combined(replace(one.merge, operator=REGMEAN))
    assert used == {one.operator: (0.5, 0.3, 0.2), REGMEAN: None}


def test_a_plan_that_is_refused_is_told_and_the_others_go_on(made, monkeypatch):
    found, _ = planner(made, monkeypatch, (group(made.zoo.members, "regmean"),))
    zoo = replace(made.zoo, residents=(1,))
    ok = found.strategies([zoo], lambda words: None)
    assert ok[0].residents[0].operator == REGMEAN

    def refuse(zoo, **arguments):
        raise InputError("nothing known gets there", key="resident")

    monkeypatch.setattr(planned, "plan", refuse)
    assert found.strategies([replace(made.zoo, name="other", residents=(2,))], print) == []
    assert "nothing known" in found.refused["other", 2]
    found, told = planner(made, monkeypatch, (group(made.zoo.members, "regmean"),), make=False)
    assert found.strategies([replace(made.zoo, name="third", residents=(1,))], print) == []
    assert "is not planned yet" in found.refused["third", 1]
    assert told == []


def test_a_plan_of_more_residents_than_allowed_is_refused(made, monkeypatch):
    groups = tuple(group([name], "route") for name in made.zoo.members)
    found, _ = planner(made, monkeypatch, groups)
    assert found.strategies([replace(made.zoo, residents=(2,))], lambda words: None) == []
    assert "is no plan of zoo" in found.refused["5-0", 2]


def test_residents_of_one_member_are_not_merged():
    assert Resident(("a",)).merge is None
    assert Resident(("a", "b"), "sum").merge.key == "sum(a+b)"


def test_the_command_writes_the_page_of_what_is_there_and_measures_nothing_in_no_time(
    made, monkeypatch, tmp_path, capsys
):
    zoo = replace(made.zoo, residents=(1,))
    monkeypatch.setattr(command, "tier_of", lambda name: made.tier)
    monkeypatch.setattr(command, "ZOOS", {zoo.name: zoo})
    monkeypatch.setattr(command, "by_hand", lambda zoo, domains: [
        fixed(zoo, 1, ONE, name, (zoo.members,)) for name in MADE])  # fmt: skip
    with measure.Bench(made.tier, made.folder, made.out).journal():
        pass
    arguments = [str(made.folder), "--work", str(made.out), "--out", str(tmp_path / "page"),
                 "--zoos", zoo.name, "--minutes", "0"]  # fmt: skip
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page" / "equal-cost.md")
    text = (tmp_path / "page" / "equal-cost.md").read_text("utf-8")
    assert "5-0" in text
    assert "is not planned yet" in text
    before = {path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()}
    assert {*before} == {"equal-cost.md", "equal-cost.parquet"}  # one point is no curve
    assert command.main(arguments) == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()}
    assert command.main([str(tmp_path), *arguments[1:]]) == 2
    assert "journal.jsonl" in capsys.readouterr().err
