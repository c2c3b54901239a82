"""Sums and columns of pairs that stay on a device, against those of numpy."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

import torch
from adapters import make_adapter
from device_child import interpreter
from own_features import ON_CPU, ON_DEVICE, OWN
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import device as engine_device
from mergeprobe_fast.engine import passes
from mergeprobe_fast.features import select
from mergeprobe_fast.ops.device import computing_on
from mergeprobe_fast.screening import screen

MODULES = {f"model.layers.{k // 2}.m{k}": (12 + k, 9 + 2 * k, 3) for k in range(4)}
NAMES = list(MODULES)
SMALL = {"DEVICE_PAIR_BYTES": 1, "DEVICE_BYTES": 1, "grams.AT_ONCE": 1, "aggregate._SORTED": 3}


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    with interpreter(tmp_path_factory.mktemp("out")) as ask:
        yield ask


@pytest.fixture
def zoo(tmp_path, rng):
    """Five adapters: mixed ranks, one without the first and the third module, one with the third
    alone, one that is zero."""
    lacking = {1: NAMES[1:2] + NAMES[3:], 2: NAMES[2:3]}
    for i in range(5):
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 5))) for n in lacking.get(i, NAMES)}
        make_adapter(
            tmp_path / "zoo" / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)), zero_b=i == 3,
            magnitude=float(rng.uniform(0.1, 10)),
        )  # fmt: skip
    return tmp_path / "zoo"


def worst(found, want):
    """Largest error of a column, of the size it can have or of its largest value."""
    off = 0.0
    for name in want:
        x, y = np.asarray(found[name]), np.asarray(want[name])
        if x.dtype.kind != "f":
            assert (x == y).all(), name
            continue
        assert (np.isnan(x) == np.isnan(y)).all(), name
        size = 50 if name.startswith("cosine_z") else max(1.0, np.nanmax(np.abs(y), initial=0))
        off = max(off, float(np.nanmax(np.abs(x - y) / size, initial=0)))
    return off


BOUND = 2 * bound("feature")  # both are float32 sums of the same terms


@pytest.mark.parametrize("sizes", [{}, {"grams.AT_ONCE": 50, "DEVICE_BYTES": 20_000}, SMALL],
                         ids=["at_once", "two_modules", "one_by_one"])  # fmt: skip
def test_pieces_of_any_size_give_what_the_cpu_gives(call, zoo, sizes):
    got = call("features", zoo, sizes=sizes)
    assert worst(got, mpf.pair_features(zoo, threads=1)) <= BOUND


def test_what_is_finished_there_does_not_depend_on_the_pieces(call, zoo):
    whole = call("features", zoo)
    # P1 is the same launch for launch: what differs is the order of float64 sums over modules.
    pieces = call("features", zoo, sizes={"grams.AT_ONCE": 1, "aggregate._SORTED": 2})
    assert worst(pieces, whole) <= 1e-13
    for name in whole:
        if name.endswith((".max", ".min", ".p10", ".p90")):
            assert np.array_equal(pieces[name], whole[name], equal_nan=True), name


def test_a_finish_that_does_more_than_the_device_knows_runs_on_the_cpu(call, zoo):
    names = [f.__name__ for f in (*ON_DEVICE, *ON_CPU)]
    names += ["mean_over_modules", "mean_with_masks"]
    want = mpf.pair_features(zoo, [OWN[n] for n in names], threads=1)
    got = call("own", zoo, names=names)
    assert worst(got, want) <= BOUND
    assert got["on the CPU"] == len(ON_CPU)  # each once; ``mean_with_masks`` is ``masked`` too


def test_progress_adds_up_to_the_steps_of_the_device_and_layers_are_those_of_the_cpu(call, zoo):
    want = screen(mpf.open_zoo(zoo), "cosine", threads=1).profile
    assert len(np.unique(want[0])) == want.shape[1] > 1  # one layer's for another's would show
    for sizes, blocks in (({"DEVICE_BYTES": 9000}, 1), ({"DEVICE_PAIR_BYTES": 1}, 3)):
        found = call("progress", zoo, sizes=sizes)
        assert found["seen"].sum() == found["steps"] and (found["seen"] > 0).all()
        assert found["steps"] == len(MODULES) * blocks * (blocks + 1) // 2
        np.testing.assert_allclose(found["profile"], want, 0, BOUND)


def test_a_factor_of_a_later_chunk_is_named(call, zoo):
    from safetensors.torch import load_file, save_file

    path = zoo / "adapter_4" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if f"{NAMES[3]}.lora_B" in k)
    tensors[key][1, 0] = np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(mpf.InputError) as there:
        mpf.pair_features(zoo, threads=1)
    with pytest.raises(mpf.InputError) as here:
        call("features", zoo, sizes={"DEVICE_BYTES": 1})
    assert str(here.value) == str(there.value) and key in str(here.value)


def test_blocks_are_as_large_as_the_memory_allows(zoo):
    zoo, features = mpf.open_zoo(zoo), select("default").features
    sides = [engine_device.pairs_side(zoo, features, 0, limit) for limit in range(0, 10**6, 500)]
    assert sides[0] == 0 and sides[-1] == len(zoo)
    assert all(a <= b for a, b in pairwise(sides))
    one = next(500 * k for k, side in enumerate(sides) if side == 1)
    # All 10 pairs of 5 among themselves in one block, or squares of adapters.
    assert sides.index(len(zoo)) * 500 == pytest.approx(10 * one, abs=10 * 500)
    device = SimpleNamespace(room=lambda: 8 << 30)
    with pytest.MonkeyPatch.context() as patch:
        assert len(passes._super_blocks(zoo, features, device)) == 1
        patch.setattr(passes, "DEVICE_PAIR_BYTES", 4 * one)
        assert [len(x) for x in passes._super_blocks(zoo, features, device)] == [2, 2, 1]
        assert passes.steps(zoo, features, device) == len(zoo.modules) * 6


def test_a_thousand_adapters_of_a_7b_model_are_one_block():
    modules = [SimpleNamespace(layer=str(k // 7), d_out=4096, d_in=11008) for k in range(224)]

    class Zoo:
        def __init__(self, count, rank=16):
            size = 2 * rank * (4096 + 11008)
            entries = {"module": [0], "rank": [rank], "a_nbytes": [size], "b_nbytes": [0]}
            entries = {name: np.array(x) for name, x in entries.items()}
            self.count, self.modules, self.table = count, modules, SimpleNamespace(entries=entries)

        def __len__(self):
            return self.count

    features = select("default").features
    room = (80 << 30) * 15 // 16 * 2 // 3
    assert engine_device.pairs_side(Zoo(1000), features, room, None) == 1000
    assert engine_device.pairs_side(Zoo(2000), features, room, None) == 2000
    many = engine_device.pairs_side(Zoo(20_000), features, room, None)
    assert 1000 < many < 3000
    # Of higher ranks fewer adapters of a module are there at once.
    assert engine_device.pairs_side(Zoo(20_000, 128), features, room, None) < many


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore words."),
    RuntimeError("CUDA error: an illegal memory access was encountered\nMore words."),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
], ids=["memory", "broken", "triton"])  # fmt: skip
def test_what_the_device_fails_at_is_one_line(zoo, error):
    from mergeprobe_fast.kernels.device import Device

    def memory(size):
        raise error

    device = SimpleNamespace(
        torch="cuda:1", label="it", copies=None, memory=memory, room=lambda: 1 << 40,
        failure=Device.failure, array=lambda x: np.array(x),
    )  # fmt: skip
    with pytest.raises(mpf.BackendError) as found:
        mpf.pair_features(zoo, device=device)
    said = str(found.value)
    assert said.startswith("cuda:1: ") and "\n" not in said
    assert str(error).splitlines()[0] in said
    with pytest.raises(KeyError), computing_on(device):
        raise KeyError("another's")
    with pytest.raises(RuntimeError, match="one of ours"), computing_on(device):
        raise RuntimeError("one of ours")
