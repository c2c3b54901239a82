"""Output folders that appear as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import InputError

_TEMPORARY = re.compile(r"\..*\.(tmp|old)-[0-9a-f]{16}", re.DOTALL)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NEW = 60.0  # seconds in which a folder may have been made and not yet been locked


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Whether a name is one that ``AtomicFolder`` gives to unfinished or replaced folders."""
    return _TEMPORARY.fullmatch(os.path.basename(os.fspath(path))) is not None


def make_parents(out: Path, made: list[Path]) -> None:
    """Make the folders above ``out`` that are missing; each one is added to ``made`` at once."""
    missing = []
    parent = out.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        made.append(folder)


def remove_parents(made: list[Path]) -> None:
    """Undo ``make_parents``, as far as nothing else has moved in meanwhile."""
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:
            return


def remove(temporary: Path, made: list[Path]) -> None:
    """Remove an unfinished folder or file and the parents made for it."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    remove_parents(made)


class AtomicFolder:
    """Context manager: write into the folder it yields, and it becomes ``out`` at the end.

    The yielded folder is a hidden sibling of ``out`` (``.name.tmp-…``). On success all files are
    synced to disk and the folder is renamed; on any exception it is removed, with the parents that
    were made for it. A killed process leaves only that hidden folder, which nothing reads; the next
    ``AtomicFolder`` for the same ``out`` removes it, where the system says that nobody holds it.

    An existing ``out`` is refused at once, or with ``overwrite`` replaced at the end. On Linux the
    two folders are exchanged in one step, so ``out`` is complete at every moment. Where the file
    system cannot do that, the old folder is first moved to ``.name.old-…``: a crash in just that
    instant leaves no ``out``, but the next ``AtomicFolder`` for it moves the old one back.

    Refused in any case: the root, the home folder, the current folder or one above it, something
    that is not a folder, a symbolic link, and with ``overwrite`` a folder that is, or contains, one
    of ``inputs``. With ``contents``, only a folder of exactly these files (or an empty one) is
    replaced: what somebody else put there is not ours to remove. Refusals, and ``OSError`` from
    the disk inside the block, are ``InputError``.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        inputs: Iterable[str | os.PathLike[str]] = (),
        contents: Iterable[str] | None = None,
    ) -> None:
        # abspath and not resolve: a link in the last place is refused, not followed.
        self.out = Path(os.path.abspath(out))
        self._overwrite = overwrite
        self._inputs = [Path(path) for path in inputs]
        self._contents = None if contents is None else frozenset(contents)
        self._made: list[Path] = []
        self._temporary: Path | None = None
        self._held: int | None = None

    def __enter__(self) -> Path:
        try:
            self._check()
            self._recover()
            self._check()
            self._temporary = self._sibling("tmp")
            # An interrupt may come between two statements, where no handler is in force.
            self._leftover = weakref.finalize(self, remove, self._temporary, self._made)
            make_parents(self.out, self._made)
            self._remove_killed()
            self._temporary.mkdir()
            self._held = _hold(self._temporary)
        except OSError as error:
            self._discard()
            raise as_input_error(error, self.out) from error
        return self._temporary

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                _sync_tree(self._temporary)
                self._publish()
                self._leftover.detach()
        except OSError as failure:
            self._discard()
            raise as_input_error(failure, self.out) from failure
        except BaseException:
            self._discard()
            raise
        finally:
            _let_go(self._held)
        if error is not None:
            self._discard()
            if isinstance(error, OSError):
                raise as_input_error(error, self.out) from error
            temporary = os.fspath(self._temporary)
            if isinstance(error, InputError) and (error.path or "").startswith(temporary):
                # Nobody has ever heard of the temporary folder, and it is gone.
                path = os.fspath(self.out) + error.path[len(temporary) :]
                raise InputError(error.reason, path=path, key=error.key) from error

    def check(self) -> None:
        """Raise what entering would refuse, before any work is done; writes nothing."""
        try:
            self._check()
        except OSError as error:
            raise as_input_error(error, self.out) from error

    def _check(self) -> None:
        out = self.out
        if "\0" in os.fspath(out):
            raise InputError("has a null character in its name", path=out)
        if not out.name:
            raise InputError("is the root of the file system", path=out)
        real = out.resolve()
        if real == Path.home().resolve():
            raise InputError("is the home folder", path=out)
        here = Path.cwd()
        if real == here or real in here.parents:
            raise InputError("is the current folder or one above it", path=out)
        if out.is_symlink():
            raise InputError("is a symbolic link; name a folder", path=out)
        if not out.exists():
            return
        if not out.is_dir():
            raise InputError("exists and is not a folder", path=out)
        if not self._overwrite:
            raise InputError("exists; pass --overwrite to replace it", path=out)
        for path in self._inputs:
            source = path.resolve()
            if source == real or real in source.parents:
                raise InputError(f"would overwrite the input {path}", path=out)
        present = sorted(os.listdir(out))
        if self._contents is None or not present:
            return
        foreign = [name for name in present if name not in self._contents]
        if foreign:
            reason = f"holds {foreign[0]!r}, which this command does not write; not overwritten"
            raise InputError(reason, path=out)
        missing = sorted(self._contents - set(present))
        if missing:
            reason = f"has no {missing[0]}: not a result of this command; not overwritten"
            raise InputError(reason, path=out)

    def _sibling(self, word: str) -> Path:
        # File names are limited to 255 bytes; what matters is that the name is recognised.
        stem = os.fsencode(self.out.name)[:200].decode("utf-8", "ignore")
        return self.out.with_name(f".{stem}.{word}-{os.urandom(8).hex()}")

    def _publish(self) -> None:
        temporary, out = self._temporary, self.out
        if self._overwrite and out.is_dir():
            if not _exchange(temporary, out):
                self._move_aside_and_publish()
                return
            # What is now under the temporary name is the old folder.
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            os.rename(temporary, out)
        sync_folder(out.parent)

    def _move_aside_and_publish(self) -> None:
        old = self._sibling("old")
        os.rename(self.out, old)
        try:
            os.rename(self._temporary, self.out)
        except OSError:
            os.rename(old, self.out)
            raise
        sync_folder(self.out.parent)
        # Half removed, it must not carry a name that ``_recover`` would bring back.
        doomed = self._sibling("tmp")
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _recover(self) -> None:
        """Undo the first half of a replacement that was killed between its two renames."""
        if os.path.lexists(self.out) or not self.out.parent.is_dir() or not self.out.name:
            return
        prefix = self._sibling("old").name[:-16]
        moved = [
            path
            for path in self.out.parent.iterdir()
            if path.name.startswith(prefix) and is_temporary(path)
        ]
        if moved:  # an earlier kill may have left another one: the last one moved is the result
            os.rename(max(moved, key=lambda path: path.stat().st_ctime_ns), self.out)

    def _remove_killed(self) -> None:
        """Remove what processes left that were killed while they wrote this ``out``."""
        prefix, now = self._sibling("tmp").name[:-16], time.time()
        for path in self.out.parent.iterdir():
            if not (path.name.startswith(prefix) and is_temporary(path)):
                continue
            with suppress(OSError):  # of another user, or gone meanwhile
                if now - path.stat().st_ctime > _NEW and (held := _hold(path)) is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _let_go(held)

    def _discard(self) -> None:
        if self._temporary is not None:
            remove(self._temporary, self._made)
            self._leftover.detach()


def _hold(folder: Path) -> int | None:
    """A lock on a folder as a descriptor; None where another process has it, or locks do not work.

    It ends with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _let_go(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def as_input_error(error: OSError, out: Path) -> InputError:
    """What the disk said, as an error about ``out``."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return InputError("exists; pass --overwrite to replace it", path=out)
    named = error.filename if isinstance(error.filename, str) else None
    about = f" ({named})" if named and not is_temporary(Path(named).parent) else ""
    return InputError(f"cannot be written: {reason}{about}", path=out)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(root, name), os.O_RDONLY)
        sync_folder(root)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder last."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> None:
    """Make the bytes of a file last."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    import ctypes  # only here: every import of the package would pay for it

    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    paths = (ctypes.c_char_p(os.fsencode(one)), ctypes.c_char_p(os.fsencode(other)))
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
