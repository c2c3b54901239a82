"""P1 over many modules in Triton: the kernels in the interpreter against dense products.

As in ``test_triton_gram.py``, this file is also the program of a child process in which the
interpreter is on before triton is imported.
"""

from __future__ import annotations

import mmap
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")
from test_triton_gram import ON_DEVICE  # noqa: E402
from tolerances import LAMBDA, U32, U64  # noqa: E402
from triton_child import CHOSEN, DEVICE, child, moved, serve  # noqa: E402

pytestmark = pytest.mark.triton
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
UV, UU, VV = 0, 1, 2
EVERY = list(product((UV, UU, VV), (-1, 0, 1), (-1, 0, 1)))
# What the default features need.
NEEDS = [(UV, 0, 0), (VV, -1, -1), (UU, -1, -1), (VV, 1, 1), (UU, 1, 1), (VV, 1, -1), (UU, 1, -1)]


FAR = 2**31 + 64


def far_apart():
    """A buffer with 16 rows of 16 columns at its start and as many beyond 2^31 elements."""
    flat = torch.frombuffer(mmap.mmap(-1, 2 * (FAR + 256)), dtype=F16)  # pages appear when written
    flat[:256] = torch.arange(256.0) / 64
    flat[FAR:] = torch.arange(256.0).flip(0) / 64
    return flat


def plant(fault, launches, *arguments):
    """The launches of ``gram_pass`` with a fault, to show that the checks can fail."""
    for kernel, grid, named in launches(*arguments):
        if "n_pairs" in named:
            if fault == "a tile pair dropped":
                named["n_pairs"] -= 1
            if fault == "weights exchanged":
                named["SUMS"] = tuple((x, column, row) for x, row, column in named["SUMS"])
            if fault == "a k-block dropped":
                named["p_modules"][0, 2] -= 16
            if fault == "a module's neighbour read":
                from mergeprobe_fast.kernels._pass_plan import MODULE, SIDE

                at = len(MODULE) + len(SIDE) + SIDE.index("u")
                named["p_modules"][:, at] = named["p_modules"][:, at].roll(1)
        elif fault == "transposed tiles taken as they are":
            named["p_sum_of"][:, 1] = named["p_sum_of"][:, 0]
        yield kernel, grid, named


def program():
    """The child process: (name, arguments, options) in, (result, out) out."""
    from mergeprobe_fast.kernels import Rows, _pass_configs, block_gram, gram_modules

    launches = gram_modules.launches
    assert gram_modules.INTERPRETED == (CHOSEN != "cuda")
    assert _pass_configs.INTERPRETER.block == 32

    def rows(side):
        if side is None or "starts_u" not in side:
            return side and Rows.pack(**side)
        far = moved(far_apart(), DEVICE) if any(x is None for x in side.values()) else None
        return Rows(**{k: far if x is None else x for k, x in side.items()}
                    | {"weights": side["weights"]})  # fmt: skip

    def run(first, second, p, q, epilogues, *, fault=None, **options):
        gram_modules.launches = partial(plant, fault, launches)
        first, second = rows(first), rows(second)
        return gram_modules.gram_pass(first, second, p, q, epilogues, **options)

    def handle(request):
        name, args, options = request
        answer = (block_gram if name == "block_gram" else run)(*args, **options)
        return answer, options.get("out")

    serve(handle)


@pytest.fixture(scope="module")
def interpreter():
    """``gram_pass`` in the interpreter; a side is a dict, of ``Rows`` or of ``Rows.pack``."""
    with child(__file__) as ask:

        def call(*args, name="gram_pass", **options):
            answer, out = ask((name, args, options))
            return (answer, out) if "out" in options else answer

        yield call


