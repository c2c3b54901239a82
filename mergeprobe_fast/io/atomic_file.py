"""Output files that appear as a whole or not at all."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..errors import InputError
from .atomic import as_input_error, make_parents, remove, sync, sync_folder


class AtomicFile:
    """Context manager: write the file it yields, and it becomes ``out`` at the end.

    The yielded path is a hidden sibling (``.name.tmp-…``), which nothing reads. On success it is
    synced and renamed; on any exception it is removed, with the parents that were made for it.

    An existing ``out`` is refused at once, or with ``overwrite`` replaced in one step. Refused in
    any case: a folder, a symbolic link, anything but a regular file, and with ``overwrite`` one of
    ``inputs``. Refusals, and ``OSError`` from the disk inside the block, are ``InputError``.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        # abspath and not resolve: a link in the last place is refused, not followed.
        self.out = Path(os.path.abspath(out))
        self._overwrite = overwrite
        self._inputs = [Path(path) for path in inputs]
        self._made: list[Path] = []
        self._temporary: Path | None = None

    def check(self) -> None:
        """Raise what entering would refuse, before any work is done; writes nothing."""
        out = self.out
        try:
            if "\0" in os.fspath(out):
                raise InputError("has a null character in its name", path=out)
            if out.parent.exists() and not out.parent.is_dir():
                raise InputError("cannot be written: Not a directory", path=out.parent)
            if out.is_symlink():
                raise InputError("is a symbolic link; name a file", path=out)
            if not out.exists():
                return
            if out.is_dir():
                raise InputError("is a folder; name a file", path=out)
            if not out.is_file():
                raise InputError("exists and is not a regular file", path=out)
            if not self._overwrite:
                raise InputError("exists; pass --overwrite to replace it", path=out)
            for path in self._inputs:
                if path.exists() and path.samefile(out):
                    raise InputError(f"would overwrite the input {path}", path=out)
        except OSError as error:
            raise as_input_error(error, out) from error

    def __enter__(self) -> Path:
        self.check()
        # File names are limited to 255 bytes; what matters is that the name is recognised.
        stem = os.fsencode(self.out.name)[:200].decode("utf-8", "ignore")
        self._temporary = self.out.with_name(f".{stem}.tmp-{os.urandom(8).hex()}")
        # An interrupt may come between two statements, where no handler is in force.
        self._leftover = weakref.finalize(self, remove, self._temporary, self._made)
        try:
            make_parents(self.out, self._made)
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
        if error is None:
            try:
                sync(self._temporary)
                self._publish()
                self._leftover.detach()
            except OSError as failure:
                self._discard()
                raise as_input_error(failure, self.out) from failure
            except BaseException:
                self._discard()
                raise
            return
        self._discard()
        if isinstance(error, OSError):
            raise as_input_error(error, self.out) from error
        if isinstance(error, InputError) and error.path == os.fspath(self._temporary):
            raise InputError(error.reason, path=self.out, key=error.key) from error

    def _publish(self) -> None:
        if self._overwrite:
            os.replace(self._temporary, self.out)
        else:
            try:
                os.link(self._temporary, self.out)  # fails where something appeared meanwhile
                self._temporary.unlink()
            except OSError as error:
                if error.errno == errno.EEXIST or self.out.exists():
                    raise
                os.rename(self._temporary, self.out)  # a file system without links
        sync_folder(self.out.parent)

    def _discard(self) -> None:
        remove(self._temporary, self._made)
        self._leftover.detach()
