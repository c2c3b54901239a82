"""The default mode of the PEFT drop-in: right where PEFT is wrong, and loud where nothing is right.

Definitions are dense float64 sums of the deltas that PEFT's own layers report.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_merge import U32

import mergeprobe_fast as mpf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from peft_models import ALL, LINEARS, Mixed, lora_layers  # noqa: E402
from peft_several import (  # noqa: E402
    EQUAL,
    LARGE,
    RAGGED,
    deltas,
    differences,
    everything,
    randomise,
    several,
    weighted,
)

from mergeprobe_fast.integrations.peft import add_weighted_adapter, drop_in  # noqa: E402

WEIGHTS = {"a": 0.7, "b": -1.4, "c": 0.4}


def seed_from(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def add(model: Any, kind: str = "linear", name: str = "merged", **options: Any) -> dict[str, Any]:
    """Merge with WEIGHTS; the new deltas."""
    names = [n for n in WEIGHTS if n in model.peft_config]
    add_weighted_adapter(model, names, [WEIGHTS[n] for n in names], name, kind, **options)
    return deltas(model, name)


def assert_close(ours: dict[str, Any], want: dict[str, Any], unit: float = U32) -> None:
    """Float factors of a sum that cancels little: 2 u sqrt(rank) |W|, rank <= 16, and room of 4."""
    assert set(ours) == set(want)
    for path, delta in want.items():
        assert (ours[path] - delta).norm() <= 32 * unit * delta.norm(), path
        assert not (1.1 * ours[path] - delta).norm() <= 32 * unit * delta.norm(), "can fail"


@pytest.mark.parametrize("configs", [EQUAL, RAGGED, {"b": EQUAL["b"]}],
                         ids=["equal", "ragged", "one"])  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_linear_and_cat_are_the_weighted_sum(rng, kind, configs):
    model = several(configs, ALL, seed=seed_from(rng))
    ours = add(model, kind)
    assert_close(ours, weighted(model, {n: WEIGHTS[n] for n in configs}))
    config = model.peft_config["merged"]
    assert (config.lora_alpha, config.use_rslora) == (config.r, False)
    assert config.rank_pattern == config.alpha_pattern == {}
    for layer in lora_layers(model).values():
        assert (layer.scaling["merged"], layer.r["merged"]) == (1.0, config.r)
    stacked = max(sum(a.r[n] for n in configs) for a in lora_layers(model).values())
    assert config.r == stacked if kind == "cat" else config.r <= min(stacked, 10)


def test_an_adapter_twice_and_adapters_that_are_zero(rng):
    model = several(EQUAL, ALL, seed=seed_from(rng))
    add_weighted_adapter(model, ["b", "a", "b"], [0.5, 1.0, 2.0], "merged", "linear")
    assert_close(deltas(model, "merged"), weighted(model, {"a": 1.0, "b": 2.5}))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B.a" in path or "lora_B.b" in path or "embedding_A." in path:
                parameter.zero_()
    for kind in ("linear", "svd", "cat", "ties", "dare_linear"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 1.0], kind, kind)
        assert not any(delta.any() for delta in deltas(model, kind).values()), kind


@pytest.mark.parametrize("configs", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_svd_is_the_best_approximation_of_the_sum(rng, configs):
    model = several(configs, LARGE, seed=seed_from(rng))
    add(model, "svd")
    largest = max(layer.r[n] for layer in lora_layers(model).values() for n in configs)
    assert model.peft_config["merged"].r == largest
    for rank in (1, 2, 5):
        ours = add(model, "svd", f"rank {rank}", svd_rank=rank)
        for path, delta in weighted(model, WEIGHTS).items():
            sigma = torch.linalg.svdvals(delta.flatten(1))
            lost = (ours[path] - delta).norm()
            assert abs(lost - sigma[rank:].norm()) <= 32 * U32 * sigma.norm(), path
            assert sigma[rank - 1] > 1e-3 * sigma.norm(), "one component less must show"


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_elementwise_types_act_on_the_delta_with_and_without_svd(rng, kind):
    """The same result in any gauge of the factors, for the name with _svd and the one without."""
    model = several(EQUAL, LARGE, seed=seed_from(rng))
    options = {"density": 0.5, "svd_rank": 3, **({"seed": 5} if "dare" in kind else {})}
    plain, suffixed = add(model, kind, "x", **options), add(model, f"{kind}_svd", "y", **options)
    assert all(torch.equal(plain[p], suffixed[p]) for p in plain)
    with torch.no_grad():  # powers of two: the products are the same, bit for bit
        for layer in lora_layers(model).values():
            for name in "abc":
                a = layer.lora_A[name].weight if name in layer.lora_A else (
                    layer.lora_embedding_A[name])  # fmt: skip
                b = layer.lora_B[name].weight if name in layer.lora_B else (
                    layer.lora_embedding_B[name])  # fmt: skip
                a *= 2.0**7
                b *= 2.0**-7
    moved = add(model, kind, "z", **options)
    for path, delta in plain.items():
        assert torch.equal(moved[path], delta), path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list("abc"), list(WEIGHTS.values()), "theirs", kind,
                                   density=0.5)  # fmt: skip
    theirs = deltas(model, "theirs")
    assert any((theirs[p] - d).norm() > 0.1 * d.norm() for p, d in plain.items()), "no difference?"


def test_magnitude_prune_is_its_definition(rng):
    model = several(EQUAL, ["0.q_proj", "embed"], seed=seed_from(rng))
    ours = add(model, "magnitude_prune", density=0.3, svd_rank=12)
    for path, delta in ours.items():
        want = torch.zeros_like(delta)
        for name, weight in WEIGHTS.items():
            own = deltas(model, name)[path]
            least = own.abs().flatten().sort().values[-int(0.3 * own.numel())]
            want += weight * torch.where(own.abs() >= least * (1 - 1e-6), own, 0)
        assert (delta - want).norm() <= 64 * U32 * want.norm(), path


@pytest.mark.parametrize("name", [n for n, m in mpf.MERGE_METHODS.items() if not m.data])
def test_every_method_without_data_goes_by_its_name(rng, tmp_path, name):
    """The same method on the saved adapters gives the same deltas."""
    model = several(EQUAL, ["0.q_proj", "1.v_proj", "embed"], seed=seed_from(rng))
    members = list("abc")[: mpf.MERGE_METHODS[name].arity[1] or 3]
    add_weighted_adapter(model, members, None, "merged", name)
    ours = deltas(model, "merged")
    model.save_pretrained(str(tmp_path), selected_adapters=members)
    zoo = mpf.open_zoo([tmp_path / n for n in members])
    for m in mpf.merge(zoo, name).modules:
        want = torch.from_numpy(m.b.astype(np.float64) @ m.a)
        want = want.T if m.module.kind == "embedding" else want
        scale = want.norm() if want.norm() > 0 else 1
        assert (ours[m.module.name] - want).norm() <= 1e-12 * scale, m.module.name


def test_a_method_that_needs_data_says_so(rng):
    model = several(EQUAL, LARGE, seed=seed_from(rng))
    for name in (n for n, m in mpf.MERGE_METHODS.items() if m.data):
        with pytest.raises(mpf.InputError, match=f"{name} needs a calibration"):
            add(model, name)


def test_set_scale_and_conv1d_and_layers_of_their_own(rng):
    """The live scale counts; GPT-2's Conv1D is transposed; other layers of other adapters stay."""
    apart = {"a": ["c_attn", "conv3"], "b": ["c_attn"], "c": ["layers.1.v_proj"]}
    configs = {n: {**c, "target_modules": apart[n], "layers_to_transform": 1 if n == "c" else None,
                   "fan_in_fan_out": n != "c"} for n, c in EQUAL.items()}  # fmt: skip
    model = several(configs, conv1d=True, seed=seed_from(rng))
    for layer in lora_layers(model).values():
        layer.set_scale("b", 0.25)
    ours = add(model)
    assert set(ours) == {"c_attn", "conv3", "layers.1.v_proj"}
    assert_close(ours, weighted(model, WEIGHTS))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_of_one_and_three_dimensions(rng, kernel):
    base = torch.nn.ModuleDict({
        "one": torch.nn.Conv1d(4, 7, kernel), "three": torch.nn.Conv3d(3, 6, kernel),
    })  # fmt: skip
    model = several(EQUAL, ["one", "three"], base=base, seed=seed_from(rng))
    want = {}
    for path, layer in lora_layers(model).items():
        want[path] = sum(
            w * layer.scaling[n] * torch.einsum(
                "or,ri...->oi...", layer.lora_B[n].weight.detach().double().flatten(1),
                layer.lora_A[n].weight.detach().double())
            for n, w in WEIGHTS.items()
        )  # fmt: skip
    add(model, "linear") if kernel == 3 else add_weighted_adapter(
        model, list("abc"), list(WEIGHTS.values()), "merged", "svd", 7)  # fmt: skip
    for path, layer in lora_layers(model).items():
        a, b = (m["merged"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
        ours = torch.einsum("or,ri...->oi...", b.flatten(1), a)
        assert (ours - want[path]).norm() <= 32 * U32 * want[path].norm(), path


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12), (torch.float64, U32)]
)
def test_results_land_in_the_precision_of_the_weights(rng, dtype, unit):
    model = several(EQUAL, ALL, dtype=dtype, seed=seed_from(rng))
    ours = add(model)
    assert {layer.get_delta_weight("merged").dtype for layer in lora_layers(model).values()} == {
        dtype}  # fmt: skip
    assert_close(ours, weighted(model, WEIGHTS), unit)


