"""Triton kernels of mergeprobe_fast.

Importing this package imports neither torch nor triton and touches no device; both are loaded when
a kernel is first asked for. `README.md` in this folder holds the derivations.
"""

__all__ = ["block_gram"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .gram import block_gram

    return block_gram
