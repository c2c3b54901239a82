"""A merge written down as YAML, in mergekit's words where they mean the same.

    merge_method: ties
    models:
      - model: zoo/math-a                # paths are relative to this file
        parameters: {weight: 0.7, density: 0.5}
      - model: zoo/code
        parameters:
          weight:                        # the first filter that fits the module decides
            - {filter: mlp, value: [0.2, 0.6]}     # from the first layer to the last
            - {value: 0.3}
        domain: code                     # of the calibration
    parameters: {dialect: mergekit}      # for all
    rank: 16                             # and, or instead, energy: 0.99
    dtype: bfloat16
    calibration: cal
    into: base                           # write merged base weights instead of an adapter
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.strict_yaml import parse_yaml
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.merging.request import unknown_method

_KEYS = (
    "merge_method", "models", "parameters", "rank", "energy", "dtype", "calibration", "into",
)  # fmt: skip
_MODEL_KEYS = ("model", "parameters", "domain")
DTYPES = {
    "F32": "F32", "BF16": "BF16", "F16": "F16",
    "FLOAT32": "F32", "BFLOAT16": "BF16", "FLOAT16": "F16",
}  # fmt: skip


@dataclass(frozen=True)
class MergeConfig:
    """What a configuration file says, as arguments of :func:`mergeprobe_fast.merge`."""

    adapters: tuple[Path, ...]
    options: dict[str, Any]  # method, weights, rank, energy, dtype, calibration, domains
    arguments: dict[str, Any] = field(default_factory=dict)
    into: Path | None = None


def load(path: str | os.PathLike[str]) -> MergeConfig:
    """Read and check a configuration file.

    Raises:
        InputError: a file that is no YAML mapping, or a key that is missing, unknown or of the
            wrong kind, by name.
    """
    content = _read(Path(path))
    folder = Path(path).parent

    def refuse(reason: str, key: str) -> InputError:
        return InputError(reason, path=path, key=key)

    for key in content:
        if key not in _KEYS:
            raise refuse(f"unknown key; there are: {', '.join(_KEYS)}", str(key))
    name = content.get("merge_method", "svd")
    method = MERGE_METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise refuse(unknown_method(name), "merge_method")
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise refuse("expected a list of models", "models")
    adapters, domains = [], []
    own: list[Mapping[str, Any]] = []
    for number, model in enumerate(models):
        where = f"models[{number}]"
        if isinstance(model, str):
            model = {"model": model}
        if not isinstance(model, Mapping) or not isinstance(model.get("model"), str):
            raise refuse("expected a path, or {model: path, ...}", where)
        for key in model:
            if key not in _MODEL_KEYS:
                raise refuse(f"unknown key; there are: {', '.join(_MODEL_KEYS)}", f"{where}.{key}")
        adapters.append(folder / model["model"])
        domains.append(_text(model.get("domain"), refuse, f"{where}.domain"))
        own.append(_mapping(model.get("parameters"), refuse, f"{where}.parameters"))
    shared = dict(_mapping(content.get("parameters"), refuse, "parameters"))
    per_adapter = {"weight"} | {n for n, a in method.arguments.items() if a.per_adapter}
    for number, parameters in enumerate(own):
        for key in parameters:
            if key not in per_adapter:
                known = ", ".join(sorted(per_adapter))
                raise refuse(
                    f"{name} has no such parameter per model; there are: {known}",
                    f"models[{number}].parameters.{key}",
                )
    gathered = {}
    for key in per_adapter:
        given = [key in parameters for parameters in own]
        if not any(given):
            continue
        for number in (i for i, has in enumerate(given) if not has and key not in shared):
            raise refuse(f"has no {key}, though others have", f"models[{number}].parameters")
        gathered[key] = [_entry(parameters.get(key, shared.get(key))) for parameters in own]
    if "weight" in shared and "weight" not in gathered:
        gathered["weight"] = [_entry(shared["weight"])] * len(own)
    shared.pop("weight", None)
    if any(domains) and not all(domains):
        raise refuse("has no domain, though others have", f"models[{domains.index(None)}]")
    calibration = _text(content.get("calibration"), refuse, "calibration")
    into = _text(content.get("into"), refuse, "into")
    options = {
        "method": name,
        "weights": gathered.pop("weight", None),
        "rank": content.get("rank"),
        "energy": content.get("energy"),
        "dtype": _dtype(content.get("dtype"), path),
        "calibration": None if calibration is None else folder / calibration,
        "domains": domains if all(domains) else None,
    }
    return MergeConfig(
        tuple(adapters), options, {**shared, **gathered}, None if into is None else folder / into
    )


def _entry(value: Any) -> Any:
    """One adapter's value: a single {filter, value} must not pass for the rule of all adapters."""
    return [value] if isinstance(value, Mapping) else value


def dtype_name(value: Any) -> str | None:
    """The name "BF16" from any usual spelling of bfloat16, and so on. InputError for others."""
    if value is None:
        return None
    name = DTYPES.get(str(value).upper().removeprefix("TORCH."))
    if name is None:
        raise InputError(f"must be float32, bfloat16 or float16, got {value!r}", key="dtype")
    return name


def _dtype(value: Any, path: str | os.PathLike[str]) -> str | None:
    try:
        return dtype_name(value)
    except InputError as error:
        raise InputError(error.reason, path=path, key=error.key) from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = parse_yaml(path.read_bytes())
    except OSError as error:
        raise InputError(error.strerror or str(error), path=path) from error
    except ValueError as error:
        raise InputError(f"is no YAML: {error}", path=path) from None
    if not isinstance(content, Mapping):
        raise InputError("is no mapping of keys to values", path=path)
    return content


def _mapping(value: Any, refuse: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise refuse("expected names and values", key)
    return value


def _text(value: Any, refuse: Any, key: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise refuse(f"expected a text, got {value!r}", key)
    return value
