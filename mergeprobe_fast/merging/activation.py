"""The metric that a module's inputs put on its deltas, in the space of the samples.

A delta M costs ``E_x ||M x||^2 = tr(M C M^T)`` on inputs x with second moment C. For domain g

    C_g = off X_g^T X_g / T_g + (1 - off) diag(moment_g) + ridge diag(mean moment)

with T_g samples X_g. The metric is ``S = sum_g L_g C_g = D + off Y^T Y`` with D diagonal and
``Y_g = sqrt(L_g / T_g) X_g``. Everything here is in the coordinates ``a sqrt(D)``, in which
``S = I + off Z^T Z``, Z = Y / sqrt(D): massive input dimensions become like all others. Solving
with S takes a Cholesky factor of the smaller of ``I + off Z Z^T`` (T x T) and S itself (d x d).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.arguments import number
from mergeprobe_fast.merging.methods import Argument, MergeRequest
from mergeprobe_fast.merging.source import ModuleFactors
from mergeprobe_fast.zoo import Module

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

# Products with more than LARGE samples x inputs run in float32, if off / (1 - off + ridge) is at
# most _LIMIT: measured, that moves a RegMean of 7B size by 1e-5, bfloat16 samples move it by 1e-2.
LARGE = 1 << 21
_LIMIT = 1e3

ARGUMENTS = {
    "off_diagonal": Argument(
        0.9, number(0, 1), "what the off-diagonals of the input second moment count"
    ),
    "ridge": Argument(
        1e-6, number(0, 1, open_least=True), "added to the diagonal, of every dimension's own mean"
    ),
}  # fmt: skip


class Metric:
    """``S = sum_g L_g C_g`` over the inputs of a module, in coordinates scaled by ``scale``.

    Args:
        samples: of a domain, float32 (T_g, d); asked for once, in turn.
        counts: T_g per domain.
        moments: per domain, mean of x^2, float64 (d,).
        weights: L_g per domain, positive; only their ratios matter.
        off_diagonal: what X^T X / T counts, in [0, 1]; the rest is the diagonal.
        ridge: of every dimension's own mean square, > 0. Being the same in every C_g, it draws
            towards the weighted average of the deltas, not towards zero, and leaves their scale.
        device: where Z lies and products are made, all in float64 there; None: here.
    """

    def __init__(
        self,
        samples: Callable[[str], np.ndarray],
        counts: Mapping[str, int],
        moments: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        off_diagonal: float,
        ridge: float,
        device: Any = None,
    ) -> None:
        total = sum(weights.values())
        self.off = off_diagonal
        self.weights = {g: w / total for g, w in weights.items()}
        mean = sum(w * moments[g] for g, w in self.weights.items())
        # A dimension that is never used gets the plain weighted average: any positive number.
        average = float(mean.mean())
        prior = ridge * np.maximum(mean, average * 1e-20 if average > 0 else 1.0)
        own = {g: (1 - off_diagonal) * moments[g] + prior for g in weights}
        diagonal = sum(w * own[g] for g, w in self.weights.items())
        self.scale: np.ndarray = np.sqrt(diagonal)  # (d,)
        self.diagonal = {g: own[g] / diagonal for g in weights}  # of C_g, scaled, (d,)
        bounds = np.cumsum([0, *(counts[g] for g in weights)])
        self.rows = {g: slice(*bounds[k : k + 2]) for k, g in enumerate(weights)}
        shape = int(bounds[-1]), len(diagonal)
        self._by_samples = shape[0] <= shape[1]
        # Only in the space of the samples do roundings stay as small as they were: K^-1 Z < 1.
        gentle = self._by_samples and off_diagonal <= _LIMIT * (1 - off_diagonal + ridge)
        self.kind: type = np.float32 if gentle and shape[0] * shape[1] > LARGE else np.float64
        self._there: Any = None
        self._cholesky: Cholesky | None = None
        if device is not None:
            from mergeprobe_fast.kernels import products

            self._there = products.Metric(device, shape, off_diagonal)
        else:
            self.z = np.empty(shape, self.kind)  # sqrt(L_g / T_g) X_g / scale
        for g, rows in self.rows.items():
            factor = np.sqrt(self.weights[g] / counts[g]) / self.scale
            if self._there is not None:
                self._there.put(rows, samples(g), factor)
            else:
                np.multiply(samples(g), factor.astype(self.kind), out=self.z[rows])

    def scaled(self, a: np.ndarray) -> np.ndarray:
        """Rows (r, d) in the coordinates of the metric."""
        return a * self.scale

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """``rows Z^T``: scaled rows (r, d) applied to all samples, float64 (r, T)."""
        if self._there is not None:
            return self._there.seen(rows)
        return (rows.astype(self.kind, copy=False) @ self.z.T).astype(np.float64)

    def solve(self, own: np.ndarray, diag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``x = (off own Z + diag) S^-1`` and ``x Z^T``, for own (R, T) and diag (R, d).

        In the space of the samples, with K = I + off Z Z^T, it is
        ``diag + off (own - diag Z^T) K^-1 Z``: a correction to what the diagonal alone would give.
        """
        if self.off == 0:
            return diag, self.seen(diag)
        if self._there is not None:
            found = self._there.solve(own, diag)
            if found is None:
                raise _singular()
            return found
        if self._by_samples:
            change = self._solved(own - self.seen(diag))
            x = diag + self.off * (change.astype(self.kind, copy=False) @ self.z)
            return x, own - change
        x = self._solved(self.off * (own.astype(self.kind, copy=False) @ self.z) + diag)
        return x, self.seen(x)

    def _solved(self, right: np.ndarray) -> np.ndarray:
        """``right (I + off Z Z^T)^-1``, or with Z^T Z: symmetric, float64."""
        if self._cholesky is None:
            gram = self.z @ self.z.T if self._by_samples else self.z.T @ self.z
            gram = gram.astype(np.float64, copy=False)
            gram *= self.off
            gram[np.diag_indices(len(gram))] += 1.0
            self._cholesky = Cholesky(gram)
        return self._cholesky.solve(np.asarray(right, np.float64).T).T


