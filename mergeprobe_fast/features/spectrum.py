"""Per-adapter features of the singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AdapterFeature:
    """A number per adapter and per module, from all singular values of the delta.

    ``finish`` gets a (rows, k) array of singular values, descending and zero padded, with
    ``numerical`` without those below the numerical rank: these are rounding.
    """

    name: str
    title: str
    definition: str
    finish: Callable[[np.ndarray], np.ndarray]
    source: str
    low: float | None = 0.0
    high: float | None = None
    high_text: str = ""  # where it depends on the adapter
    null_text: str = ""
    by_default: bool = True
    numerical: bool = False


def _norm(s: np.ndarray) -> np.ndarray:
    # Scaled by the largest, so that a delta of norm 1e-200 does not underflow.
    top = np.maximum(s[:, :1], np.finfo(float).tiny)
    return top[:, 0] * np.sqrt(np.square(s / top).sum(1))


def _shares(s: np.ndarray, power: int) -> np.ndarray:
    """sigma^power over its sum, NaN rows for a zero delta."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = (s / s[:, :1]) ** power
        return p / p.sum(1, keepdims=True)


def _stable_rank(s: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.square(s / s[:, :1]).sum(1)


def _effective_rank(s: np.ndarray) -> np.ndarray:
    p = _shares(s, 1)
    return np.exp(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), p).sum(1))


def _participation(s: np.ndarray) -> np.ndarray:
    return 1.0 / np.square(_shares(s, 2)).sum(1)


def _energy_rank(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def finish(s: np.ndarray) -> np.ndarray:
        p = _shares(s, 2)
        # A share reached up to rounding is reached.
        count = 1.0 + (np.cumsum(p, 1) < share - 1e-12).sum(1)
        return np.where(np.isnan(p[:, 0]), np.nan, count)

    return finish


def _effective_rank_of_energy(s: np.ndarray) -> np.ndarray:
    p = _shares(s, 2)
    return np.exp(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), p).sum(1))


def _top_energy(count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda s: np.minimum(_shares(s, 2)[:, :count].sum(1), 1.0)


def _log_volume(s: np.ndarray) -> np.ndarray:
    kept = s > 0
    return np.where(kept.any(1), np.log(np.where(kept, s, 1.0)).sum(1), np.nan)


def _log_mean(s: np.ndarray) -> np.ndarray:
    return _log_volume(s) / np.maximum((s > 0).sum(1), 1)


_RANK = "rank"
SPECTRUM = (
    AdapterFeature("norm", "Norm", "Frobenius norm of the update.", _norm, "standard"),
    AdapterFeature(
        "spectral_norm", "Spectral norm", "Largest singular value.", lambda s: s[:, 0] + 0.0,
        "standard",
    ),
    AdapterFeature(
        "nuclear_norm", "Nuclear norm", "Sum of the singular values.", lambda s: s.sum(1),
        "standard",
    ),
    AdapterFeature(
        "stable_rank", "Stable rank", "Squared Frobenius over squared spectral norm.",
        _stable_rank, "standard", 1.0, high_text=_RANK,
    ),
    AdapterFeature(
        "effective_rank", "Effective rank",
        "exp of the entropy of sigma / sum sigma (Roy and Vetterli).", _effective_rank,
        "standard", 1.0, high_text=_RANK,
    ),
    AdapterFeature(
        "participation", "Participation", "(sum sigma^2)^2 / sum sigma^4.", _participation,
        "standard", 1.0, high_text=_RANK,
    ),
    AdapterFeature(
        "energy_rank_90", "90% energy rank",
        "Singular values that hold 90% of the squared norm.", _energy_rank(0.90), "standard", 1.0,
        high_text=_RANK,
    ),
    AdapterFeature(
        "energy_rank_99", "99% energy rank",
        "Singular values that hold 99% of the squared norm.", _energy_rank(0.99), "standard", 1.0,
        high_text=_RANK,
    ),
    AdapterFeature(
        "energy_rank_95", "95% energy rank",
        "Singular values that hold 95% of the squared norm.", _energy_rank(0.95), "standard", 1.0,
        high_text=_RANK, by_default=False,
    ),
    AdapterFeature(
        "effective_rank_energy", "Effective rank by energy",
        "exp of the entropy of sigma^2 / sum sigma^2: effective_rank with the other "
        "normalisation.", _effective_rank_of_energy, "standard", 1.0, high_text=_RANK,
        by_default=False,
    ),
    *(
        AdapterFeature(
            f"energy_top_{k}", f"Energy of the first {k}" if k > 1 else "Energy of the first",
            f"Share of the squared norm in the {k} largest singular values." if k > 1 else
            "Share of the squared norm in the largest singular value, 1 / stable_rank.",
            _top_energy(k), "standard", 0.0, 1.0, by_default=False,
        )
        for k in (1, 2, 4, 8)
    ),
    AdapterFeature(
        "log_volume", "Log-volume", "Sum of the logarithms of the singular values, as many as the "
        "numerical rank.", _log_volume, "standard", None, by_default=False, numerical=True,
    ),
    AdapterFeature(
        "log_sigma_mean", "Mean log singular value", "log_volume over the numerical rank: the "
        "logarithm of their geometric mean.", _log_mean, "standard", None, by_default=False,
        numerical=True,
    ),
)  # fmt: skip
