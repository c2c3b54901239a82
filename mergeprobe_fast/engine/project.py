"""Canonical factors of a chunk seen through a calibration: what the views of P1 are made of."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.p1 import View
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.ops._tables import MATRIX, address
from mergeprobe_fast.zoo import Module


class ChunkFactors:
    """The canonical factors of a chunk as stacks of columns, one column per rank."""

    def __init__(self, raw: RawChunk, form: CanonicalChunk) -> None:
        self.modules = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
        self.rank = form.rank
        module = raw.entries["module"] - raw.chunk.first
        self.bounds = np.searchsorted(module, np.arange(len(self.modules) + 1))
        top = form.sigma[:, :1] if form.sigma.shape[1] else np.zeros((len(form.rank), 1))
        kept = np.arange(form.sigma.shape[1])[None, :] < form.rank[:, None]
        self.relative = np.where(kept, form.sigma / np.where(top > 0, top, 1.0), 0.0)
        self._form = form

    def entries(self, modules: list[int]) -> np.ndarray:
        """The entries of some modules, in order."""
        return np.concatenate([np.arange(*self.bounds[k : k + 2]) for k in modules])

    def stack(self, side: str, entries: np.ndarray) -> np.ndarray:
        """Left ("u") or right ("v") singular vectors as columns, float32 (dimension, ranks)."""
        columns = [self.vectors(side, i) for i in entries if self.rank[i]]
        return np.concatenate(columns, axis=1) if columns else np.empty((0, 0), np.float32)

    def stacks(self, side: str) -> list[np.ndarray]:
        """``stack`` of each module."""
        return [self.stack(side, self.entries([k])) for k in range(len(self.modules))]

    def vectors(self, side: str, i: int) -> np.ndarray:
        """Left ("u") or right ("v") singular vectors of an entry, float32 (dimension, rank)."""
        matrix, buffer = self._form.blocks[side][i], self._form.buffer
        start = (int(matrix["data"]) - address(buffer)) // 4
        rows = getattr(self._module_of(i), "d_out" if side == "u" else "d_in")
        strides = 4 * int(matrix["col_stride"]), 4 * int(matrix["row_stride"])
        return as_strided(buffer[start:], (rows, int(self.rank[i])), strides)

    def _module_of(self, i: int) -> Module:
        return self.modules[int(np.searchsorted(self.bounds, i, side="right")) - 1]


class ViewBuilder:
    """Matrices of all entries of a chunk, filled in module by module, and what they point into."""

    def __init__(self, factors: ChunkFactors) -> None:
        self._kept: list[np.ndarray] = []
        self._rank = factors.rank
        self.view = View(
            np.zeros(len(factors.rank), MATRIX), np.zeros(len(factors.modules), np.int64)
        )

    def add(self, modules: list[int], entries: np.ndarray, stack: np.ndarray) -> None:
        """The rows of a view are the columns of ``stack``: float32 (columns of the view, ranks)."""
        starts = np.cumsum(self._rank[entries]) - self._rank[entries]
        m = self.view.matrices
        m["data"][entries] = address(stack) + 4 * starts
        m["row_stride"][entries], m["col_stride"][entries] = 1, stack.shape[1]
        self.view.columns[modules] = len(stack)
        self._kept.append(stack)


class InputViews:
    """The right factors of a chunk applied to the inputs of every domain.

    Attributes, by domain: ``inputs`` X V, ``centred`` the same less its mean, ``mean`` the mean, as
    views, as far as they are wanted; ``factor`` (domains, modules), what X was divided by;
    ``energy`` and ``mean_energy`` (domains, entries), sum over samples of |X V S|^2 with S = sigma
    over its largest, and of the mean; ``rows`` (entries, T) of each domain, |x V S|^2 of centred
    samples.
    """

    def __init__(self, factors: ChunkFactors, samples: Samples, *, centred: bool) -> None:
        domains, entries = len(samples.domains), len(factors.rank)
        self.inputs = [ViewBuilder(factors) for _ in range(domains)]
        self.mean = [ViewBuilder(factors) for _ in range(domains)]
        self.centred = [ViewBuilder(factors) for _ in range(domains)]
        self.factor = np.ones((domains, len(factors.modules)))
        self.energy = np.zeros((domains, entries))
        self.mean_energy = np.zeros((domains, entries))
        self.rows = [np.zeros((entries, t)) if centred else None for t in samples.counts]
        for modules in samples.groups(factors.modules):
            here = factors.entries(modules)
            here = here[factors.rank[here] > 0]
            if len(here) == 0:
                continue
            stack = factors.stack("v", here)
            square = np.concatenate([factors.relative[i, : factors.rank[i]] ** 2 for i in here])
            starts = np.cumsum(factors.rank[here]) - factors.rank[here]
            for d in range(domains):
                x, self.factor[d, modules] = samples.inputs(d, factors.modules[modules[0]].name)
                seen = x @ stack
                mean = seen.mean(0, dtype=np.float64)
                self.inputs[d].add(modules, here, seen)
                self.mean[d].add(modules, here, mean.astype(np.float32)[None])
                energy = np.square(seen).sum(0, dtype=np.float64) * square
                self.energy[d, here] = np.add.reduceat(energy, starts)
                self.mean_energy[d, here] = np.add.reduceat(mean**2 * square, starts)
                if centred:
                    seen = (seen - mean).astype(np.float32)
                    self.centred[d].add(modules, here, seen)
                    weighted = np.square(seen, dtype=np.float64) * square
                    self.rows[d][here] = np.add.reduceat(weighted, starts, axis=1).T


def gradient_view(
    factors: ChunkFactors, left: list[np.ndarray], samples: Samples, d: int
) -> tuple[ViewBuilder, np.ndarray]:
    """Y U for the output gradients Y of a domain, and what Y was divided by, per module.

    ``left``: the stacks U of all modules.
    """
    builder, factor = ViewBuilder(factors), np.ones(len(factors.modules))
    for k, m in enumerate(factors.modules):
        here = factors.entries([k])
        if factors.rank[here].any():
            y, factor[k] = samples.gradients(d, m.name)
            builder.add([k], here, y @ left[k])
    return builder, factor


def fisher_views(
    factors: ChunkFactors, stacks: tuple[list[np.ndarray], list[np.ndarray]], samples: Samples,
    d: int,
) -> tuple[ViewBuilder, ViewBuilder, np.ndarray]:  # fmt: skip
    """sqrt(u) U and sqrt(v) V with a domain's mean squares u of gradients and v of inputs.

    And the product of what the two roots were divided by, per module. ``stacks``: U and V of all
    modules.
    """
    left, right, factor = ViewBuilder(factors), ViewBuilder(factors), np.ones(len(factors.modules))
    for k, m in enumerate(factors.modules):
        here = factors.entries([k])
        if factors.rank[here].any():
            u, v = samples.moment_roots(d, m.name)
            left.add([k], here, u.values[:, None] * stacks[0][k])
            right.add([k], here, v.values[:, None] * stacks[1][k])
            factor[k] = u.factor * v.factor
    return left, right, factor
