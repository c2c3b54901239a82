"""Features of probes, against the full gradients and dense deltas behind the files."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter
from probe_truth import (
    DOWN,
    MODULES,
    Q,
    cosine,
    delta,
    differences,
    expected_adapter,
    expected_pair,
    flat,
    reach,
    tangent,
)
from probes import MadeRun, fingerprints, make_run, make_snapshot
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.probes import FAMILY
from mergeprobe_fast.io.probe import open_probe
from mergeprobe_fast.io.probe_json import Clip, Loss
from mergeprobe_fast.probes import find_probes
from mergeprobe_fast.recorded import NOTHING, Recorded
from mergeprobe_fast.zoo import Zoo, open_zoo


def columns(folder: Path, names: list[str] | None = None, threads: int = 2):
    """Every column of the family for a zoo of adapters of these names, (pairs, adapters)."""
    probes = find_probes(folder)
    names = names or list(probes)
    trained = itertools.cycle(probes.at(0.1).values())
    zoo = Zoo([replace(next(trained).adapter, name=name) for name in names])
    recorded = Recorded(probes=probes.match(names, 0.1))
    assert FAMILY.missing(recorded) is None
    data = FAMILY.compute(zoo, recorded, threads)
    a, b = np.triu_indices(len(names), 1)
    return (
        {c.name: c.finish(data, a, b) for c in FAMILY.pairs},
        {c.name: c.finish(data) for c in FAMILY.adapters},
    )


def make_runs(folder: Path, rng: np.random.Generator) -> list[MadeRun]:
    """Six runs of unequal ranks and modules; the last two began with the same A."""
    first = {n: (rng.standard_normal((r, i)), np.zeros((o, r))) for n, (o, i, r) in MODULES.items()}
    plan: dict[str, dict[str, Any]] = {
        "r0": {},
        "r1": {"rank": 2, "alpha": 16},
        "r2": {"steps": (5, 8, 10), "modules": {n: MODULES[n] for n in (Q, "m.1.q", DOWN)}},
        "r3": {"dtype": "BF16", "rank": 6, "modules": {n: MODULES[n] for n in ("m.0.v", DOWN)}},
        "r4": {"start": first},
        "r5": {"start": first, "window": 2},
    }
    return [
        make_run(folder / name, rng, **{"modules": MODULES} | own) for name, own in plan.items()
    ]


def test_columns_are_their_dense_definitions(rng, tmp_path):
    runs = make_runs(tmp_path, rng)
    found = columns(tmp_path)
    assert set(found[0]) == set(expected_pair(*runs[:2]))
    assert set(found[1]) == set(expected_adapter(runs[0]))
    assert not differences(found, runs)
    pair = list(itertools.combinations(range(6), 2)).index
    assert found[0]["probe_shared_init"][pair((4, 5))] == 1
    assert found[0]["probe_shared_init"][pair((0, 4))] == 0


def test_threads_change_no_byte(rng, tmp_path):
    make_runs(tmp_path, rng)
    one, two = columns(tmp_path, threads=1), columns(tmp_path, threads=2)
    for kind in (0, 1):
        for name in one[kind]:
            assert one[kind][name].tobytes() == two[kind][name].tobytes(), name


def test_an_adapter_without_a_probe_has_no_numbers(rng, tmp_path):
    make_runs(tmp_path, rng)
    whole, some = columns(tmp_path), columns(tmp_path, ["r1", "x", "r4"])
    for name, values in some[1].items():
        np.testing.assert_array_equal(values, np.append(whole[1][name], np.nan)[[1, 6, 4]], name)
    row = list(itertools.combinations(range(6), 2)).index((1, 4))
    for name, values in some[0].items():
        assert np.isnan(values[[0, 2]]).all(), name
        assert values[1] == pytest.approx(whole[0][name][row], abs=1e-12), name
    alone = columns(tmp_path, ["r2"])
    assert all(len(values) == 0 for values in alone[0].values())
    assert FAMILY.missing(NOTHING) == "probes"


def moved(rng: np.random.Generator, sizes):
    """A -> M A, B -> B M^-1 for every module, with singular values of M from 1 to 5."""
    matrices = {}
    for name, (_, _, r) in sizes.items():
        left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
        matrices[name] = left @ np.diag(np.geomspace(1, 5, r)) @ right
    return lambda factors: {
        n: (matrices[n] @ a, b @ np.linalg.inv(matrices[n])) for n, (a, b) in factors.items()
    }


def test_no_column_depends_on_how_the_update_is_split_into_factors(rng, tmp_path):
    seeds = rng.integers(2**32, size=3)
    for i, seed in enumerate(seeds):
        # Starts are fingerprints of bytes, and the same for both.
        start = {
            n: (np.full((r, d), i + 1.0), np.zeros((o, r))) for n, (o, d, r) in MODULES.items()
        }
        for folder, alter in (("one", lambda f: f), ("two", moved(rng, MODULES))):
            make_run(
                tmp_path / folder / str(i), np.random.default_rng(seed), MODULES, start=start,
                steps=(3, 5, 10), alter=alter,
            )  # fmt: skip
    one, two = columns(tmp_path / "one"), columns(tmp_path / "two")
    for kind in (0, 1):
        for name, values in one[kind].items():
            np.testing.assert_allclose(
                two[kind][name], values, rtol=bound("gauge"), atol=bound("gauge"), err_msg=name
            )
    # The factors themselves have moved, and with them the cosine of their gradients.
    a, b = (open_probe(tmp_path / f / "0/step-0000010").gradients(Q)[0] for f in ("one", "two"))
    assert abs(cosine(a.ravel(), b.ravel()) - 1) > bound("gauge")


def deficient(factors):
    """Rows of A that repeat or sum up others, a column of B that is zero, one that repeats."""
    changed = dict(factors)
    a, b = (x.astype(np.float32) for x in factors[Q])
    changed[Q] = (np.stack([a[0], a[1], a[0] + a[1], 3 * a[0] - a[1]]), b)
    a, b = factors["m.1.q"]
    changed["m.1.q"] = (a, np.stack([b[:, 0], b[:, 0], 0 * b[:, 0], b[:, 3], 1e-12 * b[:, 4]], 1))
    return changed


def zero_b(*names):
    return lambda factors: {
        n: (a, 0 * b) if not names or n in names else (a, b) for n, (a, b) in factors.items()
    }


@pytest.mark.parametrize("which", ["deficient", "zero B", "zero B everywhere"])
def test_pseudoinverses_amplify_no_rounding(rng, tmp_path, which):
    alter = {"deficient": deficient, "zero B": zero_b(Q, DOWN), "zero B everywhere": zero_b()}
    runs = [
        make_run(tmp_path / "a", rng, MODULES, alter=alter[which]),
        make_run(tmp_path / "b", rng, MODULES),
        make_run(tmp_path / "c", rng, MODULES, alter=alter[which]),
    ]
    found = columns(tmp_path)
    assert not differences(found, runs)
    assert np.isfinite(found[0]["probe_gradient_cosine"]).all()
    if which == "zero B everywhere":
        assert np.isnan(found[0]["probe_cosine"]).all() and found[1]["probe_norm"][0] == 0
        here = runs[0].snapshots[-1]
        onto = reach(here.adapter.modules[Q].a.T)
        np.testing.assert_allclose(tangent(here, Q), here.mean(Q) @ onto, atol=1e-12)
    if which == "deficient":
        # A plain solve divides the rounding of dB by the rounding of A.
        made, snapshot = runs[0].snapshots[-1], open_probe(runs[0].snapshots[-1].path)
        d_b = snapshot.gradients(Q)[1] / made.adapter.modules[Q].scale
        plain = d_b @ np.linalg.pinv(made.adapter.modules[Q].a.T, rcond=0)
        right = made.mean(Q) @ reach(made.adapter.modules[Q].a.T)
        assert np.linalg.norm(plain - right) > 10 * bound("probe") * np.linalg.norm(right)


@pytest.mark.parametrize(("magnitude", "gradient"), [(1e-15, 1e-10), (1e8, 1e8), (1e-3, 1e-20)])
def test_no_size_of_factors_or_gradients_is_lost(rng, tmp_path, magnitude, gradient):
    runs = [
        make_run(tmp_path / n, rng, MODULES, magnitude=magnitude, gradient=gradient) for n in "abc"
    ]
    assert not differences(columns(tmp_path), runs)


def test_copies_are_alike_and_opposites_opposite(rng, tmp_path):
    seed = int(rng.integers(2**32))

    def negated(factors):
        return {n: (a, -b) for n, (a, b) in factors.items()}

    for name, alter in (("a", lambda f: f), ("b", lambda f: f), ("c", negated)):
        make_run(tmp_path / name, np.random.default_rng(seed), MODULES, alter=alter)
    pairs = columns(tmp_path)[0]
    for name, values in {
        "probe_cosine": (1, -1, -1), "probe_displacement_cosine": (1, -1, -1),
        "probe_gradient_cosine": (1, 1, 1), "probe_row_overlap": (1, 1, 1),
        "probe_norm_ratio": (1, 1, 1), "probe_shared_init": (1, 1, 1),
    }.items():  # fmt: skip
        np.testing.assert_allclose(pairs[name], values, atol=bound("probe"), err_msg=name)


def test_what_a_run_did_not_record_is_nan(rng, tmp_path):
    unknown = {"loss": None, "learning_rate_integral": None, "clip": None, "initial": None}
    make_run(tmp_path / "a", rng, MODULES, steps=(10,), window=1, **unknown)
    make_run(tmp_path / "b", rng, MODULES, loss=Loss(math.nan, math.nan, 3), clip=Clip(1, 1, 1))
    pairs, adapters = columns(tmp_path)
    for name in ("probe_displacement_cosine", "probe_shared_init"):
        assert np.isnan(pairs[name]).all(), name
    missing = {
        "probe_loss", "probe_learning_rate_integral", "probe_clip", "probe_noise_scale",
        "probe_displacement", "probe_straightness", "probe_growth",
    }  # fmt: skip
    assert {name for name, values in adapters.items() if np.isnan(values[0])} == missing
    assert {name for name, values in adapters.items() if np.isnan(values[1])} == {"probe_loss"}
    assert adapters["probe_clip"][1] == 1


def test_noise_without_signal_is_undefined_and_counted(rng, tmp_path, caplog):
    g = {n: rng.standard_normal((o, i)) for n, (o, i, _) in MODULES.items()}
    factors = {
        n: (rng.standard_normal((r, i)), rng.standard_normal((o, r)))
        for n, (o, i, r) in MODULES.items()
    }
    make_run(tmp_path / "a", rng, MODULES, steps=(10,))
    for folder, last in (("a", -1), ("b", 1)):
        make_run(tmp_path / folder, rng, MODULES, steps=(10,), initial=None)
        gradients = {n: [x, last * x] for n, x in g.items()}
        make_snapshot(tmp_path / folder / "step-0000010", factors, gradients)
    with caplog.at_level(logging.INFO, "mergeprobe_fast"):
        scale = columns(tmp_path)[1]["probe_noise_scale"]
    assert math.isnan(scale[0]) and scale[1] == pytest.approx(0, abs=bound("probe"))
    assert "gradient noise scale of 1 probes: no signal above the noise" in caplog.text


def test_probes_of_another_model_are_refused(rng, tmp_path):
    made = make_adapter(tmp_path / "zoo" / "a", MODULES)
    zoo = open_zoo(made.path)
    make_run(tmp_path / "base" / "a", rng, MODULES, base_model="other/base")
    make_run(tmp_path / "shape" / "a", rng, {**MODULES, Q: (24, 21, 4)})
    for folder, reason in (("base", "declares base model"), ("shape", "not the same base model")):
        recorded = Recorded(probes=find_probes(tmp_path / folder).match(zoo.names))
        with pytest.raises(InputError, match=reason):
            FAMILY.compute(zoo, recorded, 1)
    same = open_zoo(made.path, same_base=True)
    FAMILY.compute(same, Recorded(probes=find_probes(tmp_path / "base").match(["a"])), 1)


def test_early_cosines_depend_on_the_first_factors(rng, tmp_path):
    """The early-phase law: W = -G A0^T A0 after a step; CATALOGUE section 3."""
    r, d, cos = 8, 64, 0.5
    sizes = {f"m.{k}.q": (64, d, r) for k in range(40)}
    common = {n: rng.standard_normal((64, d)) for n in sizes}
    first = {n: rng.standard_normal((r, d)) / 8 for n in sizes}
    for name, own in (("a", False), ("b", False), ("c", True)):
        factors, gradients = {}, {}
        for n in sizes:
            g = math.sqrt(cos) * common[n] + math.sqrt(1 - cos) * rng.standard_normal((64, d))
            a = rng.standard_normal((r, d)) / 8 if own else first[n]
            factors[n], gradients[n] = (a, -1e-3 * g @ a.T), [g]
        start = {n: (a, 0 * b) for n, (a, b) in factors.items()}
        make_run(tmp_path / name, rng, sizes, steps=(10,), start=start)
        made = fingerprints(start)
        make_snapshot(tmp_path / name / "step-0000010", factors, gradients, initial=made)
    pairs = columns(tmp_path)[0]
    np.testing.assert_array_equal(pairs["probe_shared_init"], [1, 0, 0])
    damped = cos * r / (d + r + 1)
    np.testing.assert_allclose(pairs["probe_cosine"], [cos, damped, damped], atol=0.03)


WRONG = {
    "probe_cosine": lambda p, q: cosine(flat(p, tangent), flat(q, tangent)),
    "probe_gradient_cosine": lambda p, q: cosine(
        *(flat(s, lambda s, n: s.mean(n)) for s in (p, q))  # not projected
    ),
    "probe_first_order_a_by_b": lambda p, q: cosine(flat(q, tangent), flat(p, delta)),
    "probe_first_order_b_by_a": lambda p, q: cosine(flat(p, tangent), flat(q, delta)),
    "probe_displacement_cosine": lambda p, q: cosine(flat(p, delta), flat(q, delta)),
    "probe_row_overlap": lambda p, q: cosine(flat(p, delta), flat(q, delta)) ** 2,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_bound_catches(rng, tmp_path, name):
    runs = [make_run(tmp_path / n, rng, MODULES) for n in "ab"]
    wrong = WRONG[name](*(run.snapshots[-1] for run in runs))
    assert abs(columns(tmp_path)[0][name][0] - wrong) > bound("probe")
