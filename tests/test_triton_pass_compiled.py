"""P1 over many modules in Triton, compiled for sm_80 and sm_90: registers, spills, wide loads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="triton is not installed")
from test_triton_gram_compiled import INSTRUCTION  # noqa: E402
from triton_child import MOST_SPILLED  # noqa: E402

pytestmark = pytest.mark.triton
# What strains each configuration most; `_inspect` compiles the others.
JOBS = [
    (80, "half", "large", "even 16", False), (90, "half", "large", "even 16", True),
    (90, "half", "small", "odd", False), (90, "highest", "large", "even 16", False),
]  # fmt: skip


@pytest.fixture(scope="module")
def inspect():
    from mergeprobe_fast.kernels import gram

    if gram.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set: there is nothing to compile")
    from mergeprobe_fast.kernels import _inspect, _inspect_pass

    def build(arch, kind, size, ranks, two_stacks, stage=0, **options):
        ranks = _inspect_pass.RANKS[ranks]
        launched = _inspect_pass.pass_launches(
            kind, arch, size=size, ranks=ranks, two_stacks=two_stacks, **options
        )
        return _inspect.resources(launched[stage], arch)

    return _inspect, build


@pytest.fixture(scope="module")
def builds(inspect):
    """Futures of all compilations; ptxas and LLVM leave the interpreter lock."""
    pool = ThreadPoolExecutor(2)
    yield {job: pool.submit(inspect[1], *job) for job in JOBS}
    pool.shutdown(cancel_futures=True)


# That the check can fail is shown in test_triton_gram_compiled.py.
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_compiles_without_spills(inspect, builds, job):
    arch, kind, *_ = job
    used = builds[job].result()
    print(f"{used.registers} registers, {used.shared} bytes shared")
    assert used.stack <= MOST_SPILLED and used.registers <= 255
    assert used.shared <= inspect[0].SHARED_MEMORY[arch]
    assert re.search(INSTRUCTION[arch, kind], used.ptx)
    # Starts and strides come from memory, and still loads are 16 bytes (cg) and never 4 or 8 (ca).
    assert "cp.async.cg.shared.global" in used.ptx and "cp.async.ca" not in used.ptx


def test_the_sums_of_parts_do_not_spill(inspect):
    used = inspect[1](80, "half", "small", "odd", False, stage=1)
    assert used.stack == 0 and used.registers <= 128


def test_large_tiles_are_for_even_segments():
    from mergeprobe_fast.kernels import _pass_configs as configs

    assert configs.even([[0, 16, 16, 32], [], [0], [0, 16]]) and configs.even([])
    for bounds in ([0, 3, 6], [0, 2], [0, 16, 24]):
        assert not configs.even([bounds])
    assert not configs.even([[0, 16], [0, 8]])
    for fills, is_even, large in ((True, True, True), (False, True, False), (True, False, False)):
        pairs = 132 if fills else 131
        chosen = configs.choose("half", lambda block, n=pairs: n, is_even, (9, 0), 132)
        assert (chosen == configs.HOPPER["half", "large"]) == large
    with pytest.raises(RuntimeError, match="needs sm_80 or newer, this is sm_75"):
        configs.choose("half", lambda block: 1, True, (7, 5), 40)
