"""SLERP and the Karcher mean against the definitions on materialised deltas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import WIDE, assert_peft_agrees, merge_json, truncated
from small_cores import (
    CASES,
    delta,
    every_case,
    merged_deltas,
    rounding,
    true_deltas,
    turned,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def dense_slerp(one: np.ndarray, two: np.ndarray, t: float, dialect: str) -> np.ndarray:
    """mergekit's slerp and nuslerp as they are written, on float64 deltas; and the unit form."""
    cosine = float(np.clip((unit(one) * unit(two)).sum(), -1, 1))
    line = (1 - t) * one + t * two
    if abs(cosine) > {"slerp": 0.9995}.get(dialect, 1 - 1e-12):
        return line
    omega = math.acos(cosine)
    c = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    if dialect != "unit":
        return c[0] * one + c[1] * two
    if not one.any() or not two.any():
        return line
    length = (1 - t) * np.linalg.norm(one) + t * np.linalg.norm(two)
    return length * (c[0] * unit(one) + c[1] * unit(two))


@pytest.mark.parametrize("dialect", ["nuslerp", "slerp", "unit"])
@every_case
def test_slerp_is_its_definition(tmp_path, rng, case, dialect):
    made = CASES[case](tmp_path, rng)[:2]
    t = float(rng.uniform())
    got = merged_deltas(made, "slerp", t=t, dialect=dialect)
    deltas = true_deltas(made)
    assert set(got) == set(deltas)
    for name, (one, two) in deltas.items():
        want = dense_slerp(one, two, t, dialect)
        assert np.linalg.norm(delta(got[name]) - want) <= rounding(want, (one, two), (1, 1)), name
        if want.any() and 0.1 < t < 0.9 and min(want.shape) > 1:
            other = dense_slerp(one, two, t + 1e-3, dialect)
            assert np.linalg.norm(delta(got[name]) - other) > rounding(want, (one, two), (1, 1))


def test_slerp_starts_at_the_first_and_ends_at_the_second(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)[:2]
    for t, i in ((0, 0), (1, 1)):
        for dialect in ("nuslerp", "slerp", "unit"):
            got = merged_deltas(made, "slerp", t=t, dialect=dialect)
            for name, both in true_deltas(made).items():
                assert np.linalg.norm(delta(got[name]) - both[i]) <= rounding(both[i], both, (1, 1))


def test_slerp_of_equal_norms_keeps_the_norm(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)[:2]
    deltas = true_deltas(made)
    factors = {
        name: (m.a, m.b * (np.linalg.norm(deltas[name][0]) / np.linalg.norm(deltas[name][1])))
        for name, m in made[1].modules.items()
    }
    config = {k: made[1].config[k] for k in ("r", "lora_alpha", "rank_pattern", "use_rslora")}
    equal = make_adapter(tmp_path / "equal", WIDE, factors=factors, config=config)
    one, two = (
        merged_deltas([made[0], equal], "slerp", t=0.3, dialect=d) for d in ("nuslerp", "unit")
    )
    for name, both in true_deltas([made[0], equal]).items():
        norm = np.linalg.norm(both[0])
        assert one[name].norm == pytest.approx(norm, rel=1e-6)
        assert np.linalg.norm(delta(one[name]) - delta(two[name])) <= 1e-6 * norm


def test_slerp_takes_t_from_weights_and_by_module(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)[:2]
    by_module = [{"filter": "head", "value": 0.9}, {"value": [0.2, 0.4]}]
    got = merged_deltas(made, "slerp", t=by_module)
    from_weights = merged_deltas(
        made, "slerp", weights=[[{"filter": "head", "value": 0.3}, {"value": 8}],
                                [{"filter": "head", "value": 2.7}, {"value": 2}]]
    )  # fmt: skip
    times = {"layers.1.q_proj": 0.2, "layers.11.q_proj": 0.4, "head": 0.9}
    for name, (one, two) in true_deltas(made).items():
        want = dense_slerp(one, two, times[name], "nuslerp")
        bound = rounding(want, (one, two), (1, 1))
        assert np.linalg.norm(delta(got[name]) - want) <= bound
        assert got[name].details["t"] == pytest.approx(times[name])
        t = 0.9 if name == "head" else 0.2
        want = dense_slerp(one, two, t, "nuslerp")
        assert np.linalg.norm(delta(from_weights[name]) - want) <= bound


def opposite(tmp_path, rng):
    one = make_adapter(tmp_path / "one", WIDE, seed=int(rng.integers(1 << 30)))
    negated = {name: (m.a, -2.0 * m.b) for name, m in one.modules.items()}
    two = make_adapter(tmp_path / "two", WIDE, factors=negated)
    return one, two


