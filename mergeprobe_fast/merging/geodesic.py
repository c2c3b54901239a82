"""Means on the sphere: SLERP of two deltas, the Karcher mean of any number.

The path and the mean lie in the span of the deltas, so their coefficients follow from the Gram
matrix alone, and the result is a weighted sum of deltas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import schedule
from mergeprobe_fast.merging.algebra import gram
from mergeprobe_fast.merging.arguments import choice, number, whole
from mergeprobe_fast.merging.atoms import Atoms, batches
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeMethod,
    MergeRequest,
    near_one,
)
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.merging.truncate import Sum, truncate
from mergeprobe_fast.ops import block_gram

# 1 - |cos| below this: the angle, or what it lacks to pi, is not resolved by a float64 Gram.
_COLINEAR = 1e-12
_NEARLY = 0.9995  # mergekit's slerp takes |cos| above this as colinear

Coefficients = tuple[np.ndarray, dict[str, Any]]


def slerp(request: MergeRequest) -> Iterator[MergedModule]:
    """Spherical interpolation of two deltas, per module.

    With the angle O between them, c_1 = sin((1-t)O)/sin O and c_2 = sin(tO)/sin O. ``t`` runs from
    the first adapter (0) to the second (1) and may depend on the module (filters and gradients as
    for weights); without it, t = w_2 / (w_1 + w_2). Dialects:

    * "nuslerp": c_1 W_1 + c_2 W_2 of the deltas as they are, (1-t) W_1 + t W_2 where they are
      colinear. mergekit's nuslerp of models over their base.
    * "slerp": the same, with mergekit's older cut: colinear is |cos O| > 0.9995.
    * "unit": directions are interpolated by c_1, c_2, the norm linearly, (1-t)||W_1|| + t||W_2||.
      Equal to "nuslerp" for equal norms.

    An absent or zero delta counts as orthogonal to the other, as in mergekit; "unit" then keeps the
    other's direction. Opposite deltas (O = pi) have no path: the first two dialects add linearly,
    "unit" refuses. Colinear is 1 - |cos O| <= 1e-12. Exact; rank None is the numerical rank of the
    sum. Gauge-invariant. Shoemake 1985.
    """
    t = _times(request)
    dialect = request.arguments["dialect"]

    def rule(m: ModuleFactors, gram: np.ndarray) -> Coefficients:
        both = np.zeros((2, 2))
        both[np.ix_(m.adapters, m.adapters)] = gram
        try:
            c, angle = _slerp(both, float(t[m.index]), dialect)
        except ValueError as error:
            raise InputError(str(error), key=m.module.name) from None
        return c[m.adapters], {"t": float(t[m.index]), "angle": angle}

    yield from _combined(request, rule)


def karcher(request: MergeRequest) -> Iterator[MergedModule]:
    """Karcher (Frechet) mean of the directions of the deltas on the sphere, per module.

    The unit vector that minimises sum_i w_i angle_i^2, times the mean norm sum_i w_i ||W_i||, the
    weights normalised to 1. Absent and zero deltas have no direction: they only lower the norm.
    Gradient steps from the normalised arithmetic mean on coefficients of the Gram matrix, until a
    step is below ``tolerance`` (radians); the report has the ``iterations`` and the
    ``largest_angle`` to the mean, below pi/2 of which the mean is unique. Deltas whose directions
    cancel are refused, as are steps that have not died out after ``max_iterations``. mergekit's
    karcher stops at 10 iterations or 1e-5 and has equal weights.

    Exact up to ``tolerance``; does not depend on the order; rank None is the numerical rank of the
    sum. Gauge-invariant. Karcher 1977.
    """
    w = _shares(request)
    if (w < 0).any():
        raise InputError("must not be negative: a mean on the sphere has none", key="weights")
    if (w.sum(1) == 0).any():
        raise InputError("must not all be 0", key="weights")
    tolerance, most = request.arguments["tolerance"], request.arguments["max_iterations"]

    def rule(m: ModuleFactors, gram: np.ndarray) -> Coefficients:
        weights = w[m.index, m.adapters] / w[m.index].sum()
        try:
            return _karcher(gram, weights, tolerance, most)
        except ValueError as error:
            raise InputError(str(error), key=m.module.name) from None

    yield from _combined(request, rule)


def _combined(
    request: MergeRequest, rule: Callable[[ModuleFactors, np.ndarray], Coefficients]
) -> Iterator[MergedModule]:
    """The sum of each module's deltas with the coefficients that a rule on their Gram gives."""
    for batch in batches(request):
        sums = []
        for m, atoms in batch:
            c, details = rule(m, _gram(atoms, request.threads, request.device))
            details["coefficients"] = c.tolist()
            sums.append(Sum(m.module, m.segments(c), request.members(m), m, details))
        pad = request.rank is not None
        yield from truncate(
            sums, request.rank, request.energy, request.threads, pad=pad, device=request.device
        )


