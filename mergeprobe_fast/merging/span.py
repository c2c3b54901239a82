"""Where a merge lies beside its members: their inner products, from factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.merging.activation import Recent, inputs
from mergeprobe_fast.merging.algebra import Rows, gram
from mergeprobe_fast.merging.output_error import stack
from mergeprobe_fast.merging.source import ZooSource, each_module

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration
    from mergeprobe_fast.merging.adapter import MergedAdapter


@_env.one_blas_thread()
def bordered_grams(
    merged: MergedAdapter, calibration: Calibration | None, domains: Sequence[str], threads: int
) -> tuple[np.ndarray, ...]:
    """Inner products of the k members of a merge, in order, and the merge last, over all modules.

    Returns:
        ``(1, k + 1, k + 1)`` of the deltas; with a calibration also ``(k, k + 1, k + 1)`` on the
        inputs of each member's domain (means over samples), first with every module over the base
        module's mean squared output there (as they are, without output moments; NaN where that is
        zero), then as they are.

    Raises:
        InputError: a module that the calibration lacks or has in another shape, a file that
            changed.
    """
    zoo, device = merged.zoo, merged.request.device
    threads = threads if device is None else min(threads, 2)
    source, k = ZooSource(zoo), len(zoo)
    if calibration is not None:
        require(calibration, zoo.modules)
    result = {m.module.name: m for m in merged.modules}
    recent = Recent(threads)
    needed = list(dict.fromkeys(domains)) if calibration is not None else []
    relative = calibration is not None and calibration.has_output_moments

    def products(m):
        b, a, blocks = stack(m, result.get(m.module.name))
        place = np.concatenate([[k], m.adapters])
        out = np.zeros((1 + 2 * len(needed), k + 1, k + 1))
        outer = gram(b.T, device)
        views = [a]
        if needed:
            samples = recent.get(
                calibration.input_key(m.module.name),
                lambda: {g: Rows(inputs(calibration, g, m.module), device) for g in needed},
            )
            views += [samples[g].seen(a) / np.sqrt(len(samples[g])) for g in needed]
        for n, v in enumerate(views):
            entries = outer * gram(v, device)
            q = np.add.reduceat(np.add.reduceat(entries, blocks[:-1], 0), blocks[:-1], 1)
            out[n][np.ix_(place, place)] = q
        for n, g in enumerate(needed):
            base = calibration.output_moment(g, m.module.name).sum() if relative else 1.0
            out[1 + len(needed) + n] = out[1 + n]
            out[1 + n] *= 1 / base if base > 0 else np.nan
        return out

    total = np.zeros((1 + 2 * len(needed), k + 1, k + 1))
    for part in each_module(
        source.chunks(threads), products, threads,
        lambda m: calibration.input_key(m.module.name) if needed else m.module.name,
    ):  # fmt: skip
        total += part
    grams = (total[:1],)
    if needed:
        row = np.array([needed.index(g) for g in domains])
        grams += (total[1 + row], total[1 + len(needed) + row])
    return grams
