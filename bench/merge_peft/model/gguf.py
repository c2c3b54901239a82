"""A reader of GGUF files: the header, and tensors as float32 (types F32, Q4_1 and Q8_0)."""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError

# Of a field's value, by the number that the format gives its type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # weights that share one scale
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_STORAGE = {
    _F32: np.dtype("<f4"),
    _Q4_1: np.dtype([("scale", "<f2"), ("low", "<f2"), ("codes", "u1", _BLOCK // 2)]),
    _Q8_0: np.dtype([("scale", "<f2"), ("codes", "i1", _BLOCK)]),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; ``shape`` is row-major, as numpy has it."""

    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the start of the data


class GgufFile:
    """Header of a GGUF file of version 2 or 3, little endian, and its tensors on demand.

    Attributes:
        fields: metadata, names to values.
        tensors: names to :class:`GgufTensor`, in the order of the file.

    Raises:
        InputError: no such file, none of these versions, cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise InputError(f"cannot be read: {error}", path=self.path) from error
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(f"its header is damaged: {error}", path=self.path) from error

    def _read_header(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise InputError("is no GGUF file", path=self.path)
        self._at = 4
        version, tensor_count, field_count = self._take("IQQ")
        if version not in (2, 3):
            raise InputError(f"is GGUF version {version}; expected 2 or 3", path=self.path)
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._take_string()
            self.fields[name] = self._take_value(*self._take("I"))
        self.tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            name = self._take_string()
            (dimensions,) = self._take("I")
            shape = self._take(f"{dimensions}Q")[::-1]
            self.tensors[name] = GgufTensor(shape, *self._take("IQ"))
        alignment = self.field("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment

    def field(self, name: str, default: Any = None) -> Any:
        """A field's value; InputError when it is missing and there is no default."""
        value = self.fields.get(name, default)
        if value is None:
            raise InputError("is missing from the header", path=self.path, key=name)
        return value

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised as the format defines it: code * scale (+ low)."""
        entry = self.tensors.get(name)
        if entry is None:
            raise InputError("no such tensor", path=self.path, key=name)
        storage = _STORAGE.get(entry.kind)
        if storage is None:
            reason = f"has GGUF type {entry.kind}; supported are F32, Q4_1 and Q8_0"
            raise InputError(reason, path=self.path, key=name)
        block = 1 if entry.kind == _F32 else _BLOCK
        count, start = math.prod(entry.shape) // block, self._start + entry.offset
        if entry.shape[-1] % block:
            reason = f"rows of {entry.shape[-1]} are not whole blocks"
            raise InputError(reason, path=self.path, key=name)
        if start + count * storage.itemsize > len(self._bytes):
            raise InputError("lies beyond the end of the file", path=self.path, key=name)
        raw = np.frombuffer(self._bytes, storage, count, start)
        if entry.kind == _F32:
            return raw.reshape(entry.shape).copy()
        codes, scale = raw["codes"], raw["scale"].astype(np.float32)[:, None]
        if entry.kind == _Q8_0:
            return (codes * scale).reshape(entry.shape)
        # The low halves of the bytes are the first 16 weights of a block, the high ones the rest.
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        return (codes * scale + raw["low"].astype(np.float32)[:, None]).reshape(entry.shape)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._bytes, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _take_string(self) -> str:
        (length,) = self._take("Q")
        raw = self._bytes[self._at : self._at + length]
        if len(raw) < length:
            raise struct.error(f"a text of {length} bytes at byte {self._at} is cut short")
        self._at += length
        return raw.decode()

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind == _ARRAY:
            element, length = self._take("IQ")
            if element in _SCALARS:
                return list(self._take(f"{length}{_SCALARS[element]}"))
            return [self._take_value(element) for _ in range(length)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown type {kind} of a field before byte {self._at}")
        return self._take(_SCALARS[kind])[0]
