"""One fused pass over a zoo: super-blocks of adapters outside, modules inside.

Default features ride on a single P1 pass over canonical factors: with orthonormal u and v and
weights sigma, the same two Gram tiles give inner products, overlaps, RV coefficients and captures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import _env, _native
from mergeprobe_fast.engine.aggregate import PairBlock
from mergeprobe_fast.engine.chunks import (
    CanonicalFactors,
    RawChunk,
    plan_chunks,
    read_ahead,
)
from mergeprobe_fast.features.declare import DOT, Feature, Need, Sums
from mergeprobe_fast.zoo import Zoo, short_labels

log = logging.getLogger("mergeprobe_fast")

# Factors of one chunk in memory (raw and canonical), two chunks at a time while reading ahead.
# Measured: 16 to 96 MiB are within 3%; above, fresh pages cost more than the longer calls save.
CHUNK_BYTES = 48 << 20
# Values per module kept for the order statistics of a block of pairs.
PAIR_BYTES = 512 << 20

_PRODUCT = {"uv": 0, "uu": 1, "vv": 2}
_WEIGHT = {"one": -1, "sigma": 0, "energy": 1}
_POWER = {"one": 0, "sigma": 1, "energy": 2}


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
    profile: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PassResult:
    """All pairs of a zoo, all features, with bounded memory.

    Memory: two chunks of CHUNK_BYTES (or of one module's factors, if those are larger), their
    packed copy, and PAIR_BYTES for the values per module of the pairs in flight. A zoo whose
    pairs need more is cut into super-blocks of adapters, and factors are read once per block pair.

    ``progress`` is called with the number of modules done since the last call; the total is
    :func:`steps`.

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
    """
    threads = _env.threads_or_default(threads)
    features = list(features)
    needs = sorted({n for f in features for n in f.needs} | ({DOT} if profile else set()), key=str)
    blocks = _super_blocks(zoo, features)
    spectra = _Spectra(zoo)
    layers = list(dict.fromkeys(m.layer for m in zoo.modules))
    parts: list[PairBlock] = []
    finished: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray | None]] = []
    clipped = 0
    for i, first in enumerate(blocks):
        for second in blocks[i:]:
            part = PairBlock(
                first, first if second is first else second, features, needs,
                len(zoo.modules), len(layers) if profile else 0,
            )  # fmt: skip
            _fill(part, zoo, needs, layers, spectra, threads, progress)
            columns = part.columns()
            clipped += part.clipped
            finished.append(
                (first[part.i], second[part.j], columns, part.profile() if profile else None)
            )
            del part
    del parts
    a = np.concatenate([f[0] for f in finished])
    b = np.concatenate([f[1] for f in finished])
    order = np.lexsort((b, a))
    names = finished[0][2]
    merged = {name: np.concatenate([f[2][name] for f in finished])[order] for name in names}
    whole = np.concatenate([f[3] for f in finished])[order] if profile else None
    if clipped:
        log.info("%d feature values left their range by rounding and were clipped", clipped)
    return PassResult(
        a[order], b[order], merged, spectra.sigma, spectra.rank, short_labels(layers), whole,
        clipped,
    )


def steps(zoo: Zoo, features: Sequence[Feature]) -> int:
    """What ``progress`` of :func:`run` adds up to."""
    n = len(_super_blocks(zoo, list(features)))
    return len(zoo.modules) * n * (n + 1) // 2


def flip(n: Need) -> Need:
    """The same sum with the two adapters exchanged."""
    return Need(n.product, n.column, n.row)


def _super_blocks(zoo: Zoo, features: list[Feature]) -> list[np.ndarray]:
    """Adapter indices in blocks whose pairs' values per module fit PAIR_BYTES."""
    local = sum(f.per_module for f in features) + 1
    side = int((PAIR_BYTES / (4 * local * max(1, len(zoo.modules)))) ** 0.5)
    count = -(-len(zoo) // max(2, side))
    return np.array_split(np.arange(len(zoo)), count)


class _Spectra:
    """Singular values of every entry, filled in as chunks come by."""

    def __init__(self, zoo: Zoo) -> None:
        entries = zoo.table.entries
        self.sigma = np.zeros((len(entries), int(entries["rank"].max(initial=0))))
        self.rank = np.zeros(len(entries), np.int64)


def _fill(
    part: PairBlock, zoo: Zoo, needs: list[Need], layers: list[str], spectra: _Spectra,
    threads: int, progress: Callable[[int], None] | None,
) -> None:  # fmt: skip
    members = part.first if part.symmetric else np.concatenate([part.first, part.second])
    chunks = plan_chunks(zoo, members, CHUNK_BYTES)
    canonical = CanonicalFactors(max((c.canonical_floats for c in chunks), default=0))
    layer_of = [layers.index(m.layer) for m in zoo.modules]
    done = 0
    for raw in read_ahead(zoo, chunks, threads):
        form = canonical.compute(raw, threads)
        rows = raw.chunk.rows
        spectra.sigma[rows, : form.sigma.shape[1]] = form.sigma
        spectra.rank[rows] = form.rank
        _pass(part, zoo, raw, form, needs, layer_of, threads)
        if progress:
            progress(raw.chunk.last - done)
        done = raw.chunk.last
    if progress and done < len(zoo.modules):
        progress(len(zoo.modules) - done)


def _pass(
    part: PairBlock, zoo: Zoo, raw: RawChunk, form, needs: list[Need], layer_of: list[int],
    threads: int,
) -> None:  # fmt: skip
    """P1 over the chunk's modules, then each module's sums into the block."""
    adapter, module = raw.entries["adapter"], raw.entries["module"] - raw.chunk.first
    modules = raw.chunk.last - raw.chunk.first
    # Weights are relative to each delta's largest sigma, so that float32 neither over- nor
    # underflows; the product is scaled back in float64.
    top = np.where(form.rank > 0, form.sigma[:, 0] if form.sigma.shape[1] else 0.0, 0.0)
    sides = []
    for members in (part.first,) if part.symmetric else (part.first, part.second):
        position = np.full(len(zoo), -1)
        position[members] = np.arange(len(members))
        here = np.flatnonzero(position[adapter] >= 0)
        sides.append(
            _Side(
                blocks=np.ascontiguousarray(form.blocks[here]),
                bounds=np.searchsorted(module[here], np.arange(modules + 1)).astype(np.int64),
                weights=_weights(form.sigma[here], form.rank[here], top[here]),
                where=position[adapter[here]],
                top=top[here],
                sigma=form.sigma[here],
                rank=form.rank[here],
            )
        )
    one, two = sides[0], sides[-1]
    mirrored = {n for n in needs if flip(n) != n}
    # The (b, a) value of a directed sum lies in the other triangle; without one it is an epilogue.
    listed = list(needs)
    if not part.symmetric:
        listed += [flip(n) for n in needs if flip(n) not in needs]
    counts = np.diff(one.bounds) * np.diff(two.bounds)
    out_bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    out = np.empty((len(listed), int(out_bounds[-1])))
    shapes = zoo.modules[raw.chunk.first : raw.chunk.last]
    epilogues = [(_PRODUCT[n.product], _WEIGHT[n.row], _WEIGHT[n.column]) for n in listed]
    second = (None,) * 3 if part.symmetric else (two.blocks, two.bounds, two.weights)
    if out.size:
        _native.core().gram_pass(
            one.blocks, one.bounds, one.weights, *second,
            np.array([m.d_out for m in shapes], np.int64),
            np.array([m.d_in for m in shapes], np.int64),
            epilogues, out, out_bounds, False, threads, _native.isa(), 0,
        )  # fmt: skip
    for k, shape in enumerate(shapes):
        r1 = slice(one.bounds[k], one.bounds[k + 1])
        r2 = slice(two.bounds[k], two.bounds[k + 1])
        if r1.start == r1.stop and r2.start == r2.stop:
            continue
        grams = out[:, out_bounds[k] : out_bounds[k + 1]].reshape(
            len(listed), r1.stop - r1.start, r2.stop - r2.start
        )
        by_need = dict(zip(listed, grams, strict=True))
        sums = _sums(part, needs, mirrored, by_need, one, r1, two, r2, shape.d_out * shape.d_in)
        part.add(raw.chunk.first + k, layer_of[raw.chunk.first + k], sums)


@dataclass(frozen=True, eq=False)
class _Side:
    blocks: np.ndarray
    bounds: np.ndarray  # entries of each module
    weights: np.ndarray  # (2, stacked rows): sigma / top and its square
    where: np.ndarray  # position of each entry's adapter in the block of pairs
    top: np.ndarray
    sigma: np.ndarray
    rank: np.ndarray


def _weights(sigma: np.ndarray, rank: np.ndarray, top: np.ndarray) -> np.ndarray:
    kept = np.arange(sigma.shape[1])[None, :] < rank[:, None]
    relative = (sigma / np.where(top > 0, top, 1.0)[:, None])[kept]
    return np.ascontiguousarray([relative, relative**2])


def _sums(
    part: PairBlock, needs: list[Need], mirrored: set[Need], grams: dict[Need, np.ndarray],
    one: _Side, r1: slice, two: _Side, r2: slice, entries: int,
) -> Sums:  # fmt: skip
    """One module's sums over the pairs of the block, zero where an adapter lacks the module."""
    n1, n2 = len(part.first), len(part.second)
    i, j = part.i, part.j
    full = len(one.where[r1]) == n1 and len(two.where[r2]) == n2

    def over_pairs(n: Need, *, back: bool = False) -> np.ndarray:
        left, right = one.top[r1] ** _POWER[n.row], two.top[r2] ** _POWER[n.column]
        gram = grams[n] * left[:, None] * right[None, :]
        if not full:
            whole = np.zeros((n1, n2))
            whole[np.ix_(one.where[r1], two.where[r2])] = gram
            gram = whole
        return gram[j, i] if back else gram[i, j]

    need = {n: over_pairs(n) for n in needs}
    if part.symmetric:
        other = {n: over_pairs(n, back=True) if n in mirrored else need[n] for n in needs}
    else:
        other = {n: over_pairs(flip(n)) if n in mirrored else need[n] for n in needs}

    def per_adapter(side: _Side, rows: slice, count: int) -> tuple[np.ndarray, ...]:
        energy, energy2, rank, present = (np.zeros(count) for _ in range(4))
        # A delta below the rounding of its factors counts as zero.
        sigma = np.where(side.rank[rows, None] > 0, side.sigma[rows], 0.0)
        where = side.where[rows]
        energy[where] = np.square(sigma).sum(1)
        energy2[where] = (sigma**4).sum(1)
        rank[where] = side.rank[rows]
        present[where] = 1.0
        return energy, energy2, rank, present

    e1, f1, k1, p1 = (x[i] for x in per_adapter(one, r1, n1))
    e2, f2, k2, p2 = (x[j] for x in per_adapter(two, r2, n2))
    return Sums(need, other, e1, e2, f1, f2, k1, k2, e1 * p2, e2 * p1, e1 * e2 / entries)
