"""How ``finish`` of a feature is called: on the arrays of a device where it can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from mergeprobe_fast.engine.declare import Sums

log = logging.getLogger("mergeprobe_fast")
Finish = Callable[[Sums], np.ndarray]


class Finishing:
    """Calls functions of :class:`.declare.Sums`, on a device or (None) on the CPU.

    On a device they get arrays there that take what numpy does with each pair by itself. A function
    that does anything else (or returns another thing) gets numpy's arrays, one module at a time, as
    on the CPU, from then on.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._on_cpu: set[int] = set()  # their ids

    def of(self, sums: Sums, modules: int = 1) -> Callable[[Finish], np.ndarray]:
        """Gives a function's float64 values of ``sums``, which has those of modules in a row."""
        if self._device is None:
            return lambda finish: np.asarray(finish(sums), np.float64)
        pairs = len(sums.energy_a)
        there = _each(sums, lambda x: x.each_alone())
        here: list[Sums] = []

        def finished(finish: Finish) -> np.ndarray:
            if id(finish) not in self._on_cpu:
                try:
                    return _values(finish(there), pairs)
                except Exception as error:
                    if self._device.failure(error):
                        raise
                    log.info("a feature is finished on the CPU: %s", error)
                    self._on_cpu.add(id(finish))
            if not here:
                whole = _each(sums, host)
                here.extend(
                    _each(whole, lambda x, m=m: np.ascontiguousarray(
                        x.reshape(*x.shape[:-1], modules, -1)[..., m, :]
                    ))
                    for m in range(modules)
                )  # fmt: skip
            found = [np.asarray(finish(s), np.float64) for s in here]
            shape = here[0].energy_a.shape
            return self._device.array(np.concatenate([np.broadcast_to(x, shape) for x in found]))

        return finished


def host(values: Any) -> np.ndarray:
    """An array of a device as one of numpy; one of numpy as it is. Waits for the device."""
    return values if isinstance(values, np.ndarray) else values.download()


def _values(found: Any, pairs: int) -> Any:
    """What a function returned, as float64."""
    if getattr(found, "elementwise", False) and found.shape == (pairs,):
        return found.together().astype(np.float64, copy=False)
    raise TypeError(f"it returned {type(found).__name__}")


def _each(sums: Sums, change: Callable[[Any], Any]) -> Sums:
    """The same with all arrays changed."""
    values = (getattr(sums, f.name) for f in fields(Sums))
    return Sums(*(
        {need: change(x) for need, x in v.items()} if isinstance(v, dict) else change(v)
        for v in values
    ))  # fmt: skip
