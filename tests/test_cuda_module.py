"""The compiled module ``_cuda`` where there may be no GPU: what it refuses, and what it says."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mergeprobe_fast import BackendError, InputError, _native
from mergeprobe_fast.doctor import examine
from mergeprobe_fast.ops import sign_conflicts

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cuda():
    try:
        return _native.cuda()
    except BackendError as error:
        pytest.skip(str(error))


class Tensor(ctypes.Structure):
    """DLTensor, and DLManagedTensor without a deleter."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


NAME = b"dltensor"
capsule_of = ctypes.pythonapi.PyCapsule_New
capsule_of.restype = ctypes.py_object
capsule_of.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
FLOAT, BFLOAT, INT, UINT = 2, 4, 0, 1


class Fake:
    """Says that it lies on a CUDA device; nobody gets as far as reading it."""

    def __init__(self, shape, code=FLOAT, bits=32, *, strides=None, device=(2, 0), data=4096):
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        self.device = device
        places = (x and ctypes.addressof(x) for x in (self.shape, self.strides))
        self.tensor = Tensor(data, device, len(shape), code, bits, 1, *places, 0, None, None)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream, max_version=None):
        assert stream == -1, "the export must not order any work"
        return capsule_of(ctypes.addressof(self.tensor), NAME, None)


class Unwilling(Fake):
    def __dlpack__(self, *, stream):
        raise BufferError("not today")


B, A = Fake((6, 2)), Fake((2, 5), BFLOAT, 16)
SMALL = 256 + 256 + 2 * 2 * 256 * 4  # tables of 2 deltas; a tile of 256 words, twice of each


def call(cuda, factors=None, **changed):
    arguments = {
        "factors": [(B, A, 1.0), (B, A, -2.0)] if factors is None else factors,
        "counts": Fake((2, 2, 2), INT, 64), "bad": Fake((1,), INT, 64),
        "workspace": Fake((SMALL,), UINT, 8), "stream": 0, **changed,
    }  # fmt: skip
    cuda.sign_pairs(**arguments)


WRONG = {
    "factors: expected 1 to 2^20 of them": {"factors": []},
    "factors[0]: expected (B, A, scale)": {"factors": [(B, A)]},
    "factors[1]: the scale is not finite": {"factors": [(B, A, 1.0), (B, A, np.nan)]},
    "factors[0]: B: expected a CUDA tensor": {"factors": [(np.ones((6, 2)), A, 1.0)]},
    "factors[0]: A: expected a CUDA tensor (an object with __dlpack__)": {
        "factors": [(B, [[1.0]], 1.0)]
    },
    "factors[0]: A: not today": {"factors": [(B, Unwilling((2, 5)), 1.0)]},
    "factors[0]: B: expected 2 dimensions, got 1": {"factors": [(Fake((6,)), A, 1.0)]},
    "factors[0]: B: expected float32, bfloat16, float16 or float64": {
        "factors": [(Fake((6, 2), INT, 32), A, 1.0)]
    },
    "factors[0]: B has 3 columns, A 2 rows": {"factors": [(Fake((6, 3)), A, 1.0)]},
    "factors[0]: not a matrix": {"factors": [(Fake((0, 2)), A, 1.0)]},
    "factors[1]: delta is 7 x 5, expected 6 x 5": {
        "factors": [(B, A, 1.0), (Fake((7, 2)), A, 1.0)]
    },
    "factors[1]: B: lies on another device than counts": {
        "factors": [(B, A, 1.0), (Fake((6, 2), device=(2, 1)), A, 1.0)]
    },
    "counts: expected int64": {"counts": Fake((2, 2, 2))},
    "counts: expected 3 dimensions, got 2": {"counts": Fake((2, 2), INT, 64)},
    "counts: expected a size of 2 along axis 2, got 3": {"counts": Fake((2, 2, 3), INT, 64)},
    "counts: expected contiguous memory": {
        "counts": Fake((2, 2, 2), INT, 64, strides=(8, 4, 2))
    },
    "bad: expected a size of 1 along axis 0, got 2": {"bad": Fake((2,), INT, 64)},
    "bad: lies on another device than counts": {"bad": Fake((1,), INT, 64, device=(2, 1))},
    "workspace: expected uint8": {"workspace": Fake((SMALL,), INT, 64)},
    f"workspace: expected at least {SMALL} bytes, got 64": {"workspace": Fake((64,), UINT, 8)},
    "workspace: expected memory aligned to 16 bytes": {
        "workspace": Fake((SMALL,), UINT, 8, data=4100)
    },
    "engine: expected 'auto', 'popcount' or 'matrix', got 'x'": {"engine": "x"},
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_arguments_are_refused_by_name(cuda, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(cuda, **WRONG[text])
    assert str(caught.value) == text


def test_a_workspace_is_as_large_as_allowed_and_large_enough(cuda):
    whole = cuda.sign_workspace(2, 64, 1280, 1 << 40)
    assert cuda.sign_workspace(2, 64, 1280, whole) == whole == SMALL + 9 * 4096
    assert cuda.sign_workspace(2, 64, 1280, whole - 1) == whole - 4096
    assert cuda.sign_workspace(2, 6, 5, 0) == SMALL
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 2**31)):
        with pytest.raises(ValueError, match=r"^(n: expected 1 to|d_out: not a matrix)"):
            cuda.sign_workspace(*wrong, 0)


