"""What ``plan --apply`` writes: adapters that load as they are, their list, vLLM's line, a router.

    adapters/<name>/      a PEFT folder for each resident adapter
    adapters.json         which of them answers for which original (``planning.served``)
    vllm.sh               starts vLLM with all of them
    router.json, router.safetensors    which of them answers a request (``io.router_file``)

Adapters that stay as they are get copied, not linked or named by their path: the folder can be
moved to where it is served, and training on does not change what is served from it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import text
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.atomic import AtomicFolder
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.io.peft import CONFIG_NAME, WEIGHTS_NAME
from mergeprobe_fast.io.router_file import ROUTER_NAME, ROUTER_TENSORS, write_router
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.merging import MERGE_METHODS, merge
from mergeprobe_fast.merging.merge import open_given
from mergeprobe_fast.planning import vllm
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.planning.routing import Requests, answers_of, build_router
from mergeprobe_fast.planning.served import (
    ADAPTERS_FOLDER,
    SCRIPT_NAME,
    SERVED_NAME,
    Member,
    Resident,
    Served,
    sha256_of,
    write_served,
)
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

CONTENTS = (ADAPTERS_FOLDER, SERVED_NAME, SCRIPT_NAME, ROUTER_NAME, ROUTER_TENSORS)


class HasGroups(Protocol):
    """What is needed of a plan."""

    @property
    def groups(self) -> Sequence[Group]: ...


def apply_plan(
    plan: HasGroups,
    zoo: Zoo,
    folder: str | os.PathLike[str],
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    max_rank: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Served:
    """Write everything that a plan decides, as a folder that appears whole or not at all.

    Adapters that stay as they are get copied byte for byte. Where PEFT or vLLM would not read one
    so (several scales, shards, one file of another tool), it is written anew with its scale in B.

    Args:
        zoo: of which the plan is; every adapter is in one group.
        calibration, domains: as of :func:`mergeprobe_fast.merge`; for methods that learn from
            data, and for the router.
        max_rank: adapters of a higher rank are cut to it; what that costs is in their report. vLLM
            takes 512 at most, and memory for the highest rank of all.
        progress: called with the number of groups done since the last call; one more at the end,
            for the router.

    Returns:
        What ``adapters.json`` says; its ``vllm_command`` starts vLLM on ``folder``.

    Raises:
        InputError: ``folder`` exists (without ``overwrite``) or cannot be written, a plan of other
            adapters, a merge that is refused, adapters that PEFT has no names for.
    """
    groups = tuple(plan.groups)
    folders = _check(groups, zoo, max_rank)
    opened = open_given(calibration)
    if opened is None and domains is not None:
        raise InputError("given without a calibration", key="domains")
    belongs = () if opened is None else assign_domains(zoo.names, list(opened.domains), domains)
    out = AtomicFolder(folder, overwrite, inputs=[a.path for a in zoo], contents=CONTENTS)
    with out as temporary:
        residents, by_name = [], {a.name: a for a in zoo}
        for group, name in zip(groups, folders, strict=True):
            members = [by_name[member] for member in group.members]
            given = _given(group, opened, belongs, zoo)
            residents.append(_write(group, members, temporary, name, given, max_rank, threads))
            if progress:
                progress(1)
        written = [open_adapter(temporary / r.folder, name=r.name) for r in residents]
        resident_zoo = Zoo(written, same_base=True)
        requests = None
        if opened is not None:
            kept = {m: r for g in groups for m, r in zip(g.members, _kept(g), strict=True)}
            held = {r.name: [m.name for m in r.members] for r in residents}
            requests = Requests(opened, answers_of(zoo, belongs, held, kept))
        info, tensors = build_router(resident_zoo, requests, threads=threads)
        write_router(temporary, info, tensors)
        notes = _notes(residents, written)
        served = Served(out.out, zoo.base_model, tuple(residents), tuple(notes))
        write_served(temporary, served)
        if progress:
            progress(1)
    return served


def _check(groups: Sequence[Group], zoo: Zoo, max_rank: int | None) -> list[str]:
    """Refuse what cannot be written; the folder of every group, relative."""
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise InputError(f"must be a positive integer, got {max_rank!r}", key="max_rank")
    left = dict.fromkeys(zoo.names)
    for name in (member for group in groups for member in group.members):
        if name not in left:
            known = name in zoo.names
            reason = "the plan has it twice" if known else "the plan names it, and the zoo has none"
            raise InputError(reason, key=name)
        del left[name]
    if left:
        raise InputError("is in no group of the plan", key=next(iter(left)))
    odd = next((a for a in zoo if a.config.get("naming", "path") != "path"), None)
    if odd is not None:
        reason = f"is a {odd.format} file: PEFT and vLLM have other names for its modules"
        raise InputError(reason, path=odd.path)
    for group in groups:
        if not group.members or (not group.merged and len(group.members) > 1):
            raise InputError(f"{len(group.members)} adapters to {group.action}", key=group.name)
        if group.merged and group.method not in MERGE_METHODS:
            raise InputError(f"no merge method {group.method!r}", key=group.name)
    names = [_resident_name(group) for group in groups]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError("two resident adapters of this name", key=name)
    taken: set[str] = set()
    return [f"{ADAPTERS_FOLDER}/{_folder_name(name, taken)}" for name in names]


def _resident_name(group: Group) -> str:
    """What requests ask for: an adapter that stays as it is keeps its name."""
    return group.name if group.merged else group.members[0]


def _folder_name(name: str, taken: set[str]) -> str:
    """A name as one that every file system takes, and no other one in ``taken``, which it joins."""
    stem = "".join("-" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
    stem = stem.encode("utf-8")[:180].decode("utf-8", "ignore").strip(". ") or "adapter"
    found, number = stem, 1
    while found.casefold() in taken:
        number += 1
        found = f"{stem}-{number}"
    taken.add(found.casefold())
    return found


def _given(
    group: Group, calibration: Calibration | None, domains: Sequence[str], zoo: Zoo
) -> dict[str, Any]:
    """The calibration and domains of a group whose method learns from data, else nothing."""
    if not group.merged or not MERGE_METHODS[group.method].data:
        return {}
    if calibration is None:
        return {"calibration": None}  # merge says what it needs one for
    domain_of = dict(zip(zoo.names, domains, strict=True))
    return {"calibration": calibration, "domains": [domain_of[m] for m in group.members]}


def _write(
    group: Group,
    members: Sequence[AdapterRef],
    root: Path,
    name: str,
    given: Mapping[str, Any],
    max_rank: int | None,
    threads: int | None,
) -> Resident:
    """One resident adapter into ``root / name``."""
    folder = root / name
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
            arguments = {} if low else {"rank": max_rank}
        asked = {"weights": weights, "threads": threads, **given}
        merged = merge(zoo, method, **asked, **arguments)
        if max_rank is not None and max(m.a.shape[0] for m in merged.modules) > max_rank:
            arguments["rank"] = max_rank
            merged = merge(zoo, method, **asked, **arguments)
        report = merged.save(folder)
        errors = {key: report["total"][key] for key in errors}
    written = open_adapter(folder)
    files = sorted(os.listdir(folder))
    return Resident(
        name=_resident_name(group),
        folder=name,
        action=group.action,
        method=method,
        arguments=arguments,
        members=tuple(_members(group, members)),
        rank=max(m.rank for m in written.modules.values()),
        nbytes=sum(os.path.getsize(folder / file) for file in files),
        sha256={file: sha256_of(folder / file) for file in files},
        fingerprint=fingerprint(written),
        truncation_error=float(errors["truncation_error_relative"]),
        rounding_error=float(errors["rounding_error_relative"]),
    )


def _members(group: Group, adapters: Sequence[AdapterRef]) -> list[Member]:
    count = len(adapters)
    weights = group.weights or (None if group.merged else 1.0,) * count
    intervals = zip(_kept(group), group.low or (None,) * count, group.high or (None,) * count,
                    strict=True)  # fmt: skip
    return [
        Member(a.name, text(os.path.abspath(a.path)), weight, *map(_number, interval))
        for a, weight, interval in zip(adapters, weights, intervals, strict=True)
    ]


def _kept(group: Group) -> tuple[float | None, ...]:
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


def _notes(residents: Sequence[Resident], written: Sequence[AdapterRef]) -> list[str]:
    """What somebody who serves the folder should know."""
    notes = []
    largest = vllm.RANKS[-1]
    for r, adapter in zip(residents, written, strict=True):
        if r.rank > largest:
            notes.append(f"{r.name} has rank {r.rank}, and vLLM takes {largest} at most: apply the "
                         f"plan with max_rank={largest} to cut it")  # fmt: skip
        kinds = sorted({m.kind for m in adapter.modules.values()} - {"linear"})
        if kinds:
            notes.append(f"{r.name} changes modules that vLLM may refuse: {', '.join(kinds)}")
        if r.action == "route" and r.method is not None:
            notes.append(f"{r.name} was written anew: vLLM reads one file, and one scale for all "
                         "modules")  # fmt: skip
    return notes
