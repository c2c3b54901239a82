"""Gradient features against their definitions (gradient_truth.py)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration, stored
from gradient_truth import (
    DOMAINS,
    MODULES,
    NAMES,
    OWN,
    SHARED,
    blocks,
    calibrate,
    differences,
    divided,
    fisher_definitions,
    flat,
    gradient_definitions,
    make_zoo,
    phi,
    phi_size,
    raw_sensitivities,
    texts,
    token_gradients,
)
from tolerances import bound, gram_bound

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import gradients as engine
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.gradients import FAMILY, FISHER_FAMILY
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.recorded import NOTHING, Recorded


@pytest.fixture
def setting(tmp_path, rng):
    made, calibration = make_zoo(tmp_path / "zoo", rng), calibrate(tmp_path, rng)
    recorded = Recorded(open_calibration(calibration.path), OWN)
    return made, calibration, mpf.open_zoo(tmp_path / "zoo"), recorded


def columns(family, zoo, recorded, threads=2):
    """Every column over all pairs and adapters, as a table would have them."""
    data = family.compute(zoo, recorded, threads)
    a, b = np.triu_indices(len(zoo), 1)
    pairs = {c.name: c.finish(data, a, b) for c in family.pairs}
    return pairs | {c.name: c.finish(data) for c in family.adapters}


def test_every_column_is_its_definition(setting):
    made, calibration, zoo, recorded = setting
    ours, want = columns(FAMILY, zoo, recorded), gradient_definitions(made, calibration)
    assert set(ours) == set(want)
    assert not differences(ours, want, bound("derivative"))
    fisher = columns(FISHER_FAMILY, zoo, recorded)
    want = fisher_definitions(made, calibration, "model", "")
    assert set(fisher) == set(want)
    assert not differences(fisher, want, bound("derivative"))


def test_each_fault_shows(setting):
    made, calibration, zoo, recorded = setting
    ours = columns(FAMILY, zoo, recorded) | columns(FISHER_FAMILY, zoo, recorded)
    shifted = (*OWN[1:], OWN[0])
    swapped = SimpleNamespace(**{
        **vars(calibration), "gradients": calibration.data_gradients,
        "data_gradients": calibration.gradients,
    })  # fmt: skip
    for wrong, names in (
        (gradient_definitions(made, calibration, own=shifted), None),
        (gradient_definitions(made, swapped), None),
        (fisher_definitions(made, swapped, "model", ""), None),
        (gradient_definitions(made, calibration, of=np.arange),
         {"gradient_snr_base_a_by_b", "gradient_snr_base_b_by_a", "gradient_variance_base"}),
    ):  # fmt: skip
        shown = set(differences(ours, wrong, bound("derivative")))
        # Between random gradients there may be no signal at all, and the noise scale is NaN.
        assert shown ^ {*(names or wrong)} <= {"gradient_noise_scale_base"}
    for name in [n for n in ours if n.endswith("_a_by_b")]:
        twin = {name: ours[name.replace("_a_by_b", "_b_by_a")]}
        assert differences(ours, twin, bound("derivative")), name
    raw = [np.abs(raw_sensitivities(m, calibration, d)) for m, d in zip(made, OWN, strict=True)]
    participation = [divided(g.sum() ** 2, (g**2).sum()) for g in raw]
    assert differences(ours, {"sensitive_atoms_base": participation}, bound("derivative"))


def test_noise_scale_of_gradients_with_a_mean(setting):
    made, calibration, zoo, recorded = setting
    inputs = {key: stored(x + 1) for key, x in calibration.inputs.items()}
    y = {key: stored(g + 1e-6) for key, g in calibration.data_gradients.items()}
    truth = SimpleNamespace(inputs=inputs, data_gradients=y)
    real = recorded.calibration
    shifted = SimpleNamespace(
        path=real.path, modules=real.modules, labels=real.labels,
        sampled_tokens=real.sampled_tokens,
        inputs=lambda d, m: inputs[d, SHARED.get(m, m)].astype(np.float32),
        gradients=lambda d, m, _: y[d, m].astype(np.float32),
    )  # fmt: skip
    ours = columns(FAMILY, zoo, Recorded(shifted, OWN))
    assert not differences(ours, gradient_definitions(made, truth), bound("derivative"))
    assert (ours["gradient_noise_scale_base"] > 0).all()
    wrong = differences(ours, gradient_definitions(made, truth, of=np.arange), bound("derivative"))
    assert "gradient_noise_scale_base" in wrong


def test_derivatives_and_gradients_are_exact_to_their_roundings(setting):
    made, calibration, zoo, recorded = setting
    domains = ["math", "code"]
    own = np.array([0, 1, 0, 0, 1, 1])
    g = engine.gradients(zoo, recorded.calibration, domains, own, "data", 2)
    for d, domain in enumerate(domains):
        want, size = phi(made, calibration, domain, "data"), phi_size(made, calibration, domain)
        allowed = (gram_bound("fp32", 33, 33, 1) + 4 * 2.0**-24) * size
        assert (np.abs(g.along.phi[d] - want) <= allowed).all()
        assert (np.abs(np.roll(g.along.phi[d], 1, axis=0) - want) > allowed).any()
        tokens = token_gradients(calibration, domain)
        inner, most = tokens @ tokens.T, np.abs(tokens) @ np.abs(tokens).T
        starts = np.flatnonzero(np.diff(texts(len(tokens)), prepend=-1))
        loose = gram_bound("fp32", 33, 33, 14)
        for ours, of in (
            (g.sequence_square[d], lambda k, s=starts: np.array(
                [part.sum() for part in blocks(k, s)])),
            (g.sequence_dot[d], lambda k, s=starts: np.add.reduceat(k.sum(axis=1), s)),
        ):  # fmt: skip
            assert (np.abs(ours - of(inner)) <= loose * of(most)).all()
            assert (np.abs(np.roll(ours, 1) - of(inner)) > loose * of(most)).any()
    tokens = [token_gradients(calibration, d) for d in domains]
    mean = np.array([t.mean(axis=0) for t in tokens])
    most = np.array([np.abs(t).mean(axis=0) for t in tokens])
    assert (np.abs(g.gram - mean @ mean.T) <= gram_bound("fp32", 33, 33, 14) * most @ most.T).all()
    assert (g.gram == g.gram.T).all()
    norms = np.array([np.linalg.norm(flat(m)) for m in made])
    np.testing.assert_allclose(g.norm, norms, rtol=1e-12)


def test_a_gauge_changes_nothing(setting, tmp_path, rng):
    made, _, zoo, recorded = setting
    for i, m in enumerate(made):
        factors = {}
        for name, module in m.modules.items():
            q, _ = np.linalg.qr(rng.standard_normal((len(module.a),) * 2))
            gauge = q * rng.uniform(0.5, 2, len(q))
            factors[name] = gauge @ module.a, module.b @ np.linalg.inv(gauge)
        alphas = {name: module.scale * len(module.a) for name, module in m.modules.items()}
        sizes = {n: (*MODULES[n][:2], len(a)) for n, (a, _) in factors.items()}
        make_adapter(tmp_path / f"moved/adapter_{i}", sizes, factors=factors, alphas=alphas)
    moved = mpf.open_zoo(tmp_path / "moved")
    for family in (FAMILY, FISHER_FAMILY):
        off = differences(
            columns(family, moved, recorded), columns(family, zoo, recorded), bound("derivative")
        )
        assert not off


def test_adapters_of_one_domain_and_of_none(setting, tmp_path):
    made, calibration, zoo, recorded = setting
    one = Recorded(recorded.calibration, ("law",) * len(made))
    ours = columns(FAMILY, zoo, one)
    want = gradient_definitions(made, calibration, own=one.domains)
    assert not differences(ours, want, bound("derivative"))
    np.testing.assert_allclose(ours["gradient_cosine_base"], 1, atol=1e-12)
    for name in ("sensitive_atoms_base", "top_atom_share_base", "gradient_alignment_base_self"):
        assert np.isnan(ours[name]).tolist() == [False] * 4 + [True, False], name
    assert ours["first_order_sampled_base_self"][4] == 0


def test_one_text_has_no_standard_error_and_one_token_is_enough(tmp_path, rng):
    made = make_zoo(tmp_path / "zoo", rng)
    counts = {"math": 5, "code": 1}
    calibration = calibrate(tmp_path, rng, "data", sequences=1, domains=counts)
    recorded = Recorded(open_calibration(calibration.path), ("math", "code") * 3)
    ours = columns(FAMILY, mpf.open_zoo(tmp_path / "zoo"), recorded)
    for name in ours:
        unknown = name.startswith(("gradient_snr", "gradient_variance", "gradient_noise"))
        assert np.isnan(ours[name]).all() == unknown, name
    y, w = calibration.gradients, flat(made[0])
    token = np.concatenate([
        np.outer(y["code", n][0], calibration.inputs["code", SHARED.get(n, n)][0]).ravel()
        for n in NAMES
    ])  # fmt: skip
    size = np.abs(token) @ np.abs(w)
    assert abs(ours["first_order_sampled_base_b_by_a"][0] - token @ w) <= 1e-6 * size
    assert abs(ours["first_order_sampled_base_b_by_a"][0] - 1.1 * (token @ w)) > 1e-6 * size


@pytest.mark.parametrize("size", [1e-29, 1e25])
def test_tiny_and_huge_gradients_change_no_ratio(setting, size):
    _, _, zoo, recorded = setting
    real = recorded.calibration
    power = 2.0 ** round(math.log2(size))
    scaled = SimpleNamespace(
        path=real.path, modules=real.modules, labels=real.labels, inputs=real.inputs,
        sampled_tokens=real.sampled_tokens,
        gradients=lambda *which: real.gradients(*which) * np.float32(power),
    )  # fmt: skip
    for family in (FAMILY, FISHER_FAMILY):
        plain = columns(family, zoo, recorded)
        for name, values in columns(family, zoo, Recorded(scaled, OWN)).items():
            unit = 1.0
            if name.startswith("first_order_sampled_base"):
                unit = power
            elif name.startswith("gradient_variance"):
                unit = power**2
            np.testing.assert_allclose(values, plain[name] * unit, rtol=1e-12, err_msg=name)


def test_a_gradient_of_zero_has_no_direction(setting):
    _, _, zoo, recorded = setting
    real = recorded.calibration
    still = SimpleNamespace(
        path=real.path, modules=real.modules, labels=real.labels, inputs=real.inputs,
        sampled_tokens=real.sampled_tokens, gradients=lambda *which: 0 * real.gradients(*which),
    )  # fmt: skip
    for name, values in columns(FAMILY, zoo, Recorded(still, OWN)).items():
        zero = name.startswith(("first_order", "gradient_variance"))
        assert (values == 0).all() if zero else np.isnan(values).all(), name


def test_threads_and_the_order_of_adapters_change_no_bit(setting):
    _, _, zoo, recorded = setting
    for family in (FAMILY, FISHER_FAMILY):
        one, two = (columns(family, zoo, recorded, threads) for threads in (1, 2))
        for name, values in one.items():
            assert values.tobytes() == two[name].tobytes(), name
    pair = [zoo[3].path, zoo[1].path]
    there = columns(FAMILY, mpf.open_zoo(pair), Recorded(recorded.calibration, (OWN[3], OWN[1])))
    back = columns(
        FAMILY, mpf.open_zoo(pair[::-1]), Recorded(recorded.calibration, (OWN[1], OWN[3]))
    )
    for c in (*FAMILY.pairs, *FISHER_FAMILY.pairs):
        if c.name in there:
            assert there[c.name] == back[c.directed_twin or c.name], c.name


def test_what_the_calibration_lacks_is_refused_by_name(setting, tmp_path, rng):
    _, _, zoo, recorded = setting
    assert FAMILY.missing(recorded) is None and FISHER_FAMILY.missing(recorded) is None
    assert "--labels data" in FAMILY.missing(NOTHING)
    assert "--labels model" in FISHER_FAMILY.missing(NOTHING)
    model = calibrate(tmp_path / "model", rng, "model")
    only = Recorded(open_calibration(model.path), OWN)
    assert FISHER_FAMILY.missing(only) is None
    assert "data labels" in FAMILY.missing(only)
    for sizes, reason in (
        ({n: MODULES[n][:2] for n in NAMES[:3]}, "did not record"),
        ({n: MODULES[n][:2] for n in NAMES[:3]} | {NAMES[3]: (34, 20)}, "34 x 20"),
    ):
        lacking = make_calibration(
            tmp_path / reason, sizes, DOMAINS, rng, gradients=True, labels="both"
        )
        with pytest.raises(InputError, match=reason) as caught:
            FAMILY.compute(zoo, Recorded(open_calibration(lacking.path), OWN), 1)
        assert caught.value.key == NAMES[3]


def test_declarations_are_complete():
    for family in (FAMILY, FISHER_FAMILY):
        names = [c.name for c in (*family.pairs, *family.adapters)]
        assert len(set(names)) == len(names)
        for c in family.pairs:
            assert "base" in c.name and c.definition and "{" not in c.title + c.definition
            assert c.directed_twin is None or c.directed_twin in names
