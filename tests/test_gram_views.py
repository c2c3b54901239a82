"""Views of P1: other right factors beside the own ones, on one Gram of the left factors."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import bound, gram_bound

from mergeprobe_fast import _native
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE, MATRIX, address

TILES = {"one_tile": (5, 0, 3, 1), "many_tiles": (5, 200, 0, 180, 31)}


class Stack:
    """Blocks of two modules with views of 7, 0 and 130 columns (module 0), 1, 40 and 3 (1)."""

    P, Q, VIEWS = (33, 5), (17, 140), ((7, 1), (0, 40), (130, 3))

    def __init__(self, rng, ranks, dtype=np.float32):
        self.ranks = [np.array(ranks), np.array(ranks[::-1][:2])]
        self.u, self.v, self.views = [], [], [[] for _ in self.VIEWS]
        for k, r in enumerate(self.ranks):
            for out, columns in (
                (self.u, self.P[k]), (self.v, self.Q[k]),
                *((view, c[k]) for view, c in zip(self.views, self.VIEWS, strict=True)),
            ):  # fmt: skip
                out.append(np.asfortranarray(rng.standard_normal((r.sum(), columns)), dtype))
        self.bounds = np.array([0, len(self.ranks[0]), sum(map(len, self.ranks))])
        self.rows = sum(int(r.sum()) for r in self.ranks)
        self.weights = rng.uniform(0.5, 2, (2, self.rows))
        self.table = np.zeros(self.bounds[-1], BLOCK)
        self.table["rank"] = np.concatenate(self.ranks)
        self.table["u"], self.table["v"] = self.matrices(self.u), self.matrices(self.v)

    def matrices(self, stacks):
        """One MATRIX per block: some rows of its module's stack."""
        out = np.zeros(self.bounds[-1], MATRIX)
        for k, (stack, ranks) in enumerate(zip(stacks, self.ranks, strict=True)):
            m = out[self.bounds[k] : self.bounds[k + 1]]
            m["data"] = address(stack) + stack.itemsize * (np.cumsum(ranks) - ranks)
            m["row_stride"], m["col_stride"] = 1, len(stack)
            m["dtype"] = DTYPE_CODE["F64" if stack.itemsize == 8 else "F32"]
        return out

    def all_views(self):
        return np.concatenate([self.matrices(v) for v in self.views])


def run(one, two, epilogues, chosen, *, fp64=False, threads=2, views=True):
    """Results by module and epilogue, (epilogues, n1, n2) each."""
    other = two or one
    sizes = [len(a) * len(b) for a, b in zip(one.ranks, other.ranks, strict=True)]
    bounds = np.cumsum([0, *sizes])
    out = np.full((len(epilogues), bounds[-1]), np.nan)
    second = (None,) * 3 if two is None else (two.table, two.bounds, two.weights)
    given = None
    if views:
        columns = np.array(Stack.VIEWS)
        given = one.all_views(), None if two is None else two.all_views(), columns, chosen
    _native.core().gram_pass(
        one.table, one.bounds, one.weights, *second, np.array(Stack.P), np.array(Stack.Q),
        epilogues, out, bounds, fp64, threads, _native.isa(), 0, given,
    )  # fmt: skip
    return [
        out[:, bounds[k] : bounds[k + 1]].reshape(len(epilogues), len(a), len(b))
        for k, (a, b) in enumerate(zip(one.ranks, other.ranks, strict=True))
    ]


def dense(one, two, epilogue, view, k, absolute=False):
    """The sum over both blocks of weight * product * weight, from whole Grams in float64."""
    other = two or one
    wide = (lambda x: np.abs(x).astype(float)) if absolute else (lambda x: x.astype(float))

    def gram(a, b):
        return wide(a[k]) @ wide(b[k]).T

    m = gram(one.u, other.u)
    n = gram(*((one.v, other.v) if view == 0 else (one.views[view - 1], other.views[view - 1])))
    product, row, column = epilogue
    x = {0: m * n, 1: m * m, 2: n * n}[product]

    def weights(stack, index):
        start = 0 if k == 0 else int(stack.ranks[0].sum())
        size = int(stack.ranks[k].sum())
        return np.ones(size) if index < 0 else stack.weights[index][start : start + size]

    x = weights(one, row)[:, None] * x * weights(other, column)

    def blocks(stack):
        return np.repeat(np.eye(len(stack.ranks[k])), stack.ranks[k], axis=0)

    return blocks(one).T @ x @ blocks(other)


