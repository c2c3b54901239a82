"""Columns on calibration domains with ``device="cuda"``, against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from domain_world import ADAPTERS, BY_NAME, DOMAINS, MODULES, NAMES, World
from gradient_truth import (
    OWN,
    calibrate,
    differences,
    fisher_definitions,
    gradient_definitions,
    make_zoo,
)
from tolerances import bound
from triton_child import child

import mergeprobe_fast as mpf
from mergeprobe_fast.features.drift import FAMILY as DRIFT
from mergeprobe_fast.features.drift import OUTPUT_FAMILY
from mergeprobe_fast.features.gradients import FAMILY as GRADIENTS
from mergeprobe_fast.features.gradients import FISHER_FAMILY as FISHER

PROGRAM = str(Path(__file__).with_name("device_views_child.py"))
COLUMNS = list(BY_NAME)
# Blocks of two adapters, a module a chunk, float64 copies of an entry at a time.
SMALL = {"DEVICE_PAIR_BYTES": 1, "DEVICE_BYTES": 1, "PIECE": 1}


@pytest.fixture(scope="module")
def ask():
    """A child on the device: (task, keywords, fault, sizes)."""
    with child(PROGRAM) as there:
        yield there


@pytest.fixture
def on_device(ask):
    """``call(world, features, fault=, sizes=)``: columns of pairs, or the error."""

    def call(world, features=COLUMNS, fault=None, sizes=None):
        found = ask(("pairs", options(world, features), fault, dict(sizes or {})))
        return {name: x for name, x in found.items() if name not in ("a", "b")}

    return call


def options(world, features=COLUMNS):
    return {
        "zoo": str(world.zoo[0].path.parent), "features": features,
        "calibration": str(world.calibration.path),
    }  # fmt: skip


def of_whole(found):
    """Columns of the concatenated updates, without those over modules."""
    return {name: x for name, x in found.items() if "." not in name}


@pytest.mark.parametrize(
    ("sizes", "adapters"), [({}, ADAPTERS), (SMALL, ADAPTERS[:5])], ids=["at_once", "in_pieces"]
)
def test_every_column_is_its_definition(on_device, tmp_path, rng, sizes, adapters):
    world = World(tmp_path, rng, adapters=adapters)
    found = on_device(world, sizes=sizes)
    assert set(of_whole(found)) == set(COLUMNS)
    assert world.check(found) > (200 if adapters is ADAPTERS else 60)


@pytest.mark.parametrize("fault", [
    "the bias of the HSIC stays", "the last sample is lost", "the first domain for all",
    "first rows only",
])  # fmt: skip
def test_each_fault_shows(on_device, tmp_path, rng, fault):
    world = World(tmp_path, rng)
    with pytest.raises(AssertionError):
        world.check(on_device(world, ["activation_cosine_a", "drift_cka_a"], fault=fault))


def test_columns_over_modules_are_those_of_the_cpu(on_device, tmp_path, rng):
    """Each is a feature of one module; the loss to cancellation is the worst module's."""
    world = World(tmp_path, rng)
    found, want = on_device(world), mpf.pair_features(**options(world), threads=1)
    rows = list(zip(want["a"], want["b"], strict=True))
    for row, (a, b) in enumerate(rows):
        shared = [m for m in NAMES if all(world.delta(x, m).any() for x in (a, b))]
        losses = [world.expected(a, b, [m])[1] for m in shared]
        for name in found:
            x, y = found[name][row], want[name][row]
            assert np.isnan(x) == np.isnan(y), name
            if "." in name and np.isfinite(y):
                worst = max(1.0, *(loss[name.split(".")[0]] for loss in losses))
                # Both are within the bound of the truth, ratios within that part of it.
                allowed = 2 * bound("on domains") * worst * max(1.0, abs(y))
                assert abs(x - y) <= allowed, (name, x, y)


def test_one_sample_and_few_samples(on_device, tmp_path, rng):
    domains = {"math": 1, "code": 3, "law": 4}
    world = World(tmp_path, rng, domains=domains)
    found = on_device(world)
    world.check(found)
    first = [a.split("-")[0] for a in mpf.pair_features(**options(world), threads=1)["a"]]
    for value, domain in zip(found["drift_cka_a"], first, strict=True):
        assert np.isnan(value) or domains[domain] >= 4


def test_inputs_of_any_size_give_the_same(on_device, tmp_path, rng):
    world = World(tmp_path, rng, scale=float(rng.choice([1e-20, 1e20])))
    assert world.check(on_device(world)) > 200


