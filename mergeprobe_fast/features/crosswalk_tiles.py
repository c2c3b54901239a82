"""What other tools take from singular vectors by module, on tiles of M = U^T U and N = V^T V.

Modules in chunks, adapters in blocks of at most ROWS singular vectors. Each value is the plain mean
over the modules where it is defined for both adapters, as those tools have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, pairwise
from typing import Any

import numpy as np

from mergeprobe_fast.engine.device_views import device_array, module_bounds, vector_tiles
from mergeprobe_fast.engine.kept_sums import Sums, sums_so_far
from mergeprobe_fast.engine.p1 import Side, fused, outputs
from mergeprobe_fast.engine.sweep import Swept, canonical_chunks, sweep
from mergeprobe_fast.features.declare import COL_OVERLAP, ROW_OVERLAP, Spectra, ratio
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo

TOP = 10  # of 2601.22285
SINGULAR_VALUES = 100  # of 2601.22285
ENERGY = 0.90  # of gradience
ROWS = 2048


class Means:
    """Means over modules of (N, N) values by name."""

    def __init__(self, n: int, names: tuple[str, ...], device: Any = None) -> None:
        """``device``: where values come from and sums lie, from ``ops.open_device``."""
        self._names, self._device = names, device
        self._like = None if device is None else device.array(np.zeros(0))
        self._all = np.zeros((2 * len(names), n, n), like=self._like)

    def add(self, name: str, one: np.ndarray, two: np.ndarray, values: np.ndarray) -> None:
        """Account for a module's (adapters ``one``) x (adapters ``two``); NaN is left out."""
        known, at = ~np.isnan(values), 2 * self._names.index(name)
        one = np.asarray(one, np.int64, like=self._like).reshape(-1, 1)
        two = np.asarray(two, np.int64, like=self._like)
        # One adapter meets another once in a module: no place is added to twice.
        self._all[at, one, two] += np.where(known, values, 0.0)
        self._all[at + 1, one, two] += known.astype(np.float64)

    def restore(self, kept: Sums) -> None:
        """What was kept, or as it is."""
        if kept.step:
            arrays = {name: np.ascontiguousarray(x) for name, x in self._arrays().items()}
            kept.restore(arrays)
            self._all = np.asarray(np.stack(list(arrays.values())), like=self._like)

    def keep(self, kept: Sums, step: int) -> None:
        """So many steps are done."""
        kept.reached(step, self._arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        whole = self._all if self._device is None else self._all.download()
        names = [f"{what}:{name}" for name in self._names for what in ("sum", "count")]
        return dict(zip(names, whole, strict=True))

    def result(self) -> dict[str, np.ndarray]:
        """(N, N) each, NaN where no module has a value; only a <= b where only that was added."""
        whole = self._arrays()
        return {n: ratio(whole[f"sum:{n}"], whole[f"count:{n}"]) for n in self._names}


@dataclass(frozen=True, eq=False)
class _Block:
    """Singular vectors of some entries of one module, zero padded to one width.

    ``u`` and ``v`` (dimension, entries, width), ``sigma`` (entries, width).
    """

    who: np.ndarray
    u: np.ndarray
    v: np.ndarray
    sigma: np.ndarray

    def tile(self, side: str, other: _Block) -> np.ndarray:
        """Products of all vectors: (entries, width, entries of other, width of other)."""
        one, two = getattr(self, side), getattr(other, side)
        flat = one.reshape(len(one), -1).T @ two.reshape(len(two), -1)
        return flat.reshape(*one.shape[1:], *two.shape[1:])


def _blocks(chunk: Swept, k: int) -> list[_Block]:
    """The entries of a module that are not zero."""
    here = chunk.entries([k])
    here = here[chunk.rank[here] > 0]
    if len(here) == 0:
        return []
    width = int(chunk.rank[here].max())
    module = chunk.modules[k]
    found = []
    for part in np.array_split(here, -(-len(here) * width // ROWS)):
        u = np.zeros((module.d_out, len(part), width), np.float32)
        v = np.zeros((module.d_in, len(part), width), np.float32)
        sigma = np.zeros((len(part), width))
        for at, i in enumerate(part):
            count = int(chunk.rank[i])
            u[:, at, :count], v[:, at, :count] = chunk.vectors("u", i), chunk.vectors("v", i)
            sigma[at, :count] = chunk.sigma[i, :count]
        found.append(_Block(chunk.adapter[part], u, v, sigma))
    return found


OVERLAPS = ("left_top", "right_top", "right_bottom", "right_top_square", "right_bottom_square")


def overlaps(zoo: Zoo, recorded: Recorded, threads: int) -> dict[str, np.ndarray]:
    """OVERLAPS of a zoo, (N, N) each: root mean squared cosines between the TOP first or last
    singular vectors, as many as both have, and (square) mean squared cosines.

    One pass of the block Gram for the first ones and one for the last, again for every number of
    them below TOP.
    """
    device, kept = current_device(), sums_so_far()
    means = Means(len(zoo), OVERLAPS, device)
    means.restore(kept)
    everyone = np.arange(len(zoo))
    for raw, form in canonical_chunks(zoo, threads, kept.step, device):
        side = Side.of(everyone, raw, form)
        ends = np.minimum(side.rank, TOP)
        shapes = zoo.modules[raw.chunk.first : raw.chunk.last]
        sizes = [m.d_out for m in shapes], [m.d_in for m in shapes]
        for count in np.unique(ends[ends > 0]):
            if device is None:
                first, last = (_ends_of(side, int(count), which) for which in (False, True))
                needs = [(COL_OVERLAP, 0), (ROW_OVERLAP, 0)]
                top = fused(first, first, *sizes, needs, threads=threads)
                bottom = fused(last, last, *sizes, needs[1:], threads=threads)
                found = [*top, *bottom]
            else:
                first = _least(side, int(count))
                few = [first.entries[first.rows(k)].tolist() for k in range(len(shapes))]
                tiles = vector_tiles(form, module_bounds(raw))
                found = list(device_array(tiles.overlaps(few, int(count), *sizes)))
            bounds = outputs(first, first)
            for k in range(len(shapes)):
                rows, here = first.rows(k), slice(*bounds[k : k + 2])
                who = first.where[rows]
                if not len(who):
                    continue
                fewer = np.minimum(first.rank[rows], TOP)
                # Each pair where both have so many, and one has no more that count.
                own = np.minimum.outer(fewer, fewer) == count
                if device is not None:
                    own = device.array(own)
                left, right, weak = (
                    np.where(own, x[here].reshape(len(who), len(who)) / float(count), np.nan)
                    for x in found
                )
                means.add("left_top", who, who, np.sqrt(left))
                means.add("right_top", who, who, np.sqrt(right))
                means.add("right_top_square", who, who, right)
                means.add("right_bottom", who, who, np.sqrt(weak))
                means.add("right_bottom_square", who, who, weak)
        means.keep(kept, raw.chunk.last)
    return means.result()


def _least(side: Side, count: int) -> Side:
    """The entries that have at least ``count`` singular vectors, as they are."""
    keep = side.rank >= count
    return Side(
        side.count, side.entries[keep], side.form,
        np.searchsorted(side.module[keep], np.arange(len(side.bounds))).astype(np.int64),
        np.zeros((2, 0)), side.where[keep], side.top[keep], side.sigma[keep], side.rank[keep],
    )  # fmt: skip


def _ends_of(side: Side, count: int, last: bool) -> Side:
    """The entries that have at least ``count`` singular vectors, with the first or last of them."""
    keep = side.rank >= count
    module = np.repeat(np.arange(len(side.bounds) - 1), np.diff(side.bounds))[keep]
    blocks = side.blocks[keep].copy()
    if last:
        for name in "uv":  # dimension-major float32: a vector is a column
            skipped = 4 * (side.rank[keep] - count) * blocks[name]["row_stride"]
            blocks[name]["data"] += skipped.astype(np.uint64)
    blocks["rank"] = count
    chunk = side.form.blocks.copy()
    chunk[side.entries[keep]] = blocks
    return Side(
        side.count, side.entries[keep], replace(side.form, blocks=chunk),
        np.searchsorted(module, np.arange(len(side.bounds))).astype(np.int64),
        np.ones((2, count * len(blocks))), side.where[keep], side.top[keep], side.sigma[keep],
        side.rank[keep],
    )  # fmt: skip


def energy_rank(sigma: np.ndarray) -> np.ndarray:
    """Singular values of each row that hold ENERGY of its squared norm."""
    shares = np.cumsum(np.square(sigma), axis=1)
    shares /= shares[:, -1:]
    return 1 + (shares < ENERGY - 1e-12).sum(1)


AGREEMENTS = ("mean_overlap", "max_overlap", "directional_agreement")


def agreements(zoo: Zoo, recorded: Recorded, threads: int) -> dict[str, np.ndarray]:
    """AGREEMENTS of a zoo: (N, N) each, between the left singular vectors that hold ENERGY."""
    device, kept = current_device(), sums_so_far()
    means = Means(len(zoo), AGREEMENTS, device)
    means.restore(kept)
    for chunk in sweep(zoo, threads, kept.step, device):
        for k in range(max(0, kept.step - chunk.first), len(chunk.modules)):
            if device is not None:
                _agree_on_device(means, chunk, k)
            else:
                for one, two in combinations_with_replacement(_blocks(chunk, k), 2):
                    m, n = one.tile("u", two), one.tile("v", two)
                    _add(means, one, two, m, n)
                    if one is not two:
                        _add(means, two, one, m.transpose(2, 3, 0, 1), n.transpose(2, 3, 0, 1))
            means.keep(kept, chunk.first + k + 1)
    return means.result()


def _agree_on_device(means: Means, chunk: Swept, k: int) -> None:
    """Account for a module."""
    here = chunk.entries([k])
    here = here[chunk.rank[here] > 0]
    if len(here) == 0:
        return
    sigma = np.ascontiguousarray(chunk.sigma[here])
    tiles = vector_tiles(chunk.form, chunk.bounds)
    for one, two, values in tiles.agreements(k, here.tolist(), energy_rank(sigma), sigma):
        for name, x in zip(AGREEMENTS, device_array(values), strict=True):
            means.add(name, chunk.adapter[one], chunk.adapter[two], x)


def _add(means: Means, one: _Block, two: _Block, m: np.ndarray, n: np.ndarray) -> None:
    keep1, keep2 = energy_rank(one.sigma), energy_rank(two.sigma)
    inside = np.arange(m.shape[1]) < keep1[:, None]
    along = np.einsum("iajb,iajb,jb->iaj", m, n, two.sigma)
    along = np.where(inside[:, :, None], along, 0.0)
    sigma = np.where(inside, one.sigma, 0.0)
    top = np.einsum("iaj,ia->ij", along, sigma)
    length = np.linalg.norm(along, axis=1) * np.linalg.norm(sigma, axis=1)[:, None]
    means.add("directional_agreement", one.who, two.who, ratio(top, length))
    # Of each pair once: the cosines are those of (two, one).
    i, j = np.nonzero(one.who[:, None] <= two.who[None, :])
    across = np.arange(m.shape[3]) < keep2[:, None]
    cut = np.where(inside[i, :, None] & across[j, None, :], m[i, :, j, :], 0.0)
    cosines = np.linalg.svd(cut, compute_uv=False)
    cosines = np.clip(cosines, 0.0, 1.0).astype(np.float64)
    values = np.full((2, len(one.who), len(two.who)), np.nan)
    values[0, i, j] = cosines.sum(1) / np.minimum(keep1[i], keep2[j])
    values[1, i, j] = cosines[:, 0]
    means.add("mean_overlap", one.who, two.who, values[0])
    means.add("max_overlap", one.who, two.who, values[1])


def spectra(found: Spectra) -> dict[str, np.ndarray]:
    """What singular values alone say: (N, N) each.

    ``overlap``: cosine of the first SINGULAR_VALUES singular values; ``first``: the smaller largest
    singular value over the larger; ``norm``: the same of the norms.
    """
    zoo, entries = found.zoo, found.zoo.table.entries
    means = Means(len(zoo), ("overlap", "first", "norm"))
    bounds = np.searchsorted(entries["module"], np.arange(len(zoo.modules) + 1))
    for first, last in pairwise(bounds):
        here = np.arange(first, last)[found.rank[first:last] > 0]
        who, s = entries["adapter"][here], found.sigma[here]
        if len(here) == 0:
            continue
        scaled = s[:, :SINGULAR_VALUES] / s[:, :1]
        length = np.linalg.norm(scaled, axis=1)
        means.add("overlap", who, who, scaled @ scaled.T / np.outer(length, length))
        top, norm = np.log(s[:, 0]), np.log(s[:, 0] * np.linalg.norm(s / s[:, :1], axis=1))
        for name, logs in (("first", top), ("norm", norm)):
            means.add(name, who, who, np.exp(-np.abs(logs[:, None] - logs[None, :])))
    return means.result()
