"""Pair features of weight space."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.features.declare import DOT, Feature, Sums, ratio


def _cosine(s: Sums) -> np.ndarray:
    return ratio(s.need[DOT], np.sqrt(s.energy_a) * np.sqrt(s.energy_b))


def _cosine_z(s: Sums) -> np.ndarray:
    return ratio(s.need[DOT], np.sqrt(s.null_variance))


def _norm_ratio(s: Sums) -> np.ndarray:
    low, high = np.minimum(s.energy_a, s.energy_b), np.maximum(s.energy_a, s.energy_b)
    return np.sqrt(ratio(low, np.where(low > 0, high, 0.0)))


def _over_amplification(s: Sums) -> np.ndarray:
    both = (s.energy_a > 0) & (s.energy_b > 0)
    return ratio(2 * s.need[DOT], np.where(both, s.energy_a + s.energy_b, 0.0))


FEATURES = (
    Feature(
        "cosine", "Cosine",
        "Cosine of the two whole updates, <W_a, W_b> / (|W_a| |W_b|) over all modules of either; "
        "an absent module counts as zero. Positive: they push the weights the same way.",
        _cosine, (DOT,), -1.0, 1.0, 0.0, "0, with variance 1/(d_out d_in)",
        source="standard", bounded=(-1.0, 1.0),
    ),
    Feature(
        "cosine_z", "Cosine, in chance deviations",
        "The inner product divided by its standard deviation for updates of the same norms that "
        "point in independent random directions. Beyond 4 or so it is not chance.",
        _cosine_z, (DOT,), None, None, 0.0, "0, standard deviation 1",
        source="normal null of a random direction",
    ),
    Feature(
        "norm_ratio", "Norm ratio",
        "Smaller over larger Frobenius norm. Far below 1, the larger update drowns the smaller.",
        _norm_ratio, (), 0.0, 1.0, None, "", source="standard",
    ),
    Feature(
        "over_amplification", "Over-amplification",
        "|W_a + W_b|^2 / (|W_a|^2 + |W_b|^2) - 1. Above 0 the sum is larger than independent "
        "updates would make it (they over-amplify), below 0 they cancel.",
        _over_amplification, (DOT,), -1.0, 1.0, 0.0, "0", source="ours",
        bounded=(-1.0, 1.0),
    ),
    Feature(
        "shared_energy_a", "Shared energy of a",
        "Share of a's squared norm that lies in modules which b adapts too.",
        lambda s: ratio(s.shared_energy_a, s.energy_a), (), 0.0, 1.0, None, "",
        per_module=False, directed_twin="shared_energy_b", source="ours",
    ),
    Feature(
        "shared_energy_b", "Shared energy of b",
        "Share of b's squared norm that lies in modules which a adapts too.",
        lambda s: ratio(s.shared_energy_b, s.energy_b), (), 0.0, 1.0, None, "",
        per_module=False, directed_twin="shared_energy_a", source="ours",
    ),
)  # fmt: skip
