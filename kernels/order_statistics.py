"""P2 on the GPU: order statistics of the entries of deltas that are never formed. See README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError
from ..ops.tiles_rule import per_adapter
from . import _configs
from ._deltas import DeviceDeltas, as_deltas, guard
from ._order_kernel import order_kernel

TOP = 0x7FFFFFFF  # the largest key; finite entries end below INFINITY
INFINITY = 0x7F800000
MOST = 65535  # deltas per launch: the second axis of a grid ends there


@dataclass(eq=False)
class _Search:
    """The key that k of a group's entries reach or exceed, known to lie in [low, high].

    Keys are the bits of |x| as an integer, in the order of |x|. [from, to] is the next guess.
    """

    group: int
    k: int
    low: int = 0
    high: int = TOP
    first: int = 0
    last: int = TOP
    result: int | None = None

    @property
    def shift(self):
        """Bits of a key that one bin spans."""
        return max((self.last - self.first).bit_length() - _configs.ORDER_BITS, 0)

    def conclude(self, rank, inside, found):
        """After a pass: the rank wanted among the entries inside the range, and its bin."""
        if rank <= 0:
            self.low = self.last + 1
        elif rank > inside:
            self.high = self.first - 1
        else:
            self.low = self.first + (found << self.shift)
            self.high = min(self.low + (1 << self.shift) - 1, self.last)
        if self.low >= self.high:
            self.result = self.low
        self.first, self.last = self.low, self.high


def order_statistics(
    groups: Sequence[Sequence[DeviceDeltas]], counts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """For each group and each of its counts k, the k-th largest ``|x|`` among all its entries.

    As ``ops.order_statistics``: a group holds every entry of every delta of its list; k = 0 gives
    inf, k >= the number of entries gives 0. The float32 entries are those of the merge kernel, to
    the bit. A sample brackets the answer; a pass counts the entries in the bracket in
    2^``_configs.ORDER_BITS`` bins, and another is needed where a bin holds several numbers, or
    where the bracket missed: one or two passes as a rule, four at most. Waits for the device after
    each.

    Returns:
        One float32 array per group, on the host.

    Raises:
        InputError: negative counts; products that overflow.
    """
    if len(groups) != len(counts):
        raise InputError(f"expected one list for each of {len(groups)} groups", key="counts")
    wanted = [np.asarray(c, np.int64).reshape(-1) for c in counts]
    if any((c < 0).any() for c in wanted):
        raise InputError("must not be negative", key="counts")
    found = [np.zeros(len(c), np.float32) for c in wanted]
    searches, places = [], []
    for g, (group, ks) in enumerate(zip(groups, wanted, strict=True)):
        size = sum(d.size * len(d) for d in group)
        found[g][ks == 0] = np.inf
        places += [(g, j) for j, k in enumerate(ks) if 0 < k < size]
        searches += [_Search(g, int(k)) for k in ks if 0 < k < size]
        _bracket(group, size, [s for s in searches if s.group == g])
    _run([list(group) for group in groups], searches)
    for (g, j), search in zip(places, searches, strict=True):
        found[g][j] = np.array(search.result, np.int32).view(np.float32)
        if search.result >= INFINITY:
            raise InputError("the deltas overflow float32", key="segments")
    return found


def magnitude_thresholds(factors, density) -> np.ndarray:
    """float32 (n,): each delta's threshold for keeping ``int(density * size)`` entries (PEFT).

    As ``ops.magnitude_thresholds``: ``density`` is one number or one per adapter, 1 or more keeps
    all, and entries equal to the threshold are all kept.
    """
    deltas = as_deltas(factors)
    values = per_adapter(density, len(deltas), "density")
    if (values < 0).any():
        raise InputError("must not be negative", key="density")
    groups = [[deltas[i]] for i in range(len(deltas))]
    counts = [[int(min(float(v), 1.0) * deltas.size)] for v in values]
    return np.concatenate(order_statistics(groups, counts))


def _bracket(group, size, searches):
    """Where each answer lies, by a sample of the group: 4.5 standard deviations to either side."""
    wanted = _configs.order_sample(size)
    if not searches or not wanted:
        return
    sample = torch.cat([_sampled(d, wanted / size) for d in group]).sort().values
    n = len(sample)
    places = []
    for s in searches:
        share = s.k / size
        slack = 4.5 * (n * share * (1 - share)) ** 0.5 + 3
        # Ranks from the largest; ascending order is counted from the other end.
        for rank in (n * share + slack, n * share - slack):
            places.append(n - 1 - int(rank) if 0 <= rank <= n - 1 else -1)
    keys = sample[torch.tensor(places, device=sample.device).clamp(min=0)].tolist()
    for i, s in enumerate(searches):
        if places[2 * i] >= 0:
            s.first = min(keys[2 * i], INFINITY)
        if places[2 * i + 1] >= 0:
            s.last = min(keys[2 * i + 1], INFINITY)


def _sampled(d, share):
    """int32 keys of a share of the entries of every delta of d, at positions by chance.

    Rounded as torch rounds: a bracket need not be exact.
    """
    generator = torch.Generator(d.device).manual_seed(0)
    n = max(int(share * d.size), 1)
    out = []
    for (first, last), scale in zip(d.bounds, d.scales, strict=True):
        rows, columns = (
            torch.randint(size, (n,), generator=generator, device=d.device)
            for size in (d.d_out, d.d_in)
        )
        x = (d.U[first:last, rows].float() * d.V[first:last, columns]).sum(0) * scale
        out.append(x.abs_().view(torch.int32))
    return torch.cat(out)


def _run(groups, searches):
    """Passes until every search has its result, some searches at a time."""
    most = max(_configs.WORKSPACE // (16 << _configs.ORDER_BITS), 1)
    for start in range(0, len(searches), most):
        chunk = searches[start : start + most]
        while open_ := [s for s in chunk if s.result is None]:
            _pass(groups, open_)


def _pass(groups, searches):
    device = groups[searches[0].group][0].device
    with guard(device):
        above = torch.zeros((len(searches), _configs.ORDER_SLOTS), dtype=torch.int64, device=device)
        bins = torch.zeros(
            (len(searches), 1 << _configs.ORDER_BITS), dtype=torch.int64, device=device
        )
        for kernel, grid, named in launches(groups, searches, above, bins):
            kernel[grid](**named)
        counts = bins.cumsum(1)
        rank = torch.tensor([s.k for s in searches], device=device) - above.sum(1)
        # Bins ascend: the rank-th largest inside has inside - rank entries below its own bin's end.
        inside = counts[:, -1]
        found = torch.searchsorted(counts, (inside - rank)[:, None], right=True)[:, 0]
        lines = torch.stack([rank, inside, found], 1).tolist()
    for search, line in zip(searches, lines, strict=True):
        search.conclude(*line)


def launches(groups, searches, above, bins):
    """One pass: (kernel, grid, arguments by name) per set of factors, all its deltas at once."""
    spans = {}  # searches of a group lie side by side
    for j, s in enumerate(searches):
        first, _ = spans.get(s.group, (j, j))
        spans[s.group] = first, j + 1
    together = {}
    for g, span in spans.items():
        for d in groups[g]:
            lines = together.setdefault(id(d.U), (d, [], []))
            lines[1].extend((*bounds, *span) for bounds in d.bounds)
            lines[2].extend(d.scales)
    ranges = [(s.first, s.last, s.shift) for s in searches]
    table = torch.tensor(ranges, dtype=torch.int64).to(above.device)
    together = [
        (d, lines[at : at + MOST], scales[at : at + MOST])
        for d, lines, scales in together.values()
        for at in range(0, len(lines), MOST)
    ]
    for d, lines, scales in together:
        config = d.tile(_configs.ORDER)
        tiles_j = -(-d.d_in // config.block_j)
        programs = -(-d.d_out // config.block_i) * -(-tiles_j // config.tiles)
        yield (
            order_kernel,
            (programs, len(lines)),
            dict(
                p_u=d.U,
                p_v=d.V,
                p_deltas=torch.tensor(lines, dtype=torch.int64).to(above.device),
                p_scales=torch.tensor(scales, dtype=torch.float64).float().to(above.device),
                p_searches=table,
                p_above=above,
                p_bins=bins,
                d_out=d.d_out,
                d_in=d.d_in,
                tiles_j=tiles_j,
                s_u=d.U.stride(0),
                s_v=d.V.stride(0),
                SLOTS=_configs.ORDER_SLOTS,
                BINS=bins.shape[1],
                RANK_STEP=d.rank_step,
                BLOCK_I=config.block_i,
                BLOCK_J=config.block_j,
                TILES=config.tiles,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=False,
            ),
        )
