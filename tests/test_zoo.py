"""Opening a zoo, and its problem table against brute force."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from adapters import MadeAdapter, make_adapter, make_zoo

import mergeprobe_fast as mpf
from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.ops._tables import DTYPE_CODE

NAME_OF_CODE = {code: name for name, code in DTYPE_CODE.items()}
ONE = {"layers.0.q": (6, 5, 2)}


def stored(zoo: mpf.Zoo, row: int, side: str) -> np.ndarray:
    """One factor, read where the table says it lies, as float64."""
    e = zoo.table.entries[row]
    stamp = zoo.table.files[e[f"{side}_file"]]
    dtype = NAME_OF_CODE[int(e[f"{side}_dtype"])]
    data = stamp.path.read_bytes()
    assert len(data) == stamp.size
    raw = data[e[f"{side}_offset"] : e[f"{side}_offset"] + e[f"{side}_nbytes"]]
    values = to_f32(np.frombuffer(raw, STORAGE[dtype]), dtype).astype(np.float64)
    return values.reshape((int(e["rank"]), -1) if side == "a" else (-1, int(e["rank"])))


def assert_table_is(zoo: mpf.Zoo, made: list[MadeAdapter]) -> None:
    """Every (module, adapter) pair has its row, in order, and no other; the bytes are its own."""
    table = zoo.table
    rows = [
        (module, adapter)
        for module, m in enumerate(zoo.modules)
        for adapter, truth in enumerate(made)
        if m.name in truth.modules
    ]
    entries = table.entries
    pairs = zip(entries["module"].tolist(), entries["adapter"].tolist(), strict=True)
    assert list(pairs) == rows
    assert len(table.module_bounds) == len(zoo.modules) + 1
    for k in range(len(zoo.modules)):
        here = entries["module"][table.module_bounds[k] : table.module_bounds[k + 1]]
        assert (here == k).all()
    assert len({stamp.path for stamp in table.files}) == len(table.files)
    for row, (module, adapter) in enumerate(rows):
        shape, truth = zoo.modules[module], made[adapter].modules[zoo.modules[module].name]
        assert entries["rank"][row] == len(truth.a)
        assert entries["scale"][row] == pytest.approx(truth.scale, rel=1e-15)
        assert table.files[entries["a_file"][row]].path.parent == made[adapter].path
        np.testing.assert_array_equal(stored(zoo, row, "a"), truth.a)
        np.testing.assert_array_equal(stored(zoo, row, "b"), truth.b)
        assert (shape.d_out, shape.d_in) == (truth.b.shape[0], truth.a.shape[1])
        assert shape.kind == truth.kind


def test_the_table_of_a_mixed_zoo(tmp_path, rng):
    wide = {f"layers.{i}.q": (7 + i, 5, 1 + i % 4) for i in (0, 1, 2, 10, 11)}
    odd = {"embed": (5, 9, 2), "conv": (4, 2 * 3 * 3, 3)}
    seed = int(rng.integers(1 << 30))
    made = [
        make_adapter(tmp_path / "a", wide, alpha=3, seed=seed),
        make_adapter(
            tmp_path / "b", wide | odd, rslora=True, dtype="BF16", dtypes={"layers.1.q": "F16"},
            embeddings=("embed",), convs={"conv": (2, 3, 3)}, seed=seed + 1,
        ),
        make_adapter(tmp_path / "c", {"layers.2.q": wide["layers.2.q"]}, alphas={"layers.2.q": 7}),
        make_adapter(
            tmp_path / "d", odd, embeddings=("embed",), convs={"conv": (2, 3, 3)}, dtype="F16"
        ),
    ]  # fmt: skip
    zoo = mpf.open_zoo(tmp_path)
    names = [*(f"layers.{i}.q" for i in (0, 1, 2, 10, 11))]
    assert [m.name for m in zoo.modules] == ["conv", "embed", *names]
    assert zoo.names == list("abcd")
    assert zoo.modules[0].conv_shape == (2, 3, 3) and zoo.modules[1].conv_shape is None
    assert_table_is(zoo, made)
    order = [2, 0, 3, 1]
    assert_table_is(mpf.open_zoo([made[i].path for i in order]), [made[i] for i in order])


def test_shards_of_one_adapter(tmp_path):
    """A and B of a module in two files, and another module's in the first."""
    made = make_adapter(tmp_path / "zoo" / "a", {"m": (6, 5, 2), "n": (4, 3, 2)})
    keys = {
        f"base_model.model.{name}.lora_{side}.weight": getattr(made.modules[name], side.lower())
        for name in "mn"
        for side in "AB"
    }
    first = "adapter_model-00001-of-00002.safetensors"
    second = "adapter_model-00002-of-00002.safetensors"
    where = {key: second if "m.lora_B" in key else first for key in keys}
    for shard in (first, second):
        part = {k: v.astype(np.float32) for k, v in keys.items() if where[k] == shard}
        safetensors.write(made.path / shard, part, {"format": "pt"})
    (made.path / "adapter_model.safetensors").unlink()
    index = json.dumps({"weight_map": where})
    (made.path / "adapter_model.safetensors.index.json").write_text(index)
    other = make_adapter(tmp_path / "zoo" / "b", {"m": (6, 5, 2)}, seed=3)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    assert len(zoo.table.files) == 3
    assert_table_is(zoo, [made, other])
    assert mpf.adapter_features(zoo)["norm"] == pytest.approx([made.norm, other.norm], rel=1e-9)


