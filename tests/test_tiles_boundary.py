"""What the delta tiles refuse: one line that names the argument."""

from __future__ import annotations

import numpy as np
import pytest

from mergeprobe_fast import BackendError, InputError, _native
from mergeprobe_fast.ops import (
    Deltas,
    ElementwiseRule,
    NotFinite,
    magnitude_thresholds,
    merge_dense,
    merge_low_rank,
    merge_sketch,
    order_statistics,
    pruned_norms,
)
from mergeprobe_fast.ops._tables import SEGMENT

B, A = np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)
TWO = [(B, A, 1.0), (B, A, 1.0)]
PLAIN = ElementwiseRule()
X = np.ones((5, 3), np.float32)

RULES = {
    "keep": {"keep": "some"}, "combine": {"combine": "mean"}, "elect": {"elect": "most"},
    "divide": {"divide": "mass"}, "zero_sign": {"zero_sign": 2}, "seed": {"seed": -1},
    "epsilon": {"epsilon": -0.1}, "floor": {"floor": float("nan")}, "streams": {"keep": "random"},
    "divide ": {"combine": "sum", "divide": "count"},
    "divide  ": {"combine": "fisher", "divide": "weights"},
}  # fmt: skip


@pytest.mark.parametrize("key", RULES)
def test_rules(key):
    with pytest.raises(InputError) as caught:
        ElementwiseRule(**RULES[key])
    assert caught.value.key == key.strip() and "\n" not in str(caught.value)


CHANCE = {"keep": "random", "streams": [1, 2]}
CALLS = {
    "weights": [([1.0], {}), ([1.0, np.nan], {}), (["a", "b"], {}), ([[1, 1]], {}),
                ([1e39, 1], {}), (1.0, {})],
    "low": [([1, 1], {"low": [1, 2, 3]}), ([1, 1], {"low": np.nan})],
    "high": [([1, 1], {"high": [1]})],
    "rescale": [([1, 1], {"rescale": np.inf}), ([1, 1], {"rescale": 1e39})],
    "density": [([1, 1], {**CHANCE, "density": 1.1}), ([1, 1], {**CHANCE, "density": [-0.1, 1]})],
    "epsilon": [([1, 1], {**CHANCE, "keep": "della", "density": 0.9, "epsilon": 0.2})],
    "streams": [([1, 1], {**CHANCE, "streams": [1]}), ([1, 1], {**CHANCE, "streams": [1, 2**64]})],
    "fisher": [([1, 1], {"combine": "fisher"})],
}  # fmt: skip


@pytest.mark.parametrize("key", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_calls(key, backend):
    for weights, rule in CALLS[key]:
        with pytest.raises(InputError) as caught:
            merge_dense(TWO, weights, ElementwiseRule(**rule), backend=backend)
        assert caught.value.key == key and "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "call"), [
    ("factors", lambda: merge_dense([], [], PLAIN)),
    ("factors[1]", lambda: merge_dense([TWO[0], (B, A[:1], 1.0)], [1, 1], PLAIN)),
    ("factors[0]", lambda: merge_dense([(B, A, np.inf)], [1], PLAIN)),
    ("rows", lambda: merge_dense(TWO, [1, 1], PLAIN, rows=(2, 7))),
    ("rows", lambda: merge_dense(TWO, [1, 1], PLAIN, rows=(3, 2))),
    ("out", lambda: merge_dense(TWO, [1, 1], PLAIN, out=np.zeros((6, 5)))),
    ("out", lambda: merge_dense(TWO, [1, 1], PLAIN, out=np.zeros((6, 4), "f4"))),
    ("out", lambda: merge_dense(TWO, [1, 1], PLAIN, out=np.zeros((5, 6), "f4").T)),
    ("out", lambda: merge_dense(TWO, [1, 1], PLAIN, out=np.zeros((12, 5), "f4")[::-2])),
    ("fisher", lambda: merge_dense(TWO, [1, 1], PLAIN, fisher=TWO)),
    ("fisher", lambda: merge_dense(TWO, [1, 1], ElementwiseRule(combine="fisher"), fisher=TWO[:1])),
    ("x", lambda: merge_sketch(TWO, [1, 1], PLAIN, X.astype(float))),
    ("x", lambda: merge_sketch(TWO, [1, 1], PLAIN, X[:4])),
    ("x", lambda: merge_sketch(TWO, [1, 1], PLAIN, X[0])),
    ("minus", lambda: merge_sketch(TWO, [1, 1], PLAIN, X, minus=(B, A[:1]))),
    ("minus", lambda: merge_sketch(TWO, [1, 1], PLAIN, X, minus=(B.astype(float), A))),
    ("backend", lambda: merge_dense(TWO, [1, 1], PLAIN, backend="cuda")),
    ("backend", lambda: order_statistics([], [], backend="gpu")),
    ("counts", lambda: order_statistics([[Deltas.of(TWO)]], [])),
    ("counts", lambda: order_statistics([[Deltas.of(TWO)]], [[-1]])),
    ("density", lambda: magnitude_thresholds(TWO, -0.1)),
    ("density", lambda: magnitude_thresholds(TWO, [1, 1, 1])),
    ("segments", lambda: Deltas(np.zeros(3), 1, 1)),
    ("d_out", lambda: Deltas(np.zeros(1, SEGMENT), 0, 1)),
    ("d_in", lambda: Deltas(np.zeros(1, SEGMENT), 1, 1.5)),
])  # fmt: skip
def test_arguments_are_named(key, call):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.key == key and "\n" not in str(caught.value)