def test_factors_of_mixed_precision_take_the_wider_one(rng):
    model = several(EQUAL, ALL, dtype=torch.bfloat16, seed=seed_from(rng))
    for layer in lora_layers(model).values():
        for holder in (layer.lora_A, layer.lora_B):
            if "b" in holder:
                holder["b"].float()
        for holder in (layer.lora_embedding_A, layer.lora_embedding_B):
            if "b" in holder:
                holder["b"] = torch.nn.Parameter(holder["b"].float())
    randomise(model, ["b"])
    assert_close(add(model), weighted(model, WEIGHTS))


def test_nothing_else_in_the_model_changes(rng):
    """Parameters, their memory, gradients, modes, active and merged adapters, random numbers."""
    for case in ("plain", "eval", "merged", "disabled", "two active"):
        model = several(EQUAL, ALL, seed=seed_from(rng))
        if case == "eval":
            model.eval()
        elif case == "merged":
            model.merge_adapter(["a", "b"])
        elif case == "disabled":
            model.base_model.disable_adapter_layers()
        elif case == "two active":
            model.base_model.set_adapter(["a", "c"])
            next(iter(lora_layers(model).values())).lora_A["c"].weight.requires_grad_(False)
        for options in ({}, {"compat": "peft"}):
            before, chance = everything(model), torch.get_rng_state()
            name = "new_peft" if options else "new"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                add(model, "cat", name, **options)
            assert not differences(before, everything(model), name), case
            assert options or torch.equal(chance, torch.get_rng_state())
            mode = case != "eval"
            for path, module in model.named_modules():
                if path.endswith(name):
                    assert module.training == mode, path
            new = [p for n, p in model.named_parameters() if name in n]
            assert new and not any(p.requires_grad for p in new)