def test_updates_of_any_size_and_equal_ranks(on_device, tmp_path, rng):
    """Uniform heights take another way through the code: no rows are gathered."""
    world = World(tmp_path, rng, adapters=ADAPTERS[:3])
    for name, size in zip(ADAPTERS[:3], (1e-15, 1.0, 1e15), strict=True):
        world.rewrite(name, {
            n: (rng.standard_normal((4, q)), size * rng.standard_normal((p, 4)))
            for n, (p, q) in MODULES.items()
        })  # fmt: skip
    assert world.check(on_device(world)) == 3 * len(COLUMNS)


def test_ranks_below_those_of_the_factors(on_device, tmp_path, rng):
    world = World(tmp_path, rng)
    a, b = rng.standard_normal((3, 20)), rng.standard_normal((24, 3))
    world.rewrite("math-a", {NAMES[0]: (np.vstack([a, a[:2]]), np.hstack([b, b[:, :2]]))})
    columns = ["activation_cosine_a", "drift_cka_b", "kfac_cosine_base_a"]
    assert world.check(on_device(world, columns)) > 0


def test_a_module_that_was_not_calibrated_is_named_as_on_the_cpu(on_device, tmp_path, rng):
    world = World(tmp_path, rng)
    extra = {"model.layers.9.mlp.up_proj": (6, 5, 2)}
    make_adapter(world.made["math-a"].path, extra, seed=1)
    world.zoo = mpf.open_zoo(world.made["math-a"].path.parent)
    with pytest.raises(mpf.InputError) as there:
        mpf.pair_features(**options(world), threads=1)
    with pytest.raises(mpf.InputError) as here:
        on_device(world)
    assert str(here.value) == str(there.value) and "up_proj" in str(here.value)


@pytest.mark.parametrize("key", ["input", "gradient"])
def test_samples_that_are_not_finite_are_named_as_on_the_cpu(on_device, tmp_path, rng, key):
    from safetensors import safe_open
    from safetensors.torch import save_file

    world = World(tmp_path, rng)
    path = world.calibration.path / "math.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        about = file.metadata()
    tensors[f"{key}.{NAMES[0]}"][0, 1] = np.inf
    save_file(tensors, path, metadata=about)
    with pytest.raises(mpf.InputError) as there:
        mpf.pair_features(**options(world), threads=1)
    with pytest.raises(mpf.InputError) as here:
        on_device(world)
    assert str(here.value) == str(there.value) and key in str(here.value)


def finished(family, pairs, adapters):
    """What the device found of a family, by column."""
    return {
        **{c.name: pairs[c.name] for c in family.pairs},
        **{c.name: adapters[c.name] for c in family.adapters},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "fault"), [({}, None), (SMALL, None), ({}, "the last sample is lost")],
    ids=["at_once", "in_pieces", "fault"],
)  # fmt: skip
def test_derivatives_are_their_definition(ask, tmp_path, rng, sizes, fault):
    made, calibration = make_zoo(tmp_path / "zoo", rng), calibrate(tmp_path, rng)
    found = {}
    for task, kind in (("pairs", "pairs"), ("adapters", "adapters")):
        names = [c.name for f in (GRADIENTS, FISHER) for c in getattr(f, kind)]
        given = {
            "zoo": str(tmp_path / "zoo"), "calibration": str(calibration.path), "features": names,
            "domains": dict(zip(mpf.open_zoo(tmp_path / "zoo").names, OWN, strict=True)),
        }  # fmt: skip
        found[kind] = ask((task, given, fault, dict(sizes)))
    for family, want in (
        (GRADIENTS, gradient_definitions(made, calibration)),
        (FISHER, fisher_definitions(made, calibration, "model", "")),
    ):
        columns = finished(family, **found)
        assert set(columns) == set(want)
        assert bool(differences(columns, want, bound("derivative"))) == (fault is not None)


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["at_once", "in_pieces"])
def test_drift_is_that_of_the_cpu(ask, tmp_path, rng, sizes):
    # The base model's channels are used by every third, and by none in one module.
    moments = {(d, m): np.where(np.arange(MODULES[m][0]) % 3, 1.0, 0.0)
               for d in DOMAINS for m in NAMES}  # fmt: skip
    moments["law", NAMES[1]] = np.zeros(MODULES[NAMES[1]][0])
    world = World(tmp_path, rng, output_moments=moments, outputs=True)
    for task, compute in (("pairs", mpf.pair_features), ("adapters", mpf.adapter_features)):
        names = [c.name for f in (DRIFT, OUTPUT_FAMILY) for c in getattr(f, task)]
        if names:
            found = ask((task, options(world, names), None, dict(sizes)))
            want = compute(**options(world, names), threads=1)
            for name in names:
                np.testing.assert_allclose(
                    found[name], want[name], rtol=2 * bound("on domains"), err_msg=name
                )
