"""Merging into base weights: what is refused, and that nothing half-done is ever seen."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter
from bases import LLAMA, make_base, weights_of
from dense_merge import digests

import mergeprobe_fast as mpf
from mergeprobe_fast.io import is_temporary
from mergeprobe_fast.merging import into
from mergeprobe_fast.merging.into import merge_into

Q = "model.layers.0.self_attn.q_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
SIZE = {Q: (12, 10, 4)}
BASE = {f"{Q}.weight": ("BF16", (12, 10)), "model.norm.weight": ("BF16", (10,))}
TABLE = ("BF16", (16, 10))


def refused(zoo: Path, base: Path, out: Path, **arguments: Any) -> mpf.InputError:
    before = digests(out.parent)
    with pytest.raises(mpf.InputError) as caught:
        merge_into(zoo, base, out, **arguments)
    assert "\n" not in str(caught.value)
    assert digests(out.parent) == before
    return caught.value


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "absent": ({"model.norm.weight": ("BF16", (10,))}, {}, "the base has no tensor for this"),
    "ambiguous": (
        {f"{p}.{Q}.weight": ("BF16", (12, 10)) for p in ("encoder", "decoder")}, {},
        f"may be any of 2 tensors of the base, such as decoder.{Q}.weight and encoder.{Q}.weight"),
    "two for one": (
        {f"{Q}.weight": ("BF16", (12, 10))}, {"modules": {**SIZE, f"x.{Q}": (12, 10, 4)}},
        f"both {Q} and this would be added to {Q}.weight"),
    "other shape": ({f"{Q}.weight": ("BF16", (12, 11))}, {}, "is 12 x 11, the update of"),
    "a vector": ({f"{Q}.weight": ("BF16", (120,))}, {}, "is 120, the update of"),
    "float8": ({f"{Q}.weight": ("F8_E4M3", (12, 10))}, {}, "is F8_E4M3; an update can be added"),
    "float64": ({f"{Q}.weight": ("F64", (12, 10))}, {}, "is F64; an update can be added to F32"),
    "int8": ({f"{Q}.weight": ("I8", (12, 10))}, {}, "is I8; an update can be added"),
    "embedding as linear": (
        {f"{Q}.weight": ("BF16", (12, 10))}, {"embeddings": (Q,)}, "is 12 x 10, the update"),
    "conv": (
        {f"{Q}.weight": ("BF16", (12, 5, 2, 1))}, {"convs": {Q: (5, 1, 2)}}, "is 12 x 5 x 2 x 1"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "adapter", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_base_that_does_not_fit_is_refused(tmp_path, tensors, adapter, reason):
    drawn = {
        key: value if value[0] not in ("F8_E4M3", "F64") else (*value, bytes(120 * (
            8 if value[0] == "F64" else 1)))
        for key, value in tensors.items()
    }  # fmt: skip
    base = make_base(tmp_path / "base", drawn)
    made = make_adapter(tmp_path / "a", **{"modules": SIZE, **adapter})
    error = refused(made.path, base, tmp_path / "out")
    assert reason in error.reason
    assert error.key in (*made.modules, *tensors)


SQUARE, WIDE = {"h.0.proj": (8, 8, 2)}, {"h.0.proj": (8, 8, 2), "h.0.fc": (6, 8, 2)}


@pytest.mark.parametrize(
    ("modules", "flags", "stored", "model_type", "flipped"),
    [
        (SQUARE, (False,), (6, 8), "llama", False),
        (SQUARE, (True,), (6, 8), "llama", True),
        (SQUARE, (True, False), (6, 8), "llama", None),
        (SQUARE, (False,), (8, 6), "gpt2", True),  # PEFT's second adapter of a model
        (WIDE, (False, True), (8, 6), "llama", True),
        (WIDE, (False,), (8, 6), "llama", True),
        (WIDE, (True,), (6, 8), "llama", None),
        (WIDE, (False,), (6, 8), "llama", False),
        (WIDE, (False,), (6, 8), "gpt2", None),
    ],
)
def test_how_a_square_weight_lies_is_known_or_refused(
    tmp_path, modules, flags, stored, model_type, flipped
):
    tensors = {"h.0.proj.weight": ("F32", (8, 8)), "h.0.fc.weight": ("F32", stored)}
    base = make_base(tmp_path / "base", tensors, config={"model_type": model_type})
    made = [
        make_adapter(tmp_path / "zoo" / str(i), modules, fan_in_fan_out=flag, seed=i)
        for i, flag in enumerate(flags)
    ]
    if flipped is None:
        error = refused(tmp_path / "zoo", base, tmp_path / "out")
        assert "do not agree on whether the base stores it as (in, out)" in error.reason
        assert error.key == "h.0.proj.weight"
        return
    merge_into(tmp_path / "zoo", base, tmp_path / "out")
    delta = sum(m.modules["h.0.proj"].delta for m in made) / len(made)
    change = weights_of(tmp_path / "out")["h.0.proj.weight"] - weights_of(base)["h.0.proj.weight"]
    assert np.allclose(change, delta.T if flipped else delta, atol=1e-5)
    assert not np.allclose(delta, delta.T, atol=1e-2)


TIED = {**LLAMA, "tie_word_embeddings": True}
OLDER = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
VISION = {"architectures": ["XForConditionalGeneration"], "text_config": {"vocab_size": 16}}
NO_HEAD = {**OLDER, "architectures": ["LlamaModel"]}


@pytest.mark.parametrize("config", [TIED, OLDER, VISION], ids=["tied", "by default", "vision"])
def test_one_of_two_tied_weights_is_refused(tmp_path, config):
    base = make_base(tmp_path / "base", {**BASE, f"{EMBED}.weight": TABLE}, config=config)
    head = make_adapter(tmp_path / "head", {HEAD: (16, 10, 2)})
    error = refused(head.path, base, tmp_path / "out")
    assert error.key == HEAD and "tied to the input embedding" in error.reason
    table = make_adapter(tmp_path / "table", {EMBED: (10, 16, 2)}, embeddings=(EMBED,))
    error = refused(table.path, base, tmp_path / "out")
    assert error.key == f"{EMBED}.weight" and "tied to the output head" in error.reason
    other = make_base(tmp_path / "other", {**BASE, f"{HEAD}.weight": TABLE}, config=config)
    assert "tied to the input embedding" in refused(head.path, other, tmp_path / "out").reason


def test_weights_of_their_own_are_not_tied(tmp_path):
    both = {**BASE, f"{EMBED}.weight": TABLE, f"{HEAD}.weight": TABLE}
    head = make_adapter(tmp_path / "zoo" / "head", {HEAD: (16, 10, 2)})
    make_adapter(tmp_path / "zoo" / "table", {EMBED: (10, 16, 2)}, embeddings=(EMBED,))
    for name, config, noted in (("said", TIED, 2), ("older", OLDER, 0), ("untied", LLAMA, 0)):
        base = make_base(tmp_path / name, both, config=config)
        report = merge_into(tmp_path / "zoo", base, tmp_path / f"{name}-out")
        assert sum("set tie_word_embeddings to false" in n for n in report["notes"]) == noted
    # A model without a head; other embeddings of a model with one.
    lone = make_base(tmp_path / "lone", {**BASE, f"{EMBED}.weight": TABLE}, config=NO_HEAD)
    merge_into(tmp_path / "zoo" / "table", lone, tmp_path / "lone-out")
    larger = {**VISION, "text_config": {"vocab_size": 17}}
    for name, config in (("wpe", {**TIED, "vocab_size": 17}), ("vision", larger)):
        base = make_base(tmp_path / name, {**BASE, f"{EMBED}.weight": TABLE}, config=config)
        merge_into(tmp_path / "zoo" / "table", base, tmp_path / f"{name}-out")
    assert "the base has no tensor for this" in refused(head.path, lone, tmp_path / "out").reason


def test_places_that_are_refused(tmp_path):
    base, made = make_base(tmp_path / "m" / "base", BASE), make_adapter(tmp_path / "a", SIZE)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    before = digests(tmp_path)
    inside = base / "out", tmp_path / "link" / "base" / "x" / "y"
    for out in (base, *inside, tmp_path / "m", made.path, tmp_path / "\0", tmp_path / ("x" * 300)):
        for overwrite in (False, True):
            with pytest.raises(mpf.InputError):
                merge_into(made.path, base, out, overwrite=overwrite)
    assert digests(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["a", "link", "m"]


def test_only_an_earlier_result_is_overwritten(tmp_path):
    base, made = make_base(tmp_path / "base", BASE, shards=2), make_adapter(tmp_path / "a", SIZE)
    out = tmp_path / "out"
    first = merge_into(made.path, base, out)
    assert "exists; pass --overwrite" in refused(made.path, base, out).reason
    second = merge_into(made.path, base, out, weights=[2.0], overwrite=True)
    assert second["total"]["norm"] == pytest.approx(2 * first["total"]["norm"])
    (out / "thesis.txt").write_text("not ours")
    assert "'thesis.txt'" in refused(made.path, base, out, overwrite=True).reason
    shutil.copytree(base, tmp_path / "twin")  # a model like the base, but no result of ours
    assert "has no merge.json" in refused(
        made.path, base, tmp_path / "twin", overwrite=True
    ).reason


def test_a_merge_into_a_merge_says_so(tmp_path):
    base, made = make_base(tmp_path / "base", BASE), make_adapter(tmp_path / "a", SIZE)
    merge_into(made.path, base, tmp_path / "once")
    report = merge_into(made.path, tmp_path / "once", tmp_path / "twice")
    assert any("itself the result of a merge" in note for note in report["notes"])
    assert json.loads((tmp_path / "twice" / "merge.json").read_text()) == report


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    base, made = make_base(tmp_path / "base", BASE), make_adapter(tmp_path / "a", SIZE)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(into.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(into, "CheckpointCopy", None)
    error = refused(made.path, base, tmp_path / "new" / "out")
    assert "GB on a disk with 0.00 GB free" in error.reason
    assert error.path == str(tmp_path / "new" / "out")


@pytest.mark.parametrize("after", range(6))
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, after):
    base, made = make_base(tmp_path / "base", BASE, shards=2), make_adapter(tmp_path / "a", SIZE)
    left, write = [after], os.pwrite

    def full(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    error = refused(made.path, base, tmp_path / "new" / "out")
    assert error.reason == "cannot be written: No space left on device"
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


def test_writes_that_are_cut_short_are_continued(tmp_path, monkeypatch):
    base, made = make_base(tmp_path / "base", BASE), make_adapter(tmp_path / "a", SIZE)
    merge_into(made.path, base, tmp_path / "whole")
    read, write = os.pread, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(data)[:5], at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: read(fd, min(count, 3), at))
    merge_into(made.path, base, tmp_path / "cut")
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.into import merge_into
try:
    merge_into(*sys.argv[1:4])
except InputError as error:
    print(error)
"""
MEMORY = """
import resource, sys
from mergeprobe_fast.merging.into import merge_into
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
a, small, big, out = sys.argv[1:]
merge_into(a + "/small", small, out + "-small", threads=2)
before = peak()
merge_into(a + "/big", big, out, threads=2)
print(peak() - before)
"""


