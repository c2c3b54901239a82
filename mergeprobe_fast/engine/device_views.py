"""What a calibration sees of a chunk, and energies of its channels, on a device.

The same sums as :mod:`.on_domains` and :mod:`.channels`. Only samples go there and only results
come back. On domains, P1 and float32 views are all that is not float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mergeprobe_fast.engine.channels import SIDE
from mergeprobe_fast.engine.chunks import RawChunk
from mergeprobe_fast.engine.declare import FISHER, KFAC, MEAN_OUTPUT, OUTPUT, OUTPUT_HSIC, Need
from mergeprobe_fast.engine.device import DeviceChunk, entry_ranges
from mergeprobe_fast.engine.on_domains import OnDomains
from mergeprobe_fast.engine.p1 import Side
from mergeprobe_fast.engine.samples import Samples
from mergeprobe_fast.zoo import Zoo


def module_bounds(raw: RawChunk) -> np.ndarray:
    """Where the entries of each module of a chunk start, and their end."""
    module = raw.entries["module"] - raw.chunk.first
    return np.searchsorted(module, np.arange(raw.chunk.last - raw.chunk.first + 1))


def chunk_rows(form: DeviceChunk, bounds: np.ndarray) -> Any:
    """The ``kernels.chunk_rows.ChunkRows`` of a chunk, from where its modules' entries start."""
    from mergeprobe_fast.kernels.chunk_rows import ChunkRows

    return ChunkRows(form.forms, bounds)


def vector_tiles(form: DeviceChunk, bounds: np.ndarray) -> Any:
    """The ``kernels.vector_tiles.VectorTiles`` of a chunk."""
    from mergeprobe_fast.kernels.vector_tiles import VectorTiles

    return VectorTiles(chunk_rows(form, bounds), form.rank, form.device.precision)


def device_array(tensor: Any) -> Any:
    """A tensor of a device as an array that numpy's functions take."""
    from mergeprobe_fast.kernels.arrays import DeviceArray

    return DeviceArray(tensor)


