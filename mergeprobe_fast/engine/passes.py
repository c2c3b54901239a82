"""One fused pass over a zoo: super-blocks of adapters outside, modules inside.

Default features ride on a single P1 pass over canonical factors: with orthonormal u and v and
weights sigma, the same two Gram tiles give inner products, overlaps, RV coefficients and captures.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.aggregate import PairBlock
from mergeprobe_fast.engine.chunks import (
    CanonicalChunk,
    CanonicalFactors,
    RawChunk,
    plan_chunks,
    read_ahead,
)
from mergeprobe_fast.engine.declare import DOT, Feature, Need
from mergeprobe_fast.engine.device import CHUNK_BYTES as DEVICE_BYTES
from mergeprobe_fast.engine.device import DeviceForms, pairs_side, result_bytes
from mergeprobe_fast.engine.device_views import view_bytes
from mergeprobe_fast.engine.grams import ChunkGrams
from mergeprobe_fast.engine.kept import Done, Kept, keepable, made_from
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.ops.device import computing_on
from mergeprobe_fast.recorded import NOTHING, Recorded
from mergeprobe_fast.zoo import Zoo, short_labels

log = logging.getLogger("mergeprobe_fast")

# Factors of one chunk in memory (raw and canonical), two chunks at a time while reading ahead.
# Measured: 16 to 96 MiB are within 3%; above, fresh pages cost more than the longer calls save.
CHUNK_BYTES = 48 << 20
# Values per module kept for the order statistics of a block of pairs.
PAIR_BYTES = 512 << 20
# All that is kept of a block of pairs on a device; None: what its memory allows.
DEVICE_PAIR_BYTES: int | None = None

@dataclass(frozen=True, eq=False)
class PassResult:
    """What a pass found.

    ``a``, ``b``: adapter indices of each pair, a < b, in row-major order of the upper triangle.
    ``columns``: one array per column. ``sigma``: (entries, widest) singular values of each row of
    ``zoo.table.entries``, zero padded; ``rank`` their numerical ranks. ``layers``: short labels of
    the layers, in the order of the modules. ``profile``: (pairs, layers) cosine per layer or None.
    ``clipped``: values that rounding had put outside their range.
    """

    a: np.ndarray
    b: np.ndarray
    columns: dict[str, np.ndarray]
    sigma: np.ndarray
    rank: np.ndarray
    layers: list[str]
    profile: np.ndarray | None
    clipped: int


def run(
    zoo: Zoo,
    features: Sequence[Feature],
    *,
    recorded: Recorded = NOTHING,
    profile: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    keep: str | os.PathLike[str] | None = None,
    device: Any = None,
    pairs: bool = True,
) -> PassResult:
    """All pairs of a zoo, all features, with bounded memory.

    Memory: two chunks of CHUNK_BYTES (or of one module's factors, if those are larger), one packed
    for the kernel, and PAIR_BYTES for the values per module of the pairs in flight. A zoo whose
    pairs need more is cut into super-blocks of adapters, and factors are read once per block pair.
    On a device, pairs are accounted for there, as many at once as its memory allows; a ``finish``
    that does more than numpy does with each pair by itself runs on the CPU.

    ``progress`` is called with the number of modules done since the last call; the total is
    :func:`steps`. ``keep``: a folder for the block pairs that are done, if there are several; those
    of the same pass in it are not computed again. It is left for the caller to remove, and not used
    where a feature of the caller's own has no ``made_from``. ``device``: from
    :func:`mergeprobe_fast.ops.open_device`; None: the CPU. ``pairs=False``: spectra alone, every
    factor is read once; pairs of two blocks are not among the result's.

    Raises:
        InputError: a file that changed, a factor that is not finite, a module that the calibration
            lacks, other files in ``keep``; names file and key.
        BackendError: what the device fails at.
    """
    with computing_on(device):
        return _run(zoo, features, recorded, profile, threads, progress, keep, device, pairs)


def _run(
    zoo: Zoo, features: Sequence[Feature], recorded: Recorded, profile: bool, threads: int | None,
    progress: Callable[[int], None] | None, keep: str | os.PathLike[str] | None, device: Any,
    pairs: bool,
) -> PassResult:  # fmt: skip
    threads = _env.threads_or_default(threads)
    features = list(features)
    needs = sorted({n for f in features for n in f.needs} | ({DOT} if profile else set()), key=str)
    blocks = _super_blocks(zoo, features, device)
    spectra = _Spectra(zoo)
    layers = list(dict.fromkeys(m.layer for m in zoo.modules))
    kept = None
    if keep is not None and len(blocks) > 1 and keepable(features):
        where = "" if device is None else f"-{device.label}"
        kept = Kept(keep, f"{made_from(zoo, features, recorded, profile)}-{len(blocks)}{where}")
    finished: list[Done] = []
    for i, first in enumerate(blocks):
        for j, second in enumerate(blocks[i:] if pairs else [first], i):
            done = None if kept is None else kept.get(i, j)
            if done is None:
                done = _block(first, second, zoo, features, needs, recorded,
                              layers if profile else None, spectra, threads, progress,
                              device)  # fmt: skip
                if kept is not None:
                    kept.put(i, j, done)
            else:
                spectra.restore(first, done)
                if progress:
                    progress(len(zoo.modules))
            finished.append(done._replace(sigma=None, rank=None))
    clipped = sum(done.clipped for done in finished)
    a = np.concatenate([done.a for done in finished])
    b = np.concatenate([done.b for done in finished])
    order = np.lexsort((b, a))
    names = finished[0].columns
    merged = {name: np.concatenate([d.columns[name] for d in finished])[order] for name in names}
    whole = np.concatenate([d.profile for d in finished])[order] if profile else None
    if clipped:
        log.info("%d feature values left their range by rounding and were clipped", clipped)
    return PassResult(
        a[order], b[order], merged, spectra.sigma, spectra.rank, short_labels(layers), whole,
        clipped,
    )


def steps(zoo: Zoo, features: Sequence[Feature], device: Any = None) -> int:
    """What ``progress`` of :func:`run` adds up to."""
    n = len(_super_blocks(zoo, list(features), device))
    return len(zoo.modules) * n * (n + 1) // 2


def _super_blocks(zoo: Zoo, features: list[Feature], device: Any = None) -> list[np.ndarray]:
    """Adapter indices in blocks whose pairs' values per module fit PAIR_BYTES, or a device."""
    if device is None:
        local = sum(f.per_module for f in features) + 1
        side = int((PAIR_BYTES / (4 * local * max(1, len(zoo.modules)))) ** 0.5)
    else:
        side = pairs_side(zoo, features, device.room(), DEVICE_PAIR_BYTES)
    count = -(-len(zoo) // max(2, side))
    return np.array_split(np.arange(len(zoo)), count)


def _on_domains_bytes(part: PairBlock, zoo: Zoo, samples: Samples) -> np.ndarray:
    """What sums on domains take beside each module's factors: views, and results of pairs."""
    kinds = {(n.product, n.view) for n in part.needs if n.view != "weights"}
    members = np.zeros(len(zoo), bool)
    members[part.first], members[part.second] = True, True
    entries = zoo.table.entries[members[zoo.table.entries["adapter"]]]
    sizes = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    ranks = np.bincount(entries["module"], entries["rank"], len(zoo.modules)).astype(np.int64)
    count = np.bincount(entries["module"], minlength=len(zoo.modules))
    columns, copies = int(samples.counts.sum()), len(kinds & {("hsic", "inputs"), ("uv", "kfac")})
    views = 4 * ranks * (2 * sizes + (1 + copies) * columns) + 8 * count * columns
    return views + 8 * len(kinds) * len(samples.domains) * np.square(count)


class _Spectra:
    """Singular values of every entry, filled in as chunks come by."""

    def __init__(self, zoo: Zoo) -> None:
        entries = zoo.table.entries
        self._adapter = entries["adapter"]
        self.sigma = np.zeros((len(entries), int(entries["rank"].max(initial=0))))
        self.rank = np.zeros(len(entries), np.int64)

    def of(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the entries of some adapters."""
        here = np.isin(self._adapter, members)
        return self.sigma[here], self.rank[here]

    def restore(self, members: np.ndarray, done: Done) -> None:
        """Put back what a block of adapters among themselves kept."""
        if done.sigma is not None:
            here = np.isin(self._adapter, members)
            self.sigma[here], self.rank[here] = done.sigma, done.rank


def _block(
    first: np.ndarray, second: np.ndarray, zoo: Zoo, features: list[Feature], needs: list[Need],
    recorded: Recorded, profiled: list[str] | None, spectra: _Spectra, threads: int,
    progress: Callable[[int], None] | None, device: Any,
) -> Done:  # fmt: skip
    """One pass over the pairs of two blocks of adapters; ``profiled``: the layers, or None."""
    part = PairBlock(
        first, first if second is first else second, features, needs, len(zoo.modules),
        len(profiled or ()), device,
    )  # fmt: skip
    layers = list(dict.fromkeys(m.layer for m in zoo.modules))
    _fill(part, zoo, recorded, layers, spectra, threads, progress, device)
    own = spectra.of(first) if part.symmetric else (None, None)
    return Done(
        first[part.i], second[part.j], part.columns(),
        None if profiled is None else part.profile(), part.clipped, *own,
    )  # fmt: skip


def _fill(
    part: PairBlock, zoo: Zoo, recorded: Recorded, layers: list[str], spectra: _Spectra,
    threads: int, progress: Callable[[int], None] | None, device: Any,
) -> None:  # fmt: skip
    """One pass over all modules: while a chunk goes through the kernels, the next one is read and
    the last one's sums are accounted for. (To canonicalise ahead as well was 3% slower on 2 cores.)
    """
    members = part.first if part.symmetric else np.concatenate([part.first, part.second])
    on, extra = None, None
    if any(n.view != "weights" for n in part.needs):
        on = Samples.of_adapters(zoo, recorded, members)
        if device is None:
            extra = _on_domains_bytes(part, zoo, on[0])
        else:
            extra = view_bytes(zoo, members, on[0], part.needs)
    layer_of = [layers.index(m.layer) for m in zoo.modules]
    done = 0

    def grams_of(raw: RawChunk, form: CanonicalChunk) -> ChunkGrams:
        pairs = part.i, part.j
        return ChunkGrams(
            part.first, part.second, pairs, part.needs, raw, form, threads, on, part.there
        )

    def account(grams: ChunkGrams) -> None:
        for first, last, sums in grams.modules():
            part.add(first, last, layer_of[first:last], sums)

    def seen(raw: RawChunk, form: CanonicalChunk) -> None:
        rows = raw.chunk.rows
        spectra.sigma[rows, : form.sigma.shape[1]] = form.sigma
        spectra.rank[rows] = form.rank

    def told(raw: RawChunk) -> None:
        nonlocal done
        if progress:
            progress(raw.chunk.last - done)
        done = raw.chunk.last

    if device is None:
        chunks = plan_chunks(zoo, members, CHUNK_BYTES, extra)
        factors = CanonicalFactors(max((c.canonical_floats for c in chunks), default=0))
        with ThreadPoolExecutor(1) as pool:
            accounted = None
            for raw in read_ahead(zoo, chunks, threads):
                form = factors.compute(raw, threads)
                seen(raw, form)
                grams = grams_of(raw, form)
                if accounted:
                    accounted.result()
                accounted = pool.submit(account, grams)
                told(raw)
            if accounted:
                accounted.result()
    else:
        results = result_bytes(zoo, members, len(part.needs))
        most = min(DEVICE_BYTES, device.room() // 8)
        chunks = plan_chunks(zoo, members, most, results if extra is None else results + extra)
        forms = DeviceForms(device)
        last = None
        for raw in read_ahead(zoo, chunks, threads, device.memory):
            # The last chunk's Grams are started before this one's spectra are waited for.
            finish = forms.start(raw)
            if last is not None:
                account(grams_of(*last))
            last = raw, finish()
            seen(*last)
            told(raw)
            forms.release()
        if last is not None:
            account(grams_of(*last))
    if progress and done < len(zoo.modules):
        progress(len(zoo.modules) - done)
