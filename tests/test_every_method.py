"""What every merge method must do, whatever its rule: reload, repeat, refuse, and harm nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration
from dense_merge import (
    WIDE,
    assert_peft_agrees,
    deltas,
    digests,
    merge_json,
    seed_from,
    subset,
    zoo_of,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError

METHODS = sorted(mpf.MERGE_METHODS)
DOMAINS = ("math", "code", "law")
RECIPES: tuple[dict[str, Any], ...] = (
    {"modules": WIDE, "rank": 2, "alpha": 3},
    {"modules": WIDE, "rank": 5, "alpha": 16, "rslora": True, "dtype": "BF16"},
    {"modules": subset("head", "layers.1.q_proj", of=WIDE), "ranks": {"head": 1}, "alpha": 6},
)
NAMES = [f"{domain}-{i}" for i, domain in enumerate(DOMAINS)]


class Zoo:
    """Three unlike adapters and a calibration for them, or two for methods of two."""

    def __init__(self, folder: Path, rng: np.random.Generator, method: str) -> None:
        declared = mpf.MERGE_METHODS[method]
        self.method, self.folder = method, folder
        self.count = min(len(RECIPES), declared.arity[1] or len(RECIPES))
        seed = seed_from(rng)
        self.made = [
            make_adapter(folder / "zoo" / NAMES[i], **{"seed": seed + i, **RECIPES[i]})
            for i in range(self.count)
        ]
        self.arguments: dict[str, Any] = {}
        if declared.data:
            made = make_calibration(
                folder / "cal", {n: (o, i) for n, (o, i, _) in WIDE.items()}, DOMAINS, rng,
                samples=50, gradients=True,
            )  # fmt: skip
            self.arguments["calibration"] = made.path

    def merge(self, *arguments: Any, **options: Any) -> Any:
        paths = [m.path for m in self.made]
        return mpf.merge(paths, self.method, *arguments, **{**self.arguments, **options})

    def takes_negative_weights(self) -> bool:
        return self.method not in {"regmean", "weighted_svd", "fisher"}


@pytest.fixture
def zoo(tmp_path: Path, rng: np.random.Generator, method: str) -> Zoo:
    return Zoo(tmp_path, rng, method)


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_result(zoo, tmp_path):
    """Ragged ranks, rsLoRA, bf16 beside float32, a missing module; cut to a rank, and not."""
    takes_rank = mpf.MERGE_METHODS[zoo.method].takes_rank
    for rank in (None, 3) if takes_rank else (None,):
        out = tmp_path / f"out{rank}"
        report = zoo.merge(None, rank).save(out)
        assert merge_json(out) == report
        assert_peft_agrees(out)
        modules = set().union(*(m.modules for m in zoo.made))
        assert set(report["modules"]) == set(deltas(out)) == modules
        for name, row in report["modules"].items():
            assert rank is None or row["rank"] == 3
            assert row["norm"] >= 0 and 0 <= row["truncation_error_relative"] <= 1 + 1e-6
            members = [m.path.name for m in zoo.made if name in m.modules]
            assert row["members"] == members
            written = deltas(out)[name]
            # What the rank left out and what is written make up the norm (an orthogonal cut).
            whole = np.hypot(np.linalg.norm(written), row["truncation_error"])
            if "activation_error_relative" not in row:
                assert abs(whole - row["norm"]) <= 2e-3 * row["norm"], name
        assert any(d.any() for d in deltas(out).values())


@pytest.mark.parametrize("method", METHODS)
def test_energy_chooses_the_rank(zoo, tmp_path):
    if not mpf.MERGE_METHODS[zoo.method].takes_rank:
        with pytest.raises(InputError, match="energy"):
            zoo.merge(energy=0.9)
        return
    few, many = zoo.merge(energy=0.3), zoo.merge(energy=0.95)
    assert sum(len(m.a) for m in few.modules) < sum(len(m.a) for m in many.modules)
    few.save(tmp_path / "few")
    assert_peft_agrees(tmp_path / "few")


@pytest.mark.parametrize("method", METHODS)
def test_same_input_same_bytes_on_any_number_of_threads(zoo, tmp_path):
    for threads in (1, 2, 3):
        zoo.merge(threads=threads).save(tmp_path / f"out{threads}")
    zoo.merge(threads=2).save(tmp_path / "again")
    first = digests(tmp_path / "out1")
    assert first == digests(tmp_path / "out2") == digests(tmp_path / "out3")
    assert first == digests(tmp_path / "again")


@pytest.mark.parametrize("method", METHODS)
def test_a_negative_weight_is_taken_or_refused(zoo, tmp_path):
    weights = [0.75, -0.5, 1.25][: zoo.count]
    try:
        zoo.merge(weights).save(tmp_path / "out")
    except InputError as error:
        assert "weight" in str(error) and error.key == "weights", error
        assert not (tmp_path / "out").exists()
        return
    assert_peft_agrees(tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_duplicate_adapters_are_no_accident(tmp_path, rng, method):
    """All untrained: zero. All the same: finite, and loadable."""
    declared = mpf.MERGE_METHODS[method]
    count = declared.arity[1] or 3
    arguments: dict[str, Any] = {}
    if declared.data:
        modules = {n: (o, i) for n, (o, i, _) in WIDE.items()}
        made = make_calibration(tmp_path / "cal", modules, DOMAINS[:1], rng, gradients=True)
        arguments = {"calibration": made.path, "domains": [DOMAINS[0]] * count}
    for kind, recipe in (("zero", {"zero_b": True}), ("same", {"seed": 5})):
        build = zoo_of(*[{"modules": WIDE, **recipe}] * count)
        made = build(tmp_path / kind, seed_from(rng))
        try:
            merged = mpf.merge([m.path for m in made], method, **arguments)
        except InputError as error:
            assert kind == "zero" or method != "linear", error
            assert len(str(error)) > 20
            continue
        merged.save(tmp_path / f"{kind}-out")
        assert_peft_agrees(tmp_path / f"{kind}-out")
        zeros = [not d.any() for d in deltas(tmp_path / f"{kind}-out").values()]
        assert all(zeros) if kind == "zero" else not any(zeros)


@pytest.mark.parametrize("method", METHODS)
def test_not_finite_is_one_error_naming_the_tensor(zoo, tmp_path):
    module = "layers.1.q_proj"
    bad = zoo.made[1].path
    a = np.ones((5, 33))
    a[2, 7] = np.inf
    make_adapter(bad, {**WIDE, module: (40, 33, 5)}, factors={module: (a, np.ones((40, 5)))})
    with pytest.raises(InputError, match=rf"{module}\.lora_A\.weight: holds NaN") as caught:
        zoo.merge()
    assert str(bad) in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_every_module_once(zoo):
    steps: list[int] = []
    zoo.merge(progress=steps.append)
    assert sum(steps) == len(WIDE)


@pytest.mark.parametrize("method", METHODS)
def test_a_huge_and_a_tiny_scale(tmp_path, rng, method):
    """Updates of 1e15 and 1e-15 merge like updates of 1: rules see ratios, not sizes."""
    declared = mpf.MERGE_METHODS[method]
    count = declared.arity[1] or 2
    arguments: dict[str, Any] = {}
    if declared.data:
        modules = {n: (o, i) for n, (o, i, _) in WIDE.items()}
        made = make_calibration(tmp_path / "cal", modules, DOMAINS[:2], rng, gradients=True)
        arguments = {"calibration": made.path, "domains": DOMAINS[:2]}
    found = {}
    seed = seed_from(rng)
    for size in (1.0, 2.0**50, 2.0**-50):
        made = [
            make_adapter(tmp_path / f"{size}" / NAMES[i], WIDE, seed=seed + i, magnitude=size)
            for i in range(count)
        ]
        merged = mpf.merge([m.path for m in made], method, **arguments)
        found[size] = {m.module.name: m.b.astype(np.float64) @ m.a / size for m in merged.modules}
    for size, modules in found.items():
        for name, delta in modules.items():
            norm = np.linalg.norm(found[1.0][name])
            assert norm > 0
            # Powers of two change no rounding but where thresholds meet float32's range.
            assert np.linalg.norm(delta - found[1.0][name]) <= 1e-3 * norm, (name, size)
