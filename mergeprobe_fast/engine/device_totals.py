""":func:`.totals.totals` on a device: factors go there as they are stored, sums come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.chunks import RawChunk, plan_chunks, read_ahead
from mergeprobe_fast.engine.device_views import module_bounds
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.engine.totals import Totals, extra_bytes, refuse
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.ops._tables import address
from mergeprobe_fast.zoo import Zoo


def device_totals(
    zoo: Zoo, calibration: Calibration | None, samples: Samples | None, threads: int,
    progress: Callable[[int], None] | None, device: Any,
) -> Totals:  # fmt: skip
    """As ``totals``, which has opened the samples."""
    from mergeprobe_fast.kernels.exact_totals import ExactTotals

    relative = calibration is not None and calibration.has_output_moments
    counts = [] if samples is None else samples.counts.tolist()
    sums = ExactTotals(device, len(zoo), counts, relative=relative)
    extra = None if samples is None else extra_bytes(zoo, samples)
    chunks = plan_chunks(zoo, np.arange(len(zoo)), passes.DEVICE_BYTES, extra)
    done = 0
    for raw in read_ahead(zoo, chunks, threads, device.memory):
        _add(sums, raw, samples, relative, device)
        if progress:
            progress(raw.chunk.last - done)
        done = raw.chunk.last
    if progress and done < len(zoo.modules):
        progress(len(zoo.modules) - done)
    found = [sums.gram, sums.inputs, *([sums.relative] if relative else [])]
    gram, inputs, *more = [wait() for wait in [device.download(x) for x in found]]
    domains = [] if samples is None else list(samples.domains)
    return Totals(list(zoo.names), gram, domains, inputs, more[0] if relative else None)


def _add(sums: Any, raw: RawChunk, samples: Samples | None, relative: bool, device: Any) -> None:
    """Account for a chunk; its bytes have been copied when this returns."""
    modules, e = raw.zoo.modules[raw.chunk.first : raw.chunk.last], raw.entries
    bounds, finite = module_bounds(raw), []
    first = int(min(raw.a.min(), raw.b.min()))
    offset = first - address(raw.buffer)
    copy, copied = device.upload(raw.buffer[offset : offset + raw.chunk.raw_bytes])
    base = samples.base_energies(modules) if samples is not None and relative else None
    groups = [[k] for k in range(len(modules))] if samples is None else samples.groups(modules)
    for group in groups:
        filled = [k for k in group if bounds[k] < bounds[k + 1]]
        if not filled:
            continue
        there, square = None, None
        if samples is not None:
            name = modules[group[0]].name
            values = [samples.inputs(d, name) for d in range(len(samples.domains))]
            there = sums.samples([x.values for x in values])
            square = [x.factor**2 / t for x, t in zip(values, samples.counts, strict=True)]
        for k in filled:
            here = slice(*bounds[k : k + 2])
            starts = [
                list(zip((at[here] - first).tolist(), e[dtype][here].tolist(), strict=True))
                for at, dtype in ((raw.b, "b_dtype"), (raw.a, "a_dtype"))
            ]
            found = sums.add(
                copy, (modules[k].d_out, modules[k].d_in), *starts, e["rank"][here].tolist(),
                e["scale"][here].tolist(), e["adapter"][here].tolist(), there, square,
                None if base is None else base[:, k].tolist(),
            )  # fmt: skip
            finite.append((k, device.download(found)))
    for k, wait in sorted(finite, key=lambda x: x[0]):
        for i in np.flatnonzero(~wait())[:1]:
            refuse(raw, int(bounds[k]) + int(i))
    copied()
