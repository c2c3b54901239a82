"""Features of sets of adapters: what a merge of each set would be, before it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.sets import SetRequest, select_sets
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.recorded import open_recorded
from mergeprobe_fast.table import SetTable
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

MOST_SETS = 10_000_000


def set_features(
    zoo: Zoo | Paths,
    members: Iterable[Sequence[str | int]] | None = None,
    weights: Any = None,
    *,
    features: str | Sequence[str] = "default",
    calibration: Calibration | Any = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    size: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = "cpu",
) -> SetTable:
    """One row per set of adapters: what ``M = sum_j w_j W_j`` would be, and what could be better.

    Columns are absent when what they need was not recorded, and NaN where undefined: in a set with
    an adapter that is zero (on its own inputs). They do not depend on the order of the members.

    Args:
        zoo: from :func:`mergeprobe_fast.open_zoo`, or what that takes.
        members: the sets, each of names or indices; None: all sets of ``size``.
        weights: of the merge: None is 1/k each, "one" is 1 each (a plain sum), else one array per
            set, in the order of its members.
        features: "default" (what needs one pass over the zoo), "all" (also what reads the factors
            set by set), or names from ``mergeprobe_fast.features.sets.SET_FEATURES``.
        calibration: from :func:`mergeprobe_fast.open_calibration`, or its folder: gives retention,
            and predicted losses where it has points.
        domains: the calibration domain of every adapter, in order or by name; by default what
            their names begin with.
        progress: called with the number of modules done since the last call, in every pass.
        device: "cpu", "cuda", "cuda:1" or "auto", as :func:`mergeprobe_fast.pair_features` has it.

    Returns:
        A :class:`.SetTable`; ``per_member`` has "weights" and what each member has.

    Raises:
        InputError: an unknown adapter or feature, an adapter twice in one set, weights that do not
            fit, something that a named feature needs and is missing.
        BackendError: the device cannot be used here.
    """
    opened = open_device(device)
    zoo = as_zoo(zoo)
    recorded = open_recorded(zoo, calibration, domains)
    chosen = select_sets(features, recorded)
    index = member_sets(zoo, members, size)
    request = SetRequest(
        zoo, recorded, index, _weights(weights, index), _env.threads_or_default(threads), progress,
        opened,
    )  # fmt: skip
    there = index >= 0
    columns: dict[str, np.ndarray] = {}
    per_member = {"weights": np.where(there, request.weights, np.nan)}
    for group, wanted in chosen:
        with computing_on(opened):
            values = {**group.compute(request), "there": there}
        columns |= {f.name: f.finish(values) for f in wanted}
        per_member |= {f.name: f.finish(values) for f in group.features if f.per_member}
    return SetTable(zoo.names, index, columns, per_member)


def member_sets(
    zoo: Zoo, members: Iterable[Sequence[str | int]] | None, size: int | None = None
) -> np.ndarray:
    """Sets of a zoo's adapters by name or index as (sets, widest) int32, -1 beyond a set.

    InputError: an unknown adapter, one twice in a set, an empty set, no sets.
    """
    if members is None:
        return _every(len(zoo), size)
    if size is not None:
        raise InputError("given beside members", key="size")
    if isinstance(members, str):
        raise InputError("expected sets of adapters, got a single name", key="members")
    number = {name: i for i, name in enumerate(zoo.names)}
    sets = [_set(s, number, len(zoo), k) for k, s in enumerate(members)]
    if not sets:
        raise InputError("no sets given", key="members")
    out = np.full((len(sets), max(map(len, sets))), -1, np.int32)
    for row, found in zip(out, sets, strict=True):
        row[: len(found)] = found
    return out


def _every(count: int, size: int | None) -> np.ndarray:
    if size is None:
        raise InputError("expected sets, or a size to make all sets of", key="members")
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 1 <= size <= count:
        raise InputError(f"expected an integer from 1 to {count}, got {size!r}", key="size")
    sets = math.comb(count, int(size))
    if sets > MOST_SETS:
        raise InputError(f"makes {sets} sets of {count} adapters, more than {MOST_SETS}: say which",
                         key="size")  # fmt: skip
    flat = np.fromiter(chain.from_iterable(combinations(range(count), size)), np.int32,
                       sets * int(size))  # fmt: skip
    return flat.reshape(sets, size)


def _set(given: Any, number: Mapping[str, int], count: int, k: int) -> list[int]:
    key = f"members[{k}]"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"expected names or indices, got {given!r}", key=key)
    found = []
    for one in given:
        if isinstance(one, str):
            if one not in number:
                raise InputError(f"no adapter {one!r} in the zoo", key=key)
            found.append(number[one])
        elif isinstance(one, (int, np.integer)) and not isinstance(one, bool) and 0 <= one < count:
            found.append(int(one))
        else:
            raise InputError(f"expected a name or an index below {count}, got {one!r}", key=key)
    if not found:
        raise InputError("is empty", key=key)
    if len(set(found)) != len(found):
        raise InputError("has an adapter twice", key=key)
    return found


def _weights(given: Any, index: np.ndarray) -> np.ndarray:
    there = index >= 0
    size = there.sum(axis=1)
    if given is None:
        return np.where(there, 1.0 / np.maximum(size, 1)[:, None], 0.0)
    if isinstance(given, str):
        if given != "one":
            raise InputError(f"expected 'one' or numbers, got {given!r}", key="weights")
        return there.astype(np.float64)
    try:
        rows = [np.asarray(row, np.float64) for row in given]
    except (TypeError, ValueError):
        raise InputError("expected one array of numbers per set", key="weights") from None
    if len(rows) != len(index):
        raise InputError(f"expected one array for each of {len(index)} sets", key="weights")
    out = np.zeros(index.shape)
    for k, (row, count) in enumerate(zip(rows, size, strict=True)):
        if row.shape != (count,) or not np.isfinite(row).all():
            raise InputError(f"expected {count} finite numbers", key=f"weights[{k}]")
        out[k, :count] = row
    return out
