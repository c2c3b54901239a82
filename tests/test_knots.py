"""KnOTS against an SVD of the materialised concatenation [W_1 W_2 ...]."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import WIDE, assert_peft_agrees, merge_json, subset, truncated
from small_cores import (
    CASES,
    delta,
    every_case,
    merged_deltas,
    rounding,
    true_deltas,
    two_gauges,
)
from tolerances import TOLERANCES

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.disjoint import disjoint_mean
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import stream

BASIS = TOLERANCES["basis"].value


def basis_and_blocks(deltas: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """U and the blocks S V_i = U^T W_i of the thin SVD, at the numerical rank.

    The block of a zero delta is then exactly zero; read off V it is 1e-17, and counts as agreeing.
    """
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    u = u[:, s > 1e-6 * s.max(initial=0)]
    read_off = np.split(s[: u.shape[1], None] * vt[: u.shape[1]], len(deltas), axis=1)
    blocks = [u.T @ x for x in deltas]
    assert np.allclose(blocks, read_off, rtol=0, atol=1e-12 * s.max(initial=0))
    return u, blocks


def largest(x: np.ndarray, share: float, more: int = 0) -> np.ndarray:
    """The int(share * size) largest entries; KnOTS' kthvalue keeps one ``more``."""
    count = int(share * x.size) + more
    limit = np.sort(np.abs(x), axis=None)[::-1][count - 1] if count else np.inf
    return np.where(np.abs(x) >= limit, x, 0.0)


def elected_mean(tasks, weights) -> np.ndarray:
    total = sum(tasks)
    sign = np.sign(total) * (np.abs(total) > 1e-6 * sum(map(np.abs, tasks)))
    above, count = np.zeros_like(total), np.zeros(total.shape, int)
    for x, w in zip(tasks, weights, strict=True):
        agree = np.where(sign > 0, x > 0, (x < 0) & (sign < 0))
        above += w * x * agree
        count += agree
    return above / np.maximum(count, 1)


def resolved(deltas: list[np.ndarray]) -> float:
    """How far float64 may turn a basis vector: eps kappa over the smallest relative gap."""
    s = np.linalg.svd(np.concatenate(deltas, axis=1), compute_uv=False)
    s = s[s > 1e-6 * s.max(initial=0)]
    gap = float(np.min(-np.diff(s), initial=s[0] if len(s) else 1.0)) if len(s) > 1 else 1.0
    return 1e-13 * float(s[0]) / max(gap, 1e-300) if len(s) > 1 else 0.0


