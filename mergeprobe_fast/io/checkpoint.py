"""Base model folders: opening one without its weights, and writing it anew with some changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import strict_json
from .adapter import FactorRef, FileStamp
from .safetensors import SafetensorsHeader, read_header
from .shards import read_shards, read_weight_map

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The one sub-folder that transformers writes beside the files of a model.
TEMPLATES = "additional_chat_templates"
_PIECE = 4 << 20  # bytes copied at a time
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data",
    ".msgpack", ".h5", ".ot", ".tflite", ".npz", ".pkl", ".pickle", ".tar", ".zip",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model in transformers' layout: headers read and checked, no weight read.

    Attributes:
        path: the folder.
        config: its config.json.
        shards: the header of every weight file, by name.
        files: every other file that a copy of the model needs, relative to the folder.
        left_out: what lies there and belongs to no copy: weights in other formats, sub-folders,
            hidden files.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[SafetensorsHeader, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @cached_property
    def tensors(self) -> dict[str, FactorRef]:
        """Every tensor by key."""
        return {key: ref for shard in self.shards for key, ref in shard.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of a copy."""
        small = sum(os.stat(self.path / name).st_size for name in self.files)
        return small + sum(shard.stamp.size for shard in self.shards)

    @property
    def names(self) -> list[str]:
        """What a copy has in its folder."""
        small = (name.partition("/")[0] for name in self.files)
        return sorted({*small, *(shard.stamp.path.name for shard in self.shards)})


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the folder of a base model: config.json and model.safetensors, or shards and an index.

    Raises:
        InputError: no such folder, weights in another format only, a missing or truncated shard,
            an index that disagrees with the shards, a quantised model, an adapter beside the model.
    """
    folder = Path(path)
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
        folders = [e.name for e in entries if e.is_dir()]
        files = [e.name for e in entries if e.is_file()]
    except NotADirectoryError:
        raise InputError("is a file; name the folder of the base model", path=folder) from None
    except (OSError, ValueError) as error:
        raise strict_json.unreadable(folder, error) from error
    if CONFIG_NAME not in files:
        raise InputError(f"has no {CONFIG_NAME}: not the folder of a model", path=folder)
    for name in _ADAPTER:
        if name in files:
            reason = "an adapter beside the model, which transformers would add to it; move it away"
            raise InputError(reason, path=folder / name)
    config = strict_json.read(folder / CONFIG_NAME)
    _refuse_quantised(folder / CONFIG_NAME, config)
    shards = tuple(_read_shards(folder, files))
    weights = {shard.stamp.path.name for shard in shards}
    kept, left_out = [], [f"{name}/" for name in folders if name != TEMPLATES]
    for name in files:
        other = name.endswith((*_OTHER_WEIGHTS, ".bin.index.json")) or name.startswith(".")
        if other and name not in weights:
            left_out.append(name)
        elif name not in weights:
            kept.append(name)
    if TEMPLATES in folders:
        inside = sorted(os.scandir(folder / TEMPLATES), key=lambda e: e.name)
        kept += [f"{TEMPLATES}/{e.name}" for e in inside if e.is_file()]
    return Checkpoint(folder, config, shards, tuple(kept), tuple(sorted(left_out)))


def _refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    parts = {"": config} | {
        f"{key}.": value for key, value in config.items() if isinstance(value, dict)
    }
    for prefix, part in parts.items():
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                how = part[key].get("quant_method") if isinstance(part[key], dict) else None
                said = f" ({strict_json.printable(str(how))})" if how else ""
                raise InputError(
                    f"the base is quantised{said}: no update can be added to rounded weights; "
                    "give the model it was made from",
                    path=path, key=f"{prefix}{key}",
                )  # fmt: skip


def _read_shards(folder: Path, files: list[str]) -> Iterator[SafetensorsHeader]:
    if WEIGHTS_NAME in files and INDEX_NAME in files:
        raise InputError(f"has both {WEIGHTS_NAME} and {INDEX_NAME}", path=folder)
    if WEIGHTS_NAME in files:
        yield read_header(folder / WEIGHTS_NAME)
    elif INDEX_NAME in files:
        yield from _read_indexed(folder, files)
    else:
        found = [name for name in files if name.endswith(_OTHER_WEIGHTS)]
        instead = f" (it has {found[0]}); convert it to safetensors first" if found else ""
        raise InputError(f"has no {WEIGHTS_NAME} and no {INDEX_NAME}{instead}", path=folder)


def _read_indexed(folder: Path, files: list[str]) -> Iterator[SafetensorsHeader]:
    path = folder / INDEX_NAME
    weight_map = read_weight_map(
        path, lambda name: name.endswith(".safetensors") and os.path.basename(name) == name,
        "no name of a safetensors file",
    )  # fmt: skip
    for shard in sorted(set(weight_map.values()) - set(files)):
        raise InputError(f"is missing; {INDEX_NAME} names it", path=folder / shard)
    yield from read_shards(path, weight_map)


class CheckpointCopy:
    """Context manager: the files of a checkpoint in another folder, with some tensors replaced.

    Every weight file keeps its header and layout. Entering copies all bytes that are not
    ``replaced``; the tensors that are must be written in full before the block ends, in any order
    and from any thread. Nothing larger than a few MiB is held, and every byte of the base is read
    once. Use inside an ``AtomicFolder``.

    Raises ``InputError`` when a file of the base changes or shrinks before the block ends, or a
    tensor was not written; ``OSError`` from the disk.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: str | os.PathLike[str], replaced: Iterable[str]
    ) -> None:
        self._checkpoint, self._folder = checkpoint, Path(folder)
        self._left = {key: checkpoint.tensors[key].nbytes for key in replaced}
        self._lock = threading.Lock()
        self._open: dict[FileStamp, tuple[int, int]] = {}  # descriptors: of the base, of the copy
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointCopy:
        try:
            for name in self._checkpoint.files:
                self._copy_small(name)
            for shard in self._checkpoint.shards:
                self._copy_around(shard)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None:
                return
            for key, left in self._left.items():
                if left:
                    path = self._folder / self._checkpoint.tensors[key].file.path.name
                    raise InputError(f"{left} bytes were never written", path=path, key=key)
            for stamp, (source, _) in self._open.items():
                _check_unchanged(stamp, source)

    def read(self, ref: FactorRef, start: int, nbytes: int) -> bytes:
        """Bytes of a tensor of the base, from ``start`` bytes after where it begins."""
        return _read(self._open[ref.file][0], ref.offset + start, nbytes, ref.file.path)

    def write(self, ref: FactorRef, start: int, data: Any) -> None:
        """Bytes of a replaced tensor, each of them once."""
        view = memoryview(data).cast("B")
        _write(self._open[ref.file][1], ref.offset + start, view)
        with self._lock:
            self._left[ref.key] -= len(view)

    def _copy_small(self, name: str) -> None:
        path = self._checkpoint.path / name
        (self._folder / name).parent.mkdir(exist_ok=True)
        with _reading(path) as source, open(self._folder / name, "wb") as copy:
            before = os.fstat(source.fileno())
            _copy(source.fileno(), copy.fileno(), 0, before.st_size, path)
            after = os.fstat(source.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InputError("changed while it was read", path=path)

    def _copy_around(self, shard: SafetensorsHeader) -> None:
        """Open a weight file and its copy; copy the header and all tensors that stay."""
        stamp = shard.stamp
        source = self._stack.enter_context(_reading(stamp.path)).fileno()
        _check_unchanged(stamp, source)
        copy = self._stack.enter_context(open(self._folder / stamp.path.name, "wb")).fileno()
        os.truncate(copy, stamp.size)
        done = 0
        for key, ref in shard.tensors.items():
            if key in self._left:
                _copy(source, copy, done, ref.offset, stamp.path)
                done = ref.offset + ref.nbytes
        _copy(source, copy, done, stamp.size, stamp.path)
        self._open[stamp] = source, copy


def _reading(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise strict_json.unreadable(path, error) from error


def _check_unchanged(stamp: FileStamp, descriptor: int) -> None:
    try:
        found = [os.fstat(descriptor), os.stat(stamp.path)]
    except OSError as error:
        raise strict_json.unreadable(stamp.path, error) from error
    known = (stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode)
    for s in found:
        if (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) != known:
            raise InputError("changed while it was read", path=stamp.path)


def _read(descriptor: int, offset: int, nbytes: int, path: Path) -> bytes:
    pieces = []
    while nbytes:
        try:
            piece = os.pread(descriptor, nbytes, offset)
        except OSError as error:
            raise strict_json.unreadable(path, error) from error
        if not piece:
            raise InputError("became shorter while it was read", path=path)
        pieces.append(piece)
        offset, nbytes = offset + len(piece), nbytes - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        done = os.pwrite(descriptor, view, offset)
        offset, view = offset + done, view[done:]


def _copy(source: int, copy: int, start: int, end: int, path: Path) -> None:
    while start < end:
        piece = _read(source, start, min(_PIECE, end - start), path)
        _write(copy, start, memoryview(piece))
        start += len(piece)
