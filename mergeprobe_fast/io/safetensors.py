"""The safetensors container: a strict header reader and a deterministic writer.

Both are ours on purpose. The reader reads no tensor byte and trusts no number it finds. The writer
gives the bytes that safetensors gives, but works alike with every version of it, and it is
deterministic with several metadata entries too, which the library writes in a random order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import strict_json
from .adapter import FactorRef, FileStamp
from .dtypes import DTYPE_BITS, STORAGE
from .strict_json import Bad

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_ELEMENTS = 2**63 - 1
_MAX_CACHED_HEADER = 1 << 20  # bytes; a larger header is parsed anew for each file
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

TensorLike = np.ndarray | tuple[str, tuple[int, ...], Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as a header declares it; ``start`` counts bytes from the end of the header."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class HeaderLayout:
    """The tensors of a header. Files that declare the same ones share one object."""

    entries: tuple[Entry, ...]  # in the order of their bytes
    data_nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of one file: which tensors it holds and where."""

    stamp: FileStamp
    layout: HeaderLayout
    data_start: int  # bytes from the start of the file
    texts: tuple[tuple[str, str], ...]  # __metadata__

    @property
    def tensors(self) -> dict[str, FactorRef]:
        """Every tensor by key, in the order of their bytes, of any dtype."""
        start = self.data_start
        return {
            e.key: FactorRef(self.stamp, e.key, e.dtype, e.shape, start + e.start, e.nbytes)
            for e in self.layout.entries
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The free text entries of the header."""
        return dict(self.texts)


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; no tensor byte is read.

    Raises ``InputError`` with path, key and reason for anything but a complete, well-formed file
    whose tensors tile it without holes, and for pickles, which are never opened.
    """
    header = _read_header(path)
    expected = header.data_start + header.layout.data_nbytes
    if header.stamp.size != expected:
        what = "is truncated" if header.stamp.size < expected else "has bytes that no tensor owns"
        reason = f"{what}: {header.stamp.size} bytes, the header declares {expected}"
        raise InputError(reason, path=path)
    return header


def peek(path: str | os.PathLike[str]) -> HeaderLayout:
    """What a header declares, whether or not the rest of the file is there.

    Raises ``InputError`` as ``read_header`` does, but not for the file's length.
    """
    return _read_header(path).layout


def _read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    refuse_pickle(path)
    try:
        stamp, raw = _read_raw(path)
        layout, texts = _parse(raw)
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise strict_json.unreadable(path, error) from error
    return SafetensorsHeader(stamp, layout, 8 + len(raw), texts)


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raise ``InputError`` when the name says pickle: opening one may run code."""
    if os.path.splitext(os.fspath(path))[1].lower() in _PICKLE_SUFFIXES:
        raise InputError(
            "is a pickle, which can run code when opened; convert to safetensors", path=path
        )


def _read_raw(path: str | os.PathLike[str]) -> tuple[FileStamp, bytes]:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
        raise Bad("is not a regular file")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        prefix = file.read(8)
        if len(prefix) < 8:
            raise Bad(f"is no safetensors file: {len(prefix)} bytes, the header needs 8 or more")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise Bad(f"declares a header of {length} bytes; the limit is {MAX_HEADER}")
        if length > status.st_size - 8:
            raise Bad(f"is truncated: header of {length} bytes in a file of {status.st_size}")
        raw = file.read(length)
    if len(raw) != length:
        raise Bad(f"is truncated: {len(raw)} of {length} header bytes could be read")
    stamp = FileStamp(
        Path(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    )
    return stamp, raw


def _parse(raw: bytes) -> tuple[HeaderLayout, tuple[tuple[str, str], ...]]:
    if not raw.startswith(b"{"):
        raise Bad("header is not a JSON object")
    first = None
    if raw.startswith(b'{"__metadata__":{'):
        # Written first, and often the only part that differs between files of one recipe.
        first, raw = strict_json.split_first(raw, len(b'{"__metadata__":'), "header")
    raw = raw.rstrip(b" ")  # the padding depends on the metadata too
    parse = _parse_cached if len(raw) <= _MAX_CACHED_HEADER else _parse_tensors
    layout, later = parse(raw)
    if first is None:
        return layout, () if later is None else later
    if later is not None:
        raise Bad("key appears twice", "__metadata__")
    return layout, _metadata(first)


def _parse_tensors(raw: bytes) -> tuple[HeaderLayout, tuple[tuple[str, str], ...] | None]:
    fields = strict_json.parse(raw, "header")
    metadata = _metadata(fields.pop("__metadata__")) if "__metadata__" in fields else None
    entries = sorted((_entry(*item) for item in fields.items()), key=_position)
    end = 0
    for entry in entries:
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "leaves a hole before it"
            raise Bad(f"{what}: starts at {entry.start}, expected {end}", entry.key)
        end += entry.nbytes
    return HeaderLayout(tuple(entries), end), metadata


# Adapters trained with one recipe have the same header bytes: a zoo parses each header once.
_parse_cached = lru_cache(maxsize=128)(_parse_tensors)


def _position(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.nbytes


def _metadata(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise Bad("is not an object of strings", "__metadata__")
    for key, text in value.items():
        if not isinstance(text, str):
            raise Bad(f"value of {key!r} is not a string", "__metadata__")
    return tuple(value.items())


def _entry(key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise Bad("needs exactly dtype, shape and data_offsets", key)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise Bad(f"unknown dtype {dtype!r}"[:200], key)
    if not _is_sizes(shape):
        raise Bad("shape is not a list of non-negative 63-bit integers", key)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Bad("data_offsets is not [start, end] with 0 <= start <= end", key)
    start, nbytes = offsets[0], offsets[1] - offsets[0]
    total = _elements(shape, key) * bits
    if total != nbytes * 8:
        raise Bad(f"{dtype} of shape {shape} does not take {nbytes} bytes", key)
    # Interned: a zoo holds the same few keys, dtypes and shapes a thousand times.
    return Entry(sys.intern(key), sys.intern(dtype), _shared(tuple(shape)), start, nbytes)


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _is_sizes(values: Any) -> bool:
    # ``type(v) is int`` and not isinstance: true would pass for 1.
    if type(values) is not list:
        return False
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_ELEMENTS:
            return False
    return True


def _elements(shape: list[int], key: str) -> int:
    count = 1
    for size in shape:  # each step, so that a final 0 cannot hide an overflow
        count *= size
        if count > _MAX_ELEMENTS:
            raise Bad("shape overflows 63 bits", key)
    return count


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; the same input in any order gives the same bytes.

    A tensor is a numpy array, or ``(dtype name, shape, bytes-like)`` for dtypes numpy lacks
    (BF16 as its uint16 bits). Tensors are laid out as safetensors does, widest dtype first and
    then by key, metadata sorted by key. Errors are ``InputError`` (a tensor that does not fit its
    declaration) or ``OSError`` (the disk); write inside an ``AtomicFolder``.
    """
    items = {key: _as_bytes(key, value, path) for key, value in tensors.items()}
    text, starts, _ = plan({key: item[:2] for key, item in items.items()}, metadata, path)
    with open(path, "wb") as file:
        file.write(text)
        for key in starts:
            file.write(items[key][2])


def data_sha256(tensors: Mapping[str, TensorLike]) -> str:
    """SHA-256 of all bytes behind the header that ``write`` would give these tensors."""
    items = {key: _as_bytes(key, value, None) for key, value in tensors.items()}
    _, starts, _ = plan({key: item[:2] for key, item in items.items()}, None, None)
    digest = hashlib.sha256()
    for key in starts:
        digest.update(items[key][2])
    return digest.hexdigest()


def plan(
    declared: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str] | None, path: Any
) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the tensors, where each tensor begins behind them, in order, and their sum.

    ``declared`` maps a key to (dtype name, shape); tensors are laid out as ``write`` says.
    """
    if "__metadata__" in declared:
        raise InputError("is a reserved key", path=path, key="__metadata__")
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    starts, end = {}, 0
    for key in sorted(declared, key=lambda key: (_RANK[declared[key][0]], key)):
        dtype, shape = declared[key]
        starts[key] = end
        end += math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start on an 8-byte boundary
    return len(text).to_bytes(8, "little") + text, starts, end


# As safetensors orders tensors: by its enum of dtypes, downwards, then by key.
_RANK = {name: -position for position, name in enumerate(DTYPE_BITS)}


def _as_bytes(key: str, value: TensorLike, path: Any) -> tuple[str, list[int], memoryview]:
    if isinstance(value, np.ndarray):
        little = value.dtype.newbyteorder("<")
        names = [n for n, storage in STORAGE.items() if storage == little and n != "BF16"]
        if not names:
            raise InputError(f"numpy dtype {value.dtype} is not stored", path=path, key=key)
        data = np.ascontiguousarray(value, dtype=little).reshape(-1).view(np.uint8)
        return names[0], list(value.shape), memoryview(data)
    dtype, shape, raw = value
    if isinstance(raw, np.ndarray):
        data = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    else:
        data = np.frombuffer(raw, dtype=np.uint8)
    if dtype not in DTYPE_BITS or math.prod(shape) * DTYPE_BITS[dtype] != data.nbytes * 8:
        reason = f"{dtype} of shape {tuple(shape)} does not take {data.nbytes} bytes"
        raise InputError(reason, path=path, key=key)
    return dtype, [int(size) for size in shape], memoryview(data)
