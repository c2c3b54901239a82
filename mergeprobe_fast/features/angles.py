"""Pair columns from principal angles: Grassmannian distances, alignment, shares of energy within
both spaces of the other, task interference, and spectra of the sum of two updates.

Columns are of the concatenated deltas; ``.mean`` is over the modules that both adapt, weighted by
the product of the two norms there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergeprobe_fast.engine.angle_tables import AngleTable, PairAngles, Value
from mergeprobe_fast.engine.angles import TOP, angles, work
from mergeprobe_fast.features.declare import Family, PairColumn, ratio
from mergeprobe_fast.features.twins import directed, sided
from mergeprobe_fast.ops.angles import LEAST_SQUARE
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo

_RIGHT = np.pi**2 / 4  # squared angle of directions without a partner
_FARTHEST = -np.log(LEAST_SQUARE)

_WHOLE: dict[str, Value] = {}
_MEANS: dict[str, Value] = {}


def _compute(zoo: Zoo, recorded: Recorded, threads: int) -> AngleTable:
    return angles(zoo, _WHOLE, _MEANS, threads)


def _column(
    name: str, title: str, definition: str, value: Value, *, mean: bool = False, **options: Any
) -> tuple[PairColumn, ...]:
    """A symmetric column, and with ``mean`` that over modules."""

    def declared(name: str, title: str, definition: str) -> PairColumn:
        return PairColumn(
            name, title, definition, lambda data, a, b: data.get(name, a, b), **options
        )

    _WHOLE[name] = value
    columns = [declared(name, title, definition)]
    if mean:
        _MEANS[f"{name}.mean"] = value
        columns.append(declared(
            f"{name}.mean", f"{title}, mean over modules",
            f"Mean of {name} over the modules that both adapt, weighted by the product of the two "
            "norms there.",
        ))  # fmt: skip
    return tuple(columns)


def _two_ways(
    make: Callable[..., tuple[PairColumn, PairColumn]], name: str, title: str, definition: str,
    value: Callable[[PairAngles, int], np.ndarray], **options: Any,
) -> tuple[PairColumn, ...]:  # fmt: skip
    """A column of a pair seen from either: ``value`` gets 0 where the victim (owner) is the first
    of the two, 1 where it is the second."""
    one, other = f"{name}.first", f"{name}.second"
    _WHOLE[one] = lambda p: value(p, 0)
    _WHOLE[other] = lambda p: value(p, 1)
    return make(
        name, title, definition,
        lambda data, victim, partner: data.get(one, victim, partner, other), **options,
    )  # fmt: skip


def _norms(p: PairAngles) -> np.ndarray:
    return np.sqrt(p.energy[0]) * np.sqrt(p.energy[1])


def _padded(name: str, each: float) -> Value:
    """A sum over principal angles, those of directions without a partner included."""
    return lambda p: p[name] + p.alone * each


def _root(value: Value) -> Value:
    return lambda p: np.sqrt(np.maximum(value(p), 0.0))


def _full(side: str) -> Value:
    def value(p: PairAngles) -> np.ndarray:
        beyond = np.abs(p.rank[0] - p.rank[1])
        return np.sqrt(p[f"{side}_angles"] + (p.alone + beyond) * _RIGHT)

    return value


def _ends(side: str, which: str) -> Value:
    return lambda p: ratio(p[f"{side}_{which}"], p.top)


_YE_LIM = "Ye and Lim 2016, Schubert varieties and distances between subspaces"
_HAMM = "Hamm and Lee 2008; Edelman, Arias and Smith 1998"


def _side(side: str, what: str, other: str) -> tuple[PairColumn, ...]:
    """Columns of one side's subspaces."""
    word = side.capitalize()
    spanned = f"of the spaces that the {what} of the two updates span"

    def column(name: str, title: str, definition: str, value: Value, **options: Any):
        options = {"mean": True, "source": _HAMM} | options
        return _column(f"{side}_{name}", f"{word} {title}", definition, value, **options)

    unit = {"low": 0.0, "high": 1.0, "bounded": (0.0, 1.0)}
    return (
        *column(
            "cosine_largest", "cosine, largest", f"Largest principal cosine {spanned}: 1 where "
            "they share a direction.", lambda p: p[f"{side}_largest"],
            null_text="below (sqrt(rank of a) + sqrt(rank of b)) / sqrt(dimension)", **unit,
        ),
        *column(
            "cosine_mean", "cosine, mean", f"Mean principal cosine {spanned}.",
            lambda p: ratio(p[f"{side}_cosines"], p.directions),
            null_text="about 0.85 sqrt(rank / dimension) of equal ranks", **unit,
        ),
        *column(
            "cosine_smallest", "cosine, smallest", f"Smallest principal cosine {spanned}: 1 where "
            "one contains the other.",
            lambda p: np.where(p.alone > 0, 0.0, p[f"{side}_smallest"]), null_text="", **unit,
        ),
        *column(
            "geodesic", "geodesic distance", "Root of the sum of squared principal angles "
            f"{spanned}, in radians. Of unequal ranks: from the smaller to the nearest space in "
            "the larger, 0 where it is contained (Schubert variety).",
            _root(_padded(f"{side}_angles", _RIGHT)), low=0.0,
            null_text="about sqrt(min(rank)) pi / 2", source=_YE_LIM,
        ),
        *column(
            "geodesic_full", "geodesic distance, ranks counted",
            "The geodesic distance with a right angle for every direction that one has more than "
            "the other: a metric on spaces of all dimensions.", _full(side), low=0.0,
            null_text="about sqrt(max(rank)) pi / 2", source=_YE_LIM,
        ),
        *column(
            "chordal", "chordal distance", f"Root of the sum of squared sines of principal angles "
            f"{spanned}.", _root(_padded(f"{side}_sines", 1.0)), low=0.0,
            null_text="sqrt(min(rank) (1 - max(rank) / dimension))",
        ),
        *column(
            "procrustes", "Procrustes distance", "Frobenius distance of bases rotated onto each "
            f"other, 2 |sin(angle / 2)|, {spanned}.", _root(_padded(f"{side}_halves", 2.0)),
            low=0.0, null_text="about sqrt(2 min(rank))",
        ),
        *column(
            "gap", "projection gap", f"Sine of the largest principal angle {spanned}.",
            lambda p: np.where(p.alone > 0, 1.0, np.sqrt(p[f"{side}_gap"])), null_text="near 1",
            **unit,
        ),
        *column(
            "martin", "Martin distance, per direction", "Mean over principal angles of "
            f"-log cos^2, {spanned}; cosines below 1e-6 count as 1e-6.",
            lambda p: ratio(p[f"{side}_logs"] + p.alone * _FARTHEST, p.directions),
            low=0.0, high=float(_FARTHEST), source="Martin 2000",
            null_text="about log(dimension / rank) + 1 of equal ranks",
        ),
        *column(
            "binet_cauchy", "Binet-Cauchy distance", "Root of 1 - product of cos^2, from "
            f"logarithms, {spanned}. Next to 1 unless nearly all directions are shared: the Martin "
            "distance says more.",
            lambda p: np.sqrt(-np.expm1(-(p[f"{side}_logs"] + p.alone * _FARTHEST))),
            null_text="1", source="Wolf and Shashua 2003", **unit,
        ),
        *column(
            "aligned_cosine", "aligned cosine", "Largest cosine of the two updates that a rotation "
            f"of one's {other} in each module could give. What alignment could buy, over the "
            "cosine.", lambda p: ratio(p[f"{side}_aligned"], _norms(p)),
            null_text="about 0.85 sqrt(rank / dimension) of equal ranks and flat spectra",
            source="orthogonal Procrustes (Schonemann 1966)", **unit,
        ),
        *column(
            "overlap_top", f"overlap, {TOP} strongest", f"Mean squared cosine between the {TOP} "
            f"strongest {what} of each in every module, or as many as both have.",
            _ends(side, "top"), mean=False, null_text="count / dimension",
            source="arXiv 2601.22285, restricted to the ranks", **unit,
        ),
        *column(
            "overlap_bottom", f"overlap, {TOP} weakest", f"The same of the {TOP} weakest that "
            "are not zero.", _ends(side, "bottom"), mean=False, null_text="count / dimension",
            source="arXiv 2601.22285, restricted to the ranks", **unit,
        ),
    )  # fmt: skip


