"""Merges against PEFT 0.21.2 itself: ``add_weighted_adapter`` on models with several adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_merge import U32, assert_peft_agrees, deltas

import mergeprobe_fast as mpf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from peft_models import ALL, LINEARS, Mixed, as_weight, lora_layers  # noqa: E402

# A mistake in a scale, a sign or a transposition is of order 1.
CONFIGS: dict[str, dict[str, Any]] = {
    "equal": {n: {"r": 4, "lora_alpha": a} for n, a in (("a", 4), ("b", 8), ("c", 2))},
    "ragged": {
        "a": {"r": 3, "lora_alpha": 5},
        "b": {"r": 5, "lora_alpha": 2, "use_rslora": True},
        "c": {"r": 2, "lora_alpha": 16, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"1": 3}},
    },
    "one": {"a": {"r": 3, "lora_alpha": 7}},
}


def peft_zoo(folder: Path, configs: dict[str, dict[str, Any]], targets: list[str],
             conv1d: bool = False) -> Any:  # fmt: skip
    """A model with these adapters, random factors, and each saved to ``folder/<name>``."""
    torch.manual_seed(3)
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in configs.items():
            config = peft.LoraConfig(**{"target_modules": targets, **copy.deepcopy(options)})
            if model is None:
                model = peft.get_peft_model(Mixed(conv1d, blocks=2), config, name)
            else:
                model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(str(folder), selected_adapters=list(configs))
    return model.double()


def peft_merge(model: Any, weights: list[float], **options: Any) -> dict[str, np.ndarray]:
    names = list(model.peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "merged", **options)
    return {
        name: layer.get_delta_weight("merged").detach().numpy()
        for name, layer in lora_layers(model).items()
    }


def our_merge(folder: Path, model: Any, weights: list[float], method: str,
              rank: int | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    names = [name for name in model.peft_config if name != "merged"]
    zoo = mpf.open_zoo([folder / name for name in names])
    mpf.merge(zoo, method, weights, rank, dtype="F32").save(folder / "ours")
    refs = mpf.open_zoo(folder / "ours")[0].modules
    return {n: as_weight(refs[n], delta) for n, delta in deltas(folder / "ours").items()}


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *, room: float,
                 ) -> None:  # fmt: skip
    """Equal up to the rounding of our float32 factors, ``room`` times 2 U32 sqrt(rank) |W|."""
    assert set(ours) == set(theirs)
    for name, delta in theirs.items():
        assert ours[name].shape == delta.shape, name
        norm = np.linalg.norm(delta)
        assert norm > 0
        assert np.linalg.norm(ours[name] - delta) <= room * 8 * U32 * norm, name


@pytest.mark.parametrize("rank", [None, 2, 5], ids=["default rank", "rank 2", "rank 5"])
@pytest.mark.parametrize(
    ("configs", "weights"),
    [
        ("equal", [0.5, 0.3, 0.2]),
        ("equal", [1.0, -1.0, 0.5]),
        ("ragged", [0.7, 1.4, -0.4]),
        ("ragged", [0.0, 1.0, 2.0]),
    ],
)
def test_svd_is_peft_svd(tmp_path, configs, weights, rank):
    # PEFT's svd fails where a layer is smaller than the rank; ours pads (test_merge.py).
    targets = ["0.q_proj", "0.v_proj", "1.q_proj", "embed", "conv3"]
    model = peft_zoo(tmp_path, CONFIGS[configs], targets)
    theirs = peft_merge(model, weights, combination_type="svd", svd_rank=rank)
    assert_close(our_merge(tmp_path, model, weights, "svd", rank), theirs, room=4)
    ours = mpf.open_zoo(tmp_path / "ours")[0]
    for name, layer in lora_layers(model).items():
        assert ours.modules[name].rank == layer.r["merged"], "the default rank is PEFT's"


@pytest.mark.parametrize(
    ("configs", "weights"),
    [("equal", [0.5, -0.3, 2.0]), ("ragged", [0.7, 1.4, -0.4]), ("one", [-1.5])],
)
def test_cat_and_linear_are_peft_cat(tmp_path, configs, weights):
    # PEFT takes "linear" for one adapter, which is exact; its cat is exact for several.
    model = peft_zoo(tmp_path, CONFIGS[configs], ALL)
    theirs = peft_merge(model, weights, combination_type="cat")
    for method in ("cat", "linear"):
        assert_close(our_merge(tmp_path, model, weights, method), theirs, room=8)
        assert_peft_agrees(tmp_path / "ours")
        (tmp_path / "ours").rename(tmp_path / method)


def test_conv1d_is_transposed_like_peft(tmp_path):
    configs = {n: {**c, "fan_in_fan_out": True} for n, c in CONFIGS["ragged"].items()}
    model = peft_zoo(tmp_path, configs, ["c_attn"], conv1d=True)
    theirs = peft_merge(model, [1.0, 0.5, -2.0], combination_type="svd", svd_rank=4)
    ours = our_merge(tmp_path, model, [1.0, 0.5, -2.0], "svd", 4)
    assert ours["c_attn"].shape == (6, 9)
    assert_close(ours, theirs, room=4)


def test_adapters_with_other_modules_merge_like_peft(tmp_path):
    """PEFT skips an adapter in modules it lacks, and so do we: it counts as zero there."""
    apart = {"a": ["layers.0.q_proj", "conv3"], "b": ["layers.0.q_proj"], "c": ["layers.1.v_proj"]}
    configs = {n: {**c, "target_modules": apart[n]} for n, c in CONFIGS["equal"].items()}
    model = peft_zoo(tmp_path, configs, [])
    weights = [0.4, -0.3, 1.5]
    theirs = peft_merge(model, weights, combination_type="svd", svd_rank=6)
    assert_close(our_merge(tmp_path, model, weights, "svd", 6), theirs, room=4)


def test_peft_linear_has_cross_terms_and_ours_has_not(tmp_path):
    """PEFT adds A's and B's apart: sqrt(w_i w_j) B_i A_j for i != j is in its result."""
    model = peft_zoo(tmp_path, CONFIGS["equal"], LINEARS)
    weights = [0.5, 0.3, 0.2]
    layers = lora_layers(model)
    own, everything = {}, {}
    for name, layer in layers.items():
        a = {n: layer.lora_A[n].weight.detach().numpy() for n in "abc"}
        b = {n: layer.lora_B[n].weight.detach().numpy() for n in "abc"}
        size = {n: w * layer.scaling[n] for n, w in zip("abc", weights, strict=True)}
        own[name] = sum(size[n] * b[n] @ a[n] for n in "abc")
        everything[name] = sum(
            np.sqrt(size[m] * size[n]) * b[m] @ a[n] for m in "abc" for n in "abc"
        )
    theirs = peft_merge(model, weights, combination_type="linear")
    ours = our_merge(tmp_path, model, weights, "linear")
    assert_close(ours, own, room=8)
    for name, delta in theirs.items():
        scale = np.linalg.norm(own[name])
        assert np.linalg.norm(delta - everything[name]) < 1e-6 * scale
        assert np.linalg.norm(delta - ours[name]) > 0.3 * scale, "no cross terms in PEFT any more?"
