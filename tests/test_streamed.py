"""P1 over the entries of dense matrices: its sums, what they depend on, and where it is taken."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from test_features import differences, expected
from tolerances import bound, streamed_bound

import mergeprobe_fast as mpf
from mergeprobe_fast import _native
from mergeprobe_fast.engine import p1
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE, MATRIX, address

NEVER, WHERE_IT_PAYS, ALWAYS = 0, 1, 2
# (product, row weight, column weight): what the features read, and every other kind.
EPILOGUES = [
    (0, 0, 0), (2, -1, -1), (2, 1, 1), (2, 1, -1), (1, -1, -1), (1, 1, 1), (1, 1, -1), (1, -1, 1),
    (0, -1, 1), (0, 0, -1), (2, 0, 1),
]  # fmt: skip
# name: (ranks, p, q); a tile is 32 x 192, a panel has up to 16 blocks, a k-block 128 ranks.
SHAPES = {
    "ragged_ranks": ((40, 0, 3, 17, 1, 25, 60), 65, 33),
    "two_tiles_of_blocks": ((3, 1, 0, 5) * 55, 7, 9),
    "ranks_of_two_k_blocks": ((130, 4, 257), 300, 40),
    "many_tiles_a_side": ((70, 9), 210, 430),
    "one_row": ((4, 1), 1, 70),
    "one_column": ((4, 1), 70, 1),
    "one_block": ((6,), 20, 20),
    "only_empty_blocks": ((0, 0), 5, 6),
    "no_blocks": ((), 5, 6),
    "exactly_one_panel": ((2,) * 16, 16, 48),
}


def entries_of(product, stack):
    """Entries of a dense matrix."""
    return {0: stack.p * stack.q, 1: stack.p**2, 2: stack.q**2}[product]


class Stack:
    """Blocks of one module whose factors lie as canonical ones do, and two vectors of weights."""

    def __init__(self, rng, ranks, p, q, dtype=np.float32):
        self.ranks, self.p, self.q = list(ranks), p, q
        self.u = [rng.standard_normal((p, r)).astype(dtype) for r in ranks]
        self.v = [rng.standard_normal((q, r)).astype(dtype) for r in ranks]
        # Spectra over six orders of magnitude.
        sigma = [10.0 ** -np.sort(rng.uniform(0, 6, r)) for r in ranks]
        self.sigma = np.concatenate([np.empty(0), *sigma])
        self.weights = np.ascontiguousarray([self.sigma, self.sigma**2])

    def matrix(self, factors):
        out = np.zeros(len(factors), MATRIX)
        for m, x in zip(out, factors, strict=True):
            m["data"], m["row_stride"], m["col_stride"] = address(x), 1, x.shape[1]
            m["dtype"] = DTYPE_CODE["F64" if x.dtype == np.float64 else "F32"]
        return out

    def table(self):
        out = np.zeros(len(self.ranks), BLOCK)
        out["rank"], out["u"], out["v"] = self.ranks, self.matrix(self.u), self.matrix(self.v)
        return out

    def dense(self, product, weight, absolute=False):
        """Each block's matrix, flattened: U W V^T, U W U^T or V W V^T in float64."""
        left, right = {0: (self.u, self.v), 1: (self.u, self.u), 2: (self.v, self.v)}[product]
        starts = np.cumsum([0, *self.ranks])
        out = []
        for i, (x, y) in enumerate(zip(left, right, strict=True)):
            w = np.ones(len(self.sigma)) if weight < 0 else self.weights[weight]
            x, y = x.astype(np.float64), y.astype(np.float64)
            if absolute:
                x, y = np.abs(x), np.abs(y)
            out.append(((x * w[starts[i] : starts[i + 1]]) @ y.T).ravel())
        return np.array(out).reshape(len(self.ranks), entries_of(product, self))

    def part(self, chosen):
        """Some of its blocks."""
        out = object.__new__(Stack)
        starts = np.cumsum([0, *self.ranks])
        rows = [np.arange(starts[i], starts[i + 1]) for i in chosen]
        out.ranks, out.p, out.q = [self.ranks[i] for i in chosen], self.p, self.q
        out.u, out.v = [self.u[i] for i in chosen], [self.v[i] for i in chosen]
        out.weights = np.ascontiguousarray(self.weights[:, np.concatenate(rows)])
        return out


