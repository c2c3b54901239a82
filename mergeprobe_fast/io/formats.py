"""Adapters of any format: whether a path is one, opening it, and everything found in it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from . import peft
from .adapter import AdapterRef
from .atomic import is_temporary
from .layout import ModuleTable
from .peft import Examination, first_of
from .single_file import SUFFIX, examine_file, holds_adapter, is_single_file


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is, or means to be, an adapter: a PEFT folder, or a LoRA file.

    A broken one counts, so that opening it says what is wrong: a folder with a config or weights
    by name, a ``.safetensors`` file whose header names LoRA factors. Temporaries do not.
    """
    if not is_single_file(path):
        return peft.is_adapter(path)
    try:
        return not is_temporary(path) and holds_adapter(path)
    except InputError:
        return False


def examine(path: str | os.PathLike[str]) -> Examination:
    """Read everything but weights from an adapter; never raises, collects refusals."""
    return examine_file(path) if is_single_file(path) else peft.examine(path)


def open_adapter(path: str | os.PathLike[str], name: str | None = None) -> AdapterRef:
    """Open a PEFT folder or a kohya or diffusers file; headers are read and checked, no weight is.

    ``name`` defaults to the folder's name, or the file's without ``.safetensors``. Whatever is not
    exactly ``scale * B @ A`` on linear, embedding or Conv2d layers is one ``InputError`` naming
    file, key and reason; when there are more, it says how many.
    """
    found = examine(path)
    if found.refused:
        raise first_of(found.refused)
    assert found.plan and found.resolved and found.reading  # nothing refused
    return AdapterRef(
        name=name or default_name(found.path),
        path=found.path,
        format=found.format,
        base_model=found.reading.base_model,
        modules=ModuleTable(
            found.plan, found.headers, found.resolved.scales, found.reading.fan_in_fan_out
        ),
        config=found.config,
        notes=found.notes,
    )


def default_name(path: Path) -> str:
    """The name of an adapter that nobody named: the folder's, or the file's stem."""
    name = path.name or path.resolve().name
    return name.removesuffix(SUFFIX) if is_single_file(path) else name
