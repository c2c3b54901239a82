"""What a feature is: a declaration of what it needs and how it finishes. The engine runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from mergeprobe_fast.recorded import Recorded
    from mergeprobe_fast.zoo import Zoo

Product = Literal["uv", "uu", "vv"]
Weight = Literal["one", "sigma", "energy"]  # 1, sigma_a, sigma_a^2


@dataclass(frozen=True)
class Need:
    """A sum over the tiles of one pass: ``sum_{a in i, b in j} w_a X[a,b] w'_b``.

    ``X`` is M*N ("uv"), M*M ("uu") or N*N ("vv"), with M = U_i^T U_j the cosines of the left
    (output) and N = V_i^T V_j those of the right (input) singular vectors. Needs add up over
    modules, so one ``finish`` serves a module and the concatenated deltas alike.
    """

    product: Product
    row: Weight
    column: Weight


DOT = Need("uv", "sigma", "sigma")  # <W_i, W_j>
ROW_OVERLAP = Need("vv", "one", "one")  # ||V_i^T V_j||_F^2
COL_OVERLAP = Need("uu", "one", "one")
ROW_RV = Need("vv", "energy", "energy")  # ||W_i W_j^T||_F^2
COL_RV = Need("uu", "energy", "energy")
ROW_CAPTURE = Need("vv", "energy", "one")  # ||W_i V_j V_j^T||_F^2
COL_CAPTURE = Need("uu", "energy", "one")


@dataclass
class Sums:
    """What ``finish`` reads, as arrays over pairs (a, b), for one module or summed over modules.

    ``need[n]`` is the sum for (a, b) and ``mirrored[n]`` for (b, a). ``energy`` is ||W||_F^2,
    ``energy2`` the sum of sigma^4, ``rank`` the numerical rank; ``shared_energy_*`` the energy in
    modules that both adapt, ``null_variance`` the variance of <W_a, W_b> if the deltas pointed in
    independent random directions.
    """

    need: dict[Need, np.ndarray]
    mirrored: dict[Need, np.ndarray]
    energy_a: np.ndarray
    energy_b: np.ndarray
    energy2_a: np.ndarray
    energy2_b: np.ndarray
    rank_a: np.ndarray
    rank_b: np.ndarray
    shared_energy_a: np.ndarray
    shared_energy_b: np.ndarray
    null_variance: np.ndarray


@dataclass(frozen=True)
class Feature:
    """A number per pair of adapters; one column, and its aggregates over modules.

    ``finish`` gets :class:`Sums` and returns one float64 per pair, NaN where undefined.
    ``per_module=False`` features exist only for the concatenated deltas.
    """

    name: str
    title: str
    definition: str
    finish: Callable[[Sums], np.ndarray]
    needs: tuple[Need, ...] = ()
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_text: str = ""
    per_module: bool = True
    directed_twin: str | None = None
    source: str = ""
    bounded: tuple[float, float] | None = field(default=None)  # clipped to it, clips counted
    # What has to be recorded and is not, in one phrase; None: it can be computed.
    missing: Callable[[Recorded], str | None] = lambda recorded: None


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where the bottom is zero or undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


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


@dataclass(frozen=True)
class Family:
    """Columns that share what they are made from.

    ``missing(recorded)`` says in one phrase what is not there ("a calibration with gradients"), or
    None when the family can be computed. ``compute(zoo, recorded, threads)`` is called once.
    """

    name: str
    missing: Callable[[Recorded], str | None]
    compute: Callable[[Zoo, Recorded, int], Any]
    pairs: tuple[PairColumn, ...] = ()
    adapters: tuple[AdapterColumn, ...] = ()
    title: str = ""  # what a report calls its columns together
