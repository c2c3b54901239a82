"""``ops.canonical`` and ``ops.singular_values`` of a device, in torch on CPU tensors."""

from __future__ import annotations

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device kernels take torch tensors")
from test_canonical import CASES, RANKS, Truth  # noqa: E402
from triton_child import DEVICE  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast import ops  # noqa: E402


def there(factors):
    return [(torch.from_numpy(np.asarray(b)).to(DEVICE), torch.from_numpy(np.asarray(a)).to(DEVICE),
             s) for b, a, s in factors]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sums_of_factors_against_dense_svd(rng, case):
    factors = CASES[case](rng)
    got = ops.canonical(there(factors), backend="triton")
    Truth(factors).check(got)
    assert got.rank == RANKS.get(case, got.rank)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in got[:3])


def test_max_rank_and_half_precision(rng):
    b, a = (torch.tensor(rng.standard_normal(s)).bfloat16().to(DEVICE) for s in ((30, 6), (6, 20)))
    got = ops.canonical([(b, a, -2.0)], backend="triton", max_rank=2)
    want = ops.canonical([(b.cpu(), a.cpu(), -2.0)], backend="cpu", max_rank=2)
    assert got.rank == want.rank == 2 and len(got.sigma) == len(want.sigma) == 6
    np.testing.assert_allclose(got.sigma, want.sigma, rtol=1e-12)
    assert np.abs(np.abs((got.left * want.left).sum(1)) - 1).max() < 1e-12
    np.testing.assert_allclose(got.left.T @ got.right, want.left.T @ want.right, atol=1e-12)


@pytest.mark.parametrize(("change", "match"), [
    (lambda f: [], "at least one"),
    (lambda f: [(f[0][0].numpy(), f[0][1], 1.0)], r"factors\[0\]: expected \(B, A, scale\)"),
    (lambda f: [f[0], (f[0][0][:, :2], f[0][1], 1.0)], r"factors\[1\]: B .* do not chain"),
    (lambda f: [f[0], (f[0][0][:5], f[0][1], 1.0)], r"factors\[1\]: delta is 5 x 7, expected 9 x"),
    (lambda f: [(*f[0][:2], float("inf"))], r"factors\[0\]: scale is inf"),
    (lambda f: [(f[0][0].int(), f[0][1], 1.0)], r"factors\[0\]: expected floats"),
    (lambda f: [f[0], (f[0][0] * torch.inf, f[0][1], 1.0)], r"factors\[1\]: B holds NaN"),
    (lambda f: [(f[0][0], f[0][1] * torch.nan, 1.0)], r"factors\[0\]: A holds NaN"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_errors_name_the_factor(change, match):
    factors = [(torch.ones(9, 3), torch.ones(3, 7), 0.5)]
    with pytest.raises(mpf.InputError, match=match):
        ops.canonical(change(factors), backend="triton")


def test_auto_takes_the_cpu_for_what_lies_there(rng, monkeypatch):
    def never(*arguments):
        raise AssertionError

    # By its name: the package has a function that is called as its module is.
    monkeypatch.setattr(sys.modules["mergeprobe_fast.ops.canonical"], "canonical_on_device", never)
    b, a = torch.tensor(rng.standard_normal((8, 2))), torch.tensor(rng.standard_normal((2, 5)))
    assert ops.canonical([(b, a, 1.0)]).rank == 2
    with pytest.raises(mpf.InputError, match="backend: expected 'auto', 'cpu', 'triton'"):
        ops.canonical([(b, a, 1.0)], backend="gpu")


@pytest.mark.parametrize("shape", [(50, 8, 8), (7, 40, 5), (3, 1, 9), (0, 4, 4), (5, 70, 66)])
def test_singular_values_of_the_device(rng, shape):
    from mergeprobe_fast.ops import angles

    x = torch.tensor(rng.standard_normal(shape))
    got = angles._on_device(x.to(DEVICE))
    want = np.linalg.svd(x.numpy(), compute_uv=False) if shape[0] else np.zeros((0, 4))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-12 * max(1.0, want.max(initial=0)))
    if shape[0]:
        x[0, 0, 0] = torch.nan
        with pytest.raises(mpf.InputError, match="matrices: holds NaN"):
            angles._on_device(x.to(DEVICE))
    with pytest.raises(mpf.InputError, match="expected 3 dimensions"):
        angles._on_device(x[0] if shape[0] else x.reshape(0, 4))
