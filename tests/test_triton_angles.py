"""Statistics of pairs on a device: the kernels in Triton's interpreter, and torch on CPU tensors,
against LAPACK on the SVDs of materialised deltas."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

import device_angles_child  # noqa: E402
from tolerances import bound  # noqa: E402
from triton_child import child  # noqa: E402

from mergeprobe_fast.kernels.pair_angles import PairAngles  # noqa: E402
from mergeprobe_fast.ops.angles import LEAST_SQUARE, STATISTICS, Form, pair_statistics  # noqa: E402

pytestmark = pytest.mark.triton
P, Q, TOP = 90, 80, 3
SQUARE = 1e-14  # error of the square of a cosine


@pytest.fixture(scope="module")
def interpreter():
    """``call(factors, fault=..., **options)``: `statistics` of the child, and its ranks."""
    with child(device_angles_child.__file__) as ask:

        def call(factors, fault=None, sizes=None, **options):
            given = dict(zip("UV", factors, strict=True), top=TOP) | options
            rank, found = ask(("statistics", given, fault, sizes or {}))
            return rank, found.numpy()

        yield call


def draw(rng, ranks):
    """Factors of random deltas, an entry each: U (rank, P), V (rank, Q)."""
    return [[torch.tensor(rng.standard_normal((r, d))) for r in ranks] for d in (P, Q)]


def form(u, v):
    left, sigma, right = np.linalg.svd(u.numpy().T @ v.numpy())
    k = int((sigma > 1e-6 * sigma[0]).sum()) if sigma.any() else 0
    return Form(left[:, :k], sigma[:k], right[:k].T)


def check(factors, rank, found, first, second=None, allowed=1):
    """Names of statistics that are off; of every module, row by row."""
    forms = [form(u, v) for u, v in zip(*factors, strict=True)]
    assert rank.tolist() == [len(f.sigma) for f in forms]
    off, at = set(), 0
    for m, (a, b) in enumerate(first):
        for i in range(a, b):
            for j in range(*((i + 1, b) if second is None else second[m])):
                got, at = found[:, at], at + 1
                one, two = forms[i], forms[j]
                if not (len(one.sigma) and len(two.sigma)):
                    assert not got.any()
                    continue
                want = pair_statistics(one, two, TOP)
                # Squares of cosines err, and sums of products by that of what they are sums of.
                size = np.maximum(1.0, np.abs(want))
                top = max(one.sigma[0], two.sigma[0])
                size[[8, 19, *range(22, 29), 33]] = top**2
                size[29:33] = top
                error = np.abs(got - want) - allowed * bound("angles") * size
                for side, x in (("row", one.v.T @ two.v), ("col", one.u.T @ two.u)):
                    square = np.linalg.svd(x)[1].min() ** 2
                    error[STATISTICS.index(f"{side}_logs")] -= (
                        len(x) * SQUARE / max(square, LEAST_SQUARE)
                    )
                off |= {n for n, e in zip(STATISTICS, error, strict=True) if not e <= 0}
    assert at == found.shape[1]
    return off


def test_kernels_on_ranks_of_two_classes(rng, interpreter):
    factors = draw(rng, [3, 8, 5, 2, 12])
    factors[0][1][:2], factors[1][1][:2] = factors[0][0][:2], factors[1][0][:2]
    factors[0][3].zero_()
    first = [(0, 2), (2, 5), (1, 2)]
    rank, found = interpreter(factors, first=first, second=None, backend="triton")
    assert not check(factors, rank, found, first)


def test_kernels_on_copies_and_two_stacks(rng, interpreter):
    factors = draw(rng, [4, 4, 9])
    for side, factor in zip(factors, (-2.0, 1.0), strict=True):
        side[1] = side[0] * factor
    options = {"first": [(0, 1)], "second": [(1, 3)]}
    rank, found = interpreter(factors, backend="triton", **options)
    assert not check(factors, rank, found, **options)


def test_one_sweep_is_noticed(rng, interpreter):
    factors = draw(rng, [7, 8])
    options = {"first": [(0, 2)], "second": None, "backend": "triton"}
    _, found = interpreter(factors, fault="one sweep", **options)
    assert np.isnan(found).all()  # it is known not to have converged


@pytest.mark.parametrize("fault", device_angles_child.FAULTS)
def test_faults_of_the_rest_are_noticed(rng, interpreter, fault):
    factors = draw(rng, [3, 8, 5])
    options = {"first": [(0, 3)], "second": None, "backend": "torch"}
    rank, found = interpreter(factors, fault=fault, **options)
    assert check(factors, rank, found, [(0, 3)], allowed=1000)


RANKS = [3, 8, 0, 16, 9, 33, 5, 40, 60, 16, 1, 8]
MODULES = {
    "pairs of one stack": ([(0, 5), (5, 5), (5, 9), (9, 12)], None),
    "pairs of two": ([(0, 3), (5, 7), (9, 9)], [(3, 5), (7, 12), (0, 5)]),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bytes_at_once", [None, 8 * 16 * 32**2 * 2, 1])
def test_torch_on_every_class_of_ranks(rng, interpreter, name, bytes_at_once):
    factors, (first, second) = draw(rng, RANKS), MODULES[name]
    rank, found = interpreter(
        factors, first=first, second=second, backend="torch", bytes_at_once=bytes_at_once
    )
    assert not check(factors, rank, found, first, second)


def test_no_pairs_and_other_backends():
    compute = PairAngles(torch.device("cpu"), TOP)
    assert compute(None, np.zeros(0, np.int64), [(0, 0), (3, 4)]).shape == (len(STATISTICS), 0)
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton', got 'cuda'"):
        PairAngles(torch.device("cpu"), TOP, backend="cuda")
