"""What families of columns give, and what they have added up so far, kept on disk."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from mergeprobe_fast.engine.kept import Files, read_into, storable, tensors_of
from mergeprobe_fast.io.safetensors import SafetensorsHeader

Arrays = Mapping[str, np.ndarray]
# Between two writes: so much work is lost by a kill. A write that takes long is rarer, so that
# writing never takes more than a share of the time.
SECONDS = 30.0
SHARE = 0.02
# Seconds that a family must take for its columns to be kept.
WORTH = 2.0


class Sums:
    """The sums of one pass: a file that is replaced again and again.

    ``step``: of how many steps the kept sums are; those before it need not be done again. What a
    step is, is up to the pass, which numbers them from 1 in the order in which it does them.
    """

    def __init__(self, files: Files | None, name: str, made_from: str) -> None:
        self._files, self._name, self._made_from = files, name, made_from
        self._header: SafetensorsHeader | None = None
        if files is not None:
            self._header = files.header(name, made_from)
        self.step = 0 if self._header is None else int(self._header.metadata["step"])
        self._pause, self._since = SECONDS, time.monotonic()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Fill contiguous arrays with what was kept under their names; as they are at step 0."""
        if self._header is not None:
            read_into(self._header, arrays)

    def reached(self, step: int, arrays: Arrays | Callable[[], Arrays]) -> None:
        """``step`` steps are done, and ``arrays`` are what to go on from, or give it if called."""
        if self._files is None or time.monotonic() - self._since < self._pause:
            return
        started = time.monotonic()
        arrays = arrays() if callable(arrays) else arrays
        self._files.put(self._name, self._made_from, arrays, {"step": str(step)})
        self._since = time.monotonic()
        self._pause = max(SECONDS, (self._since - started) / SHARE)


_sums: ContextVar[Sums | None] = ContextVar("sums so far", default=None)


def sums_so_far() -> Sums:
    """Those of the pass that this is; at step 0, and nowhere, where nothing is kept."""
    return _sums.get() or Sums(None, "", "")


@contextmanager
def keeping_sums(sums: Sums) -> Iterator[None]:
    """While the block runs, :func:`sums_so_far` gives these."""
    token = _sums.set(sums)
    try:
        yield
    finally:
        _sums.reset(token)


class KeptFamily:
    """What a family gives, by name: kept when it is done, and what it has added up till then.

    Without ``files`` nothing is kept.
    """

    def __init__(self, files: Files | None, name: str, made_from: str) -> None:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
        self._files, self._made_from = files, made_from
        self._name, self._sums_name = f"family-{name}.safetensors", f"sums-{name}.safetensors"
        self.sums = Sums(files, self._sums_name, made_from)

    def get(self) -> dict[str, np.ndarray] | None:
        """All values; None: not done."""
        header = None if self._files is None else self._files.header(self._name, self._made_from)
        if header is None:
            return None
        self._files.drop(self._sums_name)
        return tensors_of(header)

    def put(self, values: Mapping[str, np.ndarray], seconds: float) -> None:
        """Keep all values, which took ``seconds``; its sums are no longer needed. Text and what
        else has no dtype of safetensors is not kept."""
        if self._files is None:
            return
        if (seconds >= WORTH or self.sums.step) and all(map(storable, values.values())):
            self._files.put(self._name, self._made_from, values, {})
        self._files.drop(self._sums_name)
