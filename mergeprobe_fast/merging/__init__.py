"""Merge operators: LoRA adapters in, one LoRA adapter out, from the factors alone."""

from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.merge import MERGE_METHODS, merge
from mergeprobe_fast.merging.methods import MergedModule, MergeMethod

__all__ = ["MERGE_METHODS", "MergeMethod", "MergedAdapter", "MergedModule", "merge"]
