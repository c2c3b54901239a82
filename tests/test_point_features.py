"""Features from points against loops over texts, and against a loss that can be worked out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_points

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.points import FAMILY
from mergeprobe_fast.io.points import open_points
from mergeprobe_fast.recorded import NOTHING, Recorded

MODULES = {"model.layers.0.self_attn.q_proj": (5, 4, 2), "model.layers.1.mlp.up_proj": (6, 4, 2)}
NAMES = ["code", "law", "math-a", "math-b", "zero"]
OWN = ("code", "law", "math", "math", "law")
TEXTS = {"code": 4, "law": 3, "math": 5}
# A dozen float64 products and sums of S <= 5 terms, relative to the terms.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def make_zoo(folder, names=NAMES, seed=0):
    for i, name in enumerate(names):
        make_adapter(folder / name, MODULES, seed=seed + i, zero_b=name == "zero")
    return mpf.open_zoo(folder)


def draw(rng, zoo, own=OWN, texts=TEXTS):
    """Losses with a gain for all but the zero adapter, whose derivatives are 0."""
    tensors = {}
    keys = {f"base:{d}": d for d in own}
    keys |= {f"trained:{name}": d for name, d in zip(zoo.names, own, strict=True)}
    nothing = [i for i, name in enumerate(zoo.names) if name == "zero"]
    base = {d: rng.uniform(2, 3, texts[d]) for d in set(own)}
    for key, d in keys.items():
        for name, shape in (
            ("phi_data", (texts[d], len(zoo))), ("phi_model", (texts[d], len(zoo))),
            ("first", (len(MODULES), len(zoo))), ("curvature", (len(MODULES), len(zoo))),
        ):  # fmt: skip
            values = rng.standard_normal(shape)
            values[:, nothing] = 0
            tensors[f"{name}.{key}"] = np.abs(values) if name == "curvature" else values
        still = key.startswith("base:") or key == "trained:zero"
        tensors[f"base_loss.{key}"] = base[d]
        tensors[f"loss.{key}"] = base[d] - (0 if still else rng.uniform(0.1, 1, texts[d]))
    return tensors


@pytest.fixture
def setting(tmp_path, rng):
    zoo = make_zoo(tmp_path / "zoo")
    made = make_points(
        tmp_path / "cal", zoo, OWN, rng, sequences=TEXTS, tensors=draw(rng, zoo)
    )
    return zoo, made.tensors, Recorded(None, OWN, open_points(tmp_path / "cal"))


def columns(zoo, recorded):
    data = FAMILY.compute(zoo, recorded, 1)
    a, b = np.triu_indices(len(zoo), 1)
    pairs = {c.name: c.finish(data, a, b) for c in FAMILY.pairs}
    return pairs | {c.name: c.finish(data) for c in FAMILY.adapters}


def divided(x, y):
    return x / y if y > 0 else math.nan


def effects(tensors, key, own, partner):
    """g_j, F_jj and F_aj, text by text."""
    data, model = tensors[f"phi_data.{key}"], tensors[f"phi_model.{key}"]
    tokens = tensors[f"tokens.{key}"]
    first = second = cross = 0.0
    for s, count in enumerate(tokens):
        first += data[s, partner] / len(tokens)
        second += float(count) * model[s, partner] ** 2 / len(tokens)
        cross += float(count) * model[s, own] * model[s, partner] / len(tokens)
    return first, second, cross


def definitions(zoo, tensors, own=OWN):
    out = {}

    def one(name, value):
        out.setdefault(name, []).append(value)

    def gain_of(i):
        key = f"trained:{zoo.names[i]}"
        return tensors[f"base_loss.{key}"] - tensors[f"loss.{key}"]

    pairs = list(itertools.combinations(range(len(zoo)), 2))
    ordered = [(i, j, "a_by_b") for i, j in pairs] + [(j, i, "b_by_a") for i, j in pairs]
    for victim, partner, end in ordered:
        trained, base = f"trained:{zoo.names[victim]}", f"base:{own[victim]}"
        gain = gain_of(victim).mean()
        first, second, cross = effects(tensors, trained, victim, partner)
        one(f"first_order_trained_{end}", first)
        one(f"curvature_trained_{end}", second / 2)
        one(f"damage_trained_{end}", divided(first + second / 2, gain))
        one(f"curvature_share_trained_{end}", divided(second / 2, gain))
        self_second = effects(tensors, trained, victim, victim)[1]
        length = math.sqrt(self_second) * math.sqrt(second)
        one(f"fisher_cosine_trained_{end[0]}", divided(cross, length))
        parts = tensors[f"curvature.{trained}"][:, partner]
        one(f"curvature_top_module_trained_{end}", divided(parts.max(), parts.sum()))
        first, second, cross = effects(tensors, base, victim, partner)
        one(f"first_order_base_{end}", first)
        one(f"curvature_base_{end}", second / 2)
        one(f"damage_base_{end}", divided(first + second / 2 + cross, gain))
    for i, name in enumerate(zoo.names):
        key = f"trained:{name}"
        one("base_loss", tensors[f"base_loss.{key}"].mean())
        one("trained_loss", tensors[f"loss.{key}"].mean())
        gain = gain_of(i)
        one("gain", gain.mean())
        spread = sum((g - gain.mean()) ** 2 for g in gain) / (len(gain) - 1)
        one("gain_standard_error", math.sqrt(spread / len(gain)))
        first, second, _ = effects(tensors, key, i, i)
        one("self_first_order_trained", first)
        one("self_curvature_trained", second / 2)
    return out


def off(ours, want):
    """Names of columns that are not what is wanted."""
    return {n for n, v in want.items() if not np.allclose(ours[n], v, equal_nan=True, **CLOSE)}


def test_every_column_is_its_definition(setting):
    zoo, tensors, recorded = setting
    ours, want = columns(zoo, recorded), definitions(zoo, tensors)
    assert set(ours) == set(want)
    assert not off(ours, want)
    assert np.isnan(ours["damage_trained_b_by_a"][[3, 6, 8, 9]]).all()  # the zero adapter
    assert (ours["damage_trained_a_by_b"][[3, 6, 8, 9]] == 0).all()
    assert np.isnan(ours["fisher_cosine_trained_a"][3])


def test_each_fault_shows(setting):
    zoo, tensors, recorded = setting
    ours = columns(zoo, recorded)

    def changed(replace):
        """Columns that another reading of the tensors moves."""
        read = {key: tensors[replace(*key.split(".", 1))] for key in tensors}
        return {n.removesuffix("_a_by_b") for n in off(ours, definitions(zoo, read))}

    def exchanged(name, point):
        return f"{ {'phi_data': 'phi_model', 'phi_model': 'phi_data'}.get(name, name)}.{point}"

    def at_the_base(name, point):
        kind, of = point.split(":")
        domain = OWN[zoo.names.index(of)] if kind == "trained" else of
        return f"{name}.base:{domain}" if name.startswith("phi") else f"{name}.{point}"

    trained = {"first_order_trained", "curvature_trained", "damage_trained"}
    base = {"first_order_base", "curvature_base", "damage_base"}
    assert changed(exchanged) >= trained | base | {"fisher_cosine_trained_a"}
    assert changed(at_the_base) >= trained | {"self_first_order_trained"}
    assert not changed(at_the_base) & base
    single = {k: np.ones_like(v) if k.startswith("tokens.") else v for k, v in tensors.items()}
    of_tokens = {n.removesuffix("_a_by_b") for n in off(ours, definitions(zoo, single))}
    assert of_tokens >= {"curvature_trained", "damage_trained", "damage_base"}
    assert "first_order_trained" not in of_tokens
    for name in [n for n in ours if n.endswith("_a_by_b")]:
        assert off(ours, {name: ours[name.replace("_a_by_b", "_b_by_a")]}), name


def test_damage_is_that_of_a_loss_that_is_quadratic(tmp_path, rng):
    """Texts whose loss is quadratic in the weights, and whose Fisher is its second derivative."""
    zoo = make_zoo(tmp_path / "zoo", ["math-a", "math-b"])
    delta = rng.standard_normal((2, 6)) / 6  # what each adds to six weights
    scores, tokens = rng.standard_normal((4, 6)), np.array([3, 1, 2, 5])
    downhill = np.linalg.lstsq(delta, np.full(2, -10.0), rcond=None)[0]
    slopes = downhill + rng.standard_normal((4, 6)) / 10

    def loss(w):
        return 50 + slopes @ w + tokens * (scores @ w) ** 2 / 2

    tensors = {}
    for key, w in (
        ("base:math", 0 * delta[0]), ("trained:math-a", delta[0]), ("trained:math-b", delta[1]),
    ):  # fmt: skip
        gradient = slopes + (tokens * (scores @ w))[:, None] * scores
        tensors[f"phi_data.{key}"] = gradient @ delta.T
        tensors[f"phi_model.{key}"] = scores @ delta.T
        tensors[f"base_loss.{key}"], tensors[f"loss.{key}"] = loss(0 * w), loss(w)
        tensors[f"tokens.{key}"] = tokens
    make_points(tmp_path / "cal", zoo, ("math",) * 2, rng, sequences=4, tensors=tensors)
    ours = columns(zoo, Recorded(None, ("math",) * 2, open_points(tmp_path / "cal")))
    both, none = loss(delta.sum(axis=0)).mean(), loss(0 * delta[0]).mean()
    for end, w in (("a_by_b", delta[0]), ("b_by_a", delta[1])):
        gain = none - loss(w).mean()
        assert gain > 0
        for name in ("damage_trained", "damage_base"):
            found = ours[f"{name}_{end}"][0]
            assert found == pytest.approx((both - loss(w).mean()) / gain, abs=1e-9), name


def test_adapters_without_points_are_unknown_not_zero(tmp_path, rng):
    names = ["code", "law", "math-a", "math-b", "math-new"]
    zoo = make_zoo(tmp_path / "zoo", names)
    own = ("code", "law", "math", "math", "math")
    measured = [zoo[i] for i in (2, 0, 3, 1)]  # in another order than the zoo's
    make_points(
        tmp_path / "cal", measured, [own[i] for i in (2, 0, 3, 1)], rng, trained=["code", "math-a"]
    )
    ours = columns(zoo, Recorded(None, own, open_points(tmp_path / "cal")))
    pairs = list(itertools.combinations(names, 2))
    for name in ("first_order_trained", "curvature_trained", "first_order_base"):
        for end, victims in (("a_by_b", [a for a, _ in pairs]), ("b_by_a", [b for _, b in pairs])):
            known = [
                victim in ("code", "math-a") and "math-new" not in pair
                for victim, pair in zip(victims, pairs, strict=True)
            ]
            assert (~np.isnan(ours[f"{name}_{end}"])).tolist() == known
    points = open_points(tmp_path / "cal")
    column = points.adapters.index("math-b")
    first = points.phi("trained:code", "data")[:, column].mean()
    found = ours["first_order_trained_a_by_b"][pairs.index(("code", "math-b"))]
    assert found == pytest.approx(first, rel=1e-12)
    assert np.isnan(ours["base_loss"]).tolist() == [False, True, False, True, True]


def test_one_text_has_no_standard_error(tmp_path, rng):
    zoo = make_zoo(tmp_path / "zoo", ["code", "law"])
    texts = {"code": 1, "law": 1}
    tensors = draw(rng, zoo, ("code", "law"), texts)
    make_points(tmp_path / "cal", zoo, ("code", "law"), rng, sequences=1, tensors=tensors)
    ours = columns(zoo, Recorded(None, ("code", "law"), open_points(tmp_path / "cal")))
    for name, values in ours.items():
        assert np.isnan(values).all() == (name == "gain_standard_error"), name


def test_an_adapter_that_learned_nothing_has_no_share_to_lose(tmp_path, rng):
    zoo = make_zoo(tmp_path / "zoo", ["code", "law"])
    tensors = draw(rng, zoo, ("code", "law"))
    tensors["loss.trained:law"] = tensors["base_loss.trained:law"] + 0.1
    make_points(tmp_path / "cal", zoo, ("code", "law"), rng, sequences=TEXTS, tensors=tensors)
    ours = columns(zoo, Recorded(None, ("code", "law"), open_points(tmp_path / "cal")))
    for name in ("damage_trained", "damage_base", "curvature_share_trained"):
        assert np.isnan(ours[f"{name}_b_by_a"]).all() and np.isfinite(ours[f"{name}_a_by_b"]).all()
    assert ours["gain"][1] == pytest.approx(-0.1)


def test_points_of_another_adapter_or_domain_are_refused(tmp_path, rng, setting):
    zoo, _, recorded = setting
    retrained = make_zoo(tmp_path / "again", seed=70)
    with pytest.raises(InputError, match="not the adapter of that name") as caught:
        FAMILY.compute(retrained, recorded, 1)
    assert caught.value.key == "code"
    moved = Recorded(None, ("code", "math", *OWN[2:]), recorded.points)
    with pytest.raises(InputError, match="domain 'law', and is of 'math'") as caught:
        FAMILY.compute(zoo, moved, 1)
    assert caught.value.key == "trained:law"


def test_declarations_are_complete(setting):
    assert "--adapters" in FAMILY.missing(NOTHING)
    assert FAMILY.missing(setting[2]) is None
    names = [c.name for c in (*FAMILY.pairs, *FAMILY.adapters)]
    assert len(set(names)) == len(names)
    for c in FAMILY.pairs:
        assert c.definition and "{" not in c.title + c.definition
        assert c.directed_twin in names
        assert "trained" in c.name or "base" in c.name
