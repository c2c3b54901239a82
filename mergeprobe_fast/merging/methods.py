"""What a merge method is, what it is given, and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from mergeprobe_fast.merging.source import ModuleFactors, Source
from mergeprobe_fast.zoo import Module

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration


@dataclass(frozen=True, eq=False)
class MergedModule:
    """One module of the result: ``delta = b @ a``, scale baked in, float32.

    ``norm`` is ||M||_F of the merged delta as the method defines it and ``truncation_error`` the
    Frobenius norm of what the rank left out, both exact up to float64 rounding unless the method
    says otherwise. ``rank_before`` is the numerical rank before truncation. ``details`` are further
    numbers for the report, per module.
    """

    module: Module
    a: np.ndarray  # (rank, d_in)
    b: np.ndarray  # (d_out, rank)
    members: tuple[str, ...]
    norm: float
    truncation_error: float
    rank_before: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DenseModule:
    """One module of the result as rows of its delta, for merging into base weights.

    ``rows(first, last)`` gives float32 rows (last - first, d_in); valid until the next module.
    ``there`` gives the same as a tensor where the request has a device.
    """

    module: Module
    members: tuple[str, ...]
    rows: Callable[[int, int], np.ndarray]
    there: Callable[[int, int], Any] | None = None


@dataclass(frozen=True, eq=False)
class MergeRequest:
    """What every method is given, checked.

    ``weights`` and the arguments that are set per adapter are (modules, adapters) arrays, in the
    order of the source. ``calibration`` and ``domains`` (one name per adapter) are there when the
    method asks for them in ``MergeMethod.data``, or when the caller gave them.
    """

    source: Source
    weights: np.ndarray
    rank: int | None
    energy: float | None
    threads: int
    arguments: Mapping[str, Any]
    progress: Callable[[int], None] | None = None
    calibration: Calibration | None = None
    domains: tuple[str, ...] = ()
    device: Any = None  # from ops.open_device: the work is done there

    @property
    def workers(self) -> int:
        """Modules worked on at a time: on a device, one while the host prepares the next."""
        return self.threads if self.device is None else min(self.threads, 2)

    def chunks(self) -> Iterator[list[ModuleFactors]]:
        """The source's chunks, telling ``progress`` how many modules are done."""
        done = 0
        for chunk in self.source.chunks(self.threads):
            yield chunk
            if self.progress and chunk:
                self.progress(chunk[-1].index + 1 - done)
                done = chunk[-1].index + 1
        if self.progress and done < len(self.source.modules):
            self.progress(len(self.source.modules) - done)

    def weights_of(self, m: ModuleFactors) -> np.ndarray:
        """The weights of the adapters that have this module, float64."""
        return self.weights[m.index, m.adapters]

    def value_of(self, name: str, m: ModuleFactors) -> np.ndarray:
        """A per-adapter argument, for the adapters that have this module."""
        return self.arguments[name][m.index, m.adapters]

    def members(self, m: ModuleFactors) -> tuple[str, ...]:
        return tuple(self.source.names[int(i)] for i in m.adapters)


class MergeFunction(Protocol):
    """Yields the modules of the result, in the source's order."""

    def __call__(self, request: MergeRequest) -> Iterator[MergedModule]: ...


class DenseFunction(Protocol):
    """Yields the modules of the result as rows, in the source's order."""

    def __call__(self, request: MergeRequest) -> Iterator[DenseModule]: ...


@dataclass(frozen=True)
class Argument:
    """An argument of a method: its default, how it is checked, and what it means.

    ``check`` returns the value as the method wants it, or raises ValueError with the reason.
    A ``per_adapter`` argument is a number, or one per adapter, each of which may depend on the
    module (:mod:`.schedule`); the method gets a (modules, adapters) array.
    """

    default: Any
    check: Callable[[Any], Any]
    help: str
    per_adapter: bool = False


@dataclass(frozen=True)
class MergeMethod:
    """A rule that turns adapters into one adapter.

    ``arity`` is the least and the largest number of adapters (None: any). ``data`` names what it
    needs beyond the factors: "inputs" or "gradients" of a calibration. ``weights`` says what equal
    weights are when none are given: "mean" 1/N each, "one" 1 each (rules that average
    themselves). ``dense`` gives rows of the exact result where that has no low rank.
    ``run.__doc__`` says what it does, how exact it is, whether it is gauge-invariant, and where it
    comes from.
    """

    name: str
    run: MergeFunction
    arity: tuple[int, int | None] = (1, None)
    data: tuple[Literal["inputs", "gradients"], ...] = ()
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    takes_rank: bool = True
    weights: Literal["mean", "one"] = "mean"
    dense: DenseFunction | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments it takes, with their defaults."""
        return {name: argument.default for name, argument in self.arguments.items()}

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


def near_one(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """(weights / 2^e, e): the largest near 1, exactly, so that sums and squares stay in range."""
    exponent = int(np.frexp(np.abs(weights).max(initial=0.0))[1])
    return np.ldexp(weights, -exponent), exponent


def pad_rank(matrix: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Zeros appended up to ``rank`` along ``axis``."""
    missing = rank - matrix.shape[axis]
    if missing <= 0:
        return matrix
    widths: Sequence[tuple[int, int]] = [(0, missing if i == axis else 0) for i in (0, 1)]
    return np.pad(matrix, widths)
