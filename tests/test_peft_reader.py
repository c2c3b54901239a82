"""Opening PEFT folders: the peft package as oracle, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from adapters import DEFAULT_MODULES, delta_of, make_adapter, make_zoo, read_factor

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import is_adapter, open_adapter, safetensors
from mergeprobe_fast.io.layout import ModuleNames
from mergeprobe_fast.io.peft_config import KNOWN_KEYS, find_patterns, read_config

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
oracle = pytest.importorskip("peft_models")

Q0 = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def lora(**arguments):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": oracle.ALL, **arguments})


RULES = {
    "plain": {},
    "alpha float": {"lora_alpha": 2.5},
    "alpha equals r": {"r": 4, "lora_alpha": 4},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"conv3": 6, "v_proj": 2, "embed": 3}},
    "alpha pattern": {"alpha_pattern": {"conv1": 11, "q_proj": 0.5, "embed": 3}},
    "both, different keys": {
        "rank_pattern": {"layers.1.q_proj": 6},
        "alpha_pattern": {"layers.1.v_proj": 3, "q_proj": 5},
    },
    "both with rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6, "conv1": 1},
        "alpha_pattern": {"conv1": 3, "embed": 5},
    },
    "first match wins": {
        "rank_pattern": {"layers.3.q_proj": 5, "q_proj": 2},
        "alpha_pattern": {"layers.3.q_proj": 3, "q_proj": 9},
    },
    "regular expressions": {
        "rank_pattern": {r"layers\.(1|2)\.q_proj": 5, r"^q_proj": 3, r".*\.1\d\..*": 2},
        "alpha_pattern": {r"layers\.\d+\.[qv]_proj": 1, "conv.": 2},
    },
    "name that is no match of itself": {"rank_pattern": {"odd[0]+x": 2}},
    "escaped name": {"alpha_pattern": {r"odd\[0\]\+x": 2}},
}


@pytest.mark.parametrize("rule", RULES)
def test_deltas_and_norms_are_those_of_peft(tmp_path, rule):
    model = oracle.trained(lora(**RULES[rule]))
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(model))
    scales = {n: layer.scaling["default"] for n, layer in oracle.lora_layers(model).items()}
    assert {name: ref.scale for name, ref in adapter.modules.items()} == scales


def test_overlapping_patterns_follow_the_file_as_peft_loads_it(tmp_path):
    model = oracle.trained(lora(alpha_pattern={"q_proj": 9, "layers.3.q_proj": 3}))
    model.save_pretrained(str(tmp_path))  # which sorts the keys: "layers..." comes first
    for order, alpha in ((["layers.3.q_proj", "q_proj"], 3), (["q_proj", "layers.3.q_proj"], 9)):
        edit(tmp_path, alpha_pattern={key: {"q_proj": 9}.get(key, 3) for key in order})
        adapter = open_adapter(tmp_path)
        assert adapter.modules["layers.3.q_proj"].scale == alpha / 4
        assert "several alpha_pattern keys match layers.3.q_proj" in adapter.notes[0]
        oracle.assert_same_deltas(adapter, oracle.peft_deltas(oracle.load(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_dtypes_are_read_exactly(tmp_path, dtype):
    model = oracle.trained(lora(use_rslora=True), dtype=getattr(torch, dtype))
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    expected = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {ref.a.dtype for ref in adapter.modules.values()} == {expected}
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(model))


@pytest.mark.parametrize("conv1d_only", [True, False])
def test_fan_in_fan_out(tmp_path, conv1d_only):
    targets = ["c_attn"] if conv1d_only else ["c_attn", "embed", "conv1"]
    config = lora(target_modules=targets, fan_in_fan_out=True)
    model = oracle.trained(config, conv1d=True)
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    assert adapter.modules["c_attn"].fan_in_fan_out
    assert {n for n, ref in adapter.modules.items() if ref.fan_in_fan_out} == {"c_attn"}
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(model))


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 8}
    size |= {"bos_token_id": 0, "eos_token_id": 0}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        rank_pattern={r"h\.1\.attn\.c_proj": 2},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21.2 against transformers 5.23
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    assert len(adapter.modules) == 6
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(model))


@pytest.mark.parametrize("wrong", ["scale", "rank rule", "transposed", "swapped"])
def test_the_comparison_can_fail(tmp_path, wrong):
    model = oracle.trained(lora(alpha_pattern={"layers.3.q_proj": 3}))
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    expected = oracle.peft_deltas(model)
    modules = dict(adapter.modules)
    one, other = modules["layers.3.q_proj"], modules["layers.4.q_proj"]
    if wrong == "scale":
        modules[one.name] = dataclasses.replace(one, scale=one.scale * (1 + 1e-12))
    elif wrong == "rank rule":
        modules[one.name] = dataclasses.replace(one, scale=3 / math.sqrt(4))
    elif wrong == "transposed":
        modules["embed"] = dataclasses.replace(modules["embed"], kind="linear")
    else:
        modules[one.name] = dataclasses.replace(other, name=one.name)
    with pytest.raises(AssertionError):
        oracle.assert_same_deltas(dataclasses.replace(adapter, modules=modules), expected)


def test_a_wrong_alpha_in_the_file_is_noticed(tmp_path):
    model = oracle.trained(lora(alpha_pattern={"layers.3.q_proj": 3}))
    model.save_pretrained(str(tmp_path))
    edit(tmp_path, alpha_pattern={"layers.3.q_proj": 4})
    with pytest.raises(AssertionError, match=r"layers\.3\.q_proj"):
        oracle.assert_same_deltas(open_adapter(tmp_path), oracle.peft_deltas(model))


def test_pattern_lookup_is_that_of_peft():
    from peft.utils.other import get_pattern_key

    names = ["lin", "a.lin", "alin", "layers.1.q", "layers.11.q", "x.layers.1.q", "odd[0]", "a-b"]
    patterns = [
        "lin",
        "^lin",
        "a.lin",
        "layers.1.q",
        r"layers\.1\.q",
        "odd[0]",
        "odd",
        ".*q",
        "a|b",
    ]
    patterns += ["(?:a.)?lin", "^layers", "q$", "[0-9]+.q", "a)|(lin"]
    table = ModuleNames(tuple(names), {name: i for i, name in enumerate(names)})
    for first in patterns:
        for second in patterns:
            rule = {first: 1, second: 2}
            expected = [rule.get(get_pattern_key(rule.keys(), name), 0) for name in names]
            found, _ = find_patterns(tuple(rule.items()), table, 0)
            assert found == expected, rule


def test_the_known_keys_are_those_of_peft():
    if peft.__version__ != "0.21.2":
        pytest.skip("the list is that of PEFT 0.21.2")
    assert KNOWN_KEYS == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_make_adapter_tells_the_truth(tmp_path):
    made = make_adapter(
        tmp_path,
        {**DEFAULT_MODULES, "embed": (5, 9, 4), "conv": (8, 12, 4)},
        ranks={Q0: 2},
        alphas={"embed": 3},
        rslora=True,
        dtype="BF16",
        dtypes={Q0: "F16"},
        embeddings=("embed",),
        convs={"conv": (3, 2, 2)},
    )
    adapter = open_adapter(tmp_path)
    assert set(adapter.modules) == set(made.modules)
    for name, truth in made.modules.items():
        ref = adapter.modules[name]
        np.testing.assert_array_equal(read_factor(ref.a), truth.a)
        np.testing.assert_array_equal(read_factor(ref.b), truth.b)
        np.testing.assert_array_equal(delta_of(ref), truth.delta)
        assert (ref.scale, ref.kind) == (truth.scale, truth.kind)
    assert adapter.modules["conv"].a.shape == (4, 3, 2, 2)


def test_the_adapter_ref(tmp_path):
    made = make_adapter(tmp_path / "mine", base_model="org/base", config={"task_type": "CAUSAL_LM"})
    adapter = open_adapter(str(tmp_path / "mine"))
    assert (adapter.name, adapter.format, adapter.base_model) == ("mine", "peft", "org/base")
    assert adapter.path == tmp_path / "mine"
    assert adapter.config == made.config
    assert adapter.notes == ()
    assert list(adapter.modules) == sorted(made.modules)
    assert adapter.parameters == sum(m.a.size + m.b.size for m in made.modules.values())
    assert adapter.nbytes == 4 * adapter.parameters
    assert open_adapter(tmp_path / "mine", name="other").name == "other"
    assert Q0 in adapter.modules and "absent" not in adapter.modules
    with pytest.raises(KeyError):
        adapter.modules["absent"]
    again = pickle.loads(pickle.dumps(adapter))
    assert dict(again.modules) == dict(adapter.modules) == adapter.modules


def test_the_base_model_may_be_undeclared(tmp_path):
    for number, config in enumerate(
        [{"base_model_name_or_path": value} for value in ("", ..., None)]
    ):
        make_adapter(tmp_path / str(number), config=config)
        assert open_adapter(tmp_path / str(number)).base_model is None


def test_the_same_recipe_shares_its_plan(tmp_path):
    zoo = make_zoo(tmp_path, 3)
    opened = [open_adapter(made.path) for made in zoo]
    assert len({id(adapter.modules._plan) for adapter in opened}) == 1
    for made, adapter in zip(zoo, opened, strict=True):
        np.testing.assert_array_equal(delta_of(adapter.modules[Q0]), made.modules[Q0].delta)


def test_links_and_relative_paths(tmp_path, monkeypatch):
    make_adapter(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_adapter(tmp_path / "link").name == "link"
    (tmp_path / "files").mkdir()
    for file in (tmp_path / "real").iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    assert len(open_adapter(tmp_path / "files").modules) == 4
    monkeypatch.chdir(tmp_path / "real")
    assert open_adapter(".").name == "real"


def test_is_adapter(tmp_path):
    make_adapter(tmp_path / "good")
    for name in ("adapter_config.json", WEIGHTS, "adapter_model.bin"):
        (tmp_path / name.replace(".", "_")).mkdir()
        (tmp_path / name.replace(".", "_") / name).write_bytes(b"")
        assert is_adapter(tmp_path / name.replace(".", "_"))
    assert is_adapter(tmp_path / "good")
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "good" / WEIGHTS)
    assert not is_adapter(tmp_path / "absent")
    shutil.copytree(tmp_path / "good", tmp_path / ".good.tmp-0123456789abcdef")
    assert not is_adapter(tmp_path / ".good.tmp-0123456789abcdef")


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


ONE = np.ones((2, 3), dtype=np.float32)
PRE = "base_model.model.m."

CONFIG_REFUSALS = {
    "other method": ({"peft_type": "LOHA"}, "peft_type: is 'LOHA', not 'LORA'"),
    "lower case": ({"peft_type": "lora"}, "peft_type: is 'lora'"),
    "no type": ({"peft_type": ...}, "peft_type: is missing"),
    "dora": ({"use_dora": True}, "use_dora: True: DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: True: a trained bias"),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save: .*full trained weights",
    ),
    "target_parameters": ({"target_parameters": ["w"]}, "target_parameters: .*bare parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices: .*token rows"),
    "tokens dict": ({"trainable_token_indices": {"e": [1]}}, "trainable_token_indices"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication: .*repeated layers"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: .*cannot be merged"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: .*block-diagonal"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config: .*Arrow"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config: .*KaSA"),
    "monteclora": ({"monteclora_config": {"n": 1}}, "monteclora_config: .*samples"),
    "qalora": ({"use_qalora": True}, "use_qalora: .*pools"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa': .*weight_conversion"),
    "pissa niter": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: 'pissa_niter_16'"),
    "olora": ({"init_lora_weights": "OLoRA"}, "relative to base weights that this"),
    "corda": ({"init_lora_weights": "corda"}, "relative to base weights that this"),
    "loftq": ({"init_lora_weights": "loftq"}, "relative to base weights that this"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "relative to base weights that this"),
    "new init": ({"init_lora_weights": "xyz"}, "init_lora_weights: 'xyz': unknown initialisation"),
    "odd init": ({"init_lora_weights": 3}, "init_lora_weights: 3: unknown initialisation"),
    "r zero": ({"r": 0}, "r: rank 0 is not a positive integer"),
    "r negative": ({"r": -4}, "r: rank -4 is not"),
    "r true": ({"r": True}, "r: rank True is not"),
    "r float": ({"r": 4.0}, "r: rank 4.0 is not"),
    "r text": ({"r": "4"}, "r: rank '4' is not"),
    "r null": ({"r": None}, "r: rank None is not"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha: alpha '8' is not a finite number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha: alpha True"),
    "alpha overflow": ({"lora_alpha": 10**380}, "lora_alpha: alpha 1000.* is not a finite number"),
    "alpha list": ({"alpha_pattern": {"q": [1]}}, r"alpha_pattern\['q'\]: alpha \[1\]"),
    "rank in pattern": ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: rank 0"),
    "pattern list": ({"rank_pattern": ["q"]}, r"rank_pattern: is \['q'\], not an object"),
    "bad regex": ({"rank_pattern": {"q(": 4}}, r"rank_pattern: 'q\(' is not a regular expression"),
    "bad repeat": ({"alpha_pattern": {"*q": 4}}, "alpha_pattern: .* is not a regular expression"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora: is 'yes', not true or false"),
    "fan text": ({"fan_in_fan_out": 1}, "fan_in_fan_out: is 1, not true or false"),
    "base number": ({"base_model_name_or_path": 3}, "base_model_name_or_path: is 3, not a string"),
    "r is not the tensors'": ({"r": 5}, "the config gives rank 5, the tensors have 4"),
    "pattern is not the tensors'": (
        {"rank_pattern": {"layers.0.self_attn.q_proj": 3}},
        f"{Q0}: the config gives rank 3, the tensors have 4",
    ),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_config_is_refused(tmp_path, case):
    config, reason = CONFIG_REFUSALS[case]
    make_adapter(tmp_path, config=config)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


OFF = {
    "use_dora": False,
    "use_bdlora": None,
    "modules_to_save": [],
    "target_parameters": None,
    "layer_replication": [],
    "rank_pattern": None,
    "alpha_pattern": None,
    "loftq_config": {},
    "init_lora_weights": None,
}


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_what_is_switched_off_and_harmless_inits_are_accepted(tmp_path, init):
    make_adapter(tmp_path, config={**OFF, "init_lora_weights": init})
    assert open_adapter(tmp_path).notes == ()


KEY_REFUSALS = {
    "dora": (f"{PRE}lora_magnitude_vector", "DoRA magnitude"),
    "lora_bias": (f"{PRE}lora_B.bias", "lora_bias"),
    "bias": (f"{PRE}bias", "trained bias"),
    "modules_to_save": (f"{PRE}weight", "full weight .modules_to_save or save_embedding_layers"),
    "modules_to_save old": (f"{PRE}modules_to_save.weight", "modules_to_save"),
    "embedding base": (f"{PRE}base_layer.weight", "full base weight"),
    "target parameter": (f"{PRE}base_layer.lora_A.weight", "nested LoRA"),
    "tokens": (f"{PRE}token_adapter.trainable_tokens_delta", "token rows"),
    "loha": (f"{PRE}hada_w1_a", "LoHa"),
    "lokr": (f"{PRE}lokr_w1", "LoKr"),
    "tucker": (f"{PRE}lora_mid.weight", "Tucker"),
    "kasa": (f"{PRE}lora_diag", "KaSA"),
    "adalora": (f"{PRE}lora_E", "AdaLoRA"),
    "kohya": ("lora_unet_m.lora_down.weight", "kohya"),
    "kohya alpha": ("lora_unet_m.alpha", "kohya"),
    "other adapter name": (f"{PRE}lora_A.french.weight", "adapter name 'french' inside the key"),
    "no prefix": ("m.lora_A.weight", "unknown LoRA key"),
    "half prefix": ("base_model.m.lora_A.weight", "unknown LoRA key"),
    "no module": ("base_model.model.lora_A.weight", "unknown LoRA key"),
    "unknown": ("something.else", "does not start with 'base_model.model.'"),
    "unknown inside": (f"{PRE}gate", "unknown key"),
    "half a pair": (f"{PRE}lora_A.weight", "half a pair: the module has no lora_B"),
    "other half": (f"{PRE}lora_B.weight", "half a pair: the module has no lora_A"),
    "half an embedding": (f"{PRE}lora_embedding_A", "the module has no lora_embedding_B"),
    "both kinds": (f"base_model.model.{Q0}.lora_embedding_A", "linear and embedding"),
    "twice": (f"base_model.model.{Q0}.lora_A.default.weight", "second tensor for the same factor"),
}


@pytest.mark.parametrize("case", KEY_REFUSALS)
def test_key_is_refused(tmp_path, case):
    key, reason = KEY_REFUSALS[case]
    make_adapter(tmp_path, extra={key: ONE})
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(tmp_path)
    assert caught.value.path == str(tmp_path / WEIGHTS)
    if case not in ("both kinds", "twice"):
        assert caught.value.key == key


def pair(a, b, dtype="f4"):
    return {
        f"{PRE}lora_A.weight": np.zeros(a, dtype=dtype),
        f"{PRE}lora_B.weight": np.zeros(b, dtype=dtype),
    }


PAIR_REFUSALS = {
    "conv1d": (pair((4, 3, 5), (8, 4, 1)), "Conv1d is not supported"),
    "conv3d": (pair((4, 3, 5, 5, 5), (8, 4, 1, 1, 1)), "Conv3d is not supported"),
    "conv B kernel": (pair((4, 3, 1, 1), (8, 4, 3, 3)), r"must be \(out, rank, 1, 1\)"),
    "grouped conv": (pair((4, 3, 3, 3), (8, 2, 1, 1)), "ranks .* differ.*grouped"),
    "ranks differ": (pair((4, 3), (8, 5)), "ranks of A and B differ"),
    "mixed dims": (pair((4, 3, 1, 1), (8, 4)), "shapes fit no"),
    "vector": (pair((4,), (8,)), "shapes fit no"),
    "rank zero": (pair((0, 3), (8, 0)), "rank 0 or no weights"),
    "not gathered": (pair((0,), (0,)), "without gathering"),
    "float64": (pair((4, 3), (8, 4), "f8"), "dtype F64: factors must be F32, BF16 or F16"),
    "int8": (pair((4, 3), (8, 4), "i1"), "dtype I8: factors must be"),
    "fp8": (
        {f"{PRE}lora_{x}.weight": ("F8_E4M3", (4, 4), bytes(16)) for x in "AB"},
        "dtype F8_E4M3: factors must be",
    ),
}


@pytest.mark.parametrize("case", PAIR_REFUSALS)
def test_pair_is_refused(tmp_path, case):
    extra, reason = PAIR_REFUSALS[case]
    make_adapter(tmp_path, extra=extra)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(tmp_path)
    assert caught.value.key.startswith(PRE)


def test_an_embedding_must_be_two_dimensional(tmp_path):
    extra = {f"{PRE}lora_embedding_{x}": np.zeros((2, 2, 1, 1), "f4") for x in "AB"}
    make_adapter(tmp_path, extra=extra)
    with pytest.raises(InputError, match="shapes fit no"):
        open_adapter(tmp_path)


def test_several_problems_are_counted(tmp_path):
    make_adapter(tmp_path, config={"use_dora": True}, extra={f"{PRE}bias": ONE, "x": ONE})
    with pytest.raises(InputError, match=r"DoRA.*\(1 of 3 problems; 'mergeprobe-fast check'"):
        open_adapter(tmp_path)


def test_the_adapter_name_default_in_keys_is_what_peft_accepts(tmp_path):
    model = oracle.trained(lora())
    model.save_pretrained(str(tmp_path))
    header = safetensors.read_header(tmp_path / WEIGHTS)
    raw = (tmp_path / WEIGHTS).read_bytes()
    tensors = {}
    for key, ref in header.tensors.items():
        renamed = key.replace(".weight", ".default.weight")
        renamed = renamed if renamed != key else f"{key}.default"
        tensors[renamed] = (ref.dtype, ref.shape, raw[ref.offset : ref.offset + ref.nbytes])
    safetensors.write(tmp_path / WEIGHTS, tensors, {"format": "pt"})
    adapter = open_adapter(tmp_path)
    assert "adapter name 'default'" in adapter.notes[0]
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(oracle.load(tmp_path)))


FILES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickle only": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin: is a pickle.*convert to safetensors",
    ),
    "config not json": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json: the file is not valid JSON",
    ),
    "config list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "config empty": (lambda f: (f / "adapter_config.json").write_text(""), "not valid JSON"),
    "config latin-1": (
        lambda f: (f / "adapter_config.json").write_bytes(b'{"\xe9": 1}'),
        "is not UTF-8",
    ),
    "config NaN": (
        lambda f: (f / "adapter_config.json").write_text('{"lora_alpha": NaN}'),
        "NaN is not JSON",
    ),
    "config deep": (
        lambda f: (f / "adapter_config.json").write_text("[" * 100_000),
        "nested too deeply|not valid JSON",
    ),
    "config duplicate": (
        lambda f: (f / "adapter_config.json").write_text('{"r": 4, "r": 8}'),
        "r: key appears twice",
    ),
    "config is a folder": (
        lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").mkdir()),
        "adapter_config.json: is not a regular file",
    ),
    "weights truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
        f"{WEIGHTS}: is truncated",
    ),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: is no safetensors"),
    "no tensors": (
        lambda f: safetensors.write(f / WEIGHTS, {}),
        f"{WEIGHTS}: holds no LoRA factors",
    ),
    "shard without index": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model-00001-of-00002.safetensors"),
        "has weight shards but no adapter_model.safetensors.index.json",
    ),
    "other file name": (lambda f: (f / WEIGHTS).rename(f / "lora.safetensors"), "has no adapter_m"),
    "weights and index": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"),
        "has both adapter_model.safetensors and",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_refused(tmp_path, case):
    damage, reason = FILES[case]
    make_adapter(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "absent": "No such file",
        "file": "is a file; a PEFT adapter is a folder",
        "model.pt": "pickle",
        "empty": "is an empty folder",
        "nul\0": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=reason):
            open_adapter(tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_refused(tmp_path):
    make_adapter(tmp_path / "a")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            open_adapter(tmp_path / "a")
    finally:
        (tmp_path / "a").chmod(0o755)


def shard(folder, count=2):
    """Split a written adapter into shards with an index; returns the index's path and content."""
    raw = (folder / WEIGHTS).read_bytes()
    header = safetensors.read_header(folder / WEIGHTS)
    parts = [{} for _ in range(count)]
    weight_map = {}
    for number, (key, ref) in enumerate(header.tensors.items()):
        part = number % count  # A and B of a module fall apart
        data = raw[ref.offset : ref.offset + ref.nbytes]
        parts[part][key] = (ref.dtype, ref.shape, data)
        weight_map[key] = f"adapter_model-{part + 1:05d}-of-{count:05d}.safetensors"
    for part, tensors in enumerate(parts):
        safetensors.write(
            folder / f"adapter_model-{part + 1:05d}-of-{count:05d}.safetensors", tensors
        )
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder / f"{WEIGHTS}.index.json", index


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_are_read_as_one(tmp_path, count):
    made = make_adapter(tmp_path)
    shard(tmp_path, count)
    adapter = open_adapter(tmp_path)
    for name, truth in made.modules.items():
        np.testing.assert_array_equal(delta_of(adapter.modules[name]), truth.delta)


