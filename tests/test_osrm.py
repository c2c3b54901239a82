"""OSRM's projection after training, against eigenvectors of dense second moments."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration, stored
from dense_merge import (
    RAGGED,
    WIDE,
    assert_peft_agrees,
    exact_sums,
    seed_from,
    subset,
    truncated,
    zoo_of,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import osrm

DOMAINS = ("a", "b", "c")
WEIGHTS = np.array([0.7, -0.4, 1.5])


def setting(folder, rng, samples=9):
    recipes = [dict(RAGGED[0]), dict(RAGGED[1], dtype="BF16"), dict(RAGGED[2])]
    recipes[1]["modules"] = subset("head", "layers.1.q_proj", of=WIDE)
    made = zoo_of(*recipes)(folder, seed_from(rng))
    return made, make_calibration(folder / "cal", WIDE, DOMAINS, rng, samples=samples)


def projector(calibration, name, own, k, share=1.0, domains=DOMAINS):
    """E E^T of the other domains' mean second moment, by a dense eigendecomposition."""
    others = [g for g in dict.fromkeys(domains) if g != own]
    moment = sum(calibration.second_moment(g, name, 1.0) for g in others)
    values, vectors = np.linalg.eigh(moment)
    held = np.cumsum(values[::-1]) / values.sum()
    k = min(k, 1 + int(np.argmax(held >= share - 1e-12)))
    return vectors[:, -k:] @ vectors[:, -k:].T


def definition(made, calibration, k, share=1.0):
    results = {}
    for w, m, g in zip(WEIGHTS, made, DOMAINS, strict=True):
        for name, module in m.modules.items():
            taken = module.delta @ projector(calibration, name, g, k, share)
            results[name] = results.get(name, 0.0) + w * (module.delta - taken)
    return results


def close(merged, truth, room=1e-5):
    """float32 factors, and directions good to u / gap of the eigenvalues."""
    assert {m.module.name for m in merged.modules} == set(truth)
    for m in merged.modules:
        matrix = truth[m.module.name]
        error = np.linalg.norm(m.b.astype(np.float64) @ m.a - matrix)
        assert error <= room * np.linalg.norm(matrix), m.module.name


@pytest.mark.parametrize("lanczos", [False, True])
@pytest.mark.parametrize("samples", [9, 40], ids="T={}".format)
@pytest.mark.parametrize("arguments", [{"directions": 3}, {"share": 0.6}], ids=str)
def test_it_is_the_projection_of_its_definition(
    tmp_path, rng, arguments, samples, lanczos, monkeypatch
):
    monkeypatch.setattr(osrm, "_DENSE", 0 if lanczos else 400)
    made, calibration = setting(tmp_path, rng, samples)
    paths = [m.path for m in made]
    merged = mpf.merge(paths, "osrm", WEIGHTS, calibration=calibration.path, **arguments)
    k, share = arguments.get("directions", 16), arguments.get("share", 1.0)
    truth = definition(made, calibration, k, share)
    close(merged, truth)
    with pytest.raises(AssertionError):
        close(merged, definition(made, calibration, k + 1, min(1.0, share + 0.2)))
    cut = mpf.merge(paths, "osrm", WEIGHTS, 4, calibration=calibration.path, **arguments)
    for m in cut.modules:
        matrix = truth[m.module.name]
        best = np.linalg.norm(matrix - truncated(matrix, 4))
        assert m.truncation_error == pytest.approx(best, rel=1e-4)