def test_nested_folders_and_natural_order(tmp_path):
    for name in ("run10", "run9", "deep/er/x2", "deep/er/x10", "deep/a"):
        make_adapter(tmp_path / name, ONE)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["deep/a", "deep/er/x2", "deep/er/x10", "run9", "run10"]
    assert zoo.root == tmp_path and zoo.notes == () and len(zoo) == 5
    assert [a.path for a in zoo] == [tmp_path / name for name in zoo.names]
    assert mpf.open_zoo(str(tmp_path)).names == zoo.names


def test_checkpoints_inside_an_adapter_are_noted(tmp_path):
    for name in ("a", "a/checkpoint-10", "a/checkpoint-20", "b"):
        make_adapter(tmp_path / name, ONE)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["a", "b"]
    assert [note for note in zoo.notes if "2 adapters in its sub-folders" in note]
    listed = mpf.open_zoo([tmp_path / "a" / "checkpoint-10", tmp_path / "a"])
    assert listed.names == ["checkpoint-10", "a"]


def test_stray_weight_files_are_noted(tmp_path):
    make_adapter(tmp_path / "a", ONE)
    (tmp_path / "kohya").mkdir()
    for name in ("style.safetensors", "old.ckpt", "readme.md"):
        (tmp_path / "kohya" / name).write_bytes(b"")
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["a"]
    assert [n for n in zoo.notes if str(tmp_path / "kohya") in n and "2 weight files" in n]


def test_temporary_folders_are_passed_over_in_silence(tmp_path):
    """What an interrupted write left, a whole zoo of it included."""
    make_adapter(tmp_path / "a", ONE)
    left = "0123456789abcdef"
    make_adapter(tmp_path / f".out.tmp-{left}", ONE)
    make_adapter(tmp_path / f".out.old-{left}", ONE)
    make_adapter(tmp_path / f".zoo.tmp-{left}" / "half", ONE)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["a"]
    assert zoo.notes == ()


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_loops_of_links_do_not_hang_and_change_nothing(tmp_path, target):
    make_adapter(tmp_path / "zoo" / "a", ONE)
    for i in range(12):
        (tmp_path / "zoo" / f"group{i}").mkdir()
        (tmp_path / "zoo" / f"group{i}" / "loop").symlink_to(target)
    began = time.monotonic()
    zoo = mpf.open_zoo(tmp_path / "zoo")
    assert time.monotonic() - began < 5
    assert zoo.names == ["a"]


def test_a_link_to_an_adapter_is_that_adapter(tmp_path):
    made = make_adapter(tmp_path / "store" / "a", ONE)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "linked").symlink_to(made.path)
    assert mpf.open_zoo(tmp_path / "zoo").names == ["linked"]