def test_without_a_gpu_a_launch_raises_one_clear_error(cuda):
    try:
        cuda.devices()
    except BackendError as error:
        why = str(error)
    else:
        pytest.skip("there is a GPU, or a driver")
    assert re.fullmatch(r"cudaGetDeviceCount: .+", why)
    with pytest.raises(BackendError, match=r"^cuda(GetDevice|SetDevice): ") as caught:
        call(cuda)
    assert str(caught.value).partition(": ")[2] == why.partition(": ")[2]


def test_the_doctor_says_what_it_was_built_with_and_why_it_cannot_run(cuda):
    facts = examine()
    built, backend = facts["cuda_build"], facts["backends"]["cuda"]
    assert re.fullmatch(r"\d+\.\d", built["toolkit"]) and built["architectures"]
    assert f"CUDA {built['toolkit']}, for {built['architectures']}; " in backend["why"]
    if not backend["ok"]:
        assert "cudaGetDeviceCount: " in backend["why"] or "no device" in backend["why"]


def test_the_doctor_says_that_the_module_is_absent(monkeypatch):
    monkeypatch.setattr(_native, "_cuda", None)
    monkeypatch.setitem(sys.modules, "mergeprobe_fast._cuda", None)
    monkeypatch.delattr("mergeprobe_fast._cuda", raising=False)
    facts = examine()
    assert facts["ok"] and "cuda_build" not in facts
    assert re.match(r"the compiled module mergeprobe_fast\._cuda is not there", why(facts))
    with pytest.raises(BackendError, match="_cuda is not there"):
        sign_conflicts([(np.ones((6, 2)), np.ones((2, 5)), 1.0)], backend="cuda")


def why(facts):
    return facts["backends"]["cuda"]["why"]


def test_the_operation_wants_tensors_on_a_device(cuda):
    for factors, text in [
        ([], "factors: backend 'cuda' needs a list of (B, A, scale)"),
        ([(1, 2)], "factors[0]: expected (B, A, scale)"),
        ([(np.ones((6, 2)), np.ones((2, 5)), "x")], "factors[0]: the scale is not a number"),
        (
            [(np.ones((6, 2)), np.ones((2, 5)), 1.0)],
            "factors[0]: backend 'cuda' needs torch tensors on a CUDA device",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            sign_conflicts(factors, backend="cuda")
        assert str(caught.value) == text


SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_no_kernel_spills_registers(architecture, tmp_path):
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if not nvcc:
        pytest.skip("needs nvcc")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v",
         f"-I{REPO / 'csrc' / 'include'}", "-cubin", str(REPO / "csrc" / "cuda" / "signs.cu"),
         "-o", str(tmp_path / "signs.cubin")],
        capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    found = SPILLS.findall(said)
    assert len(found) == 4 and set(found) == {("0", "0", "0")}, said
    # Two blocks of 256 threads share the 65536 registers of a multiprocessor.
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", said)) <= 128
