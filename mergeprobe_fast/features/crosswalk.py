"""The pair metrics of other tools by their own names, and which columns here say the same.

Sources: "2601.22285", the 28 metrics of the paper (its METRIC_REGISTRY, read in the public
repository Rose-STL-Lab/demystifying-mergeability), and "gradience", those of gradience 0.11's merge
reports and audits. Where a metric is not well posed for low-rank updates, the closest form that is
takes its place, and the remark says in what it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mergeprobe_fast.engine.work import canonical_work, gram_work
from mergeprobe_fast.features import crosswalk_tiles as tiles
from mergeprobe_fast.features import gradients, weights
from mergeprobe_fast.features.declare import (
    DOT,
    MEAN_OUTPUT,
    Family,
    Feature,
    OnDomain,
    PairColumn,
    Sums,
    ratio,
)
from mergeprobe_fast.recorded import Recorded, lacks_calibration

PAPER, GRADIENCE = "2601.22285", "gradience"


@dataclass(frozen=True)
class Crossing:
    """A metric of another tool.

    ``ours``: the columns here that say the same, empty where there are none; ``remark``: in what
    they differ, or why it is not offered. ``declared``, with its ``family`` where it is a column of
    one, computes it under their name; None: it is not offered, or belongs to adapters.
    """

    name: str
    of: Literal["pair", "adapter"]
    ours: tuple[str, ...]
    remark: str
    declared: Feature | PairColumn | None = None
    family: Family | None = None

    @property
    def offered(self) -> bool:
        """There is a column for it here."""
        return self.declared is not None or bool(self.ours)


def _nothing_missing(recorded: Recorded) -> str | None:
    return None


def _alive(s: Sums, values: np.ndarray) -> np.ndarray:
    return np.where((s.energy_a > 0) & (s.energy_b > 0), values, np.nan)


def _distance(s: Sums) -> np.ndarray:
    return np.sqrt(np.maximum(_alive(s, s.energy_a + s.energy_b - 2 * s.need[DOT]), 0.0))


_OURS = {f.name: f for f in weights.FEATURES}


def _same(name: str, ours: str, remark: str) -> Crossing:
    """One of our features over whole updates under their name."""
    declared = replace(
        _OURS[ours], name=name, per_module=False, source=PAPER, directed_twin=None, by_default=False
    )
    return Crossing(name, "pair", (ours,), remark, declared)


def _of_weights(
    name: str, title: str, definition: str, finish: Callable[[Sums], np.ndarray],
    ours: Sequence[str], remark: str, low: float | None = None, high: float | None = None,
    null_text: str = "", over: Callable[[Sums], np.ndarray] | None = None,
) -> Crossing:  # fmt: skip
    declared = Feature(
        name, title, definition, finish, (DOT,), low, high, None, null_text, per_module=False,
        source=PAPER, by_default=False, over_modules=over,
    )  # fmt: skip
    return Crossing(name, "pair", tuple(ours), remark, declared)


def _score(s: Sums) -> np.ndarray:
    return 2.0 - weights.stacked_effective_rank(s)


def _both_norms(s: Sums) -> np.ndarray:
    return np.sqrt(s.energy_a) + np.sqrt(s.energy_b)


def _table(key: str) -> Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray]:
    return lambda data, a, b: data[key][a, b]


def _columns(
    family: Family, made: Sequence[tuple[PairColumn, tuple[str, ...], str]]
) -> list[Crossing]:
    """Crossings of a family's columns, which are given with ours and the remarks."""
    whole = replace(family, pairs=tuple(c for c, _, _ in made))
    return [Crossing(c.name, "pair", ours, remark, c, whole) for c, ours, remark in made]


_K = (
    "k is at most 10, as theirs, and at most the smaller numerical rank: beyond it the singular "
    "vectors of a low-rank update are arbitrary"
)
_TOPS = "ours are mean squares, over the vectors of all modules together"
_ROOT = "root mean squared cosine between the {which} k {side} singular vectors, mean over modules"


