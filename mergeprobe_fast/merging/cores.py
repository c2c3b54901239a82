"""Merging in the core space of LoRA deltas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergeprobe_fast.merging.arguments import choice, flag, number, whole
from mergeprobe_fast.merging.atoms import Atoms, bases, batches, inner
from mergeprobe_fast.merging.disjoint import disjoint_mean, merged_blocks, pruned
from mergeprobe_fast.merging.isotropic import isotropic
from mergeprobe_fast.merging.methods import Argument, MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.singular import polar_rows, resolved
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.merging.truncate import product, truncate


def core_space(request: MergeRequest) -> Iterator[MergedModule]:
    """Merge R x R cores in joint bases of the stacked factors (Core Space).

    Every delta is W_i = Q_B C_i Q_A^T with orthonormal Q_B, Q_A from the SVDs of [B_1 B_2 ...] and
    [A_1; A_2; ...]; nothing is lost. A ``rule`` merges the cores, and the result goes back:

    * "sum": sum_i w_i C_i, equal to ``linear``; "mean": that over the number of adapters.
    * "ties": keep the ``density`` largest entries of each core, elect signs, average what agrees
      (``disjoint_mean``: signs before weights, a cancelled sum elects none). "dare_ties": the
      same with entries kept at random and rescaled, by ``seed``.
    * "tsv": TSV-M of the cores, equal to ``tsv_m``.

    ``isotropic``: then all singular values of the merged core are set to their mean, as in
    ``iso_c`` (equal to it for "sum").

    The bases are those of the balanced factors B_i = U_i sqrt(S_i), A_i = sqrt(S_i) V_i^T of each
    delta's SVD, not of the files' factors: with those, "ties" would depend on the gauge. They are
    unique up to signs, which cancel in every rule, and rotations inside equal singular values,
    which do not for "ties" and "dare_ties". Exact; rank None is the numerical rank.
    Gauge-invariant. Panariello et al. 2025.
    """
    for batch in batches(request):
        stacks = []
        for _, atoms in batch:
            root = np.sqrt(atoms.sigma)[:, None]
            stacks += [atoms.left * root, atoms.right * root]
        threads, device = request.threads, request.device
        found = iter(bases(stacks, threads, device))
        sums = []
        for m, atoms in batch:
            left, right = next(found).rows, next(found).rows
            left_core = inner(atoms.left, left, threads, device)
            right_core = inner(atoms.right, right, threads, device)
            b, a = _merged(request, m, atoms, left_core, right_core)
            b, a = inner(left.T, b.T, threads, device), inner(a, right.T, threads, device)
            sums.append(product(m.module, b, a, request.members(m)))
        if request.arguments["isotropic"]:
            yield from isotropic(request, sums)
        else:
            pad = request.rank is not None
            yield from truncate(
                sums, request.rank, request.energy, threads, pad=pad, device=device
            )


def _merged(
    request: MergeRequest, m: ModuleFactors, atoms: Atoms, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (b, a) of the merged core, from the atoms (K, R_B) and (K, R_A) in the bases."""
    rule, weights = request.arguments["rule"], request.weights_of(m)
    if rule in ("sum", "mean"):
        if rule == "mean":
            weights = weights / len(request.source.names)
        return left.T * (atoms.spread(weights) * atoms.sigma), right
    if rule == "tsv":
        live = atoms.spread(weights) != 0
        sigma = (atoms.spread(weights) * atoms.sigma)[live]
        sides = bases([left[live], right[live]], request.threads, request.device)
        tolerance = request.arguments["tolerance"]
        rows, columns = (
            polar_rows(resolved(side, tolerance), request.threads, request.device)
            for side in sides
        )
        return rows.T * sigma, columns
    if request.device is not None:
        core = merged_blocks(request, m, left.T * atoms.sigma, right, atoms.parts)
        return core, np.eye(core.shape[1])
    cores = [(left[part].T * atoms.sigma[part]) @ right[part] for part in atoms.parts]
    core = disjoint_mean(pruned(cores, request, m), weights)
    return core, np.eye(core.shape[1])


METHODS = (
    MergeMethod(
        "core_space", core_space, weights="one",
        arguments={
            "rule": Argument(
                "ties", choice("sum", "mean", "ties", "dare_ties", "tsv"),
                "what merges the cores: sum, mean, ties, dare_ties or tsv",
            ),
            "density": Argument(
                0.2, number(0, 1), "ties, dare_ties: share of the core's entries kept",
                per_adapter=True,
            ),
            "seed": Argument(0, whole(0, 2**64 - 1), "dare_ties: of the random choice"),
            "isotropic": Argument(False, flag, "equal singular values in the result"),
            "tolerance": Argument(
                1e-4, number(1e-6, 1.0),
                "tsv: directions below this share of the largest are shared; isotropic: values",
            ),
        },
    ),
)  # fmt: skip
