"""Output errors per adapter and domain, from small factors, against outputs computed densely."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from adapters import make_adapter
from calibration_samples import make_calibration
from dense_merge import RAGGED, WIDE, seed_from, subset, zoo_of

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.merging import output_error
from mergeprobe_fast.merging.output_error import output_errors
from mergeprobe_fast.merging.source import ZooSource

DOMAINS = ("a", "b", "b", "c")


def setting(folder, rng):
    recipes = [*RAGGED, {"modules": subset("head", of=WIDE), "dtype": "F16"}]
    made = zoo_of(*recipes)(folder, seed_from(rng))
    return made, make_calibration(folder / "cal", WIDE, {"a": 9, "b": 50, "c": 4}, rng)


def errors_of(merged, calibration, domains=DOMAINS, modules=None):
    opened = open_calibration(calibration.path)
    modules = merged.modules if modules is None else modules
    return output_errors(ZooSource(merged.zoo), modules, opened, domains, 2)


def dense(made, calibration, name, i, matrix):
    """E ||(matrix - W_i) x||^2 over the samples of adapter i's domain."""
    x = calibration.samples[DOMAINS[i], name]
    own = made[i].modules[name].delta if name in made[i].modules else 0.0
    return float(np.square(x @ (matrix - own).T).sum()) / len(x)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("method", ["svd", "linear", "cat", "ties", "regmean"])
def test_they_are_those_of_dense_outputs(tmp_path, rng, method, large, monkeypatch):
    made, calibration = setting(tmp_path, rng)
    monkeypatch.setattr(output_error, "LARGE", 0 if large else 1 << 40)
    options = {"calibration": calibration.path, "domains": DOMAINS} if method == "regmean" else {}
    merged = mpf.merge([m.path for m in made], method, **options)
    modules = [replace(m, details={}) for m in merged.modules]
    found = errors_of(merged, calibration, modules=modules)
    room = 1e-5 if large else 1e-10
    for k, m in enumerate(merged.modules):
        name = m.module.name
        assert found.modules[k] == name
        average = sum(a.modules[name].delta for a in made if name in a.modules) / len(made)
        for i in range(len(made)):
            lacks = name not in made[i].modules
            x = calibration.samples[DOMAINS[i], name]
            energy = 0.0 if lacks else np.square(x @ made[i].modules[name].delta.T).sum() / len(x)
            assert found.energy[k, i] == pytest.approx(energy, rel=room)
            for column, matrix in (
                (found.error, m.b.astype(np.float64) @ m.a), (found.average, average),
            ):  # fmt: skip
                assert column[k, i] == pytest.approx(
                    dense(made, calibration, name, i, matrix), rel=room
                )
    total = found.error.sum(axis=0) / found.energy.sum(axis=0)
    np.testing.assert_allclose(found.relative(), total, rtol=1e-12)
    assert found.full is None and found.missing == ()


def test_a_method_that_knows_its_errors_is_believed_and_right(tmp_path, rng):
    """regmean reports them on the way; the general pass finds the same."""
    made, calibration = setting(tmp_path, rng)
    merged = mpf.merge([m.path for m in made], "regmean", None, 4, calibration=calibration.path,
                       domains=DOMAINS, absent="skip")  # fmt: skip
    known = errors_of(merged, calibration)
    modules = [replace(m, details={}) for m in merged.modules]
    counted = errors_of(merged, calibration, modules=modules)
    for column in ("energy", "error", "average"):
        np.testing.assert_allclose(
            getattr(known, column), getattr(counted, column), rtol=1e-5, atol=1e-9
        )
    assert known.full is not None
    best = mpf.merge([m.path for m in made], "regmean", None, 4, calibration=calibration.path,
                     domains=DOMAINS, off_diagonal=1.0)  # fmt: skip
    best = errors_of(best, calibration)
    assert (best.full.sum(axis=1) <= 1.0001 * best.error.sum(axis=1)).all()
    assert (best.full.sum(axis=1) < best.average.sum(axis=1)).all()


def test_an_error_far_below_its_terms_is_not_lost_in_them(tmp_path, rng):
    made = [make_adapter(tmp_path / n, modules=WIDE, seed=1) for n in "ab"]
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng)
    merged = mpf.merge([m.path for m in made], "cat", dtype="F32")
    modules = []
    for m in merged.modules:  # one part in 2^20 off in one column of B
        b = m.b.copy()
        b[:, 0] *= np.float32(1 + 2.0**-20)
        modules.append(replace(m, b=b))
    found = errors_of(merged, calibration, ("a", "b"), modules)
    for k, m in enumerate(modules):
        x = calibration.samples["a", m.module.name]
        off = m.b.astype(np.float64) @ m.a - made[0].modules[m.module.name].delta
        error = np.square(x @ off.T).sum() / len(x)
        assert found.error[k, 0] == pytest.approx(error, rel=1e-3)
        assert found.error[k, 0] < 1e-10 * found.energy[k, 0]


def test_modules_without_samples_are_named_and_modules_without_a_result_count_as_zero(
    tmp_path, rng
):
    made, _ = setting(tmp_path, rng)
    calibration = make_calibration(tmp_path / "few", subset("head", of=WIDE), "abc", rng)
    merged = mpf.merge([m.path for m in made], "svd")
    found = errors_of(merged, calibration)
    assert found.modules == ("head",)
    assert found.missing == ("layers.1.q_proj", "layers.11.q_proj")
    nothing = errors_of(merged, calibration, modules=[])
    np.testing.assert_allclose(nothing.error, nothing.energy, rtol=1e-12)
    other = make_calibration(tmp_path / "other", {"head": (21, 39)}, "abc", rng)
    with pytest.raises(InputError, match="head: is 21 x 39 in the calibration"):
        errors_of(merged, other)


def test_the_report_is_plain_json_with_no_number_where_there_is_none(tmp_path, rng):
    made = zoo_of({"modules": WIDE}, {"modules": WIDE, "zero_b": True})(tmp_path, 4)
    calibration = make_calibration(tmp_path / "cal", WIDE, "ab", rng)
    merged = mpf.merge([m.path for m in made], "linear")
    report = errors_of(merged, calibration, ("a", "b")).report()
    json.dumps(report, allow_nan=False)
    first, second = report["adapters"]
    assert first["error_relative"] == pytest.approx(0.25, rel=1e-6)  # (1/2 - 1)^2
    assert first["average_relative"] == pytest.approx(0.25, rel=1e-6)
    assert second["error_relative"] is None
    assert "full_relative" not in first
    assert report["modules"]["head"]["error_relative"][1] is None