def test_the_same_adapter_twice_is_refused(tmp_path):
    made = make_adapter(tmp_path / "zoo" / "a", ONE)
    (tmp_path / "zoo" / "b").symlink_to(made.path)
    spelled = tmp_path / "zoo" / ".." / "zoo" / "a"
    alias = mpf.open_zoo(tmp_path / "zoo")
    assert alias.names == ["a"] and "b: the same folder as a, taken once" in alias.notes
    for paths in ([made.path, made.path], [made.path, spelled], [tmp_path / "zoo", made.path],
                  [tmp_path / "zoo", tmp_path / "zoo"]):  # fmt: skip
        with pytest.raises(mpf.InputError, match="is given twice"):
            mpf.open_zoo(paths)
    # Equal content under two names is not the same adapter.
    (tmp_path / "zoo" / "b").unlink()
    shutil.copytree(made.path, tmp_path / "zoo" / "b")
    assert mpf.open_zoo(tmp_path / "zoo").names == ["a", "b"]


def test_names_are_unique(tmp_path):
    for name in ("x/run", "y/run", "z/other"):
        make_adapter(tmp_path / name, ONE)
    paths = [tmp_path / name for name in ("x/run", "y/run", "z/other")]
    zoo = mpf.open_zoo(paths)
    assert zoo.names == [paths[0].as_posix(), paths[1].as_posix(), "other"]
    zoo = mpf.open_zoo([tmp_path / "x", tmp_path / "y"])
    assert len(set(zoo.names)) == 2


def test_the_order_given_is_kept(tmp_path):
    paths = [m.path for m in make_zoo(tmp_path, 3, modules=ONE)][::-1]
    zoo = mpf.open_zoo(paths)
    assert zoo.names == ["adapter_002", "adapter_001", "adapter_000"]
    assert zoo.root is None and [a.path for a in zoo] == paths
    assert mpf.open_zoo(iter(paths)).names == zoo.names


@pytest.mark.parametrize(
    ("paths", "message"),
    [([], "no adapters given"), (["empty"], "no adapters in this folder"),
     (["nowhere"], "cannot be read"), (["file"], "is a file")],
)  # fmt: skip
def test_nothing_to_open(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "er").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(mpf.InputError, match=message):
        mpf.open_zoo(paths)


def test_base_models(tmp_path):
    make_adapter(tmp_path / "a", ONE, base_model="org/one")
    make_adapter(tmp_path / "b", ONE, base_model=None)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.base_model == "org/one"
    assert [n for n in zoo.notes if "no base model declared" in n and "b" in n]
    second = make_adapter(tmp_path / "c", ONE, base_model="/mnt/one")
    with pytest.raises(mpf.InputError, match="--same-base") as caught:
        mpf.open_zoo(tmp_path)
    assert caught.value.path == str(second.path)
    assert "'/mnt/one'" in str(caught.value) and "'org/one'" in str(caught.value)
    zoo = mpf.open_zoo(tmp_path, same_base=True)
    assert zoo.base_model == "org/one" and len(zoo) == 3
    assert "taken as one base model: /mnt/one, org/one" in zoo.notes
    make_adapter(tmp_path / "only" / "b", ONE, base_model=None)
    assert mpf.open_zoo(tmp_path / "only").base_model is None


@pytest.mark.parametrize("same_base", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {"modules": {"m": (8, 18, 2)}},
        {"modules": {"m": (7, 16, 2)}},
        {"modules": {"m": (8, 16, 2)}, "embeddings": ("m",)},
        {"modules": {"m": (8, 16, 2)}, "convs": {"m": (4, 2, 2)}},
    ],
    ids=["input", "output", "embedding", "conv"],
)
def test_shapes_that_disagree_are_an_error(tmp_path, same_base, other):
    make_adapter(tmp_path / "a", {"m": (8, 16, 2)})
    bad = make_adapter(tmp_path / "b", **other)
    with pytest.raises(mpf.InputError, match="not the same base model") as caught:
        mpf.open_zoo(tmp_path, same_base=same_base)
    assert (caught.value.path, caught.value.key) == (str(bad.path), "m")


