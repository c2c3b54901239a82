"""What a report is made from. The command fills this in; the reports only read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SUMMARY_LISTS = ("most_aligned", "most_conflicting", "near_duplicates", "most_harmed")


@dataclass(frozen=True)
class FeatureInfo:
    """How one column of ``ScreenReport.pairs`` is named, explained and coloured.

    ``low`` and ``high`` bound the colour scale (None: taken from the data); a range that reaches
    below zero gets a diverging scale. ``null`` is the value expected of unrelated adapters.
    ``directed_twin`` names the column that holds the same statistic with a and b exchanged.
    """

    name: str
    title: str
    text: str
    low: float | None = None
    high: float | None = None
    null: float | None = None
    directed_twin: str | None = None
    group: str = ""  # features of one group stand together


@dataclass(frozen=True, eq=False)
class ScreenReport:
    """Input contract of every report of ``screen``.

    ``adapters`` are N-long columns and have at least ``name``. ``pairs`` has the indices ``a < b``
    and one float column per feature, NaN where a value does not exist. ``profile`` is the cosine
    of each pair per layer, ``adapter_profile`` the norm of each delta per layer. ``summary`` holds
    lists (``SUMMARY_LISTS``) of ``{"a": name, "b": name, "cosine": value, ...}``; those of
    "most_harmed", which is there only if it was measured, have ``"damage"``: of b to a.
    """

    zoo: str
    base_model: str | None
    version: str
    command: str
    adapters: Mapping[str, Sequence[Any]]
    pairs: Mapping[str, np.ndarray]
    features: Sequence[FeatureInfo]
    layers: Sequence[str] = ()
    profile: np.ndarray | None = None
    adapter_profile: np.ndarray | None = None
    summary: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        n, m = self.n_adapters, self.n_pairs
        for name, column in self.adapters.items():
            if len(column) != n:
                raise ValueError(f"adapters[{name!r}]: got {len(column)} values, expected {n}")
        for name in ("a", "b", *(f.name for f in self.features)):
            if name not in self.pairs:
                raise ValueError(f"pairs: got no column {name!r}, expected one")
            if np.shape(self.pairs[name]) != (m,):
                raise ValueError(
                    f"pairs[{name!r}]: got shape {np.shape(self.pairs[name])}, expected ({m},)"
                )
        a, b = np.asarray(self.pairs["a"]), np.asarray(self.pairs["b"])
        if m and not (a.min() >= 0 and b.max() < n and (a < b).all()):
            raise ValueError(f"pairs: got indices outside 0 <= a < b < {n}")
        names = {f.name for f in self.features}
        for f in self.features:
            if f.directed_twin is not None and f.directed_twin not in names:
                raise ValueError(
                    f"features: directed_twin of {f.name!r}: got {f.directed_twin!r}, "
                    "expected the name of a feature"
                )
        for name, rows in (("profile", m), ("adapter_profile", n)):
            value = getattr(self, name)
            if value is not None and np.shape(value) != (rows, len(self.layers)):
                raise ValueError(
                    f"{name}: got shape {np.shape(value)}, expected ({rows}, {len(self.layers)})"
                )

    @property
    def n_adapters(self) -> int:
        return len(self.adapters["name"])

    @property
    def n_pairs(self) -> int:
        return len(self.pairs["a"])

    def strongest(self, count: int) -> np.ndarray:
        """Indices of the ``count`` pairs that differ most from chance, strongest first."""
        names = [f.name for f in self.features]
        key = next((n for n in ("cosine_z", "cosine") if n in names), names[0] if names else None)
        if key is None:
            return np.arange(min(count, self.n_pairs))
        size = np.abs(np.asarray(self.pairs[key], dtype=np.float64))
        return np.argsort(-np.nan_to_num(size, nan=-1.0, posinf=np.inf), kind="stable")[:count]

    def similarity(self, feature: str = "cosine") -> np.ndarray:
        """``feature`` as a symmetric N x N matrix; NaN where there is no pair."""
        out = np.full((self.n_adapters, self.n_adapters), np.nan)
        np.fill_diagonal(out, 1.0)
        if feature in self.pairs:
            a, b = self.pairs["a"], self.pairs["b"]
            out[a, b] = out[b, a] = self.pairs[feature]
        return out
