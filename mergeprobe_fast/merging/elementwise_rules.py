"""From a merge request to elementwise rules: thresholds, chance, rescaling, by dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.methods import DenseModule, MergedModule, MergeRequest, pad_rank
from mergeprobe_fast.merging.source import ModuleFactors, Stored
from mergeprobe_fast.ops.tiles import (
    NotFinite,
    magnitude_thresholds,
    merge_dense,
    order_statistics,
    pruned_norms,
)
from mergeprobe_fast.ops.tiles_low_rank import merge_low_rank
from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule, stream

Keep = Literal["magnitude", "random", "della", "breadcrumbs"]


def low_rank(request: MergeRequest, keep: Keep, combine: str) -> Iterator[MergedModule]:
    """The rule as an adapter; ``rank`` defaults to the largest among the adapters."""
    for m, deltas, rule in _rules(request, keep, combine):
        yield cut(request, m, deltas, request.weights_of(m), rule)


def cut(
    request: MergeRequest, m: ModuleFactors, deltas: Deltas, weights: np.ndarray,
    rule: ElementwiseRule, fisher: Deltas | None = None,
) -> MergedModule:  # fmt: skip
    """The rule's result at the rank asked for, by default the largest among the adapters."""
    rank = request.rank
    if rank is None:
        # An energy may need any rank; above the sum of the adapters' it costs more than it is.
        rank = request.source.largest_rank if request.energy is None else int(m.ranks.sum())
    try:
        found = merge_low_rank(
            deltas, weights, rule, rank, energy=request.energy, fisher=fisher,
            threads=request.threads,
        )  # fmt: skip
    except InputError as error:
        raise blame(error, m) from None
    width = rank if request.energy is None else max(1, len(found.a))
    return MergedModule(
        m.module, pad_rank(found.a, width, 0), pad_rank(found.b, width, 1), request.members(m),
        found.norm, found.error, min(m.module.d_out, m.module.d_in),
        {"excess_relative": found.excess},
    )  # fmt: skip


def dense(request: MergeRequest, *, keep: Keep, combine: str) -> Iterator[DenseModule]:
    """The rule itself, row by row."""
    for m, deltas, rule in _rules(request, keep, combine):
        yield whole(request, m, deltas, request.weights_of(m), rule)


def whole(
    request: MergeRequest, m: ModuleFactors, deltas: Deltas, weights: np.ndarray,
    rule: ElementwiseRule, fisher: Deltas | None = None,
) -> DenseModule:  # fmt: skip
    """The rule's result, rows of it as they are asked for."""

    def rows(first: int, last: int) -> np.ndarray:
        try:
            return merge_dense(
                deltas, weights, rule, rows=(first, last), fisher=fisher, threads=request.threads
            )
        except InputError as error:
            raise blame(error, m) from None

    def there(first: int, last: int) -> Any:
        from mergeprobe_fast.kernels import merge_tiles

        try:
            return merge_tiles.merge_dense(
                deltas.there, weights, rule, rows=(first, last),
                fisher=None if fisher is None else fisher.there,
            )  # fmt: skip
        except InputError as error:
            raise blame(error, m) from None

    on_device = None if deltas.there is None else there
    return DenseModule(m.module, request.members(m), rows, on_device)


def _rules(
    request: MergeRequest, keep: Keep, combine: str
) -> Iterator[tuple[ModuleFactors, Deltas, ElementwiseRule]]:
    """Every module with its rule, thresholds found."""
    dialect = request.arguments.get("dialect", "mergekit" if keep in ("della", "breadcrumbs") else
                                    "peft")  # fmt: skip
    lows = _whole_adapter_thresholds(request) if dialect == "paper" else None
    for chunk in request.chunks():
        for m in chunk:
            rule = _combination(request, dialect, combine)
            try:
                deltas = deltas_of(m, request.device)
                low = None if lows is None else lows[m.adapters]
                yield m, deltas, _kept(request, m, deltas, keep, dialect, rule, low)
            except InputError as error:
                raise blame(error, m) from None


def _combination(request: MergeRequest, dialect: str, combine: str) -> dict[str, Any]:
    """The arguments of the rule that say how survivors become one entry."""
    rule: dict[str, Any] = {"combine": combine}
    mergekit = dialect == "mergekit"
    if combine == "ties":
        rule["elect"] = request.arguments["majority_sign_method"]
        rule["elect_weighted"] = mergekit
        rule["divide"] = "count"
    normalize = request.arguments.get("normalize")
    if mergekit:
        said = combine == "ties" if normalize is None else normalize
        rule["divide"] = "weights" if said else "none"
    elif normalize is not None:
        raise InputError(f"means nothing in dialect {dialect!r}, only in mergekit", key="normalize")
    return rule


