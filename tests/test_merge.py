"""Merges against their definition: sum_i w_i s_i B_i A_i, materialised in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import DEFAULT_MODULES, MadeAdapter
from dense_merge import (
    METHODS,
    RAGGED,
    ROUNDOFF,
    U32,
    WIDE,
    assert_peft_agrees,
    deltas,
    exact_sums,
    factor_bound,
    merge_json,
    seed_from,
    singular_values,
    stack_sizes,
    stacked_ranks,
    subset,
    truncated,
    zoo_of,
)

import mergeprobe_fast as mpf


@dataclass(frozen=True)
class Case:
    """A zoo, its weights (None: 1/N each) and the rank asked of svd."""

    build: Callable[[Path, int], list[MadeAdapter]]
    weights: tuple[float, ...] | None = None
    rank: int | None = None


MIXED_KINDS = {"embed": (5, 17, 3), "conv": (8, 3 * 3 * 3, 3), "pointwise": (6, 4, 2)}
CONVS = {"conv": (3, 3, 3), "pointwise": (4, 1, 1)}
CASES = {
    "default weights": Case(zoo_of(*[{"modules": WIDE}] * 3)),
    "ragged ranks, alpha, rslora, patterns": Case(zoo_of(*RAGGED), (0.7, 0.2, 1.5)),
    "the same, cut to rank 3": Case(zoo_of(*RAGGED), (0.7, 0.2, 1.5), 3),
    "negative weights": Case(zoo_of(*RAGGED), (1.0, -0.6, -2.0), 4),
    "some weights zero": Case(zoo_of(*RAGGED), (0.0, 1.25, 0.0), 6),
    "all weights zero": Case(zoo_of(*RAGGED), (0.0, 0.0, 0.0), 3),
    "modules missing here and there": Case(
        zoo_of(
            {"modules": subset("head", of=WIDE)},
            {"modules": subset("layers.1.q_proj", of=WIDE), "alpha": 1},
            {"modules": subset("layers.1.q_proj", "layers.11.q_proj", of=WIDE)},
        ),
        (1.0, 0.5, -0.25),
    ),
    "one adapter, another untrained": Case(
        zoo_of({"modules": WIDE}, {"modules": WIDE, "zero_b": True}), (0.5, 3.0)
    ),
    "every adapter untrained": Case(zoo_of(*[{"modules": WIDE, "zero_b": True}] * 2)),
    "one module untrained": Case(zoo_of({"modules": WIDE, "zero_b": ("head",)}, {"modules": WIDE})),
    "duplicates": Case(zoo_of(*[{"modules": WIDE, "seed": 7}] * 3, {"modules": WIDE}), rank=5),
    "duplicates that cancel": Case(zoo_of(*[{"modules": WIDE, "seed": 7}] * 2), (1.0, -1.0)),
    "a single adapter": Case(zoo_of({"modules": WIDE, "alpha": 5}), (-0.3,)),
    "a single adapter, cut": Case(zoo_of({"modules": WIDE, "rank": 9}), None, 2),
    "embedding, 3x3 and 1x1 conv": Case(
        zoo_of(*[{"modules": MIXED_KINDS, "embeddings": ("embed",), "convs": CONVS}] * 3),
        (0.5, 0.25, -1.0), 4,
    ),
    "Conv1D, fan_in_fan_out": Case(zoo_of(*[{"modules": WIDE, "fan_in_fan_out": True}] * 2)),
    "bf16": Case(zoo_of(*[{"modules": WIDE, "dtype": "BF16"}] * 3), (1, 2, -1), 5),
    "f16": Case(zoo_of(*[{"modules": WIDE, "dtype": "F16"}] * 3), (1, 2, -1), 5),
    "f32, bf16 and f16 in one": Case(
        zoo_of(
            {"modules": WIDE, "dtypes": {"head": "BF16"}},
            {"modules": WIDE, "dtype": "BF16", "dtypes": {"layers.1.q_proj": "F16"}},
            {"modules": WIDE, "dtype": "F16"},
        ),
        (1.0, 0.5, 0.25), 5,
    ),
    "rank above the sum of ranks": Case(zoo_of(*[{"modules": WIDE}] * 2), None, 19),
    "rank above the layer": Case(zoo_of(*[{"modules": DEFAULT_MODULES}] * 3), None, 15),
    "rank 1": Case(zoo_of(*RAGGED), (1, 1, 1), 1),
    "ranks above the layer": Case(
        zoo_of(*[{"modules": {"m": (6, 40, 4), "n": (40, 5, 9), "o": (1, 1, 3)}}] * 4), None, 5
    ),
    "weights far apart": Case(zoo_of(*[{"modules": WIDE}] * 2), (1.0, 6e-6)),
    "norms far apart": Case(
        zoo_of({"modules": WIDE, "magnitude": 1e-5}, {"modules": WIDE, "magnitude": 1e3}), None, 6
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A case that was merged and written, and the dense truth."""

    made: list[MadeAdapter]
    weights: tuple[float, ...]
    result: Any
    out: Path
    report: dict[str, Any]

    @property
    def exact(self) -> dict[str, np.ndarray]:
        return exact_sums(self.made, self.weights)


