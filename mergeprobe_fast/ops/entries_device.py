"""Statistics of entries on a CUDA device: numpy arrays out, around the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import BackendError, InputError

if TYPE_CHECKING:
    from mergeprobe_fast.ops.entries import Moments, Pairs, Sample


def factors_of(factors: Any) -> Any:
    """``kernels.entry_factors.EntryFactors`` of a list of tensors, or of what ``Deltas`` has there.

    Raises:
        InputError: what is not on a device, or does not fit.
        BackendError: there is no torch, triton or CUDA device.
    """
    from mergeprobe_fast.ops.tiles_rule import Deltas

    if isinstance(factors, Deltas):
        factors = factors.there
        if factors is None:
            raise InputError("backend 'triton' needs deltas on a device", key="factors")
    try:
        from mergeprobe_fast.kernels.entry_factors import EntryFactors
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"backend 'triton' is not available: {error}") from error
    return factors if isinstance(factors, EntryFactors) else EntryFactors.of(factors)


def entry_sizes(factors: Any) -> np.ndarray:
    """As ``ops.entry_sizes``."""
    return factors_of(factors).sizes()


def entry_moments(factors: Any, density: float, sample: Sample | None) -> Moments:
    """As ``ops.entry_moments``."""
    from mergeprobe_fast.ops.entries import Moments

    deltas = factors_of(factors)
    if sample is not None:
        sample.check(deltas.d_out, deltas.d_in)
    from mergeprobe_fast.kernels.entry_statistics import entry_moments as kernel

    return Moments(*kernel(deltas, density, sample))


def entry_pairs(
    factors: Any, thresholds: np.ndarray | None, units: np.ndarray, magnitudes: bool, split: int,
    sample: Sample | None,
) -> Pairs:  # fmt: skip
    """As ``ops.entry_pairs``; ``factors`` also from :func:`factors_of`."""
    from mergeprobe_fast.ops.entries import Pairs

    counts, sums = entry_pairs_there(
        factors, thresholds, units=units, magnitudes=magnitudes, split=split, sample=sample
    )
    return Pairs(*counts.cpu().numpy(), *sums.cpu().numpy())


def entry_pairs_there(
    factors: Any, thresholds: np.ndarray | None, *, units: np.ndarray, magnitudes: bool = True,
    split: int = 0, sample: Sample | None = None, threads: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The counts (3, n, n) and sums (6, n, n) of :func:`entry_pairs` as tensors on the device."""
    deltas = factors_of(factors)
    if sample is not None:
        sample.check(deltas.d_out, deltas.d_in)
    from mergeprobe_fast.kernels.entry_statistics import entry_pairs as kernel

    return kernel(deltas, thresholds, units, magnitudes, split, sample)
