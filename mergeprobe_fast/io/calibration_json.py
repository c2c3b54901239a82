"""``calibration.json``: its fields as dataclasses, and the two directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .strict_json import Bad, printable

CALIBRATION_NAME = "calibration.json"
FORMAT, VERSION = "mergeprobe-calibration", 1
LABELS = ("model", "data")
_LIMIT = 2**31 - 1  # sizes and counts: positions are stored as 32-bit integers


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain: where its tokens come from and how many were recorded."""

    name: str
    source: str  # name of the data file
    sha256: str  # of its bytes
    sequences: int
    tokens: int  # over which means were taken: all but the first ``skip_first`` of each sequence
    samples: int  # T, the rows of every sample tensor
    files: tuple[str, ...]  # in which its tensors lie


@dataclass(frozen=True, slots=True)
class CalibratedModule:
    """One recorded module of the base model; ``input`` is the key of its shared input tensor."""

    name: str
    d_in: int
    d_out: int
    input: str


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Everything ``calibration.json`` says."""

    base_model: str  # the name its config declares, else the path as given
    base_path: str | None  # the path as given; None for a model that was given as an object
    config_sha256: str  # of the base model's config
    domains: Mapping[str, Domain]
    modules: Mapping[str, CalibratedModule]
    seed: int
    samples: int  # asked for; a domain may have fewer tokens
    max_length: int  # tokens after which a sequence was cut
    skip_first: int  # tokens at the start of each sequence that are neither sampled nor averaged
    labels: str | None = None  # "model" or "data": of the loss behind the gradients; None: none
    point: str = "base"
    notes: tuple[str, ...] = ()


def is_domain_name(name: str) -> bool:
    """Whether a domain may be called that: it is going to be the name of a file."""
    return len(name) <= 100 and re.fullmatch(r"\w(?:[\w.+-]*\w)?", name) is not None


def to_json(info: CalibrationInfo) -> dict[str, Any]:
    """The object to write; ``parse`` gives ``info`` back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_model": {
            "name": info.base_model,
            "path": info.base_path,
            "config_sha256": info.config_sha256,
        },
        "point": info.point,
        "seed": info.seed,
        "samples": info.samples,
        "max_length": info.max_length,
        "skip_first": info.skip_first,
        "labels": info.labels,
        "domains": {
            d.name: {
                "source": d.source, "sha256": d.sha256, "sequences": d.sequences,
                "tokens": d.tokens, "samples": d.samples, "files": list(d.files),
            }
            for d in info.domains.values()
        },
        "modules": {
            m.name: {"d_in": m.d_in, "d_out": m.d_out, "input": m.input}
            for m in info.modules.values()
        },
        "notes": list(info.notes),
    }  # fmt: skip


def parse(value: dict[str, Any]) -> CalibrationInfo:
    """Check every field; raises ``Bad`` with the field's path as key."""
    if value.get("format") != FORMAT:
        raise Bad(f"is not {FORMAT!r}: this is no calibration", "format")
    if type(value.get("version")) is not int or value["version"] != VERSION:
        raise Bad(f"is {value.get('version')!r}, this program reads {VERSION}"[:200], "version")
    fields = _fields(
        value, "", format=_text, version=_count, base_model=_object, point=_point, seed=_natural,
        samples=_count, max_length=_count, skip_first=_natural, labels=_labels, domains=_named,
        modules=_named, notes=_texts,
    )  # fmt: skip
    base = _fields(
        fields["base_model"], "base_model.", name=_text, path=_text_or_null, config_sha256=_sha256
    )
    domains = {name: _domain(name, item) for name, item in fields["domains"].items()}
    modules = {name: _module(name, item) for name, item in fields["modules"].items()}
    for name, domain in domains.items():
        if not domain.samples == min(domain.tokens, fields["samples"]):
            raise Bad("is not the smaller of tokens and samples", f"domains.{name}.samples")
    files = [file.casefold() for domain in domains.values() for file in domain.files]
    if len(set(files)) != len(files):
        raise Bad("two domains, or one twice, name the same file", "domains")
    for name, module in modules.items():
        owner = modules.get(module.input)
        if owner is None or owner.input != module.input or owner.d_in != module.d_in:
            raise Bad("is not a module with that input", f"modules.{name}.input")
    return CalibrationInfo(
        base["name"], base["path"], base["config_sha256"], domains, modules,
        labels=fields["labels"], point=fields["point"], notes=fields["notes"],
        **{key: fields[key] for key in ("seed", "samples", "max_length", "skip_first")},
    )  # fmt: skip


def _domain(name: str, value: Any) -> Domain:
    if not is_domain_name(name):
        raise Bad("is no name for a domain", f"domains.{name}")
    where = f"domains.{name}."
    fields = _fields(
        _object(value, where[:-1]), where, source=_text, sha256=_sha256, sequences=_count,
        tokens=_count, samples=_count, files=_files,
    )  # fmt: skip
    return Domain(name, **fields)


def _module(name: str, value: Any) -> CalibratedModule:
    where = f"modules.{name}."
    if not name or name != name.strip("."):
        raise Bad("is not a module path", where[:-1])
    fields = _fields(_object(value, where[:-1]), where, d_in=_count, d_out=_count, input=_text)
    return CalibratedModule(name, **fields)


def _fields(
    value: dict[str, Any], where: str, **checks: Callable[[Any, str], Any]
) -> dict[str, Any]:
    """Exactly these fields, each checked."""
    for key in value:
        if key not in checks:
            raise Bad("is not a field of this format", where + key)
    for key in checks:
        if key not in value:
            raise Bad("is missing", where + key)
    return {key: check(value[key], where + key) for key, check in checks.items()}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Bad("is not an object", where)
    return value


def _named(value: Any, where: str) -> dict[str, Any]:
    if not _object(value, where):
        raise Bad("is empty", where)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise Bad("is not a text", where)
    return value


def _text_or_null(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Bad("is not a list", where)
    return tuple(_text(item, where) for item in value)


def _files(value: Any, where: str) -> tuple[str, ...]:
    names = _texts(value, where)
    for name in names:
        # A path would let a downloaded calibration read elsewhere.
        if not re.fullmatch(r"\w[\w.+-]*\.safetensors", name):
            raise Bad(f"{printable(name)!r} is not the name of a safetensors file", where)
    if not names:
        raise Bad("is empty", where)
    return names


def _natural(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _LIMIT:
        raise Bad(f"is not an integer from 0 to {_LIMIT}", where)
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= _LIMIT:
        raise Bad(f"is not an integer from 1 to {_LIMIT}", where)
    return value


def _sha256(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise Bad("is not a SHA-256 in hexadecimal", where)
    return value


def _point(value: Any, where: str) -> str:
    if value != "base":
        raise Bad("is not 'base', the only point this program reads", where)
    return value


def _labels(value: Any, where: str) -> str | None:
    if value is not None and value not in LABELS:
        raise Bad("is none of null, 'model' and 'data'", where)
    return value
