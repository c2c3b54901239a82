"""What a feature is: a declaration of what it is made from and how it finishes.

Features on the tiles of a pass are declared in the engine's words, which stand here too; columns
of a family come from tables over adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergeprobe_fast.engine.declare import (
    CHANNELS,
    COL_CAPTURE,
    COL_OVERLAP,
    COL_RV,
    DOT,
    FISHER,
    IN_CHANNELS,
    KFAC,
    MEAN_OUTPUT,
    OUT_CHANNELS,
    OUTPUT,
    OUTPUT_HSIC,
    OUTPUT_RELATIVE,
    ROW_CAPTURE,
    ROW_OVERLAP,
    ROW_RV,
    Feature,
    Need,
    OnDomain,
    Sums,
    ratio,
)

if TYPE_CHECKING:
    from mergeprobe_fast.recorded import Recorded
    from mergeprobe_fast.zoo import Zoo

__all__ = [
    "CHANNELS",
    "COL_CAPTURE",
    "COL_OVERLAP",
    "COL_RV",
    "DOT",
    "FISHER",
    "IN_CHANNELS",
    "KFAC",
    "MEAN_OUTPUT",
    "OUTPUT",
    "OUTPUT_HSIC",
    "OUTPUT_RELATIVE",
    "OUT_CHANNELS",
    "ROW_CAPTURE",
    "ROW_OVERLAP",
    "ROW_RV",
    "AdapterColumn",
    "Family",
    "Feature",
    "Need",
    "OnDomain",
    "PairColumn",
    "Spectra",
    "Sums",
    "ratio",
]


@dataclass(frozen=True, eq=False)
class Spectra:
    """What the pass over the tiles found of every delta, rows as in ``zoo.table.entries``.

    ``sigma``: (entries, widest) singular values, descending, zero padded and zero for a delta that
    counts as zero; ``rank``: their numerical ranks.
    """

    zoo: Zoo
    recorded: Recorded
    sigma: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class PairColumn:
    """A number per pair that comes from tables over adapters, not from tiles.

    ``finish(data, a, b)`` gets what the family's ``compute`` returned and the adapter indices of
    each pair, and returns one float64 per pair, NaN where undefined.
    """

    name: str
    title: str
    definition: str
    finish: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_text: str = ""
    directed_twin: str | None = None
    source: str = ""
    bounded: tuple[float, float] | None = None
    per_module: ClassVar[bool] = False


@dataclass(frozen=True)
class AdapterColumn:
    """A number per adapter, from what the family's ``compute`` returned."""

    name: str
    title: str
    definition: str
    finish: Callable[[Any], np.ndarray]
    source: str = ""
    low: float | None = None
    high: float | None = None
    null_text: str = ""


@dataclass(frozen=True)
class Family:
    """Columns that share what they are made from.

    ``missing(recorded)`` says in one phrase what is not there ("a calibration with gradients"), or
    None when the family can be computed. ``compute(zoo, recorded, threads)`` is called once. A
    family that needs singular values alone has ``from_spectra`` instead, which gets
    :class:`Spectra` and goes over no factors.

    ``made_from``: what its columns follow from beside the zoo, what was recorded, and the version
    of the package: its parameters and, where the code is not the package's, a version of that. A
    family that says so can be kept (``keep`` of ``pair_features``) and is not computed again while
    none of it changes; None: never kept.
    """

    name: str
    missing: Callable[[Recorded], str | None]
    compute: Callable[[Zoo, Recorded, int], Any] | None = None
    pairs: tuple[PairColumn, ...] = ()
    adapters: tuple[AdapterColumn, ...] = ()
    title: str = ""  # what a report calls its columns together
    by_default: bool = True  # else only where "all" is asked for
    work: Callable[[Zoo], float] | None = None  # multiply-adds, where they are worth a word
    from_spectra: Callable[[Spectra], Any] | None = None
    cost: str = ""  # of a pair and module, in words or as a formula
    pace: float = 1.0  # time of one of its multiply-adds over one of the block Gram's, measured
    made_from: str | None = None
