"""Orthogonal subspaces after the fact: each adapter looks away from the other domains' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.merging.activation import Recent, calibration_of, inputs
from mergeprobe_fast.merging.algebra import Rows, Symmetric, triangles
from mergeprobe_fast.merging.arguments import number, whole
from mergeprobe_fast.merging.methods import Argument, MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.source import ModuleFactors, each_module
from mergeprobe_fast.merging.truncate import Sum, product, truncate

_DENSE = 400  # a full eigendecomposition is the faster one up to here
_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: a direction that no input has


def osrm(request: MergeRequest) -> Iterator[MergedModule]:
    """The weighted sum of deltas that are blind to the main input directions of other domains.

    ``A_j <- A_j (I - E_j E_j^T)`` with E_j the leading eigenvectors of the mean second moment
    ``X_g^T X_g / T_g`` of all domains g but adapter j's own: the ``directions`` largest, fewer
    where those hold a ``share`` of the other domains' energy already. Then ``sum_j w_j W_j``.

    This is the projection applied to adapters that are trained already. The published method
    (OSRM, Zhang and Zhou 2025) fixes A in that subspace before training, where nothing is lost;
    here each adapter loses what it knew about these directions. Every module reports it:
    ``own_energy_lost``, E ||(W_j - W_j') x||^2 / E ||W_j x||^2 on the adapter's own domain, and
    ``interference_left``, E ||W_j' x||^2 / E ||W_j x||^2 on the others (null where W_j is zero).

    Exact for the samples, float64. Where adapters share one domain nothing is taken from them by
    each other; with one domain for all it is ``linear``. ``rank=None`` gives the numerical rank.
    Gauge-invariant. Needs inputs.
    """
    calibration, arguments = calibration_of(request), request.arguments
    require(calibration, request.source.modules)
    device = request.device
    recent = Recent(request.workers)

    def others_of(m: ModuleFactors) -> _Others:
        samples = {g: inputs(calibration, g, m.module) for g in dict.fromkeys(request.domains)}
        return _Others(samples, arguments["directions"], arguments["share"], device)

    def key(m: ModuleFactors) -> str:
        return calibration.input_key(m.module.name)

    def merged(m: ModuleFactors) -> MergedModule:
        others = recent.get(key(m), lambda: others_of(m))
        whole = _projected(request, m, others)
        pad = request.rank is not None
        (cut,) = truncate([whole], request.rank, request.energy, 1, pad=pad, device=device)
        return cut

    yield from each_module(request.chunks(), merged, request.workers, key)


def _projected(request: MergeRequest, m: ModuleFactors, others: _Others) -> Sum:
    wide, device = m.wide(), request.device
    seen = others.seen(np.concatenate([a for _, a, _ in wide]))
    small_of = triangles([b for b, _, _ in wide], device)
    columns, rows = [], []
    lost, left, directions = [], [], []
    bounds = np.cumsum([0, *m.ranks])
    for k, (i, w, (b, a, s)) in enumerate(
        zip(m.adapters, request.weights_of(m), wide, strict=True)
    ):
        g = request.domains[int(i)]
        e, seen_e = others.directions(g)
        inner = a @ e
        small = small_of[k]
        whole = small @ seen[bounds[k] : bounds[k + 1]]
        taken = small @ (inner @ seen_e.T)
        own = others.domain == g
        lost.append(_share(taken[:, own], whole[:, own]))
        left.append(_share((whole - taken)[:, ~own], whole[:, ~own]))
        directions.append(e.shape[1])
        columns.append(b * (w * s))
        rows.append(a - inner @ e.T)
    details: Mapping[str, Any] = {
        "directions": directions, "own_energy_lost": lost, "interference_left": left,
    }  # fmt: skip
    stacked = np.concatenate(columns, axis=1), np.concatenate(rows)
    return product(m.module, *stacked, request.members(m), details)


class _Others:
    """The leading directions of all domains but one, for each one, on demand."""

    def __init__(
        self, samples: Mapping[str, np.ndarray], most: int, share: float, device: Any
    ) -> None:
        self._most, self._share = most, share
        # Rows X_g / sqrt(T_g): sums of squares over a domain's rows are means over its samples.
        y = np.concatenate([x / np.sqrt(len(x)) for x in samples.values()], dtype=np.float64)
        self.domain = np.repeat(list(samples), [len(x) for x in samples.values()])
        self._y = Rows(y, device)
        self._gram = self._y.gram() if len(y) < y.shape[1] else None
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def directions(self, own: str) -> tuple[np.ndarray, np.ndarray]:
        """Orthonormal columns E (d, k), and y E."""
        if own not in self._found:
            others = self.domain != own
            if self._gram is None:
                found = leading(self._y.transposed_gram(others), self._most, self._share)
            else:
                vectors = leading(self._gram.restricted(others), self._most, self._share)
                padded = np.zeros((len(others), vectors.shape[1]))
                padded[others] = vectors
                found = np.linalg.qr(self._y.combined(padded))[0]
            self._found[own] = found, self._y.applied(found)
        return self._found[own]

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """``rows y^T``."""
        return self._y.seen(rows)


def leading(gram: Symmetric, most: int, share: float) -> np.ndarray:
    """Leading eigenvectors (n, k) of a positive semidefinite matrix.

    k is at most ``most``, and the smallest that holds ``share`` of the trace.
    """
    size = gram.trace()
    k = min(most, len(gram))
    if k == 0 or size == 0:
        return np.zeros((len(gram), 0))
    if len(gram) <= _DENSE or k > len(gram) // 4:
        values, vectors = gram.eigh()
    else:
        from scipy.sparse.linalg import eigsh  # only here: most merges save its import

        start = np.random.default_rng(0).standard_normal(len(gram))
        values, vectors = eigsh(gram.operator(), k, v0=start)
    order = np.argsort(-values, kind="stable")[:k]
    values, vectors = values[order], vectors[:, order]
    enough = np.cumsum(values) >= share * size * (1 - 1e-12)
    if enough.any():
        k = 1 + int(np.argmax(enough))
    return vectors[:, : min(k, int((values > _NEGLIGIBLE * values[0]).sum()))]


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    energy = float(np.square(whole).sum())
    return float(np.square(part).sum()) / energy if energy > 0 else None


METHODS = (
    MergeMethod(
        "osrm", osrm, data=("inputs",),
        arguments={
            "directions": Argument(16, whole(0), "of the other domains' inputs, taken away"),
            "share": Argument(
                1.0, number(0, 1, open_least=True), "of their energy: fewer directions if enough"
            ),
        },
    ),
)  # fmt: skip
