"""``compat="peft"`` gives PEFT 0.21.2's numbers; PEFT itself, on a copy of a model, is the oracle.

Truncated results are compared by what they lose of the very matrix that PEFT gave to its SVD, and
as deltas where the singular values leave no doubt about the subspace.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from peft_models import ALL, lora_layers  # noqa: E402
from peft_several import EQUAL, LARGE, RAGGED, deltas, seen_by_svd, several  # noqa: E402

from mergeprobe_fast.integrations.peft import add_weighted_adapter  # noqa: E402

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TRUNCATED = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
WEIGHTS = ([0.5, 0.3, 0.2], [1.0, -1.5, 0.25], [1, -1, 2])
U32 = 2.0**-24


def seed_from(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def both(model: Any, weights: list[float], seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """PEFT's model, ours, and the matrices that PEFT decomposed, layer by layer."""
    names = list(model.peft_config)
    models = copy.deepcopy(model), model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        with seen_by_svd() as seen:
            models[0].add_weighted_adapter(names, weights, "merged", **options)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        add_weighted_adapter(models[1], names, weights, "merged", compat="peft", **options)
    assert torch.equal(torch.get_rng_state(), after), "as many random numbers as PEFT"
    configs = [m.peft_config["merged"].to_dict() for m in models]
    assert configs[0] == configs[1]
    for (path, theirs), ours in zip(
        lora_layers(models[0]).items(), lora_layers(models[1]).values(), strict=True
    ):
        assert theirs.scaling == ours.scaling and theirs.r == ours.r, path
    return *models, seen


def assert_same_factors(theirs: Any, ours: Any) -> None:
    """Every parameter of the new adapter, to the last bit or two: sums may be ordered otherwise."""
    expected, got = (
        {k: v for k, v in m.state_dict().items() if ".merged" in k} for m in (theirs, ours)
    )
    assert set(expected) == set(got) and expected
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and got[key].shape == value.shape, key
        assert torch.equal(got[key] == 0, value == 0), f"{key}: other entries survived"
        assert torch.allclose(got[key], value, rtol=4 * U32, atol=4 * U32), key


def assert_as_good(model: Any, other: Any, seen: list[torch.Tensor], rank: int,
                   excess: float = 0.0, fault: float = 0.0) -> None:  # fmt: skip
    """Ours loses no more of PEFT's matrix M than the best rank-k approximation does.

    Error of float32 factors: 2 u sqrt(k) ||M||_F, and M itself is off by a rounding of each delta
    entry, (r + 2) u of the sizes that are added up: 40 u ||M|| with r <= 5, three adapters that
    cancel little. The range finder may lose ``excess`` more of the energy that is left out.
    """
    theirs, ours = deltas(other, "merged"), deltas(model, "merged")
    layers = lora_layers(model)
    assert len(seen) == len(theirs) == len(ours)
    for (path, delta), matrix in zip(ours.items(), seen, strict=True):
        layer = layers[path]
        mine, peft_s = (
            d.T if "merged" in layer.lora_embedding_A or getattr(layer, "fan_in_fan_out", False)
            else d.flatten(1) for d in (delta / layer.scaling["merged"],
                                        theirs[path] / layer.scaling["merged"])
        )  # fmt: skip
        sigma = torch.linalg.svdvals(matrix)
        norm, best = sigma.norm(), sigma[rank:].norm()
        lost = (matrix - mine * (1 + fault)).norm()
        assert lost <= best * (1 + excess) ** 0.5 + 40 * U32 * norm, path
        if rank >= len(sigma) or sigma[rank - 1] >= 1.01 * sigma[rank]:
            # A gap of 1% magnifies what separates two matrices 2 * 101 times. To turn a basis
            # by t costs t^2 (s_k^2 - s_k+1^2) of energy, and moves by t^2 (s_k^2 + s_k+1^2).
            bound = 202 * 80 * U32 * norm + (101 * excess) ** 0.5 * best
            assert (mine - peft_s).norm() <= bound + fault * norm, path


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", ["cat", *FACTORS])
def test_factor_types_are_peft_s_to_the_bit(rng, kind, weights):
    model = several(EQUAL, ALL, seed=seed_from(rng))
    theirs, ours, _ = both(model, weights, seed_from(rng), combination_type=kind, density=0.6,
                           majority_sign_method="frequency" if weights[1] < 0 else "total")
    assert_same_factors(theirs, ours)


