"""What a set could keep: with its atoms reweighted or pruned, and with any merge at all.

Errors are those of :mod:`.set_grams`, ``e_i = |M - W_i|^2 / |W_i|^2`` on the inputs of member i's
own domain, each module's energy relative to the base module's where output moments were recorded.
"""

from __future__ import annotations

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.sets import set_statistics
from mergeprobe_fast.features.declare import ratio
from mergeprobe_fast.features.set_declare import (
    SetFeature,
    SetGroup,
    SetRequest,
    Values,
    over,
    plain,
)
from mergeprobe_fast.features.set_modules import (
    ModuleAtoms,
    each_set,
    module_atoms,
    subzoo,
    used_adapters,
)
from mergeprobe_fast.merging.activation import inputs, require
from mergeprobe_fast.merging.atom_weights import AtomProblem, Scale, seen_by
from mergeprobe_fast.merging.merge import run
from mergeprobe_fast.merging.methods import MergeRequest
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.recorded import lacks_calibration

_REGMEAN_RIDGE = 1e-6


def _own_energy(request: SetRequest) -> tuple[np.ndarray, np.ndarray, Scale]:
    """|W_i|^2 of every adapter on its own domain; which sets have an optimum; how modules count."""
    totals, domain_of = request.totals, request.domain_of
    relative = totals.relative is not None
    grams = totals.relative if relative else totals.inputs
    at = np.arange(len(request.zoo))
    energy = grams[domain_of, at, at]

    def solvable(members: np.ndarray) -> bool:
        block = grams[domain_of[members, None, None], members[:, None], members]
        return bool((energy[members] > 0).all() and np.isfinite(block).all())

    sets = np.array([solvable(row[row >= 0]) for row in request.members], bool)
    return energy, sets, Scale(request.recorded.calibration, relative)


@_env.one_blas_thread()
def _atoms(request: SetRequest) -> Values:
    calibration, domain_of = request.recorded.calibration, request.domain_of
    names = request.totals.domains
    energy, solvable, scale = _own_energy(request)
    used = used_adapters(request)
    require(calibration, subzoo(request, used).modules)
    shape = request.members.shape
    error = {name: np.zeros(shape) for name in ("atom", "pruned")}
    harmful, total = np.zeros(shape), np.zeros(shape)
    kept, count = np.zeros(shape[0]), np.zeros(shape[0])
    for m in module_atoms(request):
        seen = _seen(request, m, np.unique(domain_of[used]), names, scale)

        def add(s: int, members: np.ndarray, m: ModuleAtoms = m, seen: dict = seen) -> None:
            rows, owner = m.of(members)
            if len(rows) == 0 or not solvable[s]:
                return
            own = [int(t) for t in domain_of[members]]
            problem = AtomProblem(
                m.atoms.left[rows] * m.atoms.sigma[rows, None],
                {t: seen[t][rows] for t in dict.fromkeys(own)}, own, owner, 1.0 / energy[members],
                device=request.device,
            )  # fmt: skip
            for name, z in (("atom", problem.solve()), ("pruned", problem.prune())):
                error[name][s, : len(members)] += problem.errors(z)
            kept[s] += np.count_nonzero(z)
            count[s] += len(z)
            bad = np.where(problem.harmful(), problem.own, 0.0)
            harmful[s, : len(members)] += np.bincount(owner, bad, len(members))
            total[s, : len(members)] += np.bincount(owner, problem.own, len(members))

        each_set(request, add)
    undefined = ~solvable[:, None] | (request.members < 0)
    out = {f"{name}_retention": np.where(undefined, np.nan, 1 - e) for name, e in error.items()}
    share = np.where(undefined, np.nan, ratio(harmful, total))
    kept = np.where(solvable, ratio(kept, count), np.nan)
    best = 1 - _reweighted_error(request)
    return out | {
        "harmful": share, "kept": kept,
        "gap": _mean(request, out["atom_retention"]) - _mean(request, best),
    }  # fmt: skip


def _seen(
    request: SetRequest, m: ModuleAtoms, domains: np.ndarray, names: tuple[str, ...], scale: Scale
) -> dict[int, np.ndarray]:
    """The right atoms at the samples of each domain, (atoms, T), scaled to energies that count."""
    seen = {}
    for t in domains:
        x = inputs(request.recorded.calibration, names[t], m.module)
        factor = scale.of(names[t], m.module.name)
        seen[int(t)] = seen_by(m.atoms.right, x, factor, device=request.device)
    return seen


