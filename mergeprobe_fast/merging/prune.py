"""Merging singular components by weights of their own, and leaving out those that only harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.engine.sets import RIDGE
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.activation import Recent, calibration_of, inputs, positive_weights
from mergeprobe_fast.merging.arguments import flag, number
from mergeprobe_fast.merging.atom_weights import AtomProblem, Scale, seen_by
from mergeprobe_fast.merging.atoms import atoms
from mergeprobe_fast.merging.methods import (
    Argument,
    MergedModule,
    MergeMethod,
    MergeRequest,
    near_one,
)
from mergeprobe_fast.merging.source import ModuleFactors, each_module
from mergeprobe_fast.merging.truncate import Sum, product, truncate
from mergeprobe_fast.zoo import Module


def prune(request: MergeRequest) -> Iterator[MergedModule]:
    """Every singular component of every delta gets its own weight, and those that harm get none.

    ``M = sum_a z_a sigma_a u_a v_a^T`` over the singular triples a of all W_i, with the z >= 0 that
    minimise ``sum_i w_i e_i``, ``e_i = |M - W_i|^2 / |W_i|^2``: mean squared outputs on the samples
    of the calibration domain of adapter i, summed over modules, each module's relative to the base
    module's own output there where that was recorded (``relative``; a base output of zero is
    refused). That falls into one non-negative least squares problem per module. Weights must be
    positive; only their ratios matter. With equal ones the result leaves each adapter what
    ``pruned_retention`` of :func:`mergeprobe_fast.set_features` says, up to float32.

    ``threshold`` first drops the components whose own energy, relative to the owner's, is less than
    that many times what they add in sum to the others', relative to theirs (0: none; 1: the
    harmful ones of ``harmful_energy``); the others then get the best weights. Components that the
    samples do not excite are dropped: nothing is known of them. Every module reports ``atoms``, the
    components of each of its members, and ``atoms_kept`` of them.

    ``off_diagonal`` is regmean's: below 1 the rest of the weight is on the mean squares of all
    tokens. It is 1 here, since few weights are fitted to many outputs. ``ridge`` is of every
    component's own energy and draws its weight to zero; it makes equal components share theirs.

    An adapter that lacks a module is zero there, and its inputs hold the result down. One that is
    zero on all of its own inputs has nothing to keep and takes no part in the errors. ``rank=None``
    gives the numerical rank of what is left. Float64; exact for the samples up to the ridge.
    Gauge-invariant but for rotations inside equal singular values. Needs inputs. After no paper:
    least squares in the metric of RegMean (Jin et al. 2023), with fewer unknowns. On a device the
    least squares themselves, of as many unknowns as components, run on the CPU.
    """
    positive_weights(request, "prune")
    calibration, arguments = calibration_of(request), request.arguments
    require(calibration, request.source.modules)
    scale = Scale(calibration, arguments["relative"] and calibration.has_output_moments)
    off, recent = arguments["off_diagonal"], Recent(request.workers)
    domains = tuple(dict.fromkeys(request.domains))

    def shared(m: ModuleFactors) -> str:
        return calibration.input_key(m.module.name)

    def samples(m: ModuleFactors) -> dict[str, np.ndarray]:
        return recent.get(shared(m), lambda: {g: inputs(calibration, g, m.module) for g in domains})

    def seen(right: np.ndarray, g: str, m: ModuleFactors) -> np.ndarray:
        moment = calibration.moment(g, m.module.name) if off < 1 else None
        factor = _factor(scale, g, m.module)
        return seen_by(right, samples(m)[g], factor, off, moment, request.device)

    energy = _energies(request, seen, shared)
    lambdas = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)

    def merged(m: ModuleFactors) -> MergedModule:
        whole = _pruned(request, m, seen, near_one(request.weights[m.index])[0] * lambdas)
        pad = request.rank is not None
        (cut,) = truncate([whole], request.rank, request.energy, 1, pad=pad, device=request.device)
        return cut

    yield from each_module(request.chunks(), merged, request.workers, shared)


_Seen = Callable[[np.ndarray, str, ModuleFactors], np.ndarray]


def _factor(scale: Scale, domain: str, module: Module) -> float:
    factor = scale.of(domain, module.name)
    if np.isnan(factor):
        reason = f"the base module's outputs are zero in domain {domain!r}: nothing is relative to"
        raise InputError(f"{reason} them (relative=false takes energies as they are)",
                         path=scale.calibration.path, key=module.name)  # fmt: skip
    return factor


def _energies(
    request: MergeRequest, seen: _Seen, shared: Callable[[ModuleFactors], str]
) -> np.ndarray:
    """|W_i|^2 of every adapter on the inputs of its own domain, over all modules: one pass."""

    def of_module(m: ModuleFactors) -> np.ndarray:
        found = atoms([m], 1, request.device)[0]
        out = np.zeros(len(request.domains))
        for i, part in zip(m.adapters, found.parts, strict=True):
            rows = seen(found.right[part], request.domains[i], m)
            out[i] = np.square(found.sigma[part]) @ np.square(rows).sum(axis=1)
        return out

    total = np.zeros(len(request.domains))
    for part in each_module(
        request.source.chunks(request.threads), of_module, request.workers, shared
    ):
        total += part
    return total


def _pruned(request: MergeRequest, m: ModuleFactors, seen: _Seen, lambdas: np.ndarray) -> Sum:
    found = atoms([m], 1, request.device)[0]
    problem = AtomProblem(
        found.left * found.sigma[:, None],
        {g: seen(found.right, g, m) for g in dict.fromkeys(request.domains)}, request.domains,
        found.spread(m.adapters), lambdas, request.arguments["ridge"], request.device,
    )  # fmt: skip
    z = problem.prune(request.arguments["threshold"])
    kept = found.select(z > 0)
    details = {"atoms": found.counts.tolist(), "atoms_kept": kept.counts.tolist()}
    b = (kept.left * (kept.sigma * z[z > 0])[:, None]).T
    return product(m.module, b, kept.right, request.members(m), details)


METHODS = (
    MergeMethod(
        "prune", prune, data=("inputs",),
        arguments={
            "threshold": Argument(
                0.0, number(0), "components worth less than that many times their harm are dropped"
            ),
            "off_diagonal": Argument(
                1.0, number(0, 1), "what the off-diagonals of the input second moment count"
            ),
            "ridge": Argument(
                RIDGE, number(0, 1, open_least=True), "added to the diagonal, of every component's"
            ),
            "relative": Argument(
                True, flag, "a module counts relative to the base module's output, if recorded"
            ),
        },
    ),
)  # fmt: skip
