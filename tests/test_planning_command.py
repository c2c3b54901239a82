"""``plan`` on the command line, on the shipped zoo and on adapters it must refuse."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapters import make_zoo
from command_line import assert_refused, runner, spoil, strict_json
from planning_judges import HarmJudge
from probes import make_run

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import Plan, zoo_plan

ZOO = Path(__file__).parents[1] / "examples" / "zoo"
LACK = dict.fromkeys(("reweight", "prune", "regmean"), "a calibration")


class OfMath(HarmJudge):
    """math-a and math-b get along, code and code-r4 nearly; nobody else does."""

    reason = "made up"

    def __init__(self, names) -> None:
        harm = np.full((len(names), len(names)), 0.4)
        for one, other, cost in (("math-a", "math-b", 0.03), ("code", "code-r4", 0.12)):
            if one in names and other in names:
                i, j = names.index(one), names.index(other)
                harm[i, j] = harm[j, i] = cost
        super().__init__(names, harm, unavailable=LACK)


class Abstains(OfMath):
    def outside(self, members, action):
        return np.ones(members.shape, bool)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    return runner(capsys)


@pytest.fixture
def judged(monkeypatch):
    """The command asks this judge, and no predictor is opened."""

    def by(kind):
        monkeypatch.setattr(zoo_plan, "_predictor", lambda model: None)
        monkeypatch.setattr(
            zoo_plan, "open_judge", lambda zoo, *_, **__: kind(zoo.names)
        )

    by(OfMath)
    return by


needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason="needs the source tree")


@needs_zoo
def test_the_shipped_zoo_gets_a_plan_that_fits_the_terminal(run, judged, tmp_path):
    ran = run("plan", ZOO, "--out", tmp_path / "out")
    assert ran.code == 0 and ran.err == ""
    # Paths may be longer.
    assert all(len(line) <= 100 for line in ran.out.splitlines() if str(tmp_path) not in line)
    for part in ("8 adapters: 7 resident, 1 of them merged from 2, 6 as they are",
                 "math-a and math-b", "97.0 %", "fits code-r4 best; merge: code would keep 88.0 %",
                 "every adapter resident: 8.00", "no other plan costs less",
                 "reweight, prune and regmean: not available without a calibration"):  # fmt: skip
        assert part in " ".join(ran.out.split()), part
    assert sorted(os.listdir(tmp_path / "out")) == ["pairs.parquet", "plan.html", "plan.json"]
    assert [g.members for g in Plan.load(tmp_path / "out").merged] == [("math-a", "math-b")]


@needs_zoo
def test_json_is_the_plan_file_and_nothing_else(run, judged, tmp_path):
    ran = run("plan", ZOO, "--out", tmp_path / "out", "--json")
    said = strict_json(ran.out)
    assert said.pop("out") == str(tmp_path / "out")
    assert said.pop("vllm") is None and said.pop("applied") is None
    assert said == json.loads((tmp_path / "out" / "plan.json").read_text()) and ran.code == 0


@needs_zoo
def test_exit_codes_say_no_and_could_not_decide(run, judged, tmp_path):
    ran = run("plan", ZOO, "--out", tmp_path / "a", "--floor", "0.99")
    assert ran.code == 1 and "8 adapters: 8 resident, 8 as they are" in ran.out
    assert run("plan", ZOO / "code", "--out", tmp_path / "b").code == 1
    judged(Abstains)
    ran = run("plan", ZOO, "--out", tmp_path / "c", "--json")
    assert ran.code == 3 and strict_json(ran.out)["decided"] is False


@needs_zoo
def test_costs_come_from_a_file_and_from_the_command_line(run, judged, tmp_path):
    (tmp_path / "costs.yaml").write_text("adapter: 3\nworst: 0.5\n")
    ran = run("plan", ZOO, "--out", tmp_path / "out", "--cost", tmp_path / "costs.yaml",
              "--cost", "worst=0.01", "--floor", ".85", "--json")  # fmt: skip
    said = strict_json(ran.out)
    assert (said["costs"]["adapter"], said["costs"]["worst"], said["costs"]["floor"]) == (
        3, 0.01, 0.85,
    )  # fmt: skip
    assert len([g for g in said["groups"] if g["action"] == "merge"]) == 2


@needs_zoo
def test_measured_merges_change_the_plan(run, judged, tmp_path):
    first = run("plan", ZOO, "--out", tmp_path / "a", "--calibrate-with", "3")
    assert first.code == 0 and "measure.csv" in first.out
    rows = (tmp_path / "a" / "measure.csv").read_text().splitlines()
    filled = [rows[0], *(row.removesuffix(",,,") + ",-2,-1,-1.6" for row in rows[1:])]
    (tmp_path / "m.csv").write_text("\n".join(filled) + "\n")
    ran = run("plan", ZOO, "--out", tmp_path / "b", "--measured", tmp_path / "m.csv", "--json")
    assert ran.code == 1 and "measured members of 3 merges" in strict_json(ran.out)["predictor"][
        "reason"
    ]


@needs_zoo
def test_apply_writes_what_the_plan_says(run, judged, tmp_path):
    from mergeprobe_fast.planning.served import read_served

    ran = run("plan", ZOO, "--out", tmp_path / "out", "--apply")
    assert ran.code == 0, ran.err
    served = read_served(tmp_path / "out" / "applied")
    assert len(served.residents) == 7 and "--enable-lora" in ran.out
    assert ".tmp-" not in ran.out and str(tmp_path / "out" / "applied") in ran.out
    (tmp_path / "out" / "applied" / "log.txt").touch()
    mine = run("plan", ZOO, "--out", tmp_path / "out", "--overwrite")
    assert_refused(mine, "applied: holds 'log.txt', which this command does not write")
    (tmp_path / "out" / "applied" / "log.txt").unlink()
    again = run("plan", ZOO, "--out", tmp_path / "out", "--overwrite")
    assert again.code == 0 and not (tmp_path / "out" / "applied").exists()


@needs_zoo
def test_what_is_written_can_be_cut_and_says_that_nothing_is_claimed_then(run, judged, tmp_path):
    from mergeprobe_fast.planning.served import read_served

    words = ("plan", ZOO, "--out", tmp_path / "out", "--apply", "--max-rank", "8")
    ran = run(*words)
    assert ran.code == 0 and "note: merged-1 was cut to rank 8" in " ".join(ran.out.split())
    served = read_served(tmp_path / "out" / "applied")
    merged = next(r for r in served.residents if r.action == "merge")
    assert merged.rank == 8 and [m.retention for m in merged.members] == [None, None]
    said = strict_json(run(*words, "--overwrite", "--json").out)
    assert said["applied"]["notes"] == list(served.notes) and "--max-lora-rank 8" in said["vllm"]


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    make_zoo(tmp_path / "zoo", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


USAGE = {
    "no zoo": (("--out", "o"), "ZOO"),
    "no --out": (("zoo",), "--out"),
    "cost": (("zoo", "--out", "o", "--cost", "price=1"), "costs: price: is no cost"),
    "cost of words": (("zoo", "--out", "o", "--cost", "adapter=much"), "--cost adapter: expected"),
    "cost twice": (("zoo", "--out", "o", "--cost", "worst=1", "--cost", "worst=2"), "given twice"),
    "no such file": (("zoo", "--out", "o", "--cost", "c.yaml"), "c.yaml: No such file"),
    "floor twice": (("zoo", "--out", "o", "--cost", "floor=1", "--floor", "1"), "given twice"),
    "floor": (("zoo", "--out", "o", "--floor", "90"), "costs: floor: must be at most 1"),
    "action": (("zoo", "--out", "o", "--actions", "merge,drop"), "no action 'drop'"),
    "none to measure": (("zoo", "--out", "o", "--calibrate-with", "0"), "expected 1 or more"),
    "costly": (("zoo", "--out", "o", "--costly", "-1"), "--costly: expected 0 or more, got '-1'"),
    "none resident": (("zoo", "--out", "o", "--resident", "0"), "--resident: expected 1 or more"),
    "rank of words": (("zoo", "--out", "o", "--apply", "--max-rank", "r"), "expected 1 or more"),
    "rank of nothing": (("zoo", "--out", "o", "--max-rank", "8"), "--max-rank: needs --apply"),
    "apply early": (("zoo", "--out", "o", "--apply", "--probes", "p"), "unfinished adapters"),
    "model": (("zoo", "--out", "o", "--model", "m.json"), "m.json"),
    "domains alone": (("zoo", "--out", "o", "--domain", "adapter_000=x"), "domains: given without"),
    "into the zoo": (("zoo", "--out", "zoo", "--overwrite"), "would overwrite the input"),
    "somebody's": (("zoo", "--out", "mine", "--overwrite"), "holds 'notes.txt', which this comm"),
}


@pytest.mark.parametrize("how", USAGE)
def test_wrong_use_is_one_line_and_nothing_is_written(run, zoo, how):
    (zoo.parent / "mine").mkdir()
    (zoo.parent / "mine" / "notes.txt").write_text("mine")
    words, said = USAGE[how]
    assert_refused(run("plan", *words), said)
    assert sorted(os.listdir()) == ["mine", "zoo"] and os.listdir("mine") == ["notes.txt"]


@pytest.mark.parametrize("how", ["truncated", "NaN", "other base", "other shape"])
def test_bad_adapters_are_refused_or_left_out(run, zoo, judged, how, monkeypatch):
    monkeypatch.setattr(zoo_plan, "open_judge", _reads_everything)
    expected = spoil(zoo / "adapter_001", how).replace(str(zoo), "zoo")
    assert_refused(run("plan", "zoo", "--out", "o"), expected)
    assert os.listdir() == ["zoo"]
    ran = run("plan", "zoo", "--out", "o", "--skip-bad", "--json")
    assert ran.code == 0 and "left out" in ran.err
    assert len(strict_json(ran.out)["adapters"]) == 2


def _reads_everything(zoo, *_, threads=None, **__):
    from mergeprobe_fast.engine.totals import totals

    totals(zoo, threads=threads)
    judge = HarmJudge(zoo.names, np.zeros((len(zoo), len(zoo))))
    judge.reason = "made up"
    return judge


def test_an_interrupt_leaves_nothing_behind(run, zoo, judged, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo_plan, "open_judge", interrupted)
    assert_refused(run("plan", "zoo", "--out", "deep/o"), "interrupted", code=130)
    assert os.listdir() == ["zoo"]


def test_a_zoo_of_a_base_model_that_is_unknown_gets_a_plan_that_says_it_is_uncalibrated(
    run, zoo, tmp_path
):  # fmt: skip
    """With the shipped predictor, which has never seen the base of these adapters."""
    ran = run("plan", "zoo", "--out", "o", "--floor", "0.1")
    said = " ".join(ran.out.split())
    assert ran.err == "" and ran.code in (0, 1)  # merged something, or found nothing to merge
    assert "uncalibrated: a score that ranks; what it predicts is no measured retention" in said
    assert "is not among them" in said and "predicted from a closed formula" in said
    again = run("plan", "zoo", "--out", "p", "--floor", "0.1", "--json")
    plan = strict_json(again.out)
    assert again.code == ran.code == (0 if any(g["method"] for g in plan["groups"]) else 1)
    assert (plan["predictor"]["calibrated"], plan["predictor"]["level"]) == (False, "score")
    assert plan["predictor"]["coverage"] is None and plan["decided"] is True
    assert all(g["low"] == [None] * len(g["members"]) for g in plan["groups"] if g["method"])
    page = (Path("o") / "plan.html").read_text()
    assert "ncalibrated: a score that ranks" in page
    ran = run("plan", "zoo", "--out", "q", "--floor", "0.1", "--apply", "--json")
    if ran.code == 0:
        notes = strict_json(ran.out)["applied"]["notes"]
        assert any("uncalibrated score" in note for note in notes)


@needs_zoo
def test_at_most_so_many_resident(run, judged, tmp_path):
    ran = run("plan", ZOO, "--out", tmp_path / "a", "--resident", "7", "--json")
    said = strict_json(ran.out)
    assert ran.code == 0 and said["resident"] == 7 and said["highest_floor"] is True
    assert said["costs"]["floor"] == pytest.approx(0.97) and len(said["groups"]) == 7
    ran = run("plan", ZOO, "--out", tmp_path / "b", "--resident", "6")
    assert "8 adapters: 6 resident of at most 6, 2 of them merged from 4" in ran.out
    assert "no other plan of 6 adapters or fewer keeps more at worst" in " ".join(ran.out.split())
    refused = run("plan", ZOO, "--out", tmp_path / "c", "--resident", "6", "--floor", "0.9")
    assert_refused(refused, "resident: no plan with 6 or fewer: code")
    assert "would keep 88.0 % at best, and the floor is 90.0 %; the least is 7" in refused.err
    judged(Abstains)
    refused = run("plan", ZOO, "--out", tmp_path / "c", "--resident", "6")
    assert_refused(refused, "the least is 8; a floor of 0 takes predictions as they are")
    ran = run("plan", ZOO, "--out", tmp_path / "d", "--resident", "6", "--cost", "floor=0")
    assert ran.code == 0 and "the floor of 0 lets such predictions count" in " ".join(
        ran.out.split())  # fmt: skip


@needs_zoo
def test_apply_refuses_an_adapter_that_changed_since_the_plan(run, judged, tmp_path):
    shutil.copytree(ZOO, tmp_path / "zoo")
    assert run("plan", tmp_path / "zoo", "--out", tmp_path / "out").code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ZOO / "code" / name, tmp_path / "zoo" / "math-b" / name)
    with pytest.raises(InputError, match="math-b: changed since the plan was made"):
        Plan.load(tmp_path / "out").apply(tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


KEEN = ("--floor", "0.05", "--cost", "average=0.001", "--cost", "worst=0")  # on merging


def test_measured_merges_of_a_zoo_are_fitted_to_end_to_end(run, zoo):
    """Real adapters, the shipped predictor: choose merges, fill the table in, plan again."""
    words = ("plan", "zoo", *KEEN)
    first = run(*words, "--out", "a", "--calibrate-with", "4", "--json")
    before = strict_json(first.out)
    rows = (Path("a") / "measure.csv").read_text().splitlines()
    assert rows[0] == "members,operator,weights,member,base,single,merged" and len(rows) > 8
    filled = [rows[0], *(row.removesuffix(",,,") + ",-2,-1,-1.5" for row in rows[1:])]  # half each
    Path("m.csv").write_text("\n".join(filled) + "\n")
    ran = run(*words, "--out", "b", "--measured", "m.csv", "--json")
    after = strict_json(ran.out)
    assert ran.code == first.code == 0 and before["predictor"]["calibrated"] is False
    assert f"{len(rows) - 1} measured members of 4 merges" in after["predictor"]["reason"]

    def off(plan):
        kept = [r for g in plan["groups"] if g["method"] for r in g["retention"]]
        return np.abs(np.array(kept) - 0.5).mean()

    assert off(after) < off(before) or off(after) < 0.02
    Path("m.csv").write_text("\n".join([filled[0], filled[1].replace("-1.5", "much")]) + "\n")
    refused = run(*words, "--out", "c", "--measured", "m.csv")
    assert_refused(refused, "m.csv: line 2: merged: expected a number")


def test_probes_at_a_share_of_training_are_planned_with_end_to_end(run, zoo, rng):
    names = [p.name for p in sorted(zoo.iterdir())]
    modules = {n: (m.d_out, m.d_in, 2) for n, m in mpf.open_zoo("zoo")[0].modules.items()}
    for name in names:
        make_run(Path("runs") / name, rng, modules, steps=(5, 10))
    said = []
    for at in ("5%", "10%"):
        ran = run("plan", "zoo", "--out", f"o{at}", "--probes", "runs", "--at", at,
                  *KEEN, "--json")  # fmt: skip
        said.append(strict_json(ran.out))
        assert ran.code in (0, 1) and said[-1]["predictor"]["early"] is True
        assert [a["name"] for a in said[-1]["adapters"]] == names
        merged = [g for g in said[-1]["groups"] if g["method"]]
        assert ran.code == (0 if merged else 1)
        with pytest.raises(InputError, match="is of unfinished adapters"):
            Plan.load(f"o{at}").apply("applied")
    text = run("plan", "zoo", "--out", "t", "--probes", "runs", "--at", "5%", *KEEN).out
    assert "of unfinished adapters" in " ".join(text.split())
    kept = [[g["retention"] for g in s["groups"]] for s in said]
    assert kept[0] != kept[1]  # other snapshots, other numbers
    assert_refused(run("plan", "zoo", "--out", "p", "--at", "5%"), "given without probes")
    refused = run("plan", "zoo", "--out", "p", "--probes", "runs", "--at", "60%")
    assert_refused(refused, "no snapshot at 0.6")
