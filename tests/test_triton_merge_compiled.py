"""P2 in Triton, compiled for sm_80 and sm_90: registers, spills, instructions."""

from __future__ import annotations

import re
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.triton
SOME = ("ties into bf16", "ties by frequency", "ties beyond 2^32", "order")  # `_inspect` has more


@pytest.fixture(scope="module")
def inspect():
    from mergeprobe_fast.kernels import _deltas

    if _deltas.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set: there is nothing to compile")
    from mergeprobe_fast.kernels import _inspect

    return _inspect


@pytest.fixture(scope="module")
def launches(inspect):
    return {kind: inspect.tile_launches(kind) for kind in ("chain", "tensor")}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["chain", "tensor"])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(inspect, launches, arch, kind, name):
    used = inspect.resources(launches[kind][name], arch)
    print(f"{used.registers} registers, {used.shared} bytes shared")
    assert used.stack == 0 and used.registers <= 255
    assert used.shared <= 16 * 1024  # so that the cache keeps what is left of 227 KiB
    # Nothing but the entries' own chain may be fused, or become less exact than the CPU's.
    assert not re.search(r"\.ftz|div\.full|div\.approx", used.ptx)
    if kind == "chain":
        assert "fma.rn.f32" in used.ptx and "mma" not in used.ptx
    else:
        # What is subtracted is a chain all the same.
        assert "fma.rn.f32" not in used.ptx or name.startswith(("ties by", "ties beyond"))
        assert "wgmma" not in used.ptx
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in used.ptx
    if name == "ties into bf16":
        assert "div.rn.f32" in used.ptx and re.search(r"cvt\.rn\.bf16(x2)?\.f32", used.ptx)
    if name == "ties beyond 2^32":
        assert "cvt.rn.f16.f64" in used.ptx  # float16 is rounded once
    if name == "order":
        assert re.search(r"(red|atom)\S*\.relaxed\S*add\.u64", used.ptx)


def test_packing_and_norms_compile(inspect, launches):
    for arch, name in product((80, 90), ("pack", "norms")):
        assert inspect.resources(launches["chain"][name], arch).stack == 0


def test_the_spill_check_can_fail(inspect, launches):
    kernel, grid, named = launches["chain"]["ties of weighted"]
    tight = {**named, "maxnreg": 64}
    assert inspect.resources((kernel, grid, tight), 80).stack > 50
