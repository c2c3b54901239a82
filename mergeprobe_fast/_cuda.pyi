"""The optional CUDA module (csrc/cuda_module.cpp); use mergeprobe_fast.ops, which documents it."""

from typing import Any, Literal, TypedDict

class _BuildInfo(TypedDict):
    toolkit: str
    architectures: str
    pybind11: str

def sign_pairs(
    factors: list[tuple[Any, Any, float]],
    counts: Any,
    bad: Any,
    workspace: Any,
    stream: int,
    engine: Literal["auto", "popcount", "matrix"] = "auto",
) -> None: ...
def sign_workspace(n: int, d_out: int, d_in: int, limit: int) -> int: ...
def devices() -> int: ...
def build_info() -> _BuildInfo: ...
