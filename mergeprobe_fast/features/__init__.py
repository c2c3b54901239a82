"""Statistics of adapters and pairs: one declaration each. See :mod:`.declare` for what that is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import (
    angles,
    base,
    disturbance,
    drift,
    entries,
    gradients,
    points,
    probes,
    profiles,
    subspace,
    weights,
)
from mergeprobe_fast.features.crosswalk import CROSSWALK, NOT_OFFERED, Crossing
from mergeprobe_fast.features.declare import (
    AdapterColumn,
    Family,
    Feature,
    Need,
    PairColumn,
    Spectra,
    Sums,
)
from mergeprobe_fast.features.spectrum import SPECTRUM, AdapterFeature
from mergeprobe_fast.recorded import NOTHING, Recorded

ON_TILES: tuple[Feature, ...] = (
    *weights.FEATURES, *subspace.FEATURES, *disturbance.FEATURES,
)  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    drift.FAMILY, drift.OUTPUT_FAMILY, gradients.FAMILY, gradients.FISHER_FAMILY, points.FAMILY,
    probes.FAMILY, base.FAMILY, *profiles.FAMILIES, angles.FAMILY, entries.FAMILY,
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
    "CROSSWALK",
    "FAMILIES",
    "GROUPS",
    "NOT_OFFERED",
    "PAIR_FEATURES",
    "AdapterColumn",
    "AdapterFeature",
    "Crossing",
    "Family",
    "Feature",
    "Need",
    "PairColumn",
    "Request",
    "Selection",
    "Spectra",
    "Sums",
    "select",
    "select_of_adapters",
]

# What may be asked for: names, groups of names, and a caller's own declarations.
Request = str | Feature | PairColumn | Family


@dataclass(frozen=True)
class Selection:
    """What is to be computed: features on tiles, the columns of families, those of adapters.

    ``family_columns``: the names of the families' columns of adapters; None: all.
    """

    features: list[Feature]
    families: list[Family]
    columns: list[PairColumn]
    adapters: list[AdapterFeature]
    family_columns: frozenset[str] | None = None

    def __iter__(self) -> Iterator[Feature | PairColumn]:
        """Every declaration for pairs, in the order of the columns of the table."""
        yield from self.features
        yield from self.columns

    def takes(self, column: AdapterColumn) -> bool:
        """Whether a family's column of adapters was asked for."""
        return self.family_columns is None or column.name in self.family_columns


def select(features: Request | Sequence[Request], recorded: Recorded = NOTHING) -> Selection:
    """Declarations for names, groups of names, and a caller's own declarations.

    "all" takes everything that can be computed from what was recorded, "default" all but what
    costs much and says little, "2601.22285" and "gradience" what those have, under their names
    (``CROSSWALK``). A directed feature brings its twin along; a :class:`Family` stands for all its
    columns, and in groups takes the place of ours of the same name.

    Raises:
        InputError: a name that does not exist (the message lists those that do), or that needs
            what is missing; two families of one name that are computed in different ways.
    """
    if isinstance(features, Request):
        features = [features]
    named: list[Feature | PairColumn] = []
    groups: list[str] = []
    own: list[Family] = []
    for f in features:
        if isinstance(f, str) and (f in ("default", "all") or f in CROSSWALK):
            groups.append(f)
        elif isinstance(f, str):
            if f not in PAIR_FEATURES:
                raise InputError(
                    f"no feature {f!r}; there are: {', '.join(PAIR_FEATURES)}", key="features"
                )
            named.append(PAIR_FEATURES[f])
        elif isinstance(f, Family):
            own.append(f)
            named.extend(f.pairs)
        elif isinstance(f, (Feature, PairColumn)):
            named.append(f)
        else:
            raise InputError(f"expected names or declarations, got {f!r}", key="features")
    if len({f.name for f in named}) != len(named):
        raise InputError("a feature is named twice", key="features")
    _bring_twins(named)
    _bring_aggregates(named)
    available = [*own, *FAMILIES, *_crosswalk_families()]
    _refuse_missing(named, available, recorded)

    chosen = {f.name: f for f in named}
    families = [f for f in available if f in own or any(c in f.pairs for c in named)]
    for group in groups:
        declared, more = _of_group(group, recorded, {f.name for f in own})
        for f in declared:
            if chosen.setdefault(f.name, f) is not f:
                raise InputError(f"two features are called {f.name!r}", key="features")
        families += [f for f in more if f not in families]
    _refuse_namesakes(families)
    everything = "all" in groups
    return Selection(
        [f for f in chosen.values() if isinstance(f, Feature)],
        families,
        [f for f in chosen.values() if isinstance(f, PairColumn)],
        [f for f in SPECTRUM if f.by_default or everything],
    )


