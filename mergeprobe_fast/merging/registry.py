"""The list of merge methods: one row each, the rule itself in the file of its family."""

from __future__ import annotations

from mergeprobe_fast.merging import linear
from mergeprobe_fast.merging.methods import MergeMethod

MERGE_METHODS: dict[str, MergeMethod] = {
    m.name: m
    for m in (
        MergeMethod("svd", linear.svd),
        MergeMethod("linear", linear.linear),
        MergeMethod("cat", linear.cat, takes_rank=False),
    )
}