def _kept(
    request: MergeRequest, m: ModuleFactors, deltas: Deltas, keep: Keep, dialect: str,
    rule: dict[str, Any], low: np.ndarray | None,
) -> ElementwiseRule:  # fmt: skip
    density, threads = request.value_of("density", m), request.threads
    if keep == "magnitude":
        low = magnitude_thresholds(deltas, density, threads=threads) if low is None else low
        return ElementwiseRule(keep="magnitude", low=low, **rule)
    if keep == "breadcrumbs":
        low, high = _breadcrumbs(request, m, deltas, density)
        return ElementwiseRule(keep="magnitude", low=low, high=high, **rule)
    names = request.members(m)
    rule = {
        **rule, "keep": keep, "density": density, "seed": request.arguments["seed"],
        "streams": [stream(m.module.name, name) for name in names],
    }  # fmt: skip
    if keep == "della":
        rule["epsilon"] = request.arguments["epsilon"]
    if dialect == "mergekit":
        norms = pruned_norms(deltas, ElementwiseRule(**rule), threads=threads)
        # mergekit leaves norms below 1e-7 alone: a result that depends on the unit of the weights.
        rescale = norms.l1 / np.where(norms.l1_kept > 0, norms.l1_kept, np.inf)
    else:
        rescale = 1.0 / np.where(density > 0, density, 1.0)
    return ElementwiseRule(**rule, rescale=rescale)


def _breadcrumbs(
    request: MergeRequest, m: ModuleFactors, deltas: Deltas, density: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds as mergekit counts: the top share goes first, and gives way to the density."""
    size, low, high = deltas.size, [], []
    counts = []
    for share, gamma in zip(density, request.value_of("gamma", m), strict=True):
        target, top = int(share * size), int(gamma * size)
        top = min(top, size - target)
        counts.append([top, top + target])
    groups = [[deltas[i]] for i in range(len(deltas))]
    for (top, last), found in zip(
        counts, order_statistics(groups, counts, threads=request.threads), strict=True
    ):
        # Entries that equal the one at the border of the top share go with it.
        high.append(np.inf if top == 0 else np.nextafter(found[0], np.float32(0)))
        low.append(np.inf if last == top else found[1])
    return np.array(low), np.array(high)


def _whole_adapter_thresholds(request: MergeRequest) -> np.ndarray:
    """float32 (adapters,): one threshold for all entries of an adapter, as the TIES code has it."""
    density = request.arguments["density"]
    if (density != density[0]).any():
        raise InputError("dialect 'paper' has one threshold per adapter: it may not depend on the "
                         "module", key="density")  # fmt: skip
    n = len(request.source.names)
    groups: list[list[Deltas]] = [[] for _ in range(n)]
    owners: dict[tuple[int, int], ModuleFactors] = {}
    for chunk in request.source.chunks(request.threads):
        for m in map(_copied, chunk):
            deltas = deltas_of(m, request.device)
            for i, adapter in enumerate(m.adapters):
                owners[int(adapter), len(groups[adapter])] = m
                groups[adapter].append(deltas[i])
    sizes = [sum(d.size for d in group) for group in groups]
    counts = [[int(share * size)] for share, size in zip(density[0], sizes, strict=True)]
    try:
        return np.concatenate(order_statistics(groups, counts, threads=request.threads))
    except NotFinite as error:
        flat = [(a, k) for a, group in enumerate(groups) for k in range(len(group))]
        adapter, k = flat[error.segment]
        m = owners[adapter, k]
        side = m.a if error.side == "A" else m.b
        raise side[int(np.flatnonzero(m.adapters == adapter)[0])].refuse(
            "holds NaN or infinite values"
        ) from None


def _copied(m: ModuleFactors) -> ModuleFactors:
    """The same, safe to keep when the source goes on."""

    def copies(factors: Any) -> list[Stored]:
        return [Stored(f.raw.copy(), f.dtype, f.where) for f in factors]

    return ModuleFactors(m.module, m.index, m.adapters, copies(m.a), copies(m.b), m.scales)


def deltas_of(m: ModuleFactors, device: Any = None) -> Deltas:
    """The module's deltas for the elementwise kernels; weights stay apart."""
    there = None
    if device is not None:
        there = device.deltas([
            ((b.raw, b.dtype), (a.raw, a.dtype), float(s))
            for b, a, s in zip(m.b, m.a, m.scales, strict=True)
        ])  # fmt: skip
    return Deltas(m.segments(), m.module.d_out, m.module.d_in, m, there)


def blame(error: InputError, m: ModuleFactors) -> InputError:
    """An error of the kernels, naming the tensor's file and key, or the module."""
    if not isinstance(error, NotFinite):
        inner = error.key in ("segments", "factors", "fisher")
        return InputError(error.reason, key=m.module.name) if inner else error
    side = m.a if error.side == "A" else m.b
    return side[error.segment].refuse("holds NaN or infinite values")
