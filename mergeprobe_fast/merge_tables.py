"""What all merges of a zoo's adapters are judged from, made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.totals import Totals, totals
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.declare import ratio
from mergeprobe_fast.features.merge_columns import (
    MEMBER,
    MERGE_FEATURES,
    OTHERS,
    OWN,
    level_columns,
)
from mergeprobe_fast.features.merge_declare import Level, MemberValues, Products
from mergeprobe_fast.features.merge_slopes import Slopes, at_point, slopes_of
from mergeprobe_fast.features.points import trained_point
from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.span import bordered_grams
from mergeprobe_fast.recorded import NOTHING, Recorded, lacks_output_moments
from mergeprobe_fast.screening import adapter_table
from mergeprobe_fast.zoo import Zoo

_BATCH_VALUES = 4_000_000
_RIDGE = 1e-10  # of each Gram's diagonal, where a merge is looked for among its members


@dataclass(frozen=True, eq=False)
class MergeTables:
    """Everything :func:`merge_tables` found out about the N adapters of a zoo.

    ``level`` says how much: "weights", "calibration" or "points".
    """

    zoo: Zoo
    recorded: Recorded
    totals: Totals
    domain_of: np.ndarray | None  # (N,) row of totals.inputs
    trained: Slopes | None
    base: Slopes | None
    own: Mapping[str, np.ndarray]  # (N,) numbers of single adapters, by their names
    threads: int
    device: Any = None  # from ops.open_device

    @property
    def level(self) -> Level:
        """The richest level there is."""
        if self.domain_of is None:
            return "weights"
        return "calibration" if self.trained is None else "points"

    @property
    def base_model(self) -> str | None:
        """What the adapters are of, as they or the calibration name it."""
        calibration = self.recorded.calibration
        named = None if calibration is None else calibration.info.base_model
        return self.zoo.base_model or named

    @property
    def fingerprint(self) -> str | None:
        """Of that model's configuration, as the calibration has it."""
        calibration = self.recorded.calibration
        return None if calibration is None else calibration.info.config_sha256

    def features(self, members: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the merges ``sum_j w_j W_j``, each (sets, widest) float64.

        Args:
            members: (sets, widest) integers, the adapters of each set, then -1.
            weights: (sets, widest); what stands beside -1 is not read.

        NaN beyond a set's members and where undefined.
        """
        there = members >= 0
        return self._by_size(members, np.where(there, weights, 0.0), None)

    def of_merged(
        self, merged: Sequence[tuple[Sequence[int], MergedAdapter]]
    ) -> dict[str, np.ndarray]:
        """The same of merges of any kind, from their factors: (members, result) each.

        What is known of points only along the members is read at the combination of members that
        comes nearest to the merge on the inputs of each; "outside" says how near.

        Raises:
            InputError: members that are not those that were merged, in that order.
        """
        for found, result in merged:
            names = [self.zoo.names[i] for i in found]
            if names != list(result.zoo.names):
                told = f"{', '.join(result.zoo.names)} were merged, not {', '.join(names)}"
                raise InputError(told, key="merged")
        widest = max((len(m) for m, _ in merged), default=1)
        members = np.full((len(merged), widest), -1, np.int32)
        for row, (found, _) in zip(members, merged, strict=True):
            row[: len(found)] = found
        return self._by_size(members, None, [result for _, result in merged])

    def _by_size(
        self, members: np.ndarray, weights: np.ndarray | None,
        results: Sequence[MergedAdapter] | None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        out = {name: np.full(members.shape, np.nan) for name in level_columns(self.level)}
        size = np.count_nonzero(members >= 0, axis=1)
        texts = 1 if self.trained is None else self.trained.model.shape[1]
        for k in np.unique(size):
            step = max(1, _BATCH_VALUES // (int(k) ** 2 * max(int(k), texts)))
            rows = np.flatnonzero(size == k)
            for s in (rows[at : at + step] for at in range(0, len(rows), step)):
                own = members[s, :k]
                values = (
                    self._combined(own, weights[s, :k]) if results is None
                    else self._bordered(own, [results[i] for i in s])
                )  # fmt: skip
                for name in self._merge_columns:
                    out[name][s, :k] = MERGE_FEATURES[name].finish(values)
                share = self._shares(own, np.ones(own.shape) if weights is None else weights[s, :k])
                # Numbers of all names at once: sets are often few.
                for side, (names, numbers) in self._own_columns.items():
                    number = numbers.take(own, axis=1)
                    if side == OTHERS:
                        number = (share * number[:, :, None, :]).sum(axis=-1)
                    for name, values in zip(names, number, strict=True):
                        out[side + name][s, :k] = values
        return out

    @cached_property
    def _merge_columns(self) -> tuple[str, ...]:
        return tuple(n for n in level_columns(self.level) if n in MERGE_FEATURES)

    @cached_property
    def _own_columns(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Numbers of single adapters read of members, and of the others: names, (names, N)."""
        there = set(level_columns(self.level))
        names = {side: tuple(c.name for c in OWN if side + c.name in there)
                 for side in (MEMBER, OTHERS)}  # fmt: skip
        return {side: (own, np.array([self.own[n] for n in own])) for side, own in names.items()}

    def _shares(self, members: np.ndarray, w: np.ndarray) -> np.ndarray:
        """(sets, k, k): what each of the others counts beside each member; NaN where none does."""
        k = members.shape[1]
        size = self.totals.gram[members, members][:, None, :]
        if self.domain_of is not None:
            size = self._on_inputs[self.domain_of[members][:, :, None], members[:, None, :],
                                   members[:, None, :]]  # fmt: skip
        counted = np.where(np.eye(k, dtype=bool), 0.0, np.square(w)[:, None, :] * size)
        return ratio(counted, counted.sum(axis=-1, keepdims=True))

    @property
    def _on_inputs(self) -> np.ndarray:
        """Grams on inputs, every module over the base module's output where that is known."""
        relative = self.totals.relative
        return self.totals.inputs if relative is None else relative

    def _combined(self, members: np.ndarray, w: np.ndarray) -> MemberValues:
        """Values of sets of one size: members and w are (sets, k)."""
        grams = [self.totals.gram[members[:, :, None], members[:, None, :]][:, None]]
        if self.domain_of is not None:
            at = (self.domain_of[members][:, :, None, None], members[:, None, :, None],
                  members[:, None, None, :])  # fmt: skip
            grams += [self._on_inputs[at], self.totals.inputs[at]]
        products = [_products(gram, w, w.shape[1]) for gram in grams]
        d = w[:, None, :] - np.eye(w.shape[1])
        return self._values(members, products, d, np.zeros(members.shape))

    def _bordered(self, members: np.ndarray, results: Sequence[MergedAdapter]) -> MemberValues:
        """The same of merges whose factors are read; their Grams have one row and column more."""
        sets, k = members.shape
        found = [
            bordered_grams(result, self.recorded.calibration, self._domains(row), self.threads)
            for row, result in zip(members, results, strict=True)
        ]
        grams = [np.stack(kind) for kind in zip(*found, strict=True)]
        unit = np.zeros((sets, k + 1))
        unit[:, k] = 1.0
        products = [_products(gram, unit, k) for gram in grams]
        c, outside = _nearest(grams[min(1, len(grams) - 1)], k)
        return self._values(members, products, c - np.eye(k), outside)

    def _domains(self, members: np.ndarray) -> list[str]:
        return [self.recorded.domains[i] for i in members] if self.recorded.domains else []

    def _values(
        self, members: np.ndarray, products: Sequence[Products], d: np.ndarray,
        outside: np.ndarray,
    ) -> MemberValues:  # fmt: skip
        """``d`` (sets, k, k): what each member sees added, as a combination of the members."""
        size = np.full(members.shape, float(members.shape[1]))
        values: dict[str, Any] = {"size": size, "weights": products[0]}
        if len(products) > 1:
            values |= {"inputs": products[1], "raw": products[2], "outside": outside}
        if self.trained is not None:
            gain = self.own["gain"][members]
            values |= {
                "trained": at_point(self.trained, members, d),
                "base": at_point(self.base, members, d), "gain": np.where(gain > 0, gain, np.nan),
            }  # fmt: skip
        return MemberValues(**values)


def _products(gram: np.ndarray, m: np.ndarray, k: int) -> Products:
    """Of M = sum of m times columns: Grams (sets, 1 or k, n, n) and m (sets, n).

    The first k of the n columns are the members; one Gram a set is the metric of them all.
    """
    seen = np.matmul(gram, m[:, None, :, None])[..., 0]
    merged = (seen * m[:, None, :]).sum(axis=-1)
    place = np.arange(k)
    metric = place if gram.shape[1] > 1 else np.zeros(k, np.int64)
    own, cross = gram[:, metric, place, place], seen[:, metric, place]
    merged = merged[:, metric]
    return Products(own, merged, cross, np.maximum(merged - 2 * cross + own, 0.0))


def _nearest(gram: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The combination of k members nearest to column k, (sets, k, k), and the energy it misses.

    Grams are (sets, 1 or k, k + 1, k + 1), in the metric of each member; NaN where one is.
    """
    among, to = gram[..., :k, :k], gram[..., :k, k]
    defined = np.isfinite(gram).all(axis=(-1, -2))
    size = np.diagonal(among, axis1=-2, axis2=-1)
    # Each member at length 1, so that the ridge means the same for all; a zero one gets no part.
    root = np.where(size > 0, np.sqrt(np.maximum(size, 0.0)), 1.0)
    scaled = among / root[..., :, None] / root[..., None, :] + _RIDGE * np.eye(k)
    scaled += np.where(size > 0, 0.0, 1.0)[..., None] * np.eye(k)
    scaled, aim = (np.where(defined.reshape(defined.shape + (1,) * n), x, y) for n, x, y in
                   ((2, scaled, np.eye(k)), (1, to / root, 0.0)))  # fmt: skip
    c = np.linalg.solve(scaled, aim[..., None])[..., 0] / root
    seen = np.matmul(among, c[..., None])[..., 0]
    left = gram[..., k, k] + (c * (seen - 2 * to)).sum(axis=-1)
    c = np.where(defined[..., None], c, np.nan)
    shape = (len(gram), k)
    return np.broadcast_to(c, (*shape, k)), np.broadcast_to(np.maximum(left, 0.0), shape)


def merge_tables(
    zoo: Zoo,
    recorded: Recorded = NOTHING,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = None,
) -> MergeTables:
    """What all merges of a zoo's adapters are judged from, in one pass over the zoo.

    Memory: 1 + 2 D matrices (N, N) of float64 with a calibration of D domains, and with points
    four times N x texts x N. ``device``: from :func:`mergeprobe_fast.ops.open_device`, or None.

    Raises:
        InputError: a file that changed, a factor that is not finite, a calibration or points of
            other adapters.
    """
    threads = _env.threads_or_default(threads)
    sums = totals(
        zoo, recorded.calibration, threads=threads, progress=progress, device=device
    )
    # One feature of pairs of each family whose numbers of adapters are wanted.
    wanted = []
    if lacks_output_moments(recorded) is None:
        wanted.append("disturbance_median_a_by_b")
    if recorded.points is not None:
        wanted.append("damage_trained_a_by_b")
    own = adapter_table(
        zoo, recorded, wanted, threads=threads, progress=progress, device=device
    )
    unknown = np.full(len(zoo), np.nan)
    numbers = {c.name: np.asarray(own.get(c.name, unknown), np.float64) for c in OWN}
    domain_of, trained, base = None, None, None
    if recorded.calibration is not None:
        row = {name: t for t, name in enumerate(sums.domains)}
        domain_of = np.array([row[name] for name in recorded.domains], np.int64)
        if recorded.points is not None:
            keys = [trained_point(zoo, recorded, i) for i in range(len(zoo))]
            at_base = [f"base:{name}" for name in recorded.domains]
            points = recorded.points
            trained = slopes_of(zoo, points, keys)
            base = slopes_of(zoo, points, [k if k in points.points else None for k in at_base])
    return MergeTables(zoo, recorded, sums, domain_of, trained, base, numbers, threads, device)
