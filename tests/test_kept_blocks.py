"""A pass that was killed goes on from the blocks that it had kept."""

from __future__ import annotations

import os

import numpy as np
import pytest
from adapters import make_adapter, make_zoo

from mergeprobe_fast import open_zoo
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.kept import remove_blocks
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import select

MODULES = {"layers.0.q": (24, 16, 4), "layers.1.q": (16, 24, 3)}


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Seven adapters in four blocks, of which one is a single adapter."""
    make_zoo(tmp_path / "zoo", 7, modules=MODULES)
    features = select("default").features
    local = sum(f.per_module for f in features) + 1
    monkeypatch.setattr(passes, "PAIR_BYTES", 4 * local * len(MODULES) * 2**2)
    return open_zoo(tmp_path / "zoo")


def ran(zoo, keep=None, progress=None, features="default"):
    return passes.run(
        zoo, select(features).features, profile=True, keep=keep, progress=progress, threads=1
    )


def same(one, other):
    assert [*one.columns] == [*other.columns]
    for name in one.columns:
        assert np.array_equal(one.columns[name], other.columns[name], equal_nan=True), name
    for field in ("a", "b", "sigma", "rank", "profile"):
        assert np.array_equal(getattr(one, field), getattr(other, field), equal_nan=True), field
    assert one.clipped == other.clipped and one.layers == other.layers


@pytest.fixture
def filled(monkeypatch):
    """The blocks that were computed."""
    found = []
    fill = passes._fill

    def noted(part, *arguments):
        found.append((*part.first, -1, *part.second))
        return fill(part, *arguments)

    monkeypatch.setattr(passes, "_fill", noted)
    return found


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_killed_pass_goes_on_and_gives_the_same_to_the_bit(tmp_path, zoo, filled, after):
    whole = ran(zoo)
    blocks = len(filled)
    assert blocks == 10
    keep, done = tmp_path / "keep", []

    def killed(modules):
        done.append(modules)
        if sum(done) > after * len(MODULES):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(zoo, keep, killed)
    assert len(os.listdir(keep) if keep.exists() else []) == after
    filled.clear()
    told = []
    same(ran(zoo, keep, told.append), whole)
    assert len(filled) == blocks - after
    assert sum(told) == passes.steps(zoo, select("default").features)
    filled.clear()
    same(ran(zoo, keep), whole)
    assert not filled
    remove_blocks(keep)
    assert not keep.exists()


def test_blocks_of_other_adapters_or_features_are_not_used(tmp_path, zoo, filled):
    keep = tmp_path / "keep"
    ran(zoo, keep)
    filled.clear()
    make_adapter(tmp_path / "zoo" / "adapter_003", modules=MODULES, seed=99)
    other = open_zoo(tmp_path / "zoo")
    same(ran(other, keep), ran(other))
    assert len(filled) == 20
    filled.clear()
    passes.run(other, select(["cosine"]).features, profile=True, keep=keep, threads=1)
    assert len(filled) >= 1
    filled.clear()
    passes.run(other, select("default").features, profile=False, keep=keep, threads=1)
    assert len(filled) == 10


def test_half_a_block_is_computed_again(tmp_path, zoo, filled):
    keep = tmp_path / "keep"
    whole = ran(zoo, keep)
    path = sorted(keep.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-5])
    filled.clear()
    same(ran(zoo, keep), whole)
    assert len(filled) == 1


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, zoo):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt: does not belong"):
        ran(zoo, keep)
    assert (keep / "thesis.txt").read_text() == "mine"


def test_one_block_keeps_nothing(tmp_path, zoo, monkeypatch):
    monkeypatch.setattr(passes, "PAIR_BYTES", 1 << 30)
    ran(zoo, tmp_path / "keep")
    assert not (tmp_path / "keep").exists()


def test_screen_goes_on_where_it_was_killed_and_cleans_up(tmp_path, zoo, monkeypatch, capsys):
    from mergeprobe_fast.cli import main

    command = ["screen", str(tmp_path / "zoo"), "--out", str(tmp_path / "new" / "out"), "--json"]
    fill, done = passes._fill, []

    def killed(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return fill(*arguments)

    monkeypatch.setattr(passes, "_fill", killed)
    assert main(command) == 130
    said = capsys.readouterr().err
    blocks = tmp_path / "new" / ".out.blocks"
    assert len(os.listdir(blocks)) == 3 and not (tmp_path / "new" / "out").exists()
    assert f"3 blocks of pairs are kept in {blocks}" in said
    done.clear()
    monkeypatch.setattr(passes, "_fill", lambda *a: (done.append(1), fill(*a))[1])
    assert main(command) == 0
    assert len(done) == 7 and os.listdir(tmp_path / "new") == ["out"]
    again = [*command[:3], str(tmp_path / "again"), "--json"]
    assert main(again) == 0
    for name in ("pairs.parquet", "adapters.parquet"):
        one, other = (tmp_path / d / name for d in ("new/out", "again"))
        assert one.read_bytes() == other.read_bytes()