@pytest.mark.parametrize("configs", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", TRUNCATED)
def test_truncated_types_are_peft_s(rng, kind, weights, configs):
    model = several(configs, LARGE, seed=seed_from(rng))
    theirs, ours, seen = both(model, weights, seed_from(rng), combination_type=kind, density=0.4)
    assert_as_good(ours, theirs, seen, theirs.peft_config["merged"].r)
    with pytest.raises(AssertionError):
        assert_as_good(ours, theirs, seen, theirs.peft_config["merged"].r, fault=0.02)


@pytest.mark.parametrize("kind", TRUNCATED)
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_truncated_types_take_density_sign_rank_and_transposed_layers(rng, kind, method):
    configs = {n: {**c, "fan_in_fan_out": True} for n, c in EQUAL.items()}
    model = several(configs, ["c_attn"], conv1d=True, seed=seed_from(rng))
    theirs, ours, seen = both(model, [1.0, -0.5, 0.7], seed_from(rng), combination_type=kind,
                              svd_rank=2, density=0.3, majority_sign_method=method)  # fmt: skip
    assert_as_good(ours, theirs, seen, 2)


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_layers_wider_than_the_ranks_go_through_the_range_finder(rng, kind):
    base = torch.nn.Sequential(torch.nn.Linear(150, 110), torch.nn.Linear(110, 130))
    model = several(EQUAL, ["0", "1"], base=base, seed=seed_from(rng))
    theirs, ours, seen = both(model, [0.5, 0.3, -0.4], combination_type=kind, density=0.2)
    assert_as_good(ours, theirs, seen, 4, excess=0 if kind == "svd" else 2e-6)
    with pytest.raises(AssertionError):
        assert_as_good(ours, theirs, seen, 5, excess=2e-6)


@pytest.mark.parametrize("kind", TRUNCATED)
def test_clamped_results_are_peft_s(rng, kind):
    """The quantile depends on the signs of singular vectors: the same SVD has to be run."""
    model = several(RAGGED, LARGE, seed=seed_from(rng))
    theirs, ours, _ = both(model, [0.5, 0.3, 0.2], seed_from(rng), combination_type=kind,
                           density=0.5, svd_clamp=0.9, svd_full_matrices=False)  # fmt: skip
    assert_same_factors(theirs, ours)
    plain = copy.deepcopy(ours)
    add_weighted_adapter(plain, list("abc"), [0.5, 0.3, 0.2], "plain", "svd", compat="peft")
    for path, layer in lora_layers(ours).items():
        one = layer.get_delta_weight("merged")
        other = lora_layers(plain)[path].get_delta_weight("plain")
        assert not torch.allclose(one, other), "a clamp that does nothing proves nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["svd", "ties_svd", "dare_ties_svd"])
def test_other_precisions_round_as_peft_does(rng, kind, dtype):
    model = several(EQUAL, LARGE, dtype=dtype, seed=seed_from(rng))
    theirs, ours, seen = both(model, [0.5, 0.3, -0.2], 5, combination_type=kind, density=0.5)
    assert_as_good(ours, theirs, seen, 4)
    for layer, other in zip(
        lora_layers(ours).values(), lora_layers(theirs).values(), strict=True
    ):
        assert layer.get_delta_weight("merged").dtype == other.get_delta_weight("merged").dtype


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_half_precision_factor_types(rng, kind):
    model = several(EQUAL, ALL, dtype=torch.bfloat16, seed=seed_from(rng))
    theirs, ours, _ = both(model, [0.5, -0.3, 0.2], combination_type=kind)
    assert_same_factors(theirs, ours)


@pytest.mark.parametrize("kind", ["linear", "svd", "dare_ties_svd", "ties"])
def test_one_adapter_is_linear_whatever_was_asked(rng, kind):
    model = several({"a": EQUAL["b"]}, ALL, seed=seed_from(rng))
    theirs, ours, seen = both(model, [-0.7], combination_type=kind, density=0.5)
    assert not seen
    assert_same_factors(theirs, ours)


def test_pointwise_convolution_is_flattened_not_squeezed(rng):
    model = several({n: {**c, "r": 2} for n, c in EQUAL.items()}, ["conv1"], seed=seed_from(rng))
    theirs, ours, seen = both(model, [0.5, 0.3, 0.2], combination_type="svd")
    assert_as_good(ours, theirs, seen, 2)


def test_adapters_with_other_layers_are_skipped_there_as_in_peft(rng):
    apart = {"a": ["layers.0.q_proj", "conv3"], "b": ["layers.0.q_proj"], "c": ["layers.1.v_proj"]}
    configs = {n: {**c, "target_modules": apart[n]} for n, c in EQUAL.items()}
    for kind in ("cat", "svd", "linear", "dare_linear_svd"):
        model = several(configs, seed=seed_from(rng))
        theirs, ours, seen = both(model, [0.4, -0.3, 1.5], 1, combination_type=kind, density=0.5)
        if seen:
            assert_as_good(ours, theirs, seen, 4)
        else:
            assert_same_factors(theirs, ours)


def test_inherited_rslora_and_a_shorter_list_of_weights_are_peft_s(rng):
    """Both wrong, both PEFT's: the scale becomes sqrt(r), the last adapter is left out."""
    configs = {n: {**c, "use_rslora": True} for n, c in EQUAL.items()}
    model = several(configs, LARGE, seed=seed_from(rng))
    theirs, ours, seen = both(model, [0.4, -0.3], combination_type="svd")
    assert_as_good(ours, theirs, seen, 4)
    assert {layer.scaling["merged"] for layer in lora_layers(ours).values()} == {2.0}


def test_regular_expressions_are_joined(rng):
    configs = {n: {**c, "target_modules": f".*0.{n}_proj"} for n, c in
               (("q", EQUAL["a"]), ("v", EQUAL["b"]))}  # fmt: skip
    theirs, ours, _ = both(several(configs, seed=seed_from(rng)), [1.0, 2.0],
                           combination_type="cat")  # fmt: skip
    assert ours.peft_config["merged"].target_modules == "(.*0.q_proj)|(.*0.v_proj)"
    assert_same_factors(theirs, ours)


def test_a_name_that_is_taken_returns_silently(rng):
    model = several(EQUAL, LARGE, seed=seed_from(rng))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert add_weighted_adapter(model, ["a", "b"], [1, 1], "c", "nonsense", compat="peft") is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown adapter": ({}, {"adapters": ["a", "x"]}),
    "ranks differ": ({"b": {"r": 6}}, {"combination_type": "linear"}),
    "ranks differ in ties": ({"b": {"r": 6}}, {"combination_type": "dare_ties", "density": 0.5}),
    "unknown type": ({}, {"combination_type": "average"}),
    "kinds of targets": ({"b": {"target_modules": ".*v_proj"}}, {}),
    "negative density": ({}, {"combination_type": "ties", "density": -0.5}),
    "negative density, svd": ({}, {"combination_type": "dare_linear_svd", "density": -1}),
    "no density": ({}, {"combination_type": "magnitude_prune"}),
    "sign method": ({}, {"combination_type": "ties_svd", "density": 0.5,
                         "majority_sign_method": "loudest"}),
    "no adapters": ({}, {"adapters": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_peft_s_in_its_words(rng, case):
    changed, options = BAD[case]
    configs = {n: {**c, **changed.get(n, {})} for n, c in EQUAL.items()}
    model = several(configs, LARGE, seed=seed_from(rng))
    said = []
    for function in (
        copy.deepcopy(model).add_weighted_adapter,
        lambda **k: add_weighted_adapter(model, **k, compat="peft"),
    ):
        with pytest.raises(Exception) as caught:
            function(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "merged",
                        **options})  # fmt: skip
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
    assert "merged" not in model.peft_config


def test_density_of_one_warns_in_peft_s_words_and_keeps_all(rng):
    model = several(EQUAL, LARGE, seed=seed_from(rng))
    with pytest.warns(UserWarning, match=r"The density 1\.5 is greater than or equal to 1, no pru"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 0.5], "merged", "magnitude_prune_svd",
                             svd_rank=8, density=1.5, compat="peft")  # fmt: skip
    theirs, ours = deltas(model, "a"), deltas(model, "merged")
    for path, delta in deltas(model, "b").items():
        want = theirs[path] + 0.5 * delta
        if min(want.flatten(1).shape) <= 8:
            assert (ours[path] - want).norm() <= 40 * U32 * want.norm()


def test_what_peft_cannot_do_right_is_refused_or_padded(rng):
    """No density is 0/0; a suffix is no method; a layer may be smaller than the rank."""
    model = several(EQUAL, ALL, seed=seed_from(rng))
    with pytest.raises(ValueError, match="the merged factors are not finite"):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "m", "dare_ties", density=0.0,
                             compat="peft")  # fmt: skip
    for kind in ("linear_svd", "nonsense_svd", "cat_svd", "svd_svd"):
        with pytest.raises(ValueError, match=f"^Invalid combination_type: {kind}$"):
            add_weighted_adapter(model, ["a", "b"], [1, 1], "m", kind, compat="peft")
    with pytest.raises(ValueError, match="seed: is unknown to PEFT"):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "m", compat="peft", seed=1)
    assert "m" not in model.peft_config
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", svd_rank=9)
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "m", svd_rank=9, compat="peft")
    first, second, merged = (deltas(model, n) for n in ("a", "b", "m"))
    for path, delta in merged.items():
        want = first[path] + second[path]
        assert (delta - want).norm() <= 40 * U32 * want.norm(), path
