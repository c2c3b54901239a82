"""What labels and signals are said to be worth, on labels whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm, rankdata, spearmanr

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.study import analysis, models, splits
from mergeprobe_fast.merge_peft.study.pairs import Pairs
from mergeprobe_fast.merge_peft.study.predictors import (
    NAMES,
    PAIR_MEAN,
    Predictor,
    predict,
    predictors,
)
from mergeprobe_fast.merge_peft.study.splits import SPLITS, held_out, interval, score

DOMAINS = ("math", "code", "science", "safety")


def make_pairs(rng, *, each=6, of_cell=1.0, of_adapters=1.0, noise=0.1, retrained=False) -> Pairs:
    """All pairs across domains; y = domain pair + victim and partner + noise, all independent.

    Signals: "final:cell" is the domain pair's part, "final:own" the adapters', "final:nothing".
    Two adapters in a row are retrainings of one recipe if asked for.
    """
    names = [(d, k) for d in DOMAINS for k in range(each)]
    cells = {(c, d): rng.normal() for c in DOMAINS for d in DOMAINS}
    recipe = {n: (n[0], n[1] // 2 if retrained else n[1]) for n in names}
    own = {r: rng.normal(size=2) for r in recipe.values()}
    rows = [(v, p) for one, two in combinations(names, 2) if one[0] != two[0]
            for v, p in ((one, two), (two, one))]  # fmt: skip
    cell = np.array([cells[v[0], p[0]] for v, p in rows])
    adapters = np.array([own[recipe[v]][0] + own[recipe[p]][1] for v, p in rows])
    y = of_cell * cell + of_adapters * adapters + noise * rng.normal(size=len(rows))

    def column(side, of):
        return np.array([of(row[side]) for row in rows], dtype=object)

    names_of, domain_of = (lambda n: f"{n[0]}-{n[1]}"), (lambda n: n[0])
    return Pairs(
        *(column(side, names_of) for side in (0, 1)), *(column(side, domain_of) for side in (0, 1)),
        *(column(side, lambda n: str(recipe[n])) for side in (0, 1)),
        *(column(side, lambda n: n[1] % 3).astype(int) for side in (0, 1)),
        y, np.full(len(rows), noise), {"lr_a": rng.normal(size=len(rows))},
        {"final:cell": cell, "final:own": adapters, "final:nothing": rng.normal(size=len(rows))},
    )  # fmt: skip


def spearman_inside(x, y, groups) -> float:
    """Literal: ranks centred in each group, over its size; one correlation over all."""
    a, b = [], []
    for g in np.unique(groups):
        rows = np.flatnonzero(groups == g)
        if len(rows) >= 3:
            for values, into in ((x, a), (y, b)):
                ranks = rankdata(values[rows])
                into.extend((ranks - ranks.mean()) / len(rows))
    return float(np.corrcoef(a, b)[0, 1])


def test_what_only_the_domains_carry_tells_nothing_inside_a_domain_pair(rng):
    pairs = make_pairs(rng, of_cell=2.0, of_adapters=0.5)
    wobbly = pairs.signals["final:cell"] + 1e-3 * rng.normal(size=len(pairs))
    pairs = replace(pairs, signals={**pairs.signals, "final:cell": wobbly})
    cell, own = analysis.signals(pairs, ["final:cell", "final:own"])
    assert cell.rho > 0.7 and abs(cell.within) < 0.2
    assert own.within > 0.7
    low, high = interval(cell.within_draws)
    assert low < 0 < high
    known = Predictor(PAIR_MEAN, models.cell_mean, domains=True)
    found = score(pairs, predict(pairs, known, "adapter"))
    assert found.rho > 0.6 and found.within == 0.0


def test_a_mean_over_the_other_rows_would_look_wrong_inside_a_domain_pair_without_folds(rng):
    """The trap: what is left of a mean falls where the held-out label is high."""
    pairs = make_pairs(rng, of_adapters=0.3)
    cell = pairs.cell
    total, count = np.bincount(cell, pairs.y), np.bincount(cell)
    others = (total[cell] - pairs.y) / (count[cell] - 1)
    assert spearman_inside(others, pairs.y, cell) < -0.9


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_of_what_is_held_out_is_learned_from(split, rng):
    """Neither do rows share it, nor do predictions change when held-out labels do."""
    pairs = make_pairs(rng, retrained=True)
    sides = {
        "adapter": (pairs.victim_family, pairs.partner_family),
        "partner": (pairs.victim_family, pairs.partner_family),
        "domain": (pairs.victim_domain, pairs.partner_domain),
        "seed": (pairs.victim_seed, pairs.partner_seed),
        "domain pair": (np.array([*map(frozenset, zip(pairs.victim_domain, pairs.partner_domain,
                                                      strict=True))], dtype=object),) * 2,
    }[split]  # fmt: skip
    folds = held_out(pairs, split)
    np.testing.assert_array_equal(np.sum([test for test, _ in folds], axis=0), 1)
    own = sides[0] if split != "partner" else sides[1]  # the side that is held out
    for test, gone in folds:
        assert gone[test].all() and len({*own[test]}) == 1
        assert own[test][0] not in {*sides[0][~gone], *sides[1][~gone]}

    def changed(chosen, prepare=lambda of: of):
        """Which predictors answer otherwise once the labels of a fold are others."""
        names = set()
        for number, (_, gone) in enumerate(held_out(pairs, split)[:3]):
            other = replace(pairs, y=np.where(gone, rng.normal(size=len(pairs)), pairs.y))
            for p in chosen:
                a, b = (predict(prepare(of), p, split) for of in (pairs, other))
                if (a.value != b.value)[a.fold == number].any():
                    names.add(p.name)
        return names

    def leaking(of):
        """The mean label of the victim over all rows, the trap of encoding by target."""
        code = np.unique(of.victim, return_inverse=True)[1]
        mean = np.bincount(code, of.y) / np.bincount(code)
        return replace(of, signals={**of.signals, "final:leak": mean[code]})

    signals = ("final:cell", "final:own", "final:nothing")
    assert not changed([
        Predictor("mean", models.mean),
        Predictor("cell", models.cell_mean, domains=True),
        Predictor("ridge", models.ridge, signals, True, True),
        Predictor("names", models.ridge, domains=True, names=True),
        Predictor("trees", small_trees, signals, True, True),
    ])  # fmt: skip
    assert changed([Predictor("leak", models.ridge, ("final:leak",))], leaking)


def small_trees(x, y, families, new):
    return models.trees(x, y, families, new, count=5)


def test_retrainings_of_an_adapter_are_held_out_with_it(rng):
    """Otherwise a name would do: here each recipe has an effect of its own, and no signal has."""
    pairs = make_pairs(rng, each=10, of_cell=0.0, retrained=True)
    families, code = np.unique(pairs.victim_family, return_inverse=True)
    pairs = replace(
        pairs, y=rng.normal(size=len(families))[code] + 0.1 * rng.normal(size=len(pairs)),
        signals={"final:tag": rng.normal(size=len(families))[code]},
    )  # fmt: skip
    by_name = Predictor("tag", small_trees, ("final:tag",))

    def of_held_out_victims(pairs):
        return np.corrcoef(predict(pairs, by_name, "adapter").value, pairs.y)[0, 1]

    alone = replace(pairs, victim_family=pairs.victim, partner_family=pairs.partner)
    # By chance numbers that mean nothing may be in the order of the effects of a few families.
    assert of_held_out_victims(alone) > max(0.8, of_held_out_victims(pairs) + 0.1)


def test_scores_are_their_definitions(rng):
    pairs = make_pairs(rng)
    predictor = Predictor("own", models.ridge, ("final:own", "final:nothing"))
    predicted = predict(pairs, predictor, "adapter")
    found = score(pairs, predicted)
    n = len(pairs)
    value, y = predicted.value, pairs.y
    assert found.rows == n and found.rho == pytest.approx(spearmanr(value, y).statistic, abs=1e-12)
    assert found.error == pytest.approx(np.abs(value - y).mean(), abs=1e-12)
    assert found.r2 == pytest.approx(1 - np.mean((value - y) ** 2) / np.var(y), abs=1e-12)
    low = y < np.quantile(y, 0.25)
    wins = [(a < b) + (a == b) / 2 for a in value[low] for b in value[~low]]
    assert found.auc == pytest.approx(np.mean(wins), abs=1e-12)
    groups = np.array([f"{v}|{d}" for v, d in zip(pairs.victim, pairs.partner_domain,
                                                  strict=True)])  # fmt: skip
    literal = spearman_inside(value, y, groups)
    assert found.within == pytest.approx(literal, abs=1e-9)


def test_a_weighted_correlation_is_that_of_repeated_rows(rng):
    x, y = rng.normal(size=(2, 40))
    x[3] = np.nan
    times = rng.integers(0, 4, 40)
    repeated = np.repeat(np.arange(40), times)
    repeated = repeated[np.isfinite(x[repeated])]
    (found,) = splits.correlation(x, y, times[None].astype(float))
    assert found == pytest.approx(np.corrcoef(x[repeated], y[repeated])[0, 1], abs=1e-12)
    assert np.isnan(splits.correlation(np.ones(9), rng.normal(size=9))).all()


def test_intervals_know_that_rows_share_adapters(rng):
    """Rows drawn one by one would make them much too narrow: here an adapter is all there is."""
    pairs = make_pairs(rng, of_cell=0.0, noise=0.0)
    weights = splits.resampled(pairs)
    spread = np.std(weights @ pairs.y / weights.sum(1))
    assert spread > 1.5 * pairs.y.std() / len(pairs) ** 0.5


def test_the_ridge_is_the_closed_form_at_its_penalty(rng):
    x, new = rng.normal(size=(50, 4)), rng.normal(size=(7, 4))
    y = x @ [1.0, -0.5, 0, 0] + rng.normal(size=50)
    a, b = models.ranked(x, new)
    found = models.ridge(x, y, rng.integers(0, 12, (50, 2)), new)
    centred = a - a.mean(0)
    closest = [
        np.abs(y.mean() + (b - a.mean(0)) @ np.linalg.solve(
            centred.T @ centred + p * np.eye(4), centred.T @ (y - y.mean())) - found).max()
        for p in models.PENALTIES
    ]  # fmt: skip
    assert min(closest) < 1e-10 and sorted(closest)[1] > 1e-8


def test_ranks_do_not_depend_on_scale_and_say_nothing_of_what_is_missing(rng):
    x, new = rng.normal(size=(30, 3)), rng.normal(size=(5, 3))
    x[4, 0] = new[2, 1] = np.nan
    x[:, 2] = 1.0
    found = models.ranked(x, new)
    for one, other in zip(found, models.ranked(np.exp(x), np.exp(new)), strict=True):
        np.testing.assert_array_equal(one, other)
    a, b = found
    assert not a[:, 2].any() and not b[:, 2].any()
    np.testing.assert_allclose(a.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(a[:, :2].std(0), 1, atol=1e-12)
    known = np.sort(np.delete(x[:, 0], 4))
    below = np.searchsorted(known, new[:, 0])
    assert (np.argsort(b[:, 0], kind="stable") == np.argsort(below, kind="stable")).all()


def test_trees_find_what_no_line_can(rng):
    x = rng.uniform(-1, 1, (300, 3))
    y = np.sign(x[:, 0]) * np.sign(x[:, 1])
    new = rng.uniform(-1, 1, (200, 3))
    truth = np.sign(new[:, 0]) * np.sign(new[:, 1])
    families = rng.integers(0, 20, (300, 2))
    by_trees = models.trees(x, y, families, new)
    assert np.corrcoef(by_trees, truth)[0, 1] > 0.7
    assert abs(np.corrcoef(models.ridge(x, y, families, new), truth)[0, 1]) < 0.5
    np.testing.assert_array_equal(by_trees, models.trees(x, y, families, new))


def test_the_noise_floor_is_the_share_that_is_not_error(rng):
    pairs = make_pairs(rng, each=10, noise=0.7)
    found = analysis.noise_floor(pairs)
    squares = [np.square(pairs.y[pairs.cell == c] - pairs.y[pairs.cell == c].mean()).sum()
               for c in np.unique(pairs.cell)]  # fmt: skip
    left = sum(squares) / (len(pairs) - len(squares))
    assert found["reliability_within"] == pytest.approx(1 - 0.49 / left, abs=1e-12)
    quiet = analysis.noise_floor(make_pairs(rng, each=10, noise=0.7, of_cell=0, of_adapters=0))
    assert abs(quiet["reliability"]) < 0.25  # all of it is noise
    assert found["reliability"] > 0.5


def test_what_a_label_of_each_cell_cannot_say_is_nan(rng):
    pairs = make_pairs(rng, each=1)
    found = analysis.noise_floor(pairs)
    assert np.isnan([found["sd_within"], found["reliability_within"]]).all()
    assert np.isfinite([found["reliability"], found["se"]]).all()
    assert np.isnan(analysis.domain_share(pairs))
    (signal,) = analysis.signals(pairs, ["final:own"])
    assert np.isnan(analysis.chance([signal])) and np.isnan(analysis.chance([]))
    assert np.isnan(signal.within) and np.isfinite(signal.rho)
    assert np.isnan(interval(signal.within_draws)).all()


@pytest.mark.parametrize("model", [models.mean, models.ridge])
def test_inside_groups_of_two_nothing_is_said_and_nothing_is_zero(model, rng):
    """Each victim meets two partners of a domain; of three, what is constant tells 0."""
    predictor = Predictor("any", model, ("final:own",))
    pairs = make_pairs(rng, each=2)
    few = score(pairs, predict(pairs, predictor, "adapter"))
    assert np.isnan(few.within) and np.isnan(interval(few.within_draws)).all()
    assert np.isfinite(few.rho)
    pairs = make_pairs(rng, each=3)
    more = score(pairs, predict(pairs, predictor, "adapter"))
    assert more.within == 0 if model is models.mean else more.within > 0.5


def test_noise_of_seeds_is_what_retrainings_differ_by(rng):
    """Of either side; retrainings of a recipe share its effect here, so only noise is left."""
    pairs = make_pairs(rng, each=8, noise=0.3, retrained=True)
    found = analysis.seed_noise(pairs)
    for side in ("victim", "partner"):
        assert found[side]["sd"] == pytest.approx(0.3, rel=0.15)
        assert found[side]["rows"] == 2 * found[side]["groups"] == len(pairs)
    none = analysis.seed_noise(replace(pairs, victim_family=pairs.victim))
    assert none["victim"]["groups"] == 0 and np.isnan(none["victim"]["sd"])


def useless(pairs, rng, count=10):
    """Signals that know nothing: a number an adapter, of either side, and their difference."""
    names, code = np.unique(np.concatenate([pairs.victim, pairs.partner]), return_inverse=True)
    a, b = code.reshape(2, -1)
    found = {}
    for k in range(count):
        number = rng.normal(size=len(names))
        found |= {f"final:a{k}": number[a], f"final:b{k}": number[b],
                  f"final:ratio{k}": number[a] - number[b]}  # fmt: skip
    return replace(pairs, signals=found)


def test_of_useless_signals_the_best_exceeds_chance_once_in_twenty_worlds(rng):
    """As if rows were independent, of which 4 normal numbers in 10000 are that large, it does."""
    above, naive = 0, 0
    for _ in range(20):
        pairs = useless(make_pairs(rng), rng)
        found = analysis.signals(pairs, list(pairs.signals))
        best = max(abs(s.within) for s in found)
        above += best > analysis.chance(found)
        naive += best > norm.isf(0.05 / 2 / len(found)) / len(pairs) ** 0.5
    assert above <= 5 < naive  # P(more than 5 of 20 at 0.05) = 0.0003


def test_chance_grows_with_the_signals_that_are_tried(rng):
    pairs = useless(make_pairs(rng), rng)
    found = analysis.signals(pairs, list(pairs.signals))
    assert analysis.chance(found[:1]) * 1.1 < analysis.chance(found)


def test_what_a_held_out_victim_is_like_is_not_known_from_its_other_rows(rng):
    """Each victim has an effect of its own: nobody can know that of a new one.

    Nor could one whose rows are predicted twice, each time by models that know the other side's
    adapter; but their mean would look as if.
    """
    pairs = make_pairs(rng, of_cell=0.0)
    code = np.unique(pairs.victim_family, return_inverse=True)[1]
    effect = rng.normal(size=code.max() + 1)
    pairs = replace(pairs, y=effect[code] + 0.3 * rng.normal(size=len(pairs)))
    names = Predictor("names", models.ridge, names=True)
    found, other = (predict(pairs, names, split) for split in ("adapter", "partner"))
    assert score(pairs, found).rho < 0.45
    both = replace(found, value=(found.value + other.value) / 2)
    assert spearmanr(both.value, pairs.y).statistic > 0.6


@pytest.mark.parametrize("split", ["adapter", "domain pair"])
def test_what_tells_adapters_apart_is_not_better_than_their_names(split, rng):
    """Signals drawn at random per adapter look good inside, as names do."""
    looked = 0
    for _ in range(3):
        pairs = useless(make_pairs(rng, of_cell=0.0, noise=0.3), rng, count=3)
        tags = Predictor("tags", small_trees, tuple(pairs.signals), domains=True)
        names = next(p for p in predictors(pairs) if p.name == NAMES)
        found, known = (score(pairs, predict(pairs, p, split)) for p in (tags, names))
        low, _ = interval(found.within_draws)
        looked += low > 0
        low, _ = interval(found.within_draws - known.within_draws)
        assert low <= 0 and found.rho < known.rho + 0.1
    assert looked


def test_the_domain_share_of_noise_is_about_zero(rng):
    """In the sample, 12 cells of 12 rows explain 8 % of anything."""
    shares, raw = [], []
    for _ in range(30):
        pairs = make_pairs(rng, each=3, of_cell=0.0, of_adapters=0.0)
        shares.append(analysis.domain_share(pairs))
        ranks, cell = rankdata(pairs.y), pairs.cell
        means = np.array([ranks[cell == c].mean() for c in cell])
        raw.append(means.var() / ranks.var())
    n, cells = len(pairs), cell.max() + 1
    assert shares[-1] == pytest.approx(1 - (1 - raw[-1]) * (n - 1) / (n - cells), abs=1e-12)
    error = 4 * np.std(raw, ddof=1) / 30**0.5
    assert abs(np.mean(shares)) < error < np.mean(raw)


def test_a_split_that_leaves_nothing_is_refused(rng):
    pairs = make_pairs(rng)
    same = np.zeros(len(pairs), int)
    pairs = replace(pairs, victim_seed=same, partner_seed=same)
    with pytest.raises(InputError, match="rows to learn from"):
        predict(pairs, Predictor("mean", models.mean), "seed")
    with pytest.raises(InputError, match="is none of"):
        held_out(pairs, "colour")


def test_predictors_without_their_columns_are_left_out(rng):
    names = [p.name for p in predictors(make_pairs(rng))]
    assert PAIR_MEAN in names and "cosine alone" not in names
