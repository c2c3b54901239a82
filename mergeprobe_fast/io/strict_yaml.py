"""YAML as people mean it: 1e-6 is a number, a date is a text, and no key stands twice."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

# YAML 1.1, which PyYAML follows, wants a dot in a float.
_FLOAT = re.compile(
    r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?\d+")


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document; ValueError with one line saying what is wrong, and where.

    Scalars are what YAML 1.2 takes them for (core schema). No tag runs code.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{problem}{line}") from None


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - a class attribute of PyYAML's

    for tag, pattern, first in (
        ("bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
        ("null", re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
        ("merge", re.compile("<<"), "<"),
    ):
        whole = re.compile(rf"(?:{pattern.pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    Loader.add_constructor("tag:yaml.org,2002:map", _unique)
    return Loader


def _unique(loader: Any, node: Any) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ValueError(f"{key.value!r} stands twice (line {key.start_mark.line + 1})")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)
