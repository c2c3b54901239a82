"""Sign statistics on a GPU: the compiled module ``_cuda`` on torch tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.ops.tiles import NotFinite

WORKSPACE = 1 << 29  # bytes for the bits of a slab, unless one tile of all deltas needs more


def sign_counts(
    factors: Any, *, engine: str = "auto", workspace: int = WORKSPACE
) -> tuple[np.ndarray, np.ndarray]:
    """(conflicts, both): (n, n) int64 in the upper triangle, as ``entry_pairs`` counts them.

    Everything runs on torch's current stream of the factors' device; it waits for the result alone.

    Args:
        factors: (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter: torch tensors on one CUDA
            device, float32, bfloat16, float16 or float64, any strides, read in place. Of a scale
            only the sign matters.
        engine: how bits are counted: "matrix" by the tensor core, "popcount" without, "auto" for
            "matrix" where the device has that instruction (compute capability 8 and 9).
        workspace: bytes to use at most, as far as they suffice for one tile.

    Raises:
        InputError: an argument that does not fit; :class:`NotFinite` for NaN or infinity.
        BackendError: the module is not there, or CUDA refuses a call; the message names it.
    """
    module = _native.cuda()
    if not isinstance(factors, (list, tuple)) or not factors:
        raise InputError("backend 'cuda' needs a list of (B, A, scale)", key="factors")
    given = [_plain(item, f"factors[{i}]") for i, item in enumerate(factors)]
    b, a, _ = given[0]
    device = getattr(b, "device", None)
    if getattr(device, "type", None) != "cuda":
        raise InputError("backend 'cuda' needs torch tensors on a CUDA device", key="factors[0]")
    import torch

    n, d_out, d_in = len(given), math.prod(b.shape[:1]), math.prod(a.shape[-1:])
    try:
        size = module.sign_workspace(n, d_out, d_in, workspace)
        result = torch.empty(2 * n * n + 1, dtype=torch.int64, device=device)
        module.sign_pairs(
            given, result[:-1].view(2, n, n), result[-1:],
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.cuda.current_stream(device).cuda_stream, engine,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        key, _, why = str(error).splitlines()[0].partition(": ")
        raise InputError(why, key=key) from None
    found = result.cpu().numpy()
    bad = int(found[-1])
    if bad < 2 * n:
        raise NotFinite(1 + bad % 2, bad // 2, "factors")
    conflicts, both = found[:-1].reshape(2, n, n)
    return conflicts, both


def _plain(item: Any, name: str) -> tuple[Any, Any, float]:
    """DLPack refuses tensors that require grad."""
    if not isinstance(item, (list, tuple)) or len(item) != 3:
        raise InputError("expected (B, A, scale)", key=name)
    b, a = (x.detach() if hasattr(x, "detach") else x for x in item[:2])
    try:
        return b, a, float(item[2])
    except (TypeError, ValueError):
        raise InputError("the scale is not a number", key=name) from None
