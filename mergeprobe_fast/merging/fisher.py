"""Fisher merging: entries weighted by how much each domain's loss depends on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.activation import calibration_of, inputs, positive_weights
from mergeprobe_fast.merging.arguments import number
from mergeprobe_fast.merging.elementwise_rules import blame, cut, whole
from mergeprobe_fast.merging.methods import (
    Argument,
    DenseModule,
    MergedModule,
    MergeMethod,
    MergeRequest,
)
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.ops._tables import SEGMENT
from mergeprobe_fast.ops.canonical import matrix_record
from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule


def fisher(request: MergeRequest) -> Iterator[MergedModule]:
    """Every entry averaged with the diagonal Fisher information of each domain as its weight.

    ``M_od = sum_i w_i F_i,od W_i,od / sum_i w_i F_i,od`` with ``F_i,od = E_t (y_o x_d)^2`` over
    the T sampled tokens of adapter i's domain: x the module's input, y the gradient of the loss
    with respect to its output (of labels drawn from the model where the calibration has both
    kinds), both at the base model (not at each adapter's own weights, as in the paper), of single
    tokens (not of whole sequences). F_i has rank T in this form and is never formed. ``floor``,
    times the mean Fisher information of the module, is added to every F_i: where nothing is known
    the result is the weighted average. Weights must be positive; only ratios matter. An adapter
    that lacks the module is zero there, with the Fisher of its domain.

    Elementwise in float32 (sums of T squares: 1e-6) before the cut to ``rank`` (default: the
    largest of the adapters), whose error is reported. Gauge-invariant. Needs gradients.
    Matena and Raffel 2022.
    """
    for m, call in _calls(request):
        yield cut(request, m, *call)


def dense(request: MergeRequest) -> Iterator[DenseModule]:
    """The rule itself, row by row."""
    for m, call in _calls(request):
        yield whole(request, m, *call)


class _Call(NamedTuple):
    """What the kernels are given: all adapters, those that lack the module last, of rank 0."""

    deltas: Deltas
    weights: np.ndarray
    rule: ElementwiseRule
    information: Deltas  # F_i


def _calls(request: MergeRequest) -> Iterator[tuple[ModuleFactors, _Call]]:
    calibration = calibration_of(request)
    require(calibration, request.source.modules)
    positive_weights(request, "fisher")
    rule = ElementwiseRule(combine="fisher", floor=request.arguments["floor"])
    for chunk in request.chunks():
        for m in chunk:
            lacking = np.setdiff1d(np.arange(len(request.domains)), m.adapters)
            members = np.concatenate([m.adapters, lacking])
            weights = request.weights[m.index, members]
            nothing = np.zeros(len(lacking), SEGMENT)
            segments = np.concatenate([m.segments(), nothing])
            there = _there(request, m, len(lacking))
            deltas = Deltas(segments, m.module.d_out, m.module.d_in, m, there)
            information = _information(request, m, [request.domains[int(i)] for i in members])
            yield m, _Call(deltas, weights / weights.max(), rule, information)


def _there(request: MergeRequest, m: ModuleFactors, lacking: int) -> Any:
    """The deltas on the request's device, those of the adapters that lack the module of rank 0."""
    if request.device is None:
        return None
    nothing = np.zeros((m.module.d_out, 0), np.float32), np.zeros((0, m.module.d_in), np.float32)
    factors = [((b.raw, b.dtype), (a.raw, a.dtype), float(s))
               for b, a, s in zip(m.b, m.a, m.scales, strict=True)]  # fmt: skip
    factors += [((nothing[0], "F32"), (nothing[1], "F32"), 0.0)] * lacking
    try:
        return request.device.deltas(factors)
    except InputError as error:
        raise blame(error, m) from None


def _information(request: MergeRequest, m: ModuleFactors, domains: Sequence[str]) -> Deltas:
    """``F_i = (Y^2)^T (X^2) / T`` as factors, of mean 1 over all entries and adapters."""
    calibration = calibration_of(request)
    squares: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for g in dict.fromkeys(domains):
        x, y = inputs(calibration, g, m.module), calibration.gradients(g, m.module.name)
        squares[g] = y.astype(np.float64), x.astype(np.float64)
    # Gradients may be 1e-25: their squares fit float32 only relative to the largest.
    tops = [max(float(np.abs(s[k]).max()) for s in squares.values()) or 1.0 for k in (0, 1)]
    stored = {
        g: tuple(np.square(v / top).astype(np.float32) for v, top in zip(s, tops, strict=True))
        for g, s in squares.items()
    }
    means = {
        g: float((y.mean(axis=1, dtype=np.float64) * x.mean(axis=1, dtype=np.float64)).mean())
        for g, (y, x) in stored.items()
    }
    mean = sum(means[g] for g in domains) / len(domains)
    segments = np.zeros(len(domains), SEGMENT)
    for record, g in zip(segments, domains, strict=True):
        y, x = stored[g]
        record["u"], record["v"] = matrix_record(y), matrix_record(x)
        record["rank"], record["scale"] = len(y), 1.0 / (len(y) * mean) if mean > 0 else 0.0
    there = None
    if request.device is not None:
        there = request.device.deltas([
            ((stored[g][0].T, "F32"), (stored[g][1], "F32"), float(s))
            for g, s in zip(domains, segments["scale"], strict=True)
        ])  # fmt: skip
    return Deltas(segments, m.module.d_out, m.module.d_in, stored, there)


METHODS = (
    MergeMethod(
        "fisher", fisher, data=("inputs", "gradients"), dense=dense,
        arguments={
            "floor": Argument(
                1e-6, number(0, open_least=True), "added to each Fisher, of the module's mean"
            ),
        },
    ),
)  # fmt: skip
