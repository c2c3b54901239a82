"""Features with ``device="cuda"``: passes in Triton's interpreter against those on the CPU."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from device_child import interpreter
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import passes

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.mlp.down_proj": (20, 37, 4),
    "model.layers.1.self_attn.q_proj": (24, 20, 4),
}
NAMES = list(MODULES)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """``pair_features`` on the device: columns as arrays, or InputError."""
    with interpreter(tmp_path_factory.mktemp("out")) as call:
        yield lambda zoo, fault=False, sizes=None, **options: call(
            "features", zoo, fault=fault, sizes=sizes, **options
        )


@pytest.fixture
def zoo(tmp_path, rng):
    """Six adapters: mixed ranks and dtypes, modules missing, one zero, a copy, one of rank 1."""
    made = []
    for i in range(6):
        names = NAMES if i % 3 != 1 else NAMES[1:]
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 7))) for n in names}
        options = {}
        if i == 4:
            options["factors"] = {n: (m.a, m.b) for n, m in made[0].modules.items()}
        if i == 5:
            sizes = {n: (*MODULES[n][:2], 3) for n in names}
        made.append(make_adapter(
            tmp_path / "zoo" / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)), zero_b=i == 3,
            magnitude=float(rng.uniform(0.1, 10)), dtype="BF16" if i in (1, 2) else "F32",
            **options,
        ))  # fmt: skip
    return tmp_path / "zoo"


def worst(found, want):
    """Largest error of a column, of the size it can have; names must be the same."""
    assert set(found) == set(want)
    off = 0.0
    for name in want:
        x, y = np.asarray(found[name]), np.asarray(want[name])
        if x.dtype.kind != "f":
            assert (x == y).all(), name
            continue
        assert (np.isnan(x) == np.isnan(y)).all(), name
        size = np.maximum(50 if name.startswith(("cosine_z", "angle")) else 1, np.abs(y))
        off = max(off, float(np.nanmax(np.abs(x - y) / size, initial=0)))
    return off


# Of a pair of this zoo, with the default features, on the device: 3 x 3 of them are as many.
BYTES = 2_000
# Both are float32 sums of the same terms: each is within its bound of float64.
BOUND = 2 * bound("feature")


@pytest.mark.parametrize("sizes", [
    {}, {"PAIR_BYTES": 1}, {"DEVICE_BYTES": 1}, {"PAIR_BYTES": 9 * BYTES, "DEVICE_BYTES": 1},
], ids=["at_once", "blocks_of_2", "a_module_each", "blocks_of_3_and_modules"])  # fmt: skip
def test_the_device_gives_what_the_cpu_gives(on_device, zoo, sizes):
    assert worst(on_device(zoo, sizes=sizes), mpf.pair_features(zoo, threads=1)) <= BOUND


def test_weights_of_other_rows_are_noticed(on_device, zoo):
    assert worst(on_device(zoo, fault=True), mpf.pair_features(zoo, threads=1)) > 1000 * BOUND


def test_what_the_device_has_no_kernel_for_reads_its_factors_on_the_cpu(on_device, zoo):
    shutil.rmtree(zoo / "adapter_4")  # the angle to a copy is the root of what is rounding
    want = mpf.pair_features(zoo, "all", threads=1)
    # Spectra of stacked pairs are roots of small differences.
    assert worst(on_device(zoo, features="all"), want) <= 50 * BOUND


def test_adapters_alone(tmp_path_factory, zoo):
    with interpreter(tmp_path_factory.mktemp("alone")) as call:
        got = call("adapters", zoo)
    want = mpf.adapter_features(zoo, threads=1)
    for name in want:
        x, y = np.asarray(want[name]), got[name]
        if x.dtype.kind == "f":
            np.testing.assert_allclose(y, x, rtol=1e-9, err_msg=name)
        else:
            assert (x == y).all(), name


def test_a_factor_that_is_not_finite_is_named(on_device, zoo):
    from safetensors.torch import load_file, save_file

    path = zoo / "adapter_2" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_A" in k)
    tensors[key][0, 1] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(mpf.InputError) as there:
        mpf.pair_features(zoo, threads=1)
    with pytest.raises(mpf.InputError) as here:
        on_device(zoo)
    assert str(here.value) == str(there.value) and key in str(here.value)


def test_an_absurd_update_is_named_as_on_the_cpu(on_device, tmp_path):
    names = {"m.0.x": (9, 8, 2)}
    make_adapter(tmp_path / "zoo" / "a", names)
    factors = {"m.0.x": (np.full((2, 8), 1e31), np.full((9, 2), 1e31))}
    make_adapter(tmp_path / "zoo" / "b", names, factors=factors)
    with pytest.raises(mpf.InputError, match="absurdly large") as there:
        mpf.pair_features(tmp_path / "zoo", threads=1)
    with pytest.raises(mpf.InputError) as here:
        on_device(tmp_path / "zoo")
    assert str(here.value) == str(there.value)


def test_blocks_kept_by_the_cpu_are_not_taken_for_those_of_the_device(on_device, zoo, tmp_path):
    keep, sizes = tmp_path / "keep", {"PAIR_BYTES": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PAIR_BYTES", 1)
        mpf.pair_features(zoo, keep=keep, threads=1)
    before = {p.name: p.read_bytes() for p in keep.iterdir()}
    once = on_device(zoo, keep=str(keep), sizes=sizes)
    after = {p.name: p.read_bytes() for p in keep.iterdir()}
    assert before and all(after[name] != data for name, data in before.items())
    twice = on_device(zoo, keep=str(keep), sizes=sizes)
    assert all(np.array_equal(once[n], twice[n], equal_nan=n not in ("a", "b")) for n in once)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", 0])
def test_a_device_that_does_not_exist_is_refused(zoo, device):
    with pytest.raises(mpf.InputError, match="device: expected cpu, cuda"):
        mpf.pair_features(zoo, device=device)


def test_a_device_that_is_not_there_is_refused_and_auto_takes_the_cpu(zoo, caplog):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(mpf.BackendError, match=r"device cuda is not available: torch .* sees no"):
        mpf.pair_features(zoo, device="cuda")
    with caplog.at_level("INFO", "mergeprobe_fast"):
        found = mpf.pair_features(zoo, device="auto", threads=1)
    assert "device auto: the CPU (torch" in caplog.text
    assert worst(found, mpf.pair_features(zoo, threads=1)) == 0
    with pytest.raises(mpf.InputError, match="precision: expected 'highest' or 'high'"):
        mpf.pair_features(zoo, precision="low")

