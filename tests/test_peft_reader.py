"""Opening PEFT folders: the peft package as oracle."""

from __future__ import annotations

import dataclasses
import json
import math
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


def test_a_velora_projection_is_ignored(tmp_path):
    projection = np.ones((2, 3), np.float32)
    make_adapter(tmp_path, extra={f"base_model.model.{Q0}.lora_velora_embed": projection})
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
