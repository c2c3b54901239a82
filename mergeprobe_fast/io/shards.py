"""Weights cut into several safetensors files: the index, and that it and the files agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError
from . import strict_json
from .safetensors import SafetensorsHeader, read_header


def read_weight_map(
    path: Path, is_name: Callable[[str], bool], what: str
) -> dict[str, str]:
    """Key -> file name of an index. A name that ``is_name`` refuses could lead anywhere.

    Raises:
        InputError: naming the index and the key; ``what`` says what a name should have been.
    """
    weight_map = strict_json.read(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("is not an object of file names", path=path, key="weight_map")
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not is_name(shard):
            reason = f"lies in {shard!r}, which is {what}"
            raise InputError(reason[:300], path=path, key=strict_json.printable(key))
    return weight_map


def read_shards(path: Path, weight_map: dict[str, str]) -> Iterator[SafetensorsHeader]:
    """The header of every shard; index and shards must name the same keys in the same places."""
    left = dict(weight_map)
    for shard in sorted(set(weight_map.values())):
        header = read_header(path.parent / shard)
        for entry in header.layout.entries:
            if left.pop(entry.key, None) != shard:
                reason = f"lies in {shard}, the index says otherwise"
                raise InputError(reason, path=path, key=strict_json.printable(entry.key))
        yield header
    if left:
        key, shard = next(iter(left.items()))
        raise InputError(f"is not in {shard}", path=path, key=strict_json.printable(key))