def draw(rng, ranks, p, q, dtype=F32, dtype_v=None):
    """A side for ``Rows.pack``: normal rows of each module, weights in (0, 1] and their squares."""
    rows = [sum(r) for r in ranks]

    def factors(columns, dtype):
        made = [rng.standard_normal((r, k)) for r, k in zip(rows, columns, strict=True)]
        return [torch.tensor(x).to(dtype) for x in made]

    sigma = 1 - rng.random(sum(rows)) ** 3
    bounds = [[0, *np.cumsum(r, dtype=int).tolist()] for r in ranks]
    U, V = factors(p, dtype), factors(q, dtype_v or dtype)
    return dict(U=U, V=V, bounds=bounds, weights=torch.tensor(np.stack([sigma, sigma**2])).to(F32))


def definition(first, second, epilogues, of=lambda x: x):
    """<X_i^T W Y_i, X_j^T W' Y_j> of dense float64 matrices; ``of`` is applied to every input."""
    second = second or first

    def deltas(side, m, letters, weight):
        start = sum(b[-1] for b in side["bounds"][:m])
        x, y = (of(side[letter][m].double().numpy()) for letter in letters)
        w = of(side["weights"].double().numpy())[weight, start : start + len(x)]
        w = np.ones(len(x)) if weight < 0 else w
        spans = [slice(a, b) for a, b in pairwise(side["bounds"][m])]
        dense = [x[s].T @ (w[s, None] * y[s]) for s in spans]
        return np.stack(dense).reshape(len(dense), -1) if dense else np.zeros((0, 0))

    def module(m, epilogue):
        kind, row, column = epilogue
        letters = ("UV", "UU", "VV")[kind]
        one, two = deltas(first, m, letters, row), deltas(second, m, letters, column)
        return (one @ two.T).ravel() if len(one) and len(two) else np.zeros(0)

    modules = range(len(first["bounds"]))
    return np.array([np.concatenate([module(m, e) for m in modules]) for e in epilogues])


def allowed(first, second, p, q, epilogues, accumulate="fp32"):
    """Error allowed per entry: LAMBDA sqrt(n) u of the same sum over absolute values.

    n counts the roundings of a term: those of its two Grams, r r2 additions, a product and two
    weights. In float64 the definition itself rounds as often, and that is the sqrt(2). On a device:
    as in test_triton_gram.py.
    """
    widest = [max((np.diff(b).max(initial=0) for b in side["bounds"]), default=0)
              for side in (first, second or first)]  # fmt: skip
    n = 2 * max(*p, *q) + int(widest[0] * widest[1]) + 5
    whole = definition(first, second, epilogues, of=np.abs)
    if DEVICE != "cpu" and accumulate == "fp32":
        return (ON_DEVICE + n * U32) * whole
    unit = U32 if accumulate == "fp32" else U64 * 2**0.5
    return LAMBDA * n**0.5 * unit * whole


def check(interpreter, first, second, p, q, epilogues, **options):
    """Run, compare, return the result."""
    got = interpreter(first, second, p, q, epilogues, **options)
    want = definition(first, second, epilogues)
    assert got.dtype == F64 and tuple(got.shape) == want.shape
    bound = allowed(first, second, p, q, epilogues, options.get("accumulate", "fp32"))
    excess = np.abs(got.numpy() - want) - bound
    assert (excess <= 0).all(), f"exceeds its bound by {excess.max():.3g}"
    return got


# A tile of the interpreter has 32 rows, a k-block 32 columns.
P, Q = [33, 16, 64, 5], [17, 48, 1, 40]
RAGGED = [(3, 0, 34, 1), (), (9, 16), (7,)]
OTHER = [(3, 33), (2,), (4, 0, 11), ()]


@pytest.mark.parametrize("second", [None, OTHER])
def test_every_epilogue_of_ragged_modules(rng, interpreter, second):
    first = draw(rng, RAGGED, P, Q)
    second = second and draw(rng, second, P, Q)
    check(interpreter, first, second, P, Q, EVERY[second is None :: 2])


