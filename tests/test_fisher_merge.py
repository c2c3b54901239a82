"""Fisher merging against its definition with every Fisher matrix formed."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration
from dense_merge import RAGGED, WIDE, assert_peft_agrees, seed_from, subset, truncated, zoo_of

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource

DOMAINS = ("a", "b", "c")
WEIGHTS = np.array([1.0, 0.2, 3.0])
# sums of r <= 7 and T <= 9 float32 products, rounded squares, one division: 3 sqrt(20) 2^-24 of
# an entry's terms, times the ratio of terms to entry where they cancel
CLOSE = 2e-6


def setting(folder, rng, gradients=True):
    recipes = [dict(RAGGED[0]), dict(RAGGED[1], dtype="BF16"), dict(RAGGED[2])]
    recipes[1]["modules"] = subset("head", "layers.1.q_proj", of=WIDE)
    made = zoo_of(*recipes)(folder, seed_from(rng))
    return made, make_calibration(folder / "cal", WIDE, DOMAINS, rng, gradients=gradients)


def definition(made, calibration, weights=WEIGHTS, floor=1e-6, domains=DOMAINS):
    results = {}
    for name in {name for m in made for name in m.modules}:
        information = [
            (calibration.gradients[g, name] ** 2).T
            @ calibration.samples[g, name] ** 2
            / len(calibration.samples[g, name])
            for g in domains
        ]
        level = floor * np.mean([f.mean() for f in information])
        weighted = [w * (f + level) for w, f in zip(weights, information, strict=True)]
        deltas = [m.modules[name].delta if name in m.modules else 0.0 for m in made]
        results[name] = sum(f * d for f, d in zip(weighted, deltas, strict=True)) / sum(weighted)
    return results


def dense_rows(made, calibration, weights=WEIGHTS, **arguments):
    zoo = mpf.open_zoo([m.path for m in made])
    method, request = prepare(
        ZooSource(zoo), "fisher", weights=weights, calibration=open_calibration(calibration.path),
        threads=2, arguments=arguments,
    )  # fmt: skip
    return {m.module.name: m.rows(0, m.module.d_out).astype(np.float64)
            for m in method.dense(request)}  # fmt: skip


def close(ours, truth):
    assert set(ours) == set(truth)
    for name, matrix in truth.items():
        assert np.linalg.norm(ours[name] - matrix) <= CLOSE * np.linalg.norm(matrix), name


@pytest.mark.parametrize("floor", [1e-6, 0.3])
def test_the_rows_are_the_dense_definition(tmp_path, rng, floor):
    made, calibration = setting(tmp_path, rng)
    ours = dense_rows(made, calibration, floor=floor)
    close(ours, definition(made, calibration, floor=floor))
    close(dense_rows(made, calibration, WEIGHTS * 1e-20, floor=floor), ours)
    for wrong in (
        definition(made, calibration, floor=1.1 * floor + 1e-3),
        definition(made, calibration, WEIGHTS * [1, 1.001, 1], floor),
        definition(made, calibration, floor=floor, domains=("a", "c", "b")),
    ):
        with pytest.raises(AssertionError):
            close(ours, wrong)


def test_the_adapter_is_its_best_approximation(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    truth = definition(made, calibration)
    merged = mpf.merge([m.path for m in made], "fisher", WEIGHTS, 6, calibration=calibration.path)
    for m in merged.modules:
        matrix = truth[m.module.name]
        best = np.linalg.norm(matrix - truncated(matrix, 6))
        error = np.linalg.norm(matrix - m.b.astype(np.float64) @ m.a)
        assert error <= best * (1 + 1e-4)
        assert m.truncation_error == pytest.approx(error, rel=1e-4)
        assert m.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
    merged.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")


def test_one_adapter_equal_adapters_and_equal_domains(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE})(tmp_path, 3)
    twin = make_adapter(tmp_path / "c", modules=WIDE, seed=3)
    calibration = make_calibration(tmp_path / "cal", WIDE, DOMAINS, rng, gradients=True)
    truth = {name: m.delta for name, m in made[0].modules.items()}
    close(dense_rows([made[0]], calibration, [1.0]), truth)
    close(dense_rows([made[0], twin], calibration, [1.0, 5.0]), truth)
    one = make_calibration(tmp_path / "one", WIDE, ["a"], rng, gradients=True)
    merged = mpf.merge([m.path for m in made], "fisher", [1, 3], 33, calibration=one.path,
                       domains=["a", "a"])  # fmt: skip
    for m in merged.modules:
        average = sum(w * a.modules[m.module.name].delta
                      for w, a in zip((0.25, 0.75), made, strict=True))  # fmt: skip
        assert np.linalg.norm(m.b @ m.a - average) <= 5e-6 * np.linalg.norm(average)


def test_gauge_and_order_do_not_matter(tmp_path, rng):
    made, calibration = setting(tmp_path, rng)
    factors = {}
    for name, m in made[0].modules.items():
        turn = np.eye(len(m.a)) + 0.2 * rng.standard_normal((len(m.a), len(m.a)))
        factors[name] = turn @ m.a, m.b @ np.linalg.inv(turn)
    before = dense_rows(made, calibration)
    (tmp_path / "turned").mkdir()
    turned = make_adapter(tmp_path / "turned" / "a", factors=factors, modules=WIDE, alpha=3)
    close(dense_rows([turned, *made[1:]], calibration), before)
    order = [2, 0, 1]
    close(dense_rows([made[i] for i in order], calibration, WEIGHTS[order]), before)


def test_tiny_gradients_do_not_underflow_and_none_at_all_means_the_average(tmp_path, rng):
    """Gradients of 1e-30 have squares that float32 cannot hold."""
    made, calibration = setting(tmp_path, rng)
    opened = open_calibration(calibration.path)

    class Scaled:
        def __init__(self, factor):
            self.factor = np.float32(factor)

        def __getattr__(self, name):
            return getattr(opened, name)

        def gradients(self, domain, module):
            return opened.gradients(domain, module) * self.factor

    zoo = mpf.open_zoo([m.path for m in made])
    whole = dense_rows(made, calibration)
    for factor, truth in ((2.0**-80, whole), (0.0, None)):
        method, request = prepare(ZooSource(zoo), "fisher", weights=WEIGHTS, threads=1,
                                  calibration=Scaled(factor), arguments={})  # fmt: skip
        rows = {m.module.name: m.rows(0, m.module.d_out) for m in method.dense(request)}
        if truth is None:
            truth = {
                name: sum(w * m.modules[name].delta
                          for w, m in zip(WEIGHTS, made, strict=True) if name in m.modules)
                / WEIGHTS.sum()
                for name in rows
            }  # fmt: skip
        close(rows, truth)


def test_what_it_needs_is_asked_for(tmp_path, rng):
    made, calibration = setting(tmp_path, rng, gradients=False)
    paths = [m.path for m in made]
    with pytest.raises(InputError, match="has no gradients, which fisher needs"):
        mpf.merge(paths, "fisher", calibration=calibration.path)
    made, calibration = setting(tmp_path / "with", rng)
    paths = [m.path for m in made]
    with pytest.raises(InputError, match="positive weights only, not that of b"):
        mpf.merge(paths, "fisher", [1, -1, 1], calibration=calibration.path)
    with pytest.raises(InputError, match="floor"):
        mpf.merge(paths, "fisher", calibration=calibration.path, floor=0)
    assert mpf.MERGE_METHODS["fisher"].summary
