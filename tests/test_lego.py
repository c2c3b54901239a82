"""LoRA-LEGO on canonical units against materialised ones, and its clustering against all others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import WIDE, assert_peft_agrees, merge_json
from small_cores import (
    CASES,
    delta,
    every_case,
    merged_deltas,
    rounding,
    true_deltas,
    two_gauges,
)
from tolerances import TOLERANCES

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.lego import clusters
from mergeprobe_fast.ops.tiles_rule import stream

BASIS = TOLERANCES["basis"].value


def units_of(deltas: list[np.ndarray], weights=(1, 1, 1)) -> tuple[np.ndarray, int]:
    """Balanced units sqrt(s) [u; v] of all w_i W_i, largest first, and how many deltas have any.

    The largest entry of u is positive, but for the sign of the weight.
    """
    size = max(map(np.linalg.norm, deltas))
    rows, having = [], 0
    for w, x in zip(weights, deltas, strict=False):
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        k = int(np.count_nonzero(s > max(1e-6 * s[0], 1e-12 * size)))
        having += k > 0
        for i in range(k):
            turn = np.sign(u[np.abs(u[:, i]).argmax(), i])
            unit = np.concatenate([np.sign(w) * turn * u[:, i], turn * vt[i]])
            rows.append(np.sqrt(abs(w) * s[i]) * unit)
    rows.sort(key=lambda row: -float(row @ row))
    return np.array(rows).reshape(len(rows), sum(deltas[0].shape)), having


def assembled(units, means, having, d_out, *, of_units=True, of_output=True) -> np.ndarray:
    """The merged delta from units and their clusters, the rows of means: both scales."""
    merged = np.zeros((d_out, units.shape[1] - d_out))
    for row in means:
        members = np.flatnonzero(row)
        turned = np.sign(row[members])[:, None] * units[members]
        mean = turned.mean(0)
        assert (turned @ mean >= 0).all(), "turned alike"
        if of_units:
            mean = mean * (np.linalg.norm(turned, axis=1).mean() / np.linalg.norm(mean))
        merged += np.outer(mean[:d_out], mean[d_out:])
    if of_output and len(means):
        merged *= math.sqrt(len(units) / having / len(means))
    return merged


def within(units: np.ndarray, groups: list[list[int]]) -> float:
    """Squared distances to the best mean of each cluster: the best signs are those of the top
    eigenvector for what is clustered here; all are tried."""
    total = 0.0
    for group in groups:
        x = units[group]
        signs = np.array(list(itertools.product([1.0, -1.0], repeat=len(group) - 1)))
        means = (x[0] + signs @ x[1:]) / len(group)
        total += float((x**2).sum() - len(group) * (means**2).sum(1).max())
    return total


def partitions(items: list[int], k: int):
    """All ways to put items into k clusters or fewer."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:], k):
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]
        if len(rest) < k:
            yield [[items[0]], *rest]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_clusters_that_are_there_are_found(rng, k):
    """Seven vectors near +-k directions: no partition, with any signs, leaves less within."""
    directions = 3 * np.linalg.qr(rng.standard_normal((8, 8)))[0][:k]
    which = np.concatenate([np.arange(k), rng.integers(0, k, 7 - k)])
    units = directions[which] * rng.choice([-1.0, 1.0], (7, 1))
    units += 0.05 * rng.standard_normal(units.shape)
    means, share = clusters(units @ units.T, k, 8, rng)
    least = min(within(units, groups) for groups in partitions(list(range(7)), k))
    total = float((units**2).sum())
    assert share * total == pytest.approx(least, abs=1e-9 * total)
    groups = {tuple(np.flatnonzero(row)) for row in means}
    assert groups == {tuple(np.flatnonzero(which == c)) for c in range(k)}


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_clusters_are_a_local_optimum(rng, k):
    """Vectors without clusters: each lies nearest to its own mean, which is that of its members."""
    units = rng.standard_normal((7, 5)) * rng.uniform(0.5, 2, (7, 1))
    means, share = clusters(units @ units.T, k, 20, rng)
    least = min(within(units, groups) for groups in partitions(list(range(7)), k))
    total = float((units**2).sum())
    assert least - 1e-9 * total <= share * total <= 1.5 * least + 1e-9 * total
    assert sorted(itertools.chain(*(np.flatnonzero(row) for row in means))) == list(range(7))
    centres = means @ units
    apart = np.minimum(
        *(((units[:, None] - sign * centres[None]) ** 2).sum(2) for sign in (1.0, -1.0))
    )
    own = apart[np.arange(7), np.abs(means).argmax(0)]
    assert (own <= apart.min(1) + 1e-9 * total).all()
    assert own.sum() == pytest.approx(share * total, abs=1e-9 * total)
    for row in means:
        members = np.flatnonzero(row)
        assert np.allclose(np.abs(row[members]), 1 / len(members))


