"""P1 in Triton: the kernels in the interpreter against numpy.

The interpreter must be switched on before triton is imported, and another test may have imported
it; so this file is also the program of a child process that runs ``block_gram`` on request.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")
from tolerances import LAMBDA, U32, U64  # noqa: E402
from triton_child import CHOSEN, DEVICE, child, moved, serve  # noqa: E402
from triton_views import VIEWS  # noqa: E402

pytestmark = pytest.mark.triton
REDUCE = ("both", "columns", "none")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def far_apart():
    """A transposed view whose columns lie so far apart that the last is beyond 2^31 elements."""
    stride = 150_000_000
    flat = torch.frombuffer(mmap.mmap(-1, 2 * 16 * stride), dtype=F16)  # pages appear when written
    U = flat.as_strided((16, 16), (1, stride))
    U.copy_(torch.arange(256.0).reshape(16, 16) / 64)
    return U


def plant(fault, launches, *arguments):
    """The launches of ``block_gram`` with a fault, to show that the checks can fail."""
    for kernel, grid, named in launches(*arguments):
        if "K_U" in named:
            if fault == "a k-block dropped":
                named["K_U"] -= 16
            if fault == "one tile pair short":
                grid = (grid[0] - 1,)
        yield kernel, grid, named


def program():
    """The child process: keyword arguments in, (result, out) out."""
    from mergeprobe_fast.kernels import _configs, gram

    launches = gram.launches
    assert gram.INTERPRETED == (CHOSEN != "cuda") and _configs.INTERPRETER.block == 32

    def handle(request):
        gram.launches = partial(plant, request.pop("fault", None), launches)
        if request["U"] is None:
            request["U"] = moved(far_apart(), DEVICE)
        return gram.block_gram(**request), request.get("out")

    serve(handle)


@pytest.fixture(scope="module")
def interpreter():
    """``block_gram`` in the interpreter."""
    with child(__file__) as ask:

        def call(U, V, offsets, U2=None, V2=None, offsets2=None, **options):
            names = ("U", "V", "offsets", "U2", "V2", "offsets2")
            stacks = dict(zip(names, (U, V, offsets, U2, V2, offsets2), strict=True))
            answer, out = ask({**stacks, **options})
            return (answer, out) if "out" in options else answer

        yield call


def draw(rng, ranks, p, q, dtype=F32, dtype_v=None):
    """(U, V, offsets) of normal rows, with one zero row and one row twice where there are two."""
    offsets = torch.tensor([0, *np.cumsum(ranks, dtype=np.int64)])
    U, V = (torch.tensor(rng.standard_normal((offsets[-1], k))) for k in (p, q))
    if len(U) > 2:
        U[rng.integers(len(U))] = 0.0
        one, other = rng.integers(len(U), size=2)
        U[one], V[one] = U[other], V[other]
    return U.to(dtype), V.to(dtype_v or dtype), offsets


def definition(stacks, scale=None, scale2=None, reduce="both", of=lambda x: x):
    """The double sum as it is written, in float64; ``of`` is applied to every input."""
    U, V, offsets, U2, V2, offsets2 = (stacks * 2)[:6]
    scale2 = scale if len(stacks) == 3 else scale2
    u, v, u2, v2 = (of(x.double().numpy()) for x in (U, V, U2, V2))
    product = (u @ u2.T) * (v @ v2.T)
    for axis, bounds, factor in ((0, offsets, scale), (1, offsets2, scale2)):
        spans = [slice(a, b) for a, b in pairwise(bounds.tolist())]
        factor = np.ones(len(spans)) if factor is None else of(np.asarray(factor))
        if reduce == "both" or (reduce == "columns" and axis == 1):
            sums = [product[(slice(None),) * axis + (span,)].sum(axis) for span in spans]
            product = np.stack(sums, axis) if sums else np.zeros((0, 0))
        else:
            factor = np.repeat(factor, [span.stop - span.start for span in spans])
        product = product * factor.reshape((-1, 1) if axis == 0 else (1, -1))
    return product


# Of a product of two Grams of float32: three tf32 products each, good to 2^-20. The tensor core may
# cut its sums off instead of rounding them: n u then, not sqrt(n) u.
ON_DEVICE = 2 * 2.0**-20


def allowed(stacks, accumulate="fp32", **options):
    """Error allowed per entry: LAMBDA sqrt(n) u of the same sum over absolute values.

    n counts the roundings a term goes through in the worst order: p and q additions for its two
    Grams, one product, r r2 additions for its segment pair, two scalings. In float64 numpy's own
    sum rounds as often, and that is the sqrt(2). On a device: see `ON_DEVICE`.
    """
    widest = [int(x.diff().max()) if len(x) > 1 else 0 for x in (stacks * 2)[2:6:3]]
    n = stacks[0].shape[1] + stacks[1].shape[1] + widest[0] * widest[1] + 3
    whole = definition(stacks, of=np.abs, **options)
    if DEVICE != "cpu" and accumulate == "fp32":
        return (ON_DEVICE + n * U32) * whole
    unit = U32 if accumulate == "fp32" else U64 * 2**0.5
    return LAMBDA * n**0.5 * unit * whole


def check(interpreter, *stacks, accumulate="fp32", fault=None, **options):
    """Run, compare, return the result."""
    extra = {} if fault is None else {"fault": fault}
    given = {k: None if v is None else torch.tensor(v) for k, v in options.items() if "scale" in k}
    reduce = options.get("reduce", "both")
    got = interpreter(*stacks, accumulate=accumulate, reduce=reduce, **given, **extra)
    want = definition(stacks, **options)
    assert got.dtype == F64 and tuple(got.shape) == want.shape
    excess = np.abs(got.numpy() - want) - allowed(stacks, accumulate, **options)
    assert (excess <= 0).all(), f"exceeds its bound by {excess.max():.3g}"
    if len(stacks) == 3 and reduce != "columns":
        assert torch.equal(got, got.T)
    return got


# name: (ranks, p, q). A tile of the interpreter has 32 rows, a k-block 32 columns.
SHAPES = {
    "one_1x1": ((1,), 1, 1),
    "one_adapter": ((5,), 33, 17),
    "rank1_each": ((1,) * 40, 19, 1),
    "uniform_16": ((16,) * 7, 64, 48),
    "uniform_64_splits": ((64, 64), 32, 16),
    "multiples_of_4": ((4, 8, 16, 4, 12, 20, 4), 48, 31),
    "empty_and_wide": ((0, 3, 0, 70, 1, 33, 0), 45, 100),
    "cut_through": ((20,) * 6, 7, 5),
    "exactly_a_tile": ((16, 0, 16), 96, 9),
    "a_row_more": ((16, 17), 16, 33),
    "wide_then_many": ((70, *(1,) * 40), 5, 6),
}


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(rng, interpreter, shape, reduce):
    ranks, p, q = SHAPES[shape]
    one, two = draw(rng, ranks, p, q), draw(rng, (7, 0, 40, 1), p, q)
    s, s2 = rng.standard_normal(len(ranks)), rng.standard_normal(4)
    check(interpreter, *one, reduce=reduce, scale=s)
    check(interpreter, *one, *two, reduce=reduce, scale=s, scale2=s2)
    check(interpreter, *two, *one, reduce=reduce, scale2=s, accumulate="fp64")


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("tiles", range(1, 8))
def test_every_tile_pair_once(rng, interpreter, tiles, reduce):
    stacks = draw(rng, (32,) * (tiles - 1) + (5, 9), 16, 16)
    check(interpreter, *stacks, reduce=reduce)
    check(interpreter, *stacks, *draw(rng, (9, 0, 40), 16, 16), reduce=reduce)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F64, F64)])
@pytest.mark.parametrize("reduce", REDUCE)
def test_dtypes(rng, interpreter, dtypes, reduce):
    ranks = rng.integers(0, 12, 14)
    one, two = draw(rng, ranks, 80, 37, *dtypes), draw(rng, (3, 36), 80, 37, dtypes[-1], dtypes[0])
    for accumulate in ("fp32", "fp64") if F64 not in dtypes else ("fp64",):
        check(interpreter, *one, reduce=reduce, accumulate=accumulate)
        check(interpreter, *one, *two, reduce=reduce, accumulate=accumulate)


@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_range(rng, interpreter, size):
    U, V, offsets = draw(rng, (8, 3, 12), 64, 48)
    check(interpreter, U * size, V, offsets, scale=np.array([size, 1.0, -1 / size]))
    check(interpreter, U * size, V * size, offsets, reduce="columns")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(rng, interpreter, view, dtype):
    U, V, offsets = draw(rng, (16, 16, 48), 64, 32, dtype)
    viewed = VIEWS[view](U)
    got = check(interpreter, viewed, V, offsets)
    assert torch.equal(got, interpreter(viewed.contiguous(), V, offsets))
    check(interpreter, *draw(rng, (3, 30, 9), 64, 32, dtype), viewed, VIEWS[view](V), offsets)


def test_addresses_beyond_32_bits(rng, interpreter):
    U, V = torch.arange(256.0).reshape(16, 16).to(F16) / 64, torch.eye(16, dtype=F16) + 1
    offsets = torch.tensor([0, 8, 16])
    assert torch.equal(interpreter(None, V, offsets), interpreter(U, V, offsets))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("reduce", REDUCE)
def test_nan_and_inf_stay_in_their_segment(rng, interpreter, reduce, bad):
    U, V, offsets = draw(rng, (3, 7, 2, 40, 5), 33, 20)
    U, V = U.abs() + 1, V.abs() + 1
    clean = interpreter(U, V, offsets, reduce=reduce)
    U[5, 4] = bad  # segment 1
    got = interpreter(U, V, offsets, reduce=reduce)
    touched = torch.zeros(clean.shape, dtype=torch.bool)
    rows = 1 if reduce == "both" else slice(3, 10) if reduce == "columns" else 5
    touched[rows if reduce != "columns" else 5] = True
    touched[:, 5 if reduce == "none" else 1] = True
    assert torch.equal(got[~touched], clean[~touched])
    assert not got[touched].isfinite().any() and (np.isnan(bad) or not got[touched].isnan().any())


def test_same_bits_every_run(rng, interpreter):
    stacks = draw(rng, rng.integers(0, 50, 9), 70, 50)
    for reduce in REDUCE:
        once = interpreter(*stacks, reduce=reduce)
        assert torch.equal(once, interpreter(*stacks, reduce=reduce))


def test_out_is_written_and_nothing_around_it(rng, interpreter):
    stacks = draw(rng, (3, 0, 40, 9), 20, 20)
    wide = torch.full((6, 9), 7.0, dtype=F64)
    got, out = interpreter(*stacks, out=wide.T[2:6, 1:5])
    assert torch.equal(got, out) and torch.equal(got, interpreter(*stacks))
    whole = out.as_strided((6, 9), (9, 1), 0)
    assert (whole == 7.0).sum() == 54 - 16


@pytest.mark.parametrize("ranks", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("reduce", REDUCE)
def test_nothing_to_sum(rng, interpreter, ranks, reduce):
    nothing, some = draw(rng, ranks, 6, 4), draw(rng, (2, 3), 6, 4)
    for stacks in (nothing, (*nothing, *some), (*some, *nothing)):
        rows, last = stacks[:3], stacks[-3:]
        got = interpreter(*stacks, reduce=reduce)
        n = len(rows[2]) - 1 if reduce == "both" else len(rows[0])
        assert tuple(got.shape) == (n, len(last[0]) if reduce == "none" else len(last[2]) - 1)
        assert not got.any()
    assert not interpreter(*draw(rng, (2, 3), 0, 4), reduce=reduce).any()


FAULTS = ("a k-block dropped", "one tile pair short", "factors rounded to tf32")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_can_fail(rng, interpreter, fault):
    # Tight where it is used least: short sums. tf32 keeps 11 bits of 24.
    U, V, offsets = draw(rng, (1,) * 40, 32, 16)
    stacks = (U, V, offsets)
    check(interpreter, *stacks)
    if fault == "factors rounded to tf32":
        rounded = (U.view(torch.int32) & -0x2000).view(F32)
        got = interpreter(rounded, V, offsets).numpy()
        assert (np.abs(got - definition(stacks)) > allowed(stacks)).any()
    else:
        with pytest.raises(AssertionError, match="exceeds its bound"):
            check(interpreter, *stacks, fault=fault)


@pytest.mark.skipif(DEVICE != "cpu", reason="checks on the host: texts and views are the CPU's")
def test_errors_name_the_argument(rng, interpreter):
    U, V, offsets = draw(rng, (3, 2), 6, 4)
    for match, change in {
        "^U must have 2 dimensions, got 1": dict(U=U[0]),
        "^V must be float32, bfloat16, float16 or float64, got torch.int64": dict(V=V.long()),
        '^U is float64: that needs accumulate="fp64"': dict(U=U.double()),
        "^U and V must have as many rows, got 5 and 4": dict(V=V[:4]),
        "^offsets must rise from 0 to the number of rows, 5": dict(offsets=offsets + 1),
        "^offsets must be an int64": dict(offsets=offsets.int()),
        "^scale must have shape .2,., got .3,.": dict(scale=torch.ones(3)),
        "^scale2 needs a second stack": dict(scale2=torch.ones(2)),
        "^U2, V2 and offsets2 form one stack": dict(U2=U),
        "^V2 must have 4 columns, got 3": dict(U2=U, V2=V[:, :3], offsets2=offsets),
        "^reduce must be one of": dict(reduce="rows"),
        "^out must be float64 of shape .2, 2. on cpu": dict(out=torch.zeros(2, 3)),
        "^V must be on cpu, where U is, got meta": dict(V=V.to("meta")),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            interpreter(**{"U": U, "V": V, "offsets": offsets, **change})


def test_tiles_hold_parts_and_parts_hold_rows(rng):
    from mergeprobe_fast.kernels import _tiles

    for _ in range(200):
        ranks = rng.integers(0, rng.integers(2, 90), rng.integers(1, 40))
        offsets = [0, *np.cumsum(ranks).tolist()]
        if offsets[-1] == 0:
            continue
        block = 2 ** int(rng.integers(4, 7))
        tiles = _tiles.cut(offsets, block)
        bounds = np.cumsum([0, *tiles.part_rows])
        assert [bounds[part] for part in tiles.parts] == tiles.rows
        assert [bounds[part] for part in tiles.parts_of] == offsets
        heights = np.diff(tiles.rows)
        assert heights.min() > 0 and heights.max() <= block
        assert len(heights) <= max(1.1 * -(-offsets[-1] // block), 1)
        assert all(rows % tiles.chunk == 0 for rows in tiles.part_rows)
        assert tiles.uniform == (set(tiles.part_rows) == {tiles.chunk})
        assert all(row % tiles.align == 0 for row in tiles.rows[:-1])
        assert max(np.diff(tiles.parts)) <= tiles.most_parts


def test_import_loads_neither_torch_nor_triton(tmp_path):
    code = "import sys, mergeprobe_fast.kernels; print({'torch', 'triton'} & set(sys.modules))"
    # Not from the checkout: its mergeprobe_fast/ would shadow the installed package.
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert printed == "set()\n"
    code = "import sys; sys.modules['triton'] = None; import mergeprobe_fast.kernels as k"
    command = [sys.executable, "-c", f"{code}; k.block_gram"]
    error = subprocess.run(
        command, text=True, capture_output=True, check=False, cwd=tmp_path
    ).stderr
    assert "RuntimeError: the Triton backend needs the package triton, which is missing" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_clear_error(rng):
    from mergeprobe_fast.kernels import block_gram

    with pytest.raises(RuntimeError, match="needs a CUDA device, and torch sees none"):
        block_gram(*draw(rng, (2, 3), 6, 4))


def test_a_device_out_of_memory_is_not_called_missing(rng, monkeypatch):
    from mergeprobe_fast import ops
    from mergeprobe_fast.kernels import gram

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gram, "block_gram", full)
    with pytest.raises(torch.OutOfMemoryError):
        ops.block_gram(*draw(rng, (2, 3), 6, 4), backend="triton")


if __name__ == "__main__":
    program()
