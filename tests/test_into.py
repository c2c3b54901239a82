"""Merged base weights against base + delta written out densely in float64."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from adapters import MadeAdapter, make_adapter
from bases import (
    LLAMA,
    as_stored,
    headers,
    make_base,
    sums,
    tensor_bytes,
    weights_of,
    written_bound,
)
from calibrations import make_calibration
from dense_merge import digests, seed_from

import mergeprobe_fast as mpf
from mergeprobe_fast.io.dtypes import from_float
from mergeprobe_fast.merging import MERGE_METHODS, add
from mergeprobe_fast.merging.into import merge_into
from mergeprobe_fast.merging.methods import DenseModule, MergeMethod
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.report.into import print_into_summary

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
DOWN, EMBED, CONV = "model.layers.1.mlp.down_proj", "model.embed_tokens", "model.patch"
SIZES = {Q: (12, 10, 4), V: (6, 10, 4), DOWN: (10, 24, 3), EMBED: (10, 16, 2), CONV: (8, 18, 2)}
ODD = {"embeddings": (EMBED,), "convs": {CONV: (2, 3, 3)}}
SHAPES = {Q: (12, 10), V: (6, 10), DOWN: (10, 24), EMBED: (16, 10), CONV: (8, 2, 3, 3)}
OTHERS = {
    "model.norm.weight": ("F32", (10,)), "lm_head.weight": ("BF16", (16, 10)),
    "model.counts": ("I64", (3,)), "model.layers.0.self_attn.q_proj.bias": ("BF16", (12,)),
}  # fmt: skip


def base_of(folder: Path, dtype: str = "BF16", **arguments: Any) -> Path:
    adapted = {f"{name}.weight": (dtype, shape) for name, shape in SHAPES.items()}
    return make_base(folder, {**OTHERS, **adapted}, **arguments)


def two(folder: Path, seed: int, **arguments: Any) -> list[MadeAdapter]:
    """Two adapters of every kind of module; ragged ranks, a missing module, two scaling rules."""
    lacking = {name: size for name, size in SIZES.items() if name != V}
    arguments = {"magnitude": 0.02, "dtype": "BF16", **arguments}
    return [
        make_adapter(folder / "a", SIZES, seed=seed, rslora=True, **ODD, **arguments),
        make_adapter(folder / "b", lacking, seed=seed + 1, rank=5, alpha=3, **ODD, **arguments),
    ]


def worst(base: Path, out: Path, made: list[MadeAdapter], weights: list[float],
          flipped: tuple[str, ...] = ()) -> float:  # fmt: skip
    """The largest |written - (base + delta)| in units of its bound."""
    before, after = weights_of(base), weights_of(out)
    ratio = 0.0
    for name, (delta, size, kind) in sums(made, weights).items():
        key = f"{name}.weight"
        dtype = merged_json(out)["modules"][name]["dtype"]
        shape, turned = before[key].shape, name in flipped
        exact = before[key] + as_stored(delta, kind, shape, turned)
        bound = written_bound(exact, as_stored(size, kind, shape, turned), dtype)
        ratio = max(ratio, float((np.abs(after[key] - exact) / bound).max()))
    return ratio


def merged_json(out: Path) -> dict[str, Any]:
    return json.loads((out / "merge.json").read_text("utf-8"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", ["svd", "linear", "cat"])
def test_adapted_tensors_are_base_plus_the_sum_rounded_once(tmp_path, rng, method, dtype, shards):
    base = base_of(tmp_path / "base", dtype, shards=shards, seed=seed_from(rng))
    made = two(tmp_path, seed_from(rng))
    weights = [0.7, -0.4]
    merge_into([m.path for m in made], base, tmp_path / "out", method, weights)
    assert worst(base, tmp_path / "out", made, weights) <= 1
    assert worst(base, tmp_path / "out", made, [0.7, 0.4]) > 1, "a sign must show"
    assert worst(base, tmp_path / "out", made, [0.71, -0.4]) > 1 or dtype != "F32"


def test_the_bound_sees_a_truncation_instead_of_a_rounding(tmp_path, rng, monkeypatch):
    base, made = base_of(tmp_path / "base"), two(tmp_path, seed_from(rng))

    def cut(values: np.ndarray, dtype: str) -> np.ndarray:
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)

    monkeypatch.setattr(add, "from_float", cut)
    merge_into([m.path for m in made], base, tmp_path / "out", weights=[1, 1])
    assert worst(base, tmp_path / "out", made, [1, 1]) > 1


def test_everything_else_is_the_same_byte_for_byte(tmp_path, rng):
    base = base_of(tmp_path / "base", shards=2)
    made = two(tmp_path, seed_from(rng))
    merge_into([m.path for m in made], base, tmp_path / "out")
    before, after = tensor_bytes(base), tensor_bytes(tmp_path / "out")
    adapted = {f"{name}.weight" for name in SIZES}
    assert {key for key in before if before[key] != after[key]} == adapted
    assert headers(base) == headers(tmp_path / "out")
    old, new = digests(base), digests(tmp_path / "out")
    assert set(new) == {*old, "merge.json"}
    assert {n for n in old if old[n] != new[n]} <= {n for n in old if n.endswith(".safetensors")}
    for name in os.listdir(base):
        assert (base / name).stat().st_mode == (tmp_path / "out" / name).stat().st_mode


@pytest.mark.parametrize(("odd", "expected"), [(0, 0), (1, 2)])
def test_a_tie_goes_to_the_even_neighbour(tmp_path, odd, expected):
    """1 + odd ulps, plus exactly half an ulp of bfloat16."""
    value = from_float(np.array([[1 + odd * 2.0**-7]]), "BF16")
    base = make_base(tmp_path / "base", {"m.weight": ("BF16", (1, 1), value)})
    pair = np.ones((1, 1)), np.full((1, 1), 2.0**-8)
    make_adapter(tmp_path / "a", {"m": (1, 1, 1)}, factors={"m": pair}, alpha=1)
    report = merge_into(tmp_path / "a", base, tmp_path / "out")
    assert weights_of(tmp_path / "out")["m.weight"][0, 0] == 1 + expected * 2.0**-7
    assert report["total"]["rounding_error_relative"] == 1.0
    assert report["total"]["unchanged"] == (1.0 if odd == 0 else 0.0)
    assert report["total"]["delta_kept"] == (0.0 if odd == 0 else 2.0)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_report_measures_what_the_rounding_lost(tmp_path, rng, dtype):
    base, made = base_of(tmp_path / "base", dtype), two(tmp_path, seed_from(rng), magnitude=1e-4)
    report = merge_into([m.path for m in made], base, tmp_path / "out", weights=[1.0, -2.0])
    before, after = weights_of(base), weights_of(tmp_path / "out")
    squares = np.zeros(3)
    for name, (delta, _, kind) in sums(made, [1.0, -2.0]).items():
        row, key = report["modules"][name], f"{name}.weight"
        delta = as_stored(delta, kind, before[key].shape, False)
        change = after[key] - before[key]
        norm, error = np.linalg.norm(delta), np.linalg.norm(change - delta)
        # float32 factors: 2^-24 of the norm of each, relative to sums that hardly cancel.
        assert row["norm"] == pytest.approx(norm, rel=1e-5)
        assert row["rounding_error_relative"] == pytest.approx(error / norm, rel=1e-3, abs=1e-6)
        along = (change * delta).sum()
        assert row["delta_kept"] == pytest.approx(along / norm**2, abs=1e-5)
        assert row["unchanged"] == np.mean(change[delta != 0] == 0)
        assert (row["tensor"], row["dtype"]) == (key, dtype)
        squares += norm**2, error**2, along
    total = report["total"]
    assert total["norm"] == pytest.approx(np.sqrt(squares[0]), rel=1e-5)
    assert total["rounding_error_relative"] == pytest.approx(
        np.sqrt(squares[1] / squares[0]), rel=1e-3, abs=1e-6
    )
    assert total["delta_kept"] == pytest.approx(squares[2] / squares[0], abs=1e-5)
    noted = [note for note in report["notes"] if "a float32 copy of the base would keep it" in note]
    assert bool(noted) == (total["rounding_error_relative"] > 0.05)
    assert bool(noted) == (dtype == "BF16") or dtype == "F16"
    assert report == merged_json(tmp_path / "out")


def test_with_a_rank_it_adds_what_merge_would_write(tmp_path, rng):
    base, made = base_of(tmp_path / "base", "F32"), two(tmp_path, seed_from(rng))
    zoo = mpf.open_zoo([m.path for m in made])
    for options in ({"rank": 2}, {"energy": 0.8}):
        merged = mpf.merge(zoo, "svd", [1.0, 0.5], **options)
        out = tmp_path / f"out-{'rank' in options}"
        report = merge_into(zoo, base, out, "svd", [1.0, 0.5], **options)
        before, after = weights_of(base), weights_of(out)
        for m in merged.modules:
            delta = m.b.astype(np.float64) @ m.a.astype(np.float64)
            key = f"{m.module.name}.weight"
            shape = before[key].shape
            exact = before[key] + as_stored(delta, m.module.kind, shape, False)
            bound = written_bound(exact, np.zeros_like(exact), "F32")
            assert (np.abs(after[key] - exact) <= bound * 1.01 + 2.0**-50).all()
            row = report["modules"][m.module.name]
            assert row["rank"] == m.a.shape[0]
            assert row["truncation_error"] == m.truncation_error
        want = merged.report()["total"]
        for name in ("truncation_error_relative", "energy_kept"):
            assert report["total"][name] == pytest.approx(want[name], rel=1e-5)


def dense_function(tables: dict[str, np.ndarray]) -> Any:
    def rows(request):
        for chunk in request.chunks():
            for m in chunk:
                table = tables[m.module.name]
                yield DenseModule(
                    m.module, request.members(m), lambda i, j, t=table: t[i:j].copy()
                )

    return rows


@pytest.mark.parametrize("tiny", [False, True])
def test_dense_results_are_added_in_every_layout(tmp_path, rng, monkeypatch, tiny):
    """Strips and blocks of a few entries, or one of each: the same bytes."""
    base, made = base_of(tmp_path / "base", "F32"), two(tmp_path, seed_from(rng))
    tables = {
        name: rng.standard_normal(size[:2]).astype(np.float32) for name, size in SIZES.items()
    }
    if tiny:
        for name, size in {"_BLOCK": 7, "_STRIP": 45, "_WIDE_STRIP": 40}.items():
            monkeypatch.setattr(add, name, size)
    method = MergeMethod("dense", MERGE_METHODS["svd"].run, dense=dense_function(tables))
    monkeypatch.setitem(MERGE_METHODS, "dense", method)
    report = merge_into([m.path for m in made], base, tmp_path / "out", "dense", threads=2)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    for name, table in tables.items():
        key, kind = f"{name}.weight", "embedding" if name == EMBED else "linear"
        delta = as_stored(table.astype(np.float64), kind, before[key].shape, False)
        assert np.array_equal(after[key], (before[key] + delta).astype(np.float32))
        assert report["modules"][name]["norm"] == pytest.approx(
            np.linalg.norm(table.astype(np.float64)), rel=1e-12
        )
        assert "rank" not in report["modules"][name]
    merge_into([m.path for m in made], base, tmp_path / "low", "dense", rank=2)
    assert merged_json(tmp_path / "low")["modules"][Q]["rank"] == 2


def test_the_same_bytes_for_any_threads_and_block(tmp_path, rng, monkeypatch):
    base, made = base_of(tmp_path / "base"), two(tmp_path, seed_from(rng))
    results = []
    for threads, block in ((1, 1 << 17), (2, 1 << 17), (3, 64), (1, 64)):
        monkeypatch.setattr(add, "_BLOCK", block)
        out = tmp_path / f"out{len(results)}"
        merge_into([m.path for m in made], base, out, threads=threads)
        results.append(digests(out))
    assert results[0] == results[1] and results[2] == results[3]
    weights = "model.safetensors"
    assert results[0][weights] == results[2][weights]


def test_a_zero_update_changes_no_bit(tmp_path, rng):
    """Not even the sign of a zero."""
    stored = from_float(np.where(rng.random((12, 10)) < 0.5, -0.0, 0.0), "BF16")
    base = make_base(tmp_path / "base", {f"{Q}.weight": ("BF16", (12, 10), stored)})
    make_adapter(tmp_path / "a", {Q: SIZES[Q]}, zero_b=True)
    report = merge_into(tmp_path / "a", base, tmp_path / "out")
    assert tensor_bytes(base) == tensor_bytes(tmp_path / "out")
    assert report["total"]["norm"] == 0 and report["total"]["unchanged"] == 0
    assert any("update is zero" in note for note in report["notes"])


def test_gauge_duplicates_and_one_adapter(tmp_path, rng):
    base = base_of(tmp_path / "base", "F32")
    a = rng.standard_normal((3, 10))
    b = rng.standard_normal((12, 3)) * 0.01
    m = np.diag(2.0 ** rng.integers(-3, 4, 3))[rng.permutation(3)]  # exact in float32
    first = make_adapter(tmp_path / "a", {Q: SIZES[Q]}, factors={Q: (a, b)}, alpha=3)
    pair = m @ first.modules[Q].a, first.modules[Q].b @ np.linalg.inv(m)
    other = make_adapter(tmp_path / "b", {Q: SIZES[Q]}, factors={Q: pair}, alpha=3)
    for name, zoo in {"one": [first], "moved": [other], "twice": [first, other]}.items():
        merge_into([x.path for x in zoo], base, tmp_path / name)
        assert worst(base, tmp_path / name, zoo, [1 / len(zoo)] * len(zoo)) <= 1
    one, moved, twice = (weights_of(tmp_path / n) for n in ("one", "moved", "twice"))
    for others in (moved, twice):
        assert np.allclose(one[f"{Q}.weight"], others[f"{Q}.weight"], rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize("square", [False, True])
def test_conv1d_weights_are_stored_the_other_way(tmp_path, rng, square):
    d_in = 12 if square else 10
    shape = (d_in, 12)
    base = make_base(tmp_path / "base", {"h.0.c_attn.weight": ("F32", shape)}, config={})
    made = [
        make_adapter(tmp_path / n, {"h.0.c_attn": (12, d_in, 3)}, seed=s, fan_in_fan_out=True)
        for n, s in (("a", 1), ("b", 2))
    ]
    merge_into([m.path for m in made], base, tmp_path / "out")
    assert worst(base, tmp_path / "out", made, [0.5, 0.5], flipped=("h.0.c_attn",)) <= 1


def test_a_prefix_may_differ_and_is_noted(tmp_path, rng):
    base = make_base(tmp_path / "base", {"h.0.fc.weight": ("F32", (5, 4))}, config={})
    made = make_adapter(tmp_path / "a", {"transformer.h.0.fc": (5, 4, 2)})
    report = merge_into(made.path, base, tmp_path / "out")
    assert "transformer.h.0.fc as h.0.fc.weight" in " ".join(report["notes"])
    longer = make_base(tmp_path / "base2", {"model.transformer.h.0.fc.weight": ("F32", (5, 4))})
    merge_into(made.path, longer, tmp_path / "out2")
    delta = made.modules["transformer.h.0.fc"].delta
    change = weights_of(tmp_path / "out2")["model.transformer.h.0.fc.weight"]
    change = change - weights_of(longer)["model.transformer.h.0.fc.weight"]
    assert np.allclose(change, delta, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_every_method_goes_into_a_base(tmp_path, rng, method, rank):
    """What is added is the method's own rows, or the factors that ``merge`` gives."""
    chosen = MERGE_METHODS[method]
    if chosen.data or (rank and not chosen.takes_rank):
        pytest.skip("needs a calibration, or takes no rank")
    base, made = base_of(tmp_path / "base", "F32"), two(tmp_path, seed_from(rng), dtype="F32")
    zoo = mpf.open_zoo([m.path for m in made])
    merge_into(zoo, base, tmp_path / "out", method, rank=rank)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    _, request = prepare(ZooSource(zoo), method, rank=rank, arguments={})
    dense = chosen.dense is not None and rank is None
    summed = rank is None and method in ("svd", "linear")
    update = {}
    for m in (chosen.dense if dense else MERGE_METHODS["cat" if summed else method].run)(request):
        name, d_out = m.module.name, m.module.d_out
        update[name] = m.rows(0, d_out).copy() if dense else m.b.astype(np.float64) @ m.a
    for name, delta in update.items():
        key, kind = f"{name}.weight", "embedding" if name == EMBED else "linear"
        exact = before[key] + as_stored(delta.astype(np.float64), kind, before[key].shape, False)
        bound = written_bound(exact, np.zeros_like(exact), "F32")
        assert (np.abs(after[key] - exact) <= bound * 1.01 + 2.0**-50).all()
        assert np.abs(after[key] - before[key]).max() > 100 * bound.max()
    assert set(update) <= set(SIZES)