SHAPES = {  # ranks of each module, p, q
    "uniform": ([(16,) * 5, (16,) * 2], [32, 16], [16, 48]),
    "one_row_each": ([(1,) * 40], [19], [1]),
    "wider_than_a_tile": ([(64,), (32, 64)], [16, 16], [16, 32]),
    "even_but_not_equal": ([(4, 8, 20, 4), (16, 4)], [7, 33], [5, 6]),
    "one_segment": ([(1,), (31,), (100,)], [3, 4, 5], [6, 7, 8]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(rng, interpreter, shape):
    ranks, p, q = SHAPES[shape]
    first, second = draw(rng, ranks, p, q), draw(rng, [(2, 0, 9)] * len(p), p, q)
    check(interpreter, first, None, p, q, NEEDS[:3])
    check(interpreter, first, second, p, q, NEEDS[4:6])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F32), (F32, BF16), (F64, F64)])
def test_dtypes(rng, interpreter, dtypes):
    p, q = [40, 9], [7, 33]
    first = draw(rng, [(5, 30, 2), (8, 8)], p, q, *dtypes)
    second = draw(rng, [(4, 6), (1,)], p, q, dtypes[-1], dtypes[0])
    for accumulate in ("fp32", "fp64") if F64 not in dtypes else ("fp64",):
        check(interpreter, first, None, p, q, NEEDS[:2], accumulate=accumulate)
        check(interpreter, first, second, p, q, NEEDS[-1:], accumulate=accumulate)


def test_weights_may_be_float64(rng, interpreter):
    p, q = [12], [20]
    first = draw(rng, [(5, 3, 7)], p, q)
    first["weights"] = first["weights"].double() / 3
    check(interpreter, first, None, p, q, NEEDS, accumulate="fp64")


def test_without_weights_on_a_single_module_it_is_the_block_gram(rng, interpreter):
    first = draw(rng, [(3, 0, 40, 9, 16)], [40], [24])
    U, V, offsets = first["U"][0], first["V"][0], torch.tensor(first["bounds"][0])
    plain = {**first, "weights": None}
    got = interpreter(plain, None, [40], [24], [(UV, -1, -1)])
    assert torch.equal(got.view(5, 5), interpreter(U, V, offsets, name="block_gram"))


def test_same_bits_for_any_number_of_programs(rng, interpreter):
    first, second = draw(rng, RAGGED, P, Q), draw(rng, OTHER, P, Q)
    for other in (None, second):
        once = interpreter(first, other, P, Q, NEEDS[-1:], programs=1)
        for programs in (2, 1000):
            assert torch.equal(once, interpreter(first, other, P, Q, NEEDS[-1:], programs=programs))


def test_equal_weights_give_symmetric_bits_and_others_the_transpose(rng, interpreter):
    first = draw(rng, [(3, 36, 9, 1, 1)], [33], [20])
    got = interpreter(first, None, [33], [20], [(UV, 0, 0), (VV, 1, -1), (VV, -1, 1)])
    same, one, other = got.view(3, 5, 5)
    assert torch.equal(same, same.T)
    off = ~torch.eye(5, dtype=torch.bool)
    assert torch.equal(one[off], other.T[off]) and not torch.equal(one, other)