def child(code: str, *words: object, **options: Any) -> Any:
    command = [sys.executable, "-c", code, *map(str, words)]
    # Not the checkout: its package, which lacks the compiled module, would come first.
    elsewhere = tempfile.gettempdir()
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=elsewhere, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and units as on Linux")
def test_a_real_limit_on_the_size_of_files_leaves_nothing(tmp_path):
    tensors = {**BASE, "big": ("U8", (2 << 20,))}
    base, made = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "a", SIZE)
    process = child(LIMITED, made.path, base, tmp_path / "out")
    said, _ = process.communicate(timeout=60)
    assert "out: cannot be written: File too large" in said
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits and units as on Linux")
def test_neither_base_nor_tensor_is_ever_in_memory_as_a_whole(tmp_path):
    """A tensor of 128 MiB and a passive one of 128: some blocks of 2 MiB a thread are held."""
    rows, cols = 16384, 4096
    module = {Q: (rows, cols, 4)}
    make_adapter(tmp_path / "zoo" / "small", SIZE)
    make_adapter(tmp_path / "zoo" / "big", module)
    small = make_base(tmp_path / "small", BASE)
    tensors = {f"{Q}.weight": ("BF16", (rows, cols)), "x": ("U8", (1 << 27,))}
    big = make_base(tmp_path / "big", {"x": ("U8", (1,))})
    header, offset = {}, 0
    for key, (dtype, shape) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + (1 << 27)]}
        offset += 1 << 27
    text = json.dumps(header).encode()
    with open(big / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # zeros, which take no room
    process = child(MEMORY, tmp_path / "zoo", small, big, tmp_path / "out")
    grown, _ = process.communicate(timeout=120)
    assert 0 <= int(grown) <= 64, "MiB"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == 8 + len(text) + offset


ENDLESS = """
import itertools, sys
from mergeprobe_fast.merging.into import merge_into
a, base, out, overwrite = *sys.argv[1:4], sys.argv[4] == "overwrite"
print("ready", flush=True)
for i in itertools.count():
    merge_into(a, base, out if overwrite else f"{out}-{i}", overwrite=overwrite, threads=2)
"""


def large(tmp_path: Path) -> tuple[Path, Path]:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(8)]
    tensors = {f"{name}.weight": ("BF16", (256, 192)) for name in names}
    base = make_base(tmp_path / "base", {**tensors, "x": ("U8", (1 << 18,))}, shards=2)
    return base, make_adapter(tmp_path / "a", {name: (256, 192, 8) for name in names}).path


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_killed_at_any_moment_it_leaves_nothing_half_done(tmp_path, mode):
    base, adapter = large(tmp_path)
    merge_into(adapter, base, tmp_path / "right")
    right = digests(tmp_path / "right")
    finished = 0
    for turn in range(6):
        target = tmp_path / f"run{turn}"
        target.mkdir()
        if mode == "overwrite":
            merge_into(adapter, base, target / "out")
        process = child(ENDLESS, adapter, base, target / "out", mode)
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, "it ended before it was killed"
        process.stdout.close()
        whole = [path for path in target.iterdir() if not is_temporary(path)]
        assert all(digests(path) == right for path in whole)
        assert mode == "new" or whole == [target / "out"]
        finished += len(whole)
    assert finished > 0, "killed too early to show anything"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interruption_leaves_nothing(tmp_path):
    base, adapter = large(tmp_path)
    for turn in range(4):
        process = child(ENDLESS, adapter, base, tmp_path / f"run{turn}" / "out", "new",
                        stderr=subprocess.DEVNULL)  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.05, 0.3))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT, "it ended for another reason"
        process.stdout.close()
        assert not [path for path in tmp_path.rglob("*") if is_temporary(path)]