@pytest.mark.parametrize("name", sorted(n for n, m in MERGE_METHODS.items() if m.data))
def test_methods_that_learn_from_data_get_their_calibration(tmp_path, rng, name):
    sizes = {Q: SIZES[Q], DOWN: SIZES[DOWN]}
    for i, domain in enumerate(("math", "code")):
        make_adapter(tmp_path / "zoo" / f"{domain}-a", sizes, seed=i, magnitude=0.02)
    make_calibration(
        tmp_path / "cal", {m: size[:2] for m, size in sizes.items()},
        {"math": 40, "code": 50}, rng, gradients=True,
    )  # fmt: skip
    base = base_of(tmp_path / "base", "F32")
    arguments = {"calibration": tmp_path / "cal", "rank": 3 if MERGE_METHODS[name].dense else None}
    merged = mpf.merge(tmp_path / "zoo", name, **arguments)
    out = tmp_path / "out"
    report = merge_into(tmp_path / "zoo", base, out, name, **arguments)
    before, after = weights_of(base), weights_of(out)
    for m in merged.modules:
        key = f"{m.module.name}.weight"
        exact = before[key] + m.b.astype(np.float64) @ m.a.astype(np.float64)
        bound = written_bound(exact, np.zeros_like(exact), "F32")
        assert (np.abs(after[key] - exact) <= bound * 1.01 + 2.0**-50).all()
    assert [row["domain"] for row in report["adapters"]] == ["code", "math"]


