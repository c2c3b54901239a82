"""What to hold out, how well held-out rows were predicted, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from mergeprobe_fast.errors import InputError

from .pairs import Pairs, codes

Split = Literal["adapter", "partner", "domain pair", "domain", "seed"]
SPLITS: tuple[Split, ...] = ("adapter", "partner", "domain pair", "domain", "seed")
RESAMPLES = 1000


def held_out(pairs: Pairs, split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    """By fold two masks: the rows to predict, and those not to learn from, which hold them.

    Each row is predicted in one fold. adapter, domain, seed: the rows whose *victim* is an adapter
    or its retraining, of a domain, of a seed; not to learn from are those with it on either side.
    partner: the same with the partner's adapter. domain pair: the rows of two domains, whichever is
    the victim.

    A row predicted twice, without its victim and without its partner, would be predicted by models
    of which each knows what the other one does not.
    """
    if split == "domain pair":
        pair = codes(*np.sort([pairs.victim_domain.astype(str),
                                pairs.partner_domain.astype(str)], axis=0))  # fmt: skip
        return [(pair == p,) * 2 for p in range(pair.max(initial=-1) + 1)]
    sides = {
        "adapter": (pairs.victim_family, pairs.partner_family),
        "partner": (pairs.partner_family, pairs.victim_family),
        "domain": (pairs.victim_domain, pairs.partner_domain),
        "seed": (pairs.victim_seed, pairs.partner_seed),
    }
    if split not in sides:
        raise InputError(f"{split!r} is none of {', '.join(SPLITS)}", key="split")
    one, other = sides[split]
    return [(one == v, (one == v) | (other == v)) for v in np.unique(one)]


@dataclass(frozen=True, eq=False)
class Predicted:
    """The prediction of each row and the number of the fold that held it out, (n,) both."""

    fold: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, eq=False)
class Score:
    """How well a predictor does; intervals are 95 %, over families of adapters.

    Attributes:
        rows: how many were predicted.
        rho: Spearman's.
        within: the same inside (fold, directed domain pair): what the domains cannot earn, and what
            a mean over other rows, which falls where the held-out label is high, cannot lose. Rows
            there share what was held out and differ in what was not, which can be recognised: of a
            victim held out, its partners. 0 for what is constant there, NaN where none has 3 rows.
        error: mean absolute error.
        r2: share of the variance, 0 or below for no better than the mean of all labels.
        auc: of telling the worst quarter from the rest.
        rho_draws, within_draws: resampled, the same resamples for each predictor of a table.
    """

    rows: int
    rho: float
    within: float
    error: float
    r2: float
    auc: float
    rho_draws: np.ndarray
    within_draws: np.ndarray


def score(pairs: Pairs, predicted: Predicted, *, seed: int = 0) -> Score:
    """Score predictions of held-out rows."""
    p, y, weights = predicted.value, pairs.y, resampled(pairs, seed)
    inside = codes(predicted.fold, pairs.cell)
    # What should be one number is not to be ranked by its rounding.
    settled = np.round(p / max(float(np.ptp(y)), 1e-300), 9)
    a, b = (centred_ranks(x, inside) for x in (settled, y))
    constant = np.isfinite(a).any() and not np.nan_to_num(a).any()
    return Score(
        rows=len(pairs),
        rho=float(correlation(rankdata(p), rankdata(y))[0]),
        within=0.0 if constant else float(correlation(a, b, centre=False)[0]),
        error=float(np.abs(p - y).mean()),
        r2=float(1 - np.square(p - y).sum() / np.square(y - y.mean()).sum()),
        auc=_auc(-p, y < np.quantile(y, 0.25)),
        rho_draws=correlation(rankdata(p), rankdata(y), weights),
        within_draws=np.zeros(len(weights)) if constant
        else correlation(a, b, weights, centre=False),
    )  # fmt: skip


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 %; NaN where no resample says anything."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def resampled(pairs: Pairs, seed: int = 0, count: int = RESAMPLES) -> np.ndarray:
    """(count, n): how often each row is drawn when families of adapters are, with replacement.

    Rows share adapters: drawn one by one, they would look more independent than they are.
    """
    families = pairs.families
    number = families.max(initial=-1) + 1
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), count)
    return (draws[:, families[:, 0]] * draws[:, families[:, 1]]).astype(np.float64)


def centred_ranks(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks less their mean within each group, over its size; NaN in groups of fewer than 3."""
    out = np.full(len(x), np.nan)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rows = rows[np.isfinite(x[rows])]
        if len(rows) >= 3:
            out[rows] = (rankdata(x[rows]) - (len(rows) + 1) / 2) / len(rows)
    return out


def correlation(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None, *, centre: bool = True
) -> np.ndarray:
    """Weighted correlations, one per row of ``weights`` (or one in all), over what is not NaN.

    NaN where one side is constant.
    """
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    w = np.ones((1, len(x))) if weights is None else weights[:, there]
    total = w.sum(axis=1)
    total[total == 0] = np.nan
    mx, my = (w @ x / total, w @ y / total) if centre else (0.0, 0.0)
    xx, yy = w @ np.square(x) / total - np.square(mx), w @ np.square(y) / total - np.square(my)
    size = np.sqrt(np.maximum(xx, 0.0) * np.maximum(yy, 0.0))
    size[size < 1e-12 * (np.ptp(x) * np.ptp(y) if len(x) else 0.0)] = np.nan
    size[size == 0] = np.nan
    return (w @ (x * y) / total - mx * my) / size


def _auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Of higher values where positive; NaN where all or none are."""
    one, other = int(positive.sum()), int((~positive).sum())
    if not one or not other:
        return float("nan")
    return float((rankdata(values)[positive].sum() - one * (one + 1) / 2) / (one * other))
