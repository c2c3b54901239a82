"""What a selection of statistics costs on a zoo, before it is computed.

Work is counted in multiply-adds. One of another kind than the block Gram's takes ``pace`` times as
long, measured on one machine; how fast this machine is, a short block Gram says.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.work import canonical_work, factor_work, gram_work, sizes
from mergeprobe_fast.features import Selection
from mergeprobe_fast.features.declare import CHANNELS
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.recorded import NOTHING, Recorded
from mergeprobe_fast.zoo import Zoo

# Over one multiply-add of the block Gram, ratios of CPU times on two cores:
CHANNEL_PACE = 100.0  # a number of a factor, on the way to the squared norms of rows and columns
VALUE = 5000.0  # a feature of a pair and module: its sums, its formula, its order statistics


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the block Gram that take as long, by part; ``read``: bytes."""

    parts: dict[str, float]
    read: int

    @property
    def work(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    def seconds(self, rate: float) -> float:
        """At ``rate`` multiply-adds a second, factors in the page cache."""
        return self.work / rate


def cost(zoo: Zoo, chosen: Selection, recorded: Recorded = NOTHING) -> Cost:
    """Of one call that computes ``chosen``.

    What a calibration adds to the tiles is counted as one more tile for each of its domains; what
    families do with calibrations, points and probes is left out where they do not say it.
    """
    entries, n = zoo.table.entries, len(zoo)
    needs = {need for f in chosen.features for need in f.needs}
    tiles = {need for need in needs if need.product not in CHANNELS}
    parts = {"canonical forms": canonical_work(zoo)}
    if tiles:
        kinds = {(need.product, need.view) for need in tiles if need.view != "weights"}
        domains = len(set(recorded.domains)) if kinds else 0
        parts["tiles of all pairs"] = gram_work(zoo) * (1 + len(kinds) * domains / 2)
    if needs - tiles:
        here = np.bincount(entries["module"], minlength=len(zoo.modules))
        grams = float((here**2 * sizes(zoo)).sum())
        parts["channels"] = CHANNEL_PACE * factor_work(zoo) + 4 * grams
    local = sum(f.per_module or f.over_modules is not None for f in chosen.features)
    parts["values"] = VALUE * local * n * (n - 1) / 2 * len(zoo.modules)
    for f in chosen.families:
        if f.work is not None:
            name = (f.title or f.name).lower()
            parts[name] = parts.get(name, 0.0) + f.pace * f.work(zoo)
    passes = 1 + sum(f.compute is not None for f in chosen.families)
    read = int(entries["a_nbytes"].sum() + entries["b_nbytes"].sum())
    return Cost({name: part for name, part in parts.items() if part > 0}, passes * read)


def measured_rate(threads: int | None = None) -> float:
    """Multiply-adds a second of the block Gram on this machine now, from 0.1 s of it."""
    count = _env.threads_or_default(threads)
    rows, d = 512, 2048
    x = np.random.default_rng(0).standard_normal((rows, d), dtype=np.float32)
    offsets = np.arange(0, rows + 1, 16)
    best, until = math.inf, time.perf_counter() + 0.1
    while True:
        started = time.perf_counter()
        block_gram(x, x, offsets, threads=count)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended > until:
            return rows**2 / 2 * 2 * d / best


def roughly(seconds: float) -> str:
    """A prediction, no more precise than it is: one digit, within a factor of two or so."""
    if seconds < 1:
        return "less than a second"
    for unit, size in (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400)):
        if seconds < {"second": 90, "minute": 5400, "hour": 129600}.get(unit, math.inf):
            value = seconds / size
            digit = 10 ** math.floor(math.log10(value)) if value >= 1 else 1
            shown = max(1, round(value / digit) * digit)
            return f"about {shown:g} {unit}{'' if shown == 1 else 's'}"
    raise AssertionError  # pragma: no cover
