"""The rows of the operator table: every method of the package, fully chosen."""

from __future__ import annotations

from typing import Any

from mergeprobe_fast import MERGE_METHODS

from .plan import Operator, Weights

CALIBRATION = 48  # sequences of each exam, for methods that look at inputs or gradients
CUTS = (64, 32, 16)  # ranks of the capacity study, besides the method's own
ENTRIES = 64  # rank of what is merged entry by entry


def _plain(
    name: str, method: str = "", *, weights: Weights | None = None, rank: int | None = None,
    calibration: int | None = None, swapped: bool = False, **arguments: Any,
) -> Operator:  # fmt: skip
    """With the method's own weights, arguments and calibration where nothing else is said."""
    method = method or name
    chosen = MERGE_METHODS[method]
    if calibration is None:
        calibration = CALIBRATION if chosen.data else 0
    return Operator(name, method, weights or chosen.weights, rank, arguments, calibration, swapped)


_ROWS = (
    # The deltas as they are: rank is the sum of the members'.
    _plain("sum", "cat", weights="one"),
    _plain("mean", "cat", weights="mean"),
    _plain("reweighted", "cat", weights="reweighted", calibration=CALIBRATION),  # E7
    _plain("minimax", "cat", weights="minimax", calibration=CALIBRATION),  # E8
    # Cut to the rank of one member.
    _plain("svd"),
    _plain("svd-sum", "svd", weights="one"),
    _plain("weighted_svd", weights="one"),
    # Entry by entry: what comes out has full rank. Cut to 64, or to the rank of one member.
    *(
        _plain(name, rank=ENTRIES)
        for name in (
            "ties",
            "dare_linear",
            "dare_ties",
            "magnitude_prune",
            "della",
            "della_linear",
            "breadcrumbs",
            "breadcrumbs_ties",
            "fisher",
        )
    ),
    _plain("ties-cut", "ties"),
    # Between directions, and in common subspaces.
    _plain("slerp"),
    _plain("karcher"),
    _plain("tsv_m"),
    _plain("iso_c"),
    _plain("core_space"),
    _plain("knots"),
    _plain("lora_lego"),
    # With the inputs of each domain.
    _plain("osrm", weights="one"),
    *(_plain(f"regmean-{n}", "regmean", calibration=n) for n in (1, 8, CALIBRATION)),
    _plain("regmean-wrong", "regmean", swapped=True),
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ROWS}

# Operators of the capacity study; "sum" and "mean" at a rank are the best approximation of that.
_CUT = {
    "sum": ("svd", "one"), "mean": ("svd", "mean"), "ties": ("ties", None),
    "tsv_m": ("tsv_m", None), f"regmean-{CALIBRATION}": ("regmean", None),
}  # fmt: skip
CAPACITY_NAMES = tuple(_CUT)
CAPACITY_OTHERS = ("regmean-1", "regmean-8", "regmean-wrong")  # other calibrations, at one size


def cut_name(name: str, rank: int | None) -> str:
    """The name of an operator of the capacity study at a rank; None: its own."""
    return name if rank is None else f"{name}-r{rank}"


CAPACITY_OPERATORS: dict[str, Operator] = {
    name: OPERATORS[name] for name in (*CAPACITY_NAMES, *CAPACITY_OTHERS)
} | {
    cut_name(name, rank): _plain(cut_name(name, rank), method, weights=weights, rank=rank)
    for name, (method, weights) in _CUT.items()
    for rank in CUTS
    if rank != OPERATORS[name].rank
}
