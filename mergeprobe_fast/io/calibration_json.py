"""``calibration.json``: its fields as dataclasses, and the two directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .json_fields import (
    Check,
    count,
    fields,
    flag,
    hexadecimal,
    many,
    named,
    natural,
    nullable,
    text,
)
from .strict_json import Bad, printable

CALIBRATION_NAME = "calibration.json"
FORMAT, VERSION = "mergeprobe-calibration", 2
LABELS = ("model", "data", "both")
LOSSES = ("all", "completion")


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
    loss: str = "all"  # over every token, or "completion": only those of the completions


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
    labels: str | None = None  # of the loss behind the gradients, one of LABELS; None: none
    point: str = "base"
    notes: tuple[str, ...] = ()
    outputs: bool = False  # whether outputs were kept at the sampled tokens
    version: int = VERSION

    @property
    def output_moments(self) -> bool:
        """Whether there are mean squares of outputs: not in files of version 1."""
        return self.version > 1

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """The labels that there are gradients of: none, one, or both of "model" and "data"."""
        if self.labels is None:
            return ()
        return ("model", "data") if self.labels == "both" else (self.labels,)


def is_domain_name(name: str) -> bool:
    """Whether a domain may be called that: it is going to be the name of a file."""
    return len(name) <= 100 and re.fullmatch(r"\w(?:[\w.+-]*\w)?", name) is not None


def to_json(info: CalibrationInfo) -> dict[str, Any]:
    """The object to write; ``parse`` gives ``info`` back."""
    first = info.version == 1
    return {
        "format": FORMAT,
        "version": info.version,
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
        **({} if first else {"outputs": info.outputs}),
        "domains": {
            d.name: {
                "source": d.source, "sha256": d.sha256, "sequences": d.sequences,
                "tokens": d.tokens, "samples": d.samples, **({} if first else {"loss": d.loss}),
                "files": list(d.files),
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
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise Bad(f"is {version!r}, this program reads 1 to {VERSION}"[:200], "version")
    checked = fields(
        value, "", format=text, version=count, base_model=_base_model, point=_one_of(("base",)),
        seed=natural, samples=count, max_length=count, skip_first=natural,
        labels=_LABELS_IN[version], domains=_not_empty, modules=_not_empty, notes=many(text),
        **_since_2(version, outputs=flag),
    )  # fmt: skip
    base = checked["base_model"]
    domains = {name: _domain(name, item, version) for name, item in checked["domains"].items()}
    modules = {name: _module(name, item) for name, item in checked["modules"].items()}
    for name, domain in domains.items():
        if not domain.samples == min(domain.tokens, checked["samples"]):
            raise Bad("is not the smaller of tokens and samples", f"domains.{name}.samples")
    files = [file.casefold() for domain in domains.values() for file in domain.files]
    if len(set(files)) != len(files):
        raise Bad("two domains, or one twice, name the same file", "domains")
    for name, module in modules.items():
        owner = modules.get(module.input)
        if owner is None or owner.input != module.input or owner.d_in != module.d_in:
            raise Bad("is not a module with that input", f"modules.{name}.input")
    kept = ("seed", "samples", "max_length", "skip_first", "labels", "point", "notes")
    return CalibrationInfo(
        base["name"], base["path"], base["config_sha256"], domains, modules,
        outputs=checked.get("outputs", False), version=version, **{k: checked[k] for k in kept},
    )  # fmt: skip


def _base_model(value: Any, where: str) -> dict[str, Any]:
    return fields(value, where, name=text, path=nullable(text), config_sha256=hexadecimal(64))


def _domain(name: str, value: Any, version: int) -> Domain:
    if not is_domain_name(name):
        raise Bad("is no name for a domain", f"domains.{name}")
    checked = fields(
        value, f"domains.{name}", source=text, sha256=hexadecimal(64), sequences=count,
        tokens=count, samples=count, files=_files, **_since_2(version, loss=_one_of(LOSSES)),
    )  # fmt: skip
    return Domain(name, **checked)


def _module(name: str, value: Any) -> CalibratedModule:
    where = f"modules.{name}"
    if not name or name != name.strip("."):
        raise Bad("is not a module path", where)
    return CalibratedModule(name, **fields(value, where, d_in=count, d_out=count, input=text))


def _since_2(version: int, **checks: Check) -> dict[str, Check]:
    return checks if version > 1 else {}


def _not_empty(value: Any, where: str) -> dict[str, Any]:
    if not named(lambda item, _: item)(value, where):
        raise Bad("is empty", where)
    return value


def _files(value: Any, where: str) -> tuple[str, ...]:
    names = many(text, least=1)(value, where)
    for name in names:
        # A path would let a downloaded calibration read elsewhere.
        if not re.fullmatch(r"\w[\w.+-]*\.safetensors", name):
            raise Bad(f"{printable(name)!r} is not the name of a safetensors file", where)
    return names


def _one_of(names: tuple[str | None, ...]) -> Check:
    def check(value: Any, where: str) -> str | None:
        if value not in names:
            raise Bad(f"is none of {', '.join(n or 'null' for n in names)}", where)
        return value

    return check


_LABELS_IN = {1: _one_of((None, "model", "data")), 2: _one_of((None, *LABELS))}