def _overlap(name: str, title: str, key: str, which: str, side: str, power: str) -> PairColumn:
    words = _ROOT.format(which=which, side=side)
    definition = (words if not power else words.replace("root mean", "mean")) + f"; {_K}."
    return PairColumn(
        name, title, definition[0].upper() + definition[1:], _table(key), 0.0, 1.0,
        null_text="k / dimension" if power else "sqrt(k / dimension)", source=PAPER,
        bounded=(0.0, 1.0),
    )  # fmt: skip


def _overlap_work(zoo: Any) -> float:
    """Both tiles of the first vectors and one of the last, half by symmetry."""
    e = zoo.table.entries
    dims = np.array([(m.d_out, m.d_in) for m in zoo.modules], np.float64).reshape(-1, 2)
    kept = np.bincount(e["module"], np.minimum(e["rank"], tiles.TOP), len(zoo.modules))
    return canonical_work(zoo) + float((kept**2 / 2 * (dims[:, 0] + 2 * dims[:, 1])).sum())


def _agreement_work(zoo: Any) -> float:
    """Both tiles on one thread, and small spectra: five times the block Gram's, measured."""
    return canonical_work(zoo) + 5 * gram_work(zoo)


_SPECTRA = Family(
    "crosswalk_spectra", _nothing_missing, from_spectra=tiles.spectra, title=PAPER,
    by_default=False, cost="r, from the spectra that the pass found",
)  # fmt: skip
_OVERLAPS = Family(
    "crosswalk_overlaps", _nothing_missing, tiles.overlaps, title=PAPER, by_default=False,
    work=_overlap_work, cost="min(r, 10)^2 (d_out + 2 d_in)", made_from="",
)  # fmt: skip
_AGREEMENTS = Family(
    "crosswalk_agreements", _nothing_missing, tiles.agreements, title=GRADIENCE, by_default=False,
    work=_agreement_work, cost="r^2 (d_out + d_in) + r^3", made_from="",
)  # fmt: skip

_LOCAL = (
    "of what the two updates add to the outputs of each module at the mean input of the "
    "calibration's samples, mean of the value on a's domain and on b's. Theirs is of the mean "
    "output of one layer of the two whole models: it runs them, and what the base model puts "
    "out is most of it"
)


def _mean_activation(
    name: str, title: str, what: str, value: Callable[[OnDomain], np.ndarray],
    low: float | None, high: float | None, ours: tuple[str, ...] = (),
) -> Crossing:  # fmt: skip
    def finish(s: Sums) -> np.ndarray:
        on_both = [value(s.on_a(MEAN_OUTPUT)), value(s.on_b(MEAN_OUTPUT))]
        return _alive(s, (on_both[0] + on_both[1]) / 2)

    declared = Feature(
        name, title, f"{what} {_LOCAL}.", finish, (MEAN_OUTPUT,), low, high, per_module=False,
        source=PAPER, missing=lacks_calibration, by_default=False,
    )  # fmt: skip
    return Crossing(name, "pair", ours, f"{what} {_LOCAL}; needs a calibration", declared)


def _activation_distance(on: OnDomain) -> np.ndarray:
    return np.sqrt(np.maximum(on.own + on.other - 2 * on.dot, 0.0))


def _activation_cosine(on: OnDomain) -> np.ndarray:
    return np.clip(ratio(on.dot, np.sqrt(on.own) * np.sqrt(on.other)), -1.0, 1.0)


def _activation_ratio(on: OnDomain) -> np.ndarray:
    low, high = np.minimum(on.own, on.other), np.maximum(on.own, on.other)
    return np.sqrt(ratio(low, np.where(low > 0, high, 0.0)))


_AT_BASE = (
    "the base model's mean loss gradient on each adapter's own domain, of the modules that "
    "adapters change; theirs is each fine-tuned model's, of all the encoder's parameters. Needs a "
    "calibration with gradients"
)


