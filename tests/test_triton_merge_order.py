"""P2 in Triton: order statistics in the interpreter, against sorted entries."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")
from test_triton_merge import PLAIN, entries, interpreter, tensors  # noqa: E402, F401
from tile_cases import factors  # noqa: E402

from mergeprobe_fast.errors import InputError  # noqa: E402
from mergeprobe_fast.ops import ElementwiseRule  # noqa: E402

pytestmark = pytest.mark.triton


def definition(x, counts):
    """The k-th largest |x| by sorting; inf for none, 0 for all."""
    x = np.sort(np.abs(x), axis=None)[::-1]
    found = [np.inf if k == 0 else 0.0 if k >= x.size else x[k - 1] for k in counts]
    return np.array(found, np.float32)


def several(n):
    return [0, 1, 2, n // 5, n // 2, max(n - 1, 0), n, n + 7]


# All entries counted at once, a bracket from a sample, and one from so few that it misses; bins of
# one key and of thousands.
SEARCHES = {
    "no sample": {},
    "few bins": {"ORDER_BITS": 6},
    "sample": {"order_sample": 200, "ORDER_BITS": 12},
    "misleading sample": {"order_sample": 1},
    "two at a time": {"WORKSPACE": 32 << 17},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_order_statistics_are_sorted_entries(rng, interpreter, search):  # noqa: F811
    shape = [(1, 37), (37, 1), (20, 49), (9, 33)][int(rng.integers(4))]
    given = tensors(factors(rng, shape, [3, 0, 5, 1]))
    b, a, s = given[3]
    given[3] = (b.round(), torch.ones_like(a), s)  # a few values, many times each
    other = tensors(factors(rng, (7, 40), [2]))
    x, y = entries(interpreter, given), entries(interpreter, other)
    groups = [
        ([[given[0]]], x[0]), ([[given[1]]], x[1]), ([[given[3]]], x[3]), ([given], x),
        ([given[:1], other], np.concatenate([x[0].ravel(), y.ravel()])), ([], np.zeros(0)),
    ]  # fmt: skip
    if search in ("few bins", "two at a time"):  # many passes
        groups = groups[2:4]
    counts = [several(sample.size) for _, sample in groups]
    asked = [group for group, _ in groups]
    found, passes = interpreter.order_statistics(asked, counts, configs=SEARCHES[search])
    for got, (_, sample), ks in zip(found, groups, counts, strict=True):
        assert got.dtype == np.float32 and np.array_equal(got, definition(sample, ks))
    assert not np.array_equal(found[0], definition(groups[0][1], [k + 1 for k in counts[0]]))
    limit = {"few bins": 8, "two at a time": 40}.get(search, 4)
    assert passes <= limit


def test_a_bracket_from_a_sample_saves_a_pass(rng, interpreter):  # noqa: F811
    given = tensors(factors(rng, (40, 50), [3]))
    counts = [[400]]
    options = {"order_sample": 2000, "ORDER_BITS": 22}
    found, passes = interpreter.order_statistics([[given]], counts, configs=options)
    want = definition(entries(interpreter, given), counts[0])
    assert np.array_equal(found[0], want) and passes == 1
    found, passes = interpreter.order_statistics([[given]], counts, configs={"ORDER_BITS": 22})
    assert np.array_equal(found[0], want) and passes == 2


@pytest.mark.parametrize("tensor_core", [False, True])
def test_thresholds_hold_exactly_in_the_merge(rng, interpreter, tensor_core):  # noqa: F811
    density = [0.2, 0.5, 1.0]
    given = [
        (b.to(torch.bfloat16), a.to(torch.bfloat16), s)
        for b, a, s in tensors(factors(rng, (18, 33), [4, 17, 2]))
    ]
    name = "tensor_thresholds" if tensor_core else "magnitude_thresholds"
    low = getattr(interpreter, name)(given, density)
    options = {"tensor_core": tensor_core}
    for i, share in enumerate(density):
        x = interpreter.merge_dense(given[i : i + 1], [1.0], PLAIN, **options).numpy()
        k = int(share * x.size)
        assert low[i] == definition(x, [k])[0]
        rule = ElementwiseRule("magnitude", low=float(low[i]))
        kept = interpreter.merge_dense(given[i : i + 1], [1.0], rule, **options).numpy()
        assert np.array_equal(kept, np.where(np.abs(x) >= low[i], x, 0))
        assert k <= np.count_nonzero(kept) <= k + 2  # equal entries are all kept


def test_errors_name_the_argument(rng, interpreter):  # noqa: F811
    given = tensors(factors(rng, (4, 6), [2, 3]))
    b, a, s = given[1]
    with pytest.raises(InputError, match="counts: must not be negative"):
        interpreter.order_statistics([[given]], [[3, -1]])
    with pytest.raises(InputError, match="counts: expected one list for each of 1 groups"):
        interpreter.order_statistics([[given]], [])
    with pytest.raises(InputError, match="density: must not be negative"):
        interpreter.magnitude_thresholds(given, -0.1)
    with pytest.raises(InputError, match="segments: the deltas overflow float32"):
        interpreter.order_statistics([[[given[0], (b * 1e38, a * 1e38, s)]]], [[1]])