def _gram(atoms: Atoms, threads: int, device: Any) -> np.ndarray:
    """Inner products of the deltas, float64. From atoms: large factors of a small delta cancel."""
    u = atoms.left * atoms.sigma[:, None]
    if device is not None:
        owner = np.repeat(np.eye(len(atoms.counts)), atoms.counts, axis=1)
        return owner @ (gram(u, device) * gram(atoms.right, device)) @ owner.T
    return block_gram(u, atoms.right, atoms.bounds, accumulate="fp64", threads=threads)


def _shares(request: MergeRequest) -> np.ndarray:
    """The weights, of which only the ratios within a module matter, where their sums exist."""
    return np.array([near_one(row)[0] for row in request.weights])


def _times(request: MergeRequest) -> np.ndarray:
    """t of every module."""
    t, w = request.arguments["t"], _shares(request)
    if t is None:
        if (w < 0).any() or (w.sum(1) == 0).any():
            raise InputError(
                "must not be negative nor both 0: they say where between the two to stop",
                key="weights",
            )
        return w[:, 1] / w.sum(1)
    if (w[:, 0] != w[:, 1]).any():
        raise InputError("give t or weights, not both", key="t")
    values = schedule.column(t, request.source.modules, "t")
    if ((values < 0) | (values > 1)).any():
        raise InputError("must be in [0, 1]", key="t")
    return values


def _slerp(gram: np.ndarray, t: float, dialect: str) -> tuple[np.ndarray, float]:
    """Coefficients of the two deltas, and the angle between them."""
    norms = np.sqrt(np.diag(gram))
    straight = np.array([1.0 - t, t])
    cosine = 0.0
    if norms.all():
        cosine = min(1.0, max(-1.0, float(gram[0, 1] / norms[0] / norms[1])))
    angle = math.acos(cosine)
    colinear = 1.0 - abs(cosine) <= _COLINEAR or (dialect == "slerp" and abs(cosine) > _NEARLY)
    if colinear:
        along = straight
    else:
        along = np.sin(straight * angle) / math.sin(angle)
    if dialect != "unit":
        return along, angle
    if not norms.all():
        return straight, angle
    if colinear and cosine < 0:
        raise ValueError("the two updates are opposite: no shortest path lies between them")
    return along / norms * float(straight @ norms), angle


def _karcher(
    gram: np.ndarray, weights: np.ndarray, tolerance: float, most: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Coefficients of the deltas of the Karcher mean; weights >= 0 over the adapters given."""
    norms = np.sqrt(np.diag(gram))
    live = np.flatnonzero((norms > 0) & (weights > 0))
    c = np.zeros(len(norms))
    if not len(live):
        return c, {"iterations": 0, "largest_angle": 0.0}
    cosines = gram[np.ix_(live, live)] / np.outer(norms[live], norms[live])
    # Points of the sphere in as many dimensions as there are adapters, with these cosines.
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    points = (vectors * np.sqrt(np.maximum(values, 0.0)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    w = weights[live] / weights[live].sum()
    # The mean is mixed of the points; the coefficients make every step along with it.
    mixed = w.copy()
    length = float(np.linalg.norm(mixed @ points))
    if length < 1e-6:
        raise ValueError("the directions of the updates cancel: they have no mean")
    mixed /= length
    for iteration in range(most + 1):
        mean = mixed @ points
        angles = _angles(points, mean)
        stretch = w * np.divide(angles, np.sin(angles), out=np.ones(len(w)), where=angles > 1e-8)
        pull = stretch - mixed * float(stretch @ np.cos(angles))
        step = float(np.linalg.norm(pull @ points))
        if step <= tolerance:
            break
        if iteration == most:
            raise ValueError(
                f"no Karcher mean after {most} iterations: the last step was {step:.1e}"
            )
        mixed = math.cos(step) * mixed + math.sin(step) / step * pull
        mixed /= float(np.linalg.norm(mixed @ points))
    c[live] = mixed * float(weights @ norms) / norms[live]
    return c, {"iterations": iteration, "largest_angle": float(angles.max())}


def _angles(points: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Angles between unit vectors, accurate where they are small (Kahan 2006)."""
    apart = np.linalg.norm(points - mean, axis=1)
    return 2.0 * np.arctan2(apart, np.linalg.norm(points + mean, axis=1))


def _time(value: Any) -> Any:
    """Checked against the modules later: one number, a gradient, or filters."""
    if value is None or isinstance(value, (list, tuple, dict)):
        return value
    return number(0, 1)(value)


METHODS = (
    MergeMethod(
        "slerp", slerp, arity=(2, 2),
        arguments={
            "t": Argument(None, _time, "from the first adapter (0) to the second (1); by module"),
            "dialect": Argument(
                "nuslerp", choice("nuslerp", "slerp", "unit"),
                "nuslerp or slerp (mergekit's two), or unit: the norm apart from the direction",
            ),
        },
    ),
    MergeMethod(
        "karcher", karcher,
        arguments={
            "tolerance": Argument(
                1e-10, number(1e-14, 1.0), "largest step, in radians, that ends the iteration"
            ),
            "max_iterations": Argument(1000, whole(1), "refused when these do not suffice"),
        },
    ),
)  # fmt: skip
