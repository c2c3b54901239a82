"""Which device a call runs on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from mergeprobe_fast.errors import BackendError, InputError

log = logging.getLogger("mergeprobe_fast")
Precision = Literal["highest", "high"]
_current: ContextVar[Any] = ContextVar("device", default=None)


@contextmanager
def computing_on(device: Any) -> Iterator[None]:
    """While the block runs, :func:`current_device` is ``device``, in this thread.

    Raises:
        BackendError: what the device itself fails at (no memory there, or none to lock), in a line.
    """
    token = _current.set(device)
    try:
        yield
    except Exception as error:
        reason = None if device is None else device.failure(error)
        if reason is None:
            raise
        raise BackendError(f"{device.torch}: {reason}") from error
    finally:
        _current.reset(token)


def current_device() -> Any:
    """What families of columns compute on: from :func:`open_device`; None: the CPU.

    Threads that a caller starts do not see it: read it once, before.
    """
    return _current.get()


def open_device(name: Any = "cpu", precision: Precision = "highest") -> Any | None:
    """The CUDA device of that name, or None for the CPU.

    Args:
        name: "cpu"; "cuda" or "cuda:1"; "auto": the current CUDA device if one can be used; or what
            this function returned before, which it returns again.
        precision: of products of float32 on a CUDA device: "highest" is good to 2^-20 of each,
            "high" rounds factors to tf32 (2^-10) and is several times as fast.

    Raises:
        InputError: another name.
        BackendError: no such device can be used here; "auto" says so in the log instead.
    """
    if name is None or hasattr(name, "copies"):  # opened before
        return name
    if not isinstance(name, str) or not re.fullmatch(r"cpu|auto|cuda(:\d+)?", name):
        raise InputError(f"expected cpu, cuda, cuda:<number> or auto, got {name!r}", key="device")
    if precision not in ("highest", "high"):
        raise InputError(f"expected 'highest' or 'high', got {precision!r}", key="precision")
    if name == "cpu":
        return None
    try:
        from mergeprobe_fast.kernels.device import Device

        device = Device("cuda" if name == "auto" else name, precision)
    except (ImportError, RuntimeError) as error:
        if name != "auto":
            raise BackendError(f"device {name} is not available: {error}") from error
        log.info("device auto: the CPU (%s)", error)
        return None
    if name == "auto":
        log.info("device auto: %s", device.torch)
    return device
