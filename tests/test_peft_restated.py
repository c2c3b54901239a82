"""What PEFT's own tests say of ``add_weighted_adapter``, asked of ours; and what ours refuses.

Each of the first tests restates one of PEFT's (its name is given) in stronger terms, with the
drop-in in place of PEFT's method, and with the default mode where that may differ.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import mergeprobe_fast as mpf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from peft_models import LINEARS, lora_layers  # noqa: E402
from peft_several import EQUAL, deltas, differences, everything, several, weighted  # noqa: E402
from tolerances import U32  # noqa: E402

from mergeprobe_fast.integrations import _peft_inject  # noqa: E402
from mergeprobe_fast.integrations.peft import add_weighted_adapter, drop_in  # noqa: E402

TYPES = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
    "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
MODES = pytest.mark.parametrize("compat", ["peft", None], ids=["peft", "default"])


class MLP(torch.nn.Module):
    """Two linear layers with a ReLU, as PEFT's tests have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = torch.nn.Linear(30, 40)
        self.lin1 = torch.nn.Linear(40, 25)

    def forward(self, x: Any) -> Any:
        return self.lin1(torch.relu(self.lin0(x)))


def mlp(rng: np.random.Generator, **configs: dict[str, Any]) -> Any:
    return several(configs, ["lin0", "lin1"], base=MLP(), seed=int(rng.integers(1 << 30)))


def assert_close(ours: dict[str, Any], want: dict[str, Any]) -> None:
    assert set(ours) == set(want)
    for path, delta in want.items():
        assert (ours[path] - delta).norm() <= 64 * U32 * delta.norm(), path


@MODES
def test_ranks_of_every_type_as_in_peft_s_weighted_combination(rng, compat):
    """_test_weighted_combination_of_adapters_lora: ranks 8, 8, 20."""
    model = mlp(rng, a={"r": 8}, b={"r": 8, "lora_alpha": 32}, c={"r": 20, "lora_alpha": 5})
    options = {"density": 0.5}
    with drop_in(compat):
        for kind in TYPES:
            wide = kind.endswith("svd") or kind == "cat"
            members, weights = (["b", "c"], [-1, 0.5]) if wide else (["a", "b"], [0.3, -0.7])
            takes = {} if kind in ("svd", "linear", "cat") and compat is None else options
            model.add_weighted_adapter(members, weights, kind, combination_type=kind, **takes)
            want = 20 if kind.endswith("svd") else 28 if kind == "cat" else 8
            if kind == "linear" and compat is None:
                want = 16  # exact: as high as the sum's
            assert {layer.r[kind] for layer in lora_layers(model).values()} == {want}, kind
            if not wide:
                uneven = {"combination_type": kind, **takes}
                if compat:
                    with pytest.raises(ValueError, match="All adapters must have the same r"):
                        model.add_weighted_adapter(["b", "c"], [1, 1], "uneven", **uneven)
                else:
                    model.add_weighted_adapter(["b", "c"], [1, 1], f"{kind} uneven", **uneven)
    assert_close(deltas(model, "cat"), weighted(model, {"b": -1, "c": 0.5}))
    model.eval()
    for kind in TYPES:
        model.set_adapter(kind)
        assert model.active_adapters == [kind] and model(torch.randn(3, 30)).isfinite().all()


@MODES
def test_cat_with_rank_pattern(rng, compat):
    """test_add_weighted_adapter_cat_with_rank_pattern."""
    model = mlp(rng, a={"r": 8, "rank_pattern": {"lin0": 2}},
                b={"r": 8, "rank_pattern": {"lin0": 16}})  # fmt: skip
    with drop_in(compat):
        model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "merged", combination_type="cat")
    assert_close(deltas(model, "merged"), weighted(model, {"a": 1.0, "b": -0.5}))
    assert {layer.r["merged"] for layer in lora_layers(model).values()} == {24 if compat else 18}


@MODES
@pytest.mark.parametrize("weight", [-1.0, -0.5, 0.0, 3])
def test_one_adapter_times_its_weight(rng, compat, weight):
    """test_add_weighted_adapter_negative_weight_negates_adapter."""
    model = mlp(rng, a={"r": 8, "lora_alpha": 3})
    with drop_in(compat):
        model.add_weighted_adapter(["a"], [weight], "merged", combination_type="linear")
    assert_close(deltas(model, "merged"), weighted(model, {"a": weight}))