def test_conv_kernels_that_disagree_are_an_error(tmp_path):
    """3x1x2 and 1x2x3 flatten to the same width."""
    shapes = {"a": (3, 1, 2), "b": (1, 2, 3), "c": (3, 2, 1)}
    for name, shape in shapes.items():
        make_adapter(tmp_path / name, {"m": (4, 6, 2)}, convs={"m": shape})
    for pair in ("ab", "bc", "ca"):
        with pytest.raises(mpf.InputError, match="not the same base model"):
            mpf.open_zoo([tmp_path / name for name in pair])


def test_different_ranks_and_scales_are_welcome(tmp_path):
    make_adapter(tmp_path / "a", ONE, rank=1)
    make_adapter(tmp_path / "b", ONE, rank=5, alpha=1, rslora=True)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.table.entries["rank"].tolist() == [1, 5]
    assert zoo.table.entries["scale"].tolist() == [8.0, 1 / math.sqrt(5)]


def test_skip_bad(tmp_path):
    make_zoo(tmp_path, 3, modules=ONE)
    weights = tmp_path / "adapter_001" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(mpf.InputError, match="is truncated"):
        mpf.open_zoo(tmp_path)
    zoo = mpf.open_zoo(tmp_path, skip_bad=True)
    assert zoo.names == ["adapter_000", "adapter_002"]
    assert [s.path for s in zoo.skipped] == [tmp_path / "adapter_001"]
    assert str(weights) in zoo.skipped[0].reason and "is truncated" in zoo.skipped[0].reason
    # Skipping is for adapters that cannot be used, not for a zoo that does not fit together.
    make_adapter(tmp_path / "adapter_002", ONE, base_model="other")
    with pytest.raises(mpf.InputError, match="--same-base"):
        mpf.open_zoo(tmp_path, skip_bad=True)


def test_a_large_zoo_opens_in_seconds(tmp_path):
    """300 adapters of 200 modules, three ranks among them."""
    modules = {f"model.layers.{i}.self_attn.{m}": (4, 4, 1) for i in range(50) for m in "qkvo"}
    originals = [make_adapter(tmp_path / f"original{r}", modules, rank=r) for r in (1, 2, 3)]
    for i in range(300):
        shutil.copytree(originals[i % 3].path, tmp_path / "zoo" / f"adapter{i}")
    began = time.perf_counter()
    zoo = mpf.open_zoo(tmp_path / "zoo")
    opened = time.perf_counter()
    table = zoo.table
    built = time.perf_counter()
    print(f"300 x 200: opened in {opened - began:.2f} s, table in {built - opened:.2f} s")
    assert len(table.entries) == 60_000 and len(table.files) == 300
    assert built - began < 15
    assert zoo.names[:11] == [f"adapter{i}" for i in range(11)]
    assert (table.entries["rank"] == 1 + table.entries["adapter"] % 3).all()
    some = np.random.default_rng(0).choice(60_000, 20, replace=False)
    for row in some:
        name = zoo.modules[table.entries["module"][row]].name
        truth = originals[table.entries["adapter"][row] % 3].modules[name]
        np.testing.assert_array_equal(stored(zoo, row, "b"), truth.b)


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    """A sparse file of a terabyte opens at once."""
    path = make_adapter(tmp_path / "a", {"m": (4, 4, 2)}).path / "adapter_model.safetensors"
    rank = 1 << 36
    tensors = {
        f"base_model.model.m.lora_{side}.weight": {
            "dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * rank]
        }
        for side, shape, start in (("A", [rank, 1], 0), ("B", [1, rank], 4 * rank))
    }  # fmt: skip
    header = json.dumps(tensors)
    header += " " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    try:
        os.truncate(path, 8 + len(header) + 8 * rank)
    except OSError:
        pytest.skip("this file system has no large sparse files")
    config = Path(path.parent / "adapter_config.json")
    config.write_text(config.read_text().replace('"r": 2', f'"r": {rank}'))
    zoo = mpf.open_zoo(tmp_path / "a")
    assert zoo.modules[0].d_in == 1 and zoo.table.entries["rank"][0] == rank
