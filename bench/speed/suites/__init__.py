"""One module per suite; each has ``cases(quick) -> list[Case]``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

SUITES = (
    "gram", "growth", "everyday", "screen", "merge", "operators", "sets", "entries", "angles",
    "metrics", "peers", "large_rank",
)  # fmt: skip
# With --device cuda, instead of those.
ON_DEVICE = ("device_gram", "device_merge", "device_canonical", "device_signs",
             "device_screen", "device_families")  # fmt: skip


def load(name: str) -> ModuleType:
    """The suite's module."""
    return import_module(f"suites.{name}")
