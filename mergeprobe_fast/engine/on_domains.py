"""Sums of pairs on the calibration domains of the two adapters, for needs that have a view."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class DomainGrams:
    """Grams of a chunk on every domain of the pairs' adapters.

    ``riding`` and ``views`` go along with the pass that has the left factors anyway, whose results
    ``take`` gets; the others are passes of their own.
    """

    @_env.one_blas_thread()
    def __init__(
        self, one: Side, two: Side, needs: Sequence[Need], raw: RawChunk, form: CanonicalChunk,
        samples: Samples, threads: int,
    ) -> None:  # fmt: skip
        self._one, self._two, self._samples, self._threads = one, two, samples, threads
        self._needs = list(needs)
        # Relative needs are the same sums, divided.
        kinds = {Need(n.product, n.row, n.column, n.view) for n in needs}
        for n in kinds - {OUTPUT, OUTPUT_HSIC, MEAN_OUTPUT, KFAC, FISHER}:
            raise ValueError(f"no such sum on a domain: {n}")
        self._domains = range(len(samples.domains))
        self._factors = ChunkFactors(raw, form)
        self._bounds = outputs(one, two)
        self._seen = InputViews(self._factors, samples, centred=OUTPUT_HSIC in kinds)
        # By need: (domains, results) of pairs, (domains, entries) of each side, (domains, modules).
        self._cross: dict[Need, np.ndarray] = {}
        self._alone: dict[Need, tuple[np.ndarray, np.ndarray]] = {}
        self._factor: dict[Need, np.ndarray] = {}
        self._base = None
        if any(n.relative for n in needs):
            self._base = samples.base_energies(self._factors.modules)
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
        counts = self._samples.counts
        for k, n in enumerate(self._rides):
            at = k * len(self._domains)
            self._cross[n] = results[at : at + len(self._domains)]
        square = self._seen.factor**2
        for n in self._rides:
            if n == OUTPUT:
                self._factor[n] = square / counts[:, None]
                self._alone[n] = self._of_sides(self._seen.energy)
            elif n == MEAN_OUTPUT:
                self._factor[n] = square
                self._alone[n] = self._of_sides(self._seen.mean_energy)
            else:
                with np.errstate(divide="ignore", invalid="ignore"):
                    scale = np.where(counts >= _FEWEST, 1.0 / (counts * (counts - 3.0)), np.nan)
                self._factor[n] = square**2 * scale[:, None]
                self._unbias()
        del self._seen, self._factors

    def _of_sides(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values[:, self._one.entries], values[:, self._two.entries]

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

    def sums(
        self, k: int, at: np.ndarray, pairs: tuple[np.ndarray, np.ndarray],
        domains: tuple[np.ndarray, np.ndarray],
    ) -> dict[Need, np.ndarray]:  # fmt: skip
        """Of module k: (6, pairs) as in ``Sums.domain``.

        ``at``: each pair's place among the module's results, -1 where one adapter lacks it;
        ``pairs``: places in the two blocks of adapters; ``domains``: those of the adapters there.
        """
        (i, j), one, two = pairs, self._one, self._two
        here = at >= 0
        out = {}
        for n in self._needs:
            kind = Need(n.product, n.row, n.column, n.view)
            factor = self._factor[kind][:, k]
            if n.relative:
                factor = _over(factor, self._base[:, k])
            grams = self._cross[kind][:, slice(*self._bounds[k : k + 2])]
            own = [
                side.spread(side.rows(k), values[:, side.rows(k)] * factor[:, None]
                            * _tops(side, k, n) ** 2)
                for side, values in zip((one, two), self._alone[kind], strict=True)
            ]  # fmt: skip
            tops = [s.spread(s.rows(k), _tops(s, k, n)) for s in (one, two)]
            size = tops[0][i] * tops[1][j]
            rows = np.zeros((6, len(i)))
            for start, d in ((0, domains[0][i]), (3, domains[1][j])):
                if grams.shape[1]:
                    rows[start] = np.where(here, grams[d, at] * size * factor[d], 0.0)
                mine, theirs = own[0][d, i], own[1][d, j]
                rows[start + 1 : start + 3] = (mine, theirs) if start == 0 else (theirs, mine)
            out[n] = rows
        return out


def _tops(side: Side, k: int, n: Need) -> np.ndarray:
    """What the relative sigma of a module's entries are of, to the power that a need has."""
    return side.top[side.rows(k)] ** (1 if n.row == "sigma" else 2)


def _bias(t: int, dots: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """What tr(K L) has too much, from k.l and sum(k) sum(l)."""
    return t / (t - 2) * dots - totals / ((t - 1) * (t - 2))


def _over(factor: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Relative to the base module's output; undefined where that is always zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, factor / base, np.nan)
