"""What a merge method is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mergeprobe_fast.zoo import Module, Zoo


@dataclass(frozen=True, eq=False)
class MergedModule:
    """One module of the result: ``delta = b @ a``, scale baked in, float32.

    ``norm`` is ||W||_F of the exact merged delta and ``truncation_error`` the Frobenius norm of
    what the rank left out, both exact up to float64 rounding. ``rank_before`` is the numerical
    rank before truncation.
    """

    module: Module
    a: np.ndarray  # (rank, d_in)
    b: np.ndarray  # (d_out, rank)
    members: tuple[str, ...]
    norm: float
    truncation_error: float
    rank_before: int


@dataclass(frozen=True)
class MergeRequest:
    """What every method is given: checked weights (one per adapter) and the rank asked for."""

    zoo: Zoo
    weights: np.ndarray
    rank: int | None
    threads: int
    progress: Callable[[int], None] | None
    arguments: Mapping[str, Any]


class MergeFunction(Protocol):
    """Yields the modules of the result, in the zoo's order."""

    def __call__(self, request: MergeRequest) -> Iterator[MergedModule]: ...


@dataclass(frozen=True)
class MergeMethod:
    """A rule that turns adapters into one adapter.

    ``arity`` is the least and the largest number of adapters (None: any), ``data`` what it needs
    beyond the factors, ``defaults`` the arguments it takes. ``run.__doc__`` says what it does, how
    exact it is, whether it is gauge-invariant, and where it comes from.
    """

    name: str
    run: MergeFunction
    arity: tuple[int, int | None] = (1, None)
    data: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = None  # type: ignore[assignment]
    takes_rank: bool = True

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


def pad_rank(matrix: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Zeros appended up to ``rank`` along ``axis``."""
    missing = rank - matrix.shape[axis]
    if missing <= 0:
        return matrix
    widths: Sequence[tuple[int, int]] = [(0, missing if i == axis else 0) for i in (0, 1)]
    return np.pad(matrix, widths)
