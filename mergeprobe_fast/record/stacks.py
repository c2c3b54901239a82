"""The factors of all adapters of a zoo, stacked by module, as tensors to run a model with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import AdapterRef, FactorRef, ModuleRef
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.io.read import read_into
from mergeprobe_fast.zoo import Zoo

from .capture import sizes

if TYPE_CHECKING:
    import torch

BUDGET = 2 * 10**9  # bytes of factors that stay in memory; beyond, they are read as needed


class Stack(NamedTuple):
    """Adapters on one module: ``delta_j = b[:, owner == j] @ a[owner == j]``."""

    a: torch.Tensor  # (R, d_in), R the sum of ranks
    b: torch.Tensor  # (d_out, R), with the scales in it
    owner: np.ndarray  # (R,) index of the adapter


def check_fit(zoo: Zoo, model: torch.nn.Module) -> None:
    """Raise ``InputError`` naming adapter and module for what cannot be put on the model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for adapter in zoo:
        for name, m in adapter.modules.items():
            module = modules.get(name)
            reason = None
            if module is None:
                reason = "the base model has no such module"
            elif m.kind != "linear" or not isinstance(module, (torch.nn.Linear, Conv1D)):
                reason = f"only linear modules can be measured, not {type(module).__name__}"
            elif sizes(module) != (m.d_in, m.d_out):
                d_in, d_out = sizes(module)
                reason = f"is {m.d_out} x {m.d_in}, in the base model {d_out} x {d_in}"
            if reason is not None:
                raise InputError(f"{adapter.name}: {reason}", path=adapter.path, key=name)


class Stacks:
    """The stack of each module that any adapter has, on a device and in a dtype.

    All of them are read once and kept where they take up to ``BUDGET``; else each is read whenever
    it is asked for.
    """

    def __init__(self, zoo: Zoo, dtype: torch.dtype, device: torch.device) -> None:
        self._zoo, self._dtype, self._device = zoo, dtype, device
        self.modules = tuple(m.name for m in zoo.modules)
        self.kept = self.total_nbytes(zoo, dtype) <= BUDGET
        self._stacks = {name: self._read(name) for name in self.modules if self.kept}

    @staticmethod
    def total_nbytes(zoo: Zoo, dtype: torch.dtype) -> int:
        """Bytes of all factors in this dtype."""
        return sum(adapter.parameters for adapter in zoo) * dtype.itemsize

    @staticmethod
    def peak_nbytes(zoo: Zoo, dtype: torch.dtype, workers: int) -> int:
        """Bytes in memory at most: all factors, or a module's for each worker and an adapter's."""
        total = Stacks.total_nbytes(zoo, dtype)
        if total <= BUDGET:
            return total
        largest = max(
            sum(
                a.modules[m.name].rank * (m.d_in + m.d_out) for a in zoo if m.name in a.modules
            )
            for m in zoo.modules
        )  # fmt: skip
        own = max(adapter.parameters for adapter in zoo)
        return (workers * largest + own) * 2 * dtype.itemsize  # as they are read, and stacked

    def __getitem__(self, module: str) -> Stack:
        return self._stacks[module] if self.kept else self._read(module)

    def of(self, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The factors of one adapter by module: A (r, d_in), and B (d_out, r) with its scale."""
        adapter = self._zoo[index]
        return {name: self._tensors([(adapter, m)]) for name, m in adapter.modules.items()}

    def _read(self, module: str) -> Stack:
        inside = [
            (i, a, a.modules[module]) for i, a in enumerate(self._zoo) if module in a.modules
        ]  # fmt: skip
        a, b = self._tensors([(adapter, m) for _, adapter, m in inside])
        owner = np.repeat([i for i, _, _ in inside], [m.rank for _, _, m in inside])
        return Stack(a, b, owner)

    def _tensors(
        self, members: list[tuple[AdapterRef, ModuleRef]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[A_1; A_2; ...] and [s_1 B_1, s_2 B_2, ...]."""
        import torch

        raw = _read_factors([ref for _, m in members for ref in (m.a, m.b)])
        for (adapter, m), a, b in zip(members, raw[::2], raw[1::2], strict=True):
            for ref, values in ((m.a, a), (m.b, b)):
                if not np.isfinite(values).all():
                    reason = f"{adapter.name}: has NaN or Inf"
                    raise InputError(reason, path=ref.file.path, key=ref.key)
        a = np.concatenate(
            [x.reshape(m.rank, m.d_in) for (_, m), x in zip(members, raw[::2], strict=True)]
        )
        # One rounding, of the scaled B.
        b = np.concatenate(
            [
                x.reshape(m.d_out, m.rank).astype(np.float64) * m.scale
                for (_, m), x in zip(members, raw[1::2], strict=True)
            ],
            axis=1,
        )
        place = {"dtype": self._dtype, "device": self._device}
        return torch.from_numpy(a).to(**place), torch.from_numpy(b).to(**place)


def _read_factors(refs: list[FactorRef]) -> list[np.ndarray]:
    """The tensors, float32, in their stored shapes."""
    raw = [np.empty(ref.shape, STORAGE[ref.dtype]) for ref in refs]
    files = list(dict.fromkeys(ref.file for ref in refs))
    index: Mapping[object, int] = {file: i for i, file in enumerate(files)}
    read_into(
        files, np.array([index[ref.file] for ref in refs]), np.array([r.offset for r in refs]),
        np.array([r.nbytes for r in refs]), np.array([x.ctypes.data for x in raw]), threads=1,
    )  # fmt: skip
    return [to_f32(x, ref.dtype) for ref, x in zip(refs, raw, strict=True)]
