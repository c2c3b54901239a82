"""The launches of P2 that `_inspect` compiles, on tensors without memory."""

import torch

from ..ops.tiles_rule import ElementwiseRule
from . import _configs
from ._deltas import DeviceDeltas, pack_launch
from ._merge_call import MergeCall
from .order_statistics import _Search
from .order_statistics import launches as order_launches
from .pruned_norms import norms_launch

DTYPE = {"chain": torch.float32, "tensor": torch.bfloat16}
CHANCE = dict(streams=(1, 2, 3, 4), density=0.5)
# What a user asks for most, then what strains the registers: rule, dtype of the base, rows.
RULES = {
    "ties into bf16": (
        ElementwiseRule("magnitude", "ties", low=0.1, divide="count"), torch.bfloat16, 4096,
    ),
    "ties of weighted": (
        ElementwiseRule(
            "random", "ties", elect_weighted=True, divide="weights", rescale=2, **CHANCE
        ), torch.float16, 4096,
    ),
    "ties by frequency": (
        ElementwiseRule("della", "ties", elect="frequency", divide="weights", **CHANCE),
        None, 4096,
    ),
    "ties beyond 2^32": (
        ElementwiseRule("random", "ties", divide="weights", **CHANCE), torch.float16, 1 << 21,
    ),
    "breadcrumbs": (
        ElementwiseRule("magnitude", "ties", low=1, high=3, rescale=3), torch.float32, 4096,
    ),
    "fisher": (ElementwiseRule("random", "fisher", **CHANCE), torch.float16, 4096),
    "sum": (ElementwiseRule("random", divide="weights", **CHANCE), torch.bfloat16, 4096),
}  # fmt: skip


def merge_launch(kind, name):
    """The launch of a merge of four adapters; all but the first also subtract and square."""
    rule, base, d_out = RULES[name]
    deltas = _deltas(DTYPE[kind], 4, d_out)
    call = MergeCall(deltas, [1.0] * 4, rule, deltas if rule.combine == "fisher" else None)
    out = _meta(d_out, 4096, dtype=base or torch.float32)
    full = name != "ties into bf16"
    return call.arguments(
        0, d_out, out, _meta(2, dtype=torch.int32),
        base=None if base is None else out,
        minus=_deltas(torch.float32, 1, d_out) if full else None,
        squares=call.squares(0, d_out) if full else None,
        limits=_meta(4, d_out, 4096, dtype=torch.int64) if rule.keep == "della" else None,
    )  # fmt: skip


def order_launch(kind):
    """A pass over four deltas for one threshold each."""
    deltas = _deltas(DTYPE[kind], 4, 4096)
    searches = [_Search(i, 5) for i in range(4)]
    above = _meta(4, _configs.ORDER_SLOTS, dtype=torch.int64)
    bins = _meta(4, 1 << _configs.ORDER_BITS, dtype=torch.int64)
    return next(order_launches([[deltas[i]] for i in range(4)], searches, above, bins))


def pruned_launch(kind):
    """Norms of what DELLA keeps."""
    call = MergeCall(_deltas(DTYPE[kind], 4, 4096), None, RULES["ties by frequency"][0], None)
    return norms_launch(call, 0, 4096, _meta(4, 4096, 4096, dtype=torch.int64))


def packing_launch(kind):
    rows = [(0, 1, 0, 0)] * 64
    return pack_launch(rows, 4096, _meta(8, dtype=torch.int32), DTYPE[kind])


def tile_launches(kind):
    """{name: launch} of every kernel of P2, for entries by "chain" or "tensor"."""
    merges = {name: merge_launch(kind, name) for name in RULES}
    others = {"order": order_launch, "norms": pruned_launch, "pack": packing_launch}
    return merges | {name: launch(kind) for name, launch in others.items()}


def _meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _deltas(dtype, n, d_out):
    buffers = _meta(16 * n, d_out, dtype=dtype), _meta(16 * n, 4096, dtype=dtype)
    return DeviceDeltas(*buffers, [(16 * i, 16 * i + 16) for i in range(n)], [1.0] * n, d_out, 4096)