def select_of_adapters(names: str | Sequence[str], recorded: Recorded = NOTHING) -> Selection:
    """The same for adapters alone: "default", "all", or names of statistics of adapters."""
    if isinstance(names, str):
        names = [names]
    named = [n for n in names if n not in ("default", "all")]
    group = "all" if "all" in names else "default" if "default" in names else None
    families = [] if group is None else _of_group(group, recorded)[1]
    owner = {c.name: f for f in FAMILIES for c in f.adapters}
    for name in named:
        if name in owner:
            missing = owner[name].missing(recorded)
            if missing is not None:
                raise InputError(f"{name} needs {missing}", key="features")
        elif name not in ADAPTER_FEATURES:
            known = ", ".join([*ADAPTER_FEATURES, *owner])
            raise InputError(f"no feature {name!r}; there are: {known}", key="features")
    taken = {c.name for f in families for c in f.adapters}
    taken |= {c for c in owner if c in named or c.partition(".")[0] in named}
    return Selection(
        [],
        [f for f in FAMILIES if f in families or any(c.name in named for c in f.adapters)],
        [],
        [f for f in SPECTRUM if f.name in named or group == "all" or (group and f.by_default)],
        frozenset(taken),
    )


def _of_group(
    group: str, recorded: Recorded, replaced: Collection[str] = ()
) -> tuple[list[Feature | PairColumn], list[Family]]:
    """What a group stands for, as far as it can be computed, without families of these names."""
    if group in CROSSWALK:
        offered = [c for c in CROSSWALK[group].values() if c.declared is not None]
        there = [c for c in offered if (c.family or c.declared).missing(recorded) is None]
        families = [f for f in _crosswalk_families() if any(c.family is f for c in there)]
        return [c.declared for c in there], families
    families = [
        f for f in FAMILIES
        if f.missing(recorded) is None and (f.by_default or group == "all")
        and f.name not in replaced
    ]  # fmt: skip
    on_tiles = [
        f for f in ON_TILES
        if f.missing(recorded) is None and (f.by_default or group == "all")
    ]  # fmt: skip
    return [*on_tiles, *(c for f in families for c in f.pairs)], families


def _refuse_namesakes(families: Sequence[Family]) -> None:
    """Families of one name are parts of one, and are computed once."""
    first: dict[str, Family] = {}
    for f in families:
        other = first.setdefault(f.name, f)
        if (f.compute, f.from_spectra) != (other.compute, other.from_spectra):
            raise InputError(f"two families are called {f.name!r}", key="features")


def _crosswalk_families() -> list[Family]:
    found: list[Family] = []
    for crossings in CROSSWALK.values():
        for c in crossings.values():
            if c.family is not None and not any(c.family is f for f in found):
                found.append(c.family)
    return found


def _bring_twins(chosen: list[Feature | PairColumn]) -> None:
    """One side of a directed feature is of little use alone: a matrix has both."""
    have = {f.name for f in chosen}
    for f in list(chosen):
        if f.directed_twin is not None and f.directed_twin not in have:
            twin = PAIR_FEATURES.get(f.directed_twin)
            if twin is not None:
                chosen.insert(chosen.index(f) + 1, twin)
                have.add(twin.name)


def _bring_aggregates(chosen: list[Feature | PairColumn]) -> None:
    """Columns of a family over modules come with the column that they aggregate."""
    have = {f.name for f in chosen}
    for f in list(chosen):
        if isinstance(f, PairColumn) and PAIR_FEATURES.get(f.name) is f:
            for name, other in PAIR_FEATURES.items():
                if name.startswith(f"{f.name}.") and name not in have:
                    chosen.insert(chosen.index(f) + 1, other)


def _refuse_missing(
    chosen: Sequence[Feature | PairColumn], families: Sequence[Family], recorded: Recorded
) -> None:
    columns = [f for f in chosen if isinstance(f, PairColumn)]
    used = [f for f in families if any(c in f.pairs for c in columns)]
    for owner, names in [
        *((f, [f.name]) for f in chosen if isinstance(f, Feature)),
        *((f, [c.name for c in columns if c in f.pairs]) for f in used),
    ]:
        missing = owner.missing(recorded)
        if missing is not None:
            raise InputError(f"{names[0]} needs {missing}", key="features")
    for c in columns:
        if not any(c in f.pairs for f in used):
            raise InputError(f"{c.name} is a column of no family", key="features")
