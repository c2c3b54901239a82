"""Rules on the entries of the deltas: TIES, DARE, magnitude pruning, DELLA, breadcrumbs.

The merged delta of such a rule has no low rank. ``dense`` gives its rows, exact in float32, for
base weights; as an adapter it is cut to the best rank that a warm-started range finder finds, with
the error of the cut reported, and how much better an exact SVD could still do.

Three dialects. ``peft`` is PEFT 0.21.2's ``merge_utils``; ``mergekit`` its generalised task
arithmetic (signs elected from weighted deltas, division by the sum of agreeing weights, DARE and
DELLA rescaled to the unpruned L1 norm); ``paper`` what the TIES code does where that differs. An
entry whose elected sum is exactly 0 takes the positive sign in each. Where several entries equal a
threshold, all are kept, so results do not depend on an order of sorting.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mergeprobe_fast.merging.arguments import choice, flag, number, optional, whole
from mergeprobe_fast.merging.elementwise_rules import Keep, dense, low_rank
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeFunction,
    MergeMethod,
    MergeRequest,
)


def ties(request: MergeRequest) -> Iterator[MergedModule]:
    """Trim, elect signs, merge what agrees (TIES; Yadav et al. 2023).

    Of each delta the ``density`` largest entries by magnitude are kept. Each entry elects the sign
    of the sum of what is left ("total"), or the more frequent one ("frequency"); entries of that
    sign are weighted, summed and divided by their number. Dialect "mergekit" elects from weighted
    entries and divides by the sum of agreeing weights; "paper" sets one threshold over all modules
    of an adapter instead of one per module, for which all factors are held in memory.

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. PEFT's "ties_svd", mergekit's "ties".
    """
    yield from low_rank(request, "magnitude", "ties")


def dare_linear(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop entries at random, rescale the rest, add (DARE; Yu et al. 2024).

    Every entry survives with probability ``density`` and is divided by it, so that its expectation
    is unchanged; then the weighted sum. Chance depends on ``seed``, module, adapter name and
    position only. Dialect "mergekit" rescales each delta to its unpruned L1 norm instead.

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. PEFT's "dare_linear_svd", mergekit's "dare_linear".
    """
    yield from low_rank(request, "random", "sum")


def dare_ties(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop entries at random, rescale the rest, then elect signs as TIES does.

    DARE (Yu et al. 2024) in place of the trimming of TIES (Yadav et al. 2023); see ``dare_linear``
    and ``ties`` for both halves and the dialects (``normalize``: mergekit's own default is false).

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. PEFT's "dare_ties_svd", mergekit's "dare_ties".
    """
    yield from low_rank(request, "random", "ties")


def magnitude_prune(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of the ``density`` largest entries of each delta.

    One threshold per module and adapter. Elementwise exact in float32 before the cut to ``rank``
    (default: the largest of the adapters), whose error is reported. Gauge-invariant. PEFT's
    "magnitude_prune_svd".
    """
    yield from low_rank(request, "magnitude", "sum")


def della(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop entries at random, small ones more often, then elect signs as TIES does (DELLA).

    Within each row an entry survives with probability ``density - epsilon`` (the smallest) to
    ``density + epsilon`` (the largest), linear in its rank by magnitude; each delta is rescaled to
    its unpruned L1 norm, as mergekit has it (the paper, Deep et al. 2024, divides each survivor by
    its own probability). Signs and weights as in mergekit's ``ties``.

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. mergekit's "della".
    """
    yield from low_rank(request, "della", "ties")


def della_linear(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop entries at random, small ones more often, rescale, add (DELLA without signs).

    The pruning of ``della`` (Deep et al. 2024), then the weighted sum.

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. mergekit's "della_linear".
    """
    yield from low_rank(request, "della", "sum")


def breadcrumbs(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop the largest and the smallest entries of each delta, add (Model Breadcrumbs).

    The ``gamma`` largest share goes, then the smallest, until a share ``density`` is left (Davari
    and Belilovsky 2024); then the weighted sum.

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. mergekit's "breadcrumbs".
    """
    yield from low_rank(request, "breadcrumbs", "sum")


def breadcrumbs_ties(request: MergeRequest) -> Iterator[MergedModule]:
    """Drop the largest and the smallest entries, then elect signs as TIES does.

    The pruning of ``breadcrumbs`` (Davari and Belilovsky 2024), then signs and weights as in
    mergekit's ``ties`` (``normalize``: mergekit's own default is false).

    Elementwise exact in float32 before the cut to ``rank`` (default: the largest of the adapters),
    whose error is reported. Gauge-invariant. mergekit's "breadcrumbs_ties".
    """
    yield from low_rank(request, "breadcrumbs", "ties")


_SHARE = number(0, 1)
_SIGNS = Argument("total", choice("total", "frequency"), "what elects a sign: total or frequency")
_SEED = Argument(0, whole(0, 2**64 - 1), "of the random choice")
_EPSILON = Argument(0.1, number(0, 0.5), "half the spread of the probabilities")
_GAMMA = Argument(0.01, _SHARE, "share of the largest entries dropped", per_adapter=True)


def _density(default: float) -> Argument:
    return Argument(default, _SHARE, "share of entries kept", per_adapter=True)


def _dialect(*names: str) -> Argument:
    return Argument(names[0], choice(*names), f"whose rules: {', '.join(names)}")


def _normalize(default: bool) -> Argument:
    return Argument(
        None, optional(flag),
        f"mergekit: divide by the sum of (agreeing) weights; {str(default).lower()} if not said",
    )  # fmt: skip


def _method(run: MergeFunction, keep: Keep, combine: str, **arguments: Argument) -> MergeMethod:
    return MergeMethod(
        run.__name__, run, arguments=arguments,
        # Where agreeing entries are averaged, weights of 1/N would shrink the result N-fold.
        weights="one" if combine == "ties" else "mean",
        dense=partial(dense, keep=keep, combine=combine),
    )  # fmt: skip


METHODS = (
    _method(
        ties, "magnitude", "ties", density=_density(0.2),
        dialect=_dialect("peft", "mergekit", "paper"), majority_sign_method=_SIGNS,
        normalize=_normalize(True),
    ),
    _method(
        dare_linear, "random", "sum", density=_density(0.5), dialect=_dialect("peft", "mergekit"),
        normalize=_normalize(False), seed=_SEED,
    ),
    _method(
        dare_ties, "random", "ties", density=_density(0.5), dialect=_dialect("peft", "mergekit"),
        majority_sign_method=_SIGNS, normalize=_normalize(True), seed=_SEED,
    ),
    _method(magnitude_prune, "magnitude", "sum", density=_density(0.2)),
    _method(
        della, "della", "ties", density=_density(0.5), epsilon=_EPSILON,
        majority_sign_method=_SIGNS, normalize=_normalize(True), seed=_SEED,
    ),
    _method(
        della_linear, "della", "sum", density=_density(0.5), epsilon=_EPSILON,
        normalize=_normalize(False), seed=_SEED,
    ),
    _method(
        breadcrumbs, "breadcrumbs", "sum", density=_density(0.9), gamma=_GAMMA,
        normalize=_normalize(False),
    ),
    _method(
        breadcrumbs_ties, "breadcrumbs", "ties", density=_density(0.9), gamma=_GAMMA,
        majority_sign_method=_SIGNS, normalize=_normalize(True),
    ),
)  # fmt: skip
