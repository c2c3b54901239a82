"""What adapters do to the loss: against finite differences of dense models in float64."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import MadeAdapter, make_adapter
from tiny_bases import draw_sequences, load, make_base, make_tokenizer, widened, write_ids
from tolerances import bound

from mergeprobe_fast.io.points import open_points
from mergeprobe_fast.record import calibrate, gradients, stacks

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
DOWN2, HEAD = "model.layers.2.mlp.down_proj", "lm_head"
SIZES = {Q0: (16, 16, 2), V1: (8, 16, 3), DOWN2: (16, 24, 1), HEAD: (48, 16, 2)}
LENGTHS = {"math": (9, 4), "code": (7, 3, 11)}
DOMAINS = {"math-a": "math", "math-b": "math", "code.x": "code"}
KEYS = ["base:code", "base:math", "trained:code.x", "trained:math-a", "trained:math-b"]
STEP = 1e-3


@dataclass
class Case:
    """A float64 model, its zoo as dense deltas, and the sequences of each domain."""

    model: Any
    zoo: Path
    adapters: dict[str, MadeAdapter]
    data: dict[str, Path]
    ids: dict[str, list[np.ndarray]]
    first: dict[str, list[int]]  # the first token that is a label


@pytest.fixture
def case(tmp_path: Path, rng: np.random.Generator) -> Case:
    model = widened(make_base(tmp_path / "base"))
    seed, zoo = int(rng.integers(1000)), tmp_path / "zoo"
    small = {"magnitude": 0.2, "base_model": "made/tiny"}
    adapters = {
        "math-a": make_adapter(zoo / "math-a", SIZES, seed=seed, alpha=3, **small),
        "math-b": make_adapter(
            zoo / "math-b", {k: SIZES[k] for k in (V1, DOWN2)}, seed=seed + 1, rank=4,
            dtype="BF16", rslora=True, **small,
        ),
        "code.x": make_adapter(
            zoo / "code.x", {k: SIZES[k] for k in (DOWN2, Q0)}, seed=seed + 2, dtype="F16", **small
        ),
    }  # fmt: skip
    ids = {name: draw_sequences(rng, lengths) for name, lengths in LENGTHS.items()}
    ids = {name: [np.minimum(x, 45) for x in rows] for name, rows in ids.items()}
    prompts = [2, 1, 6]
    lines = [
        {"prompt": " ".join(f"w{i}" for i in x[:p]), "completion": _words(x[p:])}
        for x, p in zip(ids["code"], prompts, strict=True)
    ]
    data = {"math": write_ids(tmp_path / "m.jsonl", ids["math"]), "code": tmp_path / "c.jsonl"}
    data["code"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = {"math": [1, 1], "code": [max(p, 1) for p in prompts]}
    return Case(model, zoo, adapters, data, ids, first)


def _words(ids: np.ndarray) -> str:
    return "".join(f" w{i}" for i in ids)


def measure(case: Case, out: Path, base: Any = None, **arguments: Any):
    given = {"threads": 1, "tokenizer": make_tokenizer(), "adapters": case.zoo} | arguments
    calibrate(case.model if base is None else base, case.data, out, **given)
    return open_points(out)


def mean_loss(model: Any, ids: np.ndarray, first: int, labels: np.ndarray) -> float:
    """Mean of -log p(label) of the labels behind the tokens from ``first - 1`` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    logits = logits[first - 1 : len(ids) - 1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= logits.max(1, keepdims=True)
    return -float(np.mean([log_p[t, label] for t, label in enumerate(labels)]))


class Moved:
    """Context manager: dense deltas on the weights of a model."""

    def __init__(self, model: Any, *moves: tuple[float, MadeAdapter, str | None]) -> None:
        self.model, self.moves = model, moves

    def __enter__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        for factor, adapter, only in self.moves:
            for name, m in adapter.modules.items():
                if only in (None, name):
                    weight = self.model.get_submodule(name).weight
                    self.before.setdefault(name, weight.data.clone())
                    weight.data += factor * torch.from_numpy(m.delta)

    def __exit__(self, *_: object) -> None:
        for name, weight in self.before.items():
            self.model.get_submodule(name).weight.data.copy_(weight)


def slope(
    case: Case, victim: MadeAdapter | None, along: MadeAdapter, only: str | None, *loss: Any
) -> float:
    """dLoss/d(eps) of the dense weights W0 + W_victim + eps W_along: fourth order in the step."""
    own = [] if victim is None else [(1.0, victim, None)]

    def at(step: float) -> float:
        with Moved(case.model, *own, (step, along, only)):
            return mean_loss(case.model, *loss)

    return (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)


def test_phi_is_the_derivative_of_the_loss(tmp_path, case, monkeypatch):
    """At every point, of every text, along every adapter (its own too), and of every module."""
    drawn: list[np.ndarray] = []
    draw = gradients._draw

    def noted(log_p, seed):
        labels = draw(log_p, seed)
        drawn.append(labels[:, 0].numpy())
        return labels

    monkeypatch.setattr(gradients, "_draw", noted)
    points = measure(case, tmp_path / "cal")
    assert sorted(points.points) == KEYS and points.adapters == ("code.x", "math-a", "math-b")
    assert points.modules == (HEAD, Q0, V1, DOWN2)
    allowed = bound("slope")
    labels_of = iter(drawn)
    for key, point in points.points.items():
        victim = None if point.adapter is None else case.adapters[point.adapter]
        ids, first = case.ids[point.domain], case.first[point.domain]
        parts = np.zeros((2, len(ids), 4, 3))
        phi = {kind: points.phi(key, kind) for kind in ("data", "model")}
        tokens = points.losses(key)[2]
        for s, x in enumerate(ids):
            labels = {"data": x[first[s] :], "model": next(labels_of)}
            assert len(labels["model"]) == len(labels["data"]) == tokens[s]
            for j, name in enumerate(points.adapters):
                for k, kind in enumerate(phi):
                    loss = x, first[s], labels[kind]
                    along = case.adapters[name]
                    whole = slope(case, victim, along, None, *loss)
                    assert abs(phi[kind][s, j] - whole) <= allowed, (key, kind, s, name)
                    for m, module in enumerate(points.modules):
                        parts[k, s, m, j] = slope(case, victim, along, module, *loss)
        np.testing.assert_allclose(points.first(key), parts[0].mean(0), rtol=0, atol=allowed)
        curvature = (tokens[:, None, None] * parts[1] ** 2).mean(0)
        size = 2 * np.abs(parts[1]).max() * tokens.max()
        np.testing.assert_allclose(points.curvature(key), curvature, rtol=0, atol=allowed * size)
        # What must not pass: labels, texts, adapters exchanged, the victim left out.
        for wrong in (phi["model"], np.roll(phi["data"], 1, 0), np.roll(phi["data"], 1, 1)):
            assert np.abs(wrong - phi["data"]).max() > 100 * allowed
    moved = points.phi("trained:math-a", "data") - points.phi("base:math", "data")
    assert np.abs(moved).max() > 100 * allowed
    assert next(labels_of, None) is None


def test_losses_are_those_of_transformers(tmp_path, case):
    points = measure(case, tmp_path / "cal")
    for key, point in points.points.items():
        base, here, tokens = points.losses(key)
        victim = [] if point.adapter is None else [(1.0, case.adapters[point.adapter], None)]
        for s, ids in enumerate(case.ids[point.domain]):
            labels = ids.copy()
            labels[: case.first[point.domain][s]] = -100
            tensors = torch.from_numpy(ids)[None], torch.from_numpy(labels)[None]
            batch = dict(zip(("input_ids", "labels"), tensors, strict=True))
            with torch.no_grad():
                expected = float(case.model(**batch).loss)
                with Moved(case.model, *victim):
                    trained = float(case.model(**batch).loss)
            assert abs(base[s] - expected) <= 1e-6 * expected  # theirs sums in float32
            assert abs(here[s] - trained) <= 1e-6 * trained
            assert tokens[s] == (labels[1:] != -100).sum()
        if point.adapter is not None:
            assert (base != here).all()


def test_losses_are_those_of_peft(tmp_path, case):
    from peft import PeftModel

    points = measure(case, tmp_path / "cal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what it calls outdated
        adapted = PeftModel.from_pretrained(case.model, case.zoo / "math-b").double()
    for s, ids in enumerate(case.ids["math"]):
        expected = mean_loss(adapted, ids, 1, ids[1:])
        assert abs(points.losses("trained:math-b")[1][s] - expected) <= 1e-6 * expected


def test_an_adapter_that_does_nothing_is_the_base(tmp_path, case):
    make_adapter(case.zoo / "math-b", SIZES, zero_b=True, base_model="made/tiny")
    points = measure(case, tmp_path / "cal")
    zero, base = "trained:math-b", "base:math"
    for kind in ("data", "model"):
        np.testing.assert_array_equal(points.phi(zero, kind), points.phi(base, kind))
        assert (points.phi(base, kind)[:, 2] == 0).all()
    for name in ("first", "curvature"):
        np.testing.assert_array_equal(getattr(points, name)(zero), getattr(points, name)(base))
    for one, other in zip(points.losses(zero), points.losses(base), strict=True):
        np.testing.assert_array_equal(one, other)


def test_factors_in_another_gauge_say_the_same(tmp_path, rng, case):
    plain = measure(case, tmp_path / "a")
    for name, made in case.adapters.items():
        sizes = {k: (len(m.b), m.a.shape[1], len(m.a)) for k, m in made.modules.items()}
        factors = {}
        for k, m in made.modules.items():
            r = len(m.a)
            change = np.linalg.qr(rng.standard_normal((r, r)))[0] * rng.uniform(0.5, 2, r)
            factors[k] = change @ m.a, m.scale * m.b @ np.linalg.inv(change)
        ranks = {k: r for k, (_, _, r) in sizes.items()}
        make_adapter(case.zoo / name, sizes, factors=factors, alphas=ranks, base_model="made/tiny")
    moved = measure(case, tmp_path / "b")
    for key in KEYS:
        for kind in ("data", "model"):
            one, other = plain.phi(key, kind), moved.phi(key, kind)
            np.testing.assert_allclose(one, other, rtol=0, atol=bound("gauge") * np.abs(one).max())


def test_the_same_bytes_for_any_thread_count_and_budget(tmp_path, case, monkeypatch):
    def files(name: str) -> list[bytes]:
        found = ("points.json", "points.safetensors", "math.safetensors", "calibration.json")
        return [(tmp_path / name / file).read_bytes() for file in found]

    for threads in (1, 2, 3):
        measure(case, tmp_path / str(threads), threads=threads, gradients=True, labels="both")
    measure(case, tmp_path / "folder", tmp_path / "base")
    monkeypatch.setattr(stacks, "BUDGET", 0)
    measure(case, tmp_path / "read", threads=2, gradients=True, labels="both")
    assert files("1") == files("2") == files("3") == files("read")
    measure(case, tmp_path / "object", load(tmp_path / "base", torch.float32))
    assert files("folder")[1:3] == files("object")[1:3]


def test_only_some_texts_or_adapters_change_nothing_else(tmp_path, case):
    points = measure(case, tmp_path / "all")
    one = measure(case, tmp_path / "one", adapters=[case.zoo / "code.x"])
    for key in ("base:math", "base:code", "trained:code.x"):
        np.testing.assert_allclose(one.phi(key, "model")[:, 0], points.phi(key, "model")[:, 0],
                                   rtol=1e-12)  # fmt: skip
    chosen = {"math-a": "code", "math-b": "math", "code.x": "code"}
    given = measure(case, tmp_path / "given", domains=chosen)
    assert given.points["trained:math-a"].domain == "code"
    assert given.points["trained:math-a"].sequences == 3


def test_half_precision_is_near(tmp_path, case):
    """bfloat16 has 8 bits: a few percent of the largest."""
    points = measure(case, tmp_path / "wide", tmp_path / "base")
    narrow = measure(case, tmp_path / "narrow", tmp_path / "base", dtype="bfloat16")
    for key in KEYS:
        one, other = points.phi(key, "data"), narrow.phi(key, "data")
        assert 0 < np.abs(one - other).max() < 0.2 * np.abs(one).max()


def test_weights_the_other_way_round_and_biases(tmp_path, rng):
    """GPT-2's Conv1D stores (in, out); its adapters say fan_in_fan_out."""
    model = make_base(tmp_path / "base", "GPT2").double()
    names = {"transformer.h.0.attn.c_attn": (48, 16, 2), "transformer.h.1.mlp.c_proj": (16, 64, 3)}
    adapters = {
        n: make_adapter(tmp_path / "zoo" / n, names, seed=i, fan_in_fan_out=True, magnitude=0.2)
        for i, n in enumerate(("math-a", "math-b"))
    }
    ids = draw_sequences(rng, (6, 9))
    data = {"math": write_ids(tmp_path / "d.jsonl", ids)}
    calibrate(model, data, tmp_path / "cal", adapters=tmp_path / "zoo")
    points = open_points(tmp_path / "cal")

    def losses(**factors: float) -> np.ndarray:
        before = {k: model.get_submodule(k).weight.data.clone() for k in names}
        for name, factor in factors.items():
            for k, m in adapters[name].modules.items():
                model.get_submodule(k).weight.data += factor * torch.from_numpy(m.delta.T)
        found = np.array([mean_loss(model, x, 1, x[1:]) for x in ids])
        for k, weight in before.items():
            model.get_submodule(k).weight.data.copy_(weight)
        return found

    np.testing.assert_allclose(points.losses("trained:math-a")[1], losses(**{"math-a": 1}), 1e-12)
    for j, name in enumerate(points.adapters):
        moves = [{"math-a": 1.0} | {name: (name == "math-a") + k * STEP} for k in (-2, -1, 1, 2)]
        low, down, up, high = (losses(**move) for move in moves)
        slopes = (8 * (up - down) - (high - low)) / (12 * STEP)
        phi = points.phi("trained:math-a", "data")
        np.testing.assert_allclose(phi[:, j], slopes, rtol=0, atol=bound("slope"))
        assert np.abs(phi[:, 1 - j] - slopes).max() > 100 * bound("slope")
