"""Code for a CUDA device where there is none: what lies where, and when the host waits.

Whole calls run with ``device="cuda"`` on the pretended device of pretend_cuda.py, which refuses
what a GPU would, and are compared with the CPU's. Any test that uses triton_child.py runs there
too, with MERGEPROBE_TRITON_DEVICE=pretended.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("MERGEPROBE_TRITON_DEVICE") == "cuda":
    pytest.skip("tensors are on a real device", allow_module_level=True)

from adapters import make_adapter  # noqa: E402
from bases import make_base  # noqa: E402
from device_child import TASKS  # noqa: E402
from domain_world import ADAPTERS, World  # noqa: E402
from triton_child import child, serve  # noqa: E402

pytestmark = pytest.mark.triton
# What runs on a device: a task of device_child.py and its options; for some, "calibration" and how
# many adapters.
# fmt: off
FLOWS = {
    "default features": ("features", {}),
    "all features": ("features", {"features": "all", "calibration": True}),
    "adapters alone": ("adapters", {}),
    "rows for base weights": ("dense_rows", {"method": "ties"}),
    "ties": ("merged", {"method": "ties", "density": 0.3}),
    "della": ("merged", {"method": "della"}),
    "svd": ("merged", {"method": "svd"}),
    "tsv": ("merged", {"method": "tsv_m"}),
    "core space": ("merged", {"method": "core_space"}),
    "slerp": ("merged", {"method": "slerp", "adapters": 2}),
    "regmean": ("merged", {"method": "regmean", "calibration": True}),
    "fisher": ("merged", {"method": "fisher", "calibration": True}),
}
# fmt: on
# Of each column's size: tests of each piece have its own bound; wrong data is far beyond.
CLOSE = 1e-3


@contextmanager
def planted(fault):
    """The package with a tensor left on the host, or something that nobody waits for."""
    import pretend_streams as streams

    from mergeprobe_fast.kernels import canonical, device

    sound, upload = device.Forms._stack, device.Device.upload
    ones = [torch.ones(3, 4)]

    def stack(self, *arguments):
        rows = sound(self, *arguments)
        if fault == "weights on the host":
            object.__setattr__(rows, "weights", rows.weights.cpu())
        elif fault == "a product of both":
            rows.weights * torch.ones(rows.weights.shape)
        elif fault == "numpy of a tensor there":
            rows.weights.numpy()
        elif fault == "addresses of the host":
            canonical.canonical_batch(ones, ones, backend="triton")
        elif fault == "memory is not kept":
            there, other = 2 * rows.weights, torch.cuda.Stream()
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                there.sum()
        elif fault == "the host waits":
            rows.weights.max().item()
        return rows

    def scribble(self, array):
        copy = upload(self, array)
        array[:] = 0
        return copy

    where, name, instead = {
        "results are not waited for": (streams.Event, "synchronize", lambda self: None),
        "streams do not wait": (streams.Stream, "wait_event", lambda self, event: None),
        "a buffer is written too early": (device.Device, "upload", scribble),
    }.get(fault, (device.Forms, "_stack", stack))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, instead)
        yield


def program():
    """The child process: (task, zoo, options, fault, sizes) in; what was found, and seen, out."""
    import pretend_cuda
    import pretend_streams as streams

    from mergeprobe_fast.engine import passes

    def handle(request):
        task, zoo, options, fault, sizes = request
        report = pretend_cuda.report
        report.clear()
        streams.forget()
        with planted(fault), pytest.MonkeyPatch.context() as patch:
            for name, value in sizes.items():
                patch.setattr(passes, name, value)
            found = TASKS[task](zoo, device="cuda", **options)
            streams.settle()
        seen = {name: dict(getattr(report, name)) for name in ("waits", "unordered")}
        return found, seen | {"lifetimes": list(streams.lifetimes), "ran": report.operations}

    serve(handle)


@pytest.fixture(scope="module")
def pretended():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEPROBE_TRITON_DEVICE", "pretended")
        with child(__file__) as ask:
            yield lambda task, zoo, fault=None, sizes=(), **options: ask(
                (task, zoo, options, fault, dict(sizes))
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three adapters and a calibration. Always the same ones: what lies where depends on no number,
    and merges of adapters whose spectra have no gap are compared here as well.
    """
    return World(tmp_path_factory.mktemp("world"), np.random.default_rng(0), adapters=ADAPTERS[:3])


