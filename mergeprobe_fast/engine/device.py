"""Chunks on a GPU: factors go there as they lie in the files, canonical forms and P1 stay there.

Factors come back where something on the CPU asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mergeprobe_fast.engine.chunks import CanonicalChunk, RawChunk, failure, refuse_absurd
from mergeprobe_fast.engine.declare import DOT, Feature, Need
from mergeprobe_fast.engine.p1 import Side, epilogue, outputs
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops._tables import BLOCK, DTYPE_CODE, address
from mergeprobe_fast.zoo import Zoo

# Factors of one chunk, raw and canonical, and results of P1; two chunks at a time. Unmeasured.
CHUNK_BYTES = 1 << 30
# Pairs of modules that are accounted for at once: few launches for few pairs.
AT_ONCE = 1 << 20
_OVERFLOW = 4  # status: the delta overflows float64


class DeviceForms:
    """Canonical forms of chunks; ``device`` is from :func:`mergeprobe_fast.ops.open_device`."""

    def __init__(self, device: Any, dtype: str = "float32") -> None:
        self._device, self._dtype = device, dtype
        self._copied: Callable[[], None] = lambda: None

    def compute(self, raw: RawChunk, threads: int) -> DeviceChunk:
        """As ``CanonicalFactors.compute``. Call :meth:`release` before the chunk's bytes go."""
        return self.start(raw)()

    def start(self, raw: RawChunk) -> Callable[[], DeviceChunk]:
        """A function that waits for the spectra, and then is :meth:`compute`."""
        from mergeprobe_fast.kernels.device import Forms

        e = raw.entries
        first = int(min(raw.a.min(), raw.b.min())) if len(e) else address(raw.buffer)
        offset = first - address(raw.buffer)
        copy, self._copied = self._device.upload(raw.buffer[offset : offset + raw.chunk.raw_bytes])
        shapes = np.array([(m.d_out, m.d_in) for m in raw.zoo.modules], np.int64)[e["module"]]
        forms = Forms(
            self._device, copy, start_b=raw.b - first, dtype_b=e["b_dtype"],
            start_a=raw.a - first, dtype_a=e["a_dtype"], rank=e["rank"].astype(np.int64),
            d_out=shapes[:, 0], d_in=shapes[:, 1], scale=e["scale"], dtype=self._dtype,
        )  # fmt: skip
        spectra = forms.spectra()

        def finish() -> DeviceChunk:
            sigma, rank, status = spectra()
            for row in np.flatnonzero(status)[:1]:
                if int(status[row]) == _OVERFLOW:
                    adapter, name = raw.names(int(row))
                    raise InputError("the update overflows float64", path=adapter.path, key=name)
                raise failure(raw, int(row), int(status[row]))
            refuse_absurd(sigma, raw)
            return DeviceChunk(forms, sigma, rank)

        return finish

    def release(self) -> None:
        """Wait until the last chunk's bytes have been copied."""
        self._copied()


