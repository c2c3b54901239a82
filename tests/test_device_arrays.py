"""Arrays on a device under numpy's functions, against numpy itself."""

from __future__ import annotations

import operator

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")

import torch
from own_features import ON_CPU, ON_DEVICE
from triton_child import DEVICE

from mergeprobe_fast.engine import aggregate
from mergeprobe_fast.engine.declare import DOT, ROW_CAPTURE, Sums, ratio
from mergeprobe_fast.engine.finishing import Finishing
from mergeprobe_fast.kernels import _array_functions as functions
from mergeprobe_fast.kernels.arrays import DeviceArray, upload

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 1e300, -1e-300, np.inf, -np.inf, np.nan]
LIKE = DeviceArray(torch.zeros(0, dtype=torch.float64, device=DEVICE))
# Others may be off by an ulp or two, on either side; so is torch's root on a CPU (Intel's library).
ROUNDED = 4 * 2.0**-52
EXACT = {
    np.add, np.subtract, np.multiply, np.true_divide, np.maximum, np.minimum, np.fmax, np.fmin,
    np.copysign, np.negative, np.positive, np.absolute, np.fabs, np.sign, np.square, np.reciprocal,
    np.floor, np.ceil, np.trunc, np.rint,
}  # fmt: skip


def there(x):
    return np.asarray(np.asarray(x), like=LIKE)


def same(found, want, exact=True):
    assert isinstance(found, DeviceArray)
    want, got = np.asarray(want), found.download()
    assert got.dtype == want.dtype and got.shape == want.shape
    if exact or want.dtype.kind != "f":
        assert np.array_equal(got, want, equal_nan=want.dtype.kind == "f")
    else:
        np.testing.assert_allclose(got, want, rtol=ROUNDED, atol=1e-320)


@pytest.fixture
def pair(rng):
    """Two arrays: every special value with every other, and others."""
    x, y = (v.ravel() for v in np.meshgrid(SPECIAL, SPECIAL))
    x, y = (np.concatenate([v, rng.normal(size=50)]) for v in (x, y))
    return x, y


@pytest.mark.parametrize("ufunc", functions.UFUNCS, ids=lambda f: f.__name__)
def test_a_ufunc_has_the_values_and_dtypes_of_numpy(pair, ufunc):
    x, y = pair
    single = np.float32([0.5, -1, 3, np.nan, np.inf])
    cases = [(x,), (x > 0,), (np.arange(5),), (single,)]
    if ufunc.nin == 2:
        cases = [
            (x, y), (x, 2.0), (-0.5, y), (x, 3), (x, np.float64(0.1)), (x, True), (x > 0, y > 0),
            (np.arange(1, 5), 2), (np.arange(5), np.arange(5)[::-1].copy()), (np.arange(5), 0.5),
            (single, y[:5]), (single, 0.1), (x > 0, y),
        ]  # fmt: skip
    computed = 0
    for case in cases:
        try:
            with np.errstate(all="ignore"):
                want = ufunc(*case)
        except TypeError:  # nor with numpy
            continue
        if want.dtype not in functions.TORCH:
            continue
        if ufunc.nin == 1 and ufunc in EXACT and want.dtype.kind != "f":
            continue  # torch has some of these of integers, and features have no use for them
        found = ufunc(*(there(v) if isinstance(v, np.ndarray) else v for v in case))
        f32 = want.dtype == np.float32
        if f32 and ufunc not in EXACT:
            np.testing.assert_allclose(found.download(), want, rtol=4 * 2.0**-23, atol=1e-40)
        else:
            same(found, want, ufunc in EXACT)
        computed += 1
    assert computed


def test_signs_of_zero_and_nan_are_told_apart(pair):
    """The fault: with fmax for maximum, or torch's sign, which is 0 of NaN."""
    x, y = pair
    want = np.maximum(x, y)
    assert not np.array_equal(np.fmax(there(x), there(y)).download(), want, equal_nan=True)
    assert not np.array_equal(torch.sign(upload(x, DEVICE)).cpu().numpy(), np.sign(x), True)
    # torch divides by a number by way of its reciprocal on CUDA: here it is divided.
    same(there(y) / 3.0, y / 3.0)
    with np.errstate(all="ignore"):
        same(1.0 / there(y), 1.0 / y)


