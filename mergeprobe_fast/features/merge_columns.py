"""Numbers about a merge and one of its members i: what D = M - W_i, which it adds, does to i.

For a plain sum of two, D is the other one's update; for any other operator, set or weights it is
whatever has become of the rest. So they mean the same for every merge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergeprobe_fast.features.declare import ratio
from mergeprobe_fast.features.merge_declare import (
    LEVELS,
    AtPoint,
    Level,
    MemberValues,
    MergeColumn,
    OwnColumn,
    Products,
)
from mergeprobe_fast.features.spectrum import SPECTRUM


def _root(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.sqrt(ratio(np.maximum(numerator, 0.0), denominator))


def _cosine(product: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum(one, 0.0)) * np.sqrt(np.maximum(other, 0.0))
    return np.clip(ratio(product, size), -1.0, 1.0)


def _geometry(
    pick: Callable[[MemberValues], Products], level: Level, suffix: str, where: str
) -> tuple[MergeColumn, ...]:
    def of(finish: Callable[[Products], np.ndarray]) -> Callable[[MemberValues], np.ndarray]:
        return lambda v: finish(pick(v))

    return (
        MergeColumn(
            f"change_to_self{suffix}", f"Size of what is added{where}, over the member's",
            f"|D| / |W_i|{where}. 0: the merge is the member.", level,
            of(lambda p: _root(p.change, p.own)), 0.0,
        ),
        MergeColumn(
            f"change_cosine{suffix}", f"Cosine of what is added{where} and the member",
            f"cos(D, W_i){where}. -1: the merge only shrinks the member.", level,
            of(lambda p: _cosine(p.change_cross, p.change, p.own)), -1.0, 1.0,
        ),
        MergeColumn(
            f"merged_to_self{suffix}", f"Size of the merge{where}, over the member's",
            f"|M| / |W_i|{where}.", level, of(lambda p: _root(p.merged, p.own)), 0.0,
        ),
        MergeColumn(
            f"merged_cosine{suffix}", f"Cosine of the merge{where} and the member",
            f"cos(M, W_i){where}.", level,
            of(lambda p: _cosine(p.cross, p.merged, p.own)), -1.0, 1.0,
        ),
        MergeColumn(
            f"kept{suffix}", f"Share of the member in the merge{where}",
            f"<M, W_i> / |W_i|^2{where}: by how much the merge still does what the member does.",
            level, of(lambda p: ratio(p.cross, p.own)),
        ),
        MergeColumn(
            f"foreign{suffix}", f"What is added{where} across the member, over the member's size",
            f"|D - <D, W_i> W_i / |W_i|^2| / |W_i|{where}.", level,
            of(lambda p: _root(p.change - ratio(p.change_cross**2, p.own), p.own)), 0.0,
        ),
    )  # fmt: skip


def _at_point(
    pick: Callable[[MemberValues], AtPoint], name: str, what: str
) -> tuple[MergeColumn, ...]:
    def of(
        finish: Callable[[AtPoint, np.ndarray], np.ndarray]
    ) -> Callable[[MemberValues], np.ndarray]:
        return lambda v: finish(pick(v), v.gain)

    return (
        MergeColumn(
            f"first_order_{name}", f"First-order effect on {what}, of the gain",
            f"Derivative of the loss of {what} along D, labels the data's, over i's gain.",
            "points", of(lambda p, gain: p.first / gain),
        ),
        MergeColumn(
            f"curvature_{name}", f"Curvature of {what} along D, of the gain",
            f"Half the Fisher's quadratic form of D, labels drawn from the model: {what}, over "
            "i's gain.", "points", of(lambda p, gain: p.curvature / gain), 0.0,
        ),
        MergeColumn(
            f"absolute_curvature_{name}", f"Curvature of {what}, robust, of the gain",
            "The same with the squared mean of absolute derivatives for the mean of squares: one "
            "text cannot rule it.", "points", of(lambda p, gain: p.absolute / gain), 0.0,
        ),
        MergeColumn(
            f"observed_curvature_{name}", f"Curvature of {what}, data's labels, of the gain",
            "The same as curvature with the labels of the data (empirical Fisher).", "points",
            of(lambda p, gain: p.observed / gain), 0.0,
        ),
        MergeColumn(
            f"fisher_to_self_{name}", f"Length of D on {what}, over the member's",
            f"Root of the ratio of the Fisher's quadratic forms of D and W_i: {what}.", "points",
            of(lambda p, gain: _root(p.curvature, p.self_curvature)), 0.0,
        ),
        MergeColumn(
            f"fisher_cosine_{name}", f"Fisher cosine of D and the member, {what}",
            f"In the Fisher metric of {what}.", "points",
            of(lambda p, gain: _cosine(p.with_self / 2, p.curvature, p.self_curvature)), -1.0, 1.0,
        ),
    )  # fmt: skip


_IN = " on the member's inputs"
_COLUMNS = (
    MergeColumn("size", "Members", "How many adapters are merged.", "weights",
                lambda v: v.size, 1.0),
    *_geometry(lambda v: v.weights, "weights", "", ""),
    *_geometry(lambda v: v.inputs, "calibration", "_inputs", _IN),
    MergeColumn(
        "error", "Retention error",
        "e_i = |M - W_i|^2 / |W_i|^2 on the inputs of i's domain, every module over the base "
        "module's output energy.", "calibration",
        lambda v: ratio(v.inputs.change, v.inputs.own), 0.0,
    ),
    MergeColumn(
        "error_raw", "Retention error, modules as they are",
        "The same without weighing modules.", "calibration",
        lambda v: ratio(v.raw.change, v.raw.own), 0.0,
    ),
    MergeColumn(
        "disturbance", "Disturbance of the base outputs by what is added",
        "|D| on i's inputs over the base modules' outputs there (root of the sum over modules).",
        "calibration", lambda v: np.sqrt(np.maximum(v.inputs.change, 0.0)), 0.0,
    ),
    MergeColumn(
        "outside", "Of the merge, what no combination of the members has",
        "|M - sum_j c_j W_j| / |W_i| on i's inputs at the best c. 0 for sums with weights.",
        "calibration", lambda v: _root(v.outside, v.inputs.own), 0.0,
    ),
    *_at_point(lambda v: v.trained, "trained", "the trained member"),
    *_at_point(lambda v: v.base, "base", "the base model"),
    MergeColumn(
        "damage_trained", "Predicted damage",
        "First-order effect and curvature at the trained member together: the share of its gain "
        "that D undoes, to second order.", "points",
        lambda v: (v.trained.first + v.trained.curvature) / v.gain,
    ),
    MergeColumn(
        "damage_base", "Predicted loss against the base's",
        "What M does to the base's loss beyond what W_i does, to second order at the base, over "
        "i's gain.", "points",
        lambda v: (v.base.first + v.base.curvature + v.base.with_self) / v.gain,
    ),
)  # fmt: skip
MERGE_FEATURES: dict[str, MergeColumn] = {c.name: c for c in _COLUMNS}

# Of single adapters, by the names of ``mergeprobe_fast.adapter_features``.
OWN = (
    *(OwnColumn(f.name, f.title, "weights") for f in SPECTRUM if f.by_default),
    OwnColumn("drift", "Drift", "calibration"),
    OwnColumn("self_disturbance", "Own disturbance", "calibration"),
    OwnColumn("self_disturbance_median", "Own disturbance, median channel", "calibration"),
    OwnColumn("drift_effective_rank", "Effective rank of the drift", "calibration"),
    OwnColumn("drift_top_share", "Share of the drift's first direction", "calibration"),
    OwnColumn("base_loss", "Base loss", "points", beside=False),
    OwnColumn("trained_loss", "Own loss", "points", beside=False),
    OwnColumn("gain", "Gain", "points"),
    OwnColumn("self_first_order_trained", "Own first-order effect, trained", "points"),
    OwnColumn("self_curvature_trained", "Own curvature, trained", "points"),
)
MEMBER, OTHERS = "member_", "others_"


def level_columns(level: Level) -> tuple[str, ...]:
    """The columns of a level: its own and those of the levels before it.

    ``member_...`` are an adapter's own numbers; ``others_...`` their mean over the other members,
    each counting with the square of what it is multiplied with times its size (on the member's
    inputs, where these are known).
    """
    upto = LEVELS[: LEVELS.index(level) + 1]
    return (
        *(c.name for c in _COLUMNS if c.level in upto),
        *(
            f"{side}{c.name}" for side in (MEMBER, OTHERS) for c in OWN
            if c.level in upto and (c.beside or side == MEMBER)
        ),
    )  # fmt: skip
