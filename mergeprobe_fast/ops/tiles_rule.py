"""What an elementwise merge does to each entry, and the deltas that it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops._tables import SEGMENT, TILE_ADAPTER, TILE_RULE
from mergeprobe_fast.ops.canonical import _check, matrix_record

KEEP = ("all", "magnitude", "random", "della")
COMBINE = ("sum", "ties", "fisher")
ELECT = ("total", "frequency")
DIVIDE = ("none", "count", "weights")
PerAdapter = float | Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class Deltas:
    """The deltas of one module: ``delta_i = scale_i * B_i A_i``, d_out x d_in, by reference.

    ``segments`` are SEGMENT records (u = B transposed, v = A; float32, bfloat16, float16 or
    float64 anywhere in memory); whoever made them keeps that memory alive, or hands it over in
    ``owner``. Entries are float32: the factors are rounded to float32, their product is summed
    over the rank in order, and the scale, rounded to float32, is multiplied in last.

    ``there``: the same on a CUDA device (``kernels.Device.deltas``): then everything runs there.
    """

    segments: np.ndarray
    d_out: int
    d_in: int
    owner: Any = field(default=None, repr=False)
    there: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        s = self.segments
        if not isinstance(s, np.ndarray) or s.dtype != SEGMENT or s.ndim != 1:
            raise InputError("expected one axis of SEGMENT records", key="segments")
        for name in ("d_out", "d_in"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"must be a positive integer, got {value!r}", key=name)
        if (s["rank"] < 0).any():
            raise InputError("negative rank", key="segments")

    @classmethod
    def of(cls, factors: list[tuple[Any, Any, float]]) -> Deltas:
        """From (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, numpy or CPU torch.

        Raises:
            InputError: shapes that do not chain or agree, a scale that is not finite.
        """
        checked = _check(factors)
        segments = np.zeros(len(checked), SEGMENT)
        for record, (b, a, scale) in zip(segments, checked, strict=True):
            record["u"], record["v"] = matrix_record(b.T), matrix_record(a)
            record["rank"], record["scale"] = a.shape[0], scale
        return cls(segments, checked[0][0].shape[0], checked[0][1].shape[1], checked)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> Deltas:
        """One adapter's delta."""
        index = range(len(self))[index]
        there = None if self.there is None else self.there[index]
        return Deltas(self.segments[index : index + 1], self.d_out, self.d_in, self.owner, there)

    @property
    def size(self) -> int:
        """Entries of one delta."""
        return int(self.d_out) * int(self.d_in)


@dataclass(frozen=True, eq=False)
class ElementwiseRule:
    """How the entries x_i of N deltas at one position become one entry of the merged delta.

    First ``keep`` decides, adapter by adapter, which entries survive, and the survivors are
    multiplied by ``rescale``; the others are 0. What is "per adapter" is one number or N of them.

    * "all".
    * "magnitude": ``low <= |x| <= high``, thresholds per adapter (:func:`order_statistics`).
      TIES and magnitude pruning have high = inf, breadcrumbs (Davari and Belilovsky 2023) both.
    * "random": with probability ``density``, independently (DARE, Yu et al. 2023).
    * "della": with probability ``(density - epsilon) + 2 epsilon rank``, where rank runs from 0 to
      1 over the entries of a row in ascending magnitude, equal ones by position (DELLA, Deep et
      al. 2024, as mergekit's magprune). A row of one entry has rank 1/2.

    Chance is a function of (``seed``, the adapter's entry of ``streams``, position), whatever the
    order of computation: see :func:`mergeprobe_fast.ops.tiles_reference.counter_hash`.

    Then ``combine``, with the weights w_i of the call:

    * "sum": ``sum_i w_i x_i``; ``divide="weights"`` divides by ``sum_i w_i``.
    * "ties" (Yadav et al. 2023): the elected sign is that of the sum of e_i ("total"), or of their
      signs ("frequency"), where e_i = x_i (PEFT), or w_i x_i with ``elect_weighted`` (mergekit). A
      sum of 0 elects ``zero_sign``: 1 (PEFT and mergekit), -1, or 0 for no sign. The result is
      ``sum w_i x_i`` over the non-zero e_i of that sign, divided by nothing, by their ``count`` (at
      least 1; PEFT), or by the sum of their ``weights`` (mergekit's ``normalize``).
    * "fisher" (Matena and Raffel 2022): ``sum w_i F_i x_i / sum w_i F_i``, 0 where the divisor is
      0; F_i is the entry of a second product, plus ``floor``.

    A divisor made of weights that is below 1e-8 in magnitude counts as 1, as in mergekit.
    """

    keep: Literal["all", "magnitude", "random", "della"] = "all"
    combine: Literal["sum", "ties", "fisher"] = "sum"
    low: PerAdapter = 0.0
    high: PerAdapter = np.inf
    density: PerAdapter = 1.0
    epsilon: float = 0.0
    seed: int = 0
    streams: Sequence[int] | None = None
    rescale: PerAdapter = 1.0
    elect: Literal["total", "frequency"] = "total"
    elect_weighted: bool = False
    zero_sign: Literal[-1, 0, 1] = 1
    divide: Literal["none", "count", "weights"] = "none"
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("keep", KEEP), ("combine", COMBINE), ("elect", ELECT), ("divide", DIVIDE),
            ("zero_sign", (-1, 0, 1)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                *most, last = map(repr, known)
                raise InputError(
                    f"expected {', '.join(most)} or {last}, got {getattr(self, name)!r}", key=name
                )
        allowed = {"sum": ("none", "weights"), "ties": DIVIDE, "fisher": ("none",)}[self.combine]
        if self.divide not in allowed:
            raise InputError(f"{self.combine!r} cannot divide by {self.divide!r}", key="divide")
        if not isinstance(self.seed, (int, np.integer)) or not 0 <= self.seed < 2**64:
            raise InputError(f"must be an integer in [0, 2^64), got {self.seed!r}", key="seed")
        for name in ("epsilon", "floor"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                raise InputError(f"must be finite and not negative, got {value!r}", key=name)
        if self.keep in ("random", "della") and self.streams is None:
            raise InputError("one per adapter is needed where chance decides", key="streams")

    @property
    def needs_rows(self) -> bool:
        """Whether an entry's fate depends on the rest of its row."""
        return self.keep == "della"

    def adapters(self, n: int, weights: Any = None) -> np.ndarray:
        """TILE_ADAPTER records for n adapters; every argument per adapter is checked here."""
        out = np.zeros(n, TILE_ADAPTER)
        with np.errstate(over="ignore"):
            if weights is not None:
                out["weight"] = per_adapter(weights, n, "weights", scalar=False)
            for name in ("low", "high", "density", "rescale"):
                unbounded = name in ("low", "high")
                out[name] = per_adapter(getattr(self, name), n, name, infinite=unbounded)
        for name in ("weight", "rescale"):
            if not np.isfinite(out[name]).all():
                raise InputError("does not fit float32", key=name.replace("weight", "weights"))
        if ((out["density"] < 0) | (out["density"] > 1)).any():
            raise InputError("must lie in [0, 1]", key="density")
        if self.keep == "della" and (
            (out["density"] - self.epsilon < 0) | (out["density"] + self.epsilon > 1)
        ).any():
            raise InputError("density -+ epsilon must lie in [0, 1]", key="epsilon")
        if self.streams is not None:
            streams = [int(s) for s in self.streams]
            if len(streams) != n:
                raise InputError(f"expected {n} values, got {len(streams)}", key="streams")
            if any(not 0 <= s < 2**64 for s in streams):
                raise InputError("must be integers in [0, 2^64)", key="streams")
            out["stream"] = np.array(streams, np.uint64)
        return out

    def record(self) -> np.ndarray:
        """One TILE_RULE record."""
        out = np.zeros(1, TILE_RULE)
        out["keep"], out["combine"] = KEEP.index(self.keep), COMBINE.index(self.combine)
        out["elect"], out["divide"] = ELECT.index(self.elect), DIVIDE.index(self.divide)
        out["elect_weighted"], out["zero_sign"] = bool(self.elect_weighted), self.zero_sign
        out["floor"], out["epsilon"], out["seed"] = self.floor, self.epsilon, self.seed
        return out


def stream(*names: str) -> int:
    """A 64-bit stream for ``ElementwiseRule.streams``, from names such as (module, adapter)."""
    text = "\0".join(names).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def per_adapter(
    value: Any, n: int, name: str, *, scalar: bool = True, infinite: bool = False
) -> np.ndarray:
    """n float64 numbers, from n or, where ``scalar``, from one."""
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"expected numbers, got {value!r}", key=name) from None
    if values.shape != (n,) and not (scalar and values.ndim == 0):
        raise InputError(f"expected {n} values, got shape {values.shape}", key=name)
    bad = np.isnan(values) if infinite else ~np.isfinite(values)
    if bad.any():
        raise InputError("must be numbers" if infinite else "must be finite", key=name)
    return np.broadcast_to(values, (n,))
