"""Numbers that depend on the module: one value, a list of filters, or a gradient over the layers.

As in mergekit's YAML, a value may be

- a number, for every module;
- a list of numbers, interpolated over the numbered layers from the first to the last (embeddings
  get the first number, a head the last);
- a list of ``{"filter": pattern, "value": number}``, the first filter that fits decides; an entry
  without "filter" fits every module. A pattern with ``*``, ``?`` or ``[`` must fit the module path
  from its start or from after a dot to its end (fnmatch), any other is looked for inside it.
  Values may be gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.zoo import Module


def table(
    value: Any, names: Sequence[str], modules: Sequence[Module], key: str
) -> np.ndarray:
    """A (modules, adapters) array from one value for all adapters, or a list or mapping of them.

    A list has one entry per adapter, a mapping one per adapter name. A list of numbers is one
    number per adapter, never a gradient: wrap a gradient in a filter, or in the adapter's entry.

    Raises:
        InputError: entries that are missing, unknown or no numbers; a filter that fits no module.
    """
    if isinstance(value, Mapping) and "value" not in value:
        unknown = sorted(set(value) - set(names), key=str)
        if unknown:
            raise InputError(f"names {unknown[0]!r}, which is no adapter here", key=key)
        missing = [name for name in names if name not in value]
        if missing:
            raise InputError(f"has no value for {missing[0]!r}", key=key)
        entries = [value[name] for name in names]
    elif isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
        if len(value) and all(isinstance(v, Mapping) and "value" in v for v in value):
            entries = [value] * len(names)
        else:
            entries = list(value)
    else:
        entries = [value] * len(names)
    if len(entries) != len(names):
        raise InputError(f"expected one for each of {len(names)} adapters, got {len(entries)}",
                         key=key)  # fmt: skip
    return np.stack([column(entry, modules, key) for entry in entries], axis=1)


def column(value: Any, modules: Sequence[Module], key: str) -> np.ndarray:
    """One number per module."""
    if isinstance(value, Mapping):
        value = [value]
    listed = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
    if not listed:
        return np.full(len(modules), _number(value, key))
    if len(value) == 0:
        raise InputError("is an empty list", key=key)
    if not any(isinstance(v, Mapping) for v in value):
        return _gradient([_number(v, key) for v in value], modules)
    out = np.full(len(modules), np.nan)
    for rule in value:
        if not isinstance(rule, Mapping) or set(rule) - {"filter", "value"} or "value" not in rule:
            raise InputError(f"expected {{filter, value}}, got {rule!r}", key=key)
        fits = np.array([_fits(rule.get("filter"), m.name, key) for m in modules], bool)
        if not fits.any():
            raise InputError(f"filter {rule.get('filter')!r} fits no module", key=key)
        out = np.where(fits & np.isnan(out), column(rule["value"], modules, key), out)
    if np.isnan(out).any():
        name = modules[int(np.argmax(np.isnan(out)))].name
        raise InputError(f"no filter fits {name}; add an entry without a filter", key=key)
    return out


def _gradient(values: Sequence[float], modules: Sequence[Module]) -> np.ndarray:
    layers = list(dict.fromkeys(m.layer for m in modules if _in_layer(m)))
    place = {layer: i / max(1, len(layers) - 1) for i, layer in enumerate(layers)}
    at = [
        place[m.layer] if _in_layer(m) else 0.0 if m.kind == "embedding" else 1.0 for m in modules
    ]
    return np.interp(at, np.linspace(0, 1, len(values)), values)


def _in_layer(m: Module) -> bool:
    """Whether the module lies in a numbered layer; an embedding or a head does not."""
    return any(c.isdigit() for c in m.layer)


def _fits(pattern: Any, name: str, key: str) -> bool:
    if pattern is None:
        return True
    if not isinstance(pattern, str):
        raise InputError(f"a filter is a text, got {pattern!r}", key=key)
    if not any(c in pattern for c in "*?["):
        return pattern in name
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _number(value: Any, key: str) -> float:
    if isinstance(value, (bool, str)) or value is None:
        raise InputError(f"must be numbers, got {value!r}", key=key)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"must be numbers, got {value!r}", key=key) from None
    if not np.isfinite(number):
        raise InputError("must be finite", key=key)
    return number
