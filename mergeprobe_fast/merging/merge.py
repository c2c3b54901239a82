"""The front of all merge methods: checks, dispatch, and the checks of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import FACTOR_DTYPES
from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.methods import MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration


@_env.one_blas_thread()
def merge(
    zoo: Zoo | Paths,
    method: str = "svd",
    weights: Any = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    calibration: Calibration | Any = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
    **arguments: Any,
) -> MergedAdapter:
    """Merge all adapters of a zoo into one.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        method: a name in ``mergeprobe_fast.MERGE_METHODS``.
        weights: one factor per adapter, in the zoo's order or by name, multiplied into its delta;
            any sign. Each may depend on the module (:mod:`mergeprobe_fast.merging.schedule`).
            None is equal weights: 1/N each, or 1 each for rules that average themselves.
        rank: rank of the result, the same for every module; what None means is the method's.
        energy: instead, or besides, the share of the squared norm that each module must keep; the
            smallest such rank is taken, at most ``rank``.
        calibration: from :func:`mergeprobe_fast.open_calibration`, or its folder. Methods that
            learn from data need one; given to any other, the report gains the output error of
            every adapter on its own domain.
        domains: the calibration domain of every adapter, in order or by name; by default what
            their names begin with.
        dtype: "F32", "BF16" or "F16" of the result; None: that of the inputs, F32 if they differ.
        progress: called with the number of modules done since the last call.
        device: "cpu", "cuda", "cuda:1" or "auto", a CUDA device if one can be used. All methods
            compute there; the CPU reads and writes files, and has the k-means of ``lora_lego``, the
            least squares of ``prune``, and what is no larger than a factor.
        arguments: the method's own, see ``MERGE_METHODS[method].arguments``.

    Returns:
        An adapter whose ``save`` writes the format of the inputs, and ``merge.json``.

    Raises:
        InputError: an unknown method or argument, wrong weights or rank, a factor that is not
            finite, a file that changed since the zoo was opened.
        BackendError: the device cannot be used here, or has too little memory.
    """
    opened = open_device(device)
    zoo = as_zoo(zoo)
    chosen, request = prepare(
        ZooSource(zoo), method, weights=weights, rank=rank, energy=energy,
        calibration=open_given(calibration), domains=domains, threads=threads, progress=progress,
        device=opened, arguments=arguments,
    )  # fmt: skip
    if request.calibration is not None:  # before any work: the report will need it
        covered = [m for m in zoo.modules if m.name in request.calibration.modules]
        require(request.calibration, covered)
    used = sorted({factor.dtype for a in zoo for m in a.modules.values() for factor in (m.a, m.b)})
    if dtype is None:
        dtype = used[0] if len(used) == 1 else "F32"
    if dtype not in FACTOR_DTYPES:
        raise InputError(f"must be one of {', '.join(FACTOR_DTYPES)}, got {dtype!r}", key="dtype")
    with computing_on(opened):
        modules = tuple(run(chosen, request))
    return MergedAdapter(zoo, method, request, dtype, modules)


def run(method: MergeMethod, request: MergeRequest) -> Iterator[MergedModule]:
    """The method's modules, refused when float32 cannot hold them."""
    if method.data:
        import_module("scipy.linalg")  # its BLAS can be kept to one thread only once it is there
    with _env.one_blas_thread():
        for m in method.run(request):
            yield _checked(m)


def open_given(calibration: Any) -> Calibration | None:
    """A calibration as it is, or opened from its folder."""
    if calibration is None or hasattr(calibration, "domains"):
        return calibration
    from mergeprobe_fast.io.calibration import open_calibration

    return open_calibration(calibration)


def _checked(m: MergedModule) -> MergedModule:
    """Refuse a module whose float32 factors lost the update."""
    name = m.module.name
    if not (np.isfinite(m.a).all() and np.isfinite(m.b).all() and np.isfinite(m.norm)):
        raise InputError("the merged update overflows float32", key=name)
    if m.norm > 0 and m.rank_before > 0 and not (m.a.any() and m.b.any()):
        raise InputError("the merged update underflows float32", key=name)
    return m
