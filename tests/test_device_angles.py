"""Columns from principal angles with ``device="cuda"``: in the interpreter, against definitions on
materialised deltas and against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

import device_angles_child
from adapters import make_adapter
from angle_truth import MODULES, NAMES, expected, of_logs
from safetensors.torch import load_file, save_file
from test_angles import random_zoo
from tolerances import bound
from triton_child import child

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import angles
from mergeprobe_fast.features.angles import FAMILY

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def on_device():
    """``call(task, zoo, fault=..., sizes=..., **options)``: a task of the child."""
    with child(device_angles_child.__file__) as ask:

        def call(task, zoo, fault=None, sizes=None, **options):
            return ask((task, {"zoo": str(zoo), **options}, fault, sizes or {}))

        yield call


def differences(found, want, made, bounds=1):
    """Names of columns that are off, with by how much of what they can be."""
    off = {}
    assert set(found) == set(want)
    logs = of_logs(made)
    for name, values in want.items():
        if (np.isnan(found[name]) != np.isnan(values)).any():
            off[name] = "NaN"
            continue
        allowed = bounds * bound("angles") * np.maximum(1.0, np.abs(values))
        error = np.abs(found[name] - values) - allowed - (logs if "martin" in name else 0.0)
        if np.nanmax(error, initial=0) > 0:
            off[name] = float(np.nanmax(error))
    return off


@pytest.fixture
def made(rng, tmp_path):
    return random_zoo(tmp_path / "zoo", rng)


SIZES = {
    "at once": {},
    "blocks of two": {"FACTOR_BYTES": 1},
    "a module each": {"RESULT_BYTES": 1, "CHUNK_BYTES": 1},
    "three pairs at a time": {"BYTES": 3 * 8 * 16 * 16**2, "KEPT": 1},
}


@pytest.mark.parametrize("sizes", SIZES)
def test_columns_are_their_definitions(on_device, made, tmp_path, sizes):
    found = on_device("family", tmp_path / "zoo", sizes=SIZES[sizes])
    assert not differences(found, expected(made), made)


@pytest.mark.parametrize("fault", device_angles_child.FAULTS)
def test_faults_are_seen(on_device, made, tmp_path, fault):
    found = on_device("family", tmp_path / "zoo", fault=fault)
    assert differences(found, expected(made), made, bounds=1000)


def test_ranks_of_every_class(on_device, rng, tmp_path):
    # Nothing square: its smallest singular value might be what the truth takes for rounding.
    modules = {"a.b.c": (90, 80, 1), "a.b.d": (78, 100, 1)}
    ranks = [(40, 5), (32, 33), (4, 17), (70, 8), (1, 1)]
    made = [
        make_adapter(tmp_path / str(i), modules, ranks=dict(zip(modules, r, strict=True)),
                     seed=int(rng.integers(2**32)))
        for i, r in enumerate(ranks)
    ]  # fmt: skip
    made.append(make_adapter(tmp_path / "9", modules, factors={
        n: (m.a, m.b) for n, m in made[0].modules.items()}))  # fmt: skip
    for sizes in ({}, {"BYTES": 1}):
        assert not differences(on_device("family", tmp_path, sizes=sizes), expected(made), made)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_size_changes_no_ratio(on_device, rng, tmp_path, size):
    root, seeds = size**0.5, rng.integers(2**32, size=4).tolist()
    for i, seed in enumerate(seeds):
        for folder, magnitude, alpha in (("plain", 1, 8), ("sized", root, 8 * size / root)):
            options = {"magnitude": magnitude, "alpha": alpha}
            made = make_adapter(tmp_path / folder / str(i), MODULES, seed=seed, **options)
    plain, sized = (on_device("family", tmp_path / x) for x in ("plain", "sized"))
    sized["distance"] = sized["distance"] / size
    assert made and not [
        name for name, values in plain.items()
        if "martin" not in name and not np.allclose(values, sized[name], rtol=1e-5, atol=1e-6)
    ]  # fmt: skip


def test_a_screen_gives_what_the_cpu_gives(on_device, made, tmp_path):
    names = [c.name for c in FAMILY.pairs]
    want = mpf.pair_features(tmp_path / "zoo", names, threads=1)
    found = on_device("features", tmp_path / "zoo", features=names)
    assert np.array_equal(found["a"], want["a"]) and np.array_equal(found["b"], want["b"])
    found, want = ({n: np.asarray(x[n]) for n in names} for x in (found, want))
    assert not differences(found, want, made, bounds=2)


def on_cpu(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(angles, "FACTOR_BYTES", 1)
        found = mpf.pair_features(folder, [c.name for c in FAMILY.pairs], threads=1)
    return {c.name: np.asarray(found[c.name]) for c in FAMILY.pairs}


def test_a_block_of_one_adapter(on_device, rng, tmp_path):
    made = [make_adapter(tmp_path / str(i), MODULES, seed=int(rng.integers(2**32)), rank=3)
            for i in range(3)]  # fmt: skip
    for where in (on_device("family", tmp_path, sizes={"FACTOR_BYTES": 1}), on_cpu(tmp_path)):
        assert not differences(where, expected(made), made)


def test_an_iteration_that_does_not_converge_is_an_error(on_device, made, tmp_path):
    with pytest.raises(mpf.BackendError, match="did not converge on the device"):
        on_device("family", tmp_path / "zoo", fault="no convergence")


def test_adapters_that_share_nothing(on_device, tmp_path):
    for i, names in enumerate((NAMES[:2], NAMES[2:])):
        make_adapter(tmp_path / str(i), {n: MODULES[n] for n in names}, seed=i)
    found, want = on_device("family", tmp_path), mpf.pair_features(tmp_path, "row_geodesic")
    assert found["row_geodesic"] == pytest.approx(np.asarray(want["row_geodesic"]))
    assert found["row_gap"] == 1 and np.isnan(found["row_gap.mean"][0])


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_what_is_added_up_is_not_added_up_again(on_device, made, tmp_path, stop):
    blocks_of_two = {"FACTOR_BYTES": 1} if stop == 8 else {}
    killed, after, whole, found, once = on_device(
        "interrupted", tmp_path / "zoo", sizes={"RESULT_BYTES": 1, **blocks_of_two}, stop=stop,
        keep=str(tmp_path / "keep"), features="row_geodesic",
    )  # fmt: skip
    assert killed == stop and killed + after == whole
    for name, values in once.items():
        np.testing.assert_array_equal(values, found[name], err_msg=name)


def test_a_factor_that_is_not_finite_is_named(on_device, made, tmp_path):
    path = tmp_path / "zoo" / "adapter_2" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key][0, 0] = np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(mpf.InputError) as there:
        mpf.pair_features(tmp_path / "zoo", "row_geodesic", threads=1)
    with pytest.raises(mpf.InputError) as here:
        on_device("family", tmp_path / "zoo")
    assert str(here.value) == str(there.value) and key in str(here.value)