def test_opposite_updates_add_linearly_or_are_refused(tmp_path, rng):
    made = opposite(tmp_path, rng)
    for dialect in ("nuslerp", "slerp"):
        got = merged_deltas(made, "slerp", t=0.25, dialect=dialect)
        for name, (one, two) in true_deltas(made).items():
            want = 0.75 * one + 0.25 * two
            assert np.linalg.norm(delta(got[name]) - want) <= rounding(want, (one, two), (1, 1))
    with pytest.raises(InputError, match="opposite") as refused:
        merged_deltas(made, "slerp", t=0.25, dialect="unit")
    assert refused.value.key in WIDE
    twice = make_adapter(tmp_path / "twice", WIDE, factors={
        name: (m.a, 2.0 * m.b) for name, m in made[0].modules.items()
    })  # fmt: skip
    got = merged_deltas([made[0], twice], "slerp", t=0.25, dialect="unit")
    for name, (one, _) in true_deltas(made).items():
        assert np.linalg.norm(delta(got[name]) - 1.25 * one) <= rounding(1.25 * one, [one], [2])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"t": 1.5}, "must be in"),
        ({"t": [0.5, 1.5]}, "must be in"),
        ({"t": "half"}, "must be a number"),
        ({"t": [{"filter": "nothing", "value": 1}]}, "fits no module"),
        ({"t": 0.5, "weights": [1, 2]}, "not both"),
        ({"weights": [1, -2]}, "must not be negative"),
        ({"weights": [0, 0]}, "nor both 0"),
        ({"dialect": "lerp"}, "must be one of"),
    ],
)
def test_slerp_refuses_what_has_no_meaning(tmp_path, rng, options, reason):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)[:2]
    with pytest.raises(InputError, match=reason):
        merged_deltas(made, "slerp", **options)


