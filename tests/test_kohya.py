"""kohya files: what they say, what is refused, and that every tensor is accounted for."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from adapters import delta_of, make_adapter
from single_files import CONVS, FLUX, KOHYA, SDXL, make_file

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import check, is_adapter, open_adapter, read_header

U64 = 2.0**-53
Q = next(iter(KOHYA))
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
ONE = np.ones((2, 3), np.float32)


def seed(rng):
    return int(rng.integers(1 << 30))


def assert_is(adapter, made):
    """Same modules, and each delta is the float64 definition up to the roundings of its sums."""
    assert set(adapter.modules) == set(made.modules)
    for name, truth in made.modules.items():
        ref = adapter.modules[name]
        weight = truth.weight.reshape(truth.weight.shape[0], -1)
        size = np.abs(truth.up.reshape(len(truth.up), -1)) @ np.abs(
            truth.down.reshape(len(truth.down), -1)
        )
        # rank products and additions and one scale on either side
        error = np.abs(delta_of(ref) - weight)
        assert (error <= 2 * (ref.rank + 3) * U64 * ref.scale * size).all(), name
        assert ref.kind == ("conv2d" if name in CONVS else "linear")
        assert ref.a.shape == truth.down.shape and ref.b.shape == truth.up.shape


@pytest.mark.parametrize("modules", [KOHYA, SDXL, FLUX], ids=["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_deltas_are_up_down_alpha_over_rank(tmp_path, rng, modules, dtype):
    alphas = {name: 0.5 + 1.5 * i for i, name in enumerate(modules)}
    made = make_file(
        tmp_path / "style.safetensors", modules, alphas=alphas, dtype=dtype, seed=seed(rng)
    )
    adapter = open_adapter(made.path)
    assert (adapter.format, adapter.name, adapter.path) == ("kohya", "style", made.path)
    assert adapter.notes == () and adapter.base_model is None
    assert_is(adapter, made)


def test_the_comparison_notices_another_alpha(tmp_path):
    made = make_file(tmp_path / "a.safetensors", alpha=2.0)
    other = make_file(tmp_path / "b.safetensors", alpha=2.0, alphas={CONV: 2.0 * (1 + 2**-20)})
    with pytest.raises(AssertionError, match=CONV):
        assert_is(open_adapter(other.path), made)


@pytest.mark.parametrize("name", CONVS.keys() & KOHYA.keys())
def test_a_conv_is_what_running_down_then_up_does(tmp_path, rng, name):
    """torch's conv2d, in the order that kohya's forward runs it, against the flattened factors."""
    torch = pytest.importorskip("torch")
    made = make_file(tmp_path / "a.safetensors", seed=seed(rng), alpha=3.0)
    ref = open_adapter(made.path).modules[name]
    truth = made.modules[name]
    x = torch.from_numpy(rng.standard_normal((2, CONVS[name][0], 6, 7)))
    down, up = torch.from_numpy(truth.down), torch.from_numpy(truth.up)
    expected = 3.0 / ref.rank * torch.conv2d(torch.conv2d(x, down, padding="same"), up)
    weight = torch.from_numpy(delta_of(ref).reshape(ref.d_out, *CONVS[name]))
    got = torch.conv2d(x, weight, padding="same")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * float(expected.abs().max()) * 72)
    wrong = torch.conv2d(x, weight.flip(-1), padding="same")  # the comparison can fail
    if CONVS[name][1:] != (1, 1):
        assert float((wrong - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "shape", "alpha"),
    [("F32", (), 0.3), ("F16", (1,), 0.5), ("BF16", (), 12.0), ("F64", (), 1e-3), ("I64", (1,), 8)],
)
def test_alpha_of_any_dtype_is_read_exactly(tmp_path, dtype, shape, alpha):
    path = tmp_path / "a.safetensors"
    make_file(path, alpha=alpha, alpha_dtype=dtype, alpha_shape=shape)
    stored = np.float64(np.float32(alpha)) if dtype == "F32" else alpha
    for ref in open_adapter(path).modules.values():
        assert ref.scale == stored / ref.rank


def test_without_alpha_it_is_the_rank_and_that_is_noted(tmp_path):
    made = make_file(tmp_path / "none.safetensors", alpha=None)
    adapter = open_adapter(made.path)
    assert adapter.notes == ("no alpha in the file: alpha = rank is taken, scale 1",)
    assert_is(adapter, made)
    made = make_file(tmp_path / "some.safetensors", alphas={CONV: None})
    adapter = open_adapter(made.path)
    assert adapter.notes == ("no alpha for 1 of 5 modules: alpha = rank is taken, scale 1",)
    assert_is(adapter, made)
    texts = {"ss_network_alpha": "1", "ss_network_dim": "4"}
    make_file(tmp_path / "said.safetensors", alpha=None, metadata=texts)
    notes = open_adapter(tmp_path / "said.safetensors").notes
    assert any("ss_network_alpha is '1'" in note for note in notes)


METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "animagine.safetensors",
    "ss_network_dim": "4",
    "ss_network_module": "networks.lora",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "ss_tag_frequency": json.dumps({"tags": {f"t{i}": i for i in range(1000)}}),
}


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [((), "sdxl_base_v1-0"),
     (("ss_base_model_version",), "stable-diffusion-xl-v1-base"),
     (("ss_base_model_version", "modelspec.architecture"), "animagine.safetensors"),
     (("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"), None)],
)  # fmt: skip
def test_the_base_model_is_what_metadata_says(tmp_path, left_out, expected):
    texts = {key: "None" if key in left_out else text for key, text in METADATA.items()}
    make_file(tmp_path / "a.safetensors", metadata=texts)
    adapter = open_adapter(tmp_path / "a.safetensors")
    assert adapter.base_model == expected
    assert adapter.config["metadata"]["ss_network_dim"] == "4"
    assert "ss_tag_frequency" not in adapter.config["metadata"]  # long: not kept per adapter


def scalar(value=2.0, shape=()):
    return np.full(shape, value, np.float32)


REFUSED = {
    "tucker": ({f"{CONV}.lora_mid.weight": ONE}, "lora_mid.*Tucker"),
    "loha": ({"lora_unet_x.hada_w1_a": ONE}, "LoHa"),
    "lokr": ({"lora_unet_x.lokr_w1": ONE}, "LoKr"),
    "dora": ({f"{Q}.dora_scale": ONE}, "DoRA"),
    "diff": ({"lora_unet_x.diff": ONE}, "full difference"),
    "diff_b": ({"lora_unet_x.diff_b": ONE}, "full difference"),
    "norm": ({"lora_unet_x.w_norm": ONE, "lora_unet_x.b_norm": ONE}, "norm layer"),
    "oft": ({"lora_unet_x.oft_blocks": ONE}, "OFT"),
    "ia3": ({"lora_unet_x.on_input": ONE}, "IA3"),
    "peft names": (
        {"lora_unet_x.lora_A.weight": ONE, "lora_unet_x.lora_B.weight": ONE}, "another format",
    ),
    "diffusers among them": (
        {"unet.x.lora_A.weight": ONE, "unet.x.lora_B.weight": ONE.T}, "diffusers key in a kohya",
    ),
    "half": ({"lora_unet_x.lora_down.weight": ONE}, "half a pair: the module has no lora_up"),
    "other half": ({"lora_unet_x.lora_up.weight": ONE}, "half a pair: the module has no lora_down"),
    "split": ({f"{Q}.lora_up.0.weight": ONE}, "split over several"),
    "bias": ({f"{Q}.lora_up.bias": ONE}, "trained bias"),
    "orphan alpha": ({"lora_unet_x.alpha": scalar()}, "alpha of a module that has no factors"),
    "alpha shape": ({f"{Q}.alpha": scalar(shape=(2,))}, "not a scalar"),
    "alpha (1, 1)": ({f"{Q}.alpha": scalar(shape=(1, 1))}, "not a scalar"),
    "alpha bool": ({f"{Q}.alpha": np.array(True)}, "dtype BOOL"),
    "alpha nan": ({f"{Q}.alpha": scalar(np.nan)}, "alpha is nan"),
    "alpha inf": ({f"{Q}.alpha": scalar(np.inf)}, "alpha is inf"),
    "alpha 0": ({f"{Q}.alpha": scalar(0.0)}, "alpha is 0"),
    "alpha negative": ({f"{Q}.alpha": scalar(-4)}, "alpha is -4"),
    "integers": (
        {f"{Q}.lora_up.weight": np.ones((12, 4), np.int8)}, "dtype I8: factors must be",
    ),
    "ranks": ({f"{Q}.lora_up.weight": np.ones((12, 3), np.float32)}, "ranks of A and B differ"),
    "conv up": ({f"{CONV}.lora_up.weight": np.ones((9, 3, 3, 1), np.float32)}, "Conv2d B must be"),
    "rank 0": (
        {"lora_unet_x.lora_down.weight": np.ones((0, 3), np.float32),
         "lora_unet_x.lora_up.weight": np.ones((2, 0), np.float32)}, "rank 0",
    ),
    "embedding bundle": ({"bundle_emb.x.string_to_param.*": ONE}, "text embedding"),
    "stranger": ({"epoch": scalar()}, "unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_names_file_key_and_reason_and_nothing_is_skipped(tmp_path, case):
    extra, reason = REFUSED[case]
    path = tmp_path / "a.safetensors"
    make_file(path, extra=extra)
    assert is_adapter(path)
    with pytest.raises(InputError, match=reason) as caught:
        open_adapter(path)
    assert caught.value.path == str(path) and caught.value.key
    found = check(path)
    assert not found.ok
    rows = {row.key: row for row in found.keys}
    assert set(rows) == set(read_header(path).tensors)
    assert all((row.status == "used") == (row.reason is None) for row in rows.values())
    assert all(rows[key].status == "refused" for key in extra)
    first = found.problems[0]
    assert caught.value.reason.startswith(first.reason) and caught.value.key == first.key


def test_every_tensor_of_a_good_file_is_used(tmp_path):
    make_file(tmp_path / "a.safetensors")
    found = check(tmp_path / "a.safetensors")
    assert found.ok and found.counts() == {"used": 15, "refused": 0, "ignored": 0}
    assert {m.name: m.scale for m in found.modules} == {n: 2 / r for n, (*_, r) in KOHYA.items()}
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_alpha_of_a_refused_module_is_not_called_used(tmp_path):
    make_file(tmp_path / "a.safetensors", drop=(f"{Q}.lora_up.weight",))
    rows = {row.key: row for row in check(tmp_path / "a.safetensors").keys}
    assert rows[f"{Q}.alpha"].reason == "the factors of its module are refused"
    make_file(tmp_path / "b.safetensors", alphas={Q: -1.0})
    rows = {row.key: row for row in check(tmp_path / "b.safetensors").keys}
    ends = ("alpha", "lora_up.weight", "lora_down.weight")
    assert {rows[f"{Q}.{end}"].status for end in ends} == {"refused"}


def test_a_mixed_file_is_refused_key_by_key(tmp_path):
    extra = {f"unet.x{i}.lora_{s}.weight": ONE for i in range(9) for s in "AB"}
    make_file(tmp_path / "a.safetensors", extra=extra)
    found = check(tmp_path / "a.safetensors")
    said = {row.reason for row in found.keys if row.key.startswith("lora_")}
    assert any("kohya key in a diffusers file" in (reason or "") for reason in said)
    assert not found.ok


def test_a_huge_refused_alpha_is_not_read(tmp_path):
    make_file(tmp_path / "a.safetensors", extra={f"{Q}.alpha": np.zeros(1 << 20, np.float32)})
    with pytest.raises(InputError, match="not a scalar"):
        open_adapter(tmp_path / "a.safetensors")


def test_a_file_that_changes_between_header_and_alphas_is_refused(tmp_path, monkeypatch):
    from mergeprobe_fast.io import single_file

    path = tmp_path / "a.safetensors"
    make_file(path)
    plan = single_file.plan_file

    def slow(layout):
        os.utime(path, ns=(1, 1))
        return plan(layout)

    monkeypatch.setattr(single_file, "plan_file", slow)
    with pytest.raises(InputError, match="changed") as caught:
        open_adapter(path)
    assert caught.value.path == str(path)


def test_a_file_of_a_peft_folder_is_not_a_single_file(tmp_path):
    make_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    assert not is_adapter(path)
    with pytest.raises(InputError, match=re.escape("is a file; a PEFT adapter is a folder")):
        mpf.open_zoo(path)


def test_what_holds_no_lora_is_refused_by_path(tmp_path):
    make_file(tmp_path / "a.safetensors", {"x": (2, 3, 1)}, drop=("x.lora_up.weight",
              "x.lora_down.weight", "x.alpha"))  # fmt: skip
    assert not is_adapter(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no LoRA factors"):
        open_adapter(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="no safetensors file"):
        open_adapter(tmp_path / "b.safetensors")
