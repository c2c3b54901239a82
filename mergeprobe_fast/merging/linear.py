"""Weighted sums of deltas: as they are (cat), without the redundancy (linear), truncated (svd)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.engine.chunks import RawChunk, plan_chunks, read_ahead, refuse_failed
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.merging.methods import MergedModule, MergeRequest, pad_rank
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.ops._tables import JOB, SEGMENT, address

# Components below the rounding of the float32 result carry nothing.
_RELATIVE = 2.0**-24
_NOISE = 2.0**-40
_CHUNK_BYTES = 48 << 20
_DTYPE_NAME = {0: "F32", 1: "BF16", 2: "F16"}


def svd(request: MergeRequest) -> Iterator[MergedModule]:
    """Best rank-k approximation of the weighted sum of deltas, sum_i w_i s_i B_i A_i.

    Exact: equal to the truncated SVD of the materialised sum, from QR-like bases of the stacked
    factors and an SVD of their small core, float64 inside. The error of truncation is exact.
    ``rank`` defaults to the largest rank among the adapters, as in PEFT. Every module gets that
    rank (zeros where the sum has less). Gauge-invariant. PEFT's combination_type "svd";
    Eckart and Young 1936.
    """
    rank = request.rank
    if rank is None:
        rank = int(request.zoo.table.entries["rank"].max())
    for raw in _chunks(request):
        yield from _truncated(request, raw, rank, pad=True)


def linear(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas itself, at its numerical rank.

    Exact to float32 rounding: no cross terms B_i A_j (PEFT's "linear" has them), any ranks, any
    signs. Ranks follow from the sum and may differ between modules; with ``rank`` it is ``svd``.
    Gauge-invariant.
    """
    for raw in _chunks(request):
        yield from _truncated(request, raw, request.rank, pad=request.rank is not None)


def cat(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas by stacking the factors: [w_1 s_1 B_1 ...] [A_1; ...].

    Exact, A untouched, nothing computed; the rank is the sum of the ranks of the adapters that
    have the module. Takes no ``rank``. The product is gauge-invariant. PEFT's combination_type
    "cat".
    """
    zoo = request.zoo
    for raw in _chunks(request):
        for module, rows in _by_module(request, raw):
            a, b = [], []
            for r in rows:
                weight = request.weights[raw.entries["adapter"][r]] * raw.entries["scale"][r]
                a.append(_factor(raw, r, "a"))
                b.append(_factor(raw, r, "b") * np.float64(weight))
            stacked_a, exact_b = np.concatenate(a), np.concatenate(b, axis=1)
            with np.errstate(over="ignore"):  # checked for every method at once
                stacked_b = exact_b.astype(np.float32)
            yield MergedModule(
                zoo.modules[module], stacked_a, stacked_b, _members(request, raw, rows),
                _norm(stacked_a, exact_b), 0.0, len(stacked_a),
            )  # fmt: skip


def _chunks(request: MergeRequest) -> Iterator[RawChunk]:
    zoo = request.zoo
    done = 0
    for raw in read_ahead(
        zoo, plan_chunks(zoo, np.arange(len(zoo)), _CHUNK_BYTES), request.threads
    ):
        yield raw
        if request.progress:
            request.progress(raw.chunk.last - done)
        done = raw.chunk.last


def _by_module(request: MergeRequest, raw: RawChunk) -> Iterator[tuple[int, np.ndarray]]:
    """(module, rows of the chunk) of every module that any adapter has."""
    bounds = np.searchsorted(
        raw.entries["module"], np.arange(raw.chunk.first, raw.chunk.last + 1)
    )
    for k in range(raw.chunk.last - raw.chunk.first):
        if bounds[k + 1] > bounds[k]:
            yield raw.chunk.first + k, np.arange(bounds[k], bounds[k + 1])


def _members(request: MergeRequest, raw: RawChunk, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(request.zoo[int(i)].name for i in raw.entries["adapter"][rows])


def _truncated(
    request: MergeRequest, raw: RawChunk, rank: int | None, *, pad: bool
) -> Iterator[MergedModule]:
    zoo = request.zoo
    groups = list(_by_module(request, raw))
    segments = raw.fill(np.zeros(len(raw.entries), SEGMENT))
    segments["scale"] = raw.entries["scale"] * request.weights[raw.entries["adapter"]]
    bounds = np.concatenate([[0], np.cumsum([len(rows) for _, rows in groups])]).astype(np.int64)
    jobs = np.zeros(len(groups), JOB)
    spectra, factors = [], []
    sigma_at = 0
    for k, (module, rows) in enumerate(groups):
        shape = zoo.modules[module]
        full = min(int(raw.entries["rank"][rows].sum()), shape.d_out, shape.d_in)
        top = full if rank is None else min(rank, full)
        a, b = np.zeros((top, shape.d_in), np.float32), np.zeros((shape.d_out, top), np.float32)
        factors.append((a, b))
        job = jobs[k]
        job["d_out"], job["d_in"], job["max_rank"] = shape.d_out, shape.d_in, top
        job["u_out"], job["u_row"], job["u_col"] = address(b), 1, top
        job["v_out"], job["v_row"], job["v_col"] = address(a), shape.d_in, 1
        job["sigma"] = sigma_at
        spectra.append(slice(sigma_at, sigma_at + full))
        sigma_at += full
    sigma = np.zeros(sigma_at)
    _native.core().canonicalise(
        segments, bounds, jobs, sigma, False, True, _RELATIVE, _NOISE, request.threads,
        _native.isa(),
    )  # fmt: skip
    refuse_failed(jobs, bounds, raw)
    for k, (module, rows) in enumerate(groups):
        values, kept = sigma[spectra[k]], int(jobs["rank"][k])
        a, b = factors[k]
        # A module whose sum is zero still needs a pair of factors.
        width = rank if pad and rank is not None else max(1, kept)
        yield MergedModule(
            zoo.modules[module], pad_rank(a[:kept], width, 0), pad_rank(b[:, :kept], width, 1),
            _members(request, raw, rows), _length(values), _length(values[kept:]),
            int(jobs["numerical_rank"][k]),
        )  # fmt: skip


def _length(values: np.ndarray) -> float:
    top = float(values.max(initial=0.0))
    return top * float(np.sqrt(np.square(values / top).sum())) if top > 0 else 0.0


def _norm(a: np.ndarray, b: np.ndarray) -> float:
    """||b @ a||_F from the factors, float64."""
    gram = block_gram(b.T, a, np.array([0, len(a)]), accumulate="fp64", threads=1)
    return float(np.sqrt(max(0.0, gram[0, 0])))


def _factor(raw: RawChunk, row: int, side: str) -> np.ndarray:
    """A copy of one factor as float32, (rank, d_in) or (d_out, rank)."""
    e = raw.entries[row]
    dtype = _DTYPE_NAME[int(e[f"{side}_dtype"])]
    flat = raw.view(row, side).view(STORAGE[dtype])
    shape = (int(e["rank"]), -1) if side == "a" else (-1, int(e["rank"]))
    values = to_f32(flat.reshape(shape), dtype)
    if not np.isfinite(values).all():
        adapter, module = raw.names(row)
        factor = getattr(adapter.modules[module], side)
        raise InputError("holds NaN or infinite values", path=factor.file.path, key=factor.key)
    return values
