"""The front of all merge methods: checks, defaults, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.dtypes import FACTOR_DTYPES
from mergeprobe_fast.merging import linear
from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.methods import MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

MERGE_METHODS: dict[str, MergeMethod] = {
    m.name: m
    for m in (
        MergeMethod("svd", linear.svd, defaults={}),
        MergeMethod("linear", linear.linear, defaults={}),
        MergeMethod("cat", linear.cat, defaults={}, takes_rank=False),
    )
}


def merge(
    zoo: Zoo | Paths,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **arguments: Any,
) -> MergedAdapter:
    """Merge all adapters of a zoo into one.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        method: a name in ``mergeprobe_fast.MERGE_METHODS``.
        weights: one factor per adapter, in the zoo's order, multiplied into its delta; any sign.
            None is 1/N each.
        rank: rank of the result, the same for every module; what None means is the method's.
        dtype: "F32", "BF16" or "F16" of the result; None: that of the inputs, F32 if they differ.
        progress: called with the number of modules done since the last call.
        arguments: the method's own.

    Returns:
        An adapter whose ``save(folder)`` writes what PEFT loads as it is, and ``merge.json``.

    Raises:
        InputError: an unknown method or argument, wrong weights or rank, a factor that is not
            finite, a file that changed since the zoo was opened.
    """
    zoo = as_zoo(zoo)
    chosen = MERGE_METHODS.get(method)
    if chosen is None:
        known = ", ".join(MERGE_METHODS)
        raise InputError(f"no method {method!r}; there are: {known}", key="method")
    least, most = chosen.arity
    if len(zoo) < least or (most is not None and len(zoo) > most):
        raise InputError(f"{method} cannot merge {len(zoo)} adapters", key="method")
    unknown = sorted(set(arguments) - set(chosen.defaults))
    if unknown:
        raise InputError(f"{method} takes no argument {unknown[0]!r}", key="method")
    if rank is not None:
        if not chosen.takes_rank:
            raise InputError(
                f"{method} keeps every component and takes no rank; use svd to truncate", key="rank"
            )
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
            raise InputError(f"must be a positive integer, got {rank!r}", key="rank")
        rank = int(rank)
        largest = max(max(m.d_out, m.d_in) for m in zoo.modules)
        if rank > largest:
            raise InputError(f"larger than every module ({largest}), got {rank}", key="rank")
    used = sorted({factor.dtype for a in zoo for m in a.modules.values() for factor in (m.a, m.b)})
    if dtype is None:
        dtype = used[0] if len(used) == 1 else "F32"
    if dtype not in FACTOR_DTYPES:
        raise InputError(f"must be one of {', '.join(FACTOR_DTYPES)}, got {dtype!r}", key="dtype")
    checked = _weights(weights, len(zoo))
    request = MergeRequest(
        zoo, checked, rank, _env.threads_or_default(threads), progress,
        {**chosen.defaults, **arguments},
    )  # fmt: skip
    modules = tuple(_checked(m) for m in chosen.run(request))
    return MergedAdapter(zoo, method, checked, rank, dtype, modules)


def _checked(m: MergedModule) -> MergedModule:
    """Refuse a module whose float32 factors lost the update."""
    name = m.module.name
    if not (np.isfinite(m.a).all() and np.isfinite(m.b).all() and np.isfinite(m.norm)):
        raise InputError("the merged update overflows float32", key=name)
    if m.norm > 0 and m.rank_before > 0 and not (m.a.any() and m.b.any()):
        raise InputError("the merged update underflows float32", key=name)
    return m


def _weights(weights: Sequence[float] | None, n: int) -> np.ndarray:
    if weights is None:
        return np.full(n, 1.0 / n)
    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"must be numbers, got {weights!r}", key="weights") from None
    if values.shape != (n,):
        raise InputError(
            f"expected one for each of {n} adapters, got {values.size}", key="weights"
        )
    if not np.isfinite(values).all():
        raise InputError("must be finite", key="weights")
    return values
