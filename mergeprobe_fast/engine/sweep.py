"""The canonical factors of a whole zoo, a few modules at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import CanonicalFactors, plan_chunks, read_ahead
from mergeprobe_fast.engine.project import ChunkFactors
from mergeprobe_fast.zoo import Zoo


class Swept(ChunkFactors):
    """A chunk: ``adapter`` and ``sigma`` (descending, zero padded) of each of its entries, and the
    number of its ``first`` module."""

    adapter: np.ndarray
    sigma: np.ndarray
    first: int


def sweep(zoo: Zoo, threads: int, done: int = 0) -> Iterator[Swept]:
    """Every chunk of a zoo in turn, valid until the next one is asked for.

    ``done``: leave out chunks of none but the first so many modules.

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
    """
    chunks = plan_chunks(zoo, np.arange(len(zoo)), passes.CHUNK_BYTES)
    chunks = [c for c in chunks if c.last > done]
    canonical = CanonicalFactors(max((c.canonical_floats for c in chunks), default=0))
    for raw in read_ahead(zoo, chunks, threads):
        form = canonical.compute(raw, threads)
        chunk = Swept(raw, form)
        chunk.adapter, chunk.first = raw.entries["adapter"], raw.chunk.first
        # A delta below the rounding of its factors counts as zero.
        chunk.sigma = np.where(form.rank[:, None] > 0, form.sigma, 0.0)
        yield chunk
