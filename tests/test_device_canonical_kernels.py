"""P3 on a device, the Triton kernels: in the interpreter, and compiled for sm_80 and sm_90.

The interpreter must be switched on before triton is imported, so this file is also the program of a
child process.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device kernels take torch tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")
from test_canonical import CASES, RANKS, Truth  # noqa: E402
from test_device_canonical import DTYPES, F64, ONE, TWO, check_float32, draw, of_entry, sides  # noqa: E402
from triton_child import CHOSEN, MOST_SPILLED, child, moved, serve  # noqa: E402

from mergeprobe_fast.kernels import canonical as device  # noqa: E402

pytestmark = pytest.mark.triton


def program():
    """The child process: (function, arguments, options, fault) in, the result out."""
    from mergeprobe_fast.kernels import _canonical_triton

    launches, sweeps = _canonical_triton.Side.launches, _canonical_triton.SWEEPS
    assert _canonical_triton.INTERPRETED == (CHOSEN != "cuda")

    def short(self, *args, **kwargs):
        for kernel, grid, named in launches(self, *args, **kwargs):
            named["p_table"][0, 3] -= 1  # columns, or groups of them
            yield kernel, grid, named

    def handle(request):
        name, args, options, fault = request
        _canonical_triton.Side.launches = short if fault == "a column dropped" else launches
        _canonical_triton.SWEEPS = 1 if fault == "one sweep" else sweeps
        answer = getattr(device, name)(*args, **options, backend="triton")
        if isinstance(answer, device.CanonicalBatch):
            answer = replace(answer, **moved(vars(answer), "cpu"))
        return answer

    serve(handle)


@pytest.fixture(scope="module")
def interpreter():
    """``call(name, ..., fault=...)``: a function of kernels.canonical, in the interpreter."""
    with child(__file__) as ask:
        yield lambda name, *args, fault=None, **options: ask((name, args, options, fault))


KERNEL_CASES = ("dead_units", "one_by_one", "near_duplicates_1e-6", "mixed_a_1e5")


def test_kernels_on_hard_cases(rng, interpreter):
    cases = [CASES[name](rng) for name in KERNEL_CASES]
    U, V = (list(x) for x in zip(*(sides(factors) for factors in cases), strict=True))
    got = interpreter("canonical_batch", U, V, dtype=F64)
    for e, (name, factors) in enumerate(zip(KERNEL_CASES, cases, strict=True)):
        one = of_entry(got, e, U[e].shape[1], V[e].shape[1])
        Truth(factors).check(one)
        assert one.rank == RANKS.get(name, one.rank)


def test_kernels_on_every_dtype_and_layout(rng, interpreter):
    shapes = [(8, 40, 64), (5, 33, 50), (0, 5, 5), (1, 16, 70)]
    U, V, scale = [], [], [0.5, -1.0, 2.0, 1.5]
    for (r, p, q), dtype in zip(shapes, DTYPES, strict=True):
        U.append(torch.tensor(rng.standard_normal((p, r)), dtype=dtype).T)
        V.append(torch.tensor(rng.standard_normal((r, q)), dtype=dtype))
    wide = torch.tensor(rng.standard_normal((6, 90)), dtype=torch.float32)
    U.append(wide[::2, ::3])  # no unit stride
    V.append(wide[3:, 7:20])  # unaligned
    shapes.append((3, 30, 13))
    scale.append(1.0)
    got = interpreter("canonical_batch", U, V, scale=scale)
    for e, (r, p, q) in enumerate(shapes):
        one = of_entry(got, e, p, q)
        if r:
            check_float32(one, Truth([(U[e].T, V[e], scale[e])]))
    again = interpreter("canonical_batch", U[1:2], V[1:2], scale=scale[1:2])
    assert torch.equal(again.view(0, "u"), got.view(1, "u"))


def test_kernels_at_every_height(rng, interpreter):
    shapes = [(17, 40, 45), (33, 64, 50)]
    U, V, _ = draw(rng, [shapes[0], (1, 1, 1), shapes[1]])
    U, V = [U[0], U[2]], [V[0], V[2]]
    got = interpreter("canonical_batch", U, V, scale=[1.0, -1.0])
    for e, (_, p, q) in enumerate(shapes):
        check_float32(of_entry(got, e, p, q), Truth([(U[e].T, V[e], (1.0, -1.0)[e])]))


def test_faults_of_the_kernels_are_noticed(rng, interpreter):
    U, V, scale = draw(rng, [(4, 33, 50)])
    truth = Truth([(U[0].T, V[0], scale[0])])
    short = interpreter("canonical_batch", U, V, scale=scale, fault="a column dropped")
    with pytest.raises(AssertionError):
        check_float32(of_entry(short, 0, 33, 50), truth)
    early = interpreter("canonical_batch", U, V, scale=scale, fault="one sweep")
    assert early.first_failure() == (0, "the singular value iteration did not converge")
    V[0][2, 3] = torch.nan
    bad = interpreter("canonical_batch", U, V, scale=scale)
    assert bad.first_failure() == (0, "A holds NaN or infinite values") and not bad.rows.any()


def test_singular_values_by_the_kernel(rng, interpreter):
    x = torch.from_numpy(rng.standard_normal((4, 7, 5)))
    x[0, :, 3:] = 0
    x[1] *= 1e-200
    x[2, 1, 1] = torch.nan
    got, want = interpreter("singular_values", x), np.linalg.svd(x[[0, 1, 3]].numpy())[1]
    assert got[2].isnan().all()
    off = np.abs(got[[0, 1, 3]].numpy() - want) / want[:, :1]
    assert off.max() <= 1e-14


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_kernels_need_a_device(rng):
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        device.canonical_batch([ONE], [TWO], backend="triton")


COMPILED = {  # `_inspect` compiles all
    16: ("Cholesky", "Jacobi", "Gram of A, half", "Gram of Q of B, fp32, unaligned"),
    32: ("Cholesky", "rows of A, fp32, unaligned"),
    64: ("Cholesky", "Jacobi", "Gram of Q of A, half", "rows of B, fp32"),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch):
    from mergeprobe_fast.kernels import _inspect, _inspect_canonical

    for height, names in COMPILED.items():
        launches = _inspect_canonical.canonical_launches(height)
        for name in names:
            used = _inspect.resources(launches[name], arch)
            assert used.stack <= MOST_SPILLED, name
            assert used.shared <= _inspect.SHARED_MEMORY[arch], name
            if " of " in name:
                assert re.search(r"mma\.sync\.aligned\.m\d+n8k\d+\.row\.col(\.f64){4}", used.ptx)
                assert ("unaligned" in name) or any(
                    w in used.ptx for w in ("cp.async.cg.shared.global", "ld.global.v4.b32")
                )


if __name__ == "__main__":
    program()
