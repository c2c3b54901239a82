"""``router.json``: its fields as dataclasses, and the two directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .json_fields import (
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
from .strict_json import Bad

ROUTER_NAME, ROUTER_TENSORS = "router.json", "router.safetensors"
FORMAT, VERSION = "mergeprobe-router", 1
ARROW, LINEAR = RULES = ("arrow", "linear")


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """What the linear rule knows of itself."""

    module: str  # whose inputs it reads: the first adapted one, called before any adapter
    d_in: int
    adapters: tuple[str, ...]  # the rows of its weight
    domains: Mapping[str, str]  # of the calibration -> the adapter that their requests go to
    shrinkage: float  # of the covariance towards a multiple of the identity, 0 to 1


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """Everything ``router.json`` says."""

    base_model: str | None
    adapters: Mapping[str, str]  # name -> SHA-256 of its factors, ``io.fingerprint``; E rows
    modules: Mapping[str, int]  # name -> d_in
    top_k: int
    temperature: float
    skip_first: int  # tokens at the start of a request that ``Router.choose`` leaves out
    rule: str  # by which ``Router.choose`` goes unless told otherwise, "arrow" or "linear"
    linear: LinearInfo | None
    # Share of the calibration's texts that went to an adapter of their domain, by rule: those of
    # "linear" were held out of its fit. Empty without a calibration.
    accuracy: Mapping[str, float]
    texts: int  # over which; 0 without a calibration
    notes: tuple[str, ...] = ()

    def declared(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor: key -> (dtype name, shape)."""
        rows = len(self.adapters)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            f"prototype.{name}": ("F32", (rows, d_in)) for name, d_in in self.modules.items()
        }
        if self.linear is not None:
            known = len(self.linear.adapters)
            tensors["request.weight"] = "F64", (known, self.linear.d_in)
            tensors["request.bias"] = "F64", (known,)
        return tensors


def to_json(info: RouterInfo, sha256: str) -> dict[str, Any]:
    """The object to write; ``parse`` gives ``info`` and the hash of the tensors' file back."""
    linear = info.linear
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_model": info.base_model,
        "rule": info.rule,
        "accuracy": dict(info.accuracy),
        "texts": info.texts,
        "notes": list(info.notes),
        "top_k": info.top_k,
        "temperature": info.temperature,
        "skip_first": info.skip_first,
        "linear": None if linear is None else {
            "module": linear.module, "d_in": linear.d_in, "adapters": list(linear.adapters),
            "domains": dict(linear.domains), "shrinkage": linear.shrinkage,
        },
        "adapters": dict(info.adapters),
        "modules": dict(info.modules),
        "tensors_sha256": sha256,
    }  # fmt: skip


def parse(value: dict[str, Any]) -> tuple[RouterInfo, str]:
    """Check every field; raises ``Bad`` with the field's path as key."""
    of_format(value, FORMAT, VERSION)
    checked = fields(
        value, "", format=text, version=count, base_model=nullable(text), rule=text,
        accuracy=named(_share), texts=natural, notes=many(text), top_k=count, temperature=number,
        skip_first=natural, linear=nullable(_linear), adapters=named(hexadecimal(64)),
        modules=named(count), tensors_sha256=hexadecimal(64),
    )  # fmt: skip
    del checked["format"], checked["version"]
    digest = checked.pop("tensors_sha256")
    info = RouterInfo(**checked)
    if not info.adapters:
        raise Bad("is empty", "adapters")
    if info.temperature <= 0:
        raise Bad("is not positive", "temperature")
    if info.rule not in RULES or (info.rule == LINEAR and info.linear is None):
        raise Bad("is no rule of this router", "rule")
    for key in info.accuracy:
        if key not in RULES or not info.texts:
            raise Bad("was not measured", f"accuracy.{key}")
    if info.linear is not None:
        known = info.linear.adapters
        if len(set(known)) != len(known) or not info.adapters.keys() >= {*known}:
            raise Bad("are not adapters of this router, each once", "linear.adapters")
        if not {*known} >= {*info.linear.domains.values()}:
            raise Bad("name an adapter that is none of linear.adapters", "linear.domains")
    return info, digest


def _share(value: Any, where: str) -> float:
    if not 0 <= number(value, where) <= 1:
        raise Bad("is not from 0 to 1", where)
    return float(value)


def _linear(value: Any, where: str) -> LinearInfo:
    return LinearInfo(**fields(
        value, where, module=text, d_in=count, adapters=many(text, least=2), domains=named(text),
        shrinkage=not_negative,
    ))  # fmt: skip