def test_what_is_lost_and_what_it_buys_is_reported(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    merged = mpf.merge([m.path for m in made], "osrm", calibration=calibration.path, directions=4)
    for m in merged.modules:
        name, have = m.module.name, [i for i in range(3) if m.module.name in made[i].modules]
        for k, i in enumerate(have):
            delta = made[i].modules[name].delta
            taken = delta @ projector(calibration, name, DOMAINS[i], 4)
            own = calibration.samples[DOMAINS[i], name]
            lost = np.square(own @ taken.T).sum() / np.square(own @ delta.T).sum()
            assert m.details["own_energy_lost"][k] == pytest.approx(lost, rel=1e-6)
            others = [calibration.samples[g, name] for g in DOMAINS if g != DOMAINS[i]]
            left, whole = (
                sum(np.square(x @ part.T).sum() for x in others) for part in (delta - taken, delta)
            )
            assert m.details["interference_left"][k] == pytest.approx(left / whole, rel=1e-6)
            assert left < whole
            assert m.details["directions"][k] == 4


def test_one_domain_or_no_directions_is_the_plain_sum(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    paths, sums = [m.path for m in made], exact_sums(made, WEIGHTS)
    for options in ({"domains": ["a"] * 3}, {"directions": 0}):
        merged = mpf.merge(paths, "osrm", WEIGHTS, calibration=calibration.path, **options)
        close(merged, sums, 1e-6)
        assert all(set(m.details["directions"]) == {0} for m in merged.modules)


def test_adapters_of_one_domain_take_nothing_from_each_other(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    domains = ("a", "b", "a")
    merged = mpf.merge([m.path for m in made], "osrm", calibration=calibration.path,
                       domains=domains, directions=2)  # fmt: skip
    truth = {}
    for m, g in zip(made, domains, strict=True):
        for name, module in m.modules.items():
            taken = module.delta @ projector(calibration, name, g, 2, domains=domains)
            truth[name] = truth.get(name, 0.0) + (module.delta - taken) / 3
    close(merged, truth)


def test_separate_inputs_lose_nothing_and_no_interference_is_left(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE})(tmp_path, seed_from(rng))
    given = {}
    for name, (_, d, _) in WIDE.items():
        for g, odd in (("a", 0), ("b", 1)):
            given[g, name] = stored(rng.standard_normal((6, d)) * (np.arange(d) % 2 == odd))
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng, samples=6, given=given)
    merged = mpf.merge([m.path for m in made], "osrm", [1, 1], calibration=calibration.path)
    for m in merged.modules:
        assert m.details["directions"] == [6, 6]
        assert max(m.details["own_energy_lost"]) < 1e-20
        assert max(m.details["interference_left"]) < 1e-20
        for a, g in zip(made, "ab", strict=True):
            x = calibration.samples[g, m.module.name]
            wanted = x @ a.modules[m.module.name].delta.T
            error = np.linalg.norm(x @ (m.b.astype(np.float64) @ m.a).T - wanted)
            assert error <= 1e-6 * np.linalg.norm(wanted)


def test_the_gauge_does_not_matter_and_peft_loads_it(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    factors = {}
    for name, m in made[0].modules.items():
        turn = np.eye(len(m.a)) + 0.2 * rng.standard_normal((len(m.a), len(m.a)))
        factors[name] = turn @ m.a, m.b @ np.linalg.inv(turn)
    turned = make_adapter(tmp_path / "turned", factors=factors, modules=WIDE, alpha=3)
    options = {"calibration": calibration.path, "domains": DOMAINS, "directions": 3}
    before = mpf.merge([m.path for m in made], "osrm", WEIGHTS, **options)
    after = mpf.merge([turned.path, *(m.path for m in made[1:])], "osrm", WEIGHTS, **options)
    close(after, {m.module.name: m.b.astype(np.float64) @ m.a for m in before.modules})
    before.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")


def test_zero_updates_have_no_share_to_lose_and_bad_arguments_are_refused(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE, "zero_b": True})(tmp_path, 2)
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng)
    paths = [m.path for m in made]
    for m in mpf.merge(paths, "osrm", calibration=calibration.path).modules:
        assert m.details["own_energy_lost"][1] is None
    for arguments in ({"directions": -1}, {"share": 0.0}, {"directions": 1.5}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            mpf.merge(paths, "osrm", calibration=calibration.path, **arguments)
    assert mpf.MERGE_METHODS["osrm"].summary
