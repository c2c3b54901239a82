"""Base model folders: what is read, what is refused, what a copy holds."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bases import LLAMA, headers, make_base, tensor_bytes

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import checkpoint as checkpoint_module
from mergeprobe_fast.io.checkpoint import CheckpointCopy, open_checkpoint

TENSORS = {
    "a.weight": ("BF16", (5, 3)), "b.weight": ("F32", (4, 2)), "c.weight": ("U8", (0, 3)),
    "d.counts": ("I64", (3,)), "e.weight": ("F16", (2, 2, 2)), "f": ("BOOL", (7,)),
}  # fmt: skip
INDEX = "model.safetensors.index.json"
TICK = 0.02  # longer than a tick of the clock that file systems stamp with
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_tensor_is_found_where_it_lies(tmp_path, shards):
    base = make_base(tmp_path / "base", TENSORS, shards=shards)
    found = open_checkpoint(base)
    stored = tensor_bytes(base)
    assert set(found.tensors) == set(TENSORS) == set(stored)
    for key, ref in found.tensors.items():
        content = ref.file.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]
        assert (content, ref.dtype, ref.shape) == (stored[key], *TENSORS[key])
    assert len(found.shards) == shards
    assert found.config == LLAMA
    assert found.names == sorted(os.listdir(base))
    assert found.nbytes == sum(path.stat().st_size for path in base.iterdir())


def test_what_a_copy_of_the_model_needs(tmp_path):
    base = make_base(tmp_path / "base", TENSORS)
    kept = ["README.md", "generation_config.json", "modeling_own.py", "tokenizer.model",
            "merges.txt", "special_tokens_map.json"]  # fmt: skip
    left_out = [".gitattributes", "consolidated.safetensors", "model.fp16.safetensors",
                "model.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json",
                "tf_model.h5"]  # fmt: skip
    for name in (*kept, *left_out):
        (base / name).write_text("x")
    for folder in ("original", "onnx", ".cache", "additional_chat_templates"):
        (base / folder).mkdir()
        (base / folder / "tool.jinja").write_text("x")
    found = open_checkpoint(base)
    always = ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert sorted(found.files) == sorted([*kept, *always, "additional_chat_templates/tool.jinja"])
    assert sorted(found.left_out) == sorted([*left_out, "original/", "onnx/", ".cache/"])
    with CheckpointCopy(found, _folder(tmp_path / "copy"), []):
        pass
    assert sorted(os.listdir(tmp_path / "copy")) == found.names
    for name in (*found.files, "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (base / name).read_bytes()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _rewrite(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


MISHAPS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda b: (b / "config.json").unlink(), "", "has no config.json"),
    "config of rubbish": (
        lambda b: (b / "config.json").write_text("{"), "config.json", "not valid JSON"),
    "missing shard": (lambda b: (b / TWO).unlink(), TWO, f"is missing; {INDEX} names it"),
    "truncated shard": (lambda b: _cut(b / TWO), TWO, "is truncated"),
    "longer shard": (
        lambda b: (b / TWO).write_bytes((b / TWO).read_bytes() + b"x"), TWO,
        "has bytes that no tensor owns"),
    "key in another shard": (
        lambda b: _rewrite(b / INDEX, lambda i: i["weight_map"].update({"a.weight": TWO})),
        f"{INDEX}: a.weight", f"lies in {ONE}, the index says otherwise"),
    "key the index lacks": (
        lambda b: _rewrite(b / INDEX, lambda i: i["weight_map"].pop("a.weight")),
        f"{INDEX}: a.weight", "the index says otherwise"),
    "key no shard has": (
        lambda b: _rewrite(b / INDEX, lambda i: i["weight_map"].update(ghost=ONE)),
        f"{INDEX}: ghost", f"is not in {ONE}"),
    "a path for a name": (
        lambda b: _rewrite(b / INDEX, lambda i: i["weight_map"].update(f=f"../{ONE}")),
        f"{INDEX}: f", "no name of a safetensors file"),
    "a pickle for a shard": (
        lambda b: _rewrite(b / INDEX, lambda i: i["weight_map"].update(f="x.bin")),
        f"{INDEX}: f", "no name of a safetensors file"),
    "no weight map": (
        lambda b: (b / INDEX).write_text("{}"), f"{INDEX}: weight_map", "is not an object"),
    "index and one file": (
        lambda b: (b / "model.safetensors").write_bytes((b / ONE).read_bytes()), "", "has both"),
    "neither": (lambda b: (b / INDEX).unlink(), "", "has no model.safetensors and no model.safe"),
    "adapter beside": (
        lambda b: (b / "adapter_config.json").write_text("{}"), "adapter_config.json",
        "an adapter beside the model"),
    "gptq": (
        lambda b: _rewrite(b / "config.json", lambda c: c.update(
            quantization_config={"quant_method": "gptq", "bits": 4})),
        "config.json: quantization_config", "the base is quantised (gptq)"),
    "quantised text model": (
        lambda b: _rewrite(b / "config.json", lambda c: c.update(
            text_config={"quantization_config": {"quant_method": "fp8"}})),
        "config.json: text_config.quantization_config", "the base is quantised (fp8)"),
}  # fmt: skip


@pytest.mark.parametrize(("mishap", "where", "reason"), MISHAPS.values(), ids=MISHAPS)
def test_a_bad_base_is_one_error_naming_file_key_and_reason(tmp_path, mishap, where, reason):
    base = make_base(tmp_path / "base", TENSORS, shards=2)
    mishap(base)
    with pytest.raises(InputError) as caught:
        open_checkpoint(base)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{base / where if where else base}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_said(tmp_path):
    (tmp_path / "model.gguf").write_text("GGUF")
    for path, reason in ((tmp_path / "model.gguf", "is a file"), (tmp_path / "none", "No such")):
        with pytest.raises(InputError, match=reason):
            open_checkpoint(path)
    base = make_base(tmp_path / "base", TENSORS)
    os.rename(base / "model.safetensors", base / "model.gguf")
    with pytest.raises(InputError, match=r"it has model\.gguf\); convert it to safetensors"):
        open_checkpoint(base)


def test_links_are_followed_as_in_a_download_cache(tmp_path):
    made = make_base(tmp_path / "blobs", TENSORS, shards=2)
    base = _folder(tmp_path / "snapshot")
    for path in made.iterdir():
        (base / path.name).symlink_to(path)
    with CheckpointCopy(open_checkpoint(base), _folder(tmp_path / "copy"), []):
        pass
    for path in made.iterdir():
        copied = tmp_path / "copy" / path.name
        assert copied.read_bytes() == path.read_bytes() and not copied.is_symlink()


@pytest.mark.parametrize("shards", [1, 2])
def test_replaced_tensors_arrive_in_any_order_and_from_any_thread(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_PIECE", 7)
    base = make_base(tmp_path / "base", TENSORS, shards=shards)
    found, new = open_checkpoint(base), {}
    replaced = ["e.weight", "a.weight", "c.weight"]
    with CheckpointCopy(found, _folder(tmp_path / "copy"), replaced) as copy:

        def write(key: str, start: int, count: int) -> None:
            old = copy.read(found.tensors[key], start, count)
            copy.write(found.tensors[key], start, bytes(byte ^ 0xFF for byte in old))

        workers = []
        for key in replaced:
            ref = found.tensors[key]
            new[key] = bytes(byte ^ 0xFF for byte in tensor_bytes(base)[key])
            for start in reversed(range(0, ref.nbytes, 4)):
                part = key, start, min(4, ref.nbytes - start)
                workers.append(threading.Thread(target=write, args=part))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert tensor_bytes(tmp_path / "copy") == tensor_bytes(base) | new
    assert headers(tmp_path / "copy") == headers(base)


def test_a_tensor_that_was_not_written_is_an_error(tmp_path):
    base = make_base(tmp_path / "base", TENSORS)
    found = open_checkpoint(base)
    with pytest.raises(InputError, match=r"a\.weight: 2 bytes were never written"):
        with CheckpointCopy(found, _folder(tmp_path / "copy"), ["a.weight"]) as copy:
            copy.write(found.tensors["a.weight"], 0, bytes(28))


def _replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.replace(path.parent / "new", path)


def _flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


@pytest.mark.parametrize("change", [_cut, _flip, _replace, Path.unlink], ids=lambda c: c.__name__)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_base_that_changes_is_an_error(tmp_path, change, when):
    base = make_base(tmp_path / "base", TENSORS, shards=2)
    found = open_checkpoint(base)
    time.sleep(TICK)
    if when == "before":
        change(base / TWO)
    with pytest.raises(InputError) as caught:
        with CheckpointCopy(found, _folder(tmp_path / "copy"), ["a.weight"]) as copy:
            assert when == "meanwhile"
            ref = found.tensors["a.weight"]
            copy.write(ref, 0, copy.read(ref, 0, ref.nbytes))
            change(base / TWO)
    assert caught.value.path == str(base / TWO)


def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path):
    base = make_base(tmp_path / "base", TENSORS)
    found = open_checkpoint(base)
    with pytest.raises(InputError, match="became shorter while it was read"):
        with CheckpointCopy(found, _folder(tmp_path / "copy"), ["a.weight"]) as copy:
            os.truncate(base / "model.safetensors", 100)
            copy.read(found.tensors["a.weight"], 0, 30)


def test_descriptors_are_closed_whatever_happens(tmp_path):
    base = make_base(tmp_path / "base", TENSORS, shards=3)
    found = open_checkpoint(base)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for n in range(3):
        with pytest.raises((RuntimeError, InputError)):
            with CheckpointCopy(found, _folder(tmp_path / f"copy{n}"), ["a.weight"]):
                if n == 1:
                    (base / "model-00003-of-00003.safetensors").unlink()
                if n != 1:
                    raise RuntimeError
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
