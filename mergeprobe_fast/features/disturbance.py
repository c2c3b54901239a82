"""Pair features of what updates do to the inputs, outputs and loss of an adapter's own domain.

Everything is measured at the base model's modules, with the calibration of the domain of a (``_a``,
``a_by_b``: a is the victim) or of b. C = X^T X / T is the second moment of the inputs there,
uncentred unless it says so: ||W||_C^2 = tr(W C W^T) = mean of ||W x||^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergeprobe_fast.features.declare import (
    FISHER,
    KFAC,
    MEAN_OUTPUT,
    OUTPUT,
    OUTPUT_HSIC,
    OUTPUT_RELATIVE,
    Feature,
    Need,
    OnDomain,
    Sums,
    ratio,
)
from mergeprobe_fast.recorded import Recorded, lacks_calibration, lacks_output_moments

Missing = Callable[[Recorded], str | None]


def _gradients(recorded: Recorded) -> str | None:
    if recorded.calibration is None or not recorded.calibration.has_gradients:
        return "a calibration with gradients"
    return None


def _on(s: Sums, side: str, need: Need) -> OnDomain:
    """The sums on the domain of a or b, NaN where either delta is zero or missing."""
    on = s.on_a(need) if side == "a" else s.on_b(need)
    both = (s.energy_a > 0) & (s.energy_b > 0)
    return OnDomain(*(np.where(both, x, np.nan) for x in on))


def _both(make: Callable[[str, str, str], Feature]) -> tuple[Feature, Feature]:
    """A feature of victim a with partner b, and its twin. ``make`` gets victim, partner, twin."""
    return make("a", "b", "b"), make("b", "a", "a")


def _cross_to_self(
    name: str, title: str, norm: str, need: Need, missing: Missing, extra: str = "",
    **options: Any,
) -> tuple[Feature, Feature]:
    def make(victim: str, partner: str, _: str) -> Feature:
        def finish(s: Sums) -> np.ndarray:
            on = _on(s, victim, need)
            return np.sqrt(ratio(on.other, on.own))

        return Feature(
            f"{name}_{victim}_by_{partner}", f"{title}, {victim} by {partner}",
            f"||W_{partner}|| / ||W_{victim}|| in the norm of {norm} on {victim}'s domain: above "
            f"1, {partner} does more there than {victim} itself.{extra}",
            finish, (need,), 0.0, None, None, "1 for updates of one size",
            directed_twin=f"{name}_{partner}_by_{victim}", source="OSRM's interference, over self",
            missing=missing, **options,
        )  # fmt: skip

    return _both(make)


def _cosine(
    name: str, title: str, what: str, need: Need, missing: Missing, null: str, source: str,
    **options: Any,
) -> tuple[Feature, Feature]:
    def make(victim: str, _: str, twin: str) -> Feature:
        def finish(s: Sums) -> np.ndarray:
            on = _on(s, victim, need)
            return ratio(on.dot, np.sqrt(on.own) * np.sqrt(on.other))

        return Feature(
            f"{name}_{victim}", f"{title} on {victim}'s domain", what.format(domain=victim), finish,
            (need,), -1.0, 1.0, 0.0, null, directed_twin=f"{name}_{twin}", source=source,
            bounded=(-1.0, 1.0), missing=missing, **options,
        )  # fmt: skip

    return _both(make)


def _disturbance(victim: str, partner: str, _: str) -> Feature:
    def finish(s: Sums) -> np.ndarray:
        count = s.modules_b if partner == "b" else s.modules_a
        return np.sqrt(ratio(_on(s, victim, OUTPUT_RELATIVE).other, count))

    return Feature(
        f"disturbance_{victim}_by_{partner}", f"Disturbance of {victim} by {partner}",
        f"Root mean square over {partner}'s modules of how much {partner} changes their outputs on "
        f"{victim}'s domain: sqrt(mean ||W_{partner} x||^2 / mean ||W_0 x||^2), the base module's "
        "output with its bias.",
        finish, (OUTPUT_RELATIVE,), 0.0, None, None, "",
        directed_twin=f"disturbance_{partner}_by_{victim}", source="OSRM's interference, over base",
        missing=lacks_output_moments,
    )  # fmt: skip


_SPREAD = "0, with variance 1 / (d_out effective dimension of C)"

FEATURES = (
    *_cross_to_self(
        "cross_to_self", "Cross to self",
        "outputs, each module's mean ||W x||^2 divided by the base module's mean ||W_0 x||^2",
        OUTPUT_RELATIVE, lacks_output_moments,
    ),
    *_cross_to_self(
        "cross_to_self_raw", "Cross to self, raw",
        "outputs, mean ||W x||^2 summed over modules as it is", OUTPUT, lacks_calibration,
        " Modules with large inputs count most.",
    ),
    *_both(_disturbance),
    *_cosine(
        "activation_cosine", "Activation cosine",
        "Cosine of the outputs that the two updates add, mean of W_a x . W_b x over their root "
        "mean squares, on the samples of {domain}'s domain (not centred).",
        OUTPUT, lacks_calibration, _SPREAD, "standard",
    ),
    *_cosine(
        "drift_cka", "Drift CKA",
        "Similarity of the outputs that the two updates add to the samples of {domain}'s domain, "
        "up to a rotation of the output: linear CKA, centred, with the unbiased HSIC (which can be "
        "below 0). Needs 4 samples.",
        OUTPUT_HSIC, lacks_calibration, "0", "CKA (Kornblith 2019) with the HSIC of Song 2012",
    ),
    *_cosine(
        "mean_activation_cosine", "Mean activation cosine",
        "Cosine of W_a m and W_b m, where m is the mean input of the samples of {domain}'s domain.",
        MEAN_OUTPUT, lacks_calibration, "0, with variance 1 / d_out",
        "2601.22285, module by module",
    ),
    *_cosine(
        "kfac_cosine_base", "K-FAC cosine",
        "Cosine of the two updates in the K-FAC metric of {domain}'s domain, tr(W_a^T K W_b C) "
        "with K the second moment of the output gradients: in units of the loss's curvature.",
        KFAC, _gradients, "0", "K-FAC (Martens and Grosse 2015)",
    ),
    *_cross_to_self(
        "kfac_cross_to_self_base", "K-FAC cross to self",
        "K-FAC, tr(W^T K W C) with the second moment K of the output gradients", KFAC, _gradients,
    ),
    *_cosine(
        "rank1_fisher_cosine_base", "Rank-1 Fisher cosine",
        "Cosine of the two updates with each entry weighted by mean y_o^2 mean x_d^2, of the "
        "output gradients and inputs on {domain}'s domain.",
        FISHER, _gradients, "0", "factored second moments (Adafactor)", by_default=False,
    ),
    *_cross_to_self(
        "rank1_fisher_cross_to_self_base", "Rank-1 Fisher cross to self",
        "entries weighted by mean y_o^2 mean x_d^2", FISHER, _gradients, by_default=False,
    ),
)  # fmt: skip
