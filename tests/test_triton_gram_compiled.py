"""P1 in Triton, compiled for sm_80 and sm_90: registers, spills, instructions, wide loads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")
from triton_child import MOST_SPILLED  # noqa: E402
from triton_views import VIEWS  # noqa: E402

pytestmark = pytest.mark.triton
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

UNIFORM, ODD = (16,) * 64, (3, 5, 7, 1, 30, 9) * 20
VARIANTS = {  # every configuration, with what strains it most; `_inspect` compiles more
    "both": dict(size="large", reduce="both", ranks=ODD),
    "two_stacks": dict(
        size="large", reduce="both", ranks=UNIFORM, two_stacks=True, transposed=True
    ),
    "columns": dict(size="large", reduce="columns", ranks=ODD),
    "both_small": dict(size="small", reduce="both", ranks=ODD),
    "none_small": dict(size="small", reduce="none", ranks=ODD),
}
INSTRUCTION = {
    (80, "half"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    (90, "half"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    (80, "high"): r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32",
    (90, "high"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32",
    (80, "fp64"): r"mma\.sync\.aligned\.m8n8k4\.row\.col\.f64\.f64\.f64\.f64",
}
INSTRUCTION |= {(arch, "highest"): INSTRUCTION[arch, "high"] for arch in (80, 90)}
INSTRUCTION[90, "fp64"] = INSTRUCTION[80, "fp64"].replace("m8n8k4", "(m8n8k4|m16n8k16)")
JOBS = list(product((80, 90), ("half", "high", "highest", "fp64"), VARIANTS))


@pytest.fixture(scope="module")
def inspect():
    from mergeprobe_fast.kernels import gram

    if gram.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set: there is nothing to compile")
    from mergeprobe_fast.kernels import _inspect

    return _inspect


@pytest.fixture(scope="module")
def builds(inspect):
    """Futures of all compilations; ptxas and LLVM leave the interpreter lock."""

    def build(arch, kind, variant):
        launched = inspect.meta_launches(kind, arch, **VARIANTS[variant])
        second_stage = launched[1:] if kind == "half" else []  # the same for every kind
        return [inspect.resources(launch, arch) for launch in launched[:1] + second_stage]

    pool = ThreadPoolExecutor(2)
    yield {job: pool.submit(build, *job) for job in JOBS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("arch", "kind", "variant"), JOBS)
def test_compiles_without_spills(inspect, builds, arch, kind, variant):
    built = builds[arch, kind, variant].result()
    for used in built:
        print(f"{used.registers} registers, {used.shared} bytes shared")
        assert used.stack <= MOST_SPILLED and used.registers <= 255
        assert used.shared <= inspect.SHARED_MEMORY[arch]
    assert re.search(INSTRUCTION[arch, kind], built[0].ptx)
    assert "cp.async.cg.shared.global" in built[0].ptx  # cg: 16 bytes at a time


def test_each_gram_has_its_own_dtype(inspect):
    launched = inspect.meta_launches("highest", 90, **VARIANTS["both"], dtypes=(BF16, F32))
    ptx = inspect.resources(launched[0], 90).ptx
    assert all(re.search(INSTRUCTION[90, kind], ptx) for kind in ("half", "high"))


def test_the_spill_check_can_fail(inspect):
    from mergeprobe_fast.kernels._configs import GramConfig

    config = GramConfig(128, 32, num_warps=8, num_stages=3, precision="tf32x3")
    launched = inspect.meta_launches("highest", 80, **VARIANTS["both"], config=config)
    assert inspect.resources(launched[0], 80).stack > 100


@pytest.mark.parametrize("height", [16, 31])
@pytest.mark.parametrize("columns", [64, 45])
@pytest.mark.parametrize("view", VIEWS)
def test_loads_are_wide_or_the_factor_is_copied(rng, view, columns, height):
    from mergeprobe_fast.kernels import _arguments, _configs, gram

    x = VIEWS[view](torch.tensor(rng.standard_normal((16 * height, columns))))
    stack = _arguments.Stack(x, x, [*range(0, 16 * height + 1, height)], None)
    out = torch.empty((16, 16), dtype=F64)
    named = next(gram.launches(stack, None, "both", "fp64", _configs.INTERPRETER, out))[2]
    used, row, k = named["p_u"], named["s_u_row"], named["s_u_k"]
    assert torch.equal(used[:, :columns], x) and not used[:, columns:].any()
    by_column = row == 1 and k % 16 == 0 and named["ALIGN_I"] >= 8
    assert (k == 1 and row % 16 == 0) or by_column
    assert used.data_ptr() % 16 == 0 and named["K_U"] % 16 == 0
    as_it_is = ("half_of_the_columns", "one_row_repeated") + ("B_transposed",) * (height == 16)
    assert (used is x) == (columns == 64 and view in as_it_is)