def run(
    case: Case, folder: Path, seed: int, method: str, dtype: str = "F32", *, reload: bool = True
) -> Merged:
    """Merge, write, and load into PEFT."""
    made = case.build(folder / "zoo", seed)
    rank = case.rank if method == "svd" else None
    zoo = mpf.open_zoo([m.path for m in made])
    result = mpf.merge(zoo, method, case.weights, rank, dtype=dtype)
    report = result.save(folder / "out")
    assert merge_json(folder / "out") == report
    written = mpf.open_zoo(folder / "out")[0].modules
    for ref in (ref for adapter in zoo for ref in adapter.modules.values()):
        assert written[ref.name].kind == ref.kind
        assert written[ref.name].fan_in_fan_out == ref.fan_in_fan_out
    if reload:
        assert_peft_agrees(folder / "out")
    weights = case.weights or (1.0 / len(made),) * len(made)
    return Merged(made, weights, result, folder / "out", report)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("method", METHODS)
def test_the_merge_is_the_weighted_sum(tmp_path, rng, method, case):
    merged = run(case, tmp_path, seed_from(rng), method)
    check_deltas(merged, case, method)
    check_ranks(merged, case, method)


@pytest.mark.parametrize("name", ["negative weights", "ranks above the layer", "duplicates"])
@pytest.mark.parametrize("method", METHODS)
def test_every_instruction_set_gives_it(tmp_path, rng, isa, method, name):
    merged = run(CASES[name], tmp_path, seed_from(rng), method, reload=False)
    check_deltas(merged, CASES[name], method)


def check_deltas(merged: Merged, case: Case, method: str) -> None:
    """The written factors, and what the report says of them, against the dense sum."""
    exact = merged.exact
    stacks, stacked = stack_sizes(merged.made, merged.weights), stacked_ranks(merged.made)
    largest = max(m.a.shape[0] for adapter in merged.made for m in adapter.modules.values())
    written = deltas(merged.out)
    assert list(merged.report["modules"]) == [m.module.name for m in merged.result.modules]
    assert set(written) == set(exact)
    for name, truth in exact.items():
        norm = float(np.linalg.norm(truth))
        row = merged.report["modules"][name]
        sigma = singular_values(truth)
        limit = (case.rank or largest) if method == "svd" else stacked[name]
        kept = min(limit, len(sigma))
        best = float(np.linalg.norm(sigma[kept:]))
        bound = factor_bound(norm, stacks[name], kept, stacked[name])
        if method == "cat":
            # B is rounded once or twice, A not at all, and nothing is left out.
            bound = 2.1 * U32 * stacks[name] * np.sqrt(stacked[name])
        error = float(np.linalg.norm(written[name] - truth))
        assert error <= best + bound, f"{name}: {error - best} above the optimum, bound {bound}"
        if kept == len(sigma) or sigma[kept - 1] >= 1.01 * sigma[kept]:
            # A gap of 1% turns float64 backward errors into at most 400 times as much.
            gap = 400 * 1e-14 * stacks[name]
            difference = np.linalg.norm(written[name] - truncated(truth, kept))
            assert difference <= bound + gap, name
        # Exact up to float64: n kappa u of the stack, with kappa <= 100 in these cases.
        float64 = 1e-12 * stacks[name] + (bound if method == "cat" else 0.0)
        assert abs(row["norm"] - norm) <= float64, name
        assert abs(row["truncation_error"] - best) <= float64 + 2.0**-24 * norm, name
        if best > 0.01 * norm > 0:
            assert abs(row["truncation_error"] / best - 1) <= 1e-9, name
        assert row["members"] == [a.path.name for a in merged.made if name in a.modules]