def test_operators_and_memory(pair):
    x, y = pair
    for name in ("add", "sub", "mul", "truediv", "pow", "lt", "le", "gt", "ge", "eq", "ne"):
        f = getattr(operator, name)
        with np.errstate(all="ignore"):
            same(f(there(x), there(y)), f(x, y), name != "pow")
            same(f(there(x), 2.0), f(x, 2.0), name != "pow")
            same(f(2.0, there(x)), f(2.0, x), name != "pow")
    same(~(there(x) > 0) | (there(y) < 1), ~(x > 0) | (y < 1))
    a, b = there(x), x.copy()
    alias = a
    with np.errstate(all="ignore"):
        for v, w in ((there(y), y), (2.0, 2.0)):
            a += v
            a *= v
            a -= v
            a /= v
            b += w
            b *= w
            b -= w
            b /= w
    assert alias is a
    same(a, b)
    single, want = there(np.float32(x[:6])), np.float32(x[:6])
    single += there(y[:6])  # rounds as numpy's does
    want += y[:6]
    same(single, want)
    with pytest.raises(TypeError, match="into such an array"):
        whole = there(np.arange(3))
        whole += 0.5


def test_functions_of_arrays(pair, rng):
    x, y = pair
    m, n = rng.normal(size=(2, 4, 5))
    m[1, 2] = np.nan
    ints = rng.integers(0, 4, (4, 5))
    cases = {
        "where": lambda a: np.where(a(x) > 0, a(x), np.nan),
        "where of numbers": lambda a: np.where(a(x) > 0, 0.1, 0.2),
        "where of ints": lambda a: np.where(a(x) > 0, 1, 0),
        "clip": lambda a: np.clip(a(x), -1.0, 1.0),
        "clip from below": lambda a: np.clip(a(x), 0.5, None),
        "a method's clip": lambda a: a(x).clip(-1.0, a(y)),
        "stack": lambda a: np.stack([a(x), a(y)]),
        "stack of columns": lambda a: np.stack([a(x), a(y)], axis=1),
        "concatenate": lambda a: np.concatenate([a(m), a(n)], axis=1),
        "nan_to_num": lambda a: np.nan_to_num(a(x)),
        "nan_to_num of ones": lambda a: np.nan_to_num(a(x), nan=1.0),
        "max": lambda a: a(m).max(0), "min": lambda a: np.min(a(m), axis=1),
        "sum of flags": lambda a: np.isnan(a(m)).sum(0), "sum of ints": lambda a: a(ints).sum(1),
        "any": lambda a: np.any(np.isnan(a(m)), axis=0), "all": lambda a: (a(m) < 9).all(0),
        "zeros_like": lambda a: np.zeros_like(a(x)), "ones_like": lambda a: np.ones_like(a(ints)),
        "full_like": lambda a: np.full_like(a(x), np.nan),
        "zeros of a dtype": lambda a: np.zeros_like(a(ints), float),
        "sort": lambda a: np.sort(a(m), axis=0), "take": lambda a: np.take(a(x), a(ints)),
        "rows": lambda a: a(m)[1], "a slice": lambda a: a(m)[:, 1:3],
        "fancy": lambda a: a(m)[a(ints[:, 0]), a(ints[:, 1])],
        "a new axis": lambda a: a(x)[:, None],
        "int64": lambda a: np.floor(a(m[0])).astype(np.intp), "ravel": lambda a: a(m).ravel(),
        "copy": lambda a: a(m).copy(), "rows that are unpacked": lambda a: [*a(m)][2],
    }  # fmt: skip
    for name, case in cases.items():
        with np.errstate(all="ignore"):
            want = case(np.asarray)
        found = case(there)
        assert found.download().dtype == want.dtype, name
        assert np.array_equal(found.download(), want, equal_nan=want.dtype.kind == "f"), name
    for f in (np.sum, np.mean, np.prod):  # other orders of five terms
        np.testing.assert_allclose(f(there(n), axis=1).download(), f(n, axis=1), 1e-13, 1e-14)
    assert np.shape(there(m)) == (4, 5) and np.ndim(there(m)) == 2 and len(there(m)) == 4
    made = np.zeros((2, 3), np.float32, like=LIKE)
    made[0] = there(np.arange(3.0))
    made[1, 1:] = 7.0
    same(made, np.float32([[0, 1, 2], [0, 7, 7]]))
    same(np.full((2,), np.nan, np.float32, like=LIKE), np.full(2, np.nan, np.float32))
    same(np.arange(2, 9, 3, like=LIKE), np.arange(2, 9, 3))