def test_what_a_method_leaves_out_stays(tmp_path, monkeypatch):
    base = base_of(tmp_path / "base")
    made = two(tmp_path, 5)
    cat = MERGE_METHODS["cat"].run

    def some(request):
        """Leaves out."""
        return (m for m in cat(request) if m.module.name != DOWN)

    monkeypatch.setitem(MERGE_METHODS, "some", MergeMethod("some", some))
    report = merge_into([m.path for m in made], base, tmp_path / "out", "some")
    before, after = tensor_bytes(base), tensor_bytes(tmp_path / "out")
    assert before[f"{DOWN}.weight"] == after[f"{DOWN}.weight"]
    assert before[f"{Q}.weight"] != after[f"{Q}.weight"]
    assert any(f"changes nothing in 1 modules: {DOWN}" in note for note in report["notes"])


@pytest.mark.parametrize("count", [1, 14])
def test_the_summary_for_a_terminal(tmp_path, count):
    base, made = base_of(tmp_path / "base"), two(tmp_path, 1)[0]
    report = merge_into(made.path, base, tmp_path / "out")
    report["adapters"] *= count
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=100, highlight=False)
    print_into_summary(report, console, tmp_path / "out")
    text = " ".join(shown.getvalue().split())
    total = report["total"]
    assert f"svd of {count} adapters into 5 tensors, BF16" in text
    assert f"rounding to BF16 {total['rounding_error_relative']:.2%} of the update" in text
    assert f"leaves unchanged {total['unchanged']:.2%}" in text
    assert ("and 2 more" in text) == (count == 14)
    assert all(note in text for note in report["notes"])


