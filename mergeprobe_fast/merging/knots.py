"""Merging in the joint singular basis of the concatenated deltas: KnOTS."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mergeprobe_fast.merging.arguments import choice, number, whole
from mergeprobe_fast.merging.atoms import Atoms, Basis, bases, batches, inner
from mergeprobe_fast.merging.disjoint import disjoint_mean, merged_blocks, pruned
from mergeprobe_fast.merging.methods import Argument, MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.merging.truncate import Sum, product, truncate


def knots(request: MergeRequest) -> Iterator[MergedModule]:
    """Merge the right sides of all deltas in one joint left singular basis, by TIES (KnOTS).

    [W_1 W_2 ...] = U S [V_1 V_2 ...]; the k x d_in blocks S V_i = U^T W_i are merged entry by entry
    by ``rule`` and U is multiplied back, k the numerical rank of the concatenation. "ties" keeps
    the ``density`` largest entries of each block, elects signs, and averages what agrees, weighted;
    "dare_ties" keeps entries at random instead and rescales them, by ``seed``. (Sums and means of
    the blocks would be ``linear``.) The published code sets one threshold over all modules of a
    task, keeps one entry more, gives a sum of zero the majority sign of all entries, and scales
    every task by the first weight; here each module has its own threshold, a cancelled sum elects
    no sign, and every adapter its own weight, after the election.

    Exact for the basis, whose signs cancel; where singular values of the concatenation are equal
    the basis, and with it the result, is not unique. N k d_in numbers a thread, never d_out d_in.
    rank None is the numerical rank, k at most. Gauge-invariant. Stoica et al. 2025.
    """
    with ThreadPoolExecutor(request.workers) as pool:
        for batch in batches(request):
            stacks = [x.left * x.sigma[:, None] for _, x in batch]
            found = bases(stacks, request.threads, request.device)
            sums = list(pool.map(partial(_merged, request), batch, found))
            pad = request.rank is not None
            yield from truncate(
                sums, request.rank, request.energy, request.threads, pad=pad, device=request.device
            )


def _merged(request: MergeRequest, module: tuple[ModuleFactors, Atoms], basis: Basis) -> Sum:
    """One module, on one thread: several are merged at a time."""
    m, atoms = module
    device = request.device
    mixed = inner(basis.rows, atoms.left, 1, device) * atoms.sigma
    if device is not None:
        merged = merged_blocks(request, m, mixed, atoms.right, atoms.parts)
    else:
        blocks = [inner(mixed[:, part], atoms.right[part].T, 1) for part in atoms.parts]
        merged = disjoint_mean(pruned(blocks, request, m), request.weights_of(m))
    return product(m.module, basis.rows.T, merged, request.members(m))


METHODS = (
    MergeMethod(
        "knots", knots, weights="one",
        arguments={
            "rule": Argument("ties", choice("ties", "dare_ties"), "ties or dare_ties"),
            "density": Argument(
                0.2, number(0, 1), "share of each block's entries kept", per_adapter=True
            ),
            "seed": Argument(0, whole(0, 2**64 - 1), "dare_ties: of the random choice"),
        },
    ),
)  # fmt: skip
