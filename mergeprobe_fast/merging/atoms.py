"""The deltas of a module as canonical atoms, and orthonormal bases of stacks of them.

An atom is a singular triple of one delta, sigma u v^T: what is left of the factors once the gauge
(A -> M A, B -> B M^-1) is taken out. Free are only the sign of each pair (u, v), and rotations
inside equal singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.algebra import dot
from mergeprobe_fast.merging.methods import MergeRequest
from mergeprobe_fast.merging.source import ModuleFactors, Stored
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.ops._tables import JOB, SEGMENT, address
from mergeprobe_fast.ops.canonical import NOISE, RELATIVE, STATUS, matrix_record

# float64 atoms held at once.
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Atoms:
    """Singular triples of the deltas of a module: ``delta_i = left_i.T diag(sigma_i) right_i``.

    Rows of one adapter are orthonormal, sigma is positive and descending; a delta below the
    rounding of its factors has none. float64.
    """

    left: np.ndarray  # (K, d_out), the adapters' rows one after the other
    sigma: np.ndarray  # (K,)
    right: np.ndarray  # (K, d_in)
    counts: np.ndarray  # atoms of each adapter that has the module

    @property
    def bounds(self) -> np.ndarray:
        """Where each adapter's rows start, and the end."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @property
    def parts(self) -> list[slice]:
        """The rows of each adapter."""
        return [slice(int(first), int(last)) for first, last in pairwise(self.bounds)]

    def spread(self, per_adapter: np.ndarray) -> np.ndarray:
        """One value per atom from one per adapter."""
        return np.repeat(per_adapter, self.counts)

    def select(self, rows: np.ndarray) -> Atoms:
        """The atoms where ``rows`` is true."""
        counts = np.array([np.count_nonzero(rows[part]) for part in self.parts], np.int64)
        return Atoms(self.left[rows], self.sigma[rows], self.right[rows], counts)


def batches(request: MergeRequest) -> Iterator[list[tuple[ModuleFactors, Atoms]]]:
    """The modules with their atoms, some at a time; the scale is in sigma, the weight is not.

    Raises:
        InputError: a factor that is not finite, by file and key.
    """
    for chunk in request.chunks():
        batch: list[ModuleFactors] = []
        size = 0
        for m in chunk:
            nbytes = 8 * int(m.ranks.sum()) * (m.module.d_out + m.module.d_in)
            if batch and size + nbytes > _BATCH_BYTES:
                found = atoms(batch, request.threads, request.device)
                yield list(zip(batch, found, strict=True))
                batch, size = [], 0
            batch.append(m)
            size += nbytes
        found = atoms(batch, request.threads, request.device)
        yield list(zip(batch, found, strict=True))


def atoms(modules: Sequence[ModuleFactors], threads: int, device: Any = None) -> list[Atoms]:
    """The atoms of each module. Exact: QR-like bases and core SVDs in float64 (P3)."""
    if device is not None:
        return _atoms_there(modules, device)
    ranks = [np.minimum(m.ranks, min(m.module.d_out, m.module.d_in)) for m in modules]
    stacks = [
        (np.zeros((int(r.sum()), m.module.d_out)), np.zeros((int(r.sum()), m.module.d_in)))
        for m, r in zip(modules, ranks, strict=True)
    ]
    segments = np.concatenate([m.segments() for m in modules] or [np.zeros(0, SEGMENT)])
    jobs = np.zeros(len(segments), JOB)
    every = np.concatenate(ranks or [np.zeros(0, np.int64)])
    starts = np.concatenate([[0], np.cumsum(every)]).astype(np.int64)
    at = 0
    for r, (left, right) in zip(ranks, stacks, strict=True):
        row = 0
        for rank in r:
            _describe(jobs[at], left[row:], right[row:], int(rank), int(starts[at]))
            at, row = at + 1, row + int(rank)
    sigma = _run(segments, np.arange(len(jobs) + 1, dtype=np.int64), jobs, RELATIVE, NOISE, threads)
    out = []
    at = 0
    for m, r, (left, right) in zip(modules, ranks, stacks, strict=True):
        mine = jobs[at : at + len(r)]
        for b, a, job in zip(m.b, m.a, mine, strict=True):
            _refuse(int(job["status"]), m, b, a)
        kept = np.concatenate(
            [np.arange(rank) < job["rank"] for rank, job in zip(r, mine, strict=True)]
        )
        whole = Atoms(left, sigma[starts[at] : starts[at + len(r)]], right, r)
        out.append(whole if kept.all() else whole.select(kept))
        at += len(r)
    return out


def _atoms_there(modules: Sequence[ModuleFactors], device: Any) -> list[Atoms]:
    from mergeprobe_fast.kernels.factors import canonical_forms

    owners = [(m, i) for m in modules for i in range(len(m))]
    parts = [
        [((m.b[i].raw, m.b[i].dtype), (m.a[i].raw, m.a[i].dtype), float(m.scales[i]))]
        for m, i in owners
    ]
    forms = canonical_forms(device, parts, RELATIVE, NOISE, _all_of_it, scaled=False)
    for (m, i), f in zip(owners, forms, strict=True):
        _refuse(f.status, m, m.b[i], m.a[i])
    out, at = [], 0
    for m in modules:
        mine = forms[at : at + len(m)]
        at += len(m)
        out.append(
            Atoms(
                np.concatenate([f.left for f in mine]),
                np.concatenate([f.sigma[: f.rank] for f in mine]),
                np.concatenate([f.right for f in mine]),
                np.array([f.rank for f in mine], np.int64),
            )
        )
    return out