def test_progress_adds_up_to_the_modules(tmp_path):
    steps: list[int] = []
    made = two(tmp_path, 1)
    merge_into([m.path for m in made], base_of(tmp_path / "base"), tmp_path / "out",
               progress=steps.append)  # fmt: skip
    assert sum(steps) == len(SIZES)


def test_overflow_and_bad_weights_are_named_and_leave_nothing(tmp_path):
    made = make_adapter(tmp_path / "a", {Q: SIZES[Q]}, magnitude=1e4)
    base = make_base(tmp_path / "base", {f"{Q}.weight": ("F16", (12, 10))}, config=LLAMA)
    with pytest.raises(mpf.InputError, match=r"base \+ update of .* overflows F16") as caught:
        merge_into(made.path, base, tmp_path / "out", weights=[100.0])
    assert caught.value.key == f"{Q}.weight"
    assert caught.value.path == str(base / "model.safetensors")
    bad = np.zeros((12, 10))
    bad[3, 4] = np.inf
    odd = make_base(tmp_path / "odd", {f"{Q}.weight": ("F16", (12, 10), from_float(bad, "F16"))})
    with pytest.raises(mpf.InputError, match="holds NaN or infinite values") as caught:
        merge_into(made.path, odd, tmp_path / "out")
    assert caught.value.path == str(odd / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "odd"]
