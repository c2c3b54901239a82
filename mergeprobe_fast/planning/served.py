"""``adapters.json``: the adapters that stay resident, and which of them answers for which original.

The folder it lies in holds each adapter as a PEFT folder, ``router.json`` and its tensors
(``io.router_file``), and ``vllm.sh``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.json_fields import (
    count,
    fields,
    hexadecimal,
    many,
    named,
    natural,
    not_negative,
    nullable,
    number,
    of_format,
    text,
)
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.planning import vllm

SERVED_NAME, SCRIPT_NAME, ADAPTERS_FOLDER = "adapters.json", "vllm.sh", "adapters"
FORMAT, VERSION = "mergeprobe-adapters", 1


@dataclass(frozen=True, slots=True)
class Member:
    """One original adapter in a resident one; what is None was not said or not predicted."""

    name: str
    path: str  # where it was
    weight: float | None  # its factor in the merge; 1 where it stays as it is
    retention: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Resident:
    """One adapter to load: what it is made of, and what its files are."""

    name: str  # by which requests ask for it
    folder: str  # relative to adapters.json, with /
    action: str  # of the plan: "merge", "reweight", "prune", "regmean", "route"
    method: str | None  # of mergeprobe_fast.merge; None: copied, byte for byte
    arguments: Mapping[str, Any]  # of the method
    members: tuple[Member, ...]
    rank: int  # the largest of its modules
    nbytes: int  # of all its files
    sha256: Mapping[str, str]  # of each file
    fingerprint: str  # of its factors, ``io.fingerprint``
    truncation_error: float  # relative to the norm of the exact merge
    rounding_error: float  # the same, of the dtype


@dataclass(frozen=True)
class Served:
    """Everything ``adapters.json`` says, and the folder it was read from or will be in."""

    path: Path
    base_model: str | None
    residents: tuple[Resident, ...]
    notes: tuple[str, ...] = ()

    @property
    def serves(self) -> dict[str, str]:
        """Original adapter -> the resident one that answers for it."""
        return {m.name: r.name for r in self.residents for m in r.members}

    @property
    def vllm_command(self) -> str | None:
        """The line that starts vLLM on this folder; None when a rank is above its largest."""
        return vllm.command(self._listed(), self.base_model, self.path)

    @property
    def vllm_script(self) -> str | None:
        """The same as a script that lies in the folder and may move with it."""
        return vllm.script(self._listed(), self.base_model)

    def folder(self, name: str) -> Path:
        """Where a resident adapter lies. InputError when there is none of this name."""
        found = next((r for r in self.residents if r.name == name), None)
        if found is None:
            raise InputError("is no resident adapter", path=self.path / SERVED_NAME, key=name)
        return self.path / found.folder

    def _listed(self) -> list[tuple[str, str, int]]:
        return [(r.name, r.folder, r.rank) for r in self.residents]


def read_served(folder: str | os.PathLike[str], *, verify: bool = True) -> Served:
    """Read ``adapters.json``; unless told not to, every file of every adapter is hashed too.

    Raises:
        InputError: naming file, key and reason: anything but this format, a file that is missing,
            or that is not the one that was written.
    """
    folder = Path(folder)
    path = folder / SERVED_NAME
    try:
        base_model, residents, notes = parse(strict_json.read(path))
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    if verify:
        for resident in residents:
            for name, expected in resident.sha256.items():
                file = folder / resident.folder / name
                try:
                    found = sha256_of(file)
                except OSError as error:
                    raise strict_json.unreadable(file, error) from error
                if found != expected:
                    reason = f"is not the file that {SERVED_NAME} was written with"
                    raise InputError(reason, path=file)
    return Served(folder, base_model, residents, notes)


def write_served(folder: Path, served: Served) -> None:
    """Write ``adapters.json`` and ``vllm.sh`` into a folder."""
    content = json.dumps(to_json(served), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / SERVED_NAME).write_bytes((content + "\n").encode("utf-8"))
    script = served.vllm_script
    if script is None:  # a note says so, too
        reason = f"a rank is above {vllm.RANKS[-1]}, the largest of vLLM: apply with a max_rank"
        script = f"#!/bin/sh\necho '{reason}' >&2\nexit 1\n"
    (folder / SCRIPT_NAME).write_bytes(script.encode("utf-8"))
    (folder / SCRIPT_NAME).chmod(0o755)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, a block at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(served: Served) -> dict[str, Any]:
    """The object to write; ``parse`` gives it back. "serves" and "vllm" follow from the rest."""
    ranks = [r.rank for r in served.residents]
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_model": served.base_model,
        "serves": served.serves,
        "vllm": {"max_loras": len(ranks), "max_lora_rank": vllm.max_lora_rank(max(ranks))},
        "notes": list(served.notes),
        "adapters": [asdict(r) for r in served.residents],
    }


def parse(value: dict[str, Any]) -> tuple[str | None, tuple[Resident, ...], tuple[str, ...]]:
    """Check every field; raises ``Bad`` with the field's path as key."""
    of_format(value, FORMAT, VERSION)
    checked = fields(
        value, "", format=text, version=count, base_model=nullable(text), serves=named(text),
        vllm=_vllm, notes=many(text), adapters=many(_resident, least=1),
    )  # fmt: skip
    residents = checked["adapters"]
    for key in ("name", "folder"):
        values = [getattr(r, key).casefold() if key == "folder" else r.name for r in residents]
        if len(set(values)) != len(values):
            raise Bad("is there twice", f"adapters.{key}")
    members = [m.name for r in residents for m in r.members]
    if len(set(members)) != len(members):
        raise Bad("names one twice", "adapters.members")
    if checked["serves"] != {m.name: r.name for r in residents for m in r.members}:
        raise Bad("does not follow from the adapters", "serves")
    ranks = [r.rank for r in residents]
    expected = {"max_loras": len(ranks), "max_lora_rank": vllm.max_lora_rank(max(ranks))}
    if checked["vllm"] != expected:
        raise Bad("does not follow from the adapters", "vllm")
    return checked["base_model"], residents, checked["notes"]


def _vllm(value: Any, where: str) -> dict[str, Any]:
    return fields(value, where, max_loras=count, max_lora_rank=nullable(count))


def _resident(value: Any, where: str) -> Resident:
    return Resident(**fields(
        value, where, name=text, folder=_folder, action=text, method=nullable(text),
        arguments=named(lambda item, _: item), members=many(_member, least=1), rank=natural,
        nbytes=count, sha256=_hashes, fingerprint=hexadecimal(64), truncation_error=not_negative,
        rounding_error=not_negative,
    ))  # fmt: skip


def _member(value: Any, where: str) -> Member:
    known = nullable(number)
    return Member(**fields(
        value, where, name=text, path=text, weight=known, retention=known, low=known, high=known,
    ))  # fmt: skip


def _folder(value: Any, where: str) -> str:
    """A path that stays below: a file from elsewhere must not name any other place."""
    path = PurePosixPath(text(value, where))
    if path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value:
        raise Bad("is no folder beside this file", where)
    return value


def _hashes(value: Any, where: str) -> dict[str, str]:
    found = named(hexadecimal(64))(value, where)
    for name in found:
        _folder(name, f"{where}.{name}")
    return found
