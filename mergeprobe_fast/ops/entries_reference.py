"""Statistics of entries in numpy, dense and in float64: the definitions, a backend by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast.ops.tiles_reference import dense, matrix_values

if TYPE_CHECKING:
    from mergeprobe_fast.ops.entries import Moments, Pairs, Sample
    from mergeprobe_fast.ops.tiles_rule import Deltas


def positions(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries of a sample, in the order of its tiles."""
    rows, columns = [], []
    groups = [sample.rows[i : i + 8] for i in range(0, len(sample.rows), 8)]
    panels = [sample.columns[i : i + 16] for i in range(0, len(sample.columns), 16)]
    period = int(np.lcm(len(groups), len(panels)))
    for t in range(min(sample.tiles, len(groups) * len(panels))):
        group, panel = groups[t % len(groups)], panels[(t + t // period) % len(panels)]
        rows.append(np.repeat(group, len(panel)))
        columns.append(np.tile(panel, len(group)))
    return np.concatenate(rows), np.concatenate(columns)


def looked_at(deltas: Deltas, sample: Sample | None) -> np.ndarray:
    """(n, entries) float64."""
    x = dense(deltas)
    if sample is None:
        return x.reshape(len(x), -1)
    rows, columns = positions(sample)
    return x[:, rows, columns]


def entry_sizes(deltas: Deltas) -> np.ndarray:
    """As ``ops.entry_sizes``."""
    out = np.zeros(len(deltas))
    for i, s in enumerate(deltas.segments):
        u = matrix_values(s["u"], int(s["rank"]), deltas.d_out)
        v = matrix_values(s["v"], int(s["rank"]), deltas.d_in)
        out[i] = float(s["scale"]) ** 2 * (np.square(u).sum(1) * np.square(v).sum(1)).sum()
    return np.sqrt(out)


def entry_moments(deltas: Deltas, density: float, sample: Sample | None) -> Moments:
    """As ``ops.entry_moments``."""
    from mergeprobe_fast.ops.entries import Moments

    x = np.abs(looked_at(deltas, sample))
    n, size = x.shape
    kept = min(size, int(density * size))
    threshold = np.full(n, np.inf) if kept == 0 else np.sort(x, axis=1)[:, size - kept]
    top = (x >= threshold[:, None]) & (x > 0)
    return Moments(
        x.sum(1), (x**2).sum(1), (x**4).sum(1), (x**2 * top).sum(1), threshold,
        np.full(n, size), (x == 0).sum(1), top.sum(1),
    )  # fmt: skip


def entry_pairs(
    deltas: Deltas, thresholds: np.ndarray | None, units: np.ndarray, magnitudes: bool, split: int,
    sample: Sample | None,
) -> Pairs:  # fmt: skip
    """As ``ops.entry_pairs``."""
    from mergeprobe_fast.ops.entries import COUNTS, SUMS, Pairs

    x = looked_at(deltas, sample)
    n = len(x)
    out = Pairs(*np.zeros((COUNTS, n, n), np.int64), *np.zeros((SUMS, n, n)))
    if magnitudes:
        np.fill_diagonal(out.mass, np.square(x).sum(1))
        np.fill_diagonal(out.squares, np.square(x * x).sum(1))
    for j in range(split or 1, n):
        for i in range(split or j):
            conflict, sizes = x[i] * x[j] < 0, np.abs(x[[i, j]])
            out.conflicts[i, j] = conflict.sum()
            out.both[i, j] = ((x[i] != 0) & (x[j] != 0)).sum()
            if thresholds is not None:
                top = (sizes >= thresholds[[i, j], None]) & (sizes > 0)
                out.top[i, j] = top.all(0).sum()
            if magnitudes:
                out.mass[i, j] = sizes.prod(0).sum()
                out.conflict_mass[i, j] = (sizes.prod(0) * conflict).sum()
                out.opposed[i, j], out.opposing[i, j] = (sizes * conflict).sum(1)
                alike = np.ldexp(sizes, units[[i, j], None] - units[j])
                out.cancelled[i, j] = (alike.min(0) * conflict).sum()
                out.squares[i, j] = (sizes.prod(0) ** 2).sum()
    return out
