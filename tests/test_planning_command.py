"""``plan`` on the command line, on the shipped zoo and on adapters it must refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from adapters import make_zoo
from command_line import assert_refused, runner, spoil, strict_json
from planning_judges import HarmJudge

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