@pytest.fixture
def zoo(world):
    return world.zoo[0].path.parent


@pytest.mark.parametrize("name", FLOWS)
def test_everything_lies_where_it_is_used(pretended, world, zoo, name):
    task, options = FLOWS[name][0], dict(FLOWS[name][1])
    if "calibration" in options:
        options["calibration"] = str(world.calibration.path)
    if count := options.pop("adapters", None):
        zoo = [str(adapter.path) for adapter in world.zoo[:count]]
    found, seen = pretended(task, zoo, **options)
    want = TASKS[task](zoo, device="cpu", **options)
    assert set(found) == set(want)
    for column, x in want.items():
        y = found[column]
        if x.dtype.kind == "f":
            assert (np.isnan(x) == np.isnan(y)).all(), column
            size = max(1.0, float(np.nanmax(np.abs(x), initial=0)))
            assert np.nanmax(np.abs(x - y), initial=0) <= CLOSE * size, column
        else:
            assert (x == y).all(), column
    assert seen["ran"]
    assert not seen["unordered"], "sums of floats in no order: other bits in every run"
    assert not seen["lifetimes"]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_caller_may_be_on_a_stream_of_its_own(pretended, world, zoo, tmp_path, method):
    """Threads that add to base weights take what was made on that stream, not on theirs."""
    made = [m for adapter in world.zoo for m in adapter.modules.items()]
    shapes = {f"{name}.weight": ("F32", (m.b.shape[0], m.a.shape[1])) for name, m in made}
    base, out = make_base(tmp_path / "base", shapes), tmp_path / "out"
    places = {"base": str(base), "out": str(out), "method": method}
    found, seen = pretended("added", zoo, own_stream=True, **places)
    want = TASKS["added"](zoo, device="cpu", **places)
    assert set(found) == set(want) and not seen["lifetimes"]
    for name, x in want.items():
        assert np.abs(found[name] - x).max() <= CLOSE * np.abs(x).max(), name


# More than one chunk: buffers are used again.
CHUNKS = {"DEVICE_BYTES": 1}


def test_chunks_follow_one_another(pretended, zoo):
    found, seen = pretended("features", zoo, sizes=CHUNKS)
    want, _ = pretended("features", zoo)
    for column, x in want.items():
        if x.dtype.kind == "f":
            np.testing.assert_allclose(found[column], x, atol=CLOSE, err_msg=column)
    assert not seen["lifetimes"]


@pytest.mark.parametrize("fault, text", {
    "weights on the host": "must have shape",
    "a product of both": "on one device",
    "numpy of a tensor there": "to numpy",
    "addresses of the host": "address of a tensor",
    "streams do not wait": "another is not done with",
    "a buffer is written too early": "before its copy had left",
}.items())  # fmt: skip
def test_what_a_gpu_would_not_do_is_refused(pretended, zoo, fault, text):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=text):
        pretended("features", zoo, fault=fault, sizes=CHUNKS)


def test_a_result_that_nobody_waits_for_is_garbage(pretended, zoo):
    want, _ = pretended("features", zoo)
    with pytest.raises(Exception):  # noqa: B017  # whatever garbage leads to
        found, _ = pretended("features", zoo, fault="results are not waited for")
        for column, x in want.items():
            np.testing.assert_allclose(found[column], x, atol=CLOSE, err_msg=column)


def test_memory_that_another_stream_may_get_is_noticed(pretended, zoo):
    assert pretended("features", zoo, fault="memory is not kept", sizes=CHUNKS)[1]["lifetimes"]


def test_the_host_waits_as_often_for_many_modules_as_for_few(pretended, tmp_path):
    """A chunk is one batch, whatever its modules."""
    many = {f"layers.{i}.{n}": (24, 20, 3) for i in range(6) for n in "qkv"}
    few = {name: many[name] for name in list(many)[:3]}

    def waits(modules, name, **options):
        folder = tmp_path / name
        for i in range(2):
            make_adapter(folder / f"adapter_{i}", modules, seed=i)
        return sum(pretended("features", folder, **options)[1]["waits"].values())

    assert waits(few, "few") == waits(many, "many")
    assert waits(few, "few") < waits(few, "few", fault="the host waits")


if __name__ == "__main__":
    program()
