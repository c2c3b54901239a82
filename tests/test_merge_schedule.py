"""Numbers that depend on the module, and the checks of what a merge is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import deltas, exact_sums, seed_from, singular_values, zoo_of

import mergeprobe_fast as mpf
from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import schedule
from mergeprobe_fast.zoo import Module

LAYERS = [
    Module(f"model.layers.{layer}.{part}", "linear", 4, 4)
    for layer in range(5)
    for part in ("mlp.up_proj", "self_attn.q_proj")
]
MLP = np.array(["mlp" in m.name for m in LAYERS])
LAYER = np.repeat(np.arange(5), 2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(0.5, np.full(10, 0.5), id="a number"),
        pytest.param([0, 1], LAYER / 4, id="a gradient over the layers"),
        pytest.param([1, 0, 2], np.interp(LAYER / 4, [0, 0.5, 1], [1, 0, 2]), id="three anchors"),
        pytest.param([7], np.full(10, 7.0), id="one anchor"),
        pytest.param(
            [{"filter": "mlp", "value": 2}, {"value": 3}], np.where(MLP, 2, 3),
            id="a part of the path",
        ),
        pytest.param(
            [{"filter": "self_attn.*", "value": [0, 4]}, {"value": -1}],
            np.where(MLP, -1, LAYER), id="a gradient behind a filter",
        ),
        pytest.param(
            [{"filter": "layers.1.*", "value": 5}, {"filter": "mlp", "value": 6}, {"value": 7}],
            np.where(LAYER == 1, 5, np.where(MLP, 6, 7)), id="the first that fits decides",
        ),
        pytest.param({"value": 4}, np.full(10, 4.0), id="a single rule"),
    ],
)  # fmt: skip
def test_a_value_per_module(value, expected):
    np.testing.assert_array_equal(schedule.column(value, LAYERS, "w"), expected)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"filter": "lm_head", "value": 1}, {"value": 1}], "filter 'lm_head' fits no module"),
        ([{"filter": "mlp", "value": 1}], "no filter fits model.layers.0.self_attn.q_proj"),
        ([{"filter": "mlp"}], "expected {filter, value}"),
        ([{"filter": "mlp", "value": 1, "wieght": 2}], "expected {filter, value}"),
        ([{"filter": 3, "value": 1}], "a filter is a text"),
        ([], "is an empty list"),
        ("0.5", "must be numbers"),
        (None, "must be numbers"),
        (True, "must be numbers"),
        ([0.5, float("nan")], "must be finite"),
        ([0.5, [1]], "must be numbers"),
    ],
)
def test_what_is_no_value_is_refused(value, reason):
    with pytest.raises(InputError, match=reason) as caught:
        schedule.column(value, LAYERS, "weights")
    assert caught.value.key == "weights"


def test_a_table_takes_one_value_a_list_or_names():
    names = ["a", "b"]
    both = [[1.0, 2.0]] * 10
    for value in ([1, 2], {"b": 2, "a": 1}, np.array([1, 2])):
        np.testing.assert_array_equal(schedule.table(value, names, LAYERS, "w"), both)
    np.testing.assert_array_equal(schedule.table(3, names, LAYERS, "w"), np.full((10, 2), 3.0))
    rules = [{"filter": "mlp", "value": 2}, {"value": 3}]
    np.testing.assert_array_equal(
        schedule.table(rules, names, LAYERS, "w"), np.stack([np.where(MLP, 2, 3)] * 2, axis=1)
    )
    np.testing.assert_array_equal(
        schedule.table([rules, [0, 4]], names, LAYERS, "w")[:, 1], LAYER.astype(float)
    )
    for value, reason in (
        ([1, 2, 3], "expected one for each of 2 adapters, got 3"),
        ({"a": 1}, "has no value for 'b'"),
        ({"a": 1, "c": 1}, "names 'c'"),
    ):
        with pytest.raises(InputError, match=reason):
            schedule.table(value, names, LAYERS, "w")


def test_weights_by_module_reach_the_sum(tmp_path, rng):
    made = zoo_of({}, {"rank": 2}, {"modules": None})(tmp_path / "zoo", seed_from(rng))
    filters = {"layers.1": -2.0, "v_proj": 0, None: 0.25}
    rules = [{"filter": pattern, "value": value} for pattern, value in filters.items()]
    merged = mpf.merge([m.path for m in made], "linear", [1.0, rules, 0.5])
    report = merged.save(tmp_path / "out")
    written = deltas(tmp_path / "out")
    for name in written:
        weight = -2.0 if "layers.1" in name else 0.0 if "v_proj" in name else 0.25
        truth = exact_sums(made, [1.0, weight, 0.5])[name]
        assert np.linalg.norm(written[name] - truth) <= 1e-5 * np.linalg.norm(truth)
    assert report["adapters"][0]["weight"] == 1.0
    assert sorted(set(report["adapters"][1]["weight"])) == [-2.0, 0.0, 0.25]


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("method", ["svd", "linear"])
def test_energy_takes_the_smallest_rank_that_keeps_it(tmp_path, rng, method, energy):
    made = zoo_of({}, {"rank": 2, "magnitude": 0.1}, {"rank": 6})(tmp_path, seed_from(rng))
    merged = mpf.merge([m.path for m in made], method, [1, 1, 1], energy=energy)
    sums = exact_sums(made, [1, 1, 1])
    for m in merged.modules:
        squares = singular_values(sums[m.module.name]) ** 2
        kept = squares[: len(m.a)].sum() / squares.sum()
        fewer = squares[: len(m.a) - 1].sum() / squares.sum()
        assert kept >= energy - 1e-9 and (fewer < energy or len(m.a) == 1)
        assert m.truncation_error**2 <= (1 - energy) * m.norm**2 * (1 + 1e-6) + 1e-12
    capped = mpf.merge([m.path for m in made], method, [1, 1, 1], 2, energy=energy)
    assert {len(m.a) for m in capped.modules} <= {1, 2}


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    path = make_adapter(tmp_path / "a").path
    for arguments, reason in (
        ({"energy": 0}, "energy: must be in"),
        ({"energy": 1.1}, "energy: must be in"),
        ({"energy": True}, "energy: must be a number"),
        ({"method": "cat", "energy": 0.9}, "takes no energy"),
        ({"density": 0.5}, "svd takes no argument 'density'"),
        ({"weights": 0.5}, "weights: must be numbers, one per adapter"),
        ({"domains": ["x"]}, "domains: given without a calibration"),
    ):
        with pytest.raises(InputError, match=reason):
            mpf.merge(path, **arguments)


def test_domains_are_told_from_names():
    domains = ["math", "code", "math-hard", "Science"]
    names = ["math-a", "runs/code_r4", "math-hard-2", "science", "code"]
    assert assign_domains(names, domains) == ("math", "code", "math-hard", "Science", "code")
    assert assign_domains(["x", "code"], domains, {"x": "math"}) == ("math", "code")
    assert assign_domains(["x", "y"], domains, ["math", "code"]) == ("math", "code")
    for arguments, reason in (
        ((["mathematics"], domains), "cannot tell the calibration domain of 'mathematics'"),
        ((["x"], domains, ["history"]), "no domain 'history'"),
        ((["x"], domains, {"y": "math"}), "'y', which is no adapter"),
        ((["x"], domains, "math"), "expected one for each of 1 adapters"),
    ):
        with pytest.raises(InputError, match=reason):
            assign_domains(*arguments)


def test_paths_are_not_needed_for_a_zoo_in_memory(rng):
    """The same methods on arrays: what the PEFT integration and the benchmark use."""
    from mergeprobe_fast.merging.merge import run
    from mergeprobe_fast.merging.request import prepare
    from mergeprobe_fast.merging.source import MemorySource, Stored

    modules = [Module("one", "linear", 9, 7), Module("two", "linear", 5, 12)]
    factors, sums = {}, {0: 0.0, 1: 0.0}
    for index, module in enumerate(modules):
        for i, rank in enumerate((2, 3, 4)):
            if (index, i) == (0, 1):
                continue
            b = rng.standard_normal((rank, module.d_out)).astype(np.float32).T
            a = np.asfortranarray(rng.standard_normal((rank, module.d_in)))
            factors[index, i] = Stored(b, "F32", (None, "b")), Stored(a, "F64", (None, "a")), 0.5
            sums[index] += (i + 1) * 0.5 * b.astype(np.float64) @ a
    source = MemorySource(["x", "y", "z"], modules, factors)
    for method in ("linear", "svd", "cat"):
        chosen, request = prepare(source, method, weights=[1, 2, 3], arguments={})
        merged = list(run(chosen, request))
        assert [m.module for m in merged] == modules
        assert merged[0].members == ("x", "z")
        for index, m in enumerate(merged if method != "svd" else ()):
            error = np.linalg.norm(m.b.astype(np.float64) @ m.a - sums[index])
            assert error <= 1e-5 * np.linalg.norm(sums[index])
    assert source.largest_rank == 4
