"""Canonical forms of every delta of a zoo, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import CanonicalFactors, plan_chunks, read_ahead
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops._tables import address
from mergeprobe_fast.ops.reference import Canonical
from mergeprobe_fast.zoo import Module, Paths, Zoo, as_zoo

_DTYPES = {"float32": np.float32, "float64": np.float64}


@dataclass(frozen=True, eq=False)
class CanonicalModule:
    """One module: the canonical form of each adapter that has it, by the adapter's name."""

    module: Module
    forms: dict[str, Canonical]


def canonical(
    zoo: Zoo | Paths, *, dtype: str = "float32", threads: int | None = None
) -> Iterator[CanonicalModule]:
    """Every delta of a zoo as ``left.T @ diag(sigma[:rank]) @ right``, a module at a time.

    Rows of ``left`` (rank, d_out) and ``right`` (rank, d_in) are orthonormal, ``sigma`` descends
    and is complete; the rank is decided on it as in :func:`mergeprobe_fast.ops.canonical`, and 0
    for a zero delta. But for signs, and turns among equal ``sigma``, these do not depend on how a
    delta is written as B A. Computed in float64 from the factors alone, a few modules in memory at
    a time; modules come in the zoo's order, adapters that lack one are left out.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        dtype: "float32" or "float64", of ``left`` and ``right``.
        threads: default: MERGEPROBE_THREADS, or the cores.

    Raises:
        InputError: a file that changed, a factor that is not finite.
    """
    if dtype not in _DTYPES:
        raise InputError(f"expected 'float32' or 'float64', got {dtype!r}", key="dtype")
    return _canonical(as_zoo(zoo), _DTYPES[dtype], _env.threads_or_default(threads))


def _canonical(zoo: Zoo, dtype: type[np.floating], threads: int) -> Iterator[CanonicalModule]:
    chunks = plan_chunks(zoo, np.arange(len(zoo)), passes.CHUNK_BYTES)
    factors = CanonicalFactors(max((c.canonical_floats for c in chunks), default=0), dtype)
    for raw in read_ahead(zoo, chunks, threads):
        form = factors.compute(raw, threads)

        def rows(i: int, side: str, size: int, form=form) -> np.ndarray:
            matrix = form.blocks[side][i]
            start = (int(matrix["data"]) - address(form.buffer)) // form.buffer.itemsize
            width = int(matrix["col_stride"])
            stored = form.buffer[start : start + size * width].reshape(size, width)
            return np.ascontiguousarray(stored[:, : form.rank[i]].T)

        module = raw.entries["module"] - raw.chunk.first
        bounds = np.searchsorted(module, np.arange(raw.chunk.last - raw.chunk.first + 1))
        for k, m in enumerate(zoo.modules[raw.chunk.first : raw.chunk.last]):
            forms = {}
            for i in range(*bounds[k : k + 2]):
                full = min(int(raw.entries["rank"][i]), m.d_out, m.d_in)
                forms[zoo.names[int(raw.entries["adapter"][i])]] = Canonical(
                    rows(i, "u", m.d_out), form.sigma[i, :full].copy(), rows(i, "v", m.d_in),
                    int(form.rank[i]),
                )  # fmt: skip
            yield CanonicalModule(m, forms)
