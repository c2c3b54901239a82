"""A device that this machine has not: tensors that say "meta" and are computed on the CPU.

What a GPU refuses is refused here too: operations on tensors of both devices (but for single
numbers, and the CPU's indices), and numpy's view of memory that it cannot reach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Elsewhere(torch.Tensor):
    """A CPU tensor in disguise."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner.detach()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """While tensors can be made on ``DEVICE``; ``seen`` counts operations there."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Elsewhere) for x in tree_flatten((args, kwargs))[0]):
            self.seen += 1
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.__name__.split(".")[0]
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in flat if isinstance(x, Elsewhere)]
    device = kwargs.get("device")
    moving = name == "_to_copy" and device is not None
    copying = name == "copy_"
    here = [x for x in flat if not isinstance(x, Elsewhere) and x.dim()]
    if (
        there
        and here
        and not copying
        and not (name in _INDEXING and isinstance(args[0], Elsewhere))
    ):
        raise RuntimeError(f"{name}: tensors of both devices")
    if moving or (not there and device is not None):
        wrap = torch.device(device).type == DEVICE.type
    else:
        wrap = isinstance(args[0], Elsewhere) if copying else bool(there)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def unwrap(x: Any) -> Any:
        return x.inner if isinstance(x, Elsewhere) else x

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    for x in tree_flatten(out)[0]:
        if isinstance(x, torch.Tensor) and x.is_meta:
            raise RuntimeError(f"{name}: a tensor without data")
    if name.endswith("_") and not name.startswith("_") and flat:
        return args[0]  # in place
    return tree_map(lambda x: Elsewhere(x) if wrap and isinstance(x, torch.Tensor) else x, out)


def moved(model: Any) -> Any:
    """A model whose parameters and buffers are on the other device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    Elsewhere(parameter.detach()), requires_grad=False
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model
