"""The list of merge methods: one row each, the rule itself in the file of its family."""

from __future__ import annotations

from mergeprobe_fast.merging import (
    cores,
    elementwise,
    fisher,
    geodesic,
    isotropic,
    knots,
    lego,
    linear,
    osrm,
    prune,
    regmean,
    singular,
    weighted_svd,
)
from mergeprobe_fast.merging.methods import MergeMethod

MERGE_METHODS: dict[str, MergeMethod] = {
    m.name: m
    for m in (
        MergeMethod("svd", linear.svd),
        MergeMethod("linear", linear.linear),
        MergeMethod("cat", linear.cat, takes_rank=False),
        *regmean.METHODS,
        *weighted_svd.METHODS,
        *osrm.METHODS,
        *prune.METHODS,
        *fisher.METHODS,
        *elementwise.METHODS,
        *geodesic.METHODS,
        *singular.METHODS,
        *isotropic.METHODS,
        *cores.METHODS,
        *knots.METHODS,
        *lego.METHODS,
    )
}