def run(one, two=None, streaming=ALWAYS, epilogues=EPILOGUES, threads=2, fp64=False, views=None):
    """(epilogues, n1, n2) of one module."""
    other = two or one
    n1, n2 = len(one.ranks), len(other.ranks)
    out = np.full((len(epilogues), n1 * n2), np.nan)
    second = (None,) * 3 if two is None else (two.table(), np.array([0, n2]), two.weights)
    _native.core().gram_pass(
        one.table(), np.array([0, n1]), one.weights, *second, np.array([one.p]), np.array([one.q]),
        epilogues, out, np.array([0, n1 * n2]), fp64, threads, _native.isa(), 0, views, streaming,
    )  # fmt: skip
    return out.reshape(len(epilogues), n1, n2)


def truth(one, two=None, absolute=False, epilogues=EPILOGUES):
    other = two or one
    found = [one.dense(x, r, absolute) @ other.dense(x, c, absolute).T for x, r, c in epilogues]
    return np.array(found).reshape(len(epilogues), len(one.ranks), len(other.ranks))


def excess(got, one, two=None):
    """Largest error in units of what is allowed."""
    widest = max([0, *one.ranks, *(two or one).ranks])
    allowed = streamed_bound(widest) * truth(one, two, absolute=True)
    error = np.abs(got - truth(one, two))
    assert not np.isnan(got).any() and (error[allowed == 0] == 0).all()
    return float((error / np.where(allowed > 0, allowed, 1)).max(initial=0))


