"""Features of a caller's own, of all kinds, for the CPU and for a child on a device."""

from __future__ import annotations

import math

import numpy as np

from mergeprobe_fast.features.declare import DOT, OUTPUT, ROW_CAPTURE, Feature, Sums, ratio


def cosine(s: Sums) -> np.ndarray:
    return ratio(s.need[DOT], np.sqrt(s.energy_a) * np.sqrt(s.energy_b))


def masked(s: Sums) -> np.ndarray:
    """numpy's memory, filled where a mask says."""
    out = np.full(len(s.energy_a), np.nan)
    both = (s.energy_a > 0) & (s.energy_b > 0)
    out[both] = s.need[DOT][both]
    return out


def among_pairs(s: Sums) -> np.ndarray:
    """Depends on the other pairs of the module."""
    return s.energy_a / max(float(np.max(s.energy_a)), 1e-300)


def one_by_one(s: Sums) -> np.ndarray:
    return np.array([math.hypot(a, b) for a, b in zip(s.energy_a, s.energy_b, strict=True)])


def branch(s: Sums) -> np.ndarray:
    return s.energy_a - s.energy_b if np.all(s.energy_a > 0) else s.energy_a + s.energy_b


def first_pair(s: Sums) -> np.ndarray:
    return s.energy_a - s.energy_a[0]


def unknown_to_the_device(s: Sums) -> np.ndarray:
    return np.interp(s.energy_a, [0.0, 1.0, 100.0], [0.0, 2.0, 3.0])


def small(s: Sums) -> np.ndarray:
    """Another dtype."""
    return (s.energy_a > s.energy_b).astype(np.float32)


def larger_capture(s: Sums) -> np.ndarray:
    both = np.stack([
        ratio(s.need[ROW_CAPTURE], s.energy_a), ratio(s.mirrored[ROW_CAPTURE], s.energy_b)
    ])  # fmt: skip
    return both.max(0)


def seen(s: Sums) -> np.ndarray:
    """On a's domain, over all of either."""
    return ratio(s.on_a(OUTPUT).own + s.on_b(OUTPUT).other, s.modules_a * s.rank_a)


def _weight(s: Sums) -> np.ndarray:
    return np.sqrt(s.energy_a) * s.modules_b


ON_DEVICE = (cosine, small, larger_capture)
ON_CPU = (masked, among_pairs, one_by_one, branch, first_pair, unknown_to_the_device)
NEEDS = {larger_capture: (ROW_CAPTURE,), seen: (OUTPUT,)}
OWN = {
    f.__name__: Feature(f"own_{f.__name__}", "Own", "Own.", f, NEEDS.get(f, (DOT,)))
    for f in (*ON_DEVICE, *ON_CPU, seen)
}
OWN["mean_over_modules"] = Feature(
    "own_mean_over_modules", "Own", "Own.", cosine, (DOT,), over_modules=_weight
)
OWN["mean_with_masks"] = Feature(
    "own_mean_with_masks", "Own", "Own.", masked, (DOT,), over_modules=_weight
)
