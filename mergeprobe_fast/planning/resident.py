"""One resident adapter of a plan, written: merged, or copied byte for byte."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import text
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.io.peft import CONFIG_NAME, WEIGHTS_NAME
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.merging import merge
from mergeprobe_fast.planning import vllm
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.planning.served import Member, Resident, sha256_of
from mergeprobe_fast.zoo import Zoo


def resident_name(group: Group) -> str:
    """What requests ask for: an adapter that stays as it is keeps its name."""
    return group.name if group.merged else group.members[0]


def folder_name(name: str, taken: set[str]) -> str:
    """A name as one that every file system takes, and no other one in ``taken``, which it joins."""
    stem = "".join("-" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
    stem = stem.encode("utf-8")[:180].decode("utf-8", "ignore").strip(". ") or "adapter"
    found, number = stem, 1
    while found.casefold() in taken:
        number += 1
        found = f"{stem}-{number}"
    taken.add(found.casefold())
    return found


def write_resident(
    group: Group,
    members: Sequence[AdapterRef],
    root: Path,
    name: str,
    given: Mapping[str, Any],
    max_rank: int | None,
    threads: int | None,
) -> Resident:
    """One resident adapter into ``root / name``.

    ``given`` goes to a merge beside the group's own weights and arguments. What was predicted is
    not said of an adapter that is cut to ``max_rank``: it was predicted of the whole one.
    """
    folder, cut = root / name, False
    rank = max((m.rank for a in members for m in a.modules.values()), default=0)
    low = max_rank is None or rank <= max_rank
    method, arguments = group.method, dict(group.arguments)
    errors = {"truncation_error_relative": 0.0, "rounding_error_relative": 0.0}
    if not group.merged and low and vllm.reads_as_it_is(members[0]):
        method = None
        _copy(members[0], folder)
    else:
        zoo, weights = Zoo(members, same_base=True), group.weights
        if not group.merged:  # A untouched, or the best of a lower rank
            method, weights = ("cat", [1.0]) if low else ("svd", [1.0])
            arguments, cut = ({}, False) if low else ({"rank": max_rank}, True)
        asked = {"weights": weights, "threads": threads, **given}
        merged = merge(zoo, method, **asked, **arguments)
        if max_rank is not None and max(m.a.shape[0] for m in merged.modules) > max_rank:
            arguments["rank"], cut = max_rank, True
            merged = merge(zoo, method, **asked, **arguments)
        report = merged.save(folder)
        errors = {key: report["total"][key] for key in errors}
    written = open_adapter(folder)
    files = sorted(os.listdir(folder))
    return Resident(
        name=resident_name(group),
        folder=name,
        action=group.action,
        method=method,
        arguments=arguments,
        members=tuple(_members(group, members, cut)),
        rank=max(m.rank for m in written.modules.values()),
        nbytes=sum(os.path.getsize(folder / file) for file in files),
        sha256={file: sha256_of(folder / file) for file in files},
        fingerprint=fingerprint(written),
        truncation_error=float(errors["truncation_error_relative"]),
        rounding_error=float(errors["rounding_error_relative"]),
    )


def _members(group: Group, adapters: Sequence[AdapterRef], cut: bool) -> list[Member]:
    count = len(adapters)
    weights = group.weights or (None if group.merged else 1.0,) * count
    unknown = (None,) * count
    said = (unknown,) * 3 if cut else (
        kept_of(group), group.low or unknown, group.high or unknown
    )  # fmt: skip
    intervals = zip(*said, strict=True)
    return [
        Member(a.name, text(os.path.abspath(a.path)), weight, *map(_number, interval))
        for a, weight, interval in zip(adapters, weights, intervals, strict=True)
    ]


def kept_of(group: Group) -> tuple[float | None, ...]:
    """The predicted retention of each member; nothing is lost where nothing is merged."""
    unknown = None if group.merged else 1.0
    return tuple(group.retention) or (unknown,) * len(group.members)


def _number(value: float | None) -> float | None:
    """None for what is not known, NaN too: JSON has none."""
    return None if value is None or not math.isfinite(value) else float(value)


def _copy(adapter: AdapterRef, folder: Path) -> None:
    """The config and weights of a PEFT folder, byte for byte, as they were when it was opened."""
    folder.mkdir(parents=True)
    stamp = next(iter(adapter.modules.values())).a.file
    shutil.copyfile(stamp.path, folder / WEIGHTS_NAME)
    now = os.stat(stamp.path)
    if (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) != (
        stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode,
    ):  # fmt: skip
        raise InputError("changed since its header was read", path=stamp.path)
    source = adapter.path / CONFIG_NAME
    raw = source.read_bytes()
    try:
        same = strict_json.parse(raw, "the file") == adapter.config
    except Bad:
        same = False
    if not same:
        raise InputError("changed since it was opened", path=source)
    (folder / CONFIG_NAME).write_bytes(raw)