def test_slerp_takes_two_adapters(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    for some in (made, made[:1]):
        with pytest.raises(InputError, match="takes 2"):
            merged_deltas(some, "slerp")


def logs(mean: np.ndarray, deltas: list[np.ndarray]) -> list[np.ndarray]:
    """Tangent vectors at the mean that lead to each direction (the logarithm of the sphere)."""
    found = []
    for x in map(unit, deltas):
        angle = 2 * math.atan2(np.linalg.norm(x - mean), np.linalg.norm(x + mean))
        side = x - math.cos(angle) * mean
        found.append(side * (angle / math.sin(angle) if angle > 1e-9 else 1.0))
    return found


@pytest.mark.parametrize("weights", [None, (0.2, 3.0, 1.1), (1.0, 0.0, 0.5)])
@every_case
def test_the_karcher_mean_is_where_the_logarithms_cancel(tmp_path, rng, case, weights):
    """The gradient of sum_i w_i angle_i^2 is zero there; below pi/2 no other point has that."""
    made = CASES[case](tmp_path, rng)
    w = np.ones(3) if weights is None else np.array(weights)
    w = w / w.sum()
    got = merged_deltas(made, "karcher", weights=weights)
    for name, deltas in true_deltas(made).items():
        module = got[name]
        noise = 1e-12 * max(map(np.linalg.norm, deltas))
        live = [i for i in range(3) if np.linalg.norm(deltas[i]) > noise and w[i] > 0]
        length = float(sum(w[i] * np.linalg.norm(deltas[i]) for i in live))
        assert module.norm == pytest.approx(length, rel=1e-6)
        if not live:
            assert not delta(module).any()
            continue
        steps = logs(unit(delta(module)), [deltas[i] for i in live])
        pull = sum(w[i] * step for i, step in zip(live, steps, strict=True))
        bound = rounding(delta(module), deltas, w) / length
        assert np.linalg.norm(pull) <= 4 * bound
        angles = [np.linalg.norm(step) for step in steps]
        assert max(angles) == pytest.approx(module.details["largest_angle"], abs=1e-5)
        if len(set(np.round(angles, 3))) > 1:  # the arithmetic mean is not it
            middle = unit(sum(w[i] * unit(deltas[i]) for i in live))
            wrong = sum(
                w[i] * x for i, x in zip(live, logs(middle, [deltas[i] for i in live]), strict=True)
            )
            uneven = len({round(float(w[i]), 6) for i in live}) > 1
            assert not uneven or len(live) < 2 or np.linalg.norm(wrong) > 4 * bound


def test_the_karcher_mean_of_one_adapter_is_that_adapter(tmp_path, rng):
    made = CASES["rank deficient"](tmp_path, rng)[:1]
    got = merged_deltas(made, "karcher", weights=[0.3])
    for name, (one,) in true_deltas(made).items():
        assert np.linalg.norm(delta(got[name]) - one) <= rounding(one, [one], [1])


def test_the_karcher_mean_of_two_is_slerp(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)[:2]
    one = merged_deltas(made, "karcher", weights=[3, 1])
    two = merged_deltas(made, "slerp", weights=[3, 1], dialect="unit")
    for name, deltas in true_deltas(made).items():
        bound = rounding(delta(one[name]), deltas, (1, 1))
        assert np.linalg.norm(delta(one[name]) - delta(two[name])) <= 2 * bound


def test_the_karcher_mean_stands_apart_from_mergekits_early_stop(tmp_path, rng):
    """Ten steps or 1e-5, as in mergekit, end within 1e-5 of ours."""
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    got = merged_deltas(made, "karcher")
    for name, deltas in true_deltas(made).items():
        mean = unit(sum(map(unit, deltas)))
        for _ in range(10):
            step = sum(logs(mean, deltas)) / 3
            length = np.linalg.norm(step)
            if length < 1e-5:
                break
            mean = unit(math.cos(length) * mean + math.sin(length) * step / length)
        assert np.linalg.norm(unit(delta(got[name])) - mean) <= 3e-5


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_neither_the_gauge_nor_the_order_matters(tmp_path, rng, method):
    made = CASES["modules missing"](tmp_path, rng)[: 2 if method == "slerp" else 3]
    other = [turned(a, tmp_path / f"turned{i}", rng) for i, a in enumerate(made)]
    w = [2.0, 1.0, 0.7][: len(made)]
    first = merged_deltas(made, method, weights=w)
    second = merged_deltas(other, method, weights=w)
    third = merged_deltas(made[::-1], method, weights=w[::-1])
    for name, deltas in true_deltas(made).items():
        pairs = zip(true_deltas(other)[name], deltas, strict=True)
        moved = sum(np.linalg.norm(rounded - exact) for rounded, exact in pairs)
        bound = 2 * rounding(delta(first[name]), deltas, w) + 4 * moved
        assert np.linalg.norm(delta(first[name]) - delta(second[name])) <= bound
        assert np.linalg.norm(delta(first[name]) - delta(third[name])) <= bound
        assert bound < 1e-4 * np.linalg.norm(delta(first[name]))


def test_the_karcher_mean_refuses_what_has_no_mean(tmp_path, rng):
    made = opposite(tmp_path, rng)
    with pytest.raises(InputError, match="no mean"):
        merged_deltas(made, "karcher")
    one = make_adapter(tmp_path / "other", WIDE, seed=int(rng.integers(1 << 30)))
    with pytest.raises(InputError, match="negative"):
        merged_deltas([made[0], one], "karcher", weights=[1, -1])
    with pytest.raises(InputError, match="all be 0"):
        merged_deltas([made[0], one], "karcher", weights=[0, 0])
    with pytest.raises(InputError, match="after 1 iterations"):
        three = make_adapter(tmp_path / "third", WIDE, seed=int(rng.integers(1 << 30)))
        merged_deltas([made[0], one, three], "karcher", weights=[1, 9, 4], max_iterations=1)


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_the_result_is_truncated_saved_and_read_by_peft(tmp_path, rng, method):
    made = CASES["modules missing"](tmp_path, rng)[:2]
    zoo = mpf.open_zoo([a.path for a in made])
    full = mpf.merge(zoo, method)
    cut = mpf.merge(zoo, method, rank=3)
    for one, two in zip(full.modules, cut.modules, strict=True):
        assert two.a.shape[0] == 3
        exact = delta(one)
        want = truncated(exact, 3)
        assert np.linalg.norm(delta(two) - want) <= 1e-5 * np.linalg.norm(exact)
        lost = float(np.linalg.norm(exact - want))
        assert two.truncation_error == pytest.approx(lost, rel=1e-5, abs=1e-6)
    cut.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    rows = merge_json(tmp_path / "out")["modules"]
    assert all("coefficients" in row for row in rows.values())
    assert mpf.MERGE_METHODS[method].summary


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("method", ["karcher", "tsv_m", "core_space", "knots", "lora_lego"])
def test_a_factor_that_is_not_finite_is_named(tmp_path, rng, method, side):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    head = made[1].modules["head"]
    factors = {"head": (head.a.copy(), head.b.copy())}
    factors["head"]["AB".index(side)][0, 0] = np.nan
    bad = make_adapter(tmp_path / "bad", {"head": WIDE["head"]}, factors=factors)
    with pytest.raises(InputError, match="NaN") as refused:
        merged_deltas([made[0], bad, made[2]], method)
    assert str(refused.value.path).startswith(str(bad.path))
    assert f"head.lora_{side}" in refused.value.key