def test_what_has_no_twin_says_so():
    x = there(SPECIAL)
    cases = {
        "numpy.cumsum": lambda: np.cumsum(x), "numpy.median": lambda: np.median(x),
        "numpy.add.reduce": lambda: np.add.reduce(x), "numpy.floor_divide": lambda: x // 2,
        "numpy.sqrt with where": lambda: np.sqrt(x, where=x > 0),
        "numpy.where of": lambda: np.where(x > 0), "axis=None": lambda: x.sum(),
        "the truth": lambda: bool(x), "array of numpy": lambda: np.asarray(x),
        "in the host's memory": lambda: x + np.ones(len(SPECIAL)),
        "an index of bool": lambda: x[x > 0],
        "iterating": lambda: list(x), "keepdims": lambda: np.max(x, axis=0, keepdims=True),
        "of complex": lambda: x + 1j, "array of int8": lambda: x.astype(np.int8),
    }  # fmt: skip
    for words, case in cases.items():
        with pytest.raises(TypeError) as said:
            case()
        assert words in str(said.value), words


def made_sums(rng, pairs, array):
    def some(*shape):
        return array(rng.uniform(0.1, 3, (*shape, pairs)))

    need = {n: some() for n in (DOT, ROW_CAPTURE)}
    mirrored = {n: some() for n in need}
    return Sums(need, mirrored, *(some() for _ in range(11)), {}, {})


@pytest.fixture
def device():
    class Here:
        array = staticmethod(there)
        failure = staticmethod(lambda error: None)

    return Here


@pytest.mark.parametrize("finish", [*ON_DEVICE, *ON_CPU], ids=lambda f: f.__name__)
def test_a_finish_gives_what_it_gives_of_one_module_at_a_time(rng, device, finish):
    state = rng.bit_generator.state
    whole = made_sums(rng, 3 * 8, np.asarray)
    rng.bit_generator.state = state
    on_device = made_sums(rng, 3 * 8, there)

    def part(m):
        def cut(x):
            return {n: v[8 * m : 8 * m + 8] for n, v in x.items()} if isinstance(x, dict) else (
                x[8 * m : 8 * m + 8])  # fmt: skip

        return Sums(*(cut(v) for v in vars(whole).values()))

    want = np.concatenate([finish(part(m)) for m in range(3)])
    finishing = Finishing(device)
    same(finishing.of(on_device, 3)(finish), want.astype(float), finish in ON_CPU)
    assert bool(finishing._on_cpu) == (finish in ON_CPU)
    # The fault: arrays whose pairs see each other, where modules lie in a row.
    if finish.__name__ == "first_pair":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceArray, "each_alone", DeviceArray.together)
            wrong = finish(on_device)
        assert np.abs(wrong.download() - want).max() > 0


def test_an_error_of_a_finish_is_that_of_the_cpu(rng, device):
    def broken(s):
        raise ZeroDivisionError("the caller's own")

    with pytest.raises(ZeroDivisionError, match="the caller's own"):
        Finishing(device).of(made_sums(rng, 4, there))(broken)


@pytest.mark.parametrize("modules", [0, 1, 2, 7, 224])
def test_quantiles_are_the_cpus_bits(rng, modules):
    values = rng.normal(size=(modules, 40)).astype(np.float32)
    values[:, 1] = np.nan
    values[rng.uniform(size=values.shape) < 0.3] = np.nan
    values[rng.uniform(size=values.shape) < 0.2] = 0.5  # ties
    want = aggregate._quantiles(values, None)
    found = aggregate._quantiles(there(values), LIKE)
    for name in want:
        same(found[name], want[name])
        if modules > 1:
            known = np.nanquantile(values.astype(float), {"max": 1, "min": 0, "p10": 0.1,
                                                          "p90": 0.9}[name], axis=0) \
                if not np.isnan(values).all(0).any() else None  # fmt: skip
            if known is not None:
                np.testing.assert_allclose(want[name], known, atol=1e-12)


def test_ratio_is_silent_where_it_is_undefined():
    top, bottom = np.array([1.0, -1, 0, np.nan, 2]), np.array([0.0, -1, 0, 1, np.inf])
    same(ratio(there(top), there(bottom)), ratio(top, bottom))
