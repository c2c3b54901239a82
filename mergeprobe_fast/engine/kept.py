"""What is done of a pass, kept on disk: one that was killed goes on from there."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import mergeprobe_fast
from mergeprobe_fast import _native
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import as_input_error, is_temporary
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.dtypes import STORAGE
from mergeprobe_fast.io.safetensors import SafetensorsHeader, read_header, write

if TYPE_CHECKING:
    from mergeprobe_fast.engine.declare import Feature
    from mergeprobe_fast.recorded import Recorded
    from mergeprobe_fast.zoo import Zoo

_ENDING = ".safetensors"
_COLUMN = "column:"
_BLOCK = re.compile(r"\d+-\d+\.safetensors")
_OTHERS = re.compile(r"(family|sums)-.*\.safetensors")
LEFT_OUT = f"left-out{_ENDING}"  # what a command left out; see commands/_kept.py


class Files:
    """Safetensors files in a folder that say what they were made from.

    Args:
        folder: is made when the first file is kept. Nothing else may be in it; what a kill left of
            a file is removed.

    Raises:
        InputError: a folder with other files in it, or that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("is not a folder", path=self.folder)
        try:
            present = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", path=self.folder) from error
        for path in present:
            if not path.name.startswith(".") and not _ours(path.name):
                raise InputError("does not belong among blocks of a pass", path=path)
        for path in present:
            if is_temporary(path) and path.is_file():
                self.drop(path.name)

    def paths(self) -> Iterator[Path]:
        """Every file, by name."""
        if self.folder.is_dir():
            yield from sorted(p for p in self.folder.iterdir() if not p.name.startswith("."))

    def header(self, name: str, made_from: str) -> SafetensorsHeader | None:
        """That of a file; None: there is none, or it is half or made from something else, and
        removed."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            if header.metadata.get("made_from") == made_from:
                return header
        except InputError:  # half a file, of a machine that went down
            pass
        self.drop(name)
        return None

    def put(
        self, name: str, made_from: str, tensors: Mapping[str, np.ndarray], told: Mapping[str, str]
    ) -> None:
        """Keep a file; it is there as a whole or not at all.

        Raises:
            InputError: the disk, with its reason; an array of no dtype of safetensors.
        """
        told = {"made_from": made_from, **told}
        with AtomicFile(self.folder / name, overwrite=True) as temporary:
            write(temporary, {k: np.ascontiguousarray(v) for k, v in tensors.items()}, told)

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
        path = self.folder / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise as_input_error(error, path) from error


def storable(values: np.ndarray) -> bool:
    """Whether an array can be kept."""
    return values.dtype.newbyteorder("<") in STORAGE.values()


def read_into(header: SafetensorsHeader, arrays: Mapping[str, np.ndarray]) -> None:
    """Tensors of a file, into contiguous arrays of their shapes and dtypes.

    Raises:
        InputError: the file is no longer that of the header, as where another process keeps there.
    """
    tensors, stamp = header.tensors, header.stamp
    try:
        opened = stamp.path.open("rb", buffering=0)
    except FileNotFoundError:
        raise InputError("was removed by another process", path=stamp.path) from None
    with opened as file:
        found = os.fstat(file.fileno())
        if (found.st_ino, found.st_mtime_ns) != (stamp.inode, stamp.mtime_ns):
            raise InputError("was replaced by another process", path=stamp.path)
        for key, array in arrays.items():
            ref = tensors[key]
            if ref.shape != array.shape or STORAGE[ref.dtype] != array.dtype:
                raise InputError(f"{ref.dtype} {ref.shape}, expected {array.dtype} {array.shape}",
                                 path=header.stamp.path, key=key)  # fmt: skip
            file.seek(ref.offset)
            view = memoryview(array.reshape(-1).view(np.uint8))
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise InputError("shrank while it was read", path=header.stamp.path)
                view = view[count:]


def tensors_of(header: SafetensorsHeader) -> dict[str, np.ndarray]:
    """Every tensor of a file, in the order of their bytes."""
    found = {k: np.empty(ref.shape, STORAGE[ref.dtype]) for k, ref in header.tensors.items()}
    read_into(header, found)
    return found


class Done(NamedTuple):
    """What a pass found of one block of pairs.

    ``a``, ``b``: adapter indices; ``columns`` by name, ``profile`` (pairs, layers) or None;
    ``clipped`` values; ``sigma`` and ``rank`` of the factors of the block's adapters, where the
    block is the one of those adapters among themselves.
    """

    a: np.ndarray
    b: np.ndarray
    columns: dict[str, np.ndarray]
    profile: np.ndarray | None
    clipped: int
    sigma: np.ndarray | None
    rank: np.ndarray | None


class Kept:
    """The blocks of one pass in a folder; those of another one in it are removed.

    Args:
        folder: as of :class:`Files`.
        made_from: a digest of all that the blocks follow from (:func:`made_from`).
    """

    def __init__(self, folder: str | os.PathLike[str], made_from: str) -> None:
        self._files, self._made_from = Files(folder), made_from
        for path in self._files.paths():
            if _BLOCK.fullmatch(path.name):
                self._files.header(path.name, made_from)

    def get(self, first: int, second: int) -> Done | None:
        """The block of these two numbers; None: not done."""
        header = self._files.header(_block_name(first, second), self._made_from)
        if header is None:
            return None
        found = tensors_of(header)
        columns = {k.removeprefix(_COLUMN): v for k, v in found.items() if k.startswith(_COLUMN)}
        order = header.metadata["columns"].split(",") if columns else []
        return Done(
            found["a"], found["b"], {name: columns[name] for name in order}, found.get("profile"),
            int(header.metadata["clipped"]), found.get("sigma"), found.get("rank"),
        )  # fmt: skip

    def put(self, first: int, second: int, done: Done) -> None:
        """Keep a block; it is there as a whole or not at all."""
        tensors: dict[str, Any] = {"a": done.a, "b": done.b}
        tensors |= {_COLUMN + name: values for name, values in done.columns.items()}
        for name in ("profile", "sigma", "rank"):
            if getattr(done, name) is not None:
                tensors[name] = getattr(done, name)
        told = {"clipped": str(done.clipped), "columns": ",".join(done.columns)}
        self._files.put(_block_name(first, second), self._made_from, tensors, told)


def _block_name(first: int, second: int) -> str:
    return f"{first}-{second}{_ENDING}"


def _ours(name: str) -> bool:
    """Whether a file has a name of one that is kept."""
    return name == LEFT_OUT or any(kind.fullmatch(name) for kind in (_BLOCK, _OTHERS))


def kept_in(folder: str | os.PathLike[str]) -> str:
    """What a folder has, in words; empty for nothing."""
    names = [p.name for p in Path(folder).glob(f"*{_ENDING}")]
    blocks, others = (sum(kind.fullmatch(n) is not None for n in names)
                      for kind in (_BLOCK, _OTHERS))  # fmt: skip
    said = [f"{blocks} blocks of pairs"] if blocks else []
    if others:
        said.append(f"{others} famil{'y' if others == 1 else 'ies'} of statistics")
    return " and ".join(said)


def remove_blocks(folder: str | os.PathLike[str]) -> None:
    """All that is kept in a folder, what a kill left of it, and the folder if nothing else is."""
    if Path(folder).is_dir():
        for path in Path(folder).iterdir():
            if path.is_file() and (_ours(path.name) or is_temporary(path)):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file
            Path(folder).rmdir()


def made_from(
    zoo: Zoo, features: Sequence[Feature], recorded: Recorded, profile: bool
) -> str:
    """A digest of the adapters' files, what was recorded, the features, the instruction set and
    this version.

    Files count by size, time and inode: reading thousands of adapters to tell that nothing changed
    would take as long as a pass.
    """
    told = _Digest()
    told(mergeprobe_fast.__version__, _native.isa(), profile)
    for f in features:
        told(f.name, [str(n) for n in f.needs], f.definition, f.made_from, f.per_module, f.bounded)
    for adapter in zoo:
        files = {ref.file for m in adapter.modules.values() for ref in (m.a, m.b)}
        told(adapter.name, sorted((f.size, f.mtime_ns, f.inode) for f in files))
        told([(m.name, m.rank, m.d_out, m.d_in, m.scale) for m in adapter.modules.values()])
    if recorded.calibration is not None:
        told(recorded.domains, _stats(recorded.calibration.path))
    for snapshot in recorded.probes or ():
        while snapshot is not None:
            told(snapshot.path.name, _stats(snapshot.path))
            snapshot = snapshot.before
        told(None)
    if recorded.base is not None:
        told([(s.stamp.path.name, s.stamp.size, s.stamp.mtime_ns, s.stamp.inode)
              for s in recorded.base.shards])  # fmt: skip
    return told.hexdigest()


def keepable(features: Sequence[Feature]) -> bool:
    """Whether blocks can be kept: of a feature of a caller's own, whose ``finish`` may be another
    one by now, only if it says what that follows from."""

    def ours(function: Callable | None) -> bool:
        package = getattr(function, "__module__", "").partition(".")[0]
        return function is None or package == mergeprobe_fast.__name__

    return all(f.made_from is not None or (ours(f.finish) and ours(f.over_modules))
               for f in features)  # fmt: skip


def digest(*facts: Any) -> str:
    """Of what has a stable ``repr``."""
    told = _Digest()
    told(*facts)
    return told.hexdigest()


class _Digest:
    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self.hexdigest: Callable[[], str] = self._state.hexdigest

    def __call__(self, *facts: Any) -> None:
        self._state.update(repr(facts).encode("utf-8", "surrogatepass"))


def _stats(folder: Path) -> list[tuple[str, int, int]]:
    every = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in every]
