"""What the A of an adapter starts from; its B always starts from zero."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ..model.batches import Row, cut
from ..model.suffix import Suffix
from ..model.whole import WholeModel

FLY_SHARE = 0.25  # of a row of FlyLoRA's A that is not zero: 8 of 32 in the paper


def random_rows(name: str, rank: int, d_in: int, seed: int) -> np.ndarray:
    """PEFT's own distribution, uniform within 1 / sqrt(d_in): float32 (rank, d_in).

    Row k depends on the module's name, the seed and k alone: adapters of one seed share their first
    rows whatever their ranks.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return ((2 * rng.random((rank, d_in)) - 1) / np.sqrt(d_in)).astype(np.float32)


def sparse_rows(name: str, rank: int, d_in: int, seed: int) -> np.ndarray:
    """FlyLoRA's A: in each row a share of ``FLY_SHARE`` drawn from N(0, 1 / rank^2), else zeros.

    Float32 (rank, d_in). The paper (Zou et al. 2025) also routes every token to a few rows by their
    size, which is no update of a weight and so cannot be merged; here all rows are used, always.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    a = np.zeros((rank, d_in), np.float32)
    count = max(1, int(d_in * FLY_SHARE))
    for row in a:
        row[rng.permutation(d_in)[:count]] = rng.standard_normal(count) / rank
    return a


def quiet_rows(moment: np.ndarray, rank: int) -> np.ndarray:
    """OSRM's A (Zhang and Zhou 2025): orthonormal rows on which the inputs are smallest.

    The eigenvectors of the smallest eigenvalues of ``moment`` (d_in, d_in), which minimise
    ||A X^T||_F under A A^T = I; float32 (rank, d_in), each with its largest entry positive.
    """
    from scipy.linalg import eigh  # only here: its import takes a while

    vectors = eigh(moment, subset_by_index=[0, rank - 1])[1].T
    largest = np.abs(vectors).argmax(axis=1)[:, None]
    return (vectors * np.sign(np.take_along_axis(vectors, largest, 1))).astype(np.float32)


def input_moments(
    suffix: Suffix | WholeModel, rows: Sequence[Row], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Mean second moment x x^T of the inputs of modules over all tokens, float64 (d_in, d_in).

    Of the model as it is now. Modules that are fed the same tensor share one array.
    """
    model = suffix.base.model
    # By the tensor it comes from: q, k and v, as gate and up, read one and the same.
    sums: dict[str, np.ndarray] = {}
    same: dict[str, str] = {}
    seen: list[tuple[torch.Tensor, str]] = []
    real: list[torch.Tensor] = []

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            for tensor, first in seen:
                if tensor is given[0]:
                    same[name] = first
                    return
            seen.append((given[0], name))
            x = given[0].reshape(*real[-1].shape, -1)[real[-1]]  # some models flatten it
            sums[name] = sums.get(name, 0.0) + (x.T @ x).double().cpu().numpy()

        return record

    states, count = suffix.states(rows), 0
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        for chosen, batch in cut(rows, suffix.base.device):
            real.append(batch.real)
            suffix.walk([states[n] for n in chosen], batch)
            seen.clear()
            count += int(batch.real.sum())
    return {name: sums[same.get(name, name)] / count for name in names}