def _gradient(
    name: str, title: str, what: str, finish: Callable[..., np.ndarray], **options: Any
) -> tuple[PairColumn, tuple[str, ...], str]:
    ours = ("gradient_cosine_base",) if name.endswith("cosine_similarity") else ()
    column = PairColumn(name, title, f"{what} G_a and G_b: {_AT_BASE}.", finish, source=PAPER,
                        **options)  # fmt: skip
    return column, ours, f"of {_AT_BASE}"


def _gradient_dot(data: gradients.GradientData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return data.gradients.gram[data.own[a], data.own[b]]


def _gradient_distance(data: gradients.GradientData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    own, other = _gradient_dot(data, a, a), _gradient_dot(data, b, b)
    return np.sqrt(np.maximum(own + other - 2 * _gradient_dot(data, a, b), 0.0))


def _gradient_cosine(data: gradients.GradientData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    own, other = _gradient_dot(data, a, a), _gradient_dot(data, b, b)
    return ratio(_gradient_dot(data, a, b), np.sqrt(own) * np.sqrt(other))


_STACKED = (
    "of the matrix with the two updates as rows: a function of cosine and norm_ratio alone"
)
_ALL_MODULES = "over the modules that either adapter changes; theirs over all parameters"
_INPUT = (
    "gradients of the loss with respect to the model's inputs belong to no module: they are not a "
    "function of the updates' factors, and a token has none"
)

_PAPER: tuple[Crossing, ...] = (
    _same("task_vector_cosine_similarity", "cosine", f"{_ALL_MODULES}; NaN for a zero update"),
    _of_weights(
        "task_vector_l2_distance", "Distance", "|W_a - W_b|.", _distance, ("distance",),
        f"{_ALL_MODULES}. From the inner product: 3% off where it is a thousandth of the norms "
        "(ours, distance, is not)", 0.0, None, "sqrt(|W_a|^2 + |W_b|^2)",
    ),
    _same("task_vector_dot_product", "dot", _ALL_MODULES),
    _same("weight_space_angle", "angle", "degrees"),
    _same("task_vector_magnitude_ratio", "norm_ratio", "NaN for a zero update, theirs 0"),
    _same("effective_rank", "stacked_effective_rank", _STACKED),
    _of_weights(
        "effective_rank_mergeability_score", "2 - effective rank", "2 - effective_rank.", _score,
        ("stacked_effective_rank",), f"2 less it; {_STACKED}", 0.0, 1.0, "0 for one norm",
    ),
    _same("stable_rank", "stacked_stable_rank", f"(sum sigma)^2 / sum sigma^2, {_STACKED}; not "
          "the stable rank of a matrix"),
    _of_weights(
        "spectral_gap", "Spectral gap", "1 - singular_value_ratio.",
        lambda s: 1.0 - weights.stacked_ratio(s), ("stacked_singular_ratio",),
        f"1 less it; {_STACKED}", 0.0, 1.0, "1 - norm_ratio",
    ),
    _same("singular_value_ratio", "stacked_singular_ratio", _STACKED),
    _of_weights(
        "layerwise_effective_rank", "Effective rank by module",
        "effective_rank of each module, mean over modules weighted by |W_a| + |W_b|.",
        weights.stacked_effective_rank, ("stacked_effective_rank.mean",),
        "modules that both change and that are not zero, whatever their size (theirs leaves out "
        "norms below 1e-10); .mean here weights by |W_a| |W_b|", 1.0, 2.0,
        "2 for updates of one norm", _both_norms,
    ),
    _of_weights(
        "layerwise_effective_rank_mergeability_score", "2 - effective rank by module",
        "2 - layerwise_effective_rank.", _score, ("stacked_effective_rank.mean",),
        "2 less layerwise_effective_rank", 0.0, 1.0, "0 for one norm", _both_norms,
    ),
    *_columns(_SPECTRA, [(
        PairColumn(
            "singular_value_overlap", "Singular values",
            "Cosine of the descending singular values (the first 100), mean over modules.",
            _table("overlap"), 0.0, 1.0, source=PAPER, bounded=(0.0, 1.0),
        ),
        ("spectrum_cosine",), "plain mean over modules; spectrum_cosine is of all modules together",
    )]),
    *_columns(_OVERLAPS, [
        (_overlap("subspace_overlap", "Left overlap, top k", "left_top", "first", "left", ""),
         ("col_overlap_top",),
         f"over sqrt(k), 1 for equal spaces; theirs is over k, which is 1 / sqrt(k) there. {_K}; "
         f"{_TOPS}"),
        (_overlap("right_subspace_overlap_top_k", "Right overlap, top k", "right_top", "first",
                  "right", ""), ("row_overlap_top",), f"{_K}; {_TOPS}"),
        (_overlap("right_subspace_overlap_bottom_k", "Right overlap, bottom k", "right_bottom",
                  "last", "right", ""), ("row_overlap_bottom",),
         f"the weakest directions that the update has; theirs are of its null space. {_K}"),
        (_overlap("interaction_matrix_overlap_top_k", "Interaction, top k", "right_top_square",
                  "first", "right", "2"), ("row_overlap_top",),
         f"the square of right_subspace_overlap_top_k, module by module. {_K}"),
        (_overlap("interaction_matrix_overlap_bottom_k", "Interaction, bottom k",
                  "right_bottom_square", "last", "right", "2"), ("row_overlap_bottom",),
         "the square of right_subspace_overlap_bottom_k, module by module; theirs is of the null "
         f"space. {_K}"),
    ]),
    _mean_activation("activation_l2_distance", "Mean activations, distance", "Norm of the "
                     "difference", _activation_distance, 0.0, None),
    _mean_activation("activation_cosine_similarity", "Mean activations, cosine", "Cosine",
                     _activation_cosine, -1.0, 1.0,
                     ("mean_activation_cosine_a", "mean_activation_cosine_b")),
    _mean_activation("activation_magnitude_ratio", "Mean activations, norm ratio",
                     "Smaller over larger norm", _activation_ratio, 0.0, 1.0),
    _mean_activation("activation_dot_product", "Mean activations, product", "Inner product",
                     lambda on: on.dot, None, None),
    *_columns(gradients.FAMILY, [
        _gradient("encoder_gradient_cosine_similarity", "Gradients, cosine", "Cosine of",
                  _gradient_cosine, low=-1.0, high=1.0, null=0.0, null_text="0",
                  bounded=(-1.0, 1.0)),
        _gradient("encoder_gradient_l2_distance", "Gradients, distance", "Distance of",
                  _gradient_distance, low=0.0),
        _gradient("encoder_gradient_dot_product", "Gradients, product", "Inner product of",
                  _gradient_dot, null=0.0, null_text="0"),
    ]),
    *(Crossing(f"input_gradient_{what}", "pair", (), _INPUT)
      for what in ("cosine_similarity", "l2_distance", "dot_product")),
)  # fmt: skip

_MEAN_OF = "the plain mean over modules of what theirs says of each"
_FLOOR = "theirs takes a largest singular value of at least 1e-6 (its square at least 1e-12)"


def _scale(
    name: str, title: str, definition: str, key: str, ours: tuple[str, ...]
) -> tuple[PairColumn, tuple[str, ...], str]:
    column = PairColumn(
        name, title, f"{definition}, mean over modules.", _table(key), 0.0, 1.0, source=GRADIENCE,
        bounded=(0.0, 1.0),
    )  # fmt: skip
    return column, ours, _MEAN_OF


_GRADIENCE: tuple[Crossing, ...] = (
    *_columns(_AGREEMENTS, [
        (PairColumn(
            name, title, f"{what} cosine of the principal angles between the left singular vectors "
            "that hold 90% of each one's squared norm, mean over modules.", _table(name), 0.0, 1.0,
            source=GRADIENCE, bounded=(0.0, 1.0),
        ), (ours, f"{ours}.mean"), f"{_MEAN_OF}; ours is of all directions, weak ones too")
        for name, title, what, ours in (
            ("mean_overlap", "Mean overlap", "Mean", "col_cosine_mean"),
            ("max_overlap", "Largest overlap", "Largest", "col_cosine_largest"),
        )
    ] + [
        (PairColumn(
            f"directional_agreement_{side}", f"Directional agreement, {side}'s directions",
            f"Cosine of diag(U_{side}^T W V_{side}), W the other's update, and {side}'s singular "
            f"values, over {side}'s singular vectors that hold 90% of its squared norm; mean over "
            "modules.",
            finish, -1.0, 1.0, 0.0, "0", f"directional_agreement_{other}", GRADIENCE, (-1.0, 1.0),
        ), ("cosine",), f"{_MEAN_OF}, and both directions of it; theirs has a's")
        for side, other, finish in (
            ("a", "b", lambda data, a, b: data["directional_agreement"][a, b]),
            ("b", "a", lambda data, a, b: data["directional_agreement"][b, a]),
        )
    ]),
    *_columns(_SPECTRA, [
        _scale("scale_bounded_ratio", "Ratio of spectral norms", "Smaller over larger spectral "
               "norm", "first", ()),
        _scale("frob_bounded_ratio", "Ratio of norms", "Smaller over larger norm", "norm",
               ("norm_ratio",)),
    ]),
    *(Crossing(f"{theirs}_ratio", "pair", (), f"1 / {ours}_bounded_ratio, without a bound and "
               "infinite for a zero update")
      for theirs, ours in (("magnitude", "scale"), ("frobenius", "frob"))),
    *(Crossing(f"{which}_log_ratio", "pair", (), f"-log {which}_bounded_ratio, with a sign for "
               "which of the two comes first")
      for which in ("scale", "frob")),
    Crossing("delta_fro_norm", "adapter", ("norm",), "theirs is of each module"),
    Crossing("delta_sigma_max", "adapter", ("spectral_norm", "spectral_norm.mean",
             "spectral_norm.max"), "of all modules together, which is the largest; mean and max "
             "over them"),
    Crossing("stable_rank", "adapter", ("stable_rank.mean",), _FLOOR),
    Crossing("effective_rank", "adapter", ("effective_rank.mean",),
             "the same normalisation, sigma / sum sigma"),
    Crossing("utilization", "adapter", ("rank_utilisation",), _FLOOR),
    *(Crossing(f"energy_rank_{q}", "adapter", (f"energy_rank_{q}.mean",),
               "NaN for a zero update, theirs 0 or 1") for q in (90, 95, 99)),
    Crossing("udr", "adapter", ("base_spectral_ratio.mean", "base_spectral_ratio.max"),
             "Lanczos to 1e-4 in place of 20 steps of the power method; needs the base's weights"),
    Crossing("udr_f", "adapter", ("base_norm_ratio.mean", "base_norm_ratio.max"),
             "needs the base's weights"),
    Crossing("sdi", "adapter", ("base_spectral_ratio.mean",), "log10 of udr"),
    Crossing("concentration_index", "adapter", ("layer_concentration",), "the same"),
    Crossing("top_k_share", "adapter", ("layer_top_share", "layers_used"),
             "theirs is of the five largest layers, or of a tenth of them"),
)  # fmt: skip

CROSSWALK: dict[str, dict[str, Crossing]] = {
    source: {(c.name if c.of == "pair" else f"{c.name} (adapter)"): c for c in crossings}
    for source, crossings in ((PAPER, _PAPER), (GRADIENCE, _GRADIENCE))
}

# Of the catalogue of statistics, and why they are not offered.
NOT_OFFERED: dict[str, str] = {
    "A/B imbalance, log |B| / |A|": "changes with A -> MA, B -> BM^-1, which leave the update as "
    "it is: it says how training was set up, nothing about the function",
    "KnOTS alignment <V_i, V_j>": "zero between any two updates whose output spaces are "
    "independent, which low-rank ones are; weighted by the singular values it is the inner product",
    "bottom-k overlaps beyond the rank": "the vectors are arbitrary: rounding the same update anew "
    "moves them from 0.37 to 0.43",
    "input gradients": _INPUT,
    "cosine of factor gradients, of tangent updates": "change with A -> MA, B -> BM^-1",
}
