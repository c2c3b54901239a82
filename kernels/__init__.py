"""Triton kernels of mergeprobe_fast.

Importing this package imports neither torch nor triton and touches no device; both are loaded when
a kernel is first asked for. `README.md` in this folder holds the derivations.
"""

__all__ = ["block_gram"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .gram import block_gram
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "triton"):
            raise
        raise RuntimeError(
            f"the Triton backend needs the package {error.name!r}, which is not installed"
        ) from error
    return block_gram


def __dir__():
    return sorted([*globals(), *__all__])
