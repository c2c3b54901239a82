"""P2 on a CUDA device: numpy arrays in and out, around the kernels on ``Deltas.there``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mergeprobe_fast.ops.tiles import Norms, _Call
    from mergeprobe_fast.ops.tiles_rule import Deltas


def merge_dense(call: _Call, first: int, last: int) -> np.ndarray:
    """Those rows of the merged delta."""
    from mergeprobe_fast.kernels import merge_tiles

    return merge_tiles.merge_dense(*_arguments(call), rows=(first, last), **_fisher(call)).cpu()


def merge_sketch(
    call: _Call, x: np.ndarray, transpose: bool, minus: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """M X, M^T M X if asked for, and ||M||_F^2."""
    import torch

    from mergeprobe_fast.kernels import merge_tiles

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(call.deltas.there.device)

    y, z, squares = merge_tiles.merge_sketch(
        *_arguments(call), there(x), transpose=transpose,
        minus=None if minus is None else tuple(map(there, minus)), **_fisher(call),
    )  # fmt: skip
    return y.cpu().numpy(), None if z is None else z.cpu().numpy(), squares


def pruned_norms(call: _Call) -> Norms:
    """As ``ops.pruned_norms``."""
    from mergeprobe_fast.kernels.pruned_norms import pruned_norms as kernel

    return kernel(call.deltas.there, call.rule)


def order_statistics(
    groups: Sequence[Sequence[Deltas]], counts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """As ``ops.order_statistics``."""
    from mergeprobe_fast.kernels.order_statistics import order_statistics as kernel

    return kernel([[d.there for d in group] for group in groups], counts)


def _arguments(call: _Call) -> tuple:
    return call.deltas.there, call.weights, call.rule


def _fisher(call: _Call) -> dict:
    return {"fisher": None if call.fisher is None else call.fisher.there}
