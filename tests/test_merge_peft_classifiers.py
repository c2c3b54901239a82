"""Linear classifiers of MERGE-PEFT's routers against their definitions, written out densely."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.merge_peft.stages import classifiers
from mergeprobe_fast.merge_peft.stages.classifiers import (
    FOLDS,
    PENALTIES,
    SMOOTHINGS,
    fit_bayes,
    fit_centroids,
    fit_logistic,
    folds,
)

SOLVED = bound("logistic")


def draw(rng, n=60, d=7, classes=3, apart=2.0):
    """Classes around means of their own, features of unequal sizes, every example its own group."""
    y = np.arange(n) % classes
    x = rng.normal(size=(n, d)) + apart * rng.normal(size=(classes, d))[y]
    return x * rng.uniform(0.5, 2, d) + rng.normal(size=d), y, [f"text {i}" for i in range(n)]


def standardised(x):
    spread = np.array([column.std() or 1.0 for column in x.T])
    return (x - x.mean(0)) / spread / np.sqrt(x.shape[1]), spread * np.sqrt(x.shape[1])


def log_p(weight, bias, z):
    scores = z @ weight.T + bias
    return scores - np.log(np.exp(scores - scores.max(1)[:, None]).sum(1))[:, None] - scores.max(
        1
    )[:, None]


def newton(z, y, classes, penalty):
    """The logistic regression by Newton steps on its whole Hessian; d times classes unknowns."""
    n, d = z.shape
    ones = np.column_stack([z, np.ones(n)])
    w = np.zeros((classes, d + 1))
    keep = np.tile([*[penalty] * d, 0], classes)
    right = y[:, None] == np.arange(classes)
    for _ in range(100):
        p = np.exp(log_p(w[:, :d], w[:, d], z))
        slope = ((p - right).T @ ones / n).ravel() + keep * w.ravel()
        hessian = np.diag(keep)
        for i in range(n):
            curve = np.diag(p[i]) - np.outer(p[i], p[i])
            hessian += np.kron(curve, np.outer(ones[i], ones[i])) / n
        step = np.linalg.lstsq(hessian, slope, rcond=1e-9)[0]  # a shift of all biases is nobody's
        w -= step.reshape(w.shape)
        if np.abs(step).max() < 1e-10:
            return w[:, :d], w[:, d]
    raise AssertionError("Newton did not end")


def in_standard(model, x):
    """The weights of a fitted model on standardised features, biases with mean zero."""
    z, spread = standardised(x)
    weight = model.weight * spread
    bias = model.bias + model.weight @ x.mean(0)
    return z, weight, bias - bias.mean()


def off(model, x, y, penalty):
    z, weight, bias = in_standard(model, x)
    w, c = newton(z, y, int(y.max()) + 1, penalty)
    return max(np.abs(weight - w).max(), np.abs(bias - (c - c.mean())).max()) / np.abs(w).max()


@pytest.mark.parametrize(("n", "d", "classes"), [(60, 7, 3), (24, 40, 2), (15, 1, 5)])
def test_the_regression_is_the_minimum_that_newton_finds(rng, n, d, classes, monkeypatch):
    x, y, groups = draw(rng, n, d, classes)
    for penalty in (1.0, 1e-2):
        monkeypatch.setattr(classifiers, "PENALTIES", (penalty,))
        model = fit_logistic(x, y, groups)
        assert model.strength == penalty and model.parameters == classes * (d + 1)
        assert off(model, x, y, penalty) <= SOLVED
        assert off(model, x, y, penalty * 1.01) > SOLVED
        assert off(fit_logistic(x[1:], y[1:], groups[1:]), x, y, penalty) > SOLVED


def test_the_penalty_is_the_one_that_held_out_folds_like_best(rng, monkeypatch):
    monkeypatch.setattr(classifiers, "PENALTIES", (1.0, 1e-1, 1e-2))
    x, y, groups = draw(rng, 50, 4, 2, apart=0.7)
    fold, z = folds(y, groups), standardised(x)[0]
    expected = []
    for penalty in (1.0, 1e-1, 1e-2):
        total = 0.0
        for k in range(FOLDS):
            held = fold == k
            fit = newton(z[~held], y[~held], 2, penalty)
            total += log_p(*fit, z[held])[np.arange(held.sum()), y[held]].sum()
        expected.append(total)
    assert fit_logistic(x, y, groups).strength == (1.0, 1e-1, 1e-2)[int(np.argmax(expected))]


def test_classes_far_apart_are_told_and_labels_of_nothing_are_not_believed(rng):
    x, y, groups = draw(rng, 400, 20, 4, apart=3.0)
    test = np.arange(400) >= 200
    for fit in (fit_logistic, fit_centroids):
        rest = ([groups[i] for i in np.flatnonzero(~test)],) if fit is fit_logistic else ()
        assert (fit(x[~test], y[~test], *rest).choose(x[test]) == y[test]).mean() >= 0.97
    noise = rng.normal(size=(400, 20))
    model = fit_logistic(noise[~test], y[~test], [groups[i] for i in np.flatnonzero(~test)])
    assert model.strength >= 1e-2  # with less, noise would be learned by heart
    # 200 guesses of 1 in 4: 50 +- 6.1; five standard deviations.
    assert abs((model.choose(noise[test]) == y[test]).sum() - 50) <= 31


def test_the_choice_is_that_of_other_units_and_origins_of_the_features(rng):
    x, y, groups = draw(rng, 60, 7, 3, apart=0.8)
    new = draw(rng, 200, 7, 3)[0]
    scale, shift = 10.0 ** rng.uniform(-6, 6, 7), rng.normal(size=7)
    for fit in (lambda a: fit_logistic(a, y, groups), lambda a: fit_centroids(a, y)):
        plain, other = fit(x), fit(x * scale + shift)
        margin = np.sort(new @ plain.weight.T + plain.bias, 1)
        sure = margin[:, -1] - margin[:, -2] > 1e-5
        assert sure.mean() > 0.9
        assert np.array_equal(plain.choose(new)[sure], other.choose(new * scale + shift)[sure])


def test_a_solver_that_gives_up_is_not_believed(rng, monkeypatch):
    x, y, groups = draw(rng)
    plain = classifiers.minimize

    def lazy(*args, options, **given):
        return plain(*args, options={**options, "maxiter": 1}, **given)

    monkeypatch.setattr(classifiers, "minimize", lazy)
    with pytest.raises(mpf.InputError, match="did not converge"):
        fit_logistic(x, y, groups)


def test_a_feature_that_never_changes_says_nothing(rng):
    x, y, groups = draw(rng)
    padded = np.column_stack([x[:, :3], np.full(len(x), 0.1), x[:, 3:]])
    for fit in (lambda a: fit_logistic(a, y, groups), lambda a: fit_centroids(a, y)):
        model = fit(padded)
        assert np.abs(model.weight[:, 3]).max() <= 1e-9 * np.abs(model.weight).max()
        assert np.isfinite(model.weight).all()


def test_examples_that_are_all_equal_get_the_commonest_class(rng):
    x, y = np.ones((9, 4)), np.array([0, 1, 1, 0, 1, 1, 1, 2, 2])
    model = fit_logistic(x, y, [f"{i}" for i in range(9)])
    assert model.choose(rng.normal(size=(5, 4))).tolist() == [1] * 5


def test_the_nearest_centroid_is_the_nearest(rng):
    x, y, _ = draw(rng, apart=0.5)
    new = draw(rng, 200, 7, 3)[0]
    spread = x.std(0)
    distance = np.stack([(((new - x[y == k].mean(0)) / spread) ** 2).sum(1) for k in range(3)], 1)
    model = fit_centroids(x, y)
    scores = new @ model.weight.T + model.bias
    shift = scores + distance / 2  # |z|^2 / 2, the same for all classes
    assert np.abs(shift - shift[:, :1]).max() <= 1e-12 * distance.max()
    assert np.array_equal(model.choose(new), distance.argmin(1))
    assert model.parameters == 3 * 7 + 3 and model.strength is None


def naive_bayes(counts, y, new, smoothing):
    """log p(class) + sum of log p(token | class), a token at a time."""
    found = np.zeros((len(new), y.max() + 1))
    for k in range(y.max() + 1):
        mine = counts[y == k].sum(0) + smoothing
        prior = ((y == k).sum() + 1) / (len(y) + y.max() + 1)
        for i, row in enumerate(new):
            found[i, k] = np.log(prior)
            for token, times in enumerate(row):
                found[i, k] += times * np.log(mine[token] / mine.sum())
    return found - np.log(np.exp(found - found.max(1)[:, None]).sum(1))[:, None] - found.max(
        1
    )[:, None]


def test_naive_bayes_is_its_formula_and_its_smoothing_the_likeliest(rng):
    y = np.arange(40) % 3
    rates = rng.gamma(0.4, size=(3, 12))
    counts, new = rng.poisson(rates[y]).astype(float), rng.poisson(rates[y]).astype(float)
    groups = [f"{i}" for i in range(40)]
    model, fold = fit_bayes(counts, y, groups), folds(y, groups)
    expected = naive_bayes(counts, y, new, model.strength)
    found = new @ model.weight.T + model.bias
    shift = found - expected
    assert np.abs(shift - shift[:, :1]).max() <= 1e-11
    assert np.array_equal(model.choose(new), expected.argmax(1))
    totals = [
        sum(naive_bayes(counts[fold != k], y[fold != k], counts[fold == k], smoothing)[
            np.arange((fold == k).sum()), y[fold == k]].sum() for k in range(FOLDS))
        for smoothing in SMOOTHINGS
    ]  # fmt: skip
    assert model.strength == SMOOTHINGS[int(np.argmax(totals))]


def test_folds_keep_a_text_together_and_are_even_in_each_class(rng):
    y = np.repeat([0, 1, 2], 25)
    groups = [f"t{i // 2}" for i in range(75)]  # two wordings a text, one text of two classes
    fold = folds(y, groups)
    for name in {*groups}:
        assert len({fold[i] for i in range(75) if groups[i] == name}) == 1
    for label in range(3):
        sizes = np.bincount(fold[y == label], minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 3
    order = rng.permutation(75)
    assert np.array_equal(folds(y[order], [groups[i] for i in order]), fold[order])
    with pytest.raises(mpf.InputError, match="two different texts"):
        folds(np.array([0, 0, 1, 1]), ["a", "b", "c", "c"])


def test_the_number_of_threads_changes_no_bit(rng):
    x, y, groups = draw(rng, 200, 120, 5)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            found.append([fit_logistic(x, y, groups), fit_centroids(x, y),
                          fit_bayes(np.abs(x), y, groups)])  # fmt: skip
    for one, two in zip(*found, strict=True):
        assert one.weight.tobytes() == two.weight.tobytes()
        assert one.bias.tobytes() == two.bias.tobytes() and one.strength == two.strength
    assert PENALTIES[0] == max(PENALTIES) and SMOOTHINGS[0] == max(SMOOTHINGS)  # ties: strongest