def view_bytes(
    zoo: Zoo, members: np.ndarray, samples: Samples, needs: Sequence[Need]
) -> np.ndarray:  # fmt: skip
    """Of what sums on domains take on a device beside the factors of each module."""
    kinds = {(n.product, n.view) for n in needs if n.view != "weights"}
    entries = zoo.table.entries[np.isin(zoo.table.entries["adapter"], members)]
    ranks = np.bincount(entries["module"], entries["rank"], len(zoo.modules)).astype(np.int64)
    count = np.bincount(entries["module"], minlength=len(zoo.modules)).astype(np.int64)
    domains, columns = len(samples.domains), int((-(-samples.counts // 16) * 16).sum())
    hsic, kfac = ("hsic", "inputs") in kinds, ("uv", "kfac") in kinds
    rows = 4 * (1 + hsic + kfac) * columns + 8 * domains
    if ("uv", "fisher") in kinds:  # the factors scaled for one domain at a time
        rows = rows + 4 * np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    # Results of two chunks, and partial sums of one pass.
    pairs = (2 * 8 * len(kinds) + 4) * domains
    return ranks * rows + count * (8 * hsic * columns + 16 * domains) + pairs * np.square(count)


class DeviceDomainGrams(OnDomains):
    """Started by the constructor; what first reads a sum waits for all of them."""

    def __init__(
        self, one: Side, two: Side, needs: Sequence[Need], raw: RawChunk, form: DeviceChunk,
        samples: Samples,
    ) -> None:  # fmt: skip
        from mergeprobe_fast.kernels.domain_views import DomainViews

        super().__init__(one, two, needs, raw, samples)
        kinds, bounds = self._kinds, module_bounds(raw)
        self._download = form.device.download
        self._started: list[Callable[[], None]] = []
        filled = [bool(form.rank[a:b].any()) for a, b in pairwise(bounds)]
        views = DomainViews(
            form.device, form.forms, bounds, samples.counts, centred=OUTPUT_HSIC in kinds
        )
        seen = np.ones((len(self._domains), len(self._modules)))
        for modules in samples.groups(self._modules):
            if any(filled[k] for k in modules):
                name = self._modules[modules[0]].name
                values = [samples.inputs(d, name) for d in self._domains]
                seen[:, modules] = np.array([x.factor for x in values])[:, None]
                views.see(modules, [x.values for x in values])
        self._divide()
        first = entry_ranges(one)
        second = None if one is two else entry_ranges(two)
        p, q = [m.d_out for m in self._modules], [m.d_in for m in self._modules]
        if OUTPUT in kinds:
            self._put(OUTPUT, views.outputs(first, second, p), views.energy)
        if MEAN_OUTPUT in kinds:
            self._put(MEAN_OUTPUT, views.means(first, second), views.mean_energy)
        if OUTPUT_HSIC in kinds:
            self._put(OUTPUT_HSIC, views.hsic(first, second), views.hsic_alone())
        for n in kinds & {OUTPUT, MEAN_OUTPUT, OUTPUT_HSIC}:
            self._factor[n] = self._of_inputs(n, seen)
        if KFAC in kinds:
            left, factor = views.empty(), np.ones_like(seen)
            for k in np.flatnonzero(filled):
                values = [samples.gradients(d, self._modules[k].name) for d in self._domains]
                factor[:, k] = [y.factor for y in values]
                views.see_left(int(k), [y.values for y in values], left)
            self._put(KFAC, views.kfac(left, first, second), views.alone(left, views.inputs))
            self._factor[KFAC] = (factor * seen / samples.counts[:, None]) ** 2
        if FISHER in kinds:
            cross, alone, factor = [], [], np.ones_like(seen)
            for d in self._domains:
                roots = {int(k): samples.moment_roots(d, self._modules[k].name)
                         for k in np.flatnonzero(filled)}  # fmt: skip
                for k, (u, v) in roots.items():
                    factor[d, k] = u.factor * v.factor
                rows = views.scaled({k: (u.values, v.values) for k, (u, v) in roots.items()})
                cross.append(views.fisher(rows, p, q, first, second))
                alone.append(views.alone_scaled(rows))
                del rows
            self._put(FISHER, views.joined(cross), views.joined(alone))
            self._factor[FISHER] = factor**2

    def _put(self, need: Need, cross: Any, alone: Any) -> None:
        """What was found, tensors of the shapes of :class:`OnDomains`: pairs stay on the device."""
        self._cross[need] = device_array(cross)
        own = self._download(alone)

        def wait() -> None:
            self._alone[need] = self._of_sides(own())

        self._started.append(wait)

    def sums(self, *arguments: Any) -> dict[Need, np.ndarray]:
        """As of :class:`OnDomains`."""
        for wait in self._started:
            wait()
        self._started = []
        return super().sums(*arguments)


class DeviceChannelGrams:
    """As :class:`.channels.ChannelGrams`; ``cross`` are arrays of the device."""

    def __init__(
        self, one: Side, two: Side, sides: Sequence[str], raw: RawChunk, form: DeviceChunk
    ) -> None:
        self._one, self._two = one, two
        self.cross: dict[str, Any] = {}
        self._own: dict[str, Callable[[], np.ndarray]] = {}
        if sides:
            rows = chunk_rows(form, module_bounds(raw))
            first = entry_ranges(one)
            second = None if one is two else entry_ranges(two)
            for side in sides:
                cross, own = rows.channels(SIDE[side], first, second)
                self.cross[side] = device_array(cross)
                self._own[side] = form.device.download(own)

    @cached_property
    def alone(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By side, products of each entry of one and of two with itself; waits for them."""
        return {
            side: (own[self._one.entries], own[self._two.entries])
            for side, own in ((side, wait()) for side, wait in self._own.items())
        }  # fmt: skip