def test_rows_are_read_where_they_lie(rng, interpreter):
    """Two blocks of adapters in one buffer, modules in another order, NaN around every row."""
    p, q, ranks = [20, 33], [16, 5], [(3, 30, 8, 1), (7, 2, 2, 5)]
    whole = draw(rng, ranks, p, q)
    strides, starts, end = [48, 64], [0, 0], 16
    buffers = {letter: torch.full((4000,), torch.nan) for letter in "UV"}
    for m in (1, 0):
        starts[m] = end
        for a in range(sum(ranks[m])):
            for letter, columns in (("U", p[m]), ("V", q[m])):
                row = buffers[letter][end : end + -(-columns // 16) * 16]
                row.zero_()[:columns] = whole[letter][m][a]
            end += strides[m]

    def block(which):
        bounds = [b[which.start : which.stop + 1] for b in whole["bounds"]]
        at = [s + b[0] * k for s, b, k in zip(starts, bounds, strides, strict=True)]
        first = np.cumsum([0, sum(ranks[0])])
        weights = [whole["weights"][:, f + b[0] : f + b[-1]]
                   for f, b in zip(first, bounds, strict=True)]  # fmt: skip
        place = dict(starts_u=at, starts_v=at, strides_u=strides, strides_v=strides)
        weights = torch.cat(weights, 1)
        bounds = [[x - b[0] for x in b] for b in bounds]
        small = {x: [whole[x][m][b[which.start] : b[which.stop]]
                     for m, b in enumerate(whole["bounds"])] for x in "UV"}  # fmt: skip
        return (dict(bounds=bounds, weights=weights, **place, **buffers),
                dict(bounds=bounds, weights=weights, **small))  # fmt: skip

    (one, one_dense), (two, two_dense) = block(slice(0, 2)), block(slice(2, 4))
    for second, dense in ((None, None), (two, two_dense)):
        got = interpreter(one, second, p, q, NEEDS[:2]).numpy()
        want = definition(one_dense, dense, NEEDS[:2])
        assert (np.abs(got - want) <= allowed(one_dense, dense, p, q, NEEDS[:2])).all()


def test_addresses_beyond_32_bits(interpreter):
    U, V = torch.arange(256.0).reshape(16, 16).to(F16) / 64, torch.eye(16, dtype=F16) + 1
    bounds = [[0, 8, 16]] * 2
    near = dict(U=[U, U.flip(0, 1)], V=[V, V], bounds=bounds)
    at = dict(starts_u=[0, FAR], starts_v=[0, 0], strides_u=[16, 16], strides_v=[16, 16])
    far = dict(U=None, V=V.ravel(), bounds=bounds, weights=None, **at)
    for second in (False, True):
        got = [interpreter(x, x if second else None, [16, 16], [16, 16], [(UV, -1, -1)])
               for x in (near, far)]  # fmt: skip
        assert torch.equal(*got) and got[0].all()


def test_nan_and_inf_stay_in_their_segment(rng, interpreter):
    p, q = [20, 9], [5, 33]
    first = draw(rng, [(3, 7, 2, 40), (4, 4)], p, q)
    clean = interpreter(first, None, p, q, NEEDS[:2])
    for bad in (np.nan, np.inf):
        U, V = first["U"][0].clone(), first["V"][0].clone()
        U[5, 4] = V[5, 2] = bad  # segment 1 of module 0
        got = interpreter(
            {**first, "U": [U, first["U"][1]], "V": [V, first["V"][1]]}, None, p, q, NEEDS[:2]
        )
        touched = torch.zeros(4, 4, dtype=torch.bool)
        touched[1] = touched[:, 1] = True
        touched = torch.cat([touched.ravel(), torch.zeros(4, dtype=torch.bool)])
        assert torch.equal(got[:, ~touched], clean[:, ~touched])
        assert not got[:, touched].isfinite().any()


def test_nothing_to_sum(rng, interpreter):
    p, q = [6, 4], [5, 3]
    nothing, some = draw(rng, [(), (0, 0)], p, q), draw(rng, [(2,), (1, 3)], p, q)
    for first, second, results in (
        (nothing, None, 4), (nothing, some, 4), (some, nothing, 4), (some, None, 5)
    ):  # fmt: skip
        got = interpreter(first, second, p, q, NEEDS[:2])
        assert tuple(got.shape) == (2, results) and got.any() == (results == 5)
    assert tuple(interpreter(some, None, p, q, []).shape) == (0, 5)
    flat = draw(rng, [(2, 3)], [0], [4])
    assert not interpreter(flat, None, [0], [4], [(UV, -1, -1), (UU, 0, 0)]).any()


def test_out_is_written_and_nothing_around_it(rng, interpreter):
    first = draw(rng, [(3, 40), (2,)], [6, 5], [4, 3])
    wide = torch.full((4, 9), 7.0, dtype=F64)
    got, out = interpreter(first, None, [6, 5], [4, 3], NEEDS[:2], out=wide[1:3, 2:7])
    assert torch.equal(got, out)
    assert torch.equal(got, interpreter(first, None, [6, 5], [4, 3], NEEDS[:2]))
    assert (out.as_strided((4, 9), (9, 1), 0) == 7.0).sum() == 36 - 10


FAULTS = ("a tile pair dropped", "weights exchanged", "a k-block dropped",
          "a module's neighbour read", "transposed tiles taken as they are")  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_can_fail(rng, interpreter, fault):
    p, q = [32, 16], [16, 20]
    first = draw(rng, [(16, 16, 5, 20), (7, 30)], p, q)
    second = draw(rng, [(3,), (2, 2)], p, q) if "neighbour" in fault else None
    with pytest.raises(AssertionError, match="exceeds its bound"):
        check(interpreter, first, second, p, q, [(UV, 0, 0), (VV, 1, -1)], fault=fault)


@pytest.mark.skipif(DEVICE != "cpu", reason="checks on the host: texts and views are the CPU's")
def test_errors_name_the_argument(rng, interpreter):
    p, q = [6, 20], [4, 5]
    first = draw(rng, [(3, 2), (1,)], p, q)
    U = torch.zeros(200)
    place = dict(starts_u=[0, 80], starts_v=[0, 80], strides_u=[16, 32], strides_v=[16, 32])
    rows = dict(U=U, V=U, bounds=[[0, 3, 5], [0, 1]], weights=first["weights"], **place)
    for match, change in {
        "^precision must be one of": dict(precision="best"),
        "^p must have 2 modules, got 1": dict(p=[6]),
        "^an epilogue is .product, row weight, column weight.": dict(epilogues=[(0, 0, 0, 1)]),
        "^the weights of an epilogue": dict(epilogues=[(0, 2, 0)]),
        "^the product of an epilogue": dict(epilogues=[(3, 0, 0)]),
        "^first.weights must have shape .2, 6. on cpu": dict(weights=torch.zeros(2, 5)),
        "^first.weights must be a torch.Tensor": dict(weights=None),
        "^second.bounds must have 2 modules, got 1": dict(second={**rows, "bounds": [[0]]}),
        "^first.bounds.0. must rise from 0": dict(bounds=[[0, 3, 2], [0, 1]]),
        "^first.starts_u.1. and strides_u.1. must be multiples of 16": dict(starts_u=[0, 81]),
        "^first.starts_v.1.*not closer than 16, got 80 and 0": dict(strides_v=[16, 0]),
        "^module 1 ends beyond first.U, of 100 elements": dict(U=U[:100].clone()),
        "^first.U must start at a multiple of 16 bytes": dict(U=U[1:]),
        "^first.V must be contiguous with 1 dimension": dict(V=U[None]),
        '^first.U is float64: that needs accumulate="fp64"': dict(U=U.double()),
        "^first.V must be on cpu, where first.U is, got meta": dict(V=U.to("meta")),
        "^out must be float64 of shape .1, 5.": dict(out=torch.zeros(5, dtype=F64)),
        "^the rows of out must be contiguous": dict(out=torch.zeros(5, 2, dtype=F64).T[:1]),
    }.items():
        given = dict(second=None, p=p, q=q, epilogues=[(UV, 0, 0)])
        side = {**rows, **{k: v for k, v in change.items() if k in rows}}
        given |= {k: v for k, v in change.items() if k not in rows}
        with pytest.raises((ValueError, TypeError), match=match):
            interpreter(side, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_clear_error(rng):
    from mergeprobe_fast.kernels import Rows, gram_pass

    with pytest.raises(RuntimeError, match="needs a CUDA device, and torch sees none"):
        gram_pass(Rows.pack(**draw(rng, [(2, 3)], [6], [4])), None, [6], [4], NEEDS)


if __name__ == "__main__":
    program()
