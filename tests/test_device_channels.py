"""Channels, columns of other tools and totals with ``device="cuda"``, against the CPU's."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from domain_world import NAMES, World
from test_crosswalk import SHAPES as CROSSWALK_SHAPES
from test_crosswalk import allowed, block_diagonal, random_zoo, wide_zoo
from test_totals import check, expected
from tolerances import bound
from triton_child import child

import mergeprobe_fast as mpf
from mergeprobe_fast.engine.totals import totals

PROGRAM = str(Path(__file__).with_name("device_views_child.py"))
CHANNELS = ["out_channel_cosine", "in_channel_cosine"]
OF_ADAPTERS = [f"{side}_{name}" for side in ("out", "in")
               for name in ("channels_used", "channel_peak")]  # fmt: skip
# Blocks of two adapters, a module a chunk, float64 copies of 16 columns or of an entry at a time.
SMALL = {"DEVICE_PAIR_BYTES": 1, "DEVICE_BYTES": 1, "PIECE": 1}
SHAPES = {"model.layers.0.a": (40, 70), "model.layers.0.b": (33, 20), "model.layers.1.a": (40, 70)}


@pytest.fixture(scope="module")
def on_device():
    """``call(task, options, fault=, sizes=)``: what it gives on the device, or the error."""
    with child(PROGRAM) as ask:
        yield lambda task, options, fault=None, sizes=None: ask(
            (task, options, fault, dict(sizes or {}))
        )


@pytest.fixture
def zoo(tmp_path, rng):
    """Six adapters of mixed ranks and dtypes: modules missing, one zero, one of dependent rows."""
    for i in range(6):
        names = list(SHAPES)[1:] if i == 1 else list(SHAPES)
        sizes = {n: (*SHAPES[n], 1 + int(rng.integers(1, 7))) for n in names}
        factors = None
        if i == 5:
            made = {n: rng.standard_normal((3, sum(SHAPES[n]))) for n in names}
            factors = {
                n: (np.vstack([x[:, : SHAPES[n][1]]] * 2), np.hstack([x[:, SHAPES[n][1] :].T] * 2))
                for n, x in made.items()
            }
        make_adapter(
            tmp_path / "zoo" / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)),
            zero_b=i == 3, magnitude=float(rng.uniform(0.1, 10)), factors=factors,
            dtype="BF16" if i in (1, 2) else "F32",
        )  # fmt: skip
    return str(tmp_path / "zoo")


def compare(found, want, within):
    assert set(found) == set(want)
    for name in want:
        x, y = np.asarray(found[name]), np.asarray(want[name])
        if y.dtype.kind == "f":
            np.testing.assert_allclose(x, y, rtol=within, atol=within, err_msg=name)
        else:
            assert (x == y).all(), name


# Each is a ratio of sums of squares of float32 factors, within its bound of the truth: of the
# fourth power of a factor, both ways.
ALLOWED = 2 * bound("feature")


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["at_once", "in_pieces"])
def test_pairs_of_channels(on_device, zoo, sizes):
    options = {"zoo": zoo, "features": CHANNELS}
    compare(on_device("pairs", options, sizes=sizes), mpf.pair_features(**options), ALLOWED)


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["at_once", "in_pieces"])
def test_channels_of_adapters(on_device, zoo, sizes):
    options = {"zoo": zoo, "features": OF_ADAPTERS}
    want = mpf.adapter_features(**options)
    compare(on_device("adapters", options, sizes=sizes), want, ALLOWED)


def test_energies_of_the_first_vectors_alone_are_noticed(on_device, zoo):
    for task, names in (("pairs", CHANNELS), ("adapters", OF_ADAPTERS)):
        options = {"zoo": zoo, "features": names}
        compute = {"pairs": mpf.pair_features, "adapters": mpf.adapter_features}[task]
        with pytest.raises(AssertionError):
            compare(on_device(task, options, fault="first rows only"), compute(**options), ALLOWED)


def of(world, calibration=True):
    path = str(world.calibration.path) if calibration else None
    return {"zoo": str(world.zoo[0].path.parent), "calibration": path}


@pytest.mark.parametrize("sizes", [{}, SMALL, {"PIECE": 5000}], ids=["at_once", "singly", "blocks"])
def test_totals_are_their_definition(on_device, tmp_path, rng, sizes):
    world = World(tmp_path, rng)
    found = on_device("totals", of(world), sizes=sizes)
    check(SimpleNamespace(**found), expected(world))
    assert found["names"] == world.names


def test_totals_of_factors_that_are_rounded_are_noticed(on_device, tmp_path, rng):
    world = World(tmp_path, rng)
    found = on_device("totals", of(world), fault="factors in float32")
    with pytest.raises(AssertionError):
        check(SimpleNamespace(**found), expected(world))


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_totals_on_inputs_of_any_size(on_device, tmp_path, rng, scale):
    world = World(tmp_path, rng, scale=scale)
    check(SimpleNamespace(**on_device("totals", of(world))), expected(world))


def test_totals_without_a_calibration_or_moments_and_of_a_base_without_output(
    on_device, tmp_path, rng
):
    world = World(tmp_path / "old", rng, version=1)
    plain, old = (on_device("totals", of(world, x)) for x in (False, True))
    assert plain["domains"] == [] and plain["inputs"].shape == (0, 7, 7)
    assert "relative" not in plain and "relative" not in old and len(old["inputs"]) == 3
    np.testing.assert_array_equal(plain["gram"], old["gram"])
    moments = {("law", NAMES[2]): np.zeros(20)}
    world = World(tmp_path / "zero", rng, output_moments=moments)
    found = on_device("totals", of(world))
    want = totals(world.zoo, world.recorded.calibration)
    assert (np.isnan(found["relative"]) == np.isnan(want.relative)).all()
    assert np.isnan(want.relative).any()


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_is_not_finite_is_named_as_on_the_cpu(on_device, tmp_path, rng, side):
    world = World(tmp_path, rng)
    for adapter in ("math-b", "math-c"):
        made = world.made[adapter]
        name = next(iter(made.modules))
        a, b = (x.copy() for x in (made.modules[name].a, made.modules[name].b))
        (a if side == "A" else b)[-1, -1] = np.inf
        make_adapter(made.path, {name: (1, 1, 1)}, factors={name: (a, b)})
    with pytest.raises(mpf.InputError) as there:
        totals(mpf.open_zoo(tmp_path / "zoo"))
    with pytest.raises(mpf.InputError) as here:
        on_device("totals", of(world, False))
    assert str(here.value) == str(there.value) and f"lora_{side}" in str(here.value)


@pytest.mark.parametrize(
    ("kind", "fault", "sizes"),
    [("wide", None, {}), ("wide", None, SMALL), ("ragged", None, SMALL),
     ("wide", "the last vectors for the first", {})],
    ids=["at_once", "in_pieces", "ragged", "fault"],
)  # fmt: skip
def test_columns_of_other_tools(on_device, tmp_path, rng, kind, fault, sizes):
    """Both are within the bounds of ``test_crosswalk`` of the truth."""
    made = list((wide_zoo if kind == "wide" else random_zoo)(tmp_path / "zoo", rng))
    options = {"zoo": str(tmp_path / "zoo"), "features": ["2601.22285", "gradience"]}
    found = on_device("pairs", options, fault, {**sizes, "ROWS": 1} if sizes else {})
    want = mpf.pair_features(**options)
    assert set(found) == set(want)
    worst = 0.0
    for row, pair in enumerate(itertools.combinations(made, 2)):
        lengths = [np.linalg.norm(block_diagonal(x, CROSSWALK_SHAPES)) for x in pair]
        for name in set(found) - {"a", "b"}:
            x, y = found[name][row], want[name][row]
            assert np.isnan(x) == np.isnan(y), name
            if np.isfinite(y):
                worst = max(worst, abs(x - y) / (2 * allowed(name, lengths)))
    assert (worst <= 1) == (fault is None)


def test_pairs_of_small_ranks_are_not_all_in_memory_at_once(on_device, tmp_path, rng):
    """SVDs of rank 1 are padded to 16: blocks of as many adapters as rows would take 256 times
    what those of rank 16 take."""
    sizes = {name: (*shape, 1) for name, shape in SHAPES.items()}
    for i in range(12):
        make_adapter(tmp_path / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)))
    seen = on_device("largest", {"zoo": str(tmp_path)}, sizes={"ROWS": 64})
    assert 0 < seen["svd"] <= 64**2


def test_grams_over_samples_are_counted_among_what_lies_in_memory(on_device, tmp_path, rng):
    """(entries, T, T): more than the entries' own samples where T is above their rank."""
    few, samples = ["math-a", "math-b", "math-c", "math-d"], 96
    world = World(tmp_path, rng, adapters=few, domains={"math": samples}, outputs=True)
    seen = on_device("largest", of(world), sizes={"PIECE": 8 * 2 * samples**2})
    assert 0 < seen["grams"] <= 2 * samples**2
