"""The canonical factors of a whole zoo, a few modules at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import (
    CanonicalChunk,
    CanonicalFactors,
    RawChunk,
    plan_chunks,
    read_ahead,
)
from mergeprobe_fast.engine.device import DeviceForms
from mergeprobe_fast.engine.project import ChunkFactors
from mergeprobe_fast.zoo import Zoo


class Swept(ChunkFactors):
    """A chunk: ``adapter`` and ``sigma`` (descending, zero padded) of each of its entries, and the
    number of its ``first`` module. ``form``: its canonical factors; those of a device are copied
    from there when vectors are first asked for."""

    adapter: np.ndarray
    sigma: np.ndarray
    first: int
    form: CanonicalChunk


def canonical_chunks(
    zoo: Zoo, threads: int, done: int = 0, device: Any = None
) -> Iterator[tuple[RawChunk, CanonicalChunk]]:
    """As :func:`sweep`, with each chunk as it was read and in canonical form."""
    limit = passes.CHUNK_BYTES if device is None else passes.DEVICE_BYTES
    chunks = plan_chunks(zoo, np.arange(len(zoo)), limit)
    chunks = [c for c in chunks if c.last > done]
    if device is None:
        canonical = CanonicalFactors(max((c.canonical_floats for c in chunks), default=0))
        for raw in read_ahead(zoo, chunks, threads):
            yield raw, canonical.compute(raw, threads)
        return
    there = DeviceForms(device)
    for raw in read_ahead(zoo, chunks, threads, device.memory):
        yield raw, there.compute(raw, threads)
        there.release()


def sweep(zoo: Zoo, threads: int, done: int = 0, device: Any = None) -> Iterator[Swept]:
    """Every chunk of a zoo in turn, valid until the next one is asked for.

    ``done``: leave out chunks of none but the first so many modules. ``device``: from
    :func:`mergeprobe_fast.ops.open_device`, where canonical forms are made; None: the CPU.

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
    """
    for raw, form in canonical_chunks(zoo, threads, done, device):
        chunk = Swept(raw, form)
        chunk.adapter, chunk.first = raw.entries["adapter"], raw.chunk.first
        # A delta below the rounding of its factors counts as zero.
        chunk.sigma = np.where(form.rank[:, None] > 0, form.sigma, 0.0)
        chunk.form = form
        yield chunk
