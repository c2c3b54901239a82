"""Times the weight metrics of 2601.22285's reference code on one pair, and prints a JSON line.

    python reference_2601.py FILE A B SCALE K THREADS

FILE is their mergeability.py, which needs nothing but torch; A and B are folders of adapters with
the update SCALE * B A of each module; K is the ``top_k`` of the overlaps. In a process of its own,
so that the peak of its memory is its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

Updates = dict[str, torch.Tensor]

PLAIN = (
    "task_vector_cosine_similarity", "task_vector_l2_distance", "task_vector_dot_product",
    "weight_space_angle", "task_vector_magnitude_ratio", "effective_rank",
    "effective_rank_mergeability_score", "stable_rank", "spectral_gap", "singular_value_ratio",
    "layerwise_effective_rank", "layerwise_effective_rank_mergeability_score",
    "singular_value_overlap",
)  # fmt: skip
BOTH_ENDS = ("right_subspace_overlap", "interaction_matrix_overlap")  # one call for top and bottom


def calls(theirs: ModuleType, a: Updates, b: Updates, k: int) -> dict[str, Callable[[], object]]:
    """What gives all 18 in the fewest singular value decompositions."""
    found = theirs.METRIC_REGISTRY
    return {
        **{name: lambda name=name: found[name](a, b) for name in PLAIN},
        **{
            name: lambda name=name: found[name](a, b, top_k=k)
            for name in ("subspace_overlap", *BOTH_ENDS)
        },
    }


def updates(folder: Path, scale: float) -> Updates:
    """The materialised update of every module of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.replace("lora_A", "delta"): scale * (tensors[key.replace("lora_A", "lora_B")] @ a)
        for key, a in tensors.items() if "lora_A" in key
    }  # fmt: skip


def main() -> None:
    """Seconds by part, and the 18 values by their names."""
    file, one, two, scale, k, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    spec = importlib.util.spec_from_file_location("reference_2601_metrics", file)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    small = [{"warm up": torch.randn(20, 20)} for _ in range(2)]
    for call in calls(theirs, *small, 10).values():
        call()

    began = time.perf_counter()
    a, b = (updates(Path(folder), float(scale)) for folder in (one, two))
    seconds, values = {"materialised": time.perf_counter() - began}, {}
    for name, call in calls(theirs, a, b, int(k)).items():
        began = time.perf_counter()
        got = call()
        seconds[name] = time.perf_counter() - began
        ends = (f"{name}_top_k", f"{name}_bottom_k") if name in BOTH_ENDS else (name,)
        values |= zip(ends, got if name in BOTH_ENDS else (got,), strict=True)
    print(json.dumps({"seconds": seconds, "values": values}))


if __name__ == "__main__":
    main()
