"""Blocks of pairs that are done, kept on disk: a pass that was killed goes on from there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import mergeprobe_fast
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.dtypes import STORAGE
from mergeprobe_fast.io.safetensors import read_header, write

if TYPE_CHECKING:
    from mergeprobe_fast.engine.declare import Feature
    from mergeprobe_fast.recorded import Recorded
    from mergeprobe_fast.zoo import Zoo

_ENDING = ".safetensors"
_COLUMN = "column:"


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
    """A folder of blocks of one pass; blocks of another one in it are removed.

    Args:
        folder: is made when the first block is kept. Nothing but blocks may be in it.
        made_from: a digest of all that the blocks follow from (:func:`made_from`).

    Raises:
        InputError: a folder with other files in it.
    """

    def __init__(self, folder: str | os.PathLike[str], made_from: str) -> None:
        self.folder, self._made_from = Path(folder), made_from
        self.stale = 0  # blocks of another pass
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("is not a folder", path=self.folder)
        for path in self._files():
            if path.suffix != _ENDING:
                raise InputError("does not belong among blocks of a pass", path=path)
        for path in self._files():
            if not self._is_ours(path):
                path.unlink(missing_ok=True)
                self.stale += 1

    def get(self, first: int, second: int) -> Done | None:
        """The block of these two numbers; None: not done."""
        path = self._path(first, second)
        if not path.is_file():
            return None
        header = read_header(path)
        found: dict[str, np.ndarray] = {}
        with path.open("rb") as file:
            for key, ref in header.tensors.items():
                file.seek(ref.offset)
                found[key] = np.frombuffer(
                    bytearray(file.read(ref.nbytes)), STORAGE[ref.dtype]
                ).reshape(ref.shape)  # fmt: skip
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
        told = {"made_from": self._made_from, "clipped": str(done.clipped),
                "columns": ",".join(done.columns)}  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with AtomicFile(self._path(first, second), overwrite=True) as temporary:
            write(temporary, {k: np.ascontiguousarray(v) for k, v in tensors.items()}, told)

    def _path(self, first: int, second: int) -> Path:
        return self.folder / f"{first}-{second}{_ENDING}"

    def _files(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from sorted(p for p in self.folder.iterdir() if not p.name.startswith("."))

    def _is_ours(self, path: Path) -> bool:
        try:
            return read_header(path).metadata.get("made_from") == self._made_from
        except InputError:  # half a block, of a machine that went down
            return False


def kept_in(folder: str | os.PathLike[str]) -> int:
    """How many blocks a folder has."""
    return sum(1 for path in Path(folder).glob(f"*{_ENDING}") if not path.name.startswith("."))


def remove_blocks(folder: str | os.PathLike[str]) -> None:
    """All blocks in a folder, what a kill left of one, and the folder if nothing else is in it."""
    if Path(folder).is_dir():
        for path in Path(folder).glob(f"*{_ENDING}*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file
            Path(folder).rmdir()


def made_from(
    zoo: Zoo, features: Sequence[Feature], recorded: Recorded, profile: bool
) -> str:
    """A digest of the adapters' files, what was recorded, the features and this version.

    Files count by size, time and inode: reading thousands of adapters to tell that nothing changed
    would take as long as a pass.
    """
    digest = hashlib.sha256()

    def told(*facts: Any) -> None:
        digest.update(repr(facts).encode("utf-8", "surrogatepass"))

    told(mergeprobe_fast.__version__, profile)
    for f in features:
        told(f.name, [str(n) for n in f.needs], f.definition)
    for adapter in zoo:
        files = {ref.file for m in adapter.modules.values() for ref in (m.a, m.b)}
        told(adapter.name, sorted((f.size, f.mtime_ns, f.inode) for f in files))
        told([(m.name, m.rank, m.d_out, m.d_in, m.scale) for m in adapter.modules.values()])
    if recorded.calibration is not None:
        told(recorded.domains, _stats(recorded.calibration.path))
    return digest.hexdigest()


def _stats(folder: Path) -> list[tuple[str, int, int]]:
    every = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in every]
