"""What is kept: two processes at a time, adapters left out, features and families of a caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter, make_zoo

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.cli import main
from mergeprobe_fast.commands._kept import alone_in
from mergeprobe_fast.engine import kept, kept_sums, passes
from mergeprobe_fast.features import CROSSWALK, ON_TILES, select
from mergeprobe_fast.features.declare import DOT, AdapterColumn, Family, Feature, PairColumn
from mergeprobe_fast.features.entries import entry_features

MODULES = {"layers.0.q": (24, 16, 4), "layers.1.q": (16, 24, 3)}
FORKED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from mergeprobe_fast.commands._kept import alone_in
    with alone_in(Path(sys.argv[1])):
        print("in", flush=True)
        time.sleep(600)
""")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven adapters in blocks of two; families are kept whatever they take."""
    make_zoo(tmp_path / "zoo", 7, modules=MODULES)
    local = sum(f.per_module for f in select("default").features) + 1
    monkeypatch.setattr(passes, "PAIR_BYTES", 4 * local * len(MODULES) * 2**2)
    monkeypatch.setattr(kept_sums, "WORTH", 0.0)
    return tmp_path / "zoo"


def spoil(folder):
    """The last adapter holds a NaN, which only its weights themselves show."""
    a = np.ones((3, 24))
    a[1, 2] = np.nan
    make_adapter(folder / "adapter_006", {"layers.1.q": (16, 24, 3)},
                 factors={"layers.1.q": (a, np.ones((16, 3)))})  # fmt: skip


def test_a_call_that_goes_on_leaves_out_the_same_and_loses_nothing(
    tmp_path, folder, monkeypatch, capsys
):
    spoil(folder)
    command = ["screen", str(folder), "--skip-bad", "--json", "--features", "all", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().err.count("left out: ") == 1
    fill, done, stop = passes._fill, [], []

    def killed(*arguments):
        fill(*arguments)
        done.append(1)
        if [len(done)] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "_fill", killed)
    assert main([*command, str(tmp_path / "counted")]) == 0
    of_both = len(done)  # blocks of the whole zoo up to the adapter, and those of the rest
    spent = 0
    for stop[:] in ([6], [2], [2]):
        done.clear()
        capsys.readouterr()
        assert main([*command, str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err.count("left out: ") == 1
        spent += len(done)
    done.clear()
    stop.clear()
    assert main([*command, str(tmp_path / "out")]) == 0
    # A block that was interrupted in its last moment is done again, and no other.
    assert spent + len(done) == of_both + 3
    for name in ("pairs.parquet", "adapters.parquet", "summary.json"):
        texts = [(tmp_path / o / name).read_bytes() for o in ("whole", "out")]
        assert texts[0].replace(b"/whole", b"/out") == texts[1], name
    assert not (tmp_path / ".out.blocks").exists()


def test_an_adapter_that_was_mended_is_not_left_out_again(tmp_path, folder, monkeypatch, capsys):
    spoil(folder)
    command = ["screen", str(folder), "--skip-bad", "--json", "--out", str(tmp_path / "out")]
    fill, done = passes._fill, []

    def killed(*arguments):
        done.append(1)
        if len(done) == 7:
            raise KeyboardInterrupt
        return fill(*arguments)

    monkeypatch.setattr(passes, "_fill", killed)
    assert main(command) == 130
    assert (tmp_path / ".out.blocks" / kept.LEFT_OUT).exists()
    make_adapter(folder / "adapter_006", modules=MODULES, seed=9)
    monkeypatch.setattr(passes, "_fill", fill)
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "left out" not in err and '"adapters": 7' in out


def test_an_output_folder_may_have_the_longest_name(tmp_path, folder):
    for name in ("x" * 255, "é" * 127):
        command = ["screen", str(folder), "--out", str(tmp_path / name), "--json"]
        assert main([*command, "--features", "all"]) == 0
        assert os.listdir(tmp_path / name)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_two_screens_into_one_folder_are_refused_before_they_spoil_each_other(
    tmp_path, folder, capsys
):
    blocks = tmp_path / ".out.blocks"
    other = subprocess.Popen(
        [sys.executable, "-c", FORKED, blocks], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    command = ["screen", str(folder), "--out", str(tmp_path / "out"), "--json"]
    try:
        assert other.stdout.readline() == "in\n"
        assert main(command) == 2
        assert f"{blocks}: another process is at work there" in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and blocks.exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert main(command) == 0
    assert not blocks.exists()


def test_one_at_a_time_has_a_folder_and_an_empty_one_is_removed(tmp_path):
    path = tmp_path / "keep"
    with alone_in(path), pytest.raises(InputError, match="another process"), alone_in(path):
        pass
    assert not path.exists()
    with alone_in(path):
        (path / "0-0.safetensors").write_bytes(b"")
    assert path.exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"), alone_in(tmp_path / "file"):
        pass


def test_a_lock_of_a_folder_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    path, flock, count = tmp_path / "keep", fcntl.flock, []

    def late(descriptor, how):
        count.append(1)
        if len(count) == 1:
            path.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(path):
        assert len(count) == 2 and path.exists()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_sums_that_another_process_replaced_are_refused_and_not_added_to(tmp_path, how):
    files, arrays = kept.Files(tmp_path / "keep"), {"x": np.ones(3)}
    files.put("sums-x.safetensors", "it", arrays, {"step": "1"})
    sums = kept_sums.Sums(files, "sums-x.safetensors", "it")
    time.sleep(0.02)
    if how == "replaced":
        files.put("sums-x.safetensors", "it", {"x": 2 * arrays["x"]}, {"step": "2"})
    else:
        files.drop("sums-x.safetensors")
    with pytest.raises(InputError, match=f"was {how} by another process"):
        sums.restore(arrays)
    assert sums.step == 1 and (arrays["x"] == 1).all()


def test_only_what_is_kept_is_removed(tmp_path):
    keep = tmp_path / "keep"
    files = kept.Files(keep)
    for name in ("0-1.safetensors", "sums-x.safetensors", "family-.safetensors", kept.LEFT_OUT):
        files.put(name, "it", {}, {})
    (keep / ".0-2.safetensors.tmp-0123456789abcdef").write_bytes(b"half")
    assert kept.kept_in(keep) == "1 blocks of pairs and 2 families of statistics"
    (keep / "model.safetensors").write_bytes(b"mine")
    kept.remove_blocks(keep)
    assert os.listdir(keep) == ["model.safetensors"]


def gain(factor, **more):
    definition = "The same words for every factor."
    return Feature("gain", "Gain", definition, lambda s: factor * s.need[DOT], (DOT,), **more)


def test_a_feature_of_ones_own_is_not_taken_from_blocks_of_other_code(tmp_path, folder):
    zoo, keep = mpf.open_zoo(folder), tmp_path / "keep"
    for factor, made_from in ((1.0, None), (2.0, None), (3.0, "3"), (4.0, "4")):
        want = factor * mpf.pair_features(zoo, ["dot"])["dot"]
        found = mpf.pair_features(zoo, [gain(factor, made_from=made_from)], keep=keep)
        np.testing.assert_array_equal(found["gain"], want)
        assert keep.exists() == (made_from is not None)


def test_blocks_of_every_feature_of_the_package_are_kept():
    crossed = [c.declared for group in CROSSWALK.values() for c in group.values()]
    ours = [*ON_TILES, *(f for f in crossed if isinstance(f, Feature))]
    assert kept.keepable(ours) and len(ours) > 30
    mine = replace(ours[0], over_modules=lambda s: s.energy_a)
    assert not kept.keepable([*ours, mine]) and kept.keepable([replace(mine, made_from="1")])


def family(name, pair, calls, value=lambda n: np.arange(n, dtype=float), **more):
    def compute(zoo, recorded, threads):
        calls.append(name)
        return value(len(zoo))

    return Family(
        name, lambda recorded: None, compute,
        (PairColumn(pair, pair, pair, lambda d, a, b: a + 0.0),),
        (AdapterColumn(f"own_{pair}", pair, pair, lambda d: d),), made_from="1", **more,
    )  # fmt: skip


def test_text_of_a_family_is_computed_again_and_not_refused(tmp_path, folder):
    from mergeprobe_fast.screening import screen

    zoo, calls = mpf.open_zoo(folder), []
    mine = family("mine", "c", calls, lambda n: np.array([f"no. {i}" for i in range(n)]))
    for _ in range(2):
        found = screen(zoo, [mine], keep=tmp_path / "keep").adapters["own_c"]
        assert list(found) == [f"no. {i}" for i in range(7)]
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["", "x" * 300, "é" * 120, "../../up", "a\nb", "c.safetensors"])
def test_a_family_of_any_name_is_kept(tmp_path, folder, name):
    zoo, calls = mpf.open_zoo(folder), []
    for _ in range(2):
        mpf.pair_features(zoo, [family(name, "c", calls)], keep=tmp_path / "keep")
    assert len(calls) == 1 and sorted(os.listdir(tmp_path)) == ["keep", "zoo"]
    assert not any(Path(f).name != f for f in os.listdir(tmp_path / "keep"))


def test_two_families_of_one_name_that_are_not_one_are_refused(folder):
    calls = []
    one, two = family("mine", "c", calls), family("mine", "d", calls)
    with pytest.raises(InputError, match="two families are called 'mine'"):
        mpf.pair_features(folder, [one, two])
    with pytest.raises(InputError, match="two families are called 'entries'"):
        mpf.pair_features(folder, ["sign_conflict", family("entries", "c", calls)])
    assert not calls
    both = [one, replace(one, pairs=two.pairs, adapters=())]  # parts of one, computed once
    assert {"c", "d"} <= set(mpf.pair_features(folder, both))
    assert len(calls) == 1
    assert select(["all", entry_features(700)]).families  # in a group, it takes the other's place


def test_a_folder_that_cannot_be_read_or_cleared_is_one_error(tmp_path, monkeypatch):
    def refused(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    files = kept.Files(tmp_path)
    files.put("0-0.safetensors", "it", {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(InputError, match=r"0-0\.safetensors: cannot be written: Permission"):
            files.header("0-0.safetensors", "other")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(InputError, match="cannot be read: Permission denied"):
            kept.Files(tmp_path)
