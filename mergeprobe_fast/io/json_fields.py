"""Checks of the fields of our own JSON files; each raises ``Bad`` with the field's path as key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from .strict_json import Bad

LIMIT = 2**31 - 1  # of sizes and counts
Check = Callable[[Any, str], Any]


def fields(value: Any, where: str, **checks: Check) -> dict[str, Any]:
    """Exactly these fields of an object, each checked; ``where`` is its path, "" at the top."""
    if not isinstance(value, dict):
        raise Bad("is not an object", where or None)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in checks:
            raise Bad("is not a field of this format", prefix + key)
    for key in checks:
        if key not in value:
            raise Bad("is missing", prefix + key)
    return {key: check(value[key], prefix + key) for key, check in checks.items()}


def of_format(value: dict[str, Any], name: str, version: int) -> None:
    """The file says that it is of this format and version."""
    if value.get("format") != name:
        raise Bad(f"is not {name!r}", "format")
    found = value.get("version")
    if type(found) is not int or found != version:
        raise Bad(f"is {found!r}, this program reads {version}"[:200], "version")


def nullable(check: Check) -> Check:
    """The check, or null, which gives None."""
    return lambda value, where: None if value is None else check(value, where)


def many(check: Check, least: int = 0) -> Check:
    """A list of at least so many items, each checked; gives a tuple."""

    def checked(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Bad("is not a list", where)
        if len(value) < least:
            raise Bad("is empty" if not value else f"has less than {least} items", where)
        return tuple(check(item, f"{where}[{i}]") for i, item in enumerate(value))

    return checked


def named(check: Check) -> Check:
    """An object whose values are checked, with any keys."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Bad("is not an object", where)
        return {key: check(item, f"{where}.{key}") for key, item in value.items()}

    return checked


def text(value: Any, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise Bad("is not a text", where)
    return value


def flag(value: Any, where: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise Bad("is neither true nor false", where)
    return value


def natural(value: Any, where: str) -> int:
    """An integer from 0."""
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise Bad(f"is not an integer from 0 to {LIMIT}", where)
    return value


def count(value: Any, where: str) -> int:
    """An integer from 1."""
    if type(value) is not int or not 1 <= value <= LIMIT:
        raise Bad(f"is not an integer from 1 to {LIMIT}", where)
    return value


def number(value: Any, where: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise Bad("is not a finite number", where)
    return float(value)


def not_negative(value: Any, where: str) -> float:
    """A finite number from 0."""
    if number(value, where) < 0:
        raise Bad("is negative", where)
    return float(value)


def hexadecimal(digits: int) -> Check:
    """That many hexadecimal digits in lower case."""

    def checked(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise Bad(f"is not {digits} hexadecimal digits", where)
        return value

    return checked