@MODES
@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_subtracting_an_adapter_from_itself_is_zero(rng, compat, kind):
    """test_add_weighted_adapter_subtraction_with_negative_weights."""
    model = mlp(rng, a={"r": 8}, b={"r": 8})
    state = model.state_dict()
    model.load_state_dict({k: state[k.replace(".b.", ".a.")] for k in state})
    with drop_in(compat):
        model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "merged", combination_type=kind)
    own = deltas(model, "a")
    for path, delta in deltas(model, "merged").items():
        assert delta.norm() <= 16 * U32 * own[path].norm(), path
        assert own[path].norm() > 1


@MODES
def test_negative_weights_with_different_scaling(rng, compat):
    """test_add_weighted_adapter_negative_weight_with_different_scaling, with the right answer."""
    model = mlp(rng, a={"r": 8, "lora_alpha": 16}, b={"r": 8, "lora_alpha": 32})
    with drop_in(compat):
        model.add_weighted_adapter(["a", "b"], [0.5, -0.3], "merged", combination_type="linear")
    own, ours = weighted(model, {"a": 0.5, "b": -0.3}), deltas(model, "merged")
    if compat is None:
        assert_close(ours, own)
    else:
        assert all((ours[p] - d).norm() > 0.1 * d.norm() for p, d in own.items()), "cross terms"


def test_modules_to_save_of_one_adapter_goes_with_the_merged_one_in_compat(rng):
    """..._mixed_modules_to_save_merging_adapters: PEFT gives the base's copy, not the trained."""
    model = mlp(rng, a={"r": 4, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
                b={"r": 4, "target_modules": ["lin0"]})  # fmt: skip
    before = everything(model)
    with pytest.raises(mpf.InputError, match=r"^lin1: adapter 'a' has a trained copy"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "merged")
    assert not differences(before, everything(model))
    with drop_in():
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged")
    assert set(model.base_model.model.lin1.modules_to_save) == {"a", "merged"}
    model.set_adapter("merged")
    assert model(torch.randn(2, 30)).isfinite().all()


@MODES
def test_modules_to_save_of_two_adapters_raises(rng, compat):
    """..._same_modules_to_save_merging_adapters_raises."""
    one = {"r": 4, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model = mlp(rng, a=one, b=one)
    before = everything(model)
    said = "Cannot add weighted adapters if they target the same module with modules_to_save, but "
    with drop_in(compat), pytest.raises(ValueError, match=said if compat else "^lin1: "):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged")
    assert not differences(before, everything(model))


@MODES
def test_target_parameters_raise(rng, compat):
    """tests/test_target_parameters.py: bare parameters cannot be merged."""
    one = {"r": 4, "target_parameters": ["lin0.weight"], "target_modules": ["lin1"]}
    model = mlp(rng, a=one, b=one)
    before = everything(model)
    said = "does not support targeting nn.Parameter (problematic adapter 'a')"
    with drop_in(compat), pytest.raises(ValueError, match=re.escape(
        said if compat else "adapters on bare parameters (target_parameters)")):  # fmt: skip
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged")
    assert not differences(before, everything(model))


def test_merging_into_a_taken_name_raises_where_peft_is_silent(rng):
    model = mlp(rng, a={"r": 4}, b={"r": 4})
    before = everything(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b")
    assert not differences(before, everything(model)), "PEFT says nothing and does nothing"
    with pytest.raises(mpf.InputError, match="adapter_name: there is an adapter 'b' already"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "b")


def test_rslora_and_rank_pattern_where_peft_is_wrong(rng, tmp_path):
    """PEFT's result is sqrt(r) times too large, or cannot be loaded again; ours is neither."""
    both = {"r": 4, "use_rslora": True}
    model = mlp(rng, a=both, b=both)
    theirs, want = copy.deepcopy(model), weighted(model, {"a": 1.0, "b": 0.5})
    theirs.add_weighted_adapter(["a", "b"], [1.0, 0.5], "merged", "cat")
    for path, delta in deltas(theirs, "merged").items():
        assert torch.allclose(delta, want[path] * 8**0.5, rtol=1e-4, atol=1e-4), "PEFT repaired?"
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.5], "merged", "cat")
    assert_close(deltas(model, "merged"), want)

    both = {"r": 4, "rank_pattern": {"lin0": 2}}
    model = mlp(rng, a=both, b=both)
    for compat, mine in (("PEFT itself", None), ("peft", model), (None, copy.deepcopy(model))):
        merged = mine or copy.deepcopy(model)
        if mine is None:
            merged.add_weighted_adapter(["a", "b"], [1.0, 0.5], "merged", "linear")
        else:
            add_weighted_adapter(mine, ["a", "b"], [1.0, 0.5], "merged", "linear", compat=compat)
        folder = tmp_path / str(compat)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            merged.save_pretrained(str(folder), selected_adapters=["merged"])
            if mine is None:
                with pytest.raises(RuntimeError, match="size mismatch"):
                    peft.PeftModel.from_pretrained(MLP(), str(folder / "merged"))
            else:
                again = peft.PeftModel.from_pretrained(MLP(), str(folder / "merged"))
                assert_close(deltas(again, "default"), deltas(merged, "merged"))


def test_layers_of_every_adapter_where_peft_asks_the_first_only(rng):
    shared = {"target_modules": ["q_proj"], "layers_pattern": "layers"}
    configs = {n: {**EQUAL[n], **shared, "layers_to_transform": [i]} for i, n in enumerate("ab")}
    model = several(configs, seed=int(rng.integers(1 << 30)))
    theirs = copy.deepcopy(model)
    theirs.add_weighted_adapter(["a", "b"], [1.0, 2.0], "merged", "cat")
    assert set(deltas(theirs, "merged")) == {"q_proj", "layers.0.q_proj"}, "PEFT has repaired this"
    add_weighted_adapter(model, ["a", "b"], [1.0, 2.0], "merged", "cat")
    assert_close(deltas(model, "merged"), weighted(model, {"a": 1.0, "b": 2.0}))


@MODES
def test_a_model_with_merged_adapters_stays_so_where_peft_takes_it_apart(rng, compat):
    model = mlp(rng, a={"r": 4}, b={"r": 4})
    model.merge_adapter(["a"])
    theirs, before = copy.deepcopy(model), everything(model)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        theirs.add_weighted_adapter(["a", "b"], [1.0, 2.0], "merged", "cat")
    assert not any(layer.merged for layer in lora_layers(theirs).values())
    add_weighted_adapter(model, ["a", "b"], [1.0, 2.0], "merged", "cat", compat=compat)
    assert not differences(before, everything(model), "merged")
    assert all(layer.merged_adapters == ["a"] for layer in lora_layers(model).values())


def test_compat_leaves_the_base_alone_where_peft_initialises_it_again(rng):
    model = mlp(rng, a={"r": 4, "init_lora_weights": "pissa"}, b={"r": 4})
    theirs, before = copy.deepcopy(model), everything(model)
    base = theirs.base_model.model.lin0.base_layer.weight.detach().clone()
    theirs.add_weighted_adapter(["a", "b"], [1.0, 2.0], "merged", "cat")
    assert not torch.equal(base, theirs.base_model.model.lin0.base_layer.weight)
    add_weighted_adapter(model, ["a", "b"], [1.0, 2.0], "merged", "cat", compat="peft")
    assert not differences(before, everything(model), "merged")
    assert_close(deltas(model, "merged"), weighted(model, {"a": 1.0, "b": 2.0}))


@dataclass(frozen=True)
class Refusal:
    """A config, or a change to a live model, or arguments, that must be refused, and the words."""

    said: str
    config: dict[str, Any] = field(default_factory=dict)
    change: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)


