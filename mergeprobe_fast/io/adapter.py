"""What every format is read into: where an adapter's factors lie, not the factors themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ModuleKind = Literal["linear", "embedding", "conv2d"]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Identity of a file when its header was read; a later read refuses a file that changed."""

    path: Path
    size: int  # bytes
    mtime_ns: int
    # A copy that keeps size and time still has another inode, or another time of status change.
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class FactorRef:
    """One tensor inside a safetensors file, row-major."""

    file: FileStamp
    key: str
    dtype: str  # safetensors name: "F32", "BF16" or "F16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """One adapted layer: ``delta = scale * B @ A`` with A (rank, d_in) and B (d_out, rank).

    ``d_in`` and ``d_out`` are the sizes after flattening: a Conv2d A (r, in, kh, kw) is read as
    (r, in*kh*kw) and its B (out, r, 1, 1) as (out, r); an embedding's A is (r, vocabulary) and its
    B (dim, r), so its delta here is the transpose of what is added to the (vocabulary, dim) table.
    """

    name: str  # full path in the base model, e.g. "model.layers.0.self_attn.q_proj"
    kind: ModuleKind
    rank: int
    d_in: int
    d_out: int
    scale: float
    a: FactorRef
    b: FactorRef
    fan_in_fan_out: bool = False  # the base stores its weight as (in, out)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One opened adapter: headers read and validated, no weight read yet."""

    name: str  # unique within a zoo; the folder name unless that is ambiguous
    path: Path  # the folder, or the file of a format without one
    format: str  # "peft", "kohya" or "diffusers"
    base_model: str | None  # as declared; None when the config does not say
    modules: Mapping[str, ModuleRef]  # sorted by name; the refs are made when asked for
    config: dict[str, Any]  # the adapter_config.json as read; of a file, what writing back needs
    notes: tuple[str, ...] = field(default=())  # what a reader of the report should know

    @property
    def parameters(self) -> int:
        """Number of weights in all factors."""
        return sum(math.prod(m.a.shape) + math.prod(m.b.shape) for m in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors on disk."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())
