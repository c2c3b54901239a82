"""The declared sizes of the benchmark: complete, consistent, without leaks, and never by chance."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.tasks.build import DOMAINS, TASKS
from mergeprobe_fast.merge_peft.tasks.leaks import check_leaks
from mergeprobe_fast.merge_peft.tiers import bank, capacity
from mergeprobe_fast.merge_peft.tiers.operators import CAPACITY_OPERATORS, OPERATORS
from mergeprobe_fast.merge_peft.tiers.plan import Operator, Tier
from mergeprobe_fast.merge_peft.tiers.sizes import TIERS, tier

NAMES = ("math", "code", "law")


@pytest.fixture(scope="module", params=TIERS)
def any_tier(request: pytest.FixtureRequest) -> Tier:
    return tier(request.param)


@pytest.fixture(scope="module")
def the_bank() -> Tier:
    return tier("bank")


def labels(of: Tier, operator: str, study: str = "pairs") -> int:
    """Directed: one for each member."""
    return sum(len(m.members) for m in of.merges.values()
               if m.operator == operator and m.study == study)  # fmt: skip


def domain(of: Tier, adapter: str) -> str:
    return of.adapters[adapter].recipe.domain


def test_a_tier_is_the_same_every_time_and_another_with_another_seed(any_tier: Tier) -> None:
    assert tier(any_tier.name).digest == any_tier.digest
    assert tier(any_tier.name, seed=1).digest != any_tier.digest
    assert tier(any_tier.name, seed=1).seed == 1
    digests = {tier(name).digest for name in TIERS}
    assert len(digests) == len(TIERS)


@pytest.mark.parametrize(
    ("name", "seed", "reason"),
    [("huge", 0, "none of ci, tiny"), ("ci", -1, "integer from 0"), ("ci", True, "integer from 0")],
)
def test_a_wrong_tier_or_seed_is_refused(name: str, seed: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tier(name, seed=seed)


def test_names_are_names_of_files_and_everything_declared_is_used(any_tier: Tier) -> None:
    for name in (*any_tier.exams, *any_tier.adapters, *any_tier.operators):
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name), name
    for mapping in (any_tier.exams, any_tier.adapters, any_tier.operators):
        assert all(value.name == name for name, value in mapping.items())
    assert all(merge.key == key for key, merge in any_tier.merges.items())
    assert {m.operator for m in any_tier.merges.values()} == {*any_tier.operators}
    assert {n for m in any_tier.merges.values() for n in m.members} == {*any_tier.adapters}
    assert {a.exam for a in any_tier.adapters.values()} == {*any_tier.exams}
    assert {*any_tier.crossed} <= {*any_tier.adapters}
    assert max(o.calibration for o in any_tier.operators.values()) <= any_tier.calibration_items


def test_no_exam_leaks_into_what_its_adapters_learn(any_tier: Tier) -> None:
    drawn = {(a.exam, a.items, a.recipe.seed) for a in any_tier.adapters.values()}
    for name, count, seed in sorted(drawn):
        exam = any_tier.exams[name]
        check_leaks(
            exam.items("train", count, seed),
            exam.items("test", any_tier.test_items, any_tier.seed),
            exam.items("calibration", any_tier.calibration_items, any_tier.seed),
        )


def test_exams_that_share_tasks_do_not_leak_into_each_other(the_bank: Tier) -> None:
    """A math-b adapter has not learned the test items of math either."""
    for name in DOMAINS:
        train, test, calibration = (
            list({i.prompt: i for e in the_bank.exams.values() if e.domain == name and not e.twist
                  for i in e.items(split, count, 0)}.values())
            for split, count in (("train", 256), ("test", 128), ("calibration", 48))
        )  # fmt: skip
        check_leaks(train, test, calibration)


def test_studies_are_what_their_names_say(any_tier: Tier) -> None:
    for merge in any_tier.merges.values():
        domains = [domain(any_tier, name) for name in merge.members]
        if merge.study == "pairs":
            assert len({*domains}) == len(domains) == 2
        elif merge.study == "same":
            assert len(domains) == 2 and len({*domains}) == 1
        elif merge.study == "sets":
            assert len(domains) in (3, 5) and len({*domains}) == len(domains)
        else:
            assert merge.study in ("broken", "capacity")


def test_the_bank_has_the_variation_that_labels_need(the_bank: Tier) -> None:
    adapters = the_bank.adapters.values()
    recipes = [a.recipe for a in adapters]
    assert len(recipes) >= 30 and {r.domain for r in recipes} == {*DOMAINS}
    assert sum(r.steps >= 400 for r in recipes) >= 10
    assert {r.rank for r in recipes} == {4, 8, 16}
    assert min(r.lr for r in recipes) <= 5e-4 and max(r.lr for r in recipes) >= 2e-3
    assert len({r.seed for r in recipes}) >= 3
    starts = Counter((r.domain, r.init_seed) for r in recipes)
    assert max(starts.values()) > 1 and min(starts.values()) == 1  # shared and own
    assert {r.layers for r in recipes} == {(24, 29), (26, 29)}
    assert {r.variant for r in recipes} == {"lora", "osrm", "flylora"}
    cheap = [a for a in adapters if a.recipe.steps <= 50 and a.recipe.layers == (26, 29)]
    assert len(cheap) >= 8
    names = {a.name for a in cheap}
    among = [m for m in the_bank.merges.values() if {*m.members} <= names and m.study == "pairs"]
    assert len(among) >= 40 and len({m.operator for m in among}) >= 4
    alike = Counter((a.exam, a.recipe.rank, a.recipe.lr, a.recipe.steps, a.recipe.layers)
                    for a in adapters if a.recipe.variant == "lora")  # fmt: skip
    assert sum(count >= 3 for count in alike.values()) >= 5  # retrained: the noise of seeds
    assert {e.twist for e in the_bank.exams.values()} == {"", "upper", "comply"}
    shared = [
        (a.name, b.name) for a, b in combinations(the_bank.exams.values(), 2)
        if {*a.tasks} & {*b.tasks} and {*a.tasks} != {*b.tasks}
    ]  # fmt: skip
    assert len(shared) >= 5


def test_the_bank_has_as_many_labels_as_promised(the_bank: Tier) -> None:
    assert labels(the_bank, "sum") >= 600
    assert labels(the_bank, "mean") >= 200 and labels(the_bank, "ties") >= 200
    for name in OPERATORS:
        assert labels(the_bank, name) >= 40
    common = [{m.members for m in the_bank.merges.values() if (m.operator, m.study) == (n, "pairs")}
              for n in OPERATORS]  # fmt: skip
    smallest = min(common, key=len)
    assert all(smallest <= members for members in common)  # operators compare on the same pairs
    for operator in bank.SET_OPERATORS:
        sizes = Counter(len(m.members) for m in the_bank.merges.values()
                        if m.operator == operator and m.study == "sets")  # fmt: skip
        assert sizes[3] >= 10 and sizes[5] >= 5
    for study in ("same", "broken"):
        assert min(labels(the_bank, o, study) for o in ("sum", "mean", "ties", "regmean-48")) > 10


def test_pairs_are_spread_evenly(the_bank: Tier) -> None:
    """A domain pair or an adapter that dominates would be what the labels are about."""
    sums = [m.members for m in the_bank.merges.values()
            if m.operator == "sum" and m.study == "pairs"]  # fmt: skip
    domains = Counter(frozenset(domain(the_bank, n) for n in members) for members in sums)
    assert len(domains) == 10 and max(domains.values()) <= 1.5 * min(domains.values())
    often = Counter(name for members in sums for name in members)
    plain = {a.name for a in the_bank.adapters.values() if not the_bank.exams[a.exam].twist}
    assert often.keys() == plain
    assert max(often.values()) <= 3 * min(often.values())


def test_capacity_sets_are_nested_and_of_different_tasks() -> None:
    found = tier("capacity")
    assert {a.recipe.tasks for a in found.adapters.values()} == {(task,) for task in TASKS}
    assert len(found.adapters) >= 20
    for seed in capacity.ORDERS:
        order = capacity.order(seed)
        assert sorted(order) == sorted(found.adapters)
        assert len({TASKS[task] for task in order[:5]}) == 5
        chain = [{*order[:size]} for size in (*capacity.SIZES, len(order))]
        there = [{*members} for members in capacity.sets()]
        assert all(part in there for part in chain)
    assert capacity.order(0) != capacity.order(1)
    ranks = Counter(
        (len(m.members), found.operators[m.operator].rank)
        for m in found.merges.values()
        if m.operator.startswith("regmean-48")
    )
    assert ranks[35, None] == ranks[35, 64] == ranks[35, 32] == ranks[35, 16] == 1
    assert ranks[20, None] == ranks[20, 16] == 2
    assert ranks[2, None] == 2 and ranks[2, 16] == 0  # 2 x 8 is 16: nothing is cut


def test_every_method_of_the_package_is_in_the_table() -> None:
    # "linear" is "cat" at the rank that is left; "prune" is younger than the measured bank, whose
    # journals say which operators they are of.
    assert {o.method for o in OPERATORS.values()} == {*mpf.MERGE_METHODS} - {"linear", "prune"}
    weights = {o.weights for o in OPERATORS.values()}
    assert weights == {"one", "mean", "reweighted", "minimax"}
    for operator in {**OPERATORS, **CAPACITY_OPERATORS}.values():
        declared = mpf.MERGE_METHODS[operator.method]
        assert bool(declared.data) <= bool(operator.calibration)
        assert operator.rank is None or declared.takes_rank


@pytest.mark.parametrize(
    "operator", {**OPERATORS, **CAPACITY_OPERATORS}.values(), ids=lambda o: o.name
)
def test_every_operator_applies_to_two_and_three(
    operator: Operator, tmp_path: Path, rng: np.random.Generator
) -> None:
    modules = {"layers.0.q_proj": (72, 80), "layers.0.up_proj": (90, 80)}
    calibration = make_calibration(
        tmp_path / "cal", modules, dict.fromkeys(NAMES, 40), rng, gradients=True
    ).path
    paths = [
        make_adapter(tmp_path / name, {m: (*shape, 3 + n) for m, shape in modules.items()},
                     seed=int(rng.integers(2**31))).path
        for n, name in enumerate(NAMES)
    ]  # fmt: skip
    for count in (2, 3):
        recorded = {"calibration": calibration, "domains": NAMES[:count]}
        recorded = recorded if operator.calibration else {}
        weights = [1.0 if operator.weights == "one" else 1 / count] * count
        if operator.weights in ("reweighted", "minimax"):
            table = mpf.set_features(paths[:count], size=count, **recorded,
                                     features=f"{operator.weights}_retention_mean")  # fmt: skip
            weights = table.per_member(f"{operator.weights}_weights")[0]
        arguments = (paths[:count], operator.method, weights, operator.rank)
        if operator.method == "slerp" and count == 3:
            with pytest.raises(InputError, match="it takes 2"):
                mpf.merge(*arguments)
            continue
        merged = mpf.merge(*arguments, **recorded, **operator.arguments)
        assert all(np.isfinite(m.a).all() and np.isfinite(m.b).all() for m in merged.modules)
        assert any(m.b.any() for m in merged.modules)
