"""The primitives on LoRA factors: block Gram (P1), delta tiles (P2) and canonical form (P3).

Checks and dispatch live here, speed in ``csrc`` and ``kernels``; :mod:`.reference`,
:mod:`.tiles_reference` and :mod:`.entries_reference` hold the float64 definitions under the same
names.
"""

from mergeprobe_fast.ops import reference, tiles_reference
from mergeprobe_fast.ops.angles import singular_values
from mergeprobe_fast.ops.canonical import canonical
from mergeprobe_fast.ops.entries import entry_moments, entry_pairs, entry_sizes, sign_conflicts
from mergeprobe_fast.ops.gram import block_gram
from mergeprobe_fast.ops.tiles import (
    Norms,
    NotFinite,
    Sketch,
    magnitude_thresholds,
    merge_dense,
    merge_sketch,
    order_statistics,
    pruned_norms,
)
from mergeprobe_fast.ops.tiles_low_rank import LowRank, merge_low_rank
from mergeprobe_fast.ops.tiles_rule import Deltas, ElementwiseRule, stream

__all__ = [
    "Deltas",
    "ElementwiseRule",
    "LowRank",
    "Norms",
    "NotFinite",
    "Sketch",
    "block_gram",
    "canonical",
    "entry_moments",
    "entry_pairs",
    "entry_sizes",
    "magnitude_thresholds",
    "merge_dense",
    "merge_low_rank",
    "merge_sketch",
    "order_statistics",
    "pruned_norms",
    "reference",
    "sign_conflicts",
    "singular_values",
    "stream",
    "tiles_reference",
]
