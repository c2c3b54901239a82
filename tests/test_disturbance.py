"""Features on calibration domains against their definitions (CATALOGUE 4), all materialised."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration
from domain_world import ADAPTERS, BY_NAME, DOMAINS, MODULES, NAMES, SHARED, World, unbiased_hsic

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine import passes
from mergeprobe_fast.features.disturbance import FEATURES
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.recorded import NOTHING, Recorded

PAIR_BYTES = {"one_block": 512 << 20, "blocks_of_2": 1, "blocks_of_3": 4 * 21 * 4 * 9}


def test_every_feature_is_its_definition(tmp_path, rng, isa):
    world = World(tmp_path, rng)
    table = world.columns()
    names = {f.name for f in FEATURES}
    assert {n for n in table if "." not in n} == names and len(names) == 20
    assert world.check(table) > 200


def test_aggregates_are_those_of_the_modules(tmp_path, rng):
    """Over the modules that both adapters have, each a pair of its own; weights are the norms'."""
    world = World(tmp_path, rng)
    table = world.columns()
    checked = 0
    for row, (a, b) in enumerate(itertools.combinations(world.names, 2)):
        shared = [m for m in NAMES if all(world.delta(x, m).any() for x in (a, b))]
        local = [world.expected(a, b, [m]) for m in shared]
        weights = [np.linalg.norm(world.delta(a, m)) * np.linalg.norm(world.delta(b, m))
                   for m in shared]  # fmt: skip
        for name in BY_NAME:
            worst = np.nanmax([1.0, *(x[1][name] for x in local)])
            values = np.array([x[0][name] for x in local])
            known = ~np.isnan(values)
            for aggregate, reduce in {
                "mean": lambda v, w: np.average(v, weights=w), "max": lambda v, w: v.max(),
                "min": lambda v, w: v.min(), "p10": lambda v, w: np.percentile(v, 10),
                "p90": lambda v, w: np.percentile(v, 90),
            }.items():  # fmt: skip
                want = math.nan
                if known.any():
                    want = reduce(values[known], np.array(weights)[known])
                got = table[f"{name}.{aggregate}"][row]
                checked += world.close(name, got, want, worst)
    assert checked > 1000


@pytest.mark.parametrize("chunk_bytes", [192 << 20, 1, 30_000])
@pytest.mark.parametrize("pair_bytes", PAIR_BYTES)
def test_cutting_into_blocks_and_chunks_changes_nothing(
    tmp_path, rng, monkeypatch, pair_bytes, chunk_bytes
):
    world = World(tmp_path, rng)
    monkeypatch.setattr(passes, "PAIR_BYTES", PAIR_BYTES[pair_bytes])
    monkeypatch.setattr(passes, "CHUNK_BYTES", chunk_bytes)
    world.check(world.columns())


def test_threads_and_runs_do_not_change_bytes(tmp_path, rng, isa):
    world = World(tmp_path, rng)
    first, *others = (world.columns(threads=t) for t in (1, 2, 5, 1))
    for table in others:
        for name in table:
            assert table[name].tobytes() == first[name].tobytes(), name


def test_features_of_weights_are_the_same_beside_them(tmp_path, rng):
    """Views share the tiles of the pass: what it found without them, it finds with them."""
    world = World(tmp_path, rng)
    alone = world.columns(_on_weights())
    beside = world.columns([*FEATURES, *_on_weights()])
    for name in alone:
        np.testing.assert_array_equal(alone[name], beside[name], err_msg=name)
    some = world.columns([BY_NAME["kfac_cosine_base_a"]])
    np.testing.assert_array_equal(some["kfac_cosine_base_a"], beside["kfac_cosine_base_a"])


def _on_weights():
    from mergeprobe_fast.features import subspace, weights

    return [*weights.FEATURES, *subspace.FEATURES]


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_inputs_of_any_size_give_the_same(tmp_path, rng, scale):
    """Squares of 1e18 leave float32, and so do those of gradients of 1e-6 times those of 1e-18."""
    world = World(tmp_path, rng, scale=scale)
    assert world.check(world.columns()) > 200


def test_updates_of_any_size_give_their_ratios(tmp_path, rng):
    world = World(tmp_path, rng)
    for name, factor in (("math-a", 1e25), ("math-b", 1e-25)):
        factors = {n: (m.a, m.b * factor) for n, m in world.made[name].modules.items()}
        world.rewrite(name, factors)
    assert world.check(world.columns()) > 200


def test_gauge_leaves_them(tmp_path, rng):
    """A -> M A, B -> B M^-1: the same updates, other factors."""
    # A single sample may see next to nothing of an update: ratios to that feel every rounding.
    world = World(tmp_path, rng, domains=DOMAINS | {"law": 6})
    table = world.columns()
    for name, made in list(world.made.items()):
        factors = {}
        for n, m in made.modules.items():
            left, right = (np.linalg.qr(rng.standard_normal((len(m.a),) * 2))[0] for _ in "lr")
            move = left @ np.diag(np.geomspace(1, 5, len(m.a))) @ right
            factors[n] = move @ m.a, m.b @ np.linalg.inv(move)
        world.rewrite(name, factors)
    moved = world.columns()
    for name in table:
        # Rounding the moved factors changes the updates; the HSIC of few samples feels it most.
        np.testing.assert_allclose(
            moved[name], table[name], 1e-5, 3e-4 if "drift" in name else 2e-5, err_msg=name
        )


