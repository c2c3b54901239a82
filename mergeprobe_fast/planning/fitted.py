"""Predictions fitted to merges that were measured, with intervals from what they missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning.judging import Judge, Judged, padded
from mergeprobe_fast.planning.measure import RANGE, Measured

COVERAGE = 0.9
_AFFINE_FROM = 4  # labels for an offset and a slope
_ISOTONIC_FROM = 30  # labels for a curve of any shape
_SAME = 1e-6  # of weights, relative: a spreadsheet may have rounded them
_PRIOR = 4.0  # labels that the prediction as it is counts as
_FIELDS = ("retention", "low", "high", "outside", "weights")


class _Remembers:
    """A judge that is not asked again for what it said once; a data-aware merge is expensive."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.unavailable, self.level = judge.unavailable, judge.level
        self.calibrated, self.coverage = judge.calibrated, judge.coverage
        self.refused = getattr(judge, "refused", {})
        self._said: dict[tuple[str, frozenset[int]], dict[int, tuple[Any, ...]]] = {}

    def first(self, members: np.ndarray, action: str) -> Judged:
        """Ask, and remember."""
        said = self._judge.judge(members, action)
        for row, own in enumerate(members):
            self._said[action, frozenset(own[own >= 0].tolist())] = {
                int(i): tuple(getattr(said, f)[row, at] for f in _FIELDS)
                for at, i in enumerate(own) if i >= 0
            }  # fmt: skip
        return said

    def predicted(
        self, sets: list[tuple[int, ...]], action: str, weights: list[tuple[float, ...] | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retention and whether to rely on it, (sets, widest), of merges as they were made.

        With the weights that the action takes, or with those given where they are others.
        """
        members = padded(sets)
        said = self.first(members, action)
        kept, known = said.retention.copy(), np.isfinite(said.retention) & ~said.outside
        for row, (own, given) in enumerate(zip(sets, weights, strict=True)):
            size = len(own)
            if given is None or np.allclose(said.weights[row, :size], given, rtol=_SAME, atol=0):
                continue
            weighted = getattr(self._judge, "weighted", None)
            if weighted is None:
                raise InputError(f"{action} of {size} with other weights than it takes",
                                 key="measured")  # fmt: skip
            one = weighted(members[row : row + 1, :size], np.array([given], np.float64))
            kept[row, :size] = one.retention[0]
            known[row, :size] = np.isfinite(one.retention[0]) & ~one.outside[0]
        return kept, known

    def judge(self, members: np.ndarray, action: str) -> Judged:
        """What it said or says."""
        known = [self._said.get((action, frozenset(own[own >= 0].tolist()))) for own in members]
        new = np.array([k is None for k in known], bool)
        if new.all():
            return self._judge.judge(members, action)
        out = {f: np.full(members.shape, f == "outside" or np.nan, bool if f == "outside" else None)
               for f in _FIELDS}  # fmt: skip
        if new.any():
            said = self._judge.judge(members[new], action)
            for f in _FIELDS:
                out[f][new] = getattr(said, f)
        for row in np.flatnonzero(~new):
            for at, i in enumerate(members[row].tolist()):
                for f, value in zip(_FIELDS, known[row].get(i, ()), strict=False):
                    out[f][row, at] = value
        return Judged(**out)


class FittedJudge:
    """A judge whose retention went through a curve, with intervals from what it missed.

    ``miss``: what they reach to both sides; None: there are too few labels to tell. Then the
    judge's own, if it has any, are widened to where the curve takes them, and a judge that was not
    calibrated is still none.
    """

    def __init__(
        self, judge: _Remembers, curve: Callable[[np.ndarray], np.ndarray], miss: float | None,
        reason: str,
    ) -> None:  # fmt: skip
        self._judge, self._curve, self._miss = judge, curve, miss
        self.unavailable, self.level = judge.unavailable, judge.level
        self.refused = judge.refused
        self.coverage = judge.coverage if miss is None else COVERAGE
        self.calibrated = judge.calibrated or miss is not None
        self.reason = reason

    def judge(self, members: np.ndarray, action: str) -> Judged:
        """As the judge says, fitted to what was measured."""
        said = self._judge.judge(members, action)
        kept = np.clip(self._curve(said.retention), *RANGE)
        if self._miss is None:
            low = np.minimum(said.low, self._curve(said.low))
            high = np.maximum(said.high, self._curve(said.high))
        else:
            low, high = kept - self._miss, kept + self._miss
        low, high = (np.clip(end, *RANGE) for end in (low, high))
        return Judged(kept, low, high, said.outside, said.weights)


def fitted(judge: Judge, measured: Measured) -> FittedJudge:
    """The judge recalibrated by measured merges.

    With few labels, an offset; from 4, an offset and a slope that is not negative, both shrunk
    towards the prediction as it is, which counts as 4 labels; from 30, a curve that does not fall
    (isotonic). Intervals are conformal: the distance from labels that is exceeded by one in ten,
    each label predicted from a fit without its merge, so that members of one merge do not vouch for
    each other. With less than 9 labels no interval of 90 % can be had from them. Where the judge
    abstains, labels are left out.

    Raises:
        InputError: an action that cannot be judged here; no measured merge that can be predicted.
    """
    judge = _Remembers(judge)
    predicted, labels, group = [], [], []
    for action in dict.fromkeys(measured.actions):
        if action in judge.unavailable:
            raise InputError(f"{action} needs {judge.unavailable[action]}", key="measured")
        which = [k for k, a in enumerate(measured.actions) if a == action]
        kept, known = judge.predicted(
            [measured.members[k] for k in which], action,
            [measured.weights[k] if measured.weights else None for k in which],
        )  # fmt: skip
        for row, k in enumerate(which):
            for place, label in enumerate(measured.retention[k]):
                if math.isfinite(label) and known[row, place]:
                    predicted.append(kept[row, place])
                    labels.append(label)
                    group.append(k)
    if not labels:
        raise InputError("none of the measured merges can be predicted", key="measured")
    x, y, of = np.array(predicted), np.array(labels), np.array(group)
    curve = _fit(x, y)
    missed = np.empty(len(y))
    for k in np.unique(of):
        out = of == k
        without = _fit(x[~out], y[~out]) if (~out).any() else _as_it_is
        missed[out] = np.abs(np.clip(without(x[out]), *RANGE) - y[out])
    place = math.ceil(COVERAGE * (len(y) + 1))
    miss = float(np.sort(missed)[place - 1]) if place <= len(y) else None
    merges = len(np.unique(of))
    reason = f"fitted to {len(y)} measured members of {merges} merge{'s' if merges > 1 else ''}"
    if miss is None:
        reason += ", too few to tell how far off it is"
    return FittedJudge(judge, curve, miss, reason)


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    if len(y) >= _ISOTONIC_FROM:
        return _isotonic(x, y)
    slope, center = 1.0, float(x.mean())
    shift = float((y - x).sum() / (len(y) + _PRIOR))
    if len(y) >= _AFFINE_FROM:
        dx, dy = x - center, y - y.mean()
        prior = _PRIOR * max(float(dx @ dx) / len(y), 1e-4)
        slope = max(0.0, (float(dx @ dy) + prior) / (float(dx @ dx) + prior))
    return lambda v: center + shift + slope * (v - center)


def _isotonic(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares among curves that do not fall: pool adjacent violators, lines in between."""
    at, first = np.unique(x, return_inverse=True)
    # Of each block: its first and last x, and the sum and number of its labels.
    blocks: list[tuple[float, float, float, float]] = []
    for v, total, number in zip(at, np.bincount(first, y), np.bincount(first), strict=True):
        block = (float(v), float(v), float(total), float(number))
        while blocks and blocks[-1][2] * block[3] >= block[2] * blocks[-1][3]:
            last = blocks.pop()
            block = last[0], block[1], last[2] + block[2], last[3] + block[3]
        blocks.append(block)
    edges = [edge for b in blocks for edge in dict.fromkeys(b[:2])]
    value = [b[2] / b[3] for b in blocks for _ in dict.fromkeys(b[:2])]
    return lambda v: np.where(np.isnan(v), np.nan, np.interp(v, edges, value))
