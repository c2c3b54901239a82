"""Prototypes against dense SVDs and PEFT's Arrow; the learned rule against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration
from made_routers import (
    SIZES,
    gapped_zoo,
    made_router,
    make_gapped,
    router_of,
    top_right,
    with_factors,
)
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.planning import discriminant
from mergeprobe_fast.planning.routing import Requests, answers_of, build_router, prototypes

CLOSE, PEFT_CLOSE = bound("prototype"), bound("power iteration")


def off(found, expected):
    """Distance of unit vectors, up to sign."""
    return min(np.linalg.norm(found - expected), np.linalg.norm(found + expected))


@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}, {"alpha": 1e-6}, {"alpha": 3e6}])
def test_they_are_the_top_right_singular_vectors_of_the_deltas(tmp_path, rng, options):
    zoo, made = gapped_zoo(tmp_path, rng, **options)
    found = prototypes(zoo)
    assert list(found) == [m.name for m in zoo.modules]
    for i, adapter in enumerate(made):
        for name, module in adapter.modules.items():
            v = found[name][i].astype(np.float64)
            assert np.linalg.norm(v - top_right(module.delta)) < CLOSE
            assert off(v, module.a[0] / np.linalg.norm(module.a[0])) > 1000 * CLOSE  # the fault


def test_the_gauge_does_not_matter(tmp_path, rng):
    adapters = []
    for i in range(3):
        made = make_gapped(tmp_path / f"{i}", rng)
        moved = {}
        for name, m in made.modules.items():
            gauge = np.linalg.qr(rng.standard_normal((3, 3)))[0] * [5.0, 1.0, 1.0]
            moved[name] = gauge @ m.a, m.b @ np.linalg.inv(gauge)
        adapters.append((made, with_factors(tmp_path / f"moved {i}", moved)))
    one, other = (prototypes(mpf.open_zoo([a[k].path for a in adapters])) for k in (0, 1))
    for name in SIZES:
        assert np.linalg.norm(one[name] - other[name], axis=1).max() < CLOSE


def test_they_are_those_of_peft_up_to_sign(tmp_path, rng):
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("peft.tuners.lora.arrow").ArrowLoraLinearLayer
    zoo, made = gapped_zoo(tmp_path, rng)
    found = prototypes(zoo)
    for i, adapter in enumerate(made):
        for name, m in adapter.modules.items():
            a, b = (torch.tensor(f, dtype=torch.float32) for f in (m.a, m.b))
            arrow = layer(m.a.shape[1], peft_config(["x"]))
            theirs = arrow.top_right_singular_vec_from_BA(a, b).numpy().astype(np.float64)
            assert off(found[name][i].astype(np.float64), theirs) < PEFT_CLOSE
            assert off(np.linalg.svd(m.delta)[2][1], theirs) > 1  # the fault


def test_tokens_are_shared_among_the_adapters_as_peft_does(tmp_path, rng):
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("peft.tuners.lora.arrow").ArrowLoraLinearLayer
    zoo, made = gapped_zoo(tmp_path, rng, alpha=6)
    router = router_of(*build_router(zoo))
    names, name = ["a", "b", "c", "d"], "layers.0.down_proj"
    x = rng.standard_normal((13, SIZES[name][1])).astype(np.float32)
    sides = {"a": {}, "b": {}}
    for key, adapter in zip(names, made, strict=True):
        for side, of in sides.items():
            weight = torch.tensor(getattr(adapter.modules[name], side), dtype=torch.float32)
            of[key] = torch.nn.Linear(*weight.shape[::-1], bias=False)
            of[key].weight = torch.nn.Parameter(weight)
    arrow = layer(x.shape[1], peft_config(names))
    arrow.build_prototypes(sides["a"], sides["b"])
    scaling = {key: adapter.modules[name].scale for key, adapter in zip(names, made, strict=True)}
    with torch.no_grad():
        theirs = arrow(torch.tensor(x), *sides.values(), torch.nn.Identity(), scaling).numpy()
    outputs = np.stack([x @ adapter.modules[name].delta.T for adapter in made])
    ours = np.einsum("te,eto->to", router.weights(name, x), outputs)
    worst = np.abs(theirs - ours).max() / np.abs(outputs).max()
    assert worst < 10 * PEFT_CLOSE  # scores of some units go through an exponential
    shared = np.einsum("te,eto->to", np.full((len(x), 4), 0.25), outputs)
    assert np.abs(theirs - shared).max() / np.abs(outputs).max() > 100 * PEFT_CLOSE  # the fault


def peft_config(names):
    config = pytest.importorskip("peft").ArrowConfig(top_k=3, router_temperature=1.0, rng_seed=0)
    config.task_adapter_names = list(names)
    config.gks_adapter_names = []
    return config


def test_missing_zero_and_other_kinds_of_modules_have_zeros_or_nothing(tmp_path, rng):
    whole = make_gapped(tmp_path / "whole", rng)
    sizes = {name: SIZES[name] for name in list(SIZES)[:2]}
    part = make_gapped(tmp_path / "part", rng, sizes=sizes)
    zero = make_adapter(tmp_path / "zero", {n: (*s, 2) for n, s in SIZES.items()}, zero_b=True)
    kinds = make_adapter(
        tmp_path / "kinds", {"embed": (5, 9, 2), "conv": (4, 12, 2), "one": (1, 6, 1)},
        embeddings=("embed",), convs={"conv": (3, 2, 2)},
    )
    zoo = mpf.open_zoo([a.path for a in (whole, part, zero, kinds)])
    found = prototypes(zoo)
    assert set(found) == {*SIZES, "one"}
    present = {name: rows.any(axis=1).tolist() for name, rows in found.items()}
    assert present["layers.1.q_proj"] == [True, False, False, False]
    assert present["layers.0.q_proj"] == [True, True, False, False]
    assert present["one"] == [False, False, False, True]
    np.testing.assert_allclose(found["one"][3], top_right(kinds.modules["one"].delta), atol=CLOSE)


def test_threads_and_company_change_no_bit(tmp_path, rng):
    zoo, made = gapped_zoo(tmp_path, rng)
    one, two = prototypes(zoo, threads=1), prototypes(zoo, threads=2)
    alone = prototypes(mpf.open_zoo([made[2].path]))
    for name in SIZES:
        np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_array_equal(one[name][2:3], alone[name])


def test_inputs_along_an_adapter_go_to_it(tmp_path, rng):
    names = [f"adapter {i}" for i in range(5)]
    axes = {name: np.linalg.qr(rng.standard_normal((d_in, 5)))[0].T for name, (_, d_in) in
            SIZES.items()}  # fmt: skip
    for i, name in enumerate(names):
        make_gapped(tmp_path / name, rng, first={m: axes[m][i] for m in SIZES})
    zoo = mpf.open_zoo([tmp_path / name for name in names])
    info, tensors = build_router(zoo)
    assert info.rule == "arrow" and info.linear is None and info.accuracy == {}
    assert dict(info.adapters) == {a.name: fingerprint(a) for a in zoo}
    router = router_of(info, tensors)
    for i, name in enumerate(names):
        inputs = {
            m: rng.choice([-3.0, 3.0], (8, 1)) * axes[m][i] + 0.2 * rng.standard_normal((8, d_in))
            for m, (_, d_in) in SIZES.items()
        }
        assert router.choose(inputs).adapter == name


def calibrated(tmp_path, rng, domains, *, apart=3.0, texts=20, directions=None):
    """A zoo with an adapter of each domain and a calibration whose domains have means of their own.

    Directions of the means: of each adapter's prototypes, or given by (domain, module).
    """
    zoo, made = gapped_zoo(tmp_path, rng, names=tuple(f"{d}-x" for d in domains))
    rows = 4 * texts
    samples = {}
    for d, adapter in zip(domains, made, strict=True):
        for m, (_, d_in) in SIZES.items():
            mean = top_right(adapter.modules[m].delta) if directions is None else directions[d, m]
            samples[d, m] = apart * mean + rng.standard_normal((rows, d_in))
    made_calibration = make_calibration(
        tmp_path / "cal", SIZES, dict.fromkeys(domains, rows), rng, samples=samples,
        sequences=texts,
    )
    return zoo, made_calibration


def requests_of(zoo, made, answers=None):
    opened = mpf.open_calibration(made.path)
    return Requests(opened, answers or {n.split("-")[0]: (n,) for n in zoo.names})


def test_a_rule_is_learned_and_both_are_measured(tmp_path, rng):
    domains = ("math", "code", "law")
    directions = {(d, m): np.eye(size[1])[k] for k, d in enumerate(domains)
                  for m, size in SIZES.items()}  # fmt: skip
    zoo, made = calibrated(tmp_path, rng, domains, directions=directions)
    info, tensors = build_router(zoo, requests_of(zoo, made))
    assert info.texts == 60 and info.accuracy["linear"] > 0.95
    assert info.rule == ("linear" if info.accuracy["linear"] >= info.accuracy["arrow"] else "arrow")
    assert info.linear.module == "layers.0.q_proj" and info.linear.adapters == tuple(zoo.names)
    router = router_of(info, tensors)
    for k, name in enumerate(zoo.names):
        x = 3 * np.eye(9)[k] + rng.standard_normal((5, 9))
        assert router.choose({"layers.0.q_proj": x}, "linear").adapter == name


def test_texts_that_say_nothing_are_routed_by_chance(tmp_path, rng):
    """A rule that was measured on texts it had learned would reach far more."""
    domains = ("math", "code", "law", "art")
    zoo, made = calibrated(tmp_path, rng, domains, apart=0.0, texts=50)
    info, _ = build_router(zoo, requests_of(zoo, made))
    sd = np.sqrt(0.25 * 0.75 / 200)
    assert abs(info.accuracy["linear"] - 0.25) < 5 * sd
    assert abs(info.accuracy["arrow"] - 0.25) < 5 * sd


def test_a_choice_counts_as_right_when_the_adapter_holds_one_of_the_domain(tmp_path, rng):
    zoo, made = calibrated(tmp_path, rng, ("math", "code", "law"), apart=5.0)
    answers = {"math": ("math-x", "code-x"), "code": ("code-x",), "law": ("code-x",)}
    info, _ = build_router(zoo, requests_of(zoo, made, answers))
    assert info.linear.adapters == ("math-x", "code-x")
    assert dict(info.linear.domains) == {"math": "math-x", "code": "code-x", "law": "code-x"}
    assert any("requests of math go to math-x, though code-x" in note for note in info.notes)
    opened = mpf.open_calibration(made.path)
    router = router_of(*build_router(zoo))
    right = []
    for domain, residents in answers.items():
        sequence, _ = opened.sampled_tokens(domain)
        for text in np.unique(sequence):
            of = {m: opened.inputs(domain, m)[sequence == text] for m in SIZES}
            votes = sum(router.votes(m, x).mean(axis=0) for m, x in of.items())
            right.append(zoo.names[int(votes.argmax())] in residents)
    assert info.accuracy["arrow"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("texts", "one", "note"),
    [(9, False, "9 texts for "), (20, True, "one adapter answers all domains")],
)
def test_where_nothing_can_be_learned_the_router_says_so(tmp_path, rng, texts, one, note):
    zoo, made = calibrated(tmp_path, rng, ("math", "code"), texts=texts)
    answers = {"math": ("math-x",), "code": ("math-x",)} if one else None
    info, tensors = build_router(zoo, requests_of(zoo, made, answers))
    assert info.rule == "arrow" and info.linear is None and "request.bias" not in tensors
    assert set(info.accuracy) == {"arrow"} and any(note in n for n in info.notes)


def test_requests_go_where_their_adapters_keep_most(tmp_path, rng):
    zoo, _ = gapped_zoo(tmp_path, rng, names=("a-1", "a-2", "b-1", "b-2"))
    residents = {"first": ["a-1", "b-1"], "second": ["a-2"], "third": ["b-2"]}
    domains = ("a", "a", "b", "b")
    kept = {"a-1": 0.8, "a-2": 1.0, "b-1": 0.9, "b-2": None}
    assert answers_of(zoo, domains, residents, kept) == {
        "a": ("second", "first"), "b": ("first", "third"),
    }  # fmt: skip
    with pytest.raises(InputError, match="b: no resident adapter holds one of this domain"):
        answers_of(zoo, domains, {"second": ["a-2"]}, kept)


@pytest.mark.parametrize("shrinkage", discriminant.SHRINKAGES)
def test_the_discriminant_is_its_definition(rng, shrinkage):
    y = np.arange(24) % 3
    x = (rng.standard_normal((24, 40)) + 2 * rng.standard_normal((3, 40))[y]) * rng.uniform(
        0.5, 2, 40
    ) + rng.standard_normal(40)
    found = discriminant._path(x, y, [shrinkage])[0]
    z = (x - x.mean(0)) / x.std(0)
    means = np.stack([z[y == k].mean(0) for k in range(3)])
    within = sum(np.outer(z[i] - means[y[i]], z[i] - means[y[i]]) for i in range(24)) / 24
    s = (1 - shrinkage) * within + shrinkage * np.trace(within) / 40 * np.eye(40)
    new = rng.standard_normal((5, 40))
    solved = np.linalg.solve(s, means.T)
    expected = ((new - x.mean(0)) / x.std(0)) @ solved - (means * solved.T).sum(1) / 2
    np.testing.assert_allclose(found.scores(new), expected, rtol=1e-9, atol=1e-9)


def test_constant_and_equal_features_give_the_nearest_mean(rng):
    y = np.arange(20) % 2
    x = np.column_stack([y, np.ones(20), -3.0 * y]).astype(float)
    found = discriminant.fit(x, y)
    assert (found.scores(x).argmax(axis=1) == y).all() and np.isfinite(found.weight).all()


def test_no_held_out_text_reaches_the_fit_that_judges_it(rng):
    y = np.arange(30) % 2
    x = rng.standard_normal((30, 8)) + 0.5 * y[:, None]
    before = discriminant.choose_held_out(x, y)
    held = discriminant.folds(y) == 0
    other = y.copy()
    other[held] = other[held][::-1]  # as many of each class
    assert (discriminant.folds(y)[y == 0] == np.arange(15) % 5).all()
    fit = discriminant.fit(x[~held], y[~held])
    np.testing.assert_array_equal(before[held], fit.scores(x[held]).argmax(axis=1))


def test_a_router_that_was_made_up_is_of_the_kind_that_is_built(tmp_path, rng):
    info, tensors = build_router(gapped_zoo(tmp_path, rng)[0])
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    assert type(made_router(rng)[0]) is type(info)
