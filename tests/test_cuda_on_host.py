"""The CUDA kernels of sign statistics, run on the CPU thread by thread, against the CPU's counts.

``cuda_on_host.cpp`` includes the very source that nvcc compiles; what it stands in for is the
hardware: barriers, asynchronous copies, the tensor core's instruction on bits, atomics. Not covered
here: the launches of csrc/cuda/signs.cu and what a compiler for GPUs does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sign_cases import FUSED, as_cpu, bfloat, cancelling, mixed, wide

CSRC = Path(__file__).parents[1] / "csrc"
# -fno-strict-aliasing: as nvcc. Undefined behaviour ends the program.
FLAGS = ["-std=c++17", "-O2", "-fno-strict-aliasing",
         "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]  # fmt: skip
# As cuda_on_host.cpp numbers them; and the barriers of which each one is needed.
FAULTS = ("", "last slab", "edge", "no wait", "zeros ignored", "lanes swapped", "not fused")
BARRIERS = {"generate": (1, 2, 3), "count": (2, 5, 9, 10, 11, 12)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A function from requests to the counts that the kernels find."""
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs g++ and the fibers of glibc")
    program = tmp_path_factory.mktemp("host") / "cuda_on_host"
    source = Path(__file__).with_name("cuda_on_host.cpp")
    built = subprocess.run(
        ["g++", *FLAGS, f"-I{CSRC}", f"-I{CSRC / 'include'}", str(source), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]

    def run(requests):
        done = subprocess.run([program], input=b"".join(requests), capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        return done.stdout

    return run


def request(factors, *, tiles=1, processors=1, matrix=False, order=0, fault="", barrier=(0, 0)):
    """``factors``: (B (d_out, r), A (r, d_in), scale) in numpy; views keep their strides."""
    rows, blob = [], b""
    for b, a, scale in factors:
        row = [b.shape[1], int(np.sign(scale))]
        for x in (b.T, a):
            data, strides = memory_of(x)
            blob += b"\0" * (-len(blob) % 16)
            row += [len(blob), *strides, CODE[x.dtype.name]]
            blob += data
        rows.append(row)
    d_out, d_in = factors[0][0].shape[0], factors[0][1].shape[1]
    head = [len(factors), d_out, d_in, tiles, processors, matrix, order, FAULTS.index(fault),
            *barrier, len(blob)]  # fmt: skip
    return np.array(head, np.int64).tobytes() + np.array(rows, np.int64).tobytes() + blob


CODE = {"float32": 0, "uint16": 1, "float16": 2, "float64": 3}  # uint16: the bits of bfloat16


def memory_of(x):
    """What a view spans, and its strides in elements. A view of a larger array brings all of it."""
    base = x
    while base.base is not None:
        base = base.base
    whole = base.reshape(-1, order="A")
    skip = (x.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // x.itemsize
    return whole[skip:].tobytes(), [s // x.itemsize for s in x.strides]


def counts(output, sizes):
    """(conflicts, both, bad) of each request."""
    numbers = np.frombuffer(output, np.int64)
    assert len(numbers) == sum(2 * n * n + 1 for n in sizes)
    for n in sizes:
        found, bad = np.split(numbers[: 2 * n * n + 1], [2 * n * n])
        numbers = numbers[2 * n * n + 1 :]
        yield *found.reshape(2, n, n), int(bad[0])


def cases(rng):
    """(factors, keyword arguments): shapes round tiles, slabs, splits and both products."""
    some = mixed(rng, 70, 130, [3, 16, 17, 1, 40], zeros=True)
    none = mixed(rng, 65, 257, [4, 33, 2, 16, 5])
    many = mixed(rng, 9, 33, rng.integers(1, 6, 131).tolist())
    return [
        (mixed(rng, 1, 1, [1, 2]), {}),
        (mixed(rng, 1, 300, [2, 3, 1], zeros=True), {"matrix": True}),
        (mixed(rng, 130, 1, [2, 0, 1]), {"tiles": 3}),
        (some, {"tiles": 3, "order": 1}),
        (some, {"tiles": 4, "matrix": True, "order": 2}),
        (none, {"tiles": 4, "processors": 3, "order": 1}),
        (none, {"tiles": 6, "processors": 1, "matrix": True, "order": 2}),
        (none, {"tiles": 5, "processors": 2, "matrix": True, "order": 1}),
        (many, {"matrix": True}),
        (mixed(rng, 8, 16, [1] * 130, zeros=True), {"order": 1}),
        (cancelling(rng, 66, 20, 4), {"order": 1}),
    ]


@pytest.mark.skipif(not FUSED, reason="no instruction set here has fused multiply-adds")
def test_counts_are_the_cpu_s_to_the_last_one(host, rng, monkeypatch):
    given = cases(rng)
    output = host([request(factors, **options) for factors, options in given])
    found = list(counts(output, [len(factors) for factors, _ in given]))
    for (factors, options), (conflicts, both, bad) in zip(given, found, strict=True):
        assert bad >= 2 * len(factors), options
        for isa in FUSED:
            want = as_cpu(factors, monkeypatch, isa)
            np.testing.assert_array_equal(conflicts, want[0], str(options))
            np.testing.assert_array_equal(both, want[1], str(options))
    assert any((both != both[0, 1])[np.triu_indices(len(both), 1)].any() for _, both, _ in found)


def test_counts_are_the_definition_s_where_sums_are_exact(host, rng):
    """Small integers: every float32 sum is exact, so signs are those of the true products."""
    factors = []
    for rank in (2, 3, 20, 1):
        b, a = rng.integers(-2, 3, (70, rank)), rng.integers(-2, 3, (rank, 140))
        factors.append((np.float32(b), np.float32(a), rng.choice([-2.0, 0.5])))
    x = np.sign([s * (b.astype(float) @ a.astype(float)) for b, a, s in factors])
    want = [[((x[i] * x[j]) < 0).sum() for j in range(4)] for i in range(4)]
    both = [[((x[i] * x[j]) != 0).sum() for j in range(4)] for i in range(4)]
    output = host([request(factors, tiles=2, matrix=matrix) for matrix in (False, True)])
    for found in counts(output, [4, 4]):
        np.testing.assert_array_equal(found[0], np.triu(want, 1))
        np.testing.assert_array_equal(found[1], np.triu(both, 1))


def test_the_first_factor_that_is_not_finite_is_named(host, rng):
    made = []
    for which, side, value in ((1, 0, np.nan), (3, 1, -np.inf), (0, 1, np.inf), (4, 0, np.nan)):
        factors = mixed(rng, 70, 130, [17, 1, 4, 2, 3])
        for later in {which, 4}:
            b, a, s = factors[later]
            b, a = b.copy(), a.copy()
            x = (b, a)[side]
            x[-1, -1] = bfloat(value) if x.dtype == np.uint16 else value
            factors[later] = (b, a, s)
        made.append((factors, 2 * which + side))
    output = host([request(factors, tiles=2) for factors, _ in made])
    for (_, want), (*_, bad) in zip(made, counts(output, [5] * len(made)), strict=True):
        assert bad == want


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_planted_fault_is_seen(host, rng, fault):
    """With both products, but for what only one of them has."""
    factors = mixed(rng, 40, 140, [20, 17, 40, 18, 33], zeros=fault == "zeros ignored")
    if fault == "edge":  # numbers beyond it, as wide() leaves them
        (b, a, _), (d, c, _) = factors[0], factors[3]
        factors = [(b, wide(a), 1.0), (d, wide(c), 1.0)]
    if fault == "not fused":
        factors = cancelling(rng, 40, 140, 3)
    options = [
        {"matrix": matrix, "fault": planted}
        for matrix in ((True,) if fault == "lanes swapped" else (False, True))
        for planted in ("", fault)
    ]
    output = host([request(factors, **o) for o in options])
    found = [np.stack(c[:2]) for c in counts(output, [len(factors)] * len(options))]
    for good, bad in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(good, found[0])
        assert (good != bad).any()


def test_every_barrier_is_needed(host, rng):
    """Each left out on its own: in two chunks of the rank, and through two products of a block."""
    factors = mixed(rng, 64, 140, [20, 17, 32, 18, 31], zeros=True)
    skipped = [
        (0, 0),
        *((b, 0) for b in BARRIERS["generate"]),
        *((0, b) for b in BARRIERS["count"]),
    ]
    output = host([request(factors, tiles=2, order=2, barrier=b) for b in skipped])
    good, *found = (np.stack(c[:2]) for c in counts(output, [5] * len(skipped)))
    for barrier, bad in zip(skipped[1:], found, strict=True):
        assert (good != bad).any(), barrier
