"""What must not change a merge: the order of adapters, the gauge. What must: every single scale."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import (
    METHODS,
    RAGGED,
    U32,
    WIDE,
    deltas,
    exact_sums,
    factor_bound,
    seed_from,
    singular_values,
    stack_sizes,
    stacked_ranks,
    zoo_of,
)

import mergeprobe_fast as mpf


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(tmp_path, rng, method):
    made = zoo_of(*RAGGED)(tmp_path, seed_from(rng))
    weights = np.array([1.0, -0.6, 0.3])
    rank = 4 if method == "svd" else None
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        zoo = mpf.open_zoo([made[i].path for i in order])
        results.append(mpf.merge(zoo, method, weights[order], rank))
    stacks, stacked = stack_sizes(made, weights), stacked_ranks(made)
    exact = exact_sums(made, weights)
    for modules in zip(*(r.modules for r in results), strict=True):
        name = modules[0].module.name
        sigma = singular_values(exact[name])
        if rank and sigma[rank - 1] < 1.01 * sigma[rank]:
            continue
        bound = factor_bound(np.linalg.norm(sigma), stacks[name], len(modules[0].a), stacked[name])
        first, *others = (m.b.astype(np.float64) @ m.a for m in modules)
        assert all(np.linalg.norm(other - first) <= 2 * bound for other in others), name


@pytest.mark.parametrize(
    "gauge",
    [
        pytest.param(lambda r, rng: np.diag(2.0 ** rng.integers(-6, 7, r)), id="powers of two"),
        pytest.param(lambda r, rng: np.linalg.qr(rng.standard_normal((r, r)))[0], id="rotation"),
        pytest.param(lambda r, rng: np.eye(r) + 0.2 * rng.standard_normal((r, r)), id="general"),
        pytest.param(lambda r, rng: np.eye(r) * 2.0**40, id="A large, B small"),
        pytest.param(lambda r, rng: np.eye(r) * 2.0**-40, id="A small, B large"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_gauge_does_not_matter(tmp_path, rng, method, gauge):
    made = zoo_of(*[{"modules": WIDE}] * 3)(tmp_path, seed_from(rng))
    factors = {}
    for name, m in made[1].modules.items():
        turn = gauge(len(m.a), rng)
        factors[name] = turn @ m.a, m.b @ np.linalg.inv(turn)
    turned = make_adapter(tmp_path / "turned", modules=WIDE, factors=factors)
    rank = 4 if method == "svd" else None
    before, after = (
        mpf.merge(mpf.open_zoo([made[0].path, second.path, made[2].path]), method, rank=rank)
        for second in (made[1], turned)
    )
    weights = (1 / 3,) * 3
    exact = exact_sums(made, weights)
    for one, two in zip(before.modules, after.modules, strict=True):
        name = one.module.name
        sigma = singular_values(exact[name])
        if rank and sigma[rank - 1] < 1.01 * sigma[rank]:
            continue
        # The turned factors were rounded to float32; in a gap of 1% that counts 200 times.
        a, b = (np.abs(f) for f in (turned.modules[name].a, turned.modules[name].b))
        written = 2 * U32 * made[1].modules[name].scale / 3 * np.linalg.norm(b @ a)
        kept = len(one.a)
        gap = 2 * sigma[kept - 1] / (sigma[kept - 1] - sigma[kept]) if rank else 0.0
        norm = float(np.linalg.norm(sigma))
        bound = 2 * factor_bound(norm, norm, kept, 12) + (1 + gap) * written
        if method == "cat":
            bound += 8 * U32 * stack_sizes(made, weights)[name]
        difference = one.b.astype(np.float64) @ one.a - two.b.astype(np.float64) @ two.a
        assert np.linalg.norm(difference) <= bound, name


@pytest.mark.parametrize("wrong", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_scale_on_one_adapter_shows(tmp_path, rng, method, wrong):
    """The bounds above would see a scale that is off by one part in a thousand."""
    recipes = [dict(RAGGED[0]), dict(RAGGED[1]), {"modules": WIDE, "rank": 4, "alpha": 16}]
    made = zoo_of(*recipes)(tmp_path, seed_from(rng))
    config = made[wrong].path / "adapter_config.json"
    right = made[wrong].config["lora_alpha"]
    text = config.read_text().replace(f'"lora_alpha": {right}', f'"lora_alpha": {right * 1.001}')
    config.write_text(text)
    weights = (0.7, 0.2, 1.5)
    mpf.merge(mpf.open_zoo([m.path for m in made]), method, weights, 40 if method == "svd" else None
              ).save(tmp_path / "out")  # fmt: skip
    exact, written = exact_sums(made, weights), deltas(tmp_path / "out")
    stacks, stacked = stack_sizes(made, weights), stacked_ranks(made)
    for name, truth in exact.items():
        error = np.linalg.norm(written[name] - truth)
        planted = 0.001 * weights[wrong] * np.linalg.norm(made[wrong].modules[name].delta)
        bound = factor_bound(np.linalg.norm(truth), stacks[name], stacked[name], stacked[name])
        assert error == pytest.approx(planted, rel=0.05), name
        assert error > 10 * bound, name