def _distance(p: PairAngles) -> np.ndarray:
    return np.sqrt(np.maximum(p.energy.sum(0) - 2 * p["dot"], 0.0))


def _interference(p: PairAngles) -> np.ndarray:
    return ratio(p["entries_1"] + p["entries_2"], p.nuclear.sum(0))


def _interference_square(p: PairAngles) -> np.ndarray:
    return np.sqrt(ratio(p["both_1"] + p["both_2"], p.energy.sum(0)))


def _share(p: PairAngles, i: int, *names: str) -> np.ndarray:
    """Sums over the statistics of the first (0) or second adapter, over its energy."""
    total = sum(sign * p[f"{name.lstrip('-')}_{i + 1}"]
                for name in names for sign in [-1.0 if name.startswith("-") else 1.0])  # fmt: skip
    return ratio(total, p.energy[i])


_UNIT = {"low": 0.0, "high": 1.0, "bounded": (0.0, 1.0)}
_TWICE = {"low": 0.0, "high": 2.0, "bounded": (0.0, 2.0)}
_STI = "singular task interference (Gargiulo et al. 2024)"
_SVC = "singular value calibration (arXiv 2602.05536), weighted by energy"

COLUMNS: tuple[PairColumn, ...] = (
    *_side("row", "input directions", "outputs"),
    *_side("col", "output directions", "inputs"),
    *_two_ways(
        directed, "two_sided", "Energy of {a} within both spaces of {b}",
        "Share of {a}'s energy that maps {b}'s input directions to {b}'s output directions.",
        lambda p, i: _share(p, i, "both"),
        null_text="squared rank of the other / (d_out d_in)", source="projected energy", **_UNIT,
    ),
    *_two_ways(
        directed, "tangent", "Energy of {a} along the tangent space of {b}",
        "Share of {a}'s energy along input or output directions of {b}: what a first-order change "
        "of {b}'s factors could undo.", lambda p, i: _share(p, i, "row", "col", "-both"),
        null_text="k / d_in + k / d_out - k^2 / (d_out d_in), k the rank of the other",
        source="ours", **_UNIT,
    ),
    *_column(
        "task_interference", "Task interference",
        "Sum of the absolute entries of (U^T U - 1) S (V^T V - 1), with U and V the singular "
        "vectors of both side by side, over the sum of all singular values. Not invariant where "
        "singular values are equal.", _interference, mean=True, low=0.0,
        null_text="below 0.8 rank^(3/2) / sqrt(d_out d_in) of equal ranks and flat spectra",
        source=_STI,
    ),
    *_column(
        "task_interference_square", "Task interference, Frobenius",
        "The same with Frobenius norms: root of the energy of each within both spaces of the "
        "other, over that of both.", _interference_square, mean=True,
        null_text="about rank / sqrt(d_out d_in) of equal ranks", source=_STI, **_UNIT,
    ),
    *_column(
        "spectral_gain", "Spectral gain",
        "Largest singular value of the sum of the two over the larger of theirs. 2: they push the "
        "same direction alike.",
        lambda p: ratio(p["merged_largest"], p.largest.max(0)), mean=True,
        null_text="a little above 1", source="ours", **_TWICE,
    ),
    *_column(
        "nuclear_gain", "Nuclear gain",
        "Nuclear norm of the sum of the two over the larger of theirs: what it is for two that "
        "share no direction (see null), or less.",
        lambda p: ratio(p["merged_sum"], p.nuclear.max(0)), mean=True,
        null_text="near 1 + smaller / larger nuclear norm", source="ours", **_TWICE,
    ),
    *_column(
        "distance", "Distance",
        "Frobenius norm of the difference, from float64 cosines: down to 1e-7 of the norms.",
        _distance, low=0.0, null_text="root of the sum of squared norms", source="standard",
    ),
    *_column(
        "relative_distance", "Distance over norms",
        "Frobenius norm of the difference over the sum of the two norms. 0: the same, 1: "
        "opposite.", lambda p: ratio(_distance(p), np.sqrt(p.energy).sum(0)), mean=True,
        null_text="1 / sqrt(2) of equal norms", source="standard", **_UNIT,
    ),
    *_two_ways(
        sided, "counted", "How often {a} is counted in the sum",
        "Projection of the sum of the two onto {a}, 1 + <W_{a}, W_{b}> / |W_{a}|^2: above 1 it is "
        "over-counted.", lambda p, i: 1 + ratio(p["dot"], p.energy[i]), null=1.0, null_text="1",
        source=_SVC,
    ),
    *_two_ways(
        sided, "over_counted", "Over-counted energy of {a}",
        "Along every output direction u of the sum's singular vectors the product of the two, "
        "u^T W_a W_b^T u, where it is positive; over |W_{a}|^2. What the sum has too much of.",
        lambda p, i: ratio(p["agreeing"], p.energy[i]), low=0.0, null_text="", source=_SVC,
    ),
    *_two_ways(
        sided, "cancelled", "Cancelled energy of {a}",
        "The same where the product is negative: what of {a} the sum loses.",
        lambda p, i: np.maximum(ratio(p["agreeing"] - p["dot"], p.energy[i]), 0.0), low=0.0,
        null_text="", source=_SVC,
    ),
)  # fmt: skip

FAMILY = Family(
    "angles", missing=lambda recorded: None, compute=_compute, title="Principal angles",
    pairs=COLUMNS, by_default=False, work=work, pace=4.5,
    cost="2 r_a r_b (d_in + d_out) + 8 (r_a + r_b)^3 operations, float64", made_from="",
)  # fmt: skip
