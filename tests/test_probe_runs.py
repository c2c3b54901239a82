"""Probe runs: found by name, and taken at the same fraction of training."""

from __future__ import annotations

import os
import shutil

import pytest
from adapters import make_adapter
from probes import make_run

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.probes import find_probes

MODULES = {"layers.0.q": (6, 5, 2), "layers.10.down": (5, 7, 3)}


def test_runs_are_found_and_named_like_adapters_of_a_zoo(tmp_path, rng):
    for name in ("r10", "r2", "deep/er/x"):
        make_run(tmp_path / "all" / name, rng, MODULES)
    make_run(tmp_path / "all" / "called", rng, MODULES, name="code")
    # Beside its trained adapter; and what an interrupted write left.
    make_adapter(tmp_path / "all" / "trained")
    make_run(tmp_path / "all" / "trained" / "probe", rng, MODULES)
    shutil.copytree(tmp_path / "all" / "r2", tmp_path / "all" / (".r2.tmp-" + "0" * 16))
    (tmp_path / "all" / "loop").symlink_to(tmp_path / "all", target_is_directory=True)
    probes = find_probes(tmp_path / "all")
    assert list(probes) == ["code", "deep/er/x", "r2", "r10", "trained/probe"]
    assert repr(probes) == "<Probes of 5 runs: code, deep/er/x, r2, r10, trained/probe>"
    first, second = probes["r2"]
    assert (first.steps, second.steps) == (5, 10) and second.before is first
    assert first.before is None and second.adapter.name == "r2"
    some = find_probes([tmp_path / "all" / "r10", str(tmp_path / "all" / "deep")])
    assert list(some) == ["er/x", "r10"]
    assert list(find_probes(tmp_path / "all" / "r10")) == ["r10"]


def test_two_runs_of_one_name_are_refused(tmp_path, rng):
    for folder in ("one", "two"):
        make_run(tmp_path / folder / "r", rng, MODULES)
    with pytest.raises(InputError, match=r"two/r: is called 'r', and so is .*one/r"):
        find_probes([tmp_path / "one" / "r", tmp_path / "two" / "r"])
    assert list(find_probes(tmp_path)) == ["one/r", "two/r"]


def test_where_there_is_no_run_it_is_said(tmp_path, rng):
    (tmp_path / "empty").mkdir()
    made = make_run(tmp_path / "a", rng, MODULES).snapshots[-1]
    for path, reason in (
        (tmp_path / "empty", r"empty: no probe runs in this folder \(run.json\)"),
        (tmp_path / "nothing", "nothing: cannot be searched: No such file"),
        (made.path, "no probe runs in this folder"),
        ([], "no probe runs given"),
        ("a\0b", "cannot be searched"),
    ):
        with pytest.raises(InputError, match=reason):
            find_probes(path)


def test_snapshots_are_chosen_by_fraction(tmp_path, rng):
    make_run(tmp_path / "a", rng, MODULES, steps=(2, 5, 10))
    make_run(tmp_path / "b", rng, MODULES, steps=(5, 10, 20))
    make_run(tmp_path / "c", rng, MODULES, steps=(2, 5))
    probes = find_probes(tmp_path)
    assert {n: s.steps for n, s in probes.at(0.05).items()} == {"a": 5, "b": 5, "c": 5}
    with pytest.raises(InputError, match=r"c: c has no snapshot at 0.1, only at 0.02, 0.05"):
        probes.at(0.1)
    assert probes.zoo().names == ["a", "b", "c"]
    assert [s.path.name for s in probes.match(["c", "a"])] == ["step-0000005"] * 2
    # Without c there is a later one that the others share.
    found = probes.match(["b", "x", "a"])
    assert [s and s.steps for s in found] == [10, None, 10]
    assert probes.match(["x", "y"]) == (None, None)
    assert [a.path.name for a in probes.zoo(0.05)] == ["step-0000005"] * 3


def test_too_early_snapshots_are_refused_unless_asked_for(tmp_path, rng):
    for name in "ab":
        make_run(tmp_path / name, rng, MODULES, steps=(2, 4))
    probes = find_probes(tmp_path)
    assert all(s.too_early for s in probes["a"])
    for at, steps in ((None, 4), (0.02, 2), (0.04, 4)):
        reason = rf"step-000000{steps}: {{}}: {steps} steps are too early to say anything"
        with pytest.raises(InputError, match=reason.format("a")):
            probes.zoo(at)
        with pytest.raises(InputError, match=reason.format("b")):
            probes.match(["b"], at)
    assert [a.path.name for a in probes.zoo(allow_early=True)] == ["step-0000004"] * 2
    assert probes.match(["b"], 0.02, allow_early=True)[0].steps == 2


def test_runs_without_a_common_snapshot_are_refused(tmp_path, rng):
    make_run(tmp_path / "a", rng, MODULES, steps=(5, 10))
    make_run(tmp_path / "b", rng, MODULES, steps=(5,))
    made = make_run(tmp_path / "c", rng, MODULES, steps=(10,))
    probes = find_probes(tmp_path)
    with pytest.raises(InputError, match=r"b: b has no snapshot at 0.1, and the runs share no"):
        probes.zoo()
    shutil.rmtree(made.snapshots[0].path)
    os.mkdir(made.path / ".step-0000010.tmp-0123456789abcdef")
    probes = find_probes(tmp_path)
    assert probes["c"] == ()
    with pytest.raises(InputError, match=r"c: c has no snapshot yet"):
        probes.match(["c"])
    with pytest.raises(InputError, match=r"c has no snapshot at 0.05, only at none yet"):
        probes.at(0.05)
