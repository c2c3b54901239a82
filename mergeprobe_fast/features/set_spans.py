"""Statistics of sets from the spaces that their members' deltas span, module by module."""

from __future__ import annotations

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.features.declare import ratio
from mergeprobe_fast.features.set_declare import (
    SetFeature,
    SetGroup,
    SetRequest,
    Values,
    over,
    plain,
)
from mergeprobe_fast.features.set_modules import ModuleAtoms, each_set, module_atoms

# Directions of a stack of unit vectors below this share of its largest singular value are
# rounding: factors are float32 (6e-8), and float64 Grams resolve the square of 1e-7.
_INDEPENDENT = 1e-6


@_env.one_blas_thread()
def _spans(request: SetRequest) -> Values:
    shape = request.members.shape
    energy = np.diagonal(request.totals.gram)
    rank, weight = np.zeros(shape[0]), np.zeros(shape[0])
    inside, total = np.zeros(shape), np.zeros(shape)
    for m in module_atoms(request):

        def add(s: int, members: np.ndarray, m: ModuleAtoms = m) -> None:
            rows, owner = m.of(members)
            if len(rows) == 0:
                return
            sigma, left, right = m.atoms.sigma[rows], m.atoms.left[rows], m.atoms.right[rows]
            cosines = right @ right.T
            own = np.bincount(owner, sigma**2, len(members))
            unit = sigma / np.sqrt(own)[owner]
            share = float((own / np.where(own > 0, energy[members], 1.0)).sum())
            rank[s] += share * _effective_rank(cosines * np.outer(unit, unit))
            weight[s] += share
            for i in range(len(members)):
                mine = owner == i
                total[s, i] += own[i]
                if own[i] > 0:
                    p = _within(left @ left.T, mine)
                    q = _within(cosines, mine)
                    scaled = sigma[mine, None] * p * sigma[mine]
                    inside[s, i] += float((scaled * q).sum())

        each_set(request, add)
    return {
        "stacked": ratio(rank, weight),
        "subspace_leverage": np.clip(ratio(inside, total), 0.0, 1.0),
    }


def _effective_rank(gram: np.ndarray) -> float:
    eigen = np.maximum(np.linalg.eigvalsh(gram), 0.0)
    share = eigen[eigen > 0] / eigen.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _within(cosines: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Inner products of one member's unit vectors once projected on the span of the others'."""
    values, vectors = np.linalg.eigh(cosines[np.ix_(~mine, ~mine)])
    kept = values > _INDEPENDENT**2 * values.max(initial=0.0)
    seen = (vectors[:, kept].T @ cosines[np.ix_(~mine, mine)]) / np.sqrt(values[kept])[:, None]
    return seen.T @ seen


GROUPS = (
    SetGroup(
        "spans", lambda recorded: None, _spans,
        (
            SetFeature(
                "stacked_effective_rank", "Effective rank of the stacked deltas",
                "exp of the entropy of the eigenvalues of sum_i W_i^T W_i / |W_i|^2 over the "
                "members that have the module, as shares; mean over modules, weighted by the sum "
                "of the shares of each member's energy that lie there.",
                plain("stacked"), 1.0, source="Roy and Vetterli 2007",
            ),
            *(
                SetFeature(
                    f"subspace_leverage_{how}", f"Subspace leverage, {what} member",
                    "|P W_i Q|^2 / |W_i|^2 over all modules, P and Q the projectors on the column "
                    "and row spaces that the other members span (directions below 1e-6 left out). "
                    "Tends to 1 where the others' ranks fill the module.",
                    over(how, "subspace_leverage"), 0.0, 1.0, "ours",
                )
                for how, what in (("min", "least"), ("mean", "mean"), ("max", "largest"))
            ),
            SetFeature(
                "subspace_leverage", "Subspace leverage", "Of each member.",
                plain("subspace_leverage"), 0.0, 1.0, "ours", per_member=True,
            ),
        ),
        default=False,
    ),
)  # fmt: skip
