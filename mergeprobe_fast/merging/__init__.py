"""Merge operators: LoRA adapters in, one LoRA adapter out, from the factors alone."""

from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.into import merge_into
from mergeprobe_fast.merging.merge import merge
from mergeprobe_fast.merging.methods import Argument, MergedModule, MergeMethod
from mergeprobe_fast.merging.output import check_output
from mergeprobe_fast.merging.registry import MERGE_METHODS

__all__ = [
    "MERGE_METHODS",
    "Argument",
    "MergeMethod",
    "MergedAdapter",
    "MergedModule",
    "check_output",
    "merge",
    "merge_into",
]
