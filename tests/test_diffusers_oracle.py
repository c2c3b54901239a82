"""diffusers itself as oracle, where it is installed: its files read by us, our files read by it."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
from adapters import delta_of
from single_files import make_file

from mergeprobe_fast.io import WrittenModule, open_adapter, write_diffusers, write_kohya

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
lora_layers = pytest.importorskip("peft_models").lora_layers

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers' own imports and deprecations
TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]


@pytest.fixture
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 12), cross_attention_dim=6, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def deltas(unet):
    """PEFT's float64 delta of every adapted layer, as (out, everything else)."""
    found = {}
    for name, layer in lora_layers(unet.double()).items():
        delta = layer.get_delta_weight(next(iter(layer.scaling))).detach().numpy()
        found[name] = delta.reshape(len(delta), -1)
    return found


def assert_same(ours, theirs):
    assert set(ours) == set(theirs) and len(theirs) > 10
    for name, expected in theirs.items():
        size = np.abs(expected).max() + 1e-30
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-13 * size, err_msg=name)


def trained(unet, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **more))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return unet


PATTERNS = {"rank_pattern": {"conv1": 2, "to_k": 5}, "alpha_pattern": {"conv1": 3, "proj_in": 1}}


@pytest.mark.parametrize("more", [{}, PATTERNS, {"use_rslora": True}], ids=str)
def test_we_read_what_diffusers_saves(tmp_path, unet, more):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    trained(unet, **more)
    state = peft.get_peft_model_state_dict(unet, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, **_collate_lora_metadata({"unet": unet})
    )
    adapter = open_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.format == "diffusers" and adapter.config["alpha"] == "metadata"
    ours = {n.removeprefix("unet."): delta_of(ref) for n, ref in adapter.modules.items()}
    assert_same(ours, deltas(unet))


def modules_for(unet, rng, rank):
    """A module to write for every layer of the UNet that diffusers would adapt."""
    made = []
    for name, layer in unet.named_modules():
        if not any(name.endswith(target) for target in TARGETS):
            continue
        conv = isinstance(layer, torch.nn.Conv2d)
        d_out, shape = layer.weight.shape[0], tuple(layer.weight.shape[1:])
        r = rank(name)
        made.append(WrittenModule(
            name, "conv2d" if conv else "linear", rng.standard_normal((r, int(np.prod(shape)))),
            rng.standard_normal((d_out, r)), 1.0, shape if conv else None,
        ))  # fmt: skip
    return made


def mixed(name):
    return 2 + len(name) % 5


@pytest.mark.parametrize("rank", [lambda name: 3, mixed], ids=["uniform", "mixed"])
@pytest.mark.parametrize("alpha", ["none", "metadata"])
def test_diffusers_reads_what_we_write(tmp_path, unet, rng, rank, alpha):
    given = modules_for(unet, rng, rank)
    named = [dataclasses.replace(m, name=f"unet.{m.name}") for m in given]
    path = tmp_path / "a.safetensors"
    write_diffusers(path, named, alpha=alpha)
    unet.load_lora_adapter(str(path), prefix="unet")
    ours = {n.removeprefix("unet."): delta_of(m) for n, m in open_adapter(path).modules.items()}
    assert_same(ours, deltas(unet))


def load_kohya(unet, path):
    from diffusers import StableDiffusionPipeline

    state, alphas = StableDiffusionPipeline.lora_state_dict(str(path), unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    return deltas(unet)


def test_diffusers_reads_our_kohya_file_of_one_rank(tmp_path, unet, rng):
    """Of one rank only: diffusers 0.42 gives all attention layers the file's most common alpha."""
    given = modules_for(unet, rng, lambda name: 3)
    kohya = {f"lora_unet_{m.name.replace('.', '_')}": m.name for m in given}
    named = [dataclasses.replace(m, name=k) for k, m in zip(kohya, given, strict=True)]
    path = tmp_path / "a.safetensors"
    write_kohya(path, named)
    ours = {kohya[n]: delta_of(m) for n, m in open_adapter(path).modules.items()}
    assert_same(ours, load_kohya(unet, path))


def test_the_scale_of_a_kohya_file_is_the_one_that_diffusers_takes(tmp_path, unet, rng):
    """One alpha and many ranks, which diffusers reads right."""
    given = [m for m in modules_for(unet, rng, mixed) if m.kind == "linear"]
    kohya = {f"lora_unet_{m.name.replace('.', '_')}": m.name for m in given}
    sizes = {k: (len(m.b), m.a.shape[1], len(m.a)) for k, m in zip(kohya, given, strict=True)}
    path = make_file(tmp_path / "a.safetensors", sizes, alpha=1.25).path
    ours = {kohya[n]: delta_of(m) for n, m in open_adapter(path).modules.items()}
    assert_same(ours, load_kohya(unet, path))
