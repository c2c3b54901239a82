"""Statistics of sets from Gram matrices of whole deltas: geometry, retention, best weights."""

from __future__ import annotations

from collections.abc import Callable

from mergeprobe_fast.engine.sets import RIDGE, set_statistics
from mergeprobe_fast.features.set_declare import (
    SetFeature,
    SetGroup,
    SetRequest,
    Values,
    over,
    plain,
)
from mergeprobe_fast.recorded import Recorded, lacks_calibration, lacks_output_moments


def _geometry(request: SetRequest) -> Values:
    return set_statistics(
        request.totals, request.members, request.weights,
        which=["geometry"], threads=request.threads,
    )  # fmt: skip


def _retention(raw: bool) -> Callable[[SetRequest], Values]:
    def compute(request: SetRequest) -> Values:
        found = set_statistics(
            request.totals, request.members, request.weights, request.domain_of,
            which=["retention", "reweighted", "minimax"], raw=raw, threads=request.threads,
        )  # fmt: skip
        kept = {name.replace("error", "retention"): 1 - found[name]
                for name in ("error", "reweighted_error", "minimax_error")}  # fmt: skip
        return found | kept

    return compute


def _lacks_both(recorded: Recorded) -> str | None:
    missing = lacks_output_moments(recorded)
    return missing and f"{missing} (without them, the other form is this one)"


_GEOMETRY = (
    SetFeature(
        "merged_norm", "Norm of the merge", "|M| = |sum_j w_j W_j| over all modules.",
        plain("merged_norm"), 0.0, source="standard",
    ),
    SetFeature(
        "superposition", "Superposition ratio",
        "|M|^2 / sum_j w_j^2 |W_j|^2. Above 1 the members over-amplify, below 1 they cancel; "
        "1 when they are orthogonal, at most the size of the set.",
        plain("superposition"), 0.0, source="ours",
    ),
    SetFeature(
        "gram_effective_rank", "Effective rank of the set",
        "exp of the entropy of the eigenvalues, as shares, of the members' Gram matrix <W_i, W_j>: "
        "how many independent directions the set has, by energy. From 1 to the size.",
        plain("gram_rank"), 1.0, source="Roy and Vetterli 2007",
    ),
    SetFeature(
        "cosine_effective_rank", "Effective rank of the set's cosines",
        "The same with every member at norm 1.", plain("cosine_rank"), 1.0,
        source="Roy and Vetterli 2007",
    ),
    *(
        SetFeature(
            f"leverage_{how}", f"Leverage, {what} member",
            "1 - min_x |W_i - sum_{j != i} x_j W_j|^2 / |W_i|^2: how much of a member is a linear "
            "combination of the others. 1: redundant.",
            over(how, "leverage"), 0.0, 1.0, "standard",
        )
        for how, what in (("min", "least"), ("mean", "mean"), ("max", "largest"))
    ),
    SetFeature(
        "leverage", "Leverage", "Of each member; resolved to 1e-12 below 1.", plain("leverage"),
        0.0, 1.0, "standard", per_member=True,
    ),
)  # fmt: skip


def _features(raw: bool) -> tuple[SetFeature, ...]:
    x = "_raw" if raw else ""
    energy = (
        "Energies are E||W x||^2 summed over modules." if raw else
        "Energies are E||W x||^2 summed over modules, each relative to the base module's output "
        "energy there (as they are, where output moments were not recorded)."
    )  # fmt: skip
    error = "e_i(w) = |M - W_i|^2 / |W_i|^2 on the inputs of member i's own domain. " + energy
    names = {"min": ("worst", "the worst member"), "mean": ("mean", "mean over members")}

    def pair(value: str, title: str, definition: str, high: float | None) -> list[SetFeature]:
        return [
            SetFeature(f"{value}{x}_{short}", f"{title}, {text}", definition, over(how, value),
                       None, high, "ours")
            for how, (short, text) in names.items()
        ]  # fmt: skip

    weights = f"Ridge {RIDGE:g} of every Gram's own diagonal."
    return (
        *pair("retention", "Retention proxy", "1 - e_i, with the weights of the set: "
              f"{error} 1: the merge does to i's inputs what i does; at 0 it might as well do "
              "nothing.", 1.0),
        *pair("direction", "Agreement of outputs", "cos(M x, W_i x) in mean over the inputs of "
              "i's own domain: what is left of the retention proxy when scale is free.", 1.0),
        *pair("reweighted_retention", "Retention proxy, best mean weights",
              f"1 - e_i at the weights that make the mean of all e_i least. {weights} With one "
              "domain and these metrics it says little (all metrics equal: weights do not depend "
              "on the Gram matrix at all).", 1.0),
        *pair("minimax_retention", "Retention proxy, best worst-case weights",
              f"1 - e_i at the weights that make the largest e_i least. {weights}", 1.0),
        SetFeature(
            f"minimax_gap{x}", "Duality gap of the worst-case weights",
            "By how much the worst retention proxy could still be better, at most, as long as the "
            "ridge counts: without it, weights far beyond 1 may gain more from near-duplicates.",
            plain("minimax_gap"), 0.0, source="ours",
        ),
        *(
            SetFeature(f"{name}{x}", title, f"Of each member. {error}", plain(name), None, high,
                       "ours", per_member=True)
            for name, title, high in (
                ("retention", "Retention proxy", 1.0),
                ("direction", "Agreement of outputs", 1.0),
                ("reweighted_weights", "Best mean weights", None),
                ("reweighted_retention", "Retention proxy, best mean weights", 1.0),
                ("minimax_weights", "Best worst-case weights", None),
                ("minimax_retention", "Retention proxy, best worst-case weights", 1.0),
            )
        ),
    )  # fmt: skip


GROUPS = (
    SetGroup("geometry", lambda recorded: None, _geometry, _GEOMETRY),
    SetGroup("retention", lacks_calibration, _retention(raw=False), _features(raw=False)),
    SetGroup("retention_raw", _lacks_both, _retention(raw=True), _features(raw=True)),
)
