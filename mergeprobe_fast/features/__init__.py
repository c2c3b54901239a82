"""Statistics of adapters and pairs: one declaration each. See :mod:`.declare` for what that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import (
    disturbance,
    drift,
    gradients,
    points,
    probes,
    subspace,
    weights,
)
from mergeprobe_fast.features.declare import (
    AdapterColumn,
    Family,
    Feature,
    Need,
    PairColumn,
    Sums,
)
from mergeprobe_fast.features.spectrum import SPECTRUM, AdapterFeature
from mergeprobe_fast.recorded import NOTHING, Recorded

ON_TILES: tuple[Feature, ...] = (
    *weights.FEATURES, *subspace.FEATURES, *disturbance.FEATURES,
)  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    drift.FAMILY, drift.OUTPUT_FAMILY, gradients.FAMILY, gradients.FISHER_FAMILY, points.FAMILY,
    probes.FAMILY,
)  # fmt: skip
PAIR_FEATURES: dict[str, Feature | PairColumn] = {
    f.name: f for f in (*ON_TILES, *(c for family in FAMILIES for c in family.pairs))
}
# What a report calls the features that belong together.
GROUPS: dict[str, str] = {
    f.name: title
    for title, declared in (
        ("Weights", weights.FEATURES),
        ("Subspaces", subspace.FEATURES),
        ("Disturbance of activations", disturbance.FEATURES),
        *((family.title, family.pairs) for family in FAMILIES),
    )
    for f in declared
}
ADAPTER_FEATURES: dict[str, AdapterFeature] = {f.name: f for f in SPECTRUM}

__all__ = [
    "ADAPTER_FEATURES",
    "FAMILIES",
    "GROUPS",
    "PAIR_FEATURES",
    "AdapterColumn",
    "AdapterFeature",
    "Family",
    "Feature",
    "Need",
    "PairColumn",
    "Selection",
    "Sums",
    "select",
]


@dataclass(frozen=True)
class Selection:
    """What is to be computed: features on tiles, and the columns of families."""

    features: list[Feature]
    families: list[Family]
    columns: list[PairColumn]

    def __iter__(self) -> Iterator[Feature | PairColumn]:
        """Every declaration, in the order of the columns of the table."""
        yield from self.features
        yield from self.columns


def select(
    features: str | Sequence[str | Feature | PairColumn], recorded: Recorded = NOTHING
) -> Selection:
    """Declarations for "default", "all", or a list of names and of a caller's own declarations.

    "all" takes everything that can be computed from what was recorded, "default" all but what
    costs much and says little. A directed feature brings its twin along. InputError for a name
    that does not exist (the message lists those that do), or that needs what is missing.
    """
    if features in ("default", "all"):
        families = [f for f in FAMILIES if f.missing(recorded) is None]
        return Selection(
            [
                f for f in ON_TILES
                if f.missing(recorded) is None and (f.by_default or features == "all")
            ],
            families,
            [c for f in families for c in f.pairs],
        )  # fmt: skip
    if isinstance(features, str):
        features = [features]
    chosen: list[Feature | PairColumn] = []
    for f in features:
        if isinstance(f, str) and f not in PAIR_FEATURES:
            known = ", ".join(PAIR_FEATURES)
            raise InputError(f"no feature {f!r}; there are: {known}", key="features")
        if not isinstance(f, (str, Feature, PairColumn)):
            raise InputError(f"expected names or declarations, got {f!r}", key="features")
        chosen.append(PAIR_FEATURES[f] if isinstance(f, str) else f)
    if len({f.name for f in chosen}) != len(chosen):
        raise InputError("a feature is named twice", key="features")
    # One side of a directed feature is of little use alone: a matrix has both.
    have = {f.name for f in chosen}
    for f in list(chosen):
        if f.directed_twin is not None and f.directed_twin not in have:
            twin = PAIR_FEATURES.get(f.directed_twin)
            if twin is not None:
                chosen.insert(chosen.index(f) + 1, twin)
                have.add(twin.name)
    columns = [f for f in chosen if isinstance(f, PairColumn)]
    families = [f for f in FAMILIES if any(c in f.pairs for c in columns)]
    on_tiles = [f for f in chosen if isinstance(f, Feature)]
    for owner, names in [
        *((f, [f.name]) for f in on_tiles),
        *((f, [c.name for c in columns if c in f.pairs]) for f in families),
    ]:
        missing = owner.missing(recorded)
        if missing is not None:
            raise InputError(f"{names[0]} needs {missing}", key="features")
    for c in columns:
        if not any(c in f.pairs for f in families):
            raise InputError(f"{c.name} is a column of no family", key="features")
    return Selection(on_tiles, families, columns)