class Cholesky:
    """``K = L L^T`` of a symmetric matrix, which is used up."""

    def __init__(self, k: np.ndarray) -> None:
        from scipy.linalg import lapack  # only here: a fifth of a second that most merges save

        # Symmetric: the transpose is the same matrix in LAPACK's order, and nothing is copied.
        # numpy's own Cholesky takes three times as long, for copies and for zeros above.
        self._factor, failed = lapack.dpotrf(k.T, lower=1, clean=0, overwrite_a=1)
        if failed:
            raise _singular()
        self._lapack = lapack

    def solve(self, right: np.ndarray) -> np.ndarray:
        """``K^-1 right``, right (n, R)."""
        return self._lapack.dpotrs(self._factor, right, lower=1)[0]


def _singular() -> InputError:
    return InputError("too small: these samples are singular without it", key="ridge")


class Recent:
    """The few values that were asked for last, by key; for as many threads as it keeps.

    Two threads that ask for the same key at once both make it: see ``each_module``'s ``together``.
    """

    def __init__(self, threads: int) -> None:
        # Modules with the same inputs may have one other between them: k, o, q, v.
        self._most = threads + 1
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made if it is not one of the last few."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            while len(self._kept) >= self._most:  # before the next one takes memory
                self._kept.popitem(last=False)
        value = make()
        with self._lock:
            self._kept[key] = value
        return value


class Metrics:
    """Metrics of modules one after another; those that share inputs share the work."""

    def __init__(self, request: MergeRequest) -> None:
        self._calibration = calibration_of(request)
        require(self._calibration, request.source.modules)
        self._numbers = request.arguments["off_diagonal"], request.arguments["ridge"]
        self._device = request.device
        self._recent = Recent(request.workers)

    def shared(self, m: ModuleFactors) -> str:
        """Equal for modules that see the same inputs: their work is best done together."""
        return self._calibration.input_key(m.module.name)

    def of(self, module: Module, weights: Mapping[str, float]) -> Metric:
        """The metric of a module, with L_g per domain."""
        total = sum(weights.values())
        ratios = {g: w / total for g, w in weights.items()}

        def make() -> Metric:
            calibration = self._calibration
            counts = {g: calibration.domains[g].samples for g in weights}
            moments = {g: calibration.moment(g, module.name) for g in weights}
            return Metric(
                lambda g: inputs(calibration, g, module), counts, moments, ratios, *self._numbers,
                self._device,
            )  # fmt: skip

        return self._recent.get(
            (self._calibration.input_key(module.name), tuple(ratios.items())), make
        )


def inputs(calibration: Calibration, domain: str, module: Module) -> np.ndarray:
    """The samples of a domain, float32 (T, d_in), checked."""
    x = calibration.inputs(domain, module.name)
    if len(x) == 0:
        raise InputError(f"has no samples in domain {domain!r}", path=calibration.path,
                         key=module.name)  # fmt: skip
    return x


def calibration_of(request: MergeRequest) -> Calibration:
    """The request's calibration, which :func:`.request.prepare` saw to."""
    if request.calibration is None:
        raise InputError("this method needs a calibration", key="calibration")
    return request.calibration


def positive_weights(request: MergeRequest, method: str) -> None:
    """Refuse weights that make a sum of second moments singular."""
    if (request.weights <= 0).any():
        name = request.source.names[int(np.argmax((request.weights <= 0).any(axis=0)))]
        raise InputError(f"{method} takes positive weights only, not that of {name}", key="weights")


def pooled(weights: Sequence[float] | np.ndarray, domains: Sequence[str]) -> dict[str, float]:
    """The weights summed by domain, in order of first appearance."""
    sums: dict[str, float] = {}
    for g, w in zip(domains, weights, strict=True):
        sums[g] = sums.get(g, 0.0) + float(w)
    return sums
