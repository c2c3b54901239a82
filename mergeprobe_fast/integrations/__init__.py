"""Drop-ins for other libraries, which are imported only when one is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["peft"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
