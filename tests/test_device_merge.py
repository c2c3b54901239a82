"""Merges with ``device="cuda"``: rules on entries in Triton's interpreter against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from device_child import dense_rows, interpreter, merged
from tolerances import bound, device_merge_bound

import mergeprobe_fast as mpf

MODULES = {"layers.0.q": (26, 18, 3), "layers.0.down": (9, 33, 2), "layers.1.q": (26, 18, 4)}
# fmt: off
METHODS = {
    "ties": {"density": 0.3},
    "ties weighted": {"method": "ties", "dialect": "mergekit", "weights": [1.0, -0.5, 2.0]},
    "ties of the paper": {
        "method": "ties", "dialect": "paper", "majority_sign_method": "frequency",
    },
    "magnitude_prune": {},
    "dare_linear": {"seed": 3},
    "dare_ties": {"dialect": "mergekit", "density": [0.2, 0.5, 0.9]},
    "della": {},
    "della_linear": {"epsilon": 0.2},
    "breadcrumbs": {"gamma": 0.05},
    "breadcrumbs_ties": {"energy": 0.9},
    "svd": {},  # of factors alone: the device has nothing to do
}
# fmt: on
# A chain of 4 products in float32, rounded after each where there is no fused one; then float32
# factors of an exact SVD.
BOUND = 2e-6
FULL = 33  # no module has a higher rank


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    with interpreter(tmp_path_factory.mktemp("out")) as call:
        yield call


@pytest.fixture
def zoo(tmp_path, rng):
    """Three adapters: mixed ranks and dtypes, a module missing, one that is zero."""
    for i in range(3):
        names = list(MODULES)[: 2 if i == 1 else 3]
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 5))) for n in names}
        make_adapter(
            tmp_path / "zoo" / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)),
            magnitude=float(rng.uniform(0.1, 10)), dtype="BF16" if i == 2 else "F32",
            zero_b=names[:1] if i == 2 else (),
        )  # fmt: skip
    return tmp_path / "zoo"


def off(found, want):
    """Largest difference of a delta, norm or error, over the largest entry or the norm."""
    assert set(found) == set(want)
    worst = 0.0
    for name, x in want.items():
        size = np.abs(x).max() if "delta" in name else want[f"{name.partition(':')[0]}: norm"]
        worst = max(worst, float(np.abs(found[name] - x).max() / (size or 1.0)))
    return worst


def worse(found, want, whole):
    """How far errors of a cut are from the CPU's, reported and real, over what they may be.

    Not the deltas: a pass more or less, which roundings decide, gains 1e-6 of the error, and that
    turns the last directions by 1e-3 (5 of 1,200 merges by the CPU alone, with other roundings).
    """
    apart = 0.0
    for name in (n.removesuffix(": delta") for n in whole if n.endswith("delta")):
        norm, error = float(whole[f"{name}: norm"]), float(want[f"{name}: error"])
        real = np.linalg.norm(whole[f"{name}: delta"].astype(np.float64) - found[f"{name}: delta"])
        # Both are near the best error; of factors in float32, and of what is 0 but for rounding.
        limit = 2 * bound("low_rank") * error + device_merge_bound(FULL) * norm
        for e in (real, float(found[f"{name}: error"])):
            apart = max(apart, abs(e - error) / (limit or 1.0))
    return apart


@pytest.mark.parametrize("name", METHODS)
def test_the_device_merges_as_the_cpu_does(on_device, zoo, name):
    options = {"method": name, **METHODS[name]}
    uncut = {**options, "energy": None, "rank": FULL}
    whole = merged(zoo, **uncut)
    assert off(on_device("merged", zoo, **uncut), whole) <= BOUND
    got, want = on_device("merged", zoo, **options), merged(zoo, **options)
    assert worse(got, want, whole) <= 1


def test_a_component_left_out_is_noticed(on_device, zoo):
    options = {"method": "dare_linear", "seed": 3}
    whole, want = merged(zoo, **options, rank=FULL), merged(zoo, **options, rank=3)
    assert worse(on_device("merged", zoo, **options, rank=2), want, whole) > 1


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_rows_for_base_weights(on_device, zoo, method):
    got, want = on_device("dense_rows", zoo, method=method), dense_rows(zoo, "cpu", method)
    assert set(got) == set(want)
    for name, x in want.items():
        assert x.size and np.abs(got[name] - x).max() <= BOUND * max(np.abs(x).max(), 1e-30), name


def test_wrong_thresholds_are_noticed(on_device, zoo):
    options = {"method": "ties", "density": 0.3}
    assert off(on_device("merged", zoo, fault=True, **options), merged(zoo, **options)) > 0.01


def test_a_factor_that_is_not_finite_is_named(on_device, zoo):
    from safetensors.torch import load_file, save_file

    path = zoo / "adapter_1" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key][1, 0] = np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(mpf.InputError) as there:
        merged(zoo, method="ties")
    with pytest.raises(mpf.InputError) as here:
        on_device("merged", zoo, method="ties")
    assert str(here.value) == str(there.value) and key in str(here.value)


def test_a_device_that_is_not_there_is_refused(zoo):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(mpf.BackendError, match="device cuda is not available"):
        mpf.merge(zoo, "ties", device="cuda")
    with pytest.raises(mpf.InputError, match="device: expected"):
        mpf.merge(zoo, "ties", device="tpu")