@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 2.0), (1.0, 0.0, 1.0)])
@every_case
def test_knots_ties_is_its_definition(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    shares = rng.uniform(0.1, 0.9, 3)
    got = merged_deltas(made, "knots", weights=weights, density=list(shares))
    w = weights or (1.0, 1.0, 1.0)
    for name, deltas in true_deltas(made).items():
        size = max(map(np.linalg.norm, deltas))
        deltas = [d if np.linalg.norm(d) > 1e-12 * size else 0 * d for d in deltas]
        u, blocks = basis_and_blocks(deltas)
        trimmed = [largest(x, share) for x, share in zip(blocks, shares, strict=True)]
        want = u @ elected_mean(trimmed, w)
        assert resolved(deltas) < 1e-8
        bound = rounding(want, deltas, w) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound, name
        if min(want.shape) > 20 and len([d for d in deltas if d.any()]) > 1:
            early = u @ elected_mean([x * y for x, y in zip(w, trimmed, strict=True)], (1, 1, 1))
            whole = u @ elected_mean(blocks, w)
            wrong = [whole] if min(w) >= 0 and len(set(w)) == 1 else [whole, early]
            for other in wrong:  # where few entries meet, they may all agree
                if np.linalg.norm(other - want) > 1e-3 * np.linalg.norm(want):
                    assert np.linalg.norm(delta(got[name]) - other) > 10 * bound


def test_the_published_code_keeps_one_entry_more(tmp_path, rng):
    """kthvalue(size - count) keeps count + 1 entries; all else is the same for one module."""
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    less, differs = merged_deltas(made, "knots", density=0.3), 0
    for name, deltas in true_deltas(made).items():
        u, blocks = basis_and_blocks(deltas)
        size = blocks[0].size
        theirs = u @ elected_mean([largest(x, 0.3, more=1) for x in blocks], (1, 1, 1))
        allowed = rounding(theirs, deltas, (1, 1, 1)) + BASIS * np.linalg.norm(theirs)
        same = merged_deltas(made, "knots", density=(int(0.3 * size) + 1.5) / size)[name]
        assert np.linalg.norm(delta(same) - theirs) <= allowed
        differs += np.linalg.norm(delta(less[name]) - theirs) > 10 * allowed
    assert differs, "the entry more may be outvoted in some module, not in all"


@pytest.mark.parametrize("case", ["ragged ranks and rsLoRA", "modules missing"])
def test_signs_of_the_basis_cancel(tmp_path, rng, case):
    made = CASES[case](tmp_path, rng)
    for deltas in true_deltas(made).values():
        u, blocks = basis_and_blocks(deltas)
        flips = rng.choice([-1.0, 1.0], u.shape[1])
        flipped = [flips[:, None] * x for x in blocks]
        one = u @ disjoint_mean([largest(x, 0.3) for x in blocks], np.ones(3))
        two = (u * flips) @ disjoint_mean([largest(x, 0.3) for x in flipped], np.ones(3))
        assert np.linalg.norm(one - two) <= 1e-12 * np.linalg.norm(one)


def test_opposite_updates_cancel(tmp_path, rng):
    """PEFT would elect + and KnOTS the majority: either shows the arbitrary signs of the basis."""
    (one,), (other,) = two_gauges(tmp_path, rng, ranks=(4,))
    negated = {name: (m.a, -m.b) for name, m in other.modules.items()}
    two = make_adapter(tmp_path / "negated", subset(*negated, of=WIDE), factors=negated)
    got = merged_deltas([one, two], "knots", density=1.0)
    for name, deltas in true_deltas([one, two]).items():
        assert np.linalg.norm(delta(got[name])) <= 1e-6 * np.linalg.norm(deltas[0])


def test_dare_ties_drops_by_a_hash_of_the_position(tmp_path, rng):
    made = CASES["modules missing"](tmp_path, rng)
    seed = int(rng.integers(1 << 60))
    got = merged_deltas(made, "knots", rule="dare_ties", density=0.6, seed=seed)
    for name, deltas in true_deltas(made).items():
        u, blocks = basis_and_blocks(deltas)
        position = np.arange(blocks[0].size, dtype=np.uint64).reshape(blocks[0].shape)
        dropped = []
        for block, adapter in zip(blocks, "abc", strict=True):
            chance = counter_hash(seed, stream(name, adapter), position) / 2.0**32
            dropped.append(np.where(chance < 0.6, block / 0.6, 0.0))
        # The hash goes by position, so that here the signs alone are free.
        want = u @ elected_mean(dropped, (1, 1, 1))
        bound = rounding(want, deltas, (1, 1, 1)) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound
        whole = u @ elected_mean(blocks, (1, 1, 1))
        assert np.linalg.norm(delta(got[name]) - whole) > 100 * bound


@pytest.mark.parametrize("rule", ["ties", "dare_ties"])
def test_neither_the_gauge_nor_the_order_matters(tmp_path, rng, rule):
    made, other = two_gauges(tmp_path, rng)
    w = [2.0, -1.0, 0.7]
    first = merged_deltas(made, "knots", weights=w, rule=rule, density=0.4)
    second = merged_deltas(other, "knots", weights=w, rule=rule, density=0.4)
    third = merged_deltas(made[::-1], "knots", weights=w[::-1], rule=rule, density=0.4)
    for name, deltas in true_deltas(made).items():
        bound = 2 * rounding(delta(first[name]), deltas, w)
        bound += BASIS * np.linalg.norm(delta(first[name]))
        assert np.linalg.norm(delta(first[name]) - delta(second[name])) <= bound
        assert np.linalg.norm(delta(first[name]) - delta(third[name])) <= bound


def test_one_adapter_that_keeps_all_is_itself_and_none_is_zero(tmp_path, rng):
    made = CASES["rank deficient"](tmp_path, rng)[:1]
    every = merged_deltas(made, "knots", density=1.0, weights=[-0.5])
    none = merged_deltas(made, "knots", density=0.0)
    for name, (one,) in true_deltas(made).items():
        assert np.linalg.norm(delta(every[name]) + 0.5 * one) <= rounding(one, [one], [1])
        assert not delta(none[name]).any()


def test_threads_do_not_change_a_byte(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    one, two = (merged_deltas(made, "knots", threads=n) for n in (1, 3))
    for name in one:
        assert one[name].a.tobytes() == two[name].a.tobytes()
        assert one[name].b.tobytes() == two[name].b.tobytes()


def test_the_result_is_truncated_saved_and_read_by_peft(tmp_path, rng):
    made = CASES["modules missing"](tmp_path, rng)
    zoo = mpf.open_zoo([a.path for a in made])
    cut = mpf.merge(zoo, "knots", rank=2)
    for one, two in zip(mpf.merge(zoo, "knots").modules, cut.modules, strict=True):
        want = truncated(delta(one), 2)
        assert np.linalg.norm(delta(two) - want) <= 1e-4 * np.linalg.norm(want)
    cut.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    assert merge_json(tmp_path / "out")["arguments"]["density"] == 0.2
    assert mpf.MERGE_METHODS["knots"].summary
    for options in ({"rule": "mean"}, {"density": -0.1}, {"seed": 0.5}):
        with pytest.raises(InputError, match="must be"):
            mpf.merge(zoo, "knots", **options)
