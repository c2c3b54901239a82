"""Router files, and what a router does with inputs, against loops over tokens and adapters."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from made_routers import made_router, router_of

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import router_file, safetensors
from mergeprobe_fast.io.router_file import ROUTER_NAME, ROUTER_TENSORS, load_router, write_router


@pytest.fixture
def written(tmp_path, rng):
    info, tensors = made_router(rng)
    write_router(tmp_path, info, tensors)
    return tmp_path, info, tensors


def rewrite(folder, change):
    """Change the parsed JSON of a written router."""
    path = folder / ROUTER_NAME
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_what_was_written_is_read(written):
    folder, info, tensors = written
    found = load_router(folder)
    assert found.info == info and list(found.info.adapters) == list(info.adapters)
    assert found.adapters == ("a", "b", "c") and found.modules == ("m.0", "m.1")
    for module in found.modules:
        np.testing.assert_array_equal(found.prototypes(module), tensors[f"prototype.{module}"])
    assert found.needed() == ("m.0",) and found.needed("arrow") == found.modules


def test_names_may_have_spaces_and_any_letters(tmp_path, rng):
    names = ("täst «1»", "数学 a/b", "it's \"c\"")
    info, tensors = made_router(rng, names)
    write_router(tmp_path, info, tensors)
    assert load_router(tmp_path).info == info


def test_the_same_router_gives_the_same_bytes(tmp_path, rng):
    info, tensors = made_router(rng)
    for name, order in (("one", 1), ("two", -1)):
        (tmp_path / name).mkdir()
        write_router(tmp_path / name, info, dict(list(tensors.items())[::order]))
    for file in (ROUTER_NAME, ROUTER_TENSORS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_router_without_modules_is_read_and_cannot_choose(tmp_path, rng):
    info, _ = made_router(rng, linear=False)
    write_router(tmp_path, replace(info, modules={}), {})
    with pytest.raises(InputError, match="has no prototypes: no linear module is adapted"):
        load_router(tmp_path).choose({})


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("format",), "other", "format: is not 'mergeprobe-router'"),
        (("version",), 2, "version: is 2, this program reads 1"),
        (("more",), 1, "more: is not a field of this format"),
        (("rule",), "best", "rule: is no rule of this router"),
        (("linear",), None, "rule: is no rule of this router"),
        (("top_k",), 0, "top_k: is not an integer from 1"),
        (("temperature",), 0, "temperature: is not positive"),
        (("temperature",), "hot", "temperature: is not a finite number"),
        (("skip_first",), -1, "skip_first: is not an integer from 0"),
        (("accuracy", "arrow"), 1.5, "accuracy.arrow: is not from 0 to 1"),
        (("accuracy", "best"), 0.5, "accuracy.best: was not measured"),
        (("adapters",), {}, "adapters: is empty"),
        (("adapters", "a"), "0", "adapters.a: is not 64 hexadecimal digits"),
        (("modules", "m.0"), 8, "prototype.m.0: is F32 (3, 7), not F32 (3, 8)"),
        (("modules", "m.2"), 7, "prototype.m.2: is missing"),
        (("linear", "adapters"), ["a", "b", "z"], "are not adapters of this router, each once"),
        (("linear", "adapters"), ["a", "b", "b"], "are not adapters of this router, each once"),
        (("linear", "domains"), {"x": "z"}, "name an adapter that is none of linear.adapters"),
        (("linear", "more"), 1, "linear.more: is not a field of this format"),
        (("linear", "d_in"), 6, "request.weight: is F64 (3, 7), not F64 (3, 6)"),
        (("tensors_sha256",), "0" * 64, "is not the file that router.json was written with"),
    ],
)
def test_a_bad_field_is_named(written, path, value, reason):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    rewrite(written[0], change)
    with pytest.raises(InputError) as caught:
        load_router(written[0])
    assert reason in str(caught.value) and caught.value.path.startswith(os.fspath(written[0]))


@pytest.mark.parametrize("name", [ROUTER_NAME, ROUTER_TENSORS])
def test_a_missing_file_is_named(written, name):
    (written[0] / name).unlink()
    with pytest.raises(InputError, match=name):
        load_router(written[0])


def test_one_changed_byte_of_a_tensor_is_found(written):
    path = written[0] / ROUTER_TENSORS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(InputError, match=r"is not the file that router\.json was"):
        load_router(written[0])


@pytest.mark.parametrize(
    ("key", "values", "reason"),
    [
        ("prototype.m.0", lambda t: t * 1.01, "has a row that is no unit vector"),
        ("prototype.m.0", lambda t: t * np.float32(np.nan), "has NaN or Inf"),
        ("request.bias", lambda t: t + np.inf, "has NaN or Inf"),
        ("prototype.m.0", None, "is missing"),
        ("prototype.m.9", lambda t: np.ones((3, 7), np.float32), "is not a tensor of this router"),
    ],
)
def test_bad_numbers_are_neither_written_nor_read(tmp_path, rng, monkeypatch, key, values, reason):
    info, tensors = made_router(rng)
    if values is None:
        del tensors[key]
    else:
        with np.errstate(invalid="ignore"):
            tensors[key] = np.asarray(values(tensors.get(key)))
    with pytest.raises(InputError, match=reason):
        write_router(tmp_path, info, tensors)
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as without:
        without.setattr(router_file, "_check", lambda *_: None)
        write_router(tmp_path, info, tensors)
    with pytest.raises(InputError, match=reason):
        load_router(tmp_path)


def test_a_tensor_that_nobody_declared_is_refused(written):
    folder, _, tensors = written
    safetensors.write(folder / ROUTER_TENSORS, {**tensors, "other": np.ones(3)})
    with pytest.raises(InputError, match="other: is not a tensor of this router"):
        load_router(folder)


def test_scores_weights_and_votes_are_their_definitions(rng):
    info, tensors = made_router(rng, "abcde", {"m": 6}, top_k=3, missing=[("m", 2)], linear=False)
    router, x = router_of(info, tensors), rng.standard_normal((17, 6))
    scores, weights, votes = (getattr(router, n)("m", x) for n in ("scores", "weights", "votes"))
    rows = tensors["prototype.m"].astype(np.float64)
    for t in range(len(x)):
        expected = [abs(sum(v * w for v, w in zip(row, x[t], strict=True))) for row in rows]
        np.testing.assert_allclose(scores[t], expected, rtol=0, atol=1e-14)
        best = sorted((e for e in range(5) if e != 2), key=lambda e: -expected[e])[:3]
        total = sum(np.exp(expected[e] / 0.5) for e in best)
        shares = [np.exp(expected[e] / 0.5) / total if e in best else 0.0 for e in range(5)]
        np.testing.assert_allclose(weights[t], shares, rtol=1e-12, atol=0)
        assert votes[t].tolist() == [float(e == best[0]) for e in range(5)]
    assert not weights[:, 2].any() and not votes[:, 2].any()


def test_a_module_that_no_adapter_has_gives_no_weight(rng):
    info, tensors = made_router(rng, missing=[("m.1", e) for e in range(3)], linear=False)
    router, x = router_of(info, tensors), rng.standard_normal((4, 5))
    assert not router.weights("m.1", x).any() and not router.votes("m.1", x).any()


def test_signs_of_prototypes_do_not_matter_and_equal_scores_go_to_the_first(rng):
    info, tensors = made_router(rng, linear=False)
    x = {name: rng.standard_normal((5, d)) for name, d in info.modules.items()}
    turned = {key: -value for key, value in tensors.items()}
    assert router_of(info, tensors).choose(x) == router_of(info, turned).choose(x)
    same = {key: np.repeat(value[:1], 3, axis=0) for key, value in tensors.items()}
    choice = router_of(info, same).choose(x)
    assert choice.adapter == "a" and list(choice.scores.values()) == [1.0, 0.0, 0.0]


def test_a_choice_is_that_of_the_tokens_after_the_first(rng):
    info, tensors = made_router(rng)
    router = router_of(info, tensors)
    x = {name: rng.standard_normal((6, d)) for name, d in info.modules.items()}
    votes = np.mean([router.votes(m, x[m][1:]).mean(axis=0) for m in x], axis=0)
    assert list(router.choose(x, "arrow").scores.values()) == votes.tolist()
    massive = {name: np.vstack([1e4 * values[:1], values[1:]]) for name, values in x.items()}
    for rule in ("arrow", "linear"):
        assert router.choose(massive, rule) == router.choose(x, rule)
    linear = tensors["request.weight"] @ x["m.0"][1:].mean(axis=0) + tensors["request.bias"]
    chosen = router.choose(x)
    assert chosen.rule == "linear" and chosen.adapter == "abc"[linear.argmax()]
    np.testing.assert_allclose(list(chosen.scores.values()), linear, rtol=1e-12)
    only = {name: values[:1] for name, values in x.items()}  # there are no others
    expected = tensors["request.weight"] @ x["m.0"][0] + tensors["request.bias"]
    np.testing.assert_allclose(list(router.choose(only).scores.values()), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("inputs", "rule", "reason"),
    [
        ({}, "linear", "m.0: inputs are missing"),
        ({}, "arrow", "no inputs of a module with prototypes"),
        ({"m.0": np.ones((2, 6))}, None, r"m.0: expected inputs \(tokens, 7\), got \(2, 6\)"),
        ({"m.0": np.ones((0, 7))}, "arrow", r"m.0: expected inputs \(tokens, 7\), got \(0, 7\)"),
        ({"m.0": np.full((2, 7), np.nan)}, None, "m.0: inputs have NaN or Inf"),
        ({"m.0": np.ones((2, 7))}, "best", "has no rule 'best', only arrow, linear"),
    ],
)
def test_inputs_that_cannot_be_routed_are_refused(rng, inputs, rule, reason):
    with pytest.raises(InputError, match=reason):
        router_of(*made_router(rng)).choose(inputs, rule)
    arrow = router_of(*made_router(rng, linear=False))
    with pytest.raises(InputError, match="has no rule 'linear', only arrow"):
        arrow.choose(inputs, "linear")
    with pytest.raises(InputError, match=r"m\.7: has no prototypes of this module"):
        arrow.scores("m.7", np.ones((2, 7)))
