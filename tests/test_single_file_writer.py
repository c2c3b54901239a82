"""What is written is what was meant, in the bytes that kohya's and diffusers' tools expect."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from adapters import delta_of, make_adapter, read_factor
from single_files import (
    COMFYUI,
    CONVS,
    DIFFUSERS,
    KOHYA,
    SDXL,
    TRANSFORMER,
    adapter_metadata,
    make_file,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import (
    WrittenModule,
    check,
    open_adapter,
    read_header,
    write_diffusers,
    write_kohya,
    write_like,
)
from mergeprobe_fast.io.dtypes import from_float, to_f32

EPS = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}  # relative rounding, to nearest
OLD = {"unet": "lora.down", "text_encoder": "lora_linear_layer", "text_encoder_2": "lora.down"}
MIXED = {name: 1 + i for i, name in enumerate([*KOHYA, *SDXL, *DIFFUSERS, *TRANSFORMER, *COMFYUI])}


def meant(modules, rng, *, dtype="F32", rank=lambda name: 3, scale=1.0):
    """Modules of values that ``dtype`` holds exactly."""
    made = []
    for name, (d_out, d_in, _) in modules.items():
        r, conv = rank(name), CONVS.get(name)
        a, b = rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r))
        a, b = (to_f32(from_float(f, dtype), dtype) for f in (a, b))
        made.append(WrittenModule(name, "conv2d" if conv else "linear", a, b, scale, conv))
    return made


def write(format, path, modules, **more):
    return (write_kohya if format == "kohya" else write_diffusers)(path, modules, **more)


FORMS = {
    "kohya": ("kohya", KOHYA, {}),
    "sdxl": ("kohya", SDXL, {}),
    "diffusers": ("diffusers", DIFFUSERS, {}),
    "with alpha": ("diffusers", COMFYUI, {"alpha": "tensors"}),
    "with metadata": ("diffusers", DIFFUSERS, {"alpha": "metadata"}),
    "comfyui metadata": ("diffusers", COMFYUI, {"alpha": "metadata"}),
    "lora_down": ("diffusers", COMFYUI, {"styles": {"diffusion_model": "lora_down"}}),
    "old": ("diffusers", DIFFUSERS, {"styles": OLD}),
    "bare": ("diffusers", {"a.q": (4, 5, 2), "b": (3, 6, 2)}, {"prefix": "base_model.model."}),
    "plain metadata": ("diffusers", {"a.q": (4, 5, 2), "b": (3, 6, 2)}, {"alpha": "metadata"}),
}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("ranks", ["uniform", "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_reading_gives_back_what_was_written(tmp_path, rng, form, ranks, dtype):
    format, modules, more = FORMS[form]
    rank = (lambda name: MIXED.get(name, len(name))) if ranks == "mixed" else lambda name: 3
    given = meant(modules, rng, dtype=dtype, rank=rank)
    path = tmp_path / "out.safetensors"
    written = write(format, path, given, dtype=dtype, **more)
    adapter = open_adapter(path)
    assert adapter.format == format and check(path).ok
    assert set(adapter.modules) == set(written) == set(modules)
    for module in given:
        ref = adapter.modules[module.name]
        assert (ref.scale, ref.rank, ref.kind) == (1.0, rank(module.name), module.kind)
        assert ref.a.shape[1:] == (module.conv_shape or (module.a.shape[1],))
        assert ref.a.dtype == ref.b.dtype == dtype
        np.testing.assert_array_equal(read_factor(ref.a), module.a)
        np.testing.assert_array_equal(read_factor(ref.b), module.b)
        np.testing.assert_array_equal(written[module.name].b, module.b)
    again = tmp_path / "again.safetensors"
    write(format, again, iter(given[::-1]), dtype=dtype, **more)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("form", ["kohya", "diffusers", "with metadata"])
def test_the_scale_goes_into_up_and_the_rounding_is_bounded(tmp_path, rng, form, dtype):
    format, modules, more = FORMS[form]
    given = meant(modules, rng, scale=-0.3)
    write(format, tmp_path / "a.safetensors", given, dtype=dtype, **more)
    adapter = open_adapter(tmp_path / "a.safetensors")
    for module in given:
        a, b = module.a.astype(np.float64), -0.3 * module.b.astype(np.float64)
        # each factor is off by EPS relative (float64 to BF16 rounds twice, by 2**-24 more)
        bound = 2.001 * (EPS[dtype] + 2.0**-24) * (1 + EPS[dtype]) * (np.abs(b) @ np.abs(a))
        error = np.abs(delta_of(adapter.modules[module.name]) - b @ a)
        assert (error <= bound).all() and error.any()
        assert (np.abs(delta_of(adapter.modules[module.name]) - module.b @ a) > bound).any()


def test_kohyas_own_reading_of_the_tensors_gives_the_weight(tmp_path, rng):
    """sd-scripts' svd_merge: weight += up @ down * alpha / dim, conv by composing the kernels."""
    given = meant(KOHYA, rng, rank=MIXED.get)
    path = tmp_path / "a.safetensors"
    write_kohya(path, given)
    tensors = safetensors.numpy.load_file(path)
    assert len(tensors) == 3 * len(given)
    for module in given:
        down = tensors[f"{module.name}.lora_down.weight"].astype(np.float64)
        up = tensors[f"{module.name}.lora_up.weight"].astype(np.float64)
        alpha = tensors[f"{module.name}.alpha"]
        assert alpha.shape == () and alpha.dtype == np.float32
        if module.conv_shape:
            assert down.shape[1:] == module.conv_shape and up.shape[2:] == (1, 1)
            weight = np.einsum("orxy,rikl->oikl", up, down)
        else:
            weight = up @ down
        weight = (weight * alpha / down.shape[0]).reshape(len(up), -1)
        exact = module.b.astype(np.float64) @ module.a
        np.testing.assert_allclose(weight, exact, rtol=0, atol=1e-14 * np.abs(exact).max() * 9)


