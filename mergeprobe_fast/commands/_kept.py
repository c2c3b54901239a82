"""What a command keeps beside its output: for one process at a time, and what it left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergeprobe_fast.engine.kept import LEFT_OUT, Files, digest, made_from
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import as_input_error
from mergeprobe_fast.recorded import NOTHING
from mergeprobe_fast.zoo import Zoo


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While the block runs, no other process is in such a block with the same folder.

    The folder is made, and removed if nothing is in it. Two at a time would take away each other's
    files. A file system without locks lets both in.

    Raises:
        InputError: another process is; this is no folder, or cannot be made.
    """
    try:
        held = _lock(folder)
    except OSError as error:
        raise as_input_error(error, folder) from error
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()
        if held is not None:
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A descriptor of the folder that holds its lock until it is closed, or the process ends."""
    if folder.exists() and not folder.is_dir():
        raise InputError("is not a folder", path=folder)
    if os.name != "posix":
        return None
    import fcntl

    while True:
        folder.mkdir(exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(FileNotFoundError):
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    reason = "another process is at work there; name another output folder"
                    raise InputError(reason, path=folder) from None
                except OSError:  # a file system without locks
                    pass
                if os.path.samestat(os.fstat(held), os.stat(folder)):
                    return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)  # removed meanwhile by the one who had it: once more


class LeftOut:
    """Why adapters of a zoo were left out, kept so that a call that goes on leaves out the same:
    what is kept of a pass belongs to one zoo, and the whole one would be begun anew each time."""

    def __init__(self, folder: Path, zoo: Zoo) -> None:
        self._files = Files(folder)
        paths = [os.fspath(a.path) for a in zoo]
        self._made_from = digest(made_from(zoo, [], NOTHING, profile=False), paths)
        header = self._files.header(LEFT_OUT, self._made_from)
        told = "[]" if header is None else header.metadata["errors"]
        self.errors = [InputError(r, path=p, key=k) for r, p, k in json.loads(told)]

    def add(self, error: InputError) -> None:
        """Keep one more."""
        self.errors.append(error)
        told = json.dumps([(e.reason, e.path, e.key) for e in self.errors])
        self._files.put(LEFT_OUT, self._made_from, {}, {"errors": told})
