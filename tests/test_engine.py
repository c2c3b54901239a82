"""The engine: cut into blocks and chunks it gives the one-pass table; bad files are named."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError, screening
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.aggregate import AGGREGATES
from mergeprobe_fast.features import PAIR_FEATURES, Feature, select
from mergeprobe_fast.features.declare import ROW_CAPTURE, ratio
from mergeprobe_fast.io import safetensors

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.mlp.down_proj": (20, 31, 4),
    "model.layers.1.self_attn.q_proj": (24, 20, 4),
    "model.layers.1.mlp.down_proj": (20, 31, 4),
}
NAMES = list(MODULES)
# Blocks of 2 to 4 adapters; a module or two of a pair of blocks in memory.
PAIR_BYTES = {"one_block": 512 << 20, "blocks_of_2": 1, "blocks_of_3": 4 * 11 * 4 * 9}
CHUNK_BYTES = {"one_chunk": 192 << 20, "a_module_each": 1, "two_modules_or_so": 12_000}


@pytest.fixture
def zoo(tmp_path):
    """Eleven adapters of mixed ranks, some without some modules, one zero."""
    for i in range(11):
        names = NAMES if i % 3 else NAMES[i % 4 :] or NAMES
        sizes = {n: (*MODULES[n][:2], 1 + (i + k) % 5) for k, n in enumerate(names)}
        make_adapter(
            tmp_path / f"adapter_{i}", sizes, seed=i, zero_b=i == 4, magnitude=1 + i % 3
        )
    return mpf.open_zoo(tmp_path)


def cut(monkeypatch, pair_bytes, chunk_bytes):
    monkeypatch.setattr(passes, "PAIR_BYTES", PAIR_BYTES[pair_bytes])
    monkeypatch.setattr(passes, "CHUNK_BYTES", CHUNK_BYTES[chunk_bytes])


def assert_same(one, two, atol):
    assert list(one) == list(two)
    for name in one:
        if name in ("a", "b"):
            assert list(one[name]) == list(two[name])
        else:
            scale = 50 if name.startswith("cosine_z") else 1
            np.testing.assert_allclose(one[name], two[name], 0, atol * scale, err_msg=name)


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
def test_cutting_changes_nothing(zoo, monkeypatch, isa, pair_bytes, chunk_bytes):
    whole = mpf.pair_features(zoo)
    cut(monkeypatch, pair_bytes, chunk_bytes)
    chosen = list(PAIR_FEATURES.values())
    blocks = {len(x) for x in passes._super_blocks(zoo, chosen)}
    assert max(blocks) <= {"one_block": 11, "blocks_of_2": 2, "blocks_of_3": 4}[pair_bytes]
    table = mpf.pair_features(zoo)
    assert_same(table, whole, 1e-6)
    assert list(table.a) == list(np.triu_indices(11, 1)[0])
    assert list(table.b) == list(np.triu_indices(11, 1)[1])
    adapters = mpf.adapter_features(zoo)
    assert adapters["norm"][4] == 0 and (np.delete(adapters["norm"], 4) > 0).all()


@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
def test_screen_equals_pair_features(zoo, monkeypatch, pair_bytes):
    cut(monkeypatch, pair_bytes, "two_modules_or_so")
    found = screening.screen(zoo)
    assert_same(found.pairs, mpf.pair_features(zoo), 1e-6)
    assert found.layers == ["0", "1"] and found.profile.shape == (55, 2)
    norms = np.sqrt(np.square(found.adapter_profile).sum(1))
    np.testing.assert_allclose(norms, found.adapters["norm"], rtol=1e-10)
    assert np.isnan(found.profile[(found.pairs.a == 4) | (found.pairs.b == 4)]).all()
    known = found.profile[~np.isnan(found.profile)]
    assert known.size and (np.abs(known) <= 1).all()


def test_profile_is_the_cosine_of_the_layer(tmp_path):
    made = [make_adapter(tmp_path / str(i), MODULES, seed=i) for i in range(3)]
    found = screening.screen(mpf.open_zoo(tmp_path))
    for row, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        for layer, names in enumerate((NAMES[:2], NAMES[2:])):
            w = [[made[x].modules[n].delta.ravel() for n in names] for x in (i, j)]
            one, two = (np.concatenate(x) for x in w)
            want = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
            assert found.profile[row, layer] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
@pytest.mark.parametrize("features", ["all", ["row_capture_a_by_b"], ["row_capture_b_by_a"]])
def test_directed_features(zoo, monkeypatch, pair_bytes, features):
    cut(monkeypatch, pair_bytes, "one_chunk")
    table = mpf.pair_features(zoo, features)
    want = {}
    deltas = [
        {n: m.scale * factor(m.b) @ factor(m.a) for n, m in x.modules.items()} for x in zoo
    ]
    for name in ("row_capture_a_by_b", "row_capture_b_by_a"):
        order = (lambda i, j: (i, j)) if name.endswith("a_by_b") else (lambda i, j: (j, i))
        want[name] = [capture(*(deltas[k] for k in order(i, j))) for i, j in pairs(table)]
        if name in table:
            np.testing.assert_allclose(table[name], want[name], atol=2e-6, err_msg=name)


def pairs(table):
    return zip(table.a, table.b, strict=True)


def factor(ref):
    raw = np.fromfile(ref.file.path, np.float32, ref.nbytes // 4, offset=ref.offset)
    return raw.reshape(ref.shape).astype(np.float64)


def capture(one, two):
    """Share of the energy of ``one`` in the row spaces of ``two``."""
    total = sum((w**2).sum() for w in one.values())
    if not total or not any(w.any() for w in two.values()):
        return math.nan
    inside = 0.0
    for name in one.keys() & two.keys():
        _, sigma, vt = np.linalg.svd(two[name], full_matrices=False)
        v = vt[sigma > 1e-5 * max(sigma[0], 1e-300)]
        inside += ((one[name] @ v.T) ** 2).sum()
    return inside / total


@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
@pytest.mark.parametrize("twin", [None, "other"], ids=["symmetric_use", "with_twin"])
def test_own_feature(zoo, monkeypatch, pair_bytes, twin):
    """Ten lines of a user's: the larger of the two captures, from both directions of one need."""
    cut(monkeypatch, pair_bytes, "a_module_each")

    def finish(s):
        a, b = s.need[ROW_CAPTURE], s.mirrored[ROW_CAPTURE]
        return np.maximum(ratio(a, s.energy_a), ratio(b, s.energy_b))

    own = Feature(
        "larger", "Larger", "The larger capture.", finish, (ROW_CAPTURE,), directed_twin=twin
    )
    table = mpf.pair_features(zoo, ["row_capture_a_by_b", "row_capture_b_by_a"])
    want = np.fmax(table["row_capture_a_by_b"], table["row_capture_b_by_a"])
    alone = mpf.pair_features(zoo, [own])
    known = ~np.isnan(alone["larger"])
    assert known.sum() == 45
    np.testing.assert_allclose(alone["larger"][known], want[known], atol=2e-6)
    assert set(alone) == {"a", "b", "larger", *(f"larger.{x}" for x in AGGREGATES)}
    beside = mpf.pair_features(zoo, [own, "cosine"])
    np.testing.assert_array_equal(beside["larger"], alone["larger"])


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
def test_progress_adds_up(zoo, monkeypatch, pair_bytes, chunk_bytes):
    cut(monkeypatch, pair_bytes, chunk_bytes)
    seen = []
    mpf.pair_features(zoo, ["cosine"], progress=seen.append)
    assert sum(seen) == passes.steps(zoo, select(["cosine"]).features)
    assert all(n > 0 for n in seen)