def test_alpha_stays_exact_where_bfloat16_would_not_hold_the_rank(tmp_path, rng):
    given = meant({"lora_unet_x": (3, 4, 1)}, rng, rank=lambda name: 257)
    write_kohya(tmp_path / "a.safetensors", given, dtype="BF16")
    assert open_adapter(tmp_path / "a.safetensors").modules["lora_unet_x"].scale == 1.0


def test_kohyas_metadata_says_what_the_file_holds(tmp_path, rng):
    path = tmp_path / "a.safetensors"
    write_kohya(path, meant(KOHYA, rng), metadata={"ss_base_model_version": "sd_v1", "mine": "1"})
    texts = read_header(path).metadata
    tensors = safetensors.numpy.load_file(path)
    theirs = safetensors.numpy.save(tensors, {"anything": "else"})
    data = theirs[8 + int.from_bytes(theirs[:8], "little") :]
    assert texts == {
        "ss_network_dim": "3", "ss_network_alpha": "3.0", "ss_network_module": "networks.lora",
        "ss_base_model_version": "sd_v1", "mine": "1",
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    write_kohya(path, meant(KOHYA, rng, rank=MIXED.get), overwrite=True)
    texts = read_header(path).metadata
    assert texts["ss_network_dim"] == texts["ss_network_alpha"] == "Dynamic"


def test_mixed_ranks_without_alpha_get_metadata(tmp_path, rng):
    """diffusers before PR 14409 would scale them by one alpha."""
    for name, modules in (("uniform", DIFFUSERS), ("mixed", DIFFUSERS), ("comfyui", COMFYUI)):
        rank = (lambda name: 3) if name == "uniform" else MIXED.get
        write_diffusers(tmp_path / f"{name}.safetensors", meant(modules, rng, rank=rank))
    said = {p.stem: "lora_adapter_metadata" in read_header(p).metadata for p in tmp_path.iterdir()}
    assert said == {"uniform": False, "mixed": True, "comfyui": False}


def test_peft_loads_a_component_with_its_metadata_as_diffusers_has_it_do(tmp_path, rng):
    """LoraConfig(**metadata), inject, load the state dict: the deltas are those that were meant."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from peft_models import lora_layers

    modules = {"transformer.blocks.1.to_q": (12, 10, 1), "transformer.blocks.11.to_q": (12, 10, 1),
               "transformer.to_q": (5, 6, 1)}  # fmt: skip
    ranks = dict(zip(modules, (2, 5, 3), strict=True))
    given = meant(modules, rng, rank=ranks.get)
    write_diffusers(tmp_path / "a.safetensors", given, base_model="org/x", alpha="metadata")
    texts = json.loads(read_header(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    base = torch.nn.Module()
    base.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(12))
    for i in (1, 11):
        base.blocks[i].to_q = torch.nn.Linear(10, 12, bias=False)
    base.to_q = torch.nn.Linear(6, 5, bias=False)
    config = peft.LoraConfig(**{key.removeprefix("transformer."): v for key, v in texts.items()})
    assert config.base_model_name_or_path == "org/x"
    peft.inject_adapter_in_model(config, base, adapter_name="default")
    state = {
        key.removeprefix("transformer."): torch.from_numpy(value)
        for key, value in safetensors.numpy.load_file(tmp_path / "a.safetensors").items()
    }
    loaded = peft.set_peft_model_state_dict(base, state, adapter_name="default")
    assert not loaded.unexpected_keys
    layers = lora_layers(base.double())
    for module in given:
        layer = layers[module.name.removeprefix("transformer.")]
        assert layer.scaling["default"] == 1.0
        exact = module.b.astype(np.float64) @ module.a
        theirs = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(theirs, exact, rtol=0, atol=1e-14 * np.abs(exact).max())


TEXTS = {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "one", "ss_output_name": "style"}
LIKE = {
    "kohya": (KOHYA, {"metadata": TEXTS}, {"metadata": TEXTS | {"ss_sd_model_name": "two"}}),
    "alphas": (COMFYUI, {}, {"style": "lora_A"}),
    "one alpha": (COMFYUI, {"style": "lora_A", "alpha": None}, {"style": "lora_A"}),
    "old": (DIFFUSERS, {"style": OLD, "alpha": None}, {"style": OLD, "alpha": None}),
    "metadata": (TRANSFORMER, *[{"style": "lora_A", "alpha": None, "metadata": adapter_metadata(
        {"transformer": {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/x"}})}] * 2),
    "bare": ({"a.q": (4, 5, 2)}, *[{"style": "lora_A", "alpha": None,
                                    "prefix": "base_model.model."}] * 2),
}  # fmt: skip
EXPECTED = {
    "kohya": {"alpha": "tensors", "styles": {"": "lora_down"}},
    "alphas": {"alpha": "tensors", "styles": {"diffusion_model": "lora_A"}},
    "one alpha": {"alpha": "tensors", "styles": {"diffusion_model": "lora_A"}},
    "old": {"alpha": "none", "styles": OLD},
    "metadata": {"alpha": "metadata", "styles": {"transformer": "lora_A"}},
    "bare": {"alpha": "none", "prefix": "base_model.model."},
}


@pytest.mark.parametrize("case", LIKE)
def test_a_file_is_written_like_its_inputs(tmp_path, rng, case):
    modules, first, second = LIKE[case]
    make_file(tmp_path / "zoo" / "a.safetensors", modules, **first)
    make_file(tmp_path / "zoo" / "b.safetensors", modules, seed=1, **second)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    out = tmp_path / "out.safetensors"
    given = meant(modules, rng)
    write_like(out, zoo.adapters, given, metadata={"mergeprobe_fast.merge": "{}"})
    adapter = open_adapter(out)
    assert adapter.format == zoo[0].format and adapter.base_model == zoo.base_model
    assert {key: adapter.config[key] for key in EXPECTED[case]} == EXPECTED[case]
    texts = adapter.config["metadata"]
    assert "ss_output_name" not in texts and "ss_sd_model_name" not in texts  # they differ, or mean
    together = mpf.open_zoo([tmp_path / "zoo", out])  # the input files only
    assert any(note.startswith("out: itself the result of a merge") for note in together.notes)
    for module in given:
        np.testing.assert_array_equal(read_factor(adapter.modules[module.name].b), module.b)


def test_formats_that_cannot_be_written_as_one_file_are_refused(tmp_path, rng):
    make_adapter(tmp_path / "p", {"a.q": (4, 5, 2)}, base_model=None)
    bare = {"style": "lora_A", "alpha": None}
    make_file(tmp_path / "b.safetensors", {"a.q": (4, 5, 2)}, prefix="base_model.model.", **bare)
    make_file(tmp_path / "c.safetensors", {"a.q": (4, 5, 2)}, **bare)
    out, given = tmp_path / "out.safetensors", meant({"a.q": (4, 5, 2)}, rng)
    for paths, reason in (
        (["p"], "not peft"),
        (["p", "b.safetensors"], "not diffusers and peft"),
        (["b.safetensors", "c.safetensors"], "keys begin differently"),
    ):
        zoo = mpf.open_zoo([tmp_path / path for path in paths])
        with pytest.raises(InputError, match=reason):
            write_like(out, zoo.adapters, given)
    with pytest.raises(InputError, match="not none"):
        write_like(out, [], given)
    assert not out.exists()


def refused_module(name="lora_unet_x", kind="linear", **more):
    return WrittenModule(name, kind, np.ones((2, 3)), np.ones((4, 2)), **more)


REFUSED = {
    "dots": ("kohya", [refused_module("unet.x")], {}, "not a module name of kohya"),
    "no lora_": ("kohya", [refused_module("x")], {}, "not a module name of kohya"),
    "kohya name": ("diffusers", [refused_module()], {}, "is a module name of kohya"),
    "embedding": ("kohya", [refused_module(kind="embedding")], {}, "an embedding has no place"),
    "transposed": ("kohya", [refused_module(fan_in_fan_out=True)], {}, "a transposed layer"),
    "nan": ("kohya", [refused_module(scale=np.nan)], {}, "NaN or Inf"),
    "overflow": ("diffusers", [refused_module("unet.x", scale=1e6)], {"dtype": "F16"}, "overflows"),
    "dtype": ("kohya", [refused_module()], {"dtype": "F64"}, "dtype 'F64' is none of"),
    "none": ("kohya", [], {}, "no modules"),
    "twice": ("kohya", [refused_module(), refused_module()], {}, "given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(tmp_path, case):
    format, modules, more, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason) as caught:
        write(format, tmp_path / "new" / "a.safetensors", modules, **more)
    assert caught.value.path == str(tmp_path / "new" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_path_is_checked_before_anything_is_computed(tmp_path, rng):
    path = tmp_path / "a.safetensors"
    make_file(path)
    before = path.read_bytes()

    def never():
        raise AssertionError("computed")
        yield

    for out, more, reason in (
        (path, {}, "exists; pass --overwrite"),
        (path, {"overwrite": True, "inputs": [path]}, "would overwrite the input"),
        (tmp_path / "a.bin", {}, "does not end in .safetensors"),
    ):
        with pytest.raises(InputError, match=reason):
            write_kohya(out, never(), **more)
    assert path.read_bytes() == before
    write_kohya(path, meant(KOHYA, rng), overwrite=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