def test_bad_indexes_are_refused(tmp_path):
    make_adapter(tmp_path)
    path, index = shard(tmp_path)
    first, second = list(index["weight_map"])[:2]
    one, two = index["weight_map"][first], index["weight_map"][second]

    def refused(weight_map, reason):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=reason):
            open_adapter(tmp_path)

    refused({**index["weight_map"], first: two}, "the index says otherwise")
    refused(
        {k: v for k, v in index["weight_map"].items() if k != first}, "the index says otherwise"
    )
    refused({**index["weight_map"], "absent": one}, f"absent: is not in {one}")
    refused({**index["weight_map"], first: "../../secret"}, "which is not a name like")
    refused({**index["weight_map"], first: 3}, "which is not a name like")
    refused({k: v for k, v in index["weight_map"].items() if v == one}, "does not name")
    refused({}, "weight_map: is not an object")
    refused([], "weight_map: is not an object")
    path.write_text(json.dumps(index))
    (tmp_path / two).unlink()
    with pytest.raises(InputError, match=f"{two}: cannot be read: No such file"):
        open_adapter(tmp_path)


NOTES = {
    "unknown keys": ({"shiny": 1, "new": None}, "not interpreted: new, shiny"),
    "bias without tensors": ({"bias": "all"}, "bias is 'all'"),
    "velora": ({"velora_config": {"scale": 1.0}}, "VeLoRA"),
    "megatron": ({"megatron_config": {"tp": 2}}, "Megatron"),
    "alpha missing": ({"lora_alpha": ...}, "lora_alpha is not in the config: PEFT's default 8"),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes(tmp_path, case):
    config, note = NOTES[case]
    make_adapter(tmp_path, config=config)
    adapter = open_adapter(tmp_path)
    assert len(adapter.notes) == 1 and note in adapter.notes[0]
    for key, value in config.items():
        assert value is ... or adapter.config[key] == value  # kept


def test_defaults_of_missing_rules_are_those_of_peft(tmp_path):
    make_adapter(tmp_path, rank=8, config={"r": ..., "lora_alpha": ...})
    adapter = open_adapter(tmp_path)
    default = peft.LoraConfig()
    assert {ref.scale for ref in adapter.modules.values()} == {default.lora_alpha / default.r}


def test_a_pickle_beside_the_weights_is_noted(tmp_path):
    make_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "is not read" in open_adapter(tmp_path).notes[0]


def test_a_velora_projection_is_ignored(tmp_path):
    make_adapter(tmp_path, extra={f"base_model.model.{Q0}.lora_velora_embed": ONE})
    assert len(open_adapter(tmp_path).modules) == 4


def test_reading_a_config_never_raises():
    for value in (None, 0, -1, True, 1.5, "x", [], {}, [1], {"a": 1}, "\n" * 5, 10**390):
        for key in KNOWN_KEYS:
            for refused in read_config({"peft_type": "LORA", key: value}).refused:
                assert "\n" not in "".join(refused)


def test_importing_io_is_light():
    code = (
        "import sys, mergeprobe_fast.io\n"
        "heavy = {'torch', 'peft', 'pandas', 'transformers', 'safetensors', 'ctypes.util'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", "(.*a){20}", ".*.*.*.*.*x", "(?:x*)*"])
def test_a_pattern_that_could_hang_is_refused(tmp_path, pattern):
    make_adapter(tmp_path / "a", modules={"layers.0.proj": (4, 3, 2)})
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = {pattern: 2}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="could take for ever"):
        open_adapter(tmp_path / "a")
