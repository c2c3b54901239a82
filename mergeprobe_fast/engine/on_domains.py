"""Sums of pairs on the calibration domains of the two adapters, for needs that have a view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk
from mergeprobe_fast.engine.declare import FISHER, KFAC, MEAN_OUTPUT, OUTPUT, OUTPUT_HSIC, Need
from mergeprobe_fast.engine.p1 import Side, View, alone, fused, outputs
from mergeprobe_fast.engine.project import (
    ChunkFactors,
    InputViews,
    ViewBuilder,
    fisher_views,
    gradient_view,
)
from mergeprobe_fast.engine.samples import Samples

_FEWEST = 4  # samples below which the unbiased HSIC is not defined


class OnDomains:
    """Sums of a chunk on every domain of the pairs' adapters, from what a subclass found.

    By need, relative ones left out: ``_cross`` (domains, results) of pairs, ``_alone`` (domains,
    entries) of each side's, ``_factor`` (domains, modules) that both are to be multiplied by.
    """

    def __init__(
        self, one: Side, two: Side, needs: Sequence[Need], raw: RawChunk, samples: Samples
    ) -> None:
        self._one, self._two, self._samples = one, two, samples
        self._needs = list(needs)
        # Relative needs are the same sums, divided.
        self._kinds = {Need(n.product, n.row, n.column, n.view) for n in needs}
        for n in self._kinds - {OUTPUT, OUTPUT_HSIC, MEAN_OUTPUT, KFAC, FISHER}:
            raise ValueError(f"no such sum on a domain: {n}")
        self._modules = raw.zoo.modules[raw.chunk.first : raw.chunk.last]
        self._domains = range(len(samples.domains))
        self._bounds = outputs(one, two)
        self._cross: dict[Need, np.ndarray] = {}
        self._alone: dict[Need, tuple[np.ndarray, np.ndarray]] = {}
        self._factor: dict[Need, np.ndarray] = {}
        self._base = None

    def _divide(self) -> None:
        """Read what relative needs are divided by."""
        if any(n.relative for n in self._needs):
            self._base = self._samples.base_energies(self._modules)

    def _of_inputs(self, need: Need, factor: np.ndarray) -> np.ndarray:
        """``_factor`` of a need on inputs, from what those were divided by."""
        counts, square = self._samples.counts, factor**2
        if need == OUTPUT:
            return square / counts[:, None]
        if need == MEAN_OUTPUT:
            return square
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(counts >= _FEWEST, 1.0 / (counts * (counts - 3.0)), np.nan)
        return square**2 * scale[:, None]

    def _of_sides(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values[:, self._one.entries], values[:, self._two.entries]

    def sums(
        self, modules: tuple[int, int], at: np.ndarray, both: np.ndarray | None,
        pairs: tuple[np.ndarray, np.ndarray], domains: tuple[np.ndarray, np.ndarray],
        spread: Callable[[Side, np.ndarray], np.ndarray], like: Any = None,
    ) -> dict[Need, np.ndarray]:  # fmt: skip
        """Of modules [first, last): (6, modules x pairs) by need, as in ``Sums.domain``.

        ``at``: where each pair's result lies, anywhere where ``both`` is not positive (None: both
        adapters have every module); ``pairs``: places of the adapters among modules x adapters,
        which is how ``spread(side, values)`` puts (..., entries of a side); ``domains``: those of
        the adapters of both sides. ``at``, ``both`` and ``pairs`` are like ``like``.
        """
        here, sides = slice(*modules), (self._one, self._two)
        of, row = [], []
        for side, place, named in zip(sides, pairs, domains, strict=True):
            many = np.tile(named, here.stop - here.start)
            of.append(np.asarray(many, like=like)[place])
            row.append(of[-1] * (side.count * (here.stop - here.start)))
        out = {}
        for n in self._needs:
            kind = Need(n.product, n.row, n.column, n.view)
            factor = self._factor[kind]
            if n.relative:
                factor = _over(factor, self._base)
            own, by_module = [], []
            for side, values in zip(sides, self._alone[kind], strict=True):
                scaled = values * factor[:, side.module] * _tops(side, n) ** 2
                own.append(spread(side, scaled).reshape(-1))
                whole = np.repeat(factor[:, here], side.count, axis=1).reshape(-1)
                by_module.append(np.asarray(whole, like=like))
            tops = [spread(side, _tops(side, n))[x] for side, x in zip(sides, pairs, strict=True)]
            size, grams = tops[0] * tops[1], self._cross[kind].reshape(-1)
            rows = []
            for owner in (0, 1):
                other = 1 - owner
                dot = np.zeros(len(size), like=like)
                if self._bounds[here.start] < self._bounds[here.stop]:
                    found = np.take(grams, of[owner] * int(self._bounds[-1]) + at)
                    dot = found * size * np.take(by_module[owner], row[owner] + pairs[owner])
                    dot = dot if both is None else np.where(both > 0, dot, 0.0)
                # The other adapter's own sum, on the domain of the owner.
                far = of[owner] * (sides[other].count * (here.stop - here.start)) + pairs[other]
                rows += [dot, np.take(own[owner], row[owner] + pairs[owner]),
                         np.take(own[other], far)]  # fmt: skip
            out[n] = np.stack(rows)
        return out


class DomainGrams(OnDomains):
    """On the CPU. ``riding`` and ``views`` go along with the pass that has the left factors anyway,
    whose results ``take`` gets; the others are passes of their own.
    """

    @_env.one_blas_thread()
    def __init__(
        self, one: Side, two: Side, needs: Sequence[Need], raw: RawChunk, form: CanonicalChunk,
        samples: Samples, threads: int,
    ) -> None:  # fmt: skip
        super().__init__(one, two, needs, raw, samples)
        self._threads, kinds = threads, self._kinds
        self._factors = ChunkFactors(raw, form)
        self._seen = InputViews(self._factors, samples, centred=OUTPUT_HSIC in kinds)
        self._divide()
        ride = {
            OUTPUT: self._seen.inputs, MEAN_OUTPUT: self._seen.mean,
            OUTPUT_HSIC: self._seen.centred,
        }  # fmt: skip
        self._rides = [n for n in ride if n in kinds]
        self.views: list[View] = [b.view for n in self._rides for b in ride[n]]
        self.riding = [
            (n, 1 + k * len(self._domains) + d)
            for k, n in enumerate(self._rides) for d in self._domains
        ]  # fmt: skip
        if kinds & {KFAC, FISHER}:
            left = self._factors.stacks("u")
        if KFAC in kinds:
            self._separate(KFAC, lambda d: self._kfac(left, d))
        if FISHER in kinds:
            stacks = left, self._factors.stacks("v")
            self._separate(FISHER, lambda d: self._fisher(stacks, d))

    @_env.one_blas_thread()
    def take(self, results: np.ndarray) -> None:
        """The results of ``riding``; completes the sums."""
        for k, n in enumerate(self._rides):
            at = k * len(self._domains)
            self._cross[n] = results[at : at + len(self._domains)]
            self._factor[n] = self._of_inputs(n, self._seen.factor)
        if OUTPUT in self._rides:
            self._alone[OUTPUT] = self._of_sides(self._seen.energy)
        if MEAN_OUTPUT in self._rides:
            self._alone[MEAN_OUTPUT] = self._of_sides(self._seen.mean_energy)
        if OUTPUT_HSIC in self._rides:
            self._unbias()
        del self._seen, self._factors

    def _unbias(self) -> None:
        """Take the samples' products with themselves out of the HSIC of pairs and of selves.

        On centred outputs with Grams K and L (T, T) over the samples, of diagonals k and l, it is
        tr(K L) - T / (T - 2) k.l + sum(k) sum(l) / ((T - 1)(T - 2)), over T (T - 3).
        """
        one, two, grams = self._one, self._two, self._cross[OUTPUT_HSIC]
        selves = [np.zeros((len(self._domains), len(s.blocks))) for s in (one, two)]
        for d, t in enumerate(self._samples.counts):
            if t < _FEWEST:
                continue
            rows = self._seen.rows[d]
            total = rows.sum(1)
            for k in range(len(one.bounds) - 1):
                i, j = one.entries[one.rows(k)], two.entries[two.rows(k)]
                part = slice(*self._bounds[k : k + 2])
                bias = _bias(t, rows[i] @ rows[j].T, np.outer(total[i], total[j]))
                grams[d, part] -= bias.ravel()
            for side, out in zip((one, two), selves, strict=True):
                i = side.entries
                own = alone(None, self._seen.centred[d].view, side, OUTPUT_HSIC, self._threads)
                # An inner product of U-centred Grams: never negative.
                bias = _bias(t, np.square(rows[i]).sum(1), total[i] ** 2)
                out[d] = np.maximum(own - bias, 0.0)
        self._alone[OUTPUT_HSIC] = selves[0], selves[1]

    def _separate(self, need: Need, make: Callable[[int], tuple]) -> None:
        """Passes over other factors, one a domain: ``make`` gives left, right and their factor."""
        cross, selves, factors = [], ([], []), []
        for d in self._domains:
            left, right, factor = make(d)
            columns = left.view.columns
            [results] = fused(
                self._one, self._two, columns, right.view.columns, [(need, 1)], [right.view],
                left=left.view, threads=self._threads,
            )  # fmt: skip
            cross.append(results)
            factors.append(factor)
            for side, out in zip((self._one, self._two), selves, strict=True):
                out.append(alone(left.view, right.view, side, need, self._threads))
        self._cross[need], self._factor[need] = np.array(cross), np.array(factors)
        self._alone[need] = np.array(selves[0]), np.array(selves[1])

    def _kfac(self, stack: list[np.ndarray], d: int) -> tuple[ViewBuilder, ViewBuilder, np.ndarray]:
        left, factor = gradient_view(self._factors, stack, self._samples, d)
        count = self._samples.counts[d]
        return left, self._seen.inputs[d], (factor * self._seen.factor[d] / count) ** 2

    def _fisher(
        self, stacks: tuple[list[np.ndarray], list[np.ndarray]], d: int
    ) -> tuple[ViewBuilder, ViewBuilder, np.ndarray]:
        left, right, factor = fisher_views(self._factors, stacks, self._samples, d)
        return left, right, factor**2


def _tops(side: Side, n: Need) -> np.ndarray:
    """What the relative sigma of a side's entries are of, to the power that a need has."""
    return side.top ** (1 if n.row == "sigma" else 2)


def _bias(t: int, dots: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """What tr(K L) has too much, from k.l and sum(k) sum(l)."""
    return t / (t - 2) * dots - totals / ((t - 1) * (t - 2))


def _over(factor: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Relative to the base module's output; undefined where that is always zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, factor / base, np.nan)