FAULTS = {
    "another_domain": lambda x, other: other[: len(x)],
    "centred": lambda x, other: x - x.mean(0),
    "a_sample_left_out": lambda x, other: x[:-1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_catches(tmp_path, rng, fault):
    world = World(tmp_path, rng, domains={"math": 9, "code": 9, "law": 9})
    table = world.columns()
    inputs = world.calibration.inputs
    true = dict(inputs)
    for domain, module in true:
        other = true["law" if domain != "law" else "math", module]
        inputs[domain, module] = FAULTS[fault](true[domain, module], other)
    for name in ("activation_cosine_a", "cross_to_self_raw_a_by_b", "cross_to_self_b_by_a"):
        with pytest.raises(AssertionError):
            world.check({name: table[name]})


def test_the_bound_catches_a_biased_hsic(tmp_path, rng, monkeypatch):
    world = World(tmp_path, rng)
    table = world.columns([BY_NAME["drift_cka_a"], BY_NAME["drift_cka_b"]])

    def biased(y, z):
        y, z = y - y.mean(0), z - z.mean(0)
        return float(((y @ y.T) * (z @ z.T)).sum())

    monkeypatch.setattr("domain_world.unbiased_hsic", biased)
    with pytest.raises(AssertionError):
        world.check(table)


def test_unbiased_hsic_of_independent_outputs_is_zero_on_average(rng):
    """The definition in the tests itself: the mean of many is within three deviations of zero."""
    found = [
        unbiased_hsic(rng.standard_normal((8, 5)), rng.standard_normal((8, 6))) for _ in range(2000)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found))


def test_one_sample_has_cosines_but_no_cka(tmp_path, rng):
    world = World(tmp_path, rng)
    table = world.columns()
    row = list(itertools.combinations(world.names, 2)).index(("law-a", "law-b"))
    assert np.isnan(table["drift_cka_a"][row]) and np.isnan(table["drift_cka_b"][row])
    # One sample is its own mean.
    for name in ("activation_cosine_a", "cross_to_self_a_by_b"):
        assert np.isfinite(table[name][row])
    assert table["mean_activation_cosine_a"][row] == pytest.approx(
        table["activation_cosine_a"][row], abs=1e-6
    )


def test_a_zero_update_has_no_features(tmp_path, rng):
    table = World(tmp_path, rng).columns()
    names = sorted(ADAPTERS)
    for row, pair in enumerate(itertools.combinations(names, 2)):
        if "code-zero" in pair:
            assert all(np.isnan(values[row]) for values in table.values())


def test_inputs_that_are_zero_have_no_features(tmp_path, rng):
    modules = {NAMES[0]: MODULES[NAMES[0]]}
    for i, name in enumerate(("math-a", "math-b")):
        make_adapter(tmp_path / "zoo" / name, {NAMES[0]: (*MODULES[NAMES[0]], 2)}, seed=i)
    zero = {("math", NAMES[0]): np.zeros((5, 20))}
    made = make_calibration(tmp_path / "c", modules, {"math": 5}, rng, samples=zero)
    table = mpf.pair_features(
        mpf.open_zoo(tmp_path / "zoo"), [f for f in FEATURES if f.missing(_opened(made)) is None],
        calibration=made.path,
    )  # fmt: skip
    assert all(np.isnan(table[n]).all() for n in BY_NAME if n in table and "disturb" not in n)
    assert not table["disturbance_a_by_b"].any()


def _opened(made):
    return Recorded(mpf.open_calibration(made.path), ("math", "math"))


def test_what_is_missing_is_said():
    for f in FEATURES:
        assert f.missing(NOTHING).startswith("a calibration")


def test_old_calibrations_have_the_raw_ones(tmp_path, rng):
    world = World(tmp_path, rng, version=1)
    there = {f.name for f in FEATURES if f.missing(world.recorded) is None}
    relative = {n for n in BY_NAME if n.startswith(("cross_to_self_a", "cross_to_self_b", "dist"))}
    assert set(BY_NAME) - there == relative and len(relative) == 4
    world.columns([BY_NAME[n] for n in sorted(there)])


def test_a_module_that_was_not_calibrated_is_named(tmp_path, rng):
    world = World(tmp_path, rng)
    sizes = {"model.layers.9.mlp.up_proj": (7, 6, 2)}
    make_adapter(tmp_path / "zoo" / "math-z", sizes, seed=1)
    world.zoo = mpf.open_zoo(tmp_path / "zoo")
    world.recorded = Recorded(world.recorded.calibration, (*world.domains, "math"))
    with pytest.raises(InputError) as caught:
        world.columns()
    assert caught.value.key == "model.layers.9.mlp.up_proj"
    assert "the calibration did not record this module" in str(caught.value)
    assert caught.value.path == str(world.calibration.path)


def test_a_module_of_another_shape_is_named(tmp_path, rng):
    world = World(tmp_path, rng)
    make_adapter(tmp_path / "other" / "math-a", {NAMES[2]: (20, 30, 2)}, seed=1)
    zoo = mpf.open_zoo([tmp_path / "other" / "math-a"])
    with pytest.raises(InputError, match="is 20 x 31 in the calibration, and 20 x 30"):
        mpf.pair_features(zoo, list(FEATURES), calibration=world.calibration.path)


def test_without_a_calibration_they_are_refused(tmp_path, rng):
    world = World(tmp_path, rng)
    world.recorded = NOTHING
    with pytest.raises(InputError, match="need a calibration"):
        world.columns()


def test_inputs_are_read_once_per_key_and_domain(tmp_path, rng, monkeypatch):
    world = World(tmp_path, rng)
    read = []
    inputs = Calibration.inputs

    def counted(self, domain, module):
        read.append((domain, SHARED.get(module, module)))
        return inputs(self, domain, module)

    monkeypatch.setattr(Calibration, "inputs", counted)
    world.columns()
    assert sorted(read) == sorted((d, m) for d in DOMAINS for m in NAMES if m not in SHARED)
