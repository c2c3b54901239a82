"""Triton kernels of mergeprobe_fast.

Importing this package imports neither torch nor triton and touches no device; both are loaded when
a kernel is first asked for. `README.md` in this folder holds the derivations.
"""

from importlib import import_module

_MODULES = {
    "Rows": "gram_modules",
    "block_gram": "gram",
    "canonical_batch": "canonical",
    "gram_pass": "gram_modules",
    "singular_values": "canonical",
}

__all__ = ["Rows", "block_gram", "canonical_batch", "gram_pass", "singular_values"]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
