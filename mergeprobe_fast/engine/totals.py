"""Inner products of whole updates, exact enough to be inverted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import RawChunk, plan_chunks, read_ahead
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.ops._tables import DTYPE_CODE, MATRIX, address
from mergeprobe_fast.zoo import Zoo

_DTYPE = {code: name for name, code in DTYPE_CODE.items()}


@dataclass(frozen=True, eq=False)
class Totals:
    """Inner products of the N updates of a zoo, each summed over all modules.

    ``gram`` (N, N): <W_i, W_j>. ``inputs`` (D, N, N): mean of W_i x . W_j x over the samples of
    each of the calibration's ``domains`` (not centred). ``relative``: the same with each module
    divided by the mean squared norm of the base module's output (NaN where that is zero), None
    without output moments. An absent module counts as zero. All are symmetric.
    """

    names: list[str]
    gram: np.ndarray
    domains: list[str]
    inputs: np.ndarray
    relative: np.ndarray | None


def totals(
    zoo: Zoo,
    calibration: Calibration | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = None,
) -> Totals:
    """Grams of a zoo in float64 throughout, from the factors as they are stored.

    Products of float32 are exact in float64, so that what is left of a difference of two nearly
    equal updates is right: leverage and reweighting invert these Grams. Memory: (1 + D or 2 D) N^2
    results beside two chunks of ``passes.CHUNK_BYTES``.

    ``progress`` is called with the number of modules done since the last call. ``device``: from
    :func:`mergeprobe_fast.ops.open_device`, where all of it is computed, in float64 too, and the
    results lie until the end; None: the CPU.

    Raises:
        InputError: a file that changed, a factor that is not finite, a module that the calibration
            lacks; names file and key.
    """
    threads = _env.threads_or_default(threads)
    domains = [] if calibration is None else list(calibration.domains)
    samples = None if calibration is None else Samples(zoo, calibration, domains)
    if device is not None:
        from mergeprobe_fast.engine.device_totals import device_totals

        return device_totals(zoo, calibration, samples, threads, progress, device)
    n, everyone = len(zoo), np.arange(len(zoo))
    gram, inputs = np.zeros((n, n)), np.zeros((len(domains), n, n))
    relative = np.zeros_like(inputs) if calibration and calibration.has_output_moments else None
    extra = None if samples is None else extra_bytes(zoo, samples)
    done = 0
    for raw in read_ahead(zoo, plan_chunks(zoo, everyone, passes.CHUNK_BYTES, extra), threads):
        base = None
        if samples is not None and relative is not None:
            base = samples.base_energies(zoo.modules[raw.chunk.first : raw.chunk.last])
        for k, who, blocks in _module_grams(raw, samples, threads):
            place = np.ix_(who, who)
            gram[place] += blocks[0]
            for d in range(len(domains)):
                inputs[d][place] += blocks[1 + d]
                if base is not None:
                    relative[d][place] += blocks[1 + d] / base[d, k] if base[d, k] > 0 else np.nan
        if progress:
            progress(raw.chunk.last - done)
        done = raw.chunk.last
    if progress and done < len(zoo.modules):
        progress(len(zoo.modules) - done)
    return Totals(list(zoo.names), gram, domains, inputs, relative)


def extra_bytes(zoo: Zoo, samples: Samples) -> np.ndarray:
    """A in float64, its products with all samples, and the results, of each module."""
    entries = zoo.table.entries
    ranks = np.bincount(entries["module"], entries["rank"], len(zoo.modules)).astype(np.int64)
    counts = np.bincount(entries["module"], minlength=len(zoo.modules))
    d_in = np.array([m.d_in for m in zoo.modules], np.int64)
    columns = d_in + int(samples.counts.sum())
    return 8 * (ranks * columns + (1 + len(samples.domains)) * np.square(counts))


def _module_grams(
    raw: RawChunk, samples: Samples | None, threads: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(place in the chunk, adapters, (1 + domains, n, n)) of every module that any adapter has."""
    modules = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
    e, blocks = raw.entries, raw.blocks()
    bounds = np.searchsorted(e["module"] - raw.chunk.first, np.arange(len(modules) + 1))
    counts = np.diff(bounds)
    results = np.concatenate([[0], np.cumsum(counts**2)]).astype(np.int64)
    domains = 0 if samples is None else len(samples.domains)
    factor, views, kept = np.ones((1 + domains, len(modules))), None, []
    if samples is not None:
        matrices, square, kept = _project(raw, bounds, samples)
        factor[1:] = square / samples.counts[:, None]
        columns = np.repeat(samples.counts[:, None], len(modules), axis=1).astype(np.int64)
        views = (matrices.reshape(-1), None, columns, list(range(1 + domains)))
    out = np.empty((1 + domains, int(results[-1])))
    _native.core().gram_pass(
        blocks, bounds.astype(np.int64), np.zeros((0, 0)), None, None, None,
        np.array([m.d_out for m in modules], np.int64),
        np.array([m.d_in for m in modules], np.int64), [(0, -1, -1)] * (1 + domains), out, results,
        True, threads, _native.isa(), 0, views,
    )  # fmt: skip
    del kept  # what the views point into
    for k in range(len(modules)):
        rows = slice(*bounds[k : k + 2])
        if rows.start == rows.stop:
            continue
        part = out[:, slice(*results[k : k + 2])].reshape(1 + domains, counts[k], counts[k])
        for i in np.flatnonzero(~np.isfinite(np.diagonal(part[0])))[:1]:
            refuse(raw, rows.start + int(i))
        scale = e["scale"][rows]
        yield k, e["adapter"][rows], part * np.outer(scale, scale) * factor[:, k, None, None]