def test_threads_and_runs_do_not_change_bytes(zoo, isa):
    first, *others = (mpf.pair_features(zoo, threads=t) for t in (1, 2, 3, 7, 1))
    for table in others:
        for name in set(table) - {"a", "b"}:
            assert table[name].tobytes() == first[name].tobytes(), name


def test_every_instruction_set_agrees(zoo, monkeypatch):
    from mergeprobe_fast import _native

    tables = []
    for name in _native.core().available_isas():
        monkeypatch.setenv("MERGEPROBE_ISA", name)
        tables.append(mpf.pair_features(zoo))
    for table in tables[1:]:
        assert_same(table, tables[0], 1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_small_zoos(tmp_path, count):
    for i in range(count):
        make_adapter(tmp_path / str(i), MODULES, seed=i)
    zoo = mpf.open_zoo(tmp_path)
    table = mpf.pair_features(zoo)
    assert table.rows == count - 1 and len(mpf.adapter_features(zoo)["norm"]) == count
    assert "cosine.mean" in table and table.matrix("cosine").shape == (count, count)


WEIGHTS = "adapter_model.safetensors"


def truncate(path):
    os.truncate(path, path.stat().st_size - 8)


def touch(path):
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000))


CHANGES = {
    "truncated": (truncate, "changed since its header was read"),
    "touched": (touch, "changed since its header was read"),
    "grown": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "changed since its header was read"),
    "deleted": (lambda p: p.unlink(), "No such file or directory"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_named(zoo, change):
    path = zoo[7].path / WEIGHTS
    act, reason = CHANGES[change]
    act(path)
    for call in (mpf.pair_features, mpf.adapter_features, screening.screen):
        with pytest.raises(InputError) as caught:
            call(zoo)
        assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
def test_a_weight_that_is_not_finite_is_named(tmp_path, monkeypatch, pair_bytes, side, bad):
    for i in range(7):
        make_adapter(tmp_path / f"adapter_{i}", MODULES, seed=i)
    made = make_adapter(tmp_path / "adapter_5", MODULES, seed=5)
    name = NAMES[2]
    a, b = made.modules[name].a.copy(), made.modules[name].b.copy()
    (a if side == "A" else b)[-1, -1] = bad
    factors = {n: (m.a, m.b) for n, m in made.modules.items()} | {name: (a, b)}
    path = make_adapter(tmp_path / "adapter_5", MODULES, factors=factors).path / WEIGHTS
    cut(monkeypatch, pair_bytes, "a_module_each")
    with pytest.raises(InputError) as caught:
        mpf.pair_features(mpf.open_zoo(tmp_path))
    key = f"base_model.model.{name}.lora_{side}.weight"
    assert str(caught.value) == f"{path}: {key}: holds NaN or infinite values"
    assert caught.value.key == key and caught.value.path == str(path)
    assert key in safetensors.read_header(path).tensors


def test_matrix(zoo):
    table = mpf.pair_features(zoo)
    for name in ("cosine", "row_overlap.p10"):
        m = table.matrix(name)
        assert m.shape == (11, 11) and np.isnan(np.diag(m)).all()
        np.testing.assert_array_equal(m, m.T)
        np.testing.assert_array_equal(m[np.triu_indices(11, 1)], table[name])
    for one, two in (
        ("row_capture_a_by_b", "row_capture_b_by_a"),
        ("col_capture_b_by_a.max", "col_capture_a_by_b.max"),
        ("shared_energy_a", "shared_energy_b"),
    ):
        m = table.matrix(one)
        np.testing.assert_array_equal(m[table.a, table.b], table[one])
        np.testing.assert_array_equal(m[table.b, table.a], table[two])
        np.testing.assert_array_equal(table.matrix(two), m.T)


def test_matrix_of_a_directed_feature_without_its_twin_is_not_mirrored(zoo):
    whole = mpf.pair_features(zoo).matrix("row_capture_a_by_b")
    table = mpf.pair_features(zoo, ["row_capture_a_by_b"])
    try:
        m = table.matrix("row_capture_a_by_b")
    except InputError:
        return
    known = ~np.isnan(m)
    np.testing.assert_allclose(m[known], whole[known], atol=1e-6)


def test_table(zoo):
    table = mpf.pair_features(zoo, ["cosine", "norm_ratio"])
    frame = table.to_pandas()
    assert list(frame.columns) == list(table) and len(frame) == table.rows == 55
    np.testing.assert_array_equal(frame["cosine"], table["cosine"])
    assert frame["a"][0] == "adapter_0" and frame["b"][54] == "adapter_10"
    assert repr(table) == "<PairTable of 55 rows x 14 columns>"
    assert table.to_arrow().column_names == list(table)
    assert frame["cosine"].dtype == np.float64