def _reweighted_error(request: SetRequest) -> np.ndarray:
    found = set_statistics(
        request.totals, request.members, request.weights, request.domain_of,
        which=["reweighted"], threads=request.threads,
    )  # fmt: skip
    return found["reweighted_error"]


def _mean(request: SetRequest, values: np.ndarray) -> np.ndarray:
    there = request.members >= 0
    return np.where(there, values, 0.0).sum(axis=1) / there.sum(axis=1)


def _optimum(request: SetRequest) -> Values:
    recorded, method = request.recorded, MERGE_METHODS["regmean"]
    energy, solvable, scale = _own_energy(request)
    retention = np.full(request.members.shape, np.nan)
    arguments = method.defaults | {"off_diagonal": 1.0, "ridge": _REGMEAN_RIDGE}
    for s, row in enumerate(request.members):
        members = row[row >= 0]
        if not solvable[s]:
            continue
        source = ZooSource(subzoo(request, members))
        domains = tuple(recorded.domains[int(i)] for i in members)
        counts = np.array([[scale.of(g, m.name) for g in domains] for m in source.modules])
        merge = MergeRequest(
            source, counts / energy[members], None, None, request.threads, arguments,
            request.progress, recorded.calibration, domains, request.device,
        )  # fmt: skip
        error = np.zeros(len(members))
        for k, module in enumerate(run(method, merge)):
            error += counts[k] * module.details["outputs"]["full"]
        retention[s, : len(members)] = 1 - error / energy[members]
    return {
        "retention": retention,
        "gap": _mean(request, retention) - _mean(request, 1 - _reweighted_error(request)),
    }


def _worst_and_mean(value: str, key: str, title: str, definition: str) -> list[SetFeature]:
    return [
        SetFeature(f"{value}_{short}", f"{title}, {text}", definition, over(how, key), None, 1.0,
                   "ours")
        for how, short, text in (("min", "worst", "the worst member"),
                                 ("mean", "mean", "mean over members"))
    ]  # fmt: skip


GROUPS = (
    SetGroup(
        "atoms", lacks_calibration, _atoms,
        (
            *_worst_and_mean(
                "atom_retention", "atom_retention", "Retention proxy, best weights of atoms",
                "1 - e_i when every singular triple of every member's module has its own weight, "
                "those that make the mean of all e_i least.",
            ),
            *_worst_and_mean(
                "pruned_retention", "pruned_retention", "Retention proxy, atoms pruned",
                "The same with no weight below 0: atoms that only do harm are dropped.",
            ),
            SetFeature(
                "atoms_kept", "Atoms kept", "Share of the atoms whose weight is above 0 there.",
                plain("kept"), 0.0, 1.0, "ours",
            ),
            SetFeature(
                "atom_gap", "What weights of atoms buy",
                "atom_retention_mean - reweighted_retention_mean.", plain("gap"), 0.0,
                source="ours",
            ),
            SetFeature(
                "harmful_energy_mean", "Harmful energy, mean over members",
                "Share of a member's output energy on its own domain that lies in atoms which add "
                "more, in sum, to the others' relative energies on theirs.",
                over("mean", "harmful"), 0.0, 1.0, "ours",
            ),
            SetFeature(
                "harmful_energy_max", "Harmful energy, largest of the members",
                "See harmful_energy_mean.", over("max", "harmful"), 0.0, 1.0, "ours",
            ),
            SetFeature(
                "harmful_energy", "Harmful energy", "Of each member.", plain("harmful"), 0.0, 1.0,
                "ours", per_member=True,
            ),
            SetFeature(
                "pruned_retention", "Retention proxy, atoms pruned", "Of each member.",
                plain("pruned_retention"), None, 1.0, "ours", per_member=True,
            ),
        ),
        default=False,
    ),
    SetGroup(
        "optimum", lacks_calibration, _optimum,
        (
            *_worst_and_mean(
                "regmean_retention", "retention", "Retention proxy, RegMean",
                "1 - e_i of the delta, of any rank, that makes the mean of all e_i least on the "
                f"samples (RegMean, off_diagonal 1, ridge {_REGMEAN_RIDGE:g}). With fewer samples "
                "than inputs it fits them more closely than it would other inputs.",
            ),
            SetFeature(
                "optimum_gap", "What a free merge buys",
                "regmean_retention_mean - reweighted_retention_mean.", plain("gap"), 0.0,
                source="ours",
            ),
            SetFeature(
                "regmean_retention", "Retention proxy, RegMean", "Of each member.",
                plain("retention"), None, 1.0, "ours", per_member=True,
            ),
        ),
        default=False,
    ),
)  # fmt: skip
