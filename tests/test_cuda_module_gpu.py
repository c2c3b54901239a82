"""Sign statistics on a GPU: the CPU's counts to the last entry. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from mergeprobe_fast import BackendError, _native
from mergeprobe_fast.ops import NotFinite, sign_conflicts
from mergeprobe_fast.ops.entries_cuda import sign_counts

torch = pytest.importorskip("torch", reason="factors on a GPU are torch tensors")
from sign_cases import FUSED, as_cpu, cancelling, mixed  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
try:
    _native.cuda()
except BackendError as absent:
    pytest.skip(str(absent), allow_module_level=True)

ENGINES = ("popcount", "matrix", "auto")


def on_device(factors, device="cuda"):
    """The same memory layout there; uint16 holds the bits of bfloat16."""

    def moved(x):
        base = x if x.base is None else x.base
        whole = torch.from_numpy(np.ascontiguousarray(base).reshape(-1)).to(device)
        if base.flags.f_contiguous and not base.flags.c_contiguous:
            whole = torch.from_numpy(base.T.reshape(-1).copy()).to(device)
        if x.dtype == np.uint16:
            whole = whole.view(torch.bfloat16)
        return whole.as_strided(x.shape, [s // x.itemsize for s in x.strides])

    return [(moved(b), moved(a), scale) for b, a, scale in factors]


CASES = {
    "one entry": ((1, 1), [1, 2], False),
    "one row": ((1, 300), [2, 3, 1], True),
    "one column": ((130, 1), [2, 0, 1], False),
    "ragged, with zeros": ((515, 770), [3, 16, 17, 1, 40, 64, 0], True),
    "ragged": ((515, 770), [3, 16, 17, 1, 40, 64, 5], False),
    "several tiles of pairs": ((70, 130), [1 + i % 9 for i in range(300)], False),
    "several, with zeros": ((70, 130), [1 + i % 9 for i in range(129)], True),
    "large": ((2048, 4096), [16] * 12, False),
}  # fmt: skip


@pytest.mark.skipif(not FUSED, reason="no instruction set here has fused multiply-adds")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_counts_are_the_cpu_s_to_the_last_one(rng, monkeypatch, case, engine):
    shape, ranks, zeros = CASES[case]
    factors = mixed(rng, *shape, ranks, zeros=zeros)
    conflicts, both = as_cpu(factors, monkeypatch, FUSED[0])
    given = on_device(factors)
    for workspace in (1 << 29, 1):  # in one slab, and a tile at a time
        found = sign_counts(given, engine=engine, workspace=workspace)
        np.testing.assert_array_equal(found[0], conflicts)
        np.testing.assert_array_equal(found[1], both)


@pytest.mark.skipif(not FUSED, reason="no instruction set here has fused multiply-adds")
def test_what_rounding_leaves_is_the_same(rng, monkeypatch):
    """Fused multiply-adds in the order of the rank, and nothing flushed to zero."""
    factors = cancelling(rng, 300, 500, 6)
    want = as_cpu(factors, monkeypatch, FUSED[0])
    found = sign_counts(on_device(factors))
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_array_equal(found[1], want[1])


def test_the_public_function_on_another_stream(rng):
    factors = mixed(rng, 200, 333, [4, 16, 5])
    want = sign_counts(on_device(factors))
    with torch.cuda.stream(torch.cuda.Stream()):
        given = on_device(factors)
        share = sign_conflicts(given, backend="cuda")
    np.testing.assert_array_equal(np.triu(share, 1), np.triu(want[0] / np.maximum(want[1], 1), 1))
    np.testing.assert_array_equal(share, share.T)


def test_a_launch_waits_for_nothing():
    """Work that was queued before is still running when the call returns."""
    factors = on_device(mixed(np.random.default_rng(0), 64, 128, [4, 4]))
    module = _native.cuda()
    counts = torch.empty((2, 2, 2), dtype=torch.int64, device="cuda")
    bad = torch.empty(1, dtype=torch.int64, device="cuda")
    space = torch.empty(module.sign_workspace(2, 64, 128, 0), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream()
    given = (factors, counts, bad, space, stream.cuda_stream)
    module.sign_pairs(*given)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    module.sign_pairs(*given)
    assert not stream.query()
    torch.cuda.synchronize()


def test_a_factor_that_is_not_finite_is_named(rng):
    b, a = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((70, 17), (17, 130)))
    wrong = a.clone()
    wrong[16, 129] = torch.nan
    with pytest.raises(NotFinite) as caught:
        sign_conflicts([(b, a, 1.0), (b, wrong, 1.0)], backend="cuda")
    assert (caught.value.segment, caught.value.side) == (1, "A")


def test_the_wrong_device_is_refused(rng):
    b, a = torch.randn(6, 2), torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"^factors\[1\]: B: expected a CUDA tensor$"):
        sign_conflicts([(b.cuda(), a.cuda(), 1.0), (b, a, 1.0)], backend="cuda")
