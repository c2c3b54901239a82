"""How much of what merging costs can be foretold, and from what: honest numbers for the results.

Labels are of pairs from different domains and of one operator. What is predicted is always held
out: its victim's adapter, domain or seed, its partner's adapter, or its domain pair is in no row
to learn from (``splits``); regressions are small and fixed (``models``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mergeprobe_fast.errors import InputError

from ..outcome.features import FINAL, NAME, left_out
from .pairs import Pairs, read_pairs
from .predictors import (
    ALL,
    BOTH,
    METADATA,
    NAMES,
    NORM,
    PAIR_MEAN,
    WEIGHTS,
    Predictor,
    predictors,
    scores,
)
from .splits import (
    SPLITS,
    Split,
    centred_ranks,
    correlation,
    interval,
    resampled,
)

TARGETS = ("ll_norm", "prob_ret", "option_norm", "retention", "accuracy_norm")
_BASELINES = (("over_pair_mean", PAIR_MEAN), ("over_metadata", METADATA), ("over_names", NAMES))
EARLY: tuple[Split, ...] = ("adapter", "domain pair")  # asked of snapshots
FEWEST = 40  # rows to say anything from, of a run or of the snapshots of one time


def analyse(
    run_dir: str | os.PathLike[str], *, operator: str = "sum", target: str = "ll_norm"
) -> dict[str, Any]:
    """All of it, as what JSON can hold (not a number: None).

    Returns:
        operator, target, rows, without_partner, adapters, families, seeds; noise: ``noise_floor``
        of each target; seed_noise; domain_share; splits: by split the scores of ``predictors``,
        each with its advantage in rho ("over_...") and within ("within_over_...") over the domain
        pair's mean, over metadata and over names; signals: by time of training those of ``signals``
        for columns that are no aggregates over modules, the largest |within| first; chance: by
        time, of the best of them; early: the same predictors from final and from early signals on
        the rows that have both; left_out: of ``outcome.features.left_out``.

    Raises:
        InputError: fewer than ``FEWEST`` labels; as ``read_pairs``.
    """
    pairs = read_pairs(run_dir, operator=operator, target=target)
    if len(pairs) < FEWEST:
        reason = f"only {len(pairs)} labels of {operator}, pairs of different domains"
        raise InputError(f"{reason}: what can be foretold is asked from {FEWEST}", path=run_dir)
    noise = {}
    for name in TARGETS:
        try:
            noise[name] = noise_floor(read_pairs(run_dir, operator=operator, target=name))
        except InputError:  # no victim has this label
            noise[name] = None
    times = sorted({n.partition(":")[0] for n in pairs.signals}, key=_fraction, reverse=True)
    single, level, early = {}, {}, {}
    for time in times:
        names = [n for n in pairs.signals if n.startswith(f"{time}:") and "." not in n]
        found = signals(pairs, names)
        single[time] = [
            {"name": s.name, "rows": s.rows, "rho": s.rho, "rho_interval": interval(s.rho_draws),
             "within": s.within, "within_interval": interval(s.within_draws)}
            for s in sorted(found, key=lambda s: -abs(s.within) if s.within == s.within else 0)
        ]  # fmt: skip
        level[time] = chance(found)
        there = np.isfinite(pairs.signals.get(f"{time}:cosine", np.full(len(pairs), np.nan)))
        if time != FINAL and there.sum() >= FEWEST:
            early[time] = _early(pairs.part(there), time)
    return _plain({
        "operator": operator, "target": target, "rows": len(pairs),
        "without_partner": pairs.without_partner, "adapters": len({*pairs.victim, *pairs.partner}),
        "families": int(pairs.families.max() + 1),
        "seeds": len({*pairs.victim_seed, *pairs.partner_seed}),
        "noise": noise, "seed_noise": seed_noise(pairs), "domain_share": domain_share(pairs),
        "splits": {s: _scored(pairs, s, predictors(pairs)) for s in SPLITS},
        "signals": single, "chance": level, "early": early,
        "left_out": left_out(Path(run_dir) / NAME),
    })  # fmt: skip


def _early(pairs: Pairs, time: str) -> dict[str, Any]:
    baselines = [p for p in predictors(pairs) if p.name in (PAIR_MEAN, METADATA, NAMES, ALL)]
    late = [replace(p, name=f"{FINAL}: {p.name}") if p.name == ALL else p for p in baselines]
    chosen = late + [replace(p, name=f"{time}: {p.name}") for p in predictors(pairs, time)
                     if p.name in (ALL, BOTH, WEIGHTS, NORM)]  # fmt: skip
    return {"rows": len(pairs), **{s: _scored(pairs, s, chosen) for s in EARLY}}


def _scored(pairs: Pairs, split: Split, chosen: Iterable[Predictor]) -> list[dict[str, Any]]:
    try:
        found = scores(pairs, split, chosen)
    except InputError as error:  # one domain or one seed: nothing is left to learn from
        return [{"name": str(error)}]
    out = []
    for name, s in found.items():
        out.append({
            "name": name, "rows": s.rows, "rho": s.rho, "rho_interval": interval(s.rho_draws),
            "within": s.within, "within_interval": interval(s.within_draws),
            "error": s.error, "r2": s.r2, "auc": s.auc,
        })  # fmt: skip
        for key, base in _BASELINES:
            other, itself = found[base], name == base
            out[-1][key] = None if itself else s.rho - other.rho
            out[-1][f"{key}_interval"] = interval(s.rho_draws - other.rho_draws)
            out[-1][f"within_{key}"] = None if itself else s.within - other.within
            out[-1][f"within_{key}_interval"] = interval(s.within_draws - other.within_draws)
    return out


def _fraction(time: str) -> float:
    """How late a time of training is."""
    return np.inf if time == FINAL else float(time.removeprefix("at").removesuffix("%"))


def _plain(value: Any) -> Any:
    """The same with what JSON knows."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def noise_floor(pairs: Pairs) -> dict[str, float]:
    """How much of a label's variance is not noise of the test items: 1 - mean se^2 / variance.

    ``reliability`` overall and inside a directed domain pair ("_within"); sd, se: root mean square.
    Below 0: the labels scatter less than their standard errors say. NaN where they do not differ.
    """
    inside = pairs.y - _cell_means(pairs)
    noise = float(np.mean(np.square(pairs.se)))
    freedom = len(pairs) - (pairs.cell.max() + 1)
    variance = float(np.var(pairs.y, ddof=1))
    left = float(np.square(inside).sum() / freedom) if freedom else np.nan
    found = {"rows": len(pairs), "sd": variance**0.5, "sd_within": left**0.5, "se": noise**0.5}
    for name, of in (("reliability", variance), ("reliability_within", left)):
        found[name] = 1 - noise / of if of > 0 else np.nan
    return found


