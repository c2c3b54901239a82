"""Merging singular vectors of the tasks: TSV-M."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mergeprobe_fast.merging.arguments import number
from mergeprobe_fast.merging.atoms import Atoms, Basis, bases, batches, inner
from mergeprobe_fast.merging.methods import Argument, MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.truncate import product, truncate

TOLERANCE = Argument(
    1e-4, number(1e-6, 1.0),
    "directions of the joint singular vectors below this share of the largest are shared: dropped",
)  # fmt: skip


def tsv_m(request: MergeRequest) -> Iterator[MergedModule]:
    """Orthogonalise the singular vectors of all deltas jointly, then add (TSV-M, rank-limited).

    With w_i W_i = U_i S_i V_i^T the result is U* diag(S_1, S_2, ...) V*^T, where U* is the polar
    factor of [U_1 U_2 ...], the orthonormal matrix nearest to it, and V* that of [V_1 V_2 ...]. Of
    each delta a share ``keep`` of its singular triples enters, leading ones first: of its numerical
    rank, where the published code takes min(d_out, d_in) / N triples, which for LoRA deltas brings
    in null vectors that rounding chooses. A direction that deltas share makes the polar factor
    ambiguous: directions whose singular value in [U_1 U_2 ...] is below ``tolerance`` of the
    largest are dropped (the report counts them), so that duplicates together count once.

    A weight scales its delta, a weight of 0 leaves it out. Exact; rank None is the numerical rank.
    Gauge-invariant (with ``keep`` below 1 up to ties of singular values). Gargiulo et al. 2025.
    """
    share, tolerance = request.arguments["keep"], request.arguments["tolerance"]
    for batch in batches(request):
        chosen = [
            _leading(atoms, np.where(request.weights_of(m) != 0, share, 0.0)) for m, atoms in batch
        ]
        stacks = [x for a in chosen for x in (a.left, a.right)]
        sides = iter(bases(stacks, request.threads, request.device))
        sums = []
        for (m, _), atoms in zip(batch, chosen, strict=True):
            sigma = atoms.spread(request.weights_of(m)) * atoms.sigma
            two = [resolved(next(sides), tolerance) for _ in range(2)]
            left, right = (polar_rows(side, request.threads, request.device) for side in two)
            details = {
                "shared_left": len(sigma) - len(two[0].sigma),
                "shared_right": len(sigma) - len(two[1].sigma),
            }
            sums.append(product(m.module, left.T * sigma, right, request.members(m), details))
        pad = request.rank is not None
        yield from truncate(
            sums, request.rank, request.energy, request.threads, pad=pad, device=request.device
        )


def resolved(basis: Basis, tolerance: float) -> Basis:
    """The directions whose singular value is above that share of the largest."""
    k = int(np.count_nonzero(basis.sigma > tolerance * basis.sigma.max(initial=0.0)))
    return Basis(basis.rows[:k], basis.sigma[:k], basis.mix[:k])


def polar_rows(basis: Basis, threads: int, device: Any = None) -> np.ndarray:
    """The polar factor of the stack that the basis is of: the nearest orthonormal rows."""
    return inner(basis.mix.T, basis.rows.T, threads, device)


def _leading(atoms: Atoms, shares: np.ndarray) -> Atoms:
    """Of each adapter's atoms that share, rounded up."""
    counts = np.ceil(np.round(shares * atoms.counts, 9)).astype(np.int64)
    if (counts == atoms.counts).all():
        return atoms
    rows = np.concatenate(
        [np.arange(n) < k for n, k in zip(atoms.counts, counts, strict=True)]
    )
    return atoms.select(rows)


METHODS = (
    MergeMethod(
        "tsv_m", tsv_m, weights="one",
        arguments={
            "keep": Argument(
                1.0, number(0, 1, open_least=True), "share of each delta's singular triples"
            ),
            "tolerance": TOLERANCE,
        },
    ),
)  # fmt: skip
