"""Regressions on chosen columns: baselines that know the recipes, and what signals add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import ADAPTER_FEATURES, subspace, weights

from . import models
from .pairs import EXAM, Pairs
from .splits import Predicted, Score, Split, held_out, score

MEAN, PAIR_MEAN = "mean of all labels", "domain pair, its mean"
METADATA, NAMES = "training metadata + domains, trees", "which adapters + domains, ridge"
ALL, BOTH = "all signals + domains, trees", "all signals + metadata + domains, trees"
RECIPE, PHYSICAL = "training metadata, trees", "physics + domains, ridge"
WEIGHTS, NORM = "weights + domains, trees", "norm ratio alone"
_DAMAGE = (
    "damage_trained_a_by_b", "curvature_share_trained_a_by_b", "first_order_trained_a_by_b",
    "curvature_trained_a_by_b", "effect_trained_a_by_b", "damage_base_a_by_b",
    "first_order_base_a_by_b", "curvature_base_a_by_b", "cross_to_self_a_by_b",
    "cross_to_self_raw_a_by_b", "disturbance_a_by_b", "base_loss_a", "gain_a",
)  # fmt: skip
PHYSICS = tuple(f"final:{name}" for name in _DAMAGE)
_WEIGHTS = {
    *(f.name for f in (*weights.FEATURES, *subspace.FEATURES)), "norm_b_to_a",
    *(f"{name}_{side}" for name in ADAPTER_FEATURES for side in "ab"),
}  # fmt: skip


@dataclass(frozen=True)
class Predictor:
    """A regression on some columns of pairs."""

    name: str
    model: models.Model
    signals: tuple[str, ...] = ()
    metadata: bool = False
    domains: bool = False
    names: bool = False

    def design(self, pairs: Pairs) -> np.ndarray:
        """(n, columns), NaN where undefined. Nothing in it comes from a label."""
        columns = [pairs.cell] if self.model is models.cell_mean else []
        columns += [pairs.signals[name] for name in self.signals]
        if self.metadata:  # an exam tells the domain too
            columns += [column for name, column in pairs.metadata.items()
                        if self.domains or not name.startswith(EXAM)]  # fmt: skip
        told = [pairs.victim_domain, pairs.partner_domain] if self.domains else []
        told += [*pairs.families.T] if self.names else []
        columns += [side == value for side in told for value in np.unique(side)]
        return np.array(columns, np.float64).reshape(-1, len(pairs)).T


def predict(pairs: Pairs, predictor: Predictor, split: Split) -> Predicted:
    """Predictions of all rows, each by models that saw nothing of what is held out with it.

    Raises:
        InputError: a split that leaves nothing to learn from.
    """
    x, families = predictor.design(pairs), pairs.families
    fold, value = np.zeros(len(pairs), np.int64), np.empty(len(pairs))
    for number, (test, gone) in enumerate(held_out(pairs, split)):
        left = ~gone
        if np.count_nonzero(left) < 3:
            raise InputError(f"leaves {np.count_nonzero(left)} rows to learn from", key=split)
        value[test] = predictor.model(x[left], pairs.y[left], families[left], x[test])
        fold[test] = number
    return Predicted(fold, value)


def predictors(pairs: Pairs, prefix: str = "final") -> list[Predictor]:
    """Baselines first, then what signals of one time of training add.

    One baseline knows which adapters meet and nothing of them: what it earns, a signal of single
    adapters can earn by telling them apart, whatever it means.
    Those whose columns the pairs do not have (no calibration) are left out.
    """
    every = tuple(n for n in pairs.signals if n.startswith(f"{prefix}:"))
    physics = tuple(n.replace("final:", f"{prefix}:") for n in PHYSICS)
    of_weights = tuple(n for n in every if is_of_weights(n))
    chosen = [
        Predictor(MEAN, models.mean),
        Predictor(PAIR_MEAN, models.cell_mean, domains=True),
        Predictor(RECIPE, models.trees, metadata=True),
        Predictor("training metadata + domains, ridge", models.ridge, metadata=True, domains=True),
        Predictor(METADATA, models.trees, metadata=True, domains=True),
        Predictor(NAMES, models.ridge, domains=True, names=True),
        Predictor("cosine alone", models.ridge, (f"{prefix}:cosine",)),
        Predictor(NORM, models.ridge, (f"{prefix}:norm_b_to_a",)),
        Predictor("damage_trained alone", models.ridge, (f"{prefix}:damage_trained_a_by_b",)),
        Predictor("physics, ridge", models.ridge, physics),
        Predictor(PHYSICAL, models.ridge, physics, domains=True),
        Predictor("physics + domains, trees", models.trees, physics, domains=True),
        Predictor(WEIGHTS, models.trees, of_weights, domains=True),
        Predictor("all signals + domains, ridge", models.ridge, every, domains=True),
        Predictor(ALL, models.trees, every, domains=True),
        Predictor(BOTH, models.trees, every, True, True),
    ]  # fmt: skip
    return [p for p in chosen if all(n in pairs.signals for n in p.signals)]


def is_of_weights(name: str) -> bool:
    """Whether a signal needs neither calibration nor probes."""
    return name.partition(":")[2].partition(".")[0] in _WEIGHTS


def scores(pairs: Pairs, split: Split, chosen: Iterable[Predictor]) -> dict[str, Score]:
    """The score of each predictor, by name."""
    return {p.name: score(pairs, predict(pairs, p, split)) for p in chosen}