EPILOGUES = [
    ((0, 0, 0), 0), ((0, 0, 0), 1), ((2, 1, 1), 3), ((0, -1, 1), 2), ((1, -1, 0), 0),
    ((2, 1, -1), 1), ((0, 1, 0), 3), ((1, 0, 0), 3),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("stacks", ["symmetric", "two_stacks"])
@pytest.mark.parametrize("tiles", TILES)
def test_views_are_their_definition(rng, isa, tiles, stacks, precision):
    one = Stack(rng, TILES[tiles])
    two = None if stacks == "symmetric" else Stack(rng, (2, 0, 250, 3) if "m" in tiles else (4, 2))
    epilogues, chosen = map(list, zip(*EPILOGUES, strict=True))
    found = run(one, two, epilogues, chosen, fp64=precision == "fp64")
    relative = gram_bound(precision, 140, 140, 250, 420)
    for k in range(2):
        for e, (epilogue, view) in enumerate(EPILOGUES):
            want, size = (dense(one, two, epilogue, view, k, absolute=x) for x in (False, True))
            assert (np.abs(found[k][e] - want) <= relative * size).all(), (k, epilogue, view)


@pytest.mark.parametrize("tiles", TILES)
def test_the_bound_catches_the_wrong_view(rng, tiles):
    one = Stack(rng, TILES[tiles])
    relative = gram_bound("fp32", 140, 140, 250, 420)
    size = dense(one, None, (0, 0, 0), 1, 0, absolute=True)
    wrong = dense(one, None, (0, 0, 0), 0, 0)
    assert (np.abs(wrong - dense(one, None, (0, 0, 0), 1, 0)) > relative * size).any()


@pytest.mark.parametrize("stacks", ["symmetric", "two_stacks"])
@pytest.mark.parametrize("tiles", TILES)
def test_a_view_gives_the_bytes_of_a_pass_of_its_own(rng, isa, tiles, stacks):
    """Nothing depends on the threads or on what else rides along."""
    one = Stack(rng, TILES[tiles])
    two = None if stacks == "symmetric" else Stack(rng, TILES[tiles][::-1])
    epilogues, chosen = map(list, zip(*EPILOGUES, strict=True))
    first, *others = (run(one, two, epilogues, chosen, threads=t) for t in (1, 2, 3, 7))
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))
    for e, (epilogue, view) in enumerate(EPILOGUES):
        alone = run(one, two, [epilogue], [view])
        assert all(a[0].tobytes() == b[e].tobytes() for a, b in zip(alone, first, strict=True))
    plain = [e for e, view in EPILOGUES if view == 0]
    without = run(one, two, plain, [], views=False)
    for k in range(2):
        for a, e in zip(without[k], [e for e, x in enumerate(EPILOGUES) if x[1] == 0], strict=True):
            assert a.tobytes() == first[k][e].tobytes()


def test_float64_views(rng, isa):
    """As the exact Grams have them: float32 beside float64, accumulated in float64."""
    one = Stack(rng, TILES["one_tile"])
    wide = Stack(rng, TILES["one_tile"], np.float64)
    one.views, one.all_views = wide.views, wide.all_views
    found = run(one, None, [(0, 0, 0)], [3], fp64=True)
    want = dense(one, None, (0, 0, 0), 3, 0)
    assert np.abs(found[0][0] - want).max() <= bound("exact_algebra") * np.abs(want).max()
    narrow = run(one, None, [(0, 0, 0)], [3])
    assert np.abs(narrow[0][0] - want).max() > bound("exact_algebra") * np.abs(want).max()


WRONG = {
    "too few matrices": (lambda a, b, c, d: (a[:-1], b, c, d), "one matrix per view and block"),
    "columns of too few modules": (lambda a, b, c, d: (a, b, c[:, :1].copy(), d), "columns need"),
    "negative columns": (lambda a, b, c, d: (a, b, c - 200, d), "negative number of columns"),
    "a view that is not there": (lambda a, b, c, d: (a, b, c, [4]), "no such view"),
    "too few epilogues": (lambda a, b, c, d: (a, b, c, []), "name one view per epilogue"),
    "other records": (lambda a, b, c, d: (np.zeros(len(a)), b, c, d), "expected records of"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_views_are_refused(rng, wrong):
    one = Stack(rng, TILES["one_tile"])
    change, reason = WRONG[wrong]
    given = change(one.all_views(), None, np.array(Stack.VIEWS), [1])
    bounds = np.cumsum([0, *(len(r) ** 2 for r in one.ranks)])
    with pytest.raises(ValueError, match=f"views: {reason}"):
        _native.core().gram_pass(
            one.table, one.bounds, one.weights, None, None, None, np.array(Stack.P),
            np.array(Stack.Q), [(0, 0, 0)], np.empty((1, bounds[-1])), bounds, False, 1,
            _native.isa(), 0, given,
        )  # fmt: skip