@pytest.mark.parametrize("two", [False, True], ids=["symmetric", "two_stacks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_sums_are_inner_products_of_dense_matrices(rng, isa, shape, two):
    ranks, p, q = SHAPES[shape]
    one = Stack(rng, ranks, p, q)
    other = Stack(rng, (*ranks[::-1], 2, 0), p, q) if two else None
    assert excess(run(one, other), one, other) <= 1


def test_the_bound_of_streamed_sums_can_fail(rng):
    one = Stack(rng, (40, 33, 60), 70, 65)
    got = run(one)
    assert excess(got, one) <= 1
    bf16 = object.__new__(Stack)
    bf16.__dict__.update(one.__dict__)
    bf16.weights = (one.weights.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    bf16.weights = bf16.weights.astype(np.float64)
    assert excess(run(bf16), one) > 2
    diagonal = np.einsum("nii->ni", one.dense(2, 1).reshape(3, 65, 65))
    wrong = got.copy()
    wrong[2] += diagonal @ diagonal.T  # the diagonal counted twice, like the rest
    assert excess(wrong, one) > 2
    one.u[1] = one.u[1].copy()
    one.u[1][-1] = 0  # one row of 70 left out
    assert excess(got, one) > 2


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_sums_are_as_exact_as_those_of_tiles(rng, dtype):
    one = Stack(rng, (64,) * 20, 96, 80, dtype)
    rows, columns = (
        np.array([np.linalg.norm(one.dense(e[0], e[side]), axis=1) for e in EPILOGUES])
        for side in (1, 2)
    )
    scale = rows[:, :, None] * columns[:, None, :]
    errors = [np.abs((run(one, None, s) - truth(one)) / scale).max() for s in (NEVER, ALWAYS)]
    assert errors[1] <= max(bound("cosine"), errors[0])


def test_threads_and_other_blocks_change_no_bit(rng, isa):
    ranks = (40, 0, 3, 17, 1, 25, 60) * 40
    one, two = Stack(rng, ranks, 45, 70), Stack(rng, ranks[:5], 45, 70)
    whole, across = run(one, threads=1), run(one, two, threads=1)
    for threads in (2, 5):
        assert run(one, threads=threads).tobytes() == whole.tobytes()
        assert run(one, two, threads=threads).tobytes() == across.tobytes()
    for chosen in ([3, 5], [5, 3, 0], list(range(1, 280, 9))):
        few = one.part(chosen)
        np.testing.assert_array_equal(run(few), whole[:, chosen][:, :, chosen])
        np.testing.assert_array_equal(run(few, two), across[:, chosen])
    np.testing.assert_array_equal(run(one, one.part(range(len(ranks)))), whole)


def test_sums_of_squares_are_never_negative(rng):
    basis = np.linalg.qr(rng.standard_normal((96, 96)))[0]
    one = Stack(rng, (32, 32, 32), 96, 96)
    one.u = one.v = [np.ascontiguousarray(basis[:, k::3], np.float32) for k in range(3)]
    found = run(one)
    for k, (product, *_) in enumerate(EPILOGUES):
        assert product == 0 or (found[k] >= 0).all()
    assert np.abs(found[1] - 32 * np.eye(3)).max() < 32 * bound("feature")
    one.weights = -one.weights
    assert (run(one)[3] < 0).any()  # of negative weights they may be


# ranks, p, q, epilogues: whether the sums of each are streamed where it pays.
CHOICES = {
    "many_large_ranks": ((64,) * 60, 80, 80, ((0, 0, 0), (1, 1, -1), (2, 1, 1)), (1, 1, 1)),
    "small_ranks": ((8,) * 60, 200, 200, ((0, 0, 0), (1, 1, -1), (2, 1, 1)), (0, 0, 0)),
    "two_adapters": ((64,) * 2, 320, 320, ((0, 0, 0), (1, 1, -1), (2, 1, 1)), (0, 0, 0)),
    "large_matrices": ((64,) * 16, 2000, 2000, ((1, 1, -1), (2, 1, 1)), (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("two", [False, True], ids=["symmetric", "two_stacks"])
@pytest.mark.parametrize("choice", CHOICES)
def test_sums_are_streamed_where_it_pays(rng, choice, two):
    ranks, p, q, epilogues, streamed = CHOICES[choice]
    one = Stack(rng, ranks, p, q)
    other = Stack(rng, ranks, p, q) if two else None
    tiles, chosen, dense = (run(one, other, s, epilogues) for s in (NEVER, WHERE_IT_PAYS, ALWAYS))
    for k, yes in enumerate(streamed):
        assert tiles[k].tobytes() != dense[k].tobytes()
        assert chosen[k].tobytes() == (dense if yes else tiles)[k].tobytes(), epilogues[k]


def test_beside_a_view_what_the_left_factors_alone_give_stays_in_tiles(rng):
    one = Stack(rng, (64,) * 60, 80, 80)
    seen = [rng.standard_normal((9, 64)).astype(np.float32) for _ in one.ranks]
    views = one.matrix(seen), None, np.array([[9]]), [0, 1, 0, 0]
    epilogues = [(0, 0, 0), (0, 0, 0), (2, 1, 1), (1, 1, -1)]
    tiles, chosen, dense = (
        run(one, None, s, epilogues, views=views) for s in (NEVER, WHERE_IT_PAYS, ALWAYS)
    )
    streamed = [x.tobytes() != y.tobytes() for x, y in zip(chosen, tiles, strict=True)]
    assert streamed == [True, False, True, False]
    assert [x.tobytes() == y.tobytes() for x, y in zip(chosen, dense, strict=True)] == [
        True, True, True, False,
    ]  # fmt: skip


def test_views_and_float64_stay_in_tiles(rng):
    one = Stack(rng, (64,) * 30, 70, 70)
    seen = [rng.standard_normal((9, 64)).astype(np.float32) for _ in one.ranks]
    views = one.matrix(seen), None, np.array([[9]]), [1, 0, 1, 0]
    epilogues = [(0, 0, 0), (0, 0, 0), (2, 1, 1), (1, 1, -1)]
    found = [run(one, None, s, epilogues, views=views) for s in (NEVER, ALWAYS)]
    same = [x.tobytes() == y.tobytes() for x, y in zip(*found, strict=True)]
    assert same == [True, False, True, False]
    exact = [run(one, None, s, fp64=True) for s in (NEVER, ALWAYS)]
    assert exact[0].tobytes() == exact[1].tobytes()


MODULES = {
    "model.layers.0.self_attn.q_proj": (90, 96, 64),
    "model.layers.0.mlp.down_proj": (96, 150, 64),
    "model.layers.1.self_attn.q_proj": (150, 90, 64),
}
NAMES = list(MODULES)


def falling(rng, d_out, d_in):
    """(A, B) of 48 singular values over four orders of magnitude, and 16 that count as zero."""
    u, v = (np.linalg.qr(rng.standard_normal((d, 64)))[0] for d in (d_out, d_in))
    sigma = np.concatenate([np.logspace(0, -4, 48), np.logspace(-9, -12, 16)])
    return sigma[:, None] * v.T, u


@pytest.fixture
def made(tmp_path, rng):
    """Adapters of rank 64 but for one; a zero one, lacking modules, a copy, near-duplicates."""
    out = []
    for i in range(14):
        names = NAMES[: 2 if i % 5 == 3 else 3]
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 65)) if i == 2 else 64) for n in names}
        factors = None
        if i in (9, 10, 11):
            off = {9: 0.0, 10: 1e-4, 11: 1e-2}[i]
            factors = {
                n: (m.a + off * rng.standard_normal(m.a.shape) / m.a.shape[1] ** 0.5, m.b)
                for n, m in out[0].modules.items()
            }
        elif i > 11:
            factors = {n: falling(rng, *MODULES[n][:2]) for n in NAMES}
        out.append(make_adapter(
            tmp_path / f"adapter_{i:02d}", MODULES if factors else sizes, factors=factors,
            seed=int(rng.integers(2**32)), zero_b=i == 4, magnitude=float(rng.uniform(0.1, 10)),
        ))  # fmt: skip
    return out


@pytest.mark.parametrize("streaming", [NEVER, ALWAYS])
def test_features_of_large_ranks_are_their_definitions(made, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(p1, "STREAMING", streaming)
    table = mpf.pair_features(mpf.open_zoo(tmp_path))
    assert not differences(table, expected(made))


@pytest.mark.parametrize("streaming", [NEVER, WHERE_IT_PAYS, ALWAYS])
def test_the_cosine_of_near_duplicates_is_as_good(made, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(p1, "STREAMING", streaming)
    table = mpf.pair_features(mpf.open_zoo(tmp_path), ["cosine"])
    want = expected([made[i] for i in (0, 9, 10, 11)])["cosine"][:3]
    found = table.matrix("cosine")[0, 9:12]
    assert np.abs(found - want).max() <= bound("cosine")
    assert want[0] == pytest.approx(1, abs=1e-12) and 1 - want[1] < 1e-7 < 1e-5 < 1 - want[2]


def test_large_ranks_are_streamed_by_themselves(made, tmp_path, monkeypatch):
    tables = {}
    for streaming in (NEVER, WHERE_IT_PAYS, ALWAYS):
        monkeypatch.setattr(p1, "STREAMING", streaming)
        tables[streaming] = mpf.pair_features(mpf.open_zoo(tmp_path), ["cosine"])["cosine"]
    assert tables[WHERE_IT_PAYS].tobytes() == tables[ALWAYS].tobytes() != tables[NEVER].tobytes()
