"""The primitives on LoRA factors: block Gram (P1) and canonical form (P3).

Checks and dispatch live here, speed in ``csrc`` and ``kernels``; :mod:`.reference` holds the
float64 definitions under the same names.
"""

from mergeprobe_fast.ops import reference
from mergeprobe_fast.ops.canonical import canonical
from mergeprobe_fast.ops.gram import block_gram

__all__ = ["block_gram", "canonical", "reference"]
