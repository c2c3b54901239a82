"""What opening a PEFT folder refuses, each with one line that names file, key and reason."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from adapters import make_adapter

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import open_adapter, safetensors

Q0 = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


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


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", "(.*a){20}", ".*.*.*.*.*x", "(?:x*)*"])
def test_a_pattern_that_could_hang_is_refused(tmp_path, pattern):
    make_adapter(tmp_path / "a", modules={"layers.0.proj": (4, 3, 2)})
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = {pattern: 2}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="could take for ever"):
        open_adapter(tmp_path / "a")