class DeviceChunk(CanonicalChunk):
    """A :class:`CanonicalChunk` whose ``blocks`` and ``buffer`` are copied when asked for."""

    def __init__(self, forms: Any, sigma: np.ndarray, rank: np.ndarray) -> None:
        for name, value in (("_forms", forms), ("sigma", sigma), ("rank", rank)):
            object.__setattr__(self, name, value)

    @property
    def forms(self) -> Any:
        """The ``kernels.device.Forms`` of the chunk."""
        return self._forms

    @property
    def device(self) -> Any:
        """What the chunk is on, from :func:`mergeprobe_fast.ops.open_device`."""
        return self._forms._device

    @cached_property
    def buffer(self) -> np.ndarray:  # type: ignore[override]
        return self._forms.rows()

    @cached_property
    def blocks(self) -> np.ndarray:  # type: ignore[override]
        batch, base = self._forms.batch, address(self.buffer)
        blocks = np.zeros(len(self.rank), BLOCK)
        for side in "uv":
            blocks[side]["data"] = base + 4 * getattr(batch, f"starts_{side}").numpy()
            blocks[side]["row_stride"] = getattr(batch, f"widths_{side}").numpy()
            blocks[side]["col_stride"] = 1
            blocks[side]["dtype"] = DTYPE_CODE["F32"]
        blocks["rank"] = self.rank
        return blocks

    def fused(
        self, one: Side, two: Side, p: Sequence[int], q: Sequence[int], needs: Sequence[Need]
    ) -> np.ndarray:
        """:func:`.p1.fused` of the canonical factors, as an array of the device; does not wait."""
        epilogues = [epilogue(n) for n in needs]
        if not epilogues:
            return self.device.array(np.zeros((0, int(outputs(one, two)[-1]))))
        first = entry_ranges(one)
        second = None if one is two else entry_ranges(two)
        return self._forms.gram_pass(first, second, list(p), list(q), epilogues)


def result_bytes(zoo: Zoo, members: np.ndarray, needs: int) -> np.ndarray:
    """Of the results of P1 of each module, on the device, all pairs of ``members``."""
    here = np.zeros(len(zoo), bool)
    here[members] = True
    entries = zoo.table.entries
    count = np.bincount(
        entries["module"][here[entries["adapter"]]], minlength=len(zoo.modules)
    ).astype(np.int64)
    return 2 * 8 * needs * count**2


def pairs_side(zoo: Zoo, features: Sequence[Feature], room: int, limit: int | None) -> int:
    """How many adapters a side a block of pairs may have: all, if those fit among themselves.

    room: bytes for a whole pass. limit: of what pairs alone take, if not by the room.
    """
    entries = zoo.table.entries
    sizes = np.array([m.d_out + m.d_in for m in zoo.modules], np.int64)
    factors = entries["a_nbytes"] + entries["b_nbytes"]
    widest = int((factors + 4 * sizes[entries["module"]] * entries["rank"]).max(initial=0))
    needs = {n for f in features for n in f.needs} | {DOT}
    tiles = sum(n.view == "weights" for n in needs)
    on_domains = len(needs) - tiles
    local = sum(f.per_module for f in features)
    layers = len({m.layer for m in zoo.modules})
    sums = 8 * (4 * tiles + 6 * on_domains + 11)
    # Per pair: values of modules; sums, those of features and of layers; the places of the pair;
    # results of P1 of a module, of both triangles, and its partial sums; while a module is
    # accounted for, its sums and what features make of them.
    kept = 4 * local * len(zoo.modules) + sums + 8 * (2 * len(features) + 3 * layers + 2)
    passing = 2 * tiles * (8 + 2 * 4) * 2 + sums + 8 * 20

    def fits(pairs: int, adapters: int) -> bool:
        taken = pairs * (kept + passing)
        if limit is not None:
            return taken <= limit
        # Two chunks, of a module at least, while their factors are brought to canonical form.
        chunks = 2 * max(2 * min(CHUNK_BYTES, room // 8), adapters * widest)
        return taken + chunks + AT_ONCE * (sums + 8 * 20) <= room

    if fits(len(zoo) * (len(zoo) - 1) // 2, len(zoo)):
        return len(zoo)
    low, high = 0, len(zoo)  # the first fits
    while high - low > 1:
        side = (low + high) // 2
        low, high = (side, high) if fits(side**2, 2 * side) else (low, side)
    return low


def entry_ranges(side: Side) -> list[tuple[int, int]]:
    """Where a side's entries of each module lie in the chunk: one after another."""
    ranges = []
    for k in range(len(side.bounds) - 1):
        here = side.entries[side.rows(k)]
        if len(here) and int(here[-1]) - int(here[0]) + 1 != len(here):
            raise ValueError("the adapters of a block do not lie next to each other")
        ranges.append((int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0))
    return ranges
