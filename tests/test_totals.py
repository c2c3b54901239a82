"""Exact inner products of whole updates against materialised deltas."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from domain_world import DOMAINS, NAMES, SHARED, World
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.totals import totals
from mergeprobe_fast.io.calibration import Calibration

FIELDS = ("gram", "inputs", "relative")


def expected(world):
    """All Grams from their definitions."""
    n = len(world.names)
    out = {"gram": np.zeros((n, n)), **{f: np.zeros((3, n, n)) for f in FIELDS[1:]}}
    for i, a in enumerate(world.names):
        for j, b in enumerate(world.names):
            out["gram"][i, j] = sum((world.delta(a, m) * world.delta(b, m)).sum() for m in NAMES)
            for d, domain in enumerate(DOMAINS):
                terms = world.total(a, b, domain, NAMES)
                out["inputs"][d, i, j] = terms["raw"]
                out["relative"][d, i, j] = terms["relative"]
    return out


def check(found, want):
    for field in FIELDS:
        got, size = getattr(found, field), np.abs(want[field]).max()
        assert got.shape == want[field].shape, field
        assert np.abs(got - want[field]).max() <= bound("exact_algebra") * size, field
        assert (got == np.swapaxes(got, -1, -2)).all(), field


@pytest.mark.parametrize("chunk_bytes", [192 << 20, 1, 30_000])
def test_totals_are_their_definition(tmp_path, rng, isa, monkeypatch, chunk_bytes):
    monkeypatch.setattr(passes, "CHUNK_BYTES", chunk_bytes)
    world = World(tmp_path, rng)
    seen = []
    found = totals(world.zoo, world.recorded.calibration, progress=seen.append)
    assert found.names == world.names and found.domains == list(DOMAINS)
    check(found, expected(world))
    assert sum(seen) == len(world.zoo.modules)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_inputs_of_any_size(tmp_path, rng, scale):
    world = World(tmp_path, rng, scale=scale)
    check(totals(world.zoo, world.recorded.calibration), expected(world))


@pytest.mark.parametrize("field", FIELDS)
def test_the_bound_catches_a_float32_delta(tmp_path, rng, field):
    world = World(tmp_path, rng)
    want, delta = expected(world), world.delta
    world.delta = lambda name, module: delta(name, module).astype(np.float32).astype(float)
    off = np.abs(expected(world)[field] - want[field]).max()
    assert off > bound("exact_algebra") * np.abs(want[field]).max()


def test_the_difference_of_near_duplicates(tmp_path, rng):
    """One entry of B apart by 3e-5 of it: |W_i - W_j|^2 = G_ii - 2 G_ij + G_jj.

    The terms cancel to 1e-11 of their size. Float32 products would leave nothing of that.
    """
    world = World(tmp_path, rng, adapters=("math-a", "math-b"))
    factors = {n: (m.a, m.b) for n, m in world.made["math-a"].modules.items()}
    world.rewrite("math-a", factors)
    factors = {n: (a, b.copy()) for n, (a, b) in factors.items()}
    for _, b in factors.values():
        largest = np.unravel_index(np.abs(b).argmax(), b.shape)
        b[largest] *= 1 + 3e-5
    world.rewrite("math-b", factors)
    found = totals(world.zoo, world.recorded.calibration)
    change = {n: world.delta("math-a", n) - world.delta("math-b", n) for n in factors}
    distances = [(found.gram, sum((w**2).sum() for w in change.values()))]
    for d, domain in enumerate(DOMAINS):
        drift = [((world.inputs(domain, n) @ w.T) ** 2).sum(1).mean() for n, w in change.items()]
        distances.append((found.inputs[d], sum(drift)))
    for g, want in distances:
        got = g[0, 0] - 2 * g[0, 1] + g[1, 1]
        # Each of the three is a sum of about 20 terms in float64.
        assert abs(got - want) <= 20 * 2.0**-53 * (g[0, 0] + g[1, 1])
        assert 10 * 20 * 2.0**-53 < want / (g[0, 0] + g[1, 1]) < 2.0**-24


def test_threads_do_not_change_bytes(tmp_path, rng):
    world = World(tmp_path, rng)
    first, *others = (totals(world.zoo, world.recorded.calibration, threads=t) for t in (1, 2, 5))
    for other in others:
        assert all(getattr(other, f).tobytes() == getattr(first, f).tobytes() for f in FIELDS)


def test_without_a_calibration_and_without_output_moments(tmp_path, rng):
    world = World(tmp_path, rng, version=1)
    plain = totals(world.zoo)
    assert plain.domains == [] and plain.inputs.shape == (0, 7, 7) and plain.relative is None
    old = totals(world.zoo, world.recorded.calibration)
    assert old.relative is None and len(old.inputs) == 3
    np.testing.assert_array_equal(plain.gram, old.gram)


def test_a_base_module_without_output_has_no_relative(tmp_path, rng):
    moments = {("law", NAMES[2]): np.zeros(20)}
    world = World(tmp_path, rng, output_moments=moments)
    found = totals(world.zoo, world.recorded.calibration)
    law = found.domains.index("law")
    have = np.array([NAMES[2] in world.made[n].modules for n in world.names])
    assert have.any() and not have.all()
    assert (np.isnan(found.relative[law]) == np.outer(have, have)).all()
    assert np.isfinite(np.delete(found.relative, law, axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_is_not_finite_is_named(tmp_path, rng, side, bad):
    world = World(tmp_path, rng)
    made = world.made["math-b"]
    name = next(iter(made.modules))
    a, b = (x.copy() for x in (made.modules[name].a, made.modules[name].b))
    (a if side == "A" else b)[-1, -1] = bad
    make_adapter(made.path, {name: (1, 1, 1)}, factors={name: (a, b)})
    with pytest.raises(InputError) as caught:
        totals(mpf.open_zoo(tmp_path / "zoo"), world.recorded.calibration)
    assert caught.value.key == f"base_model.model.{name}.lora_{side}.weight"
    assert "holds NaN or infinite values" in str(caught.value)


def test_a_module_that_was_not_calibrated_is_named(tmp_path, rng):
    world = World(tmp_path, rng)
    make_adapter(tmp_path / "zoo" / "new", {"model.other": (4, 3, 1)}, seed=1)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    with pytest.raises(InputError) as caught:
        totals(zoo, world.recorded.calibration)
    assert caught.value.key == "model.other"
    assert totals(zoo).gram.shape == (8, 8)


def test_inputs_are_read_once_per_key_and_domain(tmp_path, rng, monkeypatch):
    world = World(tmp_path, rng)
    read, inputs = [], Calibration.inputs

    def counted(self, domain, module):
        read.append((domain, SHARED.get(module, module)))
        return inputs(self, domain, module)

    monkeypatch.setattr(Calibration, "inputs", counted)
    totals(world.zoo, world.recorded.calibration)
    assert sorted(read) == sorted((d, m) for d in DOMAINS for m in NAMES if m not in SHARED)
