"""JSON objects as strictly as a hostile file deserves."""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any, NoReturn

from ..errors import InputError

_SPACE = " \t\n\r"  # JSON's own
_LONG = re.compile(rb"[0-9]{401}")
_MAX_JSON = 1 << 26  # bytes; a real adapter_config.json has some thousand


class Bad(Exception):
    """What is wrong with some bytes, before their path is known; never leaves this package."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = None if key is None else printable(key)


def printable(text: str) -> str:
    """A name from a file as it may stand in a one-line message."""
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if text.isprintable() else ascii(text)


def parse(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; duplicate keys, NaN, lone surrogates and deep nesting are ``Bad``."""
    value = _decode(raw, what, None)
    if not isinstance(value, dict):
        raise Bad(f"{what} is not a JSON object")
    return value


def split_first(raw: bytes, start: int, what: str) -> tuple[Any, bytes]:
    """The first value of an object, which begins at ``start``, and the object without it.

    As strict as ``parse`` about that value; the rest comes back unread.
    """
    value, end, text = _decode(raw, what, start)
    rest = text[end:].lstrip(_SPACE)
    if rest.startswith(","):
        rest = rest[1:].lstrip(_SPACE)
        if not rest.startswith('"'):
            raise Bad(f"{what} is not valid JSON: expected a key at character {end}")
    elif not rest.startswith("}"):
        raise Bad(f"{what} is not valid JSON: expected ',' at character {end}")
    return value, ("{" + rest).encode("utf-8")


def _decode(raw: bytes, what: str, start: int | None) -> Any:
    """The whole value; with ``start``, (the value that begins there, its end, the text)."""
    try:
        text = raw.decode("utf-8")
        decoder = json.JSONDecoder(
            # Only an escape can spell a lone surrogate: most files need no check for them.
            object_pairs_hook=_unique_unicode if b"\\u" in raw else _unique,
            parse_constant=_refuse_constant,
            # A function of our own for every integer is slow; most files have no long one.
            parse_int=_parse_int if _LONG.search(raw) else None,
        )
        if start is None:
            return decoder.decode(text)
        return (*decoder.raw_decode(text, start), text)
    except UnicodeDecodeError as error:
        raise Bad(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise Bad(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise Bad(f"{what} is not valid JSON: {error}") from None


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file; anything wrong is an ``InputError`` naming path and key."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Bad("is not a regular file")
        with open(path, "rb") as file:
            raw = file.read(_MAX_JSON + 1)
        if len(raw) > _MAX_JSON:
            raise Bad(f"is larger than {_MAX_JSON} bytes")
        return parse(raw, "the file")
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: str | os.PathLike[str], error: Exception) -> InputError:
    """The error of a file that the system, or a NUL in its name, keeps us from reading."""
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"cannot be read: {reason}", path=path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Bad("key appears twice", key)
            seen.add(key)
    return result


def _unique_unicode(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        _check_unicode(key)
        if isinstance(value, str):
            _check_unicode(value)
    return _unique(pairs)


def _check_unicode(text: str) -> None:
    """Raise ``Bad`` for a lone surrogate, which JSON can spell and no file name can hold."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Bad("text with a lone surrogate", text) from None


def _refuse_constant(name: str) -> NoReturn:
    raise Bad(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    # int() takes quadratic time in the digits (Python 3.10) or refuses them (3.11 and later).
    if len(digits) > 400:
        raise Bad(f"integer of {len(digits)} digits")
    return int(digits)