@_env.one_blas_thread()
def _project(
    raw: RawChunk, bounds: np.ndarray, samples: Samples
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """A X^T of every entry and domain in float64.

    Returns MATRIX (domains, entries), the squares of what X was divided by (domains, modules), and
    the arrays that the matrices point into.
    """
    modules = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
    matrices = np.zeros((len(samples.domains), len(raw.entries)), MATRIX)
    matrices["dtype"] = DTYPE_CODE["F64"]
    square = np.ones((len(samples.domains), len(modules)))
    kept = []
    for group in samples.groups(modules):
        factors = {k: _stack(raw, range(*bounds[k : k + 2])) for k in group}
        for d in range(len(samples.domains)):
            x, factor = samples.inputs(d, modules[group[0]].name)
            x = x.T.astype(np.float64)
            for k, a in factors.items():
                seen = a @ x
                rank = raw.entries["rank"][slice(*bounds[k : k + 2])]
                m = matrices[d, slice(*bounds[k : k + 2])]
                m["data"] = address(seen) + 8 * seen.shape[1] * (np.cumsum(rank) - rank)
                m["row_stride"], m["col_stride"] = seen.shape[1], 1
                square[d, k] = factor**2
                kept.append(seen)
    return matrices, square, kept


def _stack(raw: RawChunk, rows: range) -> np.ndarray:
    """The A of some entries of one module, one below the other, float64 (ranks, d_in)."""
    parts = [_factor(raw, i, "a") for i in rows]
    d_in = raw.zoo.modules[int(raw.entries["module"][rows[0]])].d_in if rows else 0
    return np.concatenate([p.reshape(-1, d_in) for p in parts]) if parts else np.empty((0, 0))


def _factor(raw: RawChunk, row: int, side: str) -> np.ndarray:
    """All numbers of a factor, float64."""
    name = _DTYPE[int(raw.entries[f"{side}_dtype"][row])]
    return to_f32(raw.view(row, side).view(STORAGE[name]), name).astype(np.float64)


def refuse(raw: RawChunk, row: int) -> None:
    """Raise for an entry whose own inner product is not finite."""
    adapter, name = raw.names(row)
    module = adapter.modules[name]
    for side, ref in (("b", module.b), ("a", module.a)):
        if not np.isfinite(_factor(raw, row, side)).all():
            raise InputError("holds NaN or infinite values", path=ref.file.path, key=ref.key)
    raise InputError("the update is absurdly large: wrong scale?", path=adapter.path, key=name)
