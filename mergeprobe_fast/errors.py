"""Exceptions. What is wrong with an input is one ``InputError`` naming file, key and reason."""

from __future__ import annotations

import os


class MergeprobeError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(MergeprobeError, ValueError):
    """A file, key or argument that cannot be used; nothing was written.

    ``str(error)`` is one line, ``path: key: reason``, with the parts that apply.
    """

    def __init__(
        self, reason: str, *, path: str | os.PathLike[str] | None = None, key: str | None = None
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.key = key
        self.reason = reason
        super().__init__(": ".join(part for part in (self.path, key, reason) if part))


class BackendError(MergeprobeError, RuntimeError):
    """A backend asked for by name is not available here, and why."""