@pytest.mark.parametrize("scales", [(True, True), (True, False), (False, True), (False, False)])
@every_case
def test_lora_lego_is_its_definition(tmp_path, rng, case, scales):
    made = CASES[case](tmp_path, rng)
    seed, k = int(rng.integers(1 << 60)), int(rng.integers(2, 6))
    weights = (0.5, -1.2, 2.0)
    got = merged_deltas(
        made, "lora_lego", rank=k, seed=seed,
        weights=weights, reweight_units=scales[0], reweight_output=scales[1],
    )  # fmt: skip
    for name, deltas in true_deltas(made).items():
        units, having = units_of(deltas, weights)
        if not having:
            assert not delta(got[name]).any()
            continue
        wanted = min(k, len(units))
        chance = np.random.default_rng([seed, stream(name)])
        means, share = clusters(units @ units.T, wanted, 8, chance)
        options = {"of_units": scales[0], "of_output": scales[1]}
        d_out = deltas[0].shape[0]
        want = assembled(units, means, having, d_out, **options)
        bound = rounding(want, deltas, weights) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound, name
        assert got[name].details["clusters"] == len(means)
        assert got[name].details["within"] == pytest.approx(share, abs=1e-8)
        other = assembled(units, means, having, d_out, **{**options, "of_units": not scales[0]})
        if np.linalg.norm(other - want) > 1e-3 * np.linalg.norm(want):
            assert np.linalg.norm(delta(got[name]) - other) > 100 * bound


def test_a_single_adapter_and_its_copies_come_back(tmp_path, rng):
    """Each unit is a cluster of its own, or of its copies; both scales are 1."""
    one = make_adapter(tmp_path / "one", WIDE, seed=int(rng.integers(1 << 30)))
    copies = [
        make_adapter(tmp_path / f"copy{i}", WIDE,
                     factors={name: (m.a, m.b) for name, m in one.modules.items()})
        for i in range(2)
    ]  # fmt: skip
    for made in ([one], [one, *copies]):
        got = merged_deltas(made, "lora_lego")
        for name, deltas in true_deltas(made).items():
            bound = rounding(deltas[0], deltas, (1, 1, 1)[: len(made)])
            assert np.linalg.norm(delta(got[name]) - deltas[0]) <= bound
            assert got[name].details["clusters"] == len(one.modules[name].a)


def test_noisy_copies_are_averaged_unit_by_unit(tmp_path, rng):
    """Three adapters near one: the clusters are the units, whatever signs their SVDs have."""
    u, v = (np.linalg.qr(rng.standard_normal((d, 4)))[0] for d in (30, 25))
    sigma = np.array([9.0, 5.0, 3.0, 1.0])
    made = []
    for i in range(3):
        noisy = [x + 1e-3 * rng.standard_normal(x.shape) for x in (u, v)]
        turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
        factors = {"m": (turn @ noisy[1].T, noisy[0] * sigma @ turn.T)}
        made.append(make_adapter(tmp_path / f"{i}", {"m": (30, 25, 4)}, factors=factors))
    got = merged_deltas(made, "lora_lego", rank=4)["m"]
    deltas = true_deltas(made)["m"]
    mean = sum(deltas) / 3
    assert np.linalg.norm(delta(got) - mean) <= 0.01 * np.linalg.norm(mean)
    assert got.details["clusters"] == 4 and got.details["within"] < 1e-3
    sizes = np.linalg.norm(deltas, axis=(1, 2))
    assert got.norm == pytest.approx(sizes.mean(), rel=1e-3)


def test_neither_the_gauge_nor_the_order_matters(tmp_path, rng):
    made, other = two_gauges(tmp_path, rng)
    w = [2.0, -1.0, 0.7]
    first = merged_deltas(made, "lora_lego", weights=w, rank=4)
    second = merged_deltas(other, "lora_lego", weights=w, rank=4)
    third = merged_deltas(made[::-1], "lora_lego", weights=w[::-1], rank=4)
    for name, deltas in true_deltas(made).items():
        bound = 2 * rounding(delta(first[name]), deltas, w)
        bound += BASIS * np.linalg.norm(delta(first[name]))
        assert np.linalg.norm(delta(first[name]) - delta(second[name])) <= bound
        assert np.linalg.norm(delta(first[name]) - delta(third[name])) <= bound


def test_units_of_the_stored_factors_would_depend_on_the_gauge(tmp_path, rng):
    results = []
    for made in two_gauges(tmp_path, rng):
        modules = [a.modules["layers.1.q_proj"] for a in made]
        units = np.concatenate([np.concatenate([m.b, m.a.T]).T for m in modules])
        means, _ = clusters(units @ units.T, 4, 8, np.random.default_rng(0))
        results.append(assembled(units, means, 3, 40))
    assert np.linalg.norm(results[0] - results[1]) > 0.1 * np.linalg.norm(results[0])


def test_the_seed_decides_and_repeats(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    one, two = (
        merged_deltas(made, "lora_lego", rank=5, seed=11, restarts=1, threads=n) for n in (1, 3)
    )
    for name in one:
        assert one[name].a.tobytes() == two[name].a.tobytes()
        assert one[name].b.tobytes() == two[name].b.tobytes()
    others = [merged_deltas(made, "lora_lego", rank=5, seed=s, restarts=1) for s in range(6)]
    assert len({m["layers.1.q_proj"].details["within"] for m in others}) > 1


def test_the_result_is_saved_and_read_by_peft(tmp_path, rng):
    made = CASES["modules missing"](tmp_path, rng)
    zoo = mpf.open_zoo([a.path for a in made])
    mpf.merge(zoo, "lora_lego", rank=3).save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    rows = merge_json(tmp_path / "out")["modules"]
    assert all(row["rank"] == 3 and row["clusters"] <= 3 for row in rows.values())
    zero = mpf.merge(zoo, "lora_lego", rank=3, weights=[0, 0, 0])
    assert not any(delta(m).any() for m in zero.modules)
    assert mpf.MERGE_METHODS["lora_lego"].summary
    for options in ({"seed": -1}, {"restarts": 0}, {"reweight_units": 1}):
        with pytest.raises(InputError, match="must be"):
            mpf.merge(zoo, "lora_lego", **options)
