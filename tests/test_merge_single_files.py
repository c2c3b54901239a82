"""Merges of kohya and diffusers files: written as they came, one file, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import delta_of
from command_line import Run, assert_refused, runner, strict_json
from single_files import DIFFUSERS, KOHYA, make_file

import mergeprobe_fast as mpf
from mergeprobe_fast.io.single_file import MERGE_KEY

WEIGHTS = [0.75, -0.5]


@pytest.fixture
def cli(capsys) -> Run:
    return runner(capsys)


def made_files(folder: Path, dialect: str, rng: np.random.Generator):
    folder.mkdir()
    modules, style = (KOHYA, "lora_down") if dialect == "kohya" else (DIFFUSERS, "lora_A")
    return [
        make_file(folder / f"{n}.safetensors", modules, style=style, seed=int(seed))
        for n, seed in zip("ab", rng.integers(1 << 30, size=2), strict=True)
    ]


def flat(made, name: str) -> np.ndarray:
    """The float64 delta, (d_out, d_in)."""
    weight = made.modules[name].weight
    return weight.reshape(len(weight), -1)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_a_merge_is_a_file_like_its_inputs(tmp_path, rng, dialect, method):
    made = made_files(tmp_path / "zoo", dialect, rng)
    zoo = mpf.open_zoo([m.path for m in made])
    out = tmp_path / "new" / "merged.safetensors"
    merged = mpf.merge(zoo, method, WEIGHTS, dtype="F32")
    report = merged.save(out)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "merged.merge.json", "merged.safetensors"
    ]  # fmt: skip
    assert json.loads((out.parent / "merged.merge.json").read_text()) == report
    opened = mpf.open_zoo(out)[0]
    assert opened.format == zoo[0].format and list(opened.modules) == list(zoo[0].modules)
    assert MERGE_KEY in opened.config["metadata"]
    for m in merged.modules:
        name = m.module.name
        written, ours = delta_of(opened.modules[name]), m.b.astype(np.float64) @ m.a
        assert np.linalg.norm(written - ours) <= 1e-6 * np.linalg.norm(ours)
        if method == "linear":
            truth = sum(w * flat(a, name) for w, a in zip(WEIGHTS, made, strict=True))
            assert np.linalg.norm(written - truth) <= 1e-5 * np.linalg.norm(truth)
    # A merge of merges says so.
    assert any("result of a merge" in n for n in mpf.open_zoo([made[0].path, out]).notes)


def test_on_the_command_line(cli, tmp_path, rng):
    made = made_files(tmp_path / "zoo", "kohya", rng)
    paths = [m.path for m in made]
    out = tmp_path / "out.safetensors"
    ran = cli("merge", *paths, "--rank", 3, "--out", out, "--json")
    assert ran.code == 0 and {m["rank"] for m in strict_json(ran.out)["modules"].values()} == {3}
    before = out.read_bytes()
    assert_refused(cli("merge", *paths, "--out", out), "exists; pass --overwrite")
    assert cli("merge", *paths, "--rank", 2, "--out", out, "--overwrite").code == 0
    assert out.read_bytes() != before
    ran = cli("merge", *paths, "--out", paths[0], "--overwrite")
    assert_refused(ran, "would overwrite the input")
    ran = cli("merge", *paths, "--out", tmp_path / "folder")
    assert_refused(ran, "folder: a is a kohya file", "name a .safetensors file")
    assert not (tmp_path / "folder").exists()


def test_a_report_that_is_in_the_way_is_refused_before_anything_is_written(tmp_path, rng):
    made = made_files(tmp_path / "zoo", "kohya", rng)
    (tmp_path / "x.merge.json").write_text("mine")
    merged = mpf.merge([m.path for m in made])
    with pytest.raises(mpf.InputError, match=r"x\.merge\.json: exists"):
        merged.save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    assert (tmp_path / "x.merge.json").read_text() == "mine"


def test_a_peft_zoo_is_written_as_a_folder_only(tmp_path):
    from adapters import make_adapter

    path = make_adapter(tmp_path / "a").path
    with pytest.raises(mpf.InputError, match="when all inputs are of one such format"):
        mpf.merge(path).save(tmp_path / "x.safetensors")
