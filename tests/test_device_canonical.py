"""P3 on a device, in torch on CPU tensors: against dense SVDs and the CPU's canonical form."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device kernels take torch tensors")
from test_canonical import CASES, RANKS, Truth  # noqa: E402
from tolerances import bound  # noqa: E402

from mergeprobe_fast.kernels import canonical as device  # noqa: E402
from mergeprobe_fast.ops import canonical as on_cpu  # noqa: E402
from mergeprobe_fast.ops.reference import Canonical  # noqa: E402

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sides(factors):
    """(U, V) float64 of a sum of factors: one delta of scale 1."""
    u = torch.from_numpy(np.hstack([s * np.float64(b) for b, _, s in factors]).T)
    return u, torch.from_numpy(np.vstack([a for _, a, _ in factors]))


def of_entry(got, e, p, q):
    """An entry as `Canonical`, after what the layout promises: zeros in all the rest."""
    k = int(got.rank[e])
    u, v = got.view(e, "u"), got.view(e, "v")
    for x, d in ((u, p), (v, q)):
        assert x.shape == (got.heights[e], -(-d // 16) * 16)
        assert not x[k:].any() and not x[:, d:].any()
    n = min(len(u), p, q)
    assert not got.sigma[e, n:].any()
    return Canonical(
        u[:k, :p].double().numpy(), got.sigma[e, :n].numpy(), v[:k, :q].double().numpy(), k
    )


def check_float32(got, truth):
    """As `Truth.check`, of rows that were rounded to float32."""
    rank, close = truth.ranks()
    assert abs(got.rank - rank) <= close
    n = min(len(got.sigma), len(truth.sigma))
    off = np.abs(got.sigma[:n] - truth.sigma[:n]).max(initial=0)
    assert off <= bound("sigma") * truth.size
    for x in (got.left, got.right):
        assert np.abs(x @ x.T - np.eye(got.rank)).max(initial=0) <= bound("float32 rows")
    rest = np.linalg.norm(truth.sigma[got.rank :])
    error = np.linalg.norm(truth.rebuilt(got) - truth.delta)
    allowed = bound("float32 rows") * truth.sigma.sum() + bound("sigma") * truth.size
    assert error <= rest * (1 + 1e-6) + allowed


def draw(rng, shapes, dtype=torch.float32):
    """Lists of U = B^T, a transposed view, and V of (rank, p, q), and scales; some degenerate."""
    U, V, scale = [], [], rng.choice([-2.0, 0.5, 1.0], len(shapes))
    for i, (r, p, q) in enumerate(shapes):
        b, a = (torch.tensor(rng.standard_normal(s), dtype=dtype) for s in ((p, r), (r, q)))
        if i % 4 == 1:
            b.zero_()
        elif i % 4 == 3 and r > 1:
            a[-1] = a[0]
        U.append(b.T)
        V.append(a)
    return U, V, scale.tolist()


RAGGED = [
    (4, 33, 50), (3, 33, 50), (0, 33, 50), (16, 33, 50), (1, 64, 17), (9, 64, 17), (5, 64, 17),
    (30, 20, 90), (2, 1, 7), (6, 1, 7), (4, 48, 64), (40, 300, 41),
]  # fmt: skip


def test_every_case_of_the_cpu_in_one_batch(rng):
    cases = {name: make(rng) for name, make in CASES.items()}
    U, V = zip(*(sides(factors) for factors in cases.values()), strict=True)
    got = device.canonical_batch(U, V, dtype=F64)
    assert got.first_failure() is None
    for e, (name, factors) in enumerate(cases.items()):
        one = of_entry(got, e, U[e].shape[1], V[e].shape[1])
        Truth(factors).check(one)
        assert one.rank == RANKS.get(name, one.rank), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_zoos_agree_with_the_cpu(rng, dtype):
    U, V, scale = draw(rng, RAGGED, dtype)
    got = device.canonical_batch(U, V, scale=scale)
    for e, (r, p, q) in enumerate(RAGGED):
        one = of_entry(got, e, p, q)
        if r == 0:
            assert one.rank == 0
            continue
        factors = [(U[e].T, V[e], scale[e])]
        want, truth = on_cpu(factors), Truth(factors)
        assert one.rank == want.rank
        assert np.abs(one.sigma - want.sigma).max(initial=0) <= 2 * bound("sigma") * truth.size
        check_float32(one, truth)
    starts, ends = got.starts_u, got.starts_u + got.heights * got.widths_u
    assert torch.equal(starts[1:], ends[:-1]) and int(ends[-1]) == int(got.starts_v[0])


def test_the_checks_of_float32_rows_can_fail(rng):
    U, V, scale = draw(rng, [(4, 33, 50)])
    one = of_entry(device.canonical_batch(U, V, scale=scale), 0, 33, 50)
    truth = Truth([(U[0].T, V[0], scale[0])])
    check_float32(one, truth)
    rough = torch.from_numpy(one.left).bfloat16().double().numpy()
    for wrong in (
        one._replace(left=rough), one._replace(left=-one.left), one._replace(rank=3),
        one._replace(sigma=one.sigma * (1 + 1e-10)), one._replace(right=one.right[::-1]),
    ):  # fmt: skip
        with pytest.raises((AssertionError, ValueError)):
            check_float32(wrong, truth)


def test_lists_stacks_and_buffers_are_the_same_factors(rng):
    b = torch.tensor(rng.standard_normal((5, 24, 4)), dtype=torch.bfloat16)
    a = torch.tensor(rng.standard_normal((5, 4, 40)), dtype=torch.bfloat16)
    ranks = [4, 2, 0, 1, 3]
    listed = device.canonical_batch(
        [x.T[:r] for x, r in zip(b, ranks, strict=True)],
        [x[:r] for x, r in zip(a, ranks, strict=True)],
    )
    stacked = device.canonical_batch(b.mT, a, ranks)
    data = torch.cat([b.flatten(), a.flatten()]).view(torch.uint8)  # as read from files
    n, ones = torch.arange(5), torch.ones(5, dtype=torch.int64)
    side_u = device.Factors(data, n * 192, ones, 4 * ones, torch.tensor(ranks), 24 * ones, ones)
    side_v = device.Factors(
        data, 960 + n * 320, 40 * ones, ones, torch.tensor(ranks), 40 * ones, ones
    )
    held = device.canonical_batch(side_u, side_v)
    for other in (stacked, held):
        assert torch.equal(other.rows, listed.rows) and torch.equal(other.sigma, listed.sigma)
    side_v.starts[4] += 82
    with pytest.raises(ValueError, match=r"V\[4\] ends outside of data"):
        device.canonical_batch(side_u, side_v)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", "UV")
def test_what_is_not_finite_is_named_and_stays_alone(rng, side, bad):
    U, V, scale = draw(rng, RAGGED)
    clean = device.canonical_batch(U, V, scale=scale)
    assert clean.first_failure() is None
    for e in (5, 6):
        (U if side == "U" else V)[e][-1, -1] = bad
    got = device.canonical_batch(U, V, scale=scale)
    letter = "B" if side == "U" else "A"
    assert got.first_failure() == (5, f"{letter} holds NaN or infinite values")
    assert got.status.nonzero().flatten().tolist() == [5, 6]
    for e in range(len(RAGGED)):
        if e in (5, 6):
            assert got.rank[e] == 0 and not got.view(e, "u").any() and not got.view(e, "v").any()
        else:
            assert torch.equal(got.sigma[e], clean.sigma[e])
            assert torch.equal(got.view(e, "u"), clean.view(e, "u"))


def test_badly_scaled_units_and_factors(rng):
    b, a = rng.standard_normal((30, 7)), rng.standard_normal((7, 40))
    steps = np.geomspace(1e-30, 1e30, 7)
    plain = on_cpu([(np.float32(b), np.float32(a), 1.0)]).sigma
    U = [torch.tensor((b * s).T, dtype=torch.float32) for s in (steps, 1e18, 1e-18)]
    V = [torch.tensor(a / s, dtype=torch.float32) for s in (steps[:, None], 1e18, 1e-18)]
    U += [torch.from_numpy(np.float32(b).astype("f8").T * s) for s in (2.0**-1000, 2.0**560)]
    V += [torch.from_numpy(np.float32(a).astype("f8") * s) for s in (2.0**1000, 2.0**-560)]
    got = device.canonical_batch(U, V, dtype=F64)
    assert got.rank.tolist() == [7] * 5
    np.testing.assert_allclose(got.sigma, [plain] * 5, rtol=1e-5)
    np.testing.assert_allclose(got.sigma[3:], [plain] * 2, rtol=1e-10)
    huge = device.canonical_batch(U[-1:], [V[-1] * 2.0**1000 * 2.0**100])
    assert huge.first_failure() == (0, "the delta overflows float64") and huge.rank[0] == 0


def test_rank_rule(rng):
    u, _ = np.linalg.qr(rng.standard_normal((30, 6)))
    v, _ = np.linalg.qr(rng.standard_normal((40, 6)))
    U = [torch.from_numpy((u * [1, 0.5, 0.11, 0.09, 0.0011, 0.0009]).T)]
    V = [torch.from_numpy(v.T)]
    for relative, rank in ((1e-1, 3), (1e-3, 5), (0.0, 6)):
        for scale in (1.0, -1e-9, 0.0):
            got = device.canonical_batch(U, V, scale=[scale], relative=relative).rank.tolist()
            assert got == [rank if scale else 0]
    loud = [sides([(u, v.T, 1.0), (u, v.T, 1e4), (u, v.T, -1e4)])]
    (U, V), size = zip(*loud, strict=True), 1e4 * 12**0.5
    for noise, rank in ((0.5 / size, 6), (2 / size, 0)):
        assert device.canonical_batch(U, V, relative=0.0, noise=noise).rank.tolist() == [rank]


def test_slabs_batches_and_a_given_buffer(rng, monkeypatch):
    U, V, scale = draw(rng, RAGGED)
    want = device.canonical_batch(U, V, scale=scale)
    out = torch.full((len(want.rows) + 5,), torch.nan)
    from mergeprobe_fast.kernels import _canonical_torch

    monkeypatch.setattr(_canonical_torch, "SLAB", 700)
    monkeypatch.setattr(device, "SMALL", 1)
    got = device.canonical_batch(U, V, scale=scale, out=out)
    assert got.rows is out and out[-5:].isnan().all()
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.sigma, want.sigma, rtol=1e-12, atol=1e-12)
    for e, (_, p, q) in enumerate(RAGGED):
        a, b = of_entry(got, e, p, q), of_entry(want, e, p, q)
        assert np.abs(Truth.rebuilt(a) - Truth.rebuilt(b)).max(initial=0) <= 1e-4


def test_rows_of_modules_for_the_block_gram(rng):
    U, V, scale = draw(rng, RAGGED)
    got = device.canonical_batch(U, V, scale=scale)
    rows = got.modules([4, 3, 1, 0, 2, 1, 1])
    assert rows.bounds[:4] == [[0, 4, 7, 7, 23], [0, 1, 10, 15], [0, 30], [0]]
    start, stride = rows.starts_v[1], rows.strides_v[1]
    module = rows.V[start : start + 15 * stride].view(15, stride)
    assert torch.equal(module[1:10], got.view(5, "v")) and stride == 32
    first = got.sigma[0, :4] / got.sigma[0, 0]
    torch.testing.assert_close(rows.weights[:, :4].double(), torch.stack([first, first**2]))
    assert (
        rows.weights.shape == (2, sum(r for r, _, _ in RAGGED)) and not rows.weights[:, 4:7].any()
    )
    with pytest.raises(ValueError, match="counts must sum to 12, got 3"):
        got.modules([3])


@pytest.mark.parametrize("shape", [(3, 5, 5), (4, 7, 3), (2, 1, 9), (0, 4, 4), (2, 0, 3)])
def test_singular_values(rng, shape):
    x = torch.from_numpy(rng.standard_normal(shape))
    x[1:2] *= 1e-200
    got = device.singular_values(x)
    want = np.linalg.svd(x.numpy(), compute_uv=False)
    assert got.dtype == F64 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-11)
    if x.numel():
        x[0, 0, 0] = torch.inf
        assert device.singular_values(x).isnan().any(1).tolist() == [True] + [False] * (len(x) - 1)


def test_nothing_to_do():
    got = device.canonical_batch([], [])
    assert got.rows.numel() == 0 and got.sigma.shape == (0, 0) and got.first_failure() is None
    empty = [torch.zeros(3, 0)]
    got = device.canonical_batch(empty, [torch.ones(3, 4)])
    assert got.rank.tolist() == [0] and got.rows.shape == (48,) and not got.rows.any()


ONE, TWO = torch.ones(2, 3), torch.ones(2, 4)
REFUSED = {
    "U and V must have as many entries, got 1 and 2": dict(V=[TWO, TWO]),
    r"U\[0\] and V\[0\] must have as many rows, got 2 and 1": dict(V=[TWO[:1]]),
    r"V\[0\] must be float32, bfloat16, float16 or float64, got torch.int64": dict(V=[TWO.long()]),
    r"U\[0\] must have 2 dimensions, got 1": dict(U=[ONE[0]]),
    "U must have 3 dimensions or be a list, got 2 dimensions": dict(U=ONE),
    r"ranks\[0\] is 3, and U\[0\] has 2 rows": dict(ranks=[3]),
    r"ranks must have shape \(1,\), got \(2,\)": dict(ranks=[1, 1]),
    r"scale\[0\] is nan": dict(scale=[float("nan")]),
    r"scale must have shape \(1,\), got \(2,\)": dict(scale=[1.0, 1.0]),
    "relative must be finite and not negative, got -1": dict(relative=-1),
    "dtype must be float32 or float64": dict(dtype=torch.bfloat16),
    "out must be 1-D torch.float32 on cpu with 64 elements or more": dict(out=torch.zeros(63)),
    "backend must be 'auto', 'torch' or 'triton', got 'cuda'": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        device.canonical_batch(**{"U": [ONE], "V": [TWO], **REFUSED[message]})