def poison(model: Any) -> None:
    with torch.no_grad():
        lora_layers(model)["lin1"].lora_B["b"].weight[3, 1] = float("nan")


def bare(model: Any) -> None:
    lora_layers(model)["lin0"].lora_A["b"].weight = torch.nn.Parameter(
        torch.empty(4, 30, device="meta")
    )


def float8(model: Any) -> None:
    a = lora_layers(model)["lin0"].lora_A["b"]
    a.weight = torch.nn.Parameter(a.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def infinite(model: Any) -> None:
    lora_layers(model)["lin0"].scaling["b"] = float("inf")


def half(model: Any) -> None:
    model.half()
    lora_layers(model)["lin0"].scaling["b"] = 1e6


REFUSALS = {
    "DoRA": Refusal(r"^adapter 'b': use_dora: True: DoRA", {"use_dora": True}),
    "lora_bias": Refusal(r"^adapter 'b': lora_bias: True: a trained", {"lora_bias": True}),
    "bias": Refusal(r"^adapter 'b': bias: biases of the base", {"bias": "all"}),
    "PiSSA": Refusal(r"^adapter 'b': init_lora_weights: 'pissa': the factors",
                     {"init_lora_weights": "pissa"}),
    "NaN": Refusal(r"^lin1\.lora_B\.b: holds NaN", change=poison),
    "meta": Refusal(r"^lin0\.lora_A\.b: is not a plain tensor", change=bare),
    "float8": Refusal(r"^lin0\.lora_A\.b: is torch.float8_e4m3fn; expected", change=float8),
    "scale": Refusal(r"^adapter 'b': lin0: its scaling is inf$", change=infinite),
    "overflow": Refusal(r"^lin0: the merged update does not fit torch.float16", change=half),
    "clamp": Refusal(r"^svd_clamp: depends on signs", arguments={"svd_clamp": 0.9}),
    "unknown": Refusal(r"^adapters: no adapter 'x' in this model; there are: a, b$",
                       arguments={"adapters": ["a", "x"]}),
    "one text": Refusal(r"^adapters: expected names", arguments={"adapters": "ab"}),
    "weights": Refusal(r"^weights: expected one for each of 2", arguments={"weights": [1.0]}),
    "weight": Refusal(r"^weights: must be finite", arguments={"weights": [1.0, float("inf")]}),
    "type": Refusal(r"^method: no method 'averag'", arguments={"combination_type": "averag"}),
    "density": Refusal(r"^method: svd takes no argument 'density'", arguments={"density": 0.5}),
    "signs": Refusal(r"takes no argument 'majority_sign_method'",
                     arguments={"majority_sign_method": "frequency"}),
    "rank": Refusal(r"^rank: must be a positive integer, got 0", arguments={"svd_rank": 0}),
    "cat rank": Refusal(r"^rank: cat keeps every component",
                        arguments={"svd_rank": 3, "combination_type": "cat"}),
    "name": Refusal(r"^adapter_name: must be a text without dots", arguments={"adapter_name": "."}),
    "compat": Refusal(r"^compat: must be 'peft' or None", arguments={"compat": "peft 0.20"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_right_is_refused_and_leaves_the_model_alone(rng, case):
    refusal = REFUSALS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlp(rng, a={"r": 4}, b={"r": 4, **refusal.config})
    if refusal.change:
        refusal.change(model)
    before = everything(model)
    arguments = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "merged"}
    with pytest.raises(mpf.InputError, match=refusal.said):
        add_weighted_adapter(model, **{**arguments, **refusal.arguments})
    after = everything(model)
    if case != "meta":  # its tensors cannot be compared
        assert not differences(before, after)
    assert "merged" not in model.peft_config


def test_layers_that_cannot_be_merged_are_refused_by_name(rng):
    seed = int(rng.integers(1 << 30))
    base = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
    model = several(EQUAL, ["attn"], base=base, seed=seed)
    with pytest.raises(mpf.InputError, match=r"^attn: torch's MultiheadAttention"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 6, 3, groups=2)})
        model = several(EQUAL, ["conv"], base=base, seed=seed)
    with pytest.raises(mpf.InputError, match=r"^conv: a convolution of 2 groups"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "merged")
    for other in (torch.nn.Linear(3, 3), peft.get_peft_model(MLP(), peft.IA3Config(
        target_modules=["lin0"], feedforward_modules=[]))):  # fmt: skip
        with pytest.raises(mpf.InputError, match=r"^model: expected a PEFT model with LoRA"):
            add_weighted_adapter(other, ["a"], [1.0], "merged")


@MODES
@pytest.mark.parametrize("where", ["inject", "fill"])
def test_an_error_half_way_leaves_the_model_as_it_was(rng, compat, where, monkeypatch):
    """Wrapped layers are unwrapped too: compat targets what no adapter has, and PEFT breaks off."""
    apart = {
        "a": {"target_modules": ["q_proj"]},
        "b": {"target_modules": ["v_proj"], "exclude_modules": ["layers.1.v_proj"]},
    }
    model = several({n: {**EQUAL[n], **apart[n]} for n in "ab"}, LINEARS,
                    seed=int(rng.integers(1 << 30)))  # fmt: skip
    model.merge_adapter(["a"])
    before = everything(model)
    if where == "inject" and compat:
        with pytest.raises(ValueError, match="No matching LoRAs found"):
            add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "merged", "cat", compat=compat)
    else:
        broken = (peft.tuners.lora.Linear, "update_layer") if where == "inject" else (
            _peft_inject, "_finish")  # fmt: skip
        original, calls = getattr(*broken), []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("out of luck")
            return original(*args, **kwargs)

        monkeypatch.setattr(*broken, failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            add_weighted_adapter(model, ["a"], [1.0], "merged", compat=compat)
        monkeypatch.undo()
    assert not differences(before, everything(model))
    add_weighted_adapter(model, ["a"], [1.0], "merged", compat=compat)
    assert_close(deltas(model, "merged"), weighted(model, {"a": 1.0}))


def test_the_drop_in_is_found_by_its_name():
    import mergeprobe_fast as mpf

    assert mpf.integrations.peft.add_weighted_adapter is add_weighted_adapter
    with pytest.raises(AttributeError, match="no attribute 'pfet'"):
        mpf.integrations.pfet  # noqa: B018
