"""Small regressions to measure what columns are worth; the product's predictor is elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# (x, y, families, x of what to predict) -> predictions. Labels of held-out rows never come in.
Model = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
PENALTIES = tuple(10.0**k for k in np.arange(-1, 4.01, 0.5))
_INNER = 5


def ranked(x: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both matrices with each column as its rank among ``x``'s: mean 0, deviation 1 there.

    NaN becomes the middle; a column that is constant in ``x`` becomes 0.
    """
    out = np.zeros(x.shape), np.zeros(new.shape)
    for j in range(x.shape[1]):
        known = np.sort(x[np.isfinite(x[:, j]), j])
        if len(known) < 2 or known[0] == known[-1]:
            continue
        for values, into in zip((x[:, j], new[:, j]), out, strict=True):
            there = np.isfinite(values)
            left, right = (np.searchsorted(known, values[there], s) for s in ("left", "right"))
            into[there, j] = (left + right) / (2 * len(known)) - 0.5
        mean, deviation = out[0][:, j].mean(), out[0][:, j].std()
        for into in out:
            into[:, j] = (into[:, j] - mean) / deviation
    return out


def mean(x: np.ndarray, y: np.ndarray, families: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The mean of all labels."""
    return np.full(len(new), y.mean())


def ridge(x: np.ndarray, y: np.ndarray, families: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression on ranks; the penalty is chosen on families of adapters held out inside."""
    a, b = ranked(x, new)
    return _solve(a, y, b)[_penalty(a, y, families)]


def _penalty(x: np.ndarray, y: np.ndarray, families: np.ndarray) -> int:
    known = np.unique(families)
    fold = np.empty(families.max(initial=0) + 1, np.int64)
    fold[known] = np.random.default_rng(0).permutation(len(known)) % _INNER
    errors = np.zeros(len(PENALTIES))
    for k in range(_INNER):
        test = (fold[families] == k).any(axis=1)
        if test.any() and np.count_nonzero(~test) >= 2:
            errors += np.square(_solve(x[~test], y[~test], x[test]) - y[test]).sum(axis=1)
    return int(errors.argmin())


def _solve(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """(penalties, rows of new): predictions of every penalty, from one decomposition."""
    centre, level = x.mean(axis=0), y.mean()
    u, s, vt = np.linalg.svd(x - centre, full_matrices=False)
    seen, shown = u.T @ (y - level), (new - centre) @ vt.T
    shrunk = [s / (np.square(s) + penalty) * seen for penalty in PENALTIES]
    return level + np.array(shrunk) @ shown.T


def cell_mean(x: np.ndarray, y: np.ndarray, families: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The mean label of the cell, which is the first column.

    The others are the two domains as zeros and ones: a ridge on them stands in for a cell of fewer
    than 3 labels.
    """
    out = ridge(x[:, 1:], y, families, new[:, 1:])
    for cell in np.unique(new[:, 0]):
        own = y[x[:, 0] == cell]
        if len(own) >= 3:
            out[new[:, 0] == cell] = own.mean()
    return out


def trees(
    x: np.ndarray, y: np.ndarray, families: np.ndarray, new: np.ndarray,
    *, count: int = 50, leaf: int = 4, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Extremely randomised trees (Geurts et al. 2006), a third of the columns tried at a split."""
    a, b = ranked(x, new)
    rng = np.random.default_rng(seed)
    out = np.zeros(len(b))
    tried = -(-a.shape[1] // 3)

    def grow(rows: np.ndarray, asked: np.ndarray) -> None:
        if len(rows) < 2 * leaf or not len(asked):
            out[asked] += y[rows].mean()
            return
        order, labels = rng.permutation(a.shape[1]), y[rows]
        for chosen in (order[:tried], order[tried:]):  # the rest where those are all constant
            values = a[np.ix_(rows, chosen)]
            low, high = values.min(axis=0), values.max(axis=0)
            if (low < high).any():
                break
        at = low + (high - low) * rng.random(len(chosen))
        left = values < at
        number, total = left.sum(axis=0), labels @ left
        fits = (number >= leaf) & (len(rows) - number >= leaf)
        if not fits.any():
            out[asked] += labels.mean()
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = total**2 / number + (labels.sum() - total) ** 2 / (len(rows) - number)
        best = int(np.where(fits, gain, -np.inf).argmax())
        side, go = left[:, best], b[asked, chosen[best]] < at[best]
        grow(rows[side], asked[go])
        grow(rows[~side], asked[~go])

    for _ in range(count):
        grow(np.arange(len(a)), np.arange(len(b)))
    return out / count
