"""RegMean from the factors: the delta whose outputs are closest to every adapter's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from mergeprobe_fast.merging.activation import (
    ARGUMENTS,
    Metric,
    Metrics,
    calibration_of,
    inputs,
    pooled,
    positive_weights,
)
from mergeprobe_fast.merging.algebra import dot
from mergeprobe_fast.merging.arguments import choice
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeMethod,
    MergeRequest,
    near_one,
)
from mergeprobe_fast.merging.source import ModuleFactors, each_module
from mergeprobe_fast.merging.weighted_svd import Cut, SeenDelta


def regmean(request: MergeRequest) -> Iterator[MergedModule]:
    """The delta that best reproduces each adapter's outputs on the adapter's own inputs.

    ``M = (sum_i w_i W_i C_i) (sum_i w_i C_i)^-1``, which minimises
    ``sum_i w_i tr((M - W_i) C_i (M - W_i)^T)``, with C_i the second moment of the module's inputs
    in the calibration domain of adapter i: ``off_diagonal`` X^T X / T from the T samples, the rest
    of the weight on the mean squares over all tokens, and a ``ridge`` of every dimension's own mean
    square in each C_i. One adapter, equal adapters and equal inputs therefore give W_i itself, W_i,
    and the weighted average. Weights must be positive; only their ratios matter.

    In factor form the B_i stay as they are, ``M = [B_1 ... B_N] A'``, of rank sum r_i: what
    ``rank=None`` gives. ``rank`` or ``energy`` cut it with the least loss on the same inputs
    (``truncation="activation"``; energy is then a share of output energy) or in the Frobenius norm
    ("plain"). Exact for the samples, float64; products of large modules are float32 (1e-5 of the
    result, a thousandth of what storing the samples in bfloat16 does to it).

    ``absent="zero"``: an adapter that lacks a module is zero there, as everywhere in this package,
    and its inputs hold the result down; the sum of all output errors is least so. "skip" leaves
    such adapters out of the module's sums: what only one adapter has is then kept whole.

    Every module reports the energy of each adapter's own output and of its error: of the result,
    before the cut ("full"), and of the plain average 1/N ("average").

    Gauge-invariant. Needs inputs. RegMean (Jin et al. 2023).
    """
    positive_weights(request, "regmean")
    metrics = Metrics(request)
    yield from each_module(
        request.chunks(), partial(_merged, request, metrics), request.workers, metrics.shared
    )


def _merged(request: MergeRequest, metrics: Metrics, m: ModuleFactors) -> MergedModule:
    taking_part = m.adapters if request.arguments["absent"] == "skip" else slice(None)
    lam = near_one(request.weights[m.index])[0]
    domains = np.array(request.domains, object)
    metric = metrics.of(m.module, pooled(lam[taking_part], domains[taking_part]))
    lam = lam / lam[taking_part].sum()

    rows = _blocks(m)
    b = np.concatenate([f.wide() for f in m.b], axis=1)
    alone = metric.scaled(
        np.concatenate([f.wide() * s for f, s in zip(m.a, m.scales, strict=True)])
    )
    seen_alone = metric.seen(alone)
    own, diag = np.zeros_like(seen_alone), np.empty_like(alone)
    for i, at in rows.items():
        g = request.domains[i]
        mine = at, metric.rows[g]
        own[mine] = seen_alone[mine] * (lam[i] / metric.weights[g])
        diag[at] = alone[at] * (lam[i] * metric.diagonal[g])
    x, seen = metric.solve(own, diag)

    delta = SeenDelta(b, x, seen, metric, request.device)
    rank, energy = request.rank, request.energy
    cut = delta.cut(rank, energy, metric=request.arguments["truncation"])
    whole = rank is None and energy is None
    details = {"outputs": _outputs(request, m, metric, cut, whole, (alone, seen_alone), (x, seen))}
    if not whole:
        return cut.module(m.module, request.members(m), rank if energy is None else None, details)
    with np.errstate(over="ignore"):  # checked for every method at once
        return MergedModule(
            m.module, delta.a.astype(np.float32), b.astype(np.float32), request.members(m),
            cut.norm, 0.0, cut.rank_before, details,
        )  # fmt: skip


def _outputs(
    request: MergeRequest, m: ModuleFactors, metric: Metric, cut: Cut, whole: bool,
    alone: tuple[np.ndarray, np.ndarray], merged: tuple[np.ndarray, np.ndarray],
) -> Mapping[str, list[float]]:  # fmt: skip
    """Mean squared outputs on each adapter's own domain, one number per adapter of the merge.

    ``alone`` and ``merged`` are (scaled rows, those at the samples) of the stacked A and of A'.
    Outputs are taken in the coordinates of q, where B is its small factor r.
    """
    rows, r, device = _blocks(m), cut.delta.basis.r, request.device
    n = len(request.domains)
    table = {name: [0.0] * n for name in ("energy", "error", "full", "average")}
    for g in dict.fromkeys(request.domains):
        if g in metric.rows:
            each, result = (seen[:, metric.rows[g]] for _, seen in (alone, merged))
            weight = metric.weights[g]
        else:  # the domain only of adapters that do not take part here
            x = inputs(calibration_of(request), g, m.module)
            each, result = (dot(a, (x / metric.scale).T, device) for a, _ in (alone, merged))
            weight = float(len(x))
        full, average = dot(r, result, device), dot(r, each, device) / n
        kept = full if whole else dot(cut.kept, cut.kept.T @ full, device)
        for i in range(n):
            if request.domains[i] != g:
                continue
            own = np.zeros_like(full)
            if i in rows:
                own = dot(r[:, rows[i]], each[rows[i]], device)
            outputs = own, kept - own, full - own, average - own
            for values, output in zip(table.values(), outputs, strict=True):
                values[i] = float(np.square(output).sum()) / weight
    return table


def _blocks(m: ModuleFactors) -> dict[int, slice]:
    """The rows of each adapter in the stack of all A."""
    bounds = np.cumsum([0, *m.ranks])
    return {int(i): slice(*bounds[k : k + 2]) for k, i in enumerate(m.adapters)}


METHODS = (
    MergeMethod(
        "regmean", regmean, data=("inputs",),
        arguments={
            **ARGUMENTS,
            "truncation": Argument(
                "activation", choice("activation", "plain"), "where a rank cut loses least"
            ),
            "absent": Argument(
                "zero", choice("zero", "skip"), "what an adapter that lacks a module is there"
            ),
        },
    ),
)  # fmt: skip