def test_what_is_subtracted_must_be_finite():
    with pytest.raises(NotFinite, match=r"^minus\[0\]: B holds"):
        merge_sketch(TWO, [1, 1], PLAIN, X, minus=(B * np.float32(np.nan), A))


def test_one_delta_of_many():
    deltas = Deltas.of(TWO)
    assert len(deltas[-1]) == 1 and [len(d) for d in deltas] == [1, 1]
    with pytest.raises(IndexError):
        deltas[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("threads", [1, 3])
def test_factors_that_are_not_finite_are_named(rng, isa, bad, side, threads):
    shape = (70, 60)
    given = [
        (rng.standard_normal((70, 3)), rng.standard_normal((3, 60)).astype("f4"), 1.0)
        for _ in range(4)
    ]
    for i in (1, 3):  # the first one is named
        given[i]["BA".index(side)][-1, -1] = bad
    x, calm = np.ones((60, 2), np.float32), [(np.ones((70, 1)), np.ones((1, 60)), 1.0)] * 4
    low_rank = {"fisher": given, "threads": threads}
    calls = {
        "factors": [
            lambda: merge_dense(given, [1] * 4, PLAIN, threads=threads),
            lambda: merge_sketch(given, [1] * 4, PLAIN, x, transpose=True, threads=threads),
            lambda: merge_low_rank(given, [1] * 4, PLAIN, 2, threads=threads),
            lambda: pruned_norms(given, PLAIN, threads=threads),
        ],
        "segments": [lambda: magnitude_thresholds(given, 0.3, threads=threads)],
        "fisher": [
            lambda: merge_dense(calm, [1] * 4, ElementwiseRule(combine="fisher"), **low_rank)
        ],
    }
    assert Deltas.of(given).size == shape[0] * shape[1]
    for key, group in calls.items():
        for call in group:
            with pytest.raises(NotFinite) as caught:
                call()
            assert str(caught.value) == f"{key}[1]: {side} holds NaN or infinite values"
            assert (caught.value.segment, caught.value.side) == (1, side)


def test_the_instruction_set_asked_for_is_the_one_used(monkeypatch):
    monkeypatch.setenv("MERGEPROBE_ISA", "neon")
    with pytest.raises(BackendError, match="MERGEPROBE_ISA=neon"):
        merge_dense(TWO, [1, 1], PLAIN)


def test_every_thread_count_is_checked():
    with pytest.raises(InputError, match="threads must be a positive integer"):
        merge_dense(TWO, [1, 1], PLAIN, threads=0)


@pytest.mark.parametrize("change", ["segments", "adapters", "rule"])
def test_the_native_module_refuses_records_of_another_layout(change):
    deltas = Deltas.of(TWO)
    arguments = {"segments": deltas.segments, "adapters": PLAIN.adapters(2), "rule": PLAIN.record()}
    arguments[change] = np.zeros(2, np.int8)
    with pytest.raises(ValueError, match=f"{change}: expected records"):
        _native.core().tiles_norms(
            *arguments.values(), 6, 5, np.zeros((7, 2)), 1, _native.isa()
        )
