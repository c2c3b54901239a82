"""P2 on the GPU: what a rule keeps of each delta, as norms. See README.md."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from ..ops.tiles import Norms
from . import _configs
from ._deltas import guard
from ._merge_call import MergeCall
from ._norms_kernel import norms_kernel


def pruned_norms(factors, rule) -> Norms:
    """What ``rule.keep`` leaves of each delta, before ``rescale``: ``ops.pruned_norms``.

    The float32 entries are those of the merge kernel; sums are float64, always in the same order.

    Args:
        factors: as :func:`.merge_tiles.merge_dense` has them.
        rule: an ``ops.ElementwiseRule``.

    Returns:
        ``ops.Norms`` on the host.

    Raises:
        InputError: as :func:`.merge_tiles.merge_dense`.
    """
    call = MergeCall(factors, None, rule, None)
    total = torch.zeros((len(call.deltas), 7), dtype=torch.float64, device=call.device)
    with guard(call.device):
        for first, last in call.pieces(0, call.deltas.d_out):
            kernel, grid, named = norms_launch(call, first, last, call.limits(first, last))
            kernel[grid](**named)
            part = named["p_out"]
            top = torch.maximum(total[:, 4:6], part[..., 4:6].amax(1))
            total += part.sum(1)
            total[:, 4:6] = top
    found = total.cpu().numpy().T
    if not np.isfinite(found[:6]).all():
        raise InputError("the deltas overflow float32", key="factors")
    return Norms(*found[:6], found[6].astype(np.int64))


def norms_launch(call, first, last, limits):
    """(kernel, grid, arguments by name) for rows [first, last) of every delta."""
    d, config = call.deltas, call.deltas.tile(_configs.MERGE)
    (programs,) = call.grid(first, last)
    return (
        norms_kernel,
        (programs, len(d)),
        dict(
            p_u=d.U,
            p_v=d.V,
            p_whole=call.whole,
            p_real=call.real,
            p_limits=limits,
            p_out=torch.empty((len(d), programs, 7), dtype=torch.float64, device=call.device),
            first_row=first,
            last_row=last,
            d_in=d.d_in,
            tiles_j=-(-d.d_in // config.block_j),
            s_u=d.U.stride(0),
            s_v=d.V.stride(0),
            WHOLE_COLUMNS=call.whole.shape[1],
            REAL_COLUMNS=call.real.shape[1],
            KEEP=call.rule.keep,
            HIGH=call.high,
            ONE_KEY=d.size <= 2**32,
            RANK_STEP=d.rank_step,
            BLOCK_I=config.block_i,
            BLOCK_J=config.block_j,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        ),
    )