def _all_of_it(_: int, sigma: np.ndarray, rank: int) -> int:
    return rank


class Basis(NamedTuple):
    """The SVD of a stack of rows, X = mix.T diag(sigma) rows, leading first; float64.

    Signs of pairs are arbitrary, as are rotations inside equal sigma.
    """

    rows: np.ndarray  # (k, d), orthonormal, spanning the rows of X
    sigma: np.ndarray  # (k,)
    mix: np.ndarray  # (k, K), orthonormal rows


def bases(stacks: Sequence[np.ndarray], threads: int, device: Any = None) -> list[Basis]:
    """The SVD of each stack X (K, d), of the rank that float32 rounding leaves it."""
    if device is not None:
        return _bases_there(stacks, device)
    segments, jobs = np.zeros(len(stacks), SEGMENT), np.zeros(len(stacks), JOB)
    found, units, at = [], [], 0
    for x, segment, job in zip(stacks, segments, jobs, strict=True):
        unit = np.eye(len(x))
        units.append((x, unit))
        segment["u"], segment["v"] = matrix_record(x), matrix_record(unit)
        segment["rank"], segment["scale"] = len(x), 1.0
        top = min(x.shape)
        rows, mix = np.zeros((top, x.shape[1])), np.zeros((top, len(x)))
        _describe(job, rows, mix, top, at)
        found.append((rows, mix))
        at += top
    each = np.arange(len(jobs) + 1, dtype=np.int64)
    sigma = _run(segments, each, jobs, NOISE, 0.0, threads)
    out = []
    for (rows, mix), job in zip(found, jobs, strict=True):
        if job["status"]:
            raise InputError(f"the deltas cannot be factorised: {STATUS[int(job['status'])]}")
        rank, first = int(job["rank"]), int(job["sigma"])
        out.append(Basis(rows[:rank], sigma[first : first + rank], mix[:rank]))
    return out


def _bases_there(stacks: Sequence[np.ndarray], device: Any) -> list[Basis]:
    from mergeprobe_fast.kernels.factors import canonical_forms

    parts = [[((x.T, "F64"), (np.eye(len(x)), "F64"), 1.0)] for x in stacks]
    forms = canonical_forms(device, parts, NOISE, 0.0, _all_of_it, scaled=False)
    for f in forms:
        if f.status:
            raise InputError(f"the deltas cannot be factorised: {STATUS.get(f.status, 'overflow')}")
    return [Basis(f.left, f.sigma[: f.rank], f.right) for f in forms]


def inner(x: np.ndarray, y: np.ndarray, threads: int, device: Any = None) -> np.ndarray:
    """``x @ y.T`` in float64 by the Gram kernel: numpy's own threads stall on a busy machine."""
    if device is not None:
        return dot(x, y.T, device)
    ones = [np.ones((len(side), 1)) for side in (x, y)]
    ends = [np.array([0, len(side)]) for side in (x, y)]
    return block_gram(
        x, ones[0], ends[0], y, ones[1], ends[1],
        reduce="none", accumulate="fp64", threads=threads,
    )  # fmt: skip


def _describe(job: np.void, left: np.ndarray, right: np.ndarray, rank: int, sigma: int) -> None:
    job["d_out"], job["d_in"], job["max_rank"] = left.shape[1], right.shape[1], rank
    job["u_out"], job["u_row"], job["u_col"] = address(left), left.shape[1], 1
    job["v_out"], job["v_row"], job["v_col"] = address(right), right.shape[1], 1
    job["sigma"] = sigma


def _run(
    segments: np.ndarray, bounds: np.ndarray, jobs: np.ndarray, relative: float, noise: float,
    threads: int,
) -> np.ndarray:  # fmt: skip
    """All singular values; vectors and ranks land where ``jobs`` says."""
    values = sum(
        min(int(s["rank"]), int(j["d_out"]), int(j["d_in"]))
        for s, j in zip(segments, jobs, strict=True)
    )
    sigma = np.zeros(values)
    _native.core().canonicalise(
        segments, bounds, jobs, sigma, True, False, relative, noise, threads, _native.isa()
    )
    return sigma


def _refuse(status: int, m: ModuleFactors, b: Stored, a: Stored) -> None:
    if status == 0:
        return
    if status not in STATUS:  # on a device only: here, what it leads to is refused in the end
        raise InputError("the merged update overflows float32", key=m.module.name)
    reason = STATUS[status].removeprefix("B ").removeprefix("A ")
    if status == 3:
        raise InputError(f"a delta cannot be factorised: {reason}", key=m.module.name)
    raise (b if status == 1 else a).refuse(reason)
