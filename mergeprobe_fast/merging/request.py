"""From what a caller says to a checked MergeRequest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import schedule
from mergeprobe_fast.merging.methods import Argument, MergeMethod, MergeRequest
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.merging.source import Source

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration


def prepare(
    source: Source,
    method: str,
    *,
    weights: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    calibration: Calibration | None = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = None,
    arguments: Mapping[str, Any],
) -> tuple[MergeMethod, MergeRequest]:
    """Everything checked, defaults filled in; see :func:`mergeprobe_fast.merge`."""
    chosen = check_arguments(method, arguments)
    n = len(source.names)
    least, most = chosen.arity
    if n < least or (most is not None and n > most):
        takes = f"{least}" if most == least else f"at least {least}"
        raise InputError(f"{method} cannot merge {n} adapters; it takes {takes}", key="method")
    return chosen, MergeRequest(
        source,
        _weights(chosen, weights, source),
        _rank(chosen, rank, source),
        _energy(chosen, energy),
        _env.threads_or_default(threads),
        _arguments(chosen, arguments, source),
        progress,
        *_calibration(chosen, calibration, domains, source),
        device,
    )


def unknown_method(name: Any) -> str:
    """What to say of a method that does not exist."""
    close = get_close_matches(str(name), MERGE_METHODS, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no method {name!r}; {hint}there are: {', '.join(MERGE_METHODS)}"


def _weights(method: MergeMethod, weights: Any, source: Source) -> np.ndarray:
    n = len(source.names)
    if weights is None:
        weights = [1.0 / n if method.weights == "mean" else 1.0] * n
    elif isinstance(weights, (int, float)):
        raise InputError(f"must be numbers, one per adapter, got {weights!r}", key="weights")
    return schedule.table(weights, source.names, source.modules, "weights")


def _rank(method: MergeMethod, rank: Any, source: Source) -> int | None:
    if rank is None:
        return None
    if not method.takes_rank:
        reason = f"{method.name} keeps every component and takes no rank; use svd to truncate"
        raise InputError(reason, key="rank")
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"must be a positive integer, got {rank!r}", key="rank")
    largest = max(max(m.d_out, m.d_in) for m in source.modules)
    if rank > largest:
        raise InputError(f"larger than every module ({largest}), got {rank}", key="rank")
    return int(rank)


def _energy(method: MergeMethod, energy: Any) -> float | None:
    if energy is None:
        return None
    if not method.takes_rank:
        reason = f"{method.name} keeps every component and takes no energy; use svd to truncate"
        raise InputError(reason, key="energy")
    if isinstance(energy, bool) or not isinstance(energy, (int, float, np.number)):
        raise InputError(f"must be a number, got {energy!r}", key="energy")
    if not 0 < energy <= 1:
        raise InputError(f"must be in (0, 1], got {energy!r}", key="energy")
    return float(energy)


def check_arguments(method: str, names: Iterable[str]) -> MergeMethod:
    """The method of that name, once it is known to take arguments of these names."""
    chosen = MERGE_METHODS.get(method)
    if chosen is None:
        raise InputError(unknown_method(method), key="method")
    unknown = sorted(set(names) - set(chosen.arguments))
    if unknown:
        takes = ", ".join(chosen.arguments) or "none"
        raise InputError(f"{method} takes no argument {unknown[0]!r} (it takes: {takes})",
                         key="method")  # fmt: skip
    return chosen


def _arguments(
    method: MergeMethod, given: Mapping[str, Any], source: Source
) -> dict[str, Any]:
    return {
        name: _argument(name, argument, given.get(name, argument.default), source)
        for name, argument in method.arguments.items()
    }


def _argument(name: str, argument: Argument, value: Any, source: Source) -> Any:
    try:
        if not argument.per_adapter:
            return argument.check(value)
        values = schedule.table(value, source.names, source.modules, name)
        for v in np.unique(values):
            argument.check(float(v))
        return values
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error), key=name) from None


def _calibration(
    method: MergeMethod,
    calibration: Calibration | None,
    domains: Mapping[str, str] | Sequence[str] | None,
    source: Source,
) -> tuple[Calibration | None, tuple[str, ...]]:
    if calibration is None:
        if method.data:
            reason = f"{method.name} needs a calibration (mergeprobe-fast calibrate makes one)"
            raise InputError(reason, key="calibration")
        if domains is not None:
            raise InputError("given without a calibration", key="domains")
        return None, ()
    if "gradients" in method.data and not calibration.has_gradients:
        reason = f"has no gradients, which {method.name} needs: calibrate with --gradients"
        raise InputError(reason, path=calibration.path)
    return calibration, assign_domains(source.names, list(calibration.domains), domains)
