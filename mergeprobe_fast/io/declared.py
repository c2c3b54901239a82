"""Files that have to hold exactly the tensors that something beside them declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from . import safetensors
from .adapter import FactorRef


def read_declared(
    files: Sequence[Path], declared: Mapping[str, tuple[str, tuple[int, ...]]], what: str
) -> dict[str, FactorRef]:
    """Where each declared tensor lies: key -> its place; only headers are read.

    ``declared`` has (dtype name, shape) by key; ``what`` is what the files are, for messages.

    Raises:
        InputError: naming file and key of a tensor that is missing, not declared, there twice, or
            of another dtype or shape.
    """
    found: dict[str, FactorRef] = {}
    for path in files:
        for key, ref in safetensors.read_header(path).tensors.items():
            if key not in declared:
                raise InputError(f"is not a tensor of {what}", path=path, key=key)
            if key in found:
                raise InputError("is there twice", path=path, key=key)
            if (ref.dtype, ref.shape) != declared[key]:
                dtype, shape = declared[key]
                reason = f"is {ref.dtype} {ref.shape}, not {dtype} {shape}"
                raise InputError(reason, path=path, key=key)
            found[key] = ref
    for key in sorted(declared.keys() - found.keys()):
        raise InputError("is missing", path=files[-1], key=key)
    return found
