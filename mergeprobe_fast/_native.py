"""The compiled modules, loaded on first use: importing the package costs and changes nothing.

A failure is remembered and raised again with its cause.
"""

from __future__ import annotations

from types import ModuleType

from mergeprobe_fast import _env
from mergeprobe_fast.errors import BackendError

_core: ModuleType | None = None
_failure: ImportError | None = None
_cuda: ModuleType | None = None


def core() -> ModuleType:
    """The ``_core`` extension. BackendError when it is missing or does not load."""
    global _core, _failure
    if _core is None and _failure is None:
        try:
            from mergeprobe_fast import _core as module
        except ImportError as error:
            _failure = error
        else:
            _core = module
    if _core is None:
        raise BackendError(
            f"the compiled module mergeprobe_fast._core did not load ({_failure}); "
            "reinstall with a C++17 compiler present"
        ) from _failure
    return _core


def isa() -> str:
    """The instruction set in use: MERGEPROBE_ISA, or the best one; BackendError if absent."""
    available = core().available_isas()
    pinned = _env.pinned_isa()
    if pinned and pinned not in available:
        raise BackendError(
            f"MERGEPROBE_ISA={pinned}: not available here (this CPU and build have "
            f"{', '.join(available)})"
        )
    return pinned or available[0]


def cuda() -> ModuleType:
    """The ``_cuda`` extension. BackendError when it was not built or does not load.

    It loads where there is no GPU; what it launches there raises BackendError.
    """
    global _cuda
    if _cuda is None:
        try:
            from mergeprobe_fast import _cuda as module
        except ImportError as error:
            # Nothing by that name, or something that does not load: the message says which.
            raise BackendError(
                f"the compiled module mergeprobe_fast._cuda is not there ({error}); it is built "
                "where nvcc is found: MERGEPROBE_CUDA=on says what is missing"
            ) from error
        _cuda = module
    return _cuda
