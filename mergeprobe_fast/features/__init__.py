"""Statistics of adapters and pairs: one declaration each. See :mod:`.declare` for what that is."""

from __future__ import annotations

from collections.abc import Sequence

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import subspace, weights
from mergeprobe_fast.features.declare import Feature, Need, Sums
from mergeprobe_fast.features.spectrum import SPECTRUM, AdapterFeature

PAIR_FEATURES: dict[str, Feature] = {f.name: f for f in (*weights.FEATURES, *subspace.FEATURES)}
ADAPTER_FEATURES: dict[str, AdapterFeature] = {f.name: f for f in SPECTRUM}

__all__ = [
    "ADAPTER_FEATURES",
    "PAIR_FEATURES",
    "AdapterFeature",
    "Feature",
    "Need",
    "Sums",
    "select",
]


def select(features: str | Sequence[str | Feature]) -> list[Feature]:
    """Declarations for "default", "all", or a list of names and of a caller's own declarations.

    InputError for a name that does not exist; the message lists those that do.
    """
    if features in ("default", "all"):
        return list(PAIR_FEATURES.values())
    if isinstance(features, str):
        features = [features]
    chosen = []
    for f in features:
        if isinstance(f, str) and f not in PAIR_FEATURES:
            known = ", ".join(PAIR_FEATURES)
            raise InputError(f"no feature {f!r}; there are: {known}", key="features")
        chosen.append(PAIR_FEATURES[f] if isinstance(f, str) else f)
    if len({f.name for f in chosen}) != len(chosen):
        raise InputError("a feature is named twice", key="features")
    return chosen
