"""P3, canonical: against a dense SVD of the materialised delta in float64, and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import bound

from mergeprobe_fast import InputError
from mergeprobe_fast.ops import canonical, reference
from mergeprobe_fast.ops.canonical import NOISE, RELATIVE


def wide(x):
    return reference.float64(x)


def normal(rng, *shape):
    return rng.standard_normal(shape)


def mixed(rng, r, d, condition):
    """(r, d) rows whose ill-conditioning no scaling of rows removes."""
    left, _ = np.linalg.qr(normal(rng, r, r))
    right, _ = np.linalg.qr(normal(rng, d, r))
    return (left * np.geomspace(1, 1 / condition, r)) @ right.T


def near(rng, distance):
    """Three pairs of rows that differ by ``distance``; b cancels them, so the difference counts."""
    a = np.repeat(normal(rng, 3, 40), 2, axis=0)
    a[1::2] += distance * normal(rng, 3, 40)
    b = np.repeat(normal(rng, 30, 3), 2, axis=1)
    b[:, 1::2] *= -1
    return [(b, a, 1.0)]


def ragged(rng):
    parts = ((3, 2.0), (0, 1.0), (1, 5.0), (8, 1.0))
    return [(normal(rng, 30, r), normal(rng, r, 40), s) for r, s in parts]


def cancelling(rng, left_over):
    """Two large adapters that cancel exactly, and ``left_over`` directions that do not."""
    b, a = normal(rng, 30, 6), normal(rng, 6, 40)
    rest = normal(rng, 30, left_over), normal(rng, left_over, 40)
    return [(b, a, 0.3), (*rest, -2.0), (b, a, -0.3)]


def equal_values(rng):
    b, _ = np.linalg.qr(normal(rng, 30, 7))
    a, _ = np.linalg.qr(normal(rng, 40, 7))
    return [(b * [3, 3, 3, 2, 2, 1, 1], a.T, 1.0)]


def one(b, a, scale=0.7):
    return [(b, a, scale)]


def graded(rng, most):
    """Units of the same size whose share of it lies in b or in a, from 1/most to most."""
    steps = np.geomspace(1 / most, most, 9)
    return one(normal(rng, 30, 9) * steps, normal(rng, 9, 40) / steps[:, None])


CASES = {
    "plain": lambda g: one(normal(g, 30, 5), normal(g, 5, 40)),
    "rank_1": lambda g: one(normal(g, 30, 1), normal(g, 1, 40)),
    "one_by_one": lambda g: one(normal(g, 1, 3), normal(g, 3, 1)),
    "d_out_1": lambda g: one(normal(g, 1, 4), normal(g, 4, 40)),
    "d_in_1": lambda g: one(normal(g, 30, 4), normal(g, 4, 1)),
    "d_below_rank": lambda g: one(normal(g, 6, 20), normal(g, 20, 9)),
    "across_chunks": lambda g: one(normal(g, 515, 3), normal(g, 3, 257)),
    "negative_scale": lambda g: one(normal(g, 30, 5), normal(g, 5, 40), -3.0),
    "zero_scale": lambda g: one(normal(g, 30, 5), normal(g, 5, 40), 0.0),
    "deficient_b": lambda g: one(normal(g, 30, 2) @ normal(g, 2, 6), normal(g, 6, 40)),
    "deficient_a": lambda g: one(normal(g, 30, 6), normal(g, 6, 2) @ normal(g, 2, 40)),
    "zero_b": lambda g: one(np.zeros((30, 5)), normal(g, 5, 40)),
    "zero_a": lambda g: one(normal(g, 30, 5), np.zeros((5, 40))),
    "dead_units": lambda g: one(
        normal(g, 30, 5) * [1, 0, 1, 1, 1], normal(g, 5, 40) * [[1], [1], [0], [1], [0]]
    ),
    "product_is_zero": lambda g: one(
        np.hstack([normal(g, 30, 2), np.zeros((30, 2))]),
        np.vstack([np.zeros((2, 40)), normal(g, 2, 40)]),
    ),
    "duplicated_rows": lambda g: one(normal(g, 30, 6), np.repeat(normal(g, 3, 40), 2, axis=0)),
    "near_duplicates_1e-4": lambda g: near(g, 1e-4),
    "near_duplicates_1e-6": lambda g: near(g, 1e-6),
    "graded": lambda g: graded(g, 100.0),
    "graded_steeply": lambda g: graded(g, 1e8),
    "graded_b_only": lambda g: one(normal(g, 30, 9) * np.geomspace(1e-8, 1e8, 9), normal(g, 9, 40)),
    **{
        f"mixed_{side}_1e{k}": lambda g, k=k, side=side: one(
            mixed(g, 12, 30, 10.0**k if side == "b" else 2).T,
            mixed(g, 12, 40, 10.0**k if side == "a" else 2),
        )
        for k in (2, 3, 4, 5, 6)
        for side in "ab"
    },
    "both_ill_conditioned": lambda g: one(mixed(g, 12, 30, 1e3).T, mixed(g, 12, 40, 1e3)),
    "equal_values": equal_values,
    "sum_ragged": ragged,
    "sum_negative": lambda g: [(normal(g, 30, 4), normal(g, 4, 40), s) for s in (1, -2, 0.5)],
    "sum_more_than_d": lambda g: [(normal(g, 9, 4), normal(g, 4, 40), 1 / i) for i in range(1, 6)],
    "sum_cancels_to_0": lambda g: cancelling(g, 0),
    "sum_cancels_to_2": lambda g: cancelling(g, 2),
    "rank_64": lambda g: one(normal(g, 80, 64), normal(g, 64, 90)),
    "rank_128": lambda g: one(normal(g, 130, 128), normal(g, 128, 129)),
}
RANKS = {
    "zero_scale": 0, "deficient_b": 2, "deficient_a": 2, "zero_b": 0, "zero_a": 0, "dead_units": 2,
    "product_is_zero": 0, "duplicated_rows": 3, "near_duplicates_1e-4": 3,
    "near_duplicates_1e-6": 3,
    "graded": 9, "one_by_one": 1, "d_out_1": 1, "d_below_rank": 6, "sum_ragged": 12,
    "sum_more_than_d": 9, "sum_cancels_to_0": 0, "sum_cancels_to_2": 2, "rank_128": 128,
    "equal_values": 7,
}  # fmt: skip


class Truth:
    """The delta as a matrix, its SVD and the size that roundings are relative to."""

    def __init__(self, factors, relative=RELATIVE, noise=NOISE):
        self.delta = sum(s * (wide(b) @ wide(a)) for b, a, s in factors)
        self.u, self.sigma, self.vt = np.linalg.svd(self.delta, full_matrices=False)
        b = np.hstack([s * wide(b) for b, _, s in factors])
        a = np.vstack([wide(a) for _, a, _ in factors])
        self.size = np.linalg.norm(b) * np.linalg.norm(a)
        self.units = np.linalg.norm(np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1))
        self.floor = max(relative * self.sigma[0], noise * self.units)

    def ranks(self):
        """The rank that the rule gives, and how many values are too close to it to say."""
        rank = int((self.sigma > max(self.floor, 0)).sum())
        close = (self.sigma > self.floor / 1.01) & (self.sigma < self.floor * 1.01)
        return rank, int(close.sum()) if self.floor else 0

    def check(self, got, max_rank=None):
        """Every promise of a Canonical."""
        k, slack = got.rank, bound("sigma") * self.size
        rank, close = self.ranks()
        wanted = rank if max_rank is None else min(rank, max_rank)
        assert abs(k - wanted) <= close
        assert got.left.shape == (k, self.delta.shape[0])
        assert got.right.shape == (k, self.delta.shape[1])
        n = min(len(got.sigma), len(self.sigma))
        assert np.abs(got.sigma[:n] - self.sigma[:n]).max(initial=0) <= slack
        assert (np.diff(got.sigma) <= 0).all() and (got.sigma >= 0).all()
        for side in (got.left, got.right):
            assert np.abs(side @ side.T - np.eye(k)).max(initial=0) <= bound("orthonormal")
        rest = np.linalg.norm(self.sigma[k:])
        error = np.linalg.norm(self.rebuilt(got) - self.delta)
        assert error <= rest * (1 + 1e-6) + slack
        self.check_spaces(got, slack)

    @staticmethod
    def rebuilt(got):
        return got.left.T @ (got.sigma[: got.rank, None] * got.right)

    def check_spaces(self, got, slack):
        """Projectors on the leading components, wherever a gap makes them well defined."""
        ends = np.append(self.sigma, 0.0)
        for k in range(1, got.rank + 1):
            gap = ends[k - 1] - ends[k]
            if gap < 1e-3 * ends[0]:
                continue
            # Wedin: the subspace turns by the perturbation over the gap.
            allowed = 2 * bound("orthonormal") * k**0.5 + 4 * slack / gap
            for mine, true in ((got.left, self.u.T), (got.right, self.vt)):
                off = mine[:k].T @ mine[:k] - true[:k].T @ true[:k]
                assert np.linalg.norm(off, 2) <= allowed, f"space of the first {k}"


@pytest.mark.parametrize("case", CASES)
def test_against_dense_svd(rng, isa, case):
    factors = CASES[case](rng)
    got = canonical(factors)
    Truth(factors).check(got)
    if case in RANKS:
        assert got.rank == RANKS[case]
    ref = reference.canonical(factors)
    truth = Truth(factors)
    assert abs(got.rank - ref.rank) <= truth.ranks()[1]
    n = min(len(ref.sigma), len(got.sigma))
    off = np.abs(ref.sigma[:n] - got.sigma[:n]).max(initial=0)
    assert off <= 2 * bound("sigma") * truth.size


def test_cores_of_low_rank_converge(rng, isa):
    """Dead units of B and others of A leave columns of pure rounding to the Jacobi iteration."""
    for _ in range(60):
        b, a = normal(rng, 64, 8).astype("f4"), normal(rng, 8, 48).astype("f4")
        b[:, 1:4], a[4:6] = 0, 0
        assert canonical([(b, a, 1.0)]).rank == 3
        assert canonical([(b, a, 1.0), (b, a, 0.5)]).rank == 3


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("near", "rank_"))])
def test_reference_against_dense_svd(rng, case):
    factors = CASES[case](rng)
    Truth(factors).check(canonical(factors, backend="reference"))


DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["torch", "torch_transposed", "numpy", "numpy_transposed"])
def test_dtypes_and_layouts(rng, isa, library, dtype):
    b, a = (torch.from_numpy(normal(rng, *s)).to(DTYPES[dtype]) for s in ((33, 6), (6, 45)))
    if library.endswith("transposed"):
        b, a = (x.t().contiguous().t() for x in (b, a))
    if library == "torch":
        b.requires_grad_()
    if library.startswith("numpy") and dtype != "bfloat16":
        b, a = b.numpy(), a.numpy()
    before = wide(b).copy(), wide(a).copy()
    Truth([(b, a, 0.7)]).check(canonical([(b, a, 0.7)]))
    assert np.array_equal(wide(b), before[0]) and np.array_equal(wide(a), before[1])


STRIDED = {
    "column_step": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "row_step": lambda x: np.repeat(x, 2, axis=0)[::2],
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "big_endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "record_field": lambda x: np.rec.fromarrays([x, x.astype("f4")], names="x,y")["x"],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(rng, isa, layout):
    b, a = normal(rng, 30, 5), normal(rng, 5, 40)
    got = canonical([(STRIDED[layout](b), STRIDED[layout](a), 1.0)])
    Truth([(b, a, 1.0)]).check(got)


@pytest.mark.parametrize("keep", [0, 1, 3, 100])
def test_max_rank(rng, isa, keep):
    factors = CASES["plain"](rng)
    got = canonical(factors, max_rank=keep)
    Truth(factors).check(got, max_rank=keep)
    assert len(got.sigma) == 5 and got.rank == min(keep, 5)


@pytest.mark.parametrize("relative", [1e-1, 1e-3])
def test_rank_rule(rng, isa, relative):
    u, _ = np.linalg.qr(normal(rng, 30, 6))
    v, _ = np.linalg.qr(normal(rng, 40, 6))
    b = u * [1, 0.5, 0.11, 0.09, 0.0011, 0.0009]
    assert canonical([(b, v.T, 1.0)], relative=relative).rank == (3 if relative == 1e-1 else 5)
    # The second rule: relative to the factors, however small the delta itself is.
    loud = [(b, v.T, 1.0), (u, v.T, 1e4), (u, v.T, -1e4)]
    size = Truth(loud).units  # 1.5e5: noise * size is 1.5e-4, 1.5e-3 and 0.15
    ranks = [canonical(loud, relative=0.0, noise=x / size).rank for x in (1.5e-4, 1.5e-3, 0.15)]
    assert ranks == [6, 4, 2]


def test_rank_does_not_depend_on_the_scaling_of_units(rng, isa):
    assert canonical(graded(rng, 1e8)).rank == 9, "delta of norm 50 counted as zero"


@pytest.mark.parametrize("sizes", [(1e15, 1e-15), (1e-18, 1e-18), (1e18, 1e18)])
def test_scale_of_the_factors(rng, isa, sizes):
    b, a = (x.astype(np.float32) for x in (normal(rng, 30, 5), normal(rng, 5, 40)))
    plain = canonical([(b, a, 1.0)])
    got = canonical([(b * np.float32(sizes[0]), a * np.float32(sizes[1]), 1.0)])
    assert got.rank == 5
    np.testing.assert_allclose(got.sigma, plain.sigma * sizes[0] * sizes[1], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-170, 1e160])
def test_float64_factors_whose_squares_leave_float64(rng, size):
    b, a = normal(rng, 30, 5), normal(rng, 5, 40)
    got = canonical([(b * size, a / size, 1.0)])
    np.testing.assert_allclose(got.sigma, canonical([(b, a, 1.0)]).sigma, rtol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["B", "A"])
def test_not_finite_names_the_factor(rng, isa, which, bad):
    factors = [(normal(rng, 30, 3), normal(rng, 3, 40), 1.0) for _ in range(3)]
    factors[1]["BA".index(which)][-1, -1] = bad
    with pytest.raises(InputError) as caught:
        canonical(factors)
    assert str(caught.value) == f"factors[1]: {which} holds NaN or infinite values"


def test_gauge_invariance(rng, isa):
    b, a = mixed(rng, 5, 30, 4).T, mixed(rng, 5, 40, 4)
    m = mixed(rng, 5, 5, 50)
    one, two = canonical([(b, a, 1.0)]), canonical([(b @ np.linalg.inv(m), m @ a, 1.0)])
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=bound("exact_algebra"))
    for x, y in ((one.left, two.left), (one.right, two.right)):
        assert np.abs(x.T @ x - y.T @ y).max() <= bound("projector")
        assert np.abs(x.T @ x - y[1:].T @ y[1:]).max() > bound("projector")
    wrong = canonical([(b, m @ a, 1.0)]).sigma
    assert np.abs(wrong / one.sigma - 1).max() > bound("exact_algebra")


def test_repeated_calls_and_threads_give_the_same_bytes(rng, isa, monkeypatch):
    factors = CASES["sum_ragged"](rng)
    first = canonical(factors)
    for threads in ("1", "3"):
        monkeypatch.setenv("MERGEPROBE_THREADS", threads)
        again = canonical(factors)
        for x, y in zip(first[:3], again[:3], strict=True):
            assert x.tobytes() == y.tobytes()


FAULTS = {
    "sigma_off_by_1e-10": lambda c: c._replace(sigma=c.sigma * (1 + 1e-10)),
    "weakest_dropped": lambda c: c._replace(
        left=c.left[:-1], right=c.right[:-1], rank=c.rank - 1
    ),
    "one_row_not_unit": lambda c: c._replace(left=c.left * (1 + 1e-7)),
    "one_sign_flipped": lambda c: c._replace(left=c.left * np.r_[-1, np.ones(c.rank - 1)][:, None]),
    "two_vectors_swapped": lambda c: c._replace(
        left=c.left[[1, 0, *range(2, c.rank)]], right=c.right[[1, 0, *range(2, c.rank)]]
    ),
    "rounded_to_float32": lambda c: c._replace(left=c.left.astype(np.float32).astype(float)),
    "rank_off_by_one": lambda c: c._replace(rank=c.rank - 1),
    "sides_of_another_gauge": lambda c: c._replace(right=c.right[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_catches(rng, fault):
    factors = CASES["plain"](rng)
    good = canonical(factors)
    Truth(factors).check(good)
    with pytest.raises(AssertionError):
        Truth(factors).check(FAULTS[fault](good))
