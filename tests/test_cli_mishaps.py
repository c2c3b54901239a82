"""What a tired person does to the commands: each mishap has one clear answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter, make_zoo
from command_line import Run, assert_refused, runner, spoil

import mergeprobe_fast as mpf
from mergeprobe_fast import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    return runner(capsys)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_zoo(tmp_path / "zoo", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


def test_check_reads_the_weights(run, zoo):
    spoil(zoo / "adapter_001", "NaN")
    ran = run("check", "zoo", "--json")
    assert ran.code == 1
    bad = [a for a in json.loads(ran.out)["adapters"] if not a["ok"]]
    assert [Path(a["path"]).name for a in bad] == ["adapter_001"]
    assert "NaN" in bad[0]["problems"][0]["reason"] and bad[0]["problems"][0]["key"]


def test_skip_bad_leaves_out_weights_that_are_not_finite(run, zoo):
    spoil(zoo / "adapter_001", "NaN")
    assert_refused(run("screen", "zoo", "--out", "out"), "adapter_001", "NaN")
    assert not Path("out").exists()
    ran = run("screen", "zoo", "--out", "out", "--skip-bad", "--json")
    assert ran.code == 0 and "left out" in ran.err and "adapter_001" in ran.err
    summary = json.loads(Path("out", "summary.json").read_text())
    assert summary["adapters"] == 3 and len(summary["skipped"]) == 1
    shutil.rmtree(zoo / "adapter_001")
    want = mpf.pair_features(zoo)["cosine"]
    import pyarrow.parquet

    got = pyarrow.parquet.read_table("out/pairs.parquet")["cosine"].to_numpy()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("odd", [{"base_model": "other"}, {"modules": {"layers.0.q": (3, 2, 1)}}])
def test_skip_bad_leaves_out_the_one_that_does_not_fit(zoo, odd):
    usual = {"base_model": "one", "modules": {"layers.0.q": (6, 5, 2)}}
    for i in range(4):
        shutil.rmtree(zoo / f"adapter_{i:03d}")
        make_adapter(zoo / f"adapter_{i:03d}", seed=i, **usual)
    make_adapter(zoo / "aaa", **{**usual, **odd})  # first in order, and still to blame
    with pytest.raises(mpf.InputError) as caught:
        mpf.open_zoo(zoo)
    assert caught.value.path == str(zoo / "aaa")
    left = mpf.open_zoo(zoo, skip_bad=True)
    assert [s.path.name for s in left.skipped] == ["aaa"] and len(left) == 4


def test_a_link_to_itself_is_passed_over(run, zoo):
    (zoo / "loop").symlink_to("loop")
    assert run("screen", "zoo", "--out", "out", "--json").code == 0
    assert run("check", "zoo", "--json").code == 0


@pytest.mark.parametrize("rank", ["5000", "9" * 20])
def test_a_rank_beyond_every_module_is_refused(run, zoo, rank):
    assert_refused(run("merge", "zoo", "--rank", rank, "--out", "out"), "rank", rank)
    assert not Path("out").exists()


def test_padding_and_a_zero_sum_are_said(zoo):
    first = mpf.open_zoo([zoo / "adapter_000"])
    most = max(m.rank for m in first[0].modules.values())
    assert "padded with zeros" in mpf.merge(first, rank=most + 1).report()["notes"][-1]
    assert mpf.merge(first, rank=most).report()["notes"] == []
    shutil.copytree(zoo / "adapter_000", "copy")
    twice = mpf.open_zoo([zoo / "adapter_000", "copy"])
    assert "update is zero" in mpf.merge(twice, weights=[1, -1]).report()["notes"][-1]


def test_an_absurd_scale_names_the_adapter(run, zoo):
    config = zoo / "adapter_002" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1e308}))
    assert_refused(run("screen", "zoo", "--out", "out"), "adapter_002", "absurdly large")


def test_weights_before_the_adapters(run, zoo):
    names = [f"zoo/adapter_{i:03d}" for i in (0, 1)]
    assert run("merge", "--weights", "0.7", "-0.3", *names, "--out", "one", "--json").code == 0
    assert run("merge", *names, "--weights", "0.7,-0.3", "--out", "two", "--json").code == 0
    one, two = (Path(o, "adapter_model.safetensors").read_bytes() for o in ("one", "two"))
    assert one == two
    weights = [a["weight"] for a in json.loads(Path("one", "merge.json").read_text())["adapters"]]
    assert weights == [0.7, -0.3]


def test_a_merge_in_the_zoo_is_noted(run, zoo):
    assert run("merge", "zoo", "--out", "zoo/merged", "--json").code == 0
    assert "merged: itself the result of a merge (merge.json)" in mpf.open_zoo(zoo).notes


def test_termination_cleans_up_and_handlers_come_back(run, zoo, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mergeprobe_fast.screening.screen", killed)
    ran = run("screen", "zoo", "--out", "out", "--json")
    assert ran.code == 130 and "interrupted" in ran.err
    assert sorted(os.listdir()) == ["zoo"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_paths_are_taken_where_a_zoo_is(zoo):
    assert mpf.pair_features(str(zoo)).rows == 6
    assert mpf.adapter_features(zoo).rows == 4
    assert len(mpf.merge(str(zoo)).zoo) == 4


def test_joining_weights_takes_numbers_only():
    join = cli._join_weights
    joined = join(["--weights", "1", "-5e-1", "a", "--rank", "2"])
    assert joined == ["--weights=1,-5e-1", "a", "--rank", "2"]
    assert join(["--weights", "x"]) == ["--weights", "x"] and join(["--weights"]) == ["--weights"]


def test_a_device_without_room_is_one_line_and_other_runtime_errors_are_not_hidden(
    run, zoo, monkeypatch
):
    torch = pytest.importorskip("torch")
    from mergeprobe_fast import screening

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(screening.engine, "run", full)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual")
    assert_refused(run("screen", "zoo", "--out", "out"), "out of memory on the device", "2 GiB.")
    assert not Path("out").exists()
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("screen", "zoo", "--out", "out")


def test_a_device_that_is_not_there_is_one_line(run, zoo):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for command in (["screen"], ["merge", "--method", "ties"]):
        ran = run(*command, "zoo", "--device", "cuda", "--out", "out")
        assert_refused(ran, "device cuda is not available")
        assert not Path("out").exists()
    assert_refused(run("screen", "zoo", "--device", "tpu", "--out", "out"), "tpu")
    assert run("screen", "zoo", "--device", "auto", "--out", "out", "--json").code == 0