def check_ranks(merged: Merged, case: Case, method: str) -> None:
    """svd: as asked for. cat: the sum of ranks. linear: the numerical rank of the sum."""
    ranks = {}
    for m in merged.result.modules:
        ranks[m.module.name] = rank = len(m.a)
        assert m.a.shape == (rank, m.module.d_in) and m.a.dtype == np.float32
        assert m.b.shape == (m.module.d_out, rank) and m.b.dtype == np.float32
        assert merged.report["modules"][m.module.name]["rank"] == rank
    if method == "svd":
        largest = max(m.a.shape[0] for adapter in merged.made for m in adapter.modules.values())
        assert set(ranks.values()) == {case.rank or largest}
    elif method == "cat":
        assert ranks == stacked_ranks(merged.made)
    else:
        stacks = stack_sizes(merged.made, merged.weights)
        for name, truth in merged.exact.items():
            sigma = singular_values(truth)
            floor = max(2.0**-24 * sigma[0], 2.0**-40 * stacks[name])
            clear, faint = int((sigma > 8 * floor).sum()), int((sigma > floor / 8).sum())
            assert max(1, clear) <= ranks[name] <= max(1, faint), name


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_report_is_the_dense_error(tmp_path, rng, method, dtype):
    merged = run(CASES["the same, cut to rank 3"], tmp_path, seed_from(rng), method, dtype)
    written, exact = deltas(merged.out), merged.exact
    stacks, stacked = stack_sizes(merged.made, merged.weights), stacked_ranks(merged.made)
    energy = lost = rounded = 0.0
    for m in merged.result.modules:
        name = m.module.name
        row = merged.report["modules"][name]
        before = m.b.astype(np.float64) @ m.a.astype(np.float64)
        error = float(np.linalg.norm(written[name] - before))
        norm = float(np.linalg.norm(exact[name]))
        assert row["rounding_error_relative"] == pytest.approx(error / norm, rel=1e-6, abs=1e-15)
        # Two factors, each entry off by at most the unit roundoff.
        unit = 0.0 if dtype == "F32" else ROUNDOFF[dtype]
        size = np.linalg.norm(np.abs(m.b) @ np.abs(m.a))
        assert error <= 2.01 * unit * size
        assert dtype == "F32" or error > 0.1 * unit * norm, "nothing was rounded?"
        assert row["truncation_error_relative"] == row["truncation_error"] / row["norm"]
        full = float(np.linalg.norm(written[name] - exact[name]))
        bound = factor_bound(norm, stacks[name], len(m.a), stacked[name])
        assert full <= np.hypot(row["truncation_error"], error) * 1.05 + bound, name
        energy, lost, rounded = (
            energy + norm**2, lost + row["truncation_error"] ** 2, rounded + error**2,
        )  # fmt: skip
    total = merged.report["total"]
    near = {"rel": 1e-6, "abs": 1e-12}
    assert total["norm"] == pytest.approx(np.sqrt(energy), rel=2e-7)
    assert total["energy_kept"] == pytest.approx(1 - lost / energy, **near)
    assert total["truncation_error_relative"] == pytest.approx(np.sqrt(lost / energy), **near)
    assert total["rounding_error_relative"] == pytest.approx(np.sqrt(rounded / energy), **near)
    assert (method == "svd") == (total["truncation_error_relative"] > 0.01)
    assert merged.report["dtype"] == dtype and merged.report["method"] == method
    assert merged.report["rank"] == (3 if method == "svd" else None)
    assert [a["weight"] for a in merged.report["adapters"]] == list(merged.weights)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param(("F32", "F32"), "F32", id="f32"),
        pytest.param(("BF16", "BF16"), "BF16", id="bf16"),
        pytest.param(("F16", "F16"), "F16", id="f16"),
        pytest.param(("BF16", "F16"), "F32", id="bf16 and f16"),
        pytest.param(("F32", "BF16"), "F32", id="f32 and bf16"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_the_result(tmp_path, method, stored, expected):
    made = zoo_of(*[{"dtype": d} for d in stored])(tmp_path, 0)
    result = mpf.merge(mpf.open_zoo([m.path for m in made]), method)
    result.save(tmp_path / "out")
    merged = mpf.open_zoo(tmp_path / "out")[0]
    assert result.dtype == expected
    assert {f.dtype for m in merged.modules.values() for f in (m.a, m.b)} == {expected}
    assert_peft_agrees(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_cat_keeps_every_a_bit_for_bit(tmp_path, dtype):
    made = zoo_of(*[{"modules": WIDE, "dtype": dtype}] * 3)(tmp_path, 5)
    result = mpf.merge(mpf.open_zoo([m.path for m in made]), "cat", [0.5, -3.0, 0.0])
    for m in result.modules:
        stacked = np.concatenate([a.modules[m.module.name].a for a in made])
        np.testing.assert_array_equal(m.a.astype(np.float64), stacked)
