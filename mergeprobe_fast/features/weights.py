"""Pair features of weight space."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.features.declare import (
    DOT,
    IN_CHANNELS,
    OUT_CHANNELS,
    Feature,
    Need,
    Sums,
    ratio,
)


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


def _angle(s: Sums) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(_cosine(s), -1.0, 1.0)))


def _both_alive(s: Sums, values: np.ndarray) -> np.ndarray:
    return np.where((s.energy_a > 0) & (s.energy_b > 0), values, np.nan)


def _gain(s: Sums) -> np.ndarray:
    square = np.maximum(s.energy_a + s.energy_b + 2 * s.need[DOT], 0.0)
    return np.sqrt(ratio(square, _both_alive(s, np.maximum(s.energy_a, s.energy_b))))


def stacked_ratio(s: Sums) -> np.ndarray:
    """Smaller over larger singular value of the matrix with the rows vec(W_a) and vec(W_b).

    Of its Gram [[a, g], [g, b]] the eigenvalues are (a + b +- sqrt((a - b)^2 + 4 g^2)) / 2; their
    product is a b - g^2, which loses less than the difference of the two terms.
    """
    top = _both_alive(s, np.maximum(s.energy_a, s.energy_b))
    a, b, g = ratio(s.energy_a, top), ratio(s.energy_b, top), ratio(s.need[DOT], top)
    large = (a + b + np.sqrt((a - b) ** 2 + 4 * g**2)) / 2
    return np.sqrt(np.maximum(a * b - g**2, 0.0)) / large


def stacked_effective_rank(s: Sums) -> np.ndarray:
    """exp of the entropy of the two singular values over their sum."""
    r = stacked_ratio(s)
    p, q = 1 / (1 + r), r / (1 + r)
    return np.exp(-p * np.log(p) - np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0)), q))


def stacked_stable_rank(s: Sums) -> np.ndarray:
    """(sum sigma)^2 / sum sigma^2 of the two."""
    r = stacked_ratio(s)
    return (1 + r) ** 2 / (1 + r**2)


def _channels(name: str, title: str, what: str, need: Need) -> Feature:
    def finish(s: Sums) -> np.ndarray:
        own = s.own[need]
        return ratio(s.need[need], np.sqrt(own[0]) * np.sqrt(own[1]))

    return Feature(
        name, title, f"Cosine of the two profiles of {what} energies, the squared norms of the "
        f"{'rows' if need is OUT_CHANNELS else 'columns'} of W_a and of W_b: do they change the "
        "same channels, whatever the signs.",
        finish, (need,), 0.0, 1.0, None,
        "1 / sqrt((1 + 2 / participation_a) (1 + 2 / participation_b))", source="standard",
        bounded=(0.0, 1.0), by_default=False,
    )  # fmt: skip


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
    Feature(
        "dot", "Inner product", "<W_a, W_b>, of the updates as they are.",
        lambda s: _both_alive(s, s.need[DOT]), (DOT,), None, None, 0.0,
        "0, with variance |W_a|^2 |W_b|^2 / (d_out d_in)", source="standard", by_default=False,
    ),
    Feature(
        "angle", "Angle", "Arc cosine of the cosine, in degrees.", _angle, (DOT,), 0.0, 180.0,
        90.0, "90, with standard deviation 57.3 / sqrt(d_out d_in)", source="standard",
        by_default=False,
    ),
    Feature(
        "norm_gain", "Norm gain",
        "|W_a + W_b| over the larger of the two norms: 2 for twins, below 1 where the sum is "
        "smaller than one of them.",
        _gain, (DOT,), 0.0, 2.0, None, "sqrt(1 + norm_ratio^2)", source="ours",
        bounded=(0.0, 2.0), by_default=False,
    ),
    Feature(
        "stacked_singular_ratio", "Singular ratio of the stacked pair",
        "Smaller over larger singular value of the matrix with the two rows vec(W_a), vec(W_b). "
        "Like the two after it a function of cosine and norm_ratio alone. Below 5e-4 it is "
        "rounding.",
        stacked_ratio, (DOT,), 0.0, 1.0, None, "norm_ratio", source="2601.22285",
        bounded=(0.0, 1.0), by_default=False,
    ),
    Feature(
        "stacked_effective_rank", "Effective rank of the stacked pair",
        "exp of the entropy of the two singular values over their sum, of the matrix with the two "
        "rows vec(W_a), vec(W_b): 1 for multiples of one update, 2 for orthogonal ones of one "
        "norm.",
        stacked_effective_rank, (DOT,), 1.0, 2.0, None, "2 for updates of one norm",
        source="2601.22285", bounded=(1.0, 2.0), by_default=False,
    ),
    Feature(
        "stacked_stable_rank", "Stable rank of the stacked pair",
        "(sum sigma)^2 / sum sigma^2 of the same two singular values. Not the stable rank of a "
        "matrix.",
        stacked_stable_rank, (DOT,), 1.0, 2.0, None, "2 for updates of one norm",
        source="2601.22285", bounded=(1.0, 2.0), by_default=False,
    ),
    _channels("out_channel_cosine", "Output channels", "output channel", OUT_CHANNELS),
    _channels("in_channel_cosine", "Input channels", "input channel", IN_CHANNELS),
)  # fmt: skip
