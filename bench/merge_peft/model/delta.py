"""An adapter's update in the weights of a model, for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.merging.adapter import MergedAdapter
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.zoo import Zoo, open_zoo

from .suffix import Suffix
from .whole import WholeModel

# A folder, an opened adapter, the result of a merge, or nothing.
Delta = AdapterRef | MergedAdapter | str | os.PathLike[str] | None
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


def factors_of(delta: Delta) -> Factors:
    """Module paths to float32 factors (B, A), scale in B: (d_out, rank) and (rank, d_in).

    Raises:
        InputError: no adapter there, or one that cannot be read; no linear layer; too large.
    """
    if delta is None:
        return {}
    if isinstance(delta, MergedAdapter):
        _refuse_other_kinds(delta.zoo)
        return {m.module.name: (m.b, m.a) for m in delta.modules}
    zoo = Zoo([delta]) if isinstance(delta, AdapterRef) else open_zoo([delta])
    if len(zoo) != 1:
        raise InputError(f"holds {len(zoo)} adapters; expected one", path=os.fspath(delta))
    _refuse_other_kinds(zoo)
    found = {}
    for chunk in ZooSource(zoo).chunks(threads=1):
        for m in chunk:
            ((b, a, scale),) = m.wide()  # float64: the scale is rounded with B, once
            with np.errstate(over="ignore"):
                b = (b * scale).astype(np.float32)
            if not np.isfinite(b).all():
                raise InputError("B times its scale is not finite in float32",
                                 path=os.fspath(zoo[0].path), key=m.module.name)  # fmt: skip
            found[m.module.name] = b, a.astype(np.float32)
    return found


@contextmanager
def applied(suffix: Suffix | WholeModel, delta: Delta) -> Iterator[None]:
    """While the weights are W + B A; after that they are the very tensors they were before.

    The sum is made in float32, in tensors of its own.

    Raises:
        InputError: as :func:`factors_of`; a module that the model lacks, whose shape is another, or
            that lies below the suffix, where nothing is run again.
    """
    changed: list[tuple[Any, torch.nn.Parameter]] = []
    try:
        for name, (b, a) in factors_of(delta).items():
            module = _target(suffix, name, (b.shape[0], a.shape[1]))
            weight = module.weight
            b, a = (torch.from_numpy(x).to(weight.device) for x in (b, a))
            new = torch.addmm(weight.detach(), b, a)
            changed.append((module, weight))
            module.weight = torch.nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for module, weight in reversed(changed):
            module.weight = weight


def _target(suffix: Suffix | WholeModel, name: str, shape: tuple[int, int]) -> torch.nn.Linear:
    model = suffix.base.model
    if not suffix.holds(name):
        raise InputError(f"is not in a layer from {suffix.first} on", key=name)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        reason = f"the base model {suffix.base.name} has no such module"
        raise InputError(reason, key=name) from None
    if type(module) is not torch.nn.Linear or tuple(module.weight.shape) != shape:
        found = tuple(module.weight.shape) if type(module) is torch.nn.Linear else type(module)
        raise InputError(f"{shape} does not fit the base model's {found}", key=name)
    return module


def _refuse_other_kinds(zoo: Zoo) -> None:
    for module in zoo.modules:
        if module.kind != "linear":
            raise InputError(f"is a {module.kind}; only linear layers are measured",
                             key=module.name)  # fmt: skip