def test_the_new_adapter_works_in_a_forward_pass(rng):
    """Dropout of a model in eval mode is off in the merged adapter too; PEFT leaves it on."""
    base = torch.nn.Sequential(torch.nn.Linear(10, 6))
    configs = {n: {**c, "lora_dropout": 0.5} for n, c in EQUAL.items()}
    model = several(configs, ["0"], base=base, seed=seed_from(rng)).eval()
    theirs = copy.deepcopy(model)
    x = torch.randn(5, 10)
    add(model)
    delta = deltas(model, "merged")["0"].float()
    model.set_adapter("merged")
    layer = lora_layers(model)["0"]
    want = layer.base_layer(x) + x @ delta.T
    assert torch.allclose(model(x), want, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(list("abc"), list(WEIGHTS.values()), "merged", "cat")
    assert lora_layers(theirs)["0"].lora_dropout["merged"].training, "PEFT has repaired this"


def test_names_that_are_part_of_other_names_freeze_nothing_else(rng):
    """PEFT freezes every parameter whose path has the new name in it."""
    model = several(EQUAL, LINEARS, seed=seed_from(rng))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert any(before.values())
    theirs = copy.deepcopy(model)
    add(model, name="lora")
    assert all(p.requires_grad == before.get(n, False) for n, p in model.named_parameters())
    theirs.add_weighted_adapter(list("abc"), [1.0, 1.0, 1.0], "lora", "cat")
    assert not any(p.requires_grad for p in theirs.parameters()), "PEFT has repaired this"


def test_targets_select_the_layers_and_no_others(rng, tmp_path):
    """Words where they fit, paths where not, an expression where a path ends another."""
    for targets, want in (
        (["v_proj"], {"v_proj"}),
        ([["layers.0.q_proj"], ["layers.0.v_proj"]], {"layers.0.q_proj", "layers.0.v_proj"}),
        ("q_proj", "q_proj"),  # the one outside of the blocks
    ):
        listed = targets if isinstance(targets[0], list) else [targets] * 2
        configs = {n: {**EQUAL[n], "target_modules": t} for n, t in zip("ab", listed, strict=True)}
        model = several(configs, seed=seed_from(rng))
        ours = add(model)
        found = model.peft_config["merged"].target_modules
        assert found == want, targets
        folder = tmp_path / str(len(str(targets)))
        assert_reloads(model, folder, ours)


def assert_reloads(model: Any, folder: Path, ours: dict[str, Any], conv1d: bool = False) -> None:
    """PEFT saves the adapter and loads it without a warning; the deltas are bit for bit equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "is_gradient_checkpointing", FutureWarning)
        model.save_pretrained(str(folder), selected_adapters=["merged"])
        torch.manual_seed(0)
        again = peft.PeftModel.from_pretrained(Mixed(conv1d, blocks=2), str(folder / "merged"))
    loaded = deltas(again, "default")
    assert set(loaded) == set(ours)
    assert all(torch.equal(loaded[path], delta) for path, delta in ours.items())


@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "ties"])
def test_saved_and_loaded_by_peft_it_is_the_same(rng, tmp_path, kind):
    model = several(RAGGED, ALL, seed=seed_from(rng))
    ours = add(model, kind)
    assert_reloads(model, tmp_path, ours)
    assert {m.name for m in mpf.open_zoo(tmp_path / "merged").modules} == set(ours)


def test_saved_conv1d_reloads_without_a_warning(rng, tmp_path):
    configs = {n: {**c, "fan_in_fan_out": True} for n, c in RAGGED.items()}
    model = several(configs, ["c_attn"], conv1d=True, seed=seed_from(rng))
    assert_reloads(model, tmp_path, add(model), conv1d=True)


def test_the_drop_in_replaces_and_restores(rng):
    original = peft.LoraModel.add_weighted_adapter
    model = several(EQUAL, LARGE, seed=seed_from(rng))
    with drop_in():
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "theirs", combination_type="linear")
        with pytest.raises(ValueError, match=r"^Adapter x does not exist$"):
            model.add_weighted_adapter(["x"], [1.0], "y")
        assert peft.LoraModel.add_weighted_adapter.__doc__ == original.__doc__
    with drop_in(compat=None):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ours", "linear")
    assert peft.LoraModel.add_weighted_adapter is original
    assert_close(deltas(model, "ours"), weighted(model, {"a": 1.0, "b": 1.0}))
    one, other = deltas(model, "theirs"), deltas(model, "ours")
    assert any((one[p] - other[p]).norm() > 0.1 * one[p].norm() for p in one), "cross terms"
