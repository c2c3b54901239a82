"""Pair features of the row (input) and column (output) spaces."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast.features.declare import (
    COL_CAPTURE,
    COL_OVERLAP,
    COL_RV,
    ROW_CAPTURE,
    ROW_OVERLAP,
    ROW_RV,
    Feature,
    Need,
    Sums,
    ratio,
)

SIDES = {
    "row": ("input directions", ROW_OVERLAP, ROW_RV, ROW_CAPTURE),
    "col": ("output directions", COL_OVERLAP, COL_RV, COL_CAPTURE),
}


def _overlap(need: Need):
    return lambda s: ratio(s.need[need], np.minimum(s.rank_a, s.rank_b))


def _rv(need: Need):
    def finish(s: Sums) -> np.ndarray:
        return ratio(s.need[need], np.sqrt(s.energy2_a) * np.sqrt(s.energy2_b))

    return finish


def _capture(need: Need, mirrored: bool):
    def finish(s: Sums) -> np.ndarray:
        both = (s.rank_a > 0) & (s.rank_b > 0)
        if mirrored:
            return ratio(s.mirrored[need], np.where(both, s.energy_b, 0.0))
        return ratio(s.need[need], np.where(both, s.energy_a, 0.0))

    return finish


def _side(side: str) -> tuple[Feature, ...]:
    what, overlap, rv, capture = SIDES[side]
    a_by_b, b_by_a = f"{side}_capture_a_by_b", f"{side}_capture_b_by_a"
    unit = (0.0, 1.0)
    return (
        Feature(
            f"{side}_overlap", f"{side.capitalize()} overlap",
            f"Mean squared cosine between the {what} of the two updates, all directions alike. "
            "Early in training it mostly tells whether the two started from the same A.",
            _overlap(overlap), (overlap,), 0.0, 1.0, None, "max(rank) / dimension",
            source="projection metric on Grassmannians", bounded=unit,
        ),
        Feature(
            f"{side}_rv", f"{side.capitalize()} overlap by energy",
            f"Overlap of the {what} weighted by energy (RV coefficient). Needs no rank decision: "
            "weak directions carry no weight.",
            _rv(rv), (rv,), 0.0, 1.0, None, "sqrt(participation_a participation_b) / dimension",
            source="RV coefficient (Robert and Escoufier 1976)", bounded=unit,
        ),
        Feature(
            a_by_b, f"{side.capitalize()} capture, a by b",
            f"Share of a's energy along {what} that b uses too.",
            _capture(capture, False), (capture,), 0.0, 1.0, None, "rank of b / dimension",
            directed_twin=b_by_a, source="projected energy", bounded=unit,
        ),
        Feature(
            b_by_a, f"{side.capitalize()} capture, b by a",
            f"Share of b's energy along {what} that a uses too.",
            _capture(capture, True), (capture,), 0.0, 1.0, None, "rank of a / dimension",
            directed_twin=a_by_b, source="projected energy", bounded=unit,
        ),
    )  # fmt: skip


FEATURES = (*_side("row"), *_side("col"))
