"""adapters.json as strictly as its neighbours, and vLLM's line as vLLM takes it apart."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from adapters import make_adapter
from dense_merge import seed_from

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import vllm
from mergeprobe_fast.planning.artefacts import apply_plan
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.planning.served import SCRIPT_NAME, SERVED_NAME, read_served

MODULES = {"q": (12, 10, 3), "v": (6, 10, 3)}
NAMES = ("it's 数学", "two words", "plain=1")


@pytest.fixture
def applied(tmp_path, rng):
    """Three adapters, two of them merged, in a folder whose name needs quoting."""
    return apply_three(tmp_path, rng)


def apply_three(tmp_path, rng, base_model="test/base"):
    for i in range(3):
        make_adapter(tmp_path / f"zoo/{i}", MODULES, seed=seed_from(rng), base_model=base_model)
    plan = SimpleNamespace(groups=[
        Group(NAMES[0], ("0", "2"), "merge", "linear", (1.0, 1.0), {}, (0.9, 0.8)),
        Group("1", ("1",), "route"),
    ])  # fmt: skip
    return apply_plan(plan, mpf.open_zoo(tmp_path / "zoo"), tmp_path / "my out's")


def test_ranks_are_rounded_up_to_those_that_vllm_allocates():
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    for rank in range(513):
        found = vllm.max_lora_rank(rank)
        assert found in allowed and found >= rank and not [a for a in allowed if rank <= a < found]
    assert vllm.max_lora_rank(513) is None


def vllm_modules(items):
    """As vllm/entrypoints/openai/cli_args.py reads each of ``--lora-modules``."""
    found = []
    for item in items:
        if "=" in item and "," not in item:
            name, path = item.split("=")
            found.append({"name": name, "path": path})
        else:
            found.append(json.loads(item))
    assert all(set(one) <= {"name", "path", "base_model_name"} for one in found)
    return found


def test_the_line_is_what_vllm_takes(applied):
    words = shlex.split(applied.vllm_command)
    assert words[:3] == ["vllm", "serve", "test/base"]
    split = words.index("--lora-modules")
    options = dict(zip(["on", *words[4:split:2]], [words[3], *words[5:split:2]], strict=True))
    assert options == {"on": "--enable-lora", "--max-loras": "2", "--max-lora-rank": "8"}
    assert vllm_modules(words[split + 1 :]) == [
        {"name": r.name, "path": str(applied.folder(r.name)), "base_model_name": "test/base"}
        for r in applied.residents
    ]


def run_script(folder, tmp_path, *more, **environment):
    """What a ``vllm`` that only looks is called with, and where, by the script of a folder."""
    tool = tmp_path / "bin" / "vllm"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text('#!/bin/sh\npwd\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(folder / SCRIPT_NAME), *more], cwd=tmp_path, text=True, capture_output=True,
        env={"PATH": path, **environment}, encoding="utf-8",
    )  # fmt: skip


def test_the_script_runs_from_anywhere_and_moves_with_the_folder(applied, tmp_path):
    moved = tmp_path / "elsewhere $HOME"
    shutil.move(applied.path, moved)
    done = run_script(moved, tmp_path, "--port", "8 1")
    where, *words = done.stdout.splitlines()
    assert (done.returncode, where) == (0, str(moved))
    split = words.index("--lora-modules")
    assert words[:split] == [
        "serve", "test/base", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
        "--port", "8 1",
    ]  # fmt: skip
    for found, resident in zip(vllm_modules(words[split + 1 :]), applied.residents, strict=True):
        assert (found["name"], found["path"]) == (resident.name, resident.folder)
        assert (moved / found["path"] / "adapter_config.json").is_file()
    assert "other base" in run_script(moved, tmp_path, BASE="other base").stdout.splitlines()


def test_a_base_that_nobody_named_is_asked_for(tmp_path, rng):
    applied = apply_three(tmp_path, rng, base_model=None)
    done = run_script(applied.path, tmp_path)
    assert done.returncode != 0 and "name the base model" in done.stderr
    assert "my base" in run_script(applied.path, tmp_path, BASE="my base").stdout.splitlines()
    words = shlex.split(applied.vllm_command)
    assert words[2] == "BASE" and "base_model_name" not in applied.vllm_command


def test_a_base_folder_is_named_by_its_whole_path(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base's").mkdir()
    applied = apply_three(tmp_path, rng, base_model="base's")
    assert shlex.split(applied.vllm_command)[2] == str(tmp_path / "base's")
    assert str(tmp_path / "base's") in run_script(applied.path, tmp_path).stdout.splitlines()


def test_a_script_that_cannot_serve_says_why(tmp_path, rng):
    make_adapter(tmp_path / "zoo/a", {"q": (620, 610, 513)}, seed=seed_from(rng))
    plan = SimpleNamespace(groups=[Group("a", ("a",), "route")])
    applied = apply_plan(plan, mpf.open_zoo(tmp_path / "zoo"), tmp_path / "out")
    done = run_script(applied.path, tmp_path)
    assert done.returncode == 1 and "above 512, the largest of vLLM" in done.stderr


BAD_FIELDS = [
    (("format",), "x", "format: is not 'mergeprobe-adapters'"),
    (("version",), 9, "version: is 9, this program reads 1"),
    (("more",), 1, "more: is not a field of this format"),
    (("base_model",), 1, "base_model: is not a text"),
    (("adapters",), [], "adapters: is empty"),
    (("adapters", 0, "name"), "1", "adapters.name: is there twice"),
    (("adapters", 0, "folder"), "adapters/1", "adapters.folder: is there twice"),
    (("adapters", 0, "folder"), "../x", "adapters[0].folder: is no folder beside this file"),
    (("adapters", 0, "folder"), "/etc", "adapters[0].folder: is no folder beside this file"),
    (("adapters", 0, "rank"), -1, "adapters[0].rank: is not an integer from 0"),
    (("adapters", 0, "rank"), 400, "vllm: does not follow from the adapters"),
    (("adapters", 0, "members"), [], "adapters[0].members: is empty"),
    (("adapters", 0, "members", 0, "name"), "1", "adapters.members: names one twice"),
    (("adapters", 0, "members", 0, "weight"), "1", "weight: is not a finite number"),
    (("adapters", 0, "members", 0, "name"), "new", "serves: does not follow from the adapters"),
    (("adapters", 0, "sha256"), {"../x": "0" * 64}, "is no folder beside this file"),
    (("adapters", 0, "fingerprint"), "", "fingerprint: is not 64 hexadecimal digits"),
    (("adapters", 1, "rounding_error"), -1, "adapters[1].rounding_error: is negative"),
    (("serves",), {}, "serves: does not follow from the adapters"),
    (("vllm", "max_loras"), 7, "vllm: does not follow from the adapters"),
    (("notes",), "none", "notes: is not a list"),
]


@pytest.mark.parametrize(("path", "value", "reason"), BAD_FIELDS)
def test_a_bad_field_is_named(applied, path, value, reason):
    file = applied.path / SERVED_NAME
    content = json.loads(file.read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_served(applied.path)
    assert reason in str(caught.value) and caught.value.path == os.fspath(file)


def test_a_file_that_is_missing_or_another_one_is_named(applied):
    file = applied.folder("1") / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(InputError, match=r"safetensors: is not the file that adapters\.json was"):
        read_served(applied.path)
    assert read_served(applied.path, verify=False) == applied
    file.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: cannot be read"):
        read_served(applied.path)
    (applied.path / SERVED_NAME).unlink()
    with pytest.raises(InputError, match=r"adapters\.json: cannot be read"):
        read_served(applied.path)


def test_an_adapter_that_is_not_there_is_named(applied):
    with pytest.raises(InputError, match="absent: is no resident adapter"):
        applied.folder("absent")
