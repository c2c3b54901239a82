"""PEFT adapter folders: which there are, and what lies in them, without reading weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import strict_json
from .atomic import is_temporary
from .layout import Plan, plan_modules
from .peft_config import ConfigReading, Resolution, read_config, resolve
from .safetensors import Entry, SafetensorsHeader, read_header, refuse_pickle
from .shards import read_shards, read_weight_map

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
SINGLE_NAMES = re.compile(rf"adapter_model\.safetensors|{_SHARD.pattern}")  # never alone
_SIGNS = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME)


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything found in an adapter folder or file, good and bad, before anyone decides.

    ``open_adapter`` raises the first of ``refused``; ``coverage.check`` lists them all.
    """

    path: Path
    config: dict[str, Any]
    reading: ConfigReading | None
    headers: tuple[SafetensorsHeader, ...]
    plan: Plan | None
    resolved: Resolution | None  # None when the config gives no rules
    refused: tuple[InputError, ...]
    notes: tuple[str, ...]
    format: str = "peft"
    alphas: tuple[Entry | None, ...] = ()  # by position in the plan, in formats that have them


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is, or means to be, a PEFT adapter: it has a config or weights by name.

    A broken adapter counts, so that opening it says what is missing. A temporary folder of an
    interrupted write does not.
    """
    return not is_temporary(path) and any(
        os.path.isfile(os.path.join(path, name)) for name in _SIGNS
    )


def first_of(refused: tuple[InputError, ...]) -> InputError:
    """The first refusal, saying how many there are."""
    first = refused[0]
    if len(refused) == 1:
        return first
    more = f"{first.reason} (1 of {len(refused)} problems; 'mergeprobe-fast check' lists all)"
    return InputError(more, path=first.path, key=first.key)


def examine(path: str | os.PathLike[str]) -> Examination:
    """Read everything but weights from an adapter folder; never raises, collects refusals."""
    folder = Path(path)
    refused: list[InputError] = []
    names = _list(folder, refused)
    if not names and not refused:
        refused.append(InputError("is an empty folder", path=folder))
    config, reading = _config(folder, names, refused)
    headers = _headers(folder, names, refused)
    notes = list(reading.notes) if reading else []
    if WEIGHTS_NAME in names and PICKLE_NAME in names:
        notes.append(f"{PICKLE_NAME} lies beside {WEIGHTS_NAME} and is not read")
    plan = resolved = None
    if headers:
        plan = plan_modules(tuple(header.layout for header in headers))
        notes += plan.notes
        refused += _refusals(folder, headers, plan)
        if reading and reading.rules:
            resolved = resolve(plan, reading.rules)
            notes += resolved.notes
            for position, reason in resolved.conflicts:
                module = plan.modules[position]
                where = headers[module.file_a].stamp.path
                refused.append(InputError(reason, path=where, key=module.name))
    return Examination(
        folder, config, reading, headers, plan, resolved, tuple(refused), tuple(notes)
    )


def _list(folder: Path, refused: list[InputError]) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except NotADirectoryError:
        refused.append(_not_a_folder(folder))
    except (OSError, ValueError) as error:
        refused.append(strict_json.unreadable(folder, error))
    return frozenset()


def _not_a_folder(path: Path) -> InputError:
    try:
        refuse_pickle(path)
    except InputError as error:
        return error
    return InputError("is a file; a PEFT adapter is a folder", path=path)


def _config(
    folder: Path, names: frozenset[str], refused: list[InputError]
) -> tuple[dict[str, Any], ConfigReading | None]:
    if not names:
        return {}, None
    path = folder / CONFIG_NAME
    if CONFIG_NAME not in names:
        refused.append(InputError(f"has no {CONFIG_NAME}", path=folder))
        return {}, None
    try:
        config = strict_json.read(path)
    except InputError as error:
        refused.append(error)
        return {}, None
    reading = read_config(config)
    refused += [InputError(reason, path=path, key=key) for key, reason in reading.refused]
    return config, reading


def _headers(
    folder: Path, names: frozenset[str], refused: list[InputError]
) -> tuple[SafetensorsHeader, ...]:
    if not names:
        return ()
    try:
        return tuple(_read_headers(folder, names))
    except InputError as error:
        refused.append(error)
        return ()


def _read_headers(folder: Path, names: frozenset[str]) -> Iterator[SafetensorsHeader]:
    if WEIGHTS_NAME in names and INDEX_NAME in names:
        raise InputError(f"has both {WEIGHTS_NAME} and {INDEX_NAME}", path=folder)
    if WEIGHTS_NAME in names:
        yield read_header(folder / WEIGHTS_NAME)
    elif INDEX_NAME in names:
        yield from _read_shards(folder, names)
    elif any(_SHARD.fullmatch(name) for name in names):
        raise InputError(f"has weight shards but no {INDEX_NAME}", path=folder)
    elif PICKLE_NAME in names:
        read_header(folder / PICKLE_NAME)  # raises the refusal of pickles
    else:
        raise InputError(f"has no {WEIGHTS_NAME}", path=folder)


def _read_shards(folder: Path, names: frozenset[str]) -> Iterator[SafetensorsHeader]:
    path = folder / INDEX_NAME
    weight_map = read_weight_map(
        path, lambda name: _SHARD.fullmatch(name) is not None,
        "not a name like adapter_model-00001-of-00002",
    )  # fmt: skip
    for shard in sorted(name for name in names if _SHARD.fullmatch(name)):
        if shard not in weight_map.values():
            raise InputError("is a shard that the index does not name", path=folder / shard)
    yield from read_shards(path, weight_map)


def _refusals(
    folder: Path, headers: tuple[SafetensorsHeader, ...], plan: Plan
) -> Iterator[InputError]:
    if not plan.modules and not plan.refused:
        yield InputError("holds no LoRA factors", path=headers[0].stamp.path)
    if plan.refused:
        where = {entry.key: h.stamp.path for h in headers for entry in h.layout.entries}
        for key, reason in plan.refused:
            yield InputError(reason, path=where[key], key=strict_json.printable(key))
