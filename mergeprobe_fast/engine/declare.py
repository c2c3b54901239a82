"""What a feature on tiles is: a declaration of what it needs of a pass, and how it finishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mergeprobe_fast.recorded import Recorded

Product = Literal["uv", "uu", "vv", "hsic", "out", "in"]
Weight = Literal["one", "sigma", "energy"]  # 1, sigma_a, sigma_a^2
View = Literal["weights", "inputs", "mean_input", "kfac", "fisher"]


@dataclass(frozen=True)
class Need:
    """A sum over the tiles of one pass: ``sum_{a in i, b in j} w_a X[a,b] w'_b``.

    ``X`` is M*N ("uv"), M*M ("uu") or N*N ("vv"), with M = U_i^T U_j the cosines of the left
    (output) and N = V_i^T V_j those of the right (input) singular vectors. Needs add up over
    modules, so one ``finish`` serves a module and the concatenated deltas alike.

    ``view`` puts a metric between the vectors, one for each domain of the calibration, with samples
    X (T, d_in) and output gradients Y (T, d_out) of the base model's module:

    - "weights": none;
    - "inputs": N = V_i^T C V_j, C = X^T X / T: (uv, sigma, sigma) is the mean of W_i x . W_j x;
    - "mean_input": the same with C = m m^T, m the mean of the samples;
    - "kfac": that of "inputs", and M = U_i^T K U_j, K = Y^T Y / T;
    - "fisher": M = U_i^T diag(u) U_j, N = V_i^T diag(v) V_j, u and v the means of y^2 and x^2.

    "out" and "in" are products of channel energies, ``sum_o p_i[o] p_j[o]`` over output or input
    channels, with p_i the squared norms of the rows (columns) of W_i; both weights are "energy".

    "hsic" is the unbiased HSIC (Song et al., JMLR 2012) of the outputs X W_i^T and X W_j^T, from
    N*N on centred inputs. ``relative`` divides each module's sum by the mean of the squared norm of
    the base module's output, to first order in the output energies: for "uv" alone.
    """

    product: Product
    row: Weight
    column: Weight
    view: View = "weights"
    relative: bool = False


DOT = Need("uv", "sigma", "sigma")  # <W_i, W_j>
ROW_OVERLAP = Need("vv", "one", "one")  # ||V_i^T V_j||_F^2
COL_OVERLAP = Need("uu", "one", "one")
ROW_RV = Need("vv", "energy", "energy")  # ||W_i W_j^T||_F^2
COL_RV = Need("uu", "energy", "energy")
ROW_CAPTURE = Need("vv", "energy", "one")  # ||W_i V_j V_j^T||_F^2
COL_CAPTURE = Need("uu", "energy", "one")
OUT_CHANNELS = Need("out", "energy", "energy")  # sum_o ||row o of W_i||^2 ||row o of W_j||^2
IN_CHANNELS = Need("in", "energy", "energy")
OUTPUT = Need("uv", "sigma", "sigma", "inputs")  # mean of W_i x . W_j x
OUTPUT_RELATIVE = Need("uv", "sigma", "sigma", "inputs", True)  # over the mean of |W_0 x|^2
OUTPUT_HSIC = Need("hsic", "energy", "energy", "inputs")
MEAN_OUTPUT = Need("uv", "sigma", "sigma", "mean_input")  # W_i m . W_j m
KFAC = Need("uv", "sigma", "sigma", "kfac")  # tr(W_i^T K W_j C)
FISHER = Need("uv", "sigma", "sigma", "fisher")  # sum over entries of u_o v_d w_i w_j


class OnDomain(NamedTuple):
    """A sum on the domain of one adapter of each pair, the owner; arrays over pairs."""

    dot: np.ndarray  # of the two adapters
    own: np.ndarray  # of the owner with itself
    other: np.ndarray  # of the other adapter with itself


@dataclass
class Sums:
    """What ``finish`` reads, as arrays over pairs (a, b), for one module or summed over modules.

    ``need[n]`` is the sum for (a, b) and ``mirrored[n]`` for (b, a). ``energy`` is ||W||_F^2,
    ``energy2`` the sum of sigma^4, ``rank`` the numerical rank; ``shared_energy_*`` the energy in
    modules that both adapt, ``null_variance`` the variance of <W_a, W_b> if the deltas pointed in
    independent random directions; ``modules`` counts the modules an adapter has. ``on_a`` and
    ``on_b`` give the sums of needs with a view, on the domains of a and of b. ``own[n]`` (2, pairs)
    is the sum of a channel product for (a, a) and (b, b).
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
    modules_a: np.ndarray
    modules_b: np.ndarray
    domain: dict[Need, np.ndarray]  # (6, pairs): dot, own, other on a's domain, then on b's
    own: dict[Need, np.ndarray] = field(default_factory=dict)

    def on_a(self, need: Need) -> OnDomain:
        """The sums on a's domain: a owns it."""
        return OnDomain(*self.domain[need][:3])

    def on_b(self, need: Need) -> OnDomain:
        """The sums on b's domain: b owns it."""
        return OnDomain(*self.domain[need][3:])


@dataclass(frozen=True)
class Feature:
    """A number per pair of adapters; one column, and its aggregates over modules.

    ``finish`` gets :class:`Sums` and returns one float64 per pair, NaN where undefined. On a device
    its arrays lie there, and numpy's functions that treat each pair by itself (arithmetic, where,
    maximum, clip, ...) run there; a ``finish`` that does anything else, looks at other pairs or
    returns no such array, gets numpy's arrays and runs on the CPU, with the same result.
    ``per_module=False`` features exist only for the concatenated deltas. ``over_modules`` gives
    the weight of each module, from its sums: the feature then *is* the mean over modules with these
    weights, undefined modules left out, and has no other aggregates.
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
    by_default: bool = True  # else among "all" only, and by name: it costs much and says little
    over_modules: Callable[[Sums], np.ndarray] | None = None
    # Of one that is not the package's, a version of its code: while that is the same, blocks of
    # pairs with it may be kept (``keep`` of ``pair_features``). None: they are not.
    made_from: str | None = None


CHANNELS = ("out", "in")  # the products of channel energies


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where the bottom is zero or undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)