def _cell_means(pairs: Pairs) -> np.ndarray:
    cell = pairs.cell
    return (np.bincount(cell, pairs.y) / np.bincount(cell))[cell]


def seed_noise(pairs: Pairs) -> dict[str, dict[str, float]]:
    """How much a label moves when an adapter is trained again with other seeds.

    Other seeds are another start, other items to learn from, in another order, or all of them.
    By the side that was trained again, "victim" or "partner", the other one being the same:
    groups, rows in them, the pooled standard deviation ``sd``, and ``share``, its square over the
    variance within a directed domain pair: of what a predictor of recipes can never know.
    """
    left = noise_floor(pairs)["sd_within"] ** 2
    sides = {"victim": (pairs.victim_family, pairs.partner),
             "partner": (pairs.partner_family, pairs.victim)}  # fmt: skip
    out = {}
    for side, (families, other) in sides.items():
        groups: dict[tuple[str, str], list[float]] = {}
        for key, y in zip(zip(families, other, strict=True), pairs.y, strict=True):
            groups.setdefault(key, []).append(y)
        several = [np.array(g) for g in groups.values() if len(g) > 1]
        freedom = sum(len(g) - 1 for g in several)
        total = sum(float(np.square(g - g.mean()).sum()) for g in several)
        square = total / freedom if freedom else np.nan
        out[side] = {"groups": len(several), "rows": sum(map(len, several)),
                     "sd": float(square**0.5),
                     "share": float(square / left) if left > 0 else np.nan}  # fmt: skip
    return out


def domain_share(pairs: Pairs) -> float:
    """Share of the variance of the labels' ranks that directed domain pairs explain.

    Adjusted for how many there are (Theil's R2): about 0 where they say nothing, or below. NaN
    where each label has a domain pair of its own.
    """
    ranks = replace(pairs, y=rankdata(pairs.y))
    freedom, total = len(pairs) - (pairs.cell.max() + 1), np.var(ranks.y) * len(pairs)
    if not freedom or not total:
        return float("nan")
    left = np.square(ranks.y - _cell_means(ranks)).sum()
    return float(1 - left / freedom / (total / (len(pairs) - 1)))


@dataclass(frozen=True, eq=False)
class Signal:
    """Rank correlations of one signal with the labels, and their resamples over families."""

    name: str
    rows: int
    rho: float
    within: float
    rho_draws: np.ndarray
    within_draws: np.ndarray


def signals(pairs: Pairs, names: Sequence[str]) -> list[Signal]:
    """Spearman's of each signal, overall and inside the directed domain pairs."""
    weights = resampled(pairs)
    cell, out = pairs.cell, []
    for name in names:
        x = pairs.signals[name]
        known = np.isfinite(x)
        if known.sum() < 10 or np.ptp(x[known]) == 0:
            continue
        y = np.where(known, pairs.y, np.nan)
        rx, ry = rankdata(x[known]), rankdata(y[known])
        a, b = centred_ranks(x, cell), centred_ranks(y, cell)
        out.append(Signal(
            name, int(known.sum()),
            float(correlation(rx, ry)[0]), float(correlation(a, b, centre=False)[0]),
            correlation(rx, ry, weights[:, known]), correlation(a, b, weights, centre=False),
        ))  # fmt: skip
    return out


def chance(found: Sequence[Signal]) -> float:
    """The |within| that the best of these signals reaches by chance once in 20 times.

    Of the largest distance of any signal from its own value, families drawn anew: rows that share
    an adapter move together, and signals that are alike too, as they do in truth (Romano & Wolf
    2005). NaN where no domain pair has three different labels.
    """
    draws = [np.abs(s.within_draws - s.within) for s in found if np.isfinite(s.within)]
    if not draws:
        return float("nan")
    moved = np.array(draws)
    moved = moved[:, np.isfinite(moved).any(axis=0)]
    return float(np.quantile(np.nanmax(moved, axis=0), 0.95)) if moved.size else float("nan")
