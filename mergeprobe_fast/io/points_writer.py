"""Writing points into the folder of a calibration that is being written."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..errors import InputError
from . import points
from .dtypes import STORAGE
from .points import POINTS_NAME, POINTS_TENSORS, PointsInfo
from .safetensors_stream import StreamWriter
from .strict_json import Bad


class PointsWriter:
    """Context manager: ``points.json`` and ``points.safetensors`` in a folder, as ``info`` says.

    Every declared tensor must have been written when the block is left, in any order. Write inside
    an ``AtomicFolder``. Raises ``InputError`` for a number that is not finite, naming point and
    adapter.
    """

    def __init__(self, folder: str | os.PathLike[str], info: PointsInfo) -> None:
        self._folder, self._info, self._stack = Path(folder), info, ExitStack()
        self._writer: StreamWriter | None = None

    def __enter__(self) -> PointsWriter:
        value = points.to_json(self._info)
        try:
            points.parse(value)
        except Bad as bad:  # what the reader would refuse is not written
            path = self._folder / POINTS_NAME
            raise InputError(bad.reason, path=path, key=bad.key) from None
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (self._folder / POINTS_NAME).write_bytes((text + "\n").encode("utf-8"))
        declared = self._info.declared()
        self._writer = self._stack.enter_context(
            StreamWriter(self._folder / POINTS_TENSORS, declared)
        )
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._stack.__exit__(*error)

    def write(self, key: str, **tensors: np.ndarray) -> None:
        """Tensors of one point, whole, by their names in the file (``phi_data=...``)."""
        for name, values in tensors.items():
            full = f"{name}.{key}"
            values = np.asarray(values)
            bad = ~np.isfinite(values)
            if bad.any():
                names, along = list(self._info.fingerprints), ""
                if values.ndim == 2:
                    along = f" along {names[int(np.argmax(bad.any(axis=0)))]}"
                raise InputError(f"is NaN or Inf{along}", key=full)
            dtype = self._info.declared()[full][0]
            self._writer.write(full, np.ascontiguousarray(values, STORAGE[dtype]))
