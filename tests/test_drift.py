"""What updates do to the outputs of their own domain: definitions on materialised outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from domain_world import NAMES, World
from tolerances import bound

from mergeprobe_fast.engine import passes
from mergeprobe_fast.features.drift import FAMILY, OUTPUT_FAMILY
from mergeprobe_fast.recorded import NOTHING


def columns(world, family, threads=2):
    """Columns of adapters, and of all ordered pairs (a, b) as (N, N)."""
    data = family.compute(world.zoo, world.recorded, threads)
    n = len(world.names)
    a, b = (x.ravel() for x in np.indices((n, n)))
    return (
        {c.name: c.finish(data) for c in family.adapters},
        {c.name: c.finish(data, a, b).reshape(n, n) for c in family.pairs},
    )


def outputs(world, name, domain, module):
    return world.inputs(domain, module) @ world.delta(name, module).T


def own(name):
    return name.split("-")[0]


def expected(world, name):
    """Every column of FAMILY."""
    made, domain = world.made[name].modules, own(name)
    if not any(m.delta.any() for m in made.values()):
        return dict.fromkeys(c.name for c in FAMILY.adapters)
    energy, relative, median, rank, top = [], [], [], [], []
    for m in made:
        y = outputs(world, name, domain, m)
        base = world.calibration.output_moments[domain, m]
        values = np.linalg.eigvalsh(y.T @ y / len(y))
        values = values[values > 1e-12 * max(values.max(), 1e-300)]
        energy.append((y**2).sum(1).mean())
        relative.append(energy[-1] / base.sum())
        median.append(np.median((y**2).mean(0) / base))
        p = values / values.sum()
        rank.append(math.exp(-(p * np.log(p)).sum()) if len(p) else 0.0)
        top.append(values.max(initial=0.0))
    return {
        "drift": math.sqrt(sum(energy)), "self_disturbance": math.sqrt(np.mean(relative)),
        "self_disturbance_median": math.sqrt(np.mean(median)),
        "drift_effective_rank": np.average(rank, weights=energy),
        "drift_top_share": sum(top) / sum(energy),
    }  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [192 << 20, 1])
def test_drift_is_its_definition(tmp_path, rng, isa, monkeypatch, chunk_bytes):
    monkeypatch.setattr(passes, "CHUNK_BYTES", chunk_bytes)
    world = World(tmp_path, rng)
    adapters, pairs = columns(world, FAMILY)
    for i, name in enumerate(world.names):
        for column, want in expected(world, name).items():
            got = adapters[column][i]
            if want is None:
                assert math.isnan(got), column
            else:
                assert got == pytest.approx(want, rel=bound("on domains")), column
    for i, a in enumerate(world.names):
        for j, b in enumerate(world.names):
            for name, victim, partner in (
                ("disturbance_median_a_by_b", a, b), ("disturbance_median_b_by_a", b, a),
            ):  # fmt: skip
                want = median(world, partner, own(victim))
                assert pairs[name][i, j] == pytest.approx(
                    want, rel=bound("on domains"), nan_ok=True
                )


def median(world, name, domain):
    made = world.made[name].modules
    if not any(m.delta.any() for m in made.values()):
        return math.nan
    shares = [
        np.median(
            (outputs(world, name, domain, m) ** 2).mean(0)
            / world.calibration.output_moments[domain, m]
        )
        for m in made
    ]
    return math.sqrt(np.mean(shares))


def test_the_bound_catches_centred_outputs(tmp_path, rng, monkeypatch):
    world = World(tmp_path, rng)
    adapters, _ = columns(world, FAMILY)
    plain = outputs
    monkeypatch.setitem(
        globals(), "outputs", lambda *x: plain(*x) - plain(*x).mean(0, keepdims=True)
    )
    i = world.names.index("math-a")
    want = expected(world, "math-a")
    for column in want:
        assert adapters[column][i] != pytest.approx(want[column], rel=bound("on domains")), column


def test_channels_that_the_base_does_not_use_do_not_count(tmp_path, rng):
    moments = {}
    for m, count in zip(NAMES, (24, 9, 20, 24), strict=True):
        for d in ("math", "code", "law"):
            moments[d, m] = np.where(np.arange(count) % 3, 1.0, 0.0)
    world = World(tmp_path, rng, output_moments=moments)
    adapters, _ = columns(world, FAMILY)
    i = world.names.index("math-c")
    shares = []
    for m in world.made["math-c"].modules:
        y = (outputs(world, "math-c", "math", m) ** 2).mean(0)
        shares.append(np.median(y[np.arange(len(y)) % 3 > 0]))
    want = math.sqrt(np.mean(shares))
    assert adapters["self_disturbance_median"][i] == pytest.approx(want, rel=bound("on domains"))


def u_centred(k):
    """Szekely and Rizzo 2014, equation 2.5 of a similarity: entry by entry."""
    n = len(k)
    k = k - np.diag(np.diag(k))
    out = np.zeros_like(k)
    for i in range(n):
        for j in range(n):
            if i != j:
                out[i, j] = (
                    k[i, j] - k[i].sum() / (n - 2) - k[:, j].sum() / (n - 2)
                    + k.sum() / ((n - 1) * (n - 2))
                )  # fmt: skip
    return out


def shift(world, name, module, kind=np.longdouble):
    """1 - CKA, in extended precision where there is any."""
    domain = own(name)
    y = world.calibration.outputs[domain, module].astype(kind)
    z = y + outputs(world, name, domain, module).astype(kind)
    if len(y) < 4:
        return math.nan
    k, h = (u_centred(x @ x.T) for x in (y, z))
    return float(1 - (k * h).sum() / np.sqrt((k**2).sum() * (h**2).sum()))


def test_output_shift_is_its_definition(tmp_path, rng):
    world = World(tmp_path, rng, outputs=True)
    adapters, pairs = columns(world, OUTPUT_FAMILY)
    assert not pairs
    for i, name in enumerate(world.names):
        made = world.made[name].modules
        shifts = [shift(world, name, m) for m in made if made[m].delta.any()]
        known = [x for x in shifts if not math.isnan(x)]
        for column, reduce in (("output_shift", np.mean), ("output_shift_max", np.max)):
            want = reduce(known) if known else math.nan
            got = adapters[column][i]
            assert got == pytest.approx(want, rel=bound("on domains"), nan_ok=True), column


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="1 - CKA of 1e-15 needs extended precision"
)
def test_a_tiny_shift_keeps_its_digits(tmp_path, rng):
    """1 - CKA falls with the square of the update: 1e-15 here, of which float64 has no digit."""
    world = World(tmp_path, rng, outputs=True, adapters=("math-a",))
    made = world.made["math-a"].modules
    world.rewrite("math-a", {n: (m.a, 1e-8 * m.b) for n, m in made.items()})
    adapters, _ = columns(world, OUTPUT_FAMILY)
    modules = world.made["math-a"].modules
    want = np.mean([shift(world, "math-a", n) for n in modules])
    assert 0 < want < 1e-13
    assert adapters["output_shift"][0] == pytest.approx(want, rel=1e-3, abs=0)
    double = np.mean([shift(world, "math-a", n, np.float64) for n in modules])
    assert double != pytest.approx(want, rel=1e-3, abs=0)


def test_gauge_and_threads_leave_them(tmp_path, rng):
    world = World(tmp_path, rng, outputs=True)
    before = {**columns(world, FAMILY)[0], **columns(world, OUTPUT_FAMILY)[0]}
    for threads in (1, 3):
        again, _ = columns(world, FAMILY, threads)
        assert all(again[c].tobytes() == before[c].tobytes() for c in again)
    for name, made in list(world.made.items()):
        factors = {}
        for n, m in made.modules.items():
            left, right = (np.linalg.qr(rng.standard_normal((len(m.a),) * 2))[0] for _ in "lr")
            move = left @ np.diag(np.geomspace(1, 5, len(m.a))) @ right
            factors[n] = move @ m.a, m.b @ np.linalg.inv(move)
        world.rewrite(name, factors)
    moved = {**columns(world, FAMILY)[0], **columns(world, OUTPUT_FAMILY)[0]}
    for c in before:
        np.testing.assert_allclose(moved[c], before[c], rtol=2e-5, err_msg=c)


def test_what_is_missing_is_said(tmp_path, rng):
    old = World(tmp_path / "old", rng, version=1).recorded
    new = World(tmp_path / "new", rng).recorded
    assert FAMILY.missing(new) is None
    assert FAMILY.missing(old) == FAMILY.missing(NOTHING) == "a calibration with output moments"
    for recorded in (old, new, NOTHING):
        assert OUTPUT_FAMILY.missing(recorded) == "a calibration with outputs"
