"""What we write loads in PEFT without a warning and is the delta that was meant."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from adapters import delta_of, make_adapter

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import (
    AtomicFolder,
    WrittenModule,
    bf16_to_f32,
    check,
    open_adapter,
    read_header,
    write_adapter,
)

EPS = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}  # relative rounding, to nearest


def module(name="m", rank=3, d_in=10, d_out=12, kind="linear", seed=0, **more):
    generator = np.random.default_rng([seed, *name.encode()])
    a = generator.standard_normal((rank, d_in))
    return WrittenModule(name, kind, a, generator.standard_normal((d_out, rank)), **more)


def every_kind(conv1d=False, rank=lambda name: 3):
    """Modules that fit ``peft_models.Mixed``."""
    made = []
    for block in range(12):
        for name, d_out in (("q_proj", 12), ("v_proj", 6)):
            path = f"layers.{block}.{name}"
            made.append(module(path, rank(path), 10, d_out))
    made.append(module("embed", rank("embed"), 9, 5, "embedding"))
    made.append(module("conv1", rank("conv1"), 3, 8, "conv2d", conv_shape=(3, 1, 1)))
    made.append(module("conv3", rank("conv3"), 18, 7, "conv2d", conv_shape=(3, 3, 2)))
    made.append(module("odd[0]+x", rank("odd[0]+x"), 4, 5))
    made.append(module("q_proj", rank("q_proj"), 3, 2))
    if conv1d:
        made.append(module("c_attn", rank("c_attn"), 6, 9, fan_in_fan_out=True))
    return made


def mixed_rank(name):
    """Layers 1 and 11, and a name that is the end of others, must not be mistaken."""
    return {"layers.1.q_proj": 5, "layers.11.q_proj": 2, "q_proj": 1, "odd[0]+x": 2}.get(name, 3)


@pytest.fixture
def oracle():
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    import peft_models

    return peft_models


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("rank", [lambda name: 3, mixed_rank], ids=["uniform", "mixed ranks"])
def test_peft_loads_it_without_warning_and_agrees(tmp_path, oracle, dtype, rank):
    modules = every_kind(rank=rank)
    write_adapter(tmp_path, base_model="org/base", modules=modules, dtype=dtype)
    model = oracle.load(tmp_path)
    adapter = open_adapter(tmp_path)
    layers = oracle.lora_layers(model)
    assert set(layers) == {m.name for m in modules}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        m.name: rank(m.name) for m in modules
    }
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(model))


@pytest.mark.parametrize("dtype", EPS)
def test_the_delta_is_what_was_meant(tmp_path, dtype):
    modules = every_kind()
    write_adapter(tmp_path, base_model=None, modules=modules, dtype=dtype)
    adapter = open_adapter(tmp_path)
    for meant in modules:
        delta, size = meant.b @ meant.a, np.abs(meant.b) @ np.abs(meant.a)
        # Each factor is off by EPS relative (float64 to BF16 rounds twice, by 2**-24 more).
        bound = 2.001 * (EPS[dtype] + 2.0**-24) * (1 + EPS[dtype]) * size
        written = delta_of(adapter.modules[meant.name])
        assert (np.abs(written - delta) <= bound).all(), meant.name
        if dtype != "F32":
            assert (written != delta).any()


def test_fan_in_fan_out_is_kept(tmp_path, oracle):
    modules = [m for m in every_kind(conv1d=True) if m.name in ("c_attn", "embed", "conv3")]
    write_adapter(tmp_path, base_model=None, modules=modules)
    adapter = open_adapter(tmp_path)
    assert {n for n, ref in adapter.modules.items() if ref.fan_in_fan_out} == {"c_attn"}
    oracle.assert_same_deltas(adapter, oracle.peft_deltas(oracle.load(tmp_path, conv1d=True)))


def test_a_path_that_ends_others_adds_only_zero_elsewhere(tmp_path, oracle):
    write_adapter(tmp_path, base_model=None, modules=[module("q_proj", 3, 3, 2)])
    with pytest.raises(UserWarning, match="missing adapter keys"):
        oracle.load(tmp_path)
    deltas = oracle.peft_deltas(oracle.load(tmp_path, strict=False))
    assert len(deltas) == 13
    assert {name for name, delta in deltas.items() if delta.any()} == {"q_proj"}


def test_saving_again_with_peft_changes_nothing(tmp_path, oracle):
    write_adapter(tmp_path / "ours", base_model=None, modules=every_kind(rank=mixed_rank))
    oracle.load(tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = open_adapter(tmp_path / "ours"), open_adapter(tmp_path / "theirs")
    assert theirs.notes == ()
    for name, ref in ours.modules.items():
        np.testing.assert_array_equal(delta_of(theirs.modules[name]), delta_of(ref))


def test_the_scale_goes_into_b(tmp_path):
    made = [module("m", scale=0.375), module("n", scale=-2.0), module("o", scale=0.0)]
    written = write_adapter(tmp_path, base_model=None, modules=made)
    adapter = open_adapter(tmp_path)
    for given in made:
        assert adapter.modules[given.name].scale == 1.0
        expected = (given.b * given.scale).astype(np.float32)
        np.testing.assert_array_equal(written[given.name].b, expected)
        np.testing.assert_array_equal(written[given.name].a, given.a.astype(np.float32))


@pytest.mark.parametrize("dtype", EPS)
def test_what_is_returned_is_what_lies_in_the_file(tmp_path, dtype):
    made = [module("m"), module("c", 2, 12, 5, "conv2d", conv_shape=(3, 2, 2))]
    written = write_adapter(tmp_path, base_model=None, modules=made, dtype=dtype)
    adapter = open_adapter(tmp_path)
    for given in made:
        rounded = written[given.name]
        assert rounded.a.dtype == rounded.b.dtype == np.float32
        exact = rounded.b.astype(np.float64) @ rounded.a.astype(np.float64)
        np.testing.assert_array_equal(delta_of(adapter.modules[given.name]), exact)


def test_bf16_is_rounded_to_nearest_even(tmp_path):
    tie_down, tie_up, above = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20
    a = np.array([[tie_down, tie_up, above, -tie_up]])
    given = WrittenModule("m", "linear", a, np.ones((1, 1)))
    written = write_adapter(tmp_path, base_model=None, modules=[given], dtype="BF16")["m"]
    expected = [1.0, 1 + 2.0**-6, 1 + 2.0**-7, -(1 + 2.0**-6)]
    assert written.a.tolist() == [expected]
    np.testing.assert_array_equal(bf16_to_f32(written.raw_a), [expected])


def test_the_config_for_uniform_ranks_has_no_patterns(tmp_path):
    write_adapter(
        tmp_path,
        base_model="org/base",
        modules=[module("b.q"), module("a.q")],
        task_type="CAUSAL_LM",
        revision="main",
        notes=["merged by a test"],
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["a.q", "b.q"],
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "bias": "none",
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "revision": "main",
    }
    assert {key: config[key] for key in expected} == expected
    assert "peft_version" not in config
    notes = json.loads((tmp_path / "mergeprobe_notes.json").read_text())
    assert notes == {"notes": ["merged by a test"]}
    assert read_header(tmp_path / "adapter_model.safetensors").metadata == {"format": "pt"}
    assert check(tmp_path).ok


def test_r_is_the_largest_rank_for_servers_that_read_no_patterns(tmp_path):
    made = [module("a", 2), module("b", 2), module("c", 7)]
    write_adapter(tmp_path, base_model=None, modules=made)
    adapter = open_adapter(tmp_path)
    assert adapter.config["r"] == adapter.config["lora_alpha"] == 7
    assert adapter.config["rank_pattern"] == adapter.config["alpha_pattern"] == {"^a": 2, "^b": 2}


def test_patterns_match_one_module_only(tmp_path):
    names = ["layers.1.q", "layers.11.q", "x.layers.1.q", "layersX1Xq", "q", "a+b", "aab", "q[1]"]
    made = [module(name, rank=position + 1) for position, name in enumerate(names)]
    write_adapter(tmp_path, base_model=None, modules=made)
    adapter = open_adapter(tmp_path)  # would refuse a rank that does not match
    assert {name: ref.rank for name, ref in adapter.modules.items()} == {
        name: position + 1 for position, name in enumerate(names)
    }
    assert {ref.scale for ref in adapter.modules.values()} == {1.0}
    assert adapter.notes == ()


def test_the_same_modules_in_any_order_give_the_same_bytes(tmp_path):
    made = every_kind(rank=mixed_rank)
    for folder, modules in (("one", made), ("two", made[::-1])):
        write_adapter(tmp_path / folder, base_model="b", modules=iter(modules), dtype="BF16")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def with_value(value, where="a"):
    given = module("layers.0.q")
    array = given.a if where == "a" else given.b
    array[0, 1] = value
    return given


REFUSED = {
    "nan": (with_value(math.nan), "F32", "layers.0.q: A has NaN or Inf"),
    "inf": (with_value(math.inf, "b"), "F32", "layers.0.q: B has NaN or Inf"),
    "f16 overflow": (with_value(65520.0), "F16", "layers.0.q: A overflows F16"),
    "bf16 overflow": (with_value(3.4e38), "BF16", "layers.0.q: A overflows BF16"),
    "f32 overflow": (with_value(1e39, "b"), "F32", "layers.0.q: B overflows F32"),
    "scale overflow": (module("m", scale=1e39), "F32", "m: B overflows F32"),
    "scale nan": (module("m", scale=math.nan), "F32", "m: B has NaN or Inf"),
    "ranks": (WrittenModule("m", "linear", np.ones((2, 3)), np.ones((4, 3))), "F32", "m: A .2, 3."),
    "dims": (WrittenModule("m", "linear", np.ones(3), np.ones((4, 3))), "F32", "m: A"),
    "rank 0": (WrittenModule("m", "linear", np.ones((0, 3)), np.ones((4, 0))), "F32", "m: A"),
    "integers": (
        WrittenModule("m", "linear", np.ones((2, 3), int), np.ones((4, 2))),
        "F32",
        "m: factors are int64",
    ),
    "no conv shape": (module("m", kind="conv2d"), "F32", "m: conv_shape None"),
    "conv shape of a linear": (module("m", conv_shape=(10, 1, 1)), "F32", "m: conv_shape"),
    "wrong conv shape": (module("m", kind="conv2d", conv_shape=(3, 3, 1)), "F32", "give d_in 10"),
    "no name": (module(""), "F32", "is not a module path"),
    "dot": (module("a."), "F32", "is not a module path"),
    "dtype": (module("m"), "F64", "dtype 'F64' is none of F32, BF16, F16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(tmp_path, case):
    given, dtype, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        write_adapter(tmp_path / "out", base_model=None, modules=[given], dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_the_largest_finite_values_are_written(tmp_path):
    for dtype, value in (("F16", 65504.0), ("BF16", 3.3895313892515355e38)):
        write_adapter(tmp_path / dtype, base_model=None, modules=[with_value(value)], dtype=dtype)


def test_no_modules_twice_a_module_and_an_existing_adapter_are_refused(tmp_path):
    with pytest.raises(InputError, match="no modules"):
        write_adapter(tmp_path / "out", base_model=None, modules=[])
    with pytest.raises(InputError, match="m: module given twice"):
        write_adapter(tmp_path / "out", base_model=None, modules=[module(), module()])
    assert not (tmp_path / "out").exists()
    make_adapter(tmp_path / "there")
    with pytest.raises(InputError, match="already holds an adapter"):
        write_adapter(tmp_path / "there", base_model=None, modules=[module()])


def test_writing_inside_an_atomic_folder(tmp_path):
    with AtomicFolder(tmp_path / "out") as folder:
        write_adapter(folder, base_model=None, modules=[module()])
        assert not (tmp_path / "out").exists()
    assert len(open_adapter(tmp_path / "out").modules) == 1
    with pytest.raises(InputError, match="overflows"):
        with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
            write_adapter(folder, base_model=None, modules=[module("n", scale=1e39)])
    assert list(open_adapter(tmp_path / "out").modules) == ["m"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
