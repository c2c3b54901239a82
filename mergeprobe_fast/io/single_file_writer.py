"""Writing kohya and diffusers files: one file, whole or not at all, the same bytes every time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from . import kohya, safetensors
from .adapter import AdapterRef
from .atomic_file import AtomicFile
from .diffusers import COMFYUI, COMPONENTS, METADATA_KEY, STYLES, component
from .dtypes import FACTOR_DTYPES
from .layout import full_shapes
from .peft_writer import RoundedModule, WrittenModule, adapter_config, round_module
from .single_file import SUFFIX

AlphaForm = Literal["none", "tensors", "metadata"]
ConvShape = tuple[int, int, int] | None
# Called with what was written before the file gets its name: what it raises leaves no file.
BeforePublishing = Callable[[dict[str, RoundedModule]], None]

# Metadata that says what the base model is: kept where all inputs have the same text.
_BASE_ENTRIES = frozenset(
    "ss_base_model_version ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash ss_v2 "
    "ss_vae_name ss_vae_hash ss_new_vae_hash ss_network_module modelspec.architecture "
    "modelspec.implementation modelspec.sai_model_spec modelspec.prediction_type".split()
)


def write_like(
    path: str | os.PathLike[str],
    like: Sequence[AdapterRef],
    modules: Iterable[WrittenModule],
    *,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    before: BeforePublishing | None = None,
) -> dict[str, RoundedModule]:
    """Write a file of the format that all adapters of ``like`` have, and return what was written.

    Key style, prefix and form of alpha are theirs where they agree, and so is the metadata that
    names the base model; ``metadata`` is added. ``like`` are inputs: never overwritten.

    Raises:
        InputError: they are not all kohya or all diffusers files, and as ``write_kohya`` and
            ``write_diffusers``.
    """
    check_like(path, like)
    configs = [adapter.config for adapter in like]
    texts = {**shared_metadata(configs), **(metadata or {})}
    more: dict[str, Any] = {
        "dtype": dtype, "metadata": texts, "overwrite": overwrite, "before": before,
        "inputs": [adapter.path for adapter in like],
    }  # fmt: skip
    if like[0].format == "kohya":
        return write_kohya(path, modules, **more)
    forms = {config["alpha"] for config in configs}
    alpha: AlphaForm = next((form for form in ("tensors", "metadata") if form in forms), "none")
    bases = {adapter.base_model for adapter in like}
    styles = {part: style for c in configs for part, style in c["styles"].items()}
    styles = {
        part: style if all(c["styles"].get(part, style) == style for c in configs) else "lora_A"
        for part, style in styles.items()
    }
    return write_diffusers(
        path, modules, styles=styles, prefix=configs[0]["prefix"], alpha=alpha,
        base_model=bases.pop() if len(bases) == 1 else None, **more,
    )  # fmt: skip


def check_like(path: str | os.PathLike[str], like: Sequence[AdapterRef]) -> None:
    """Raise what ``write_like`` would refuse about the inputs' formats, before any work is done."""
    kinds = {adapter.format for adapter in like}
    if len(kinds) != 1 or "peft" in kinds:
        said = " and ".join(sorted(kinds)) or "none"
        reason = f"a single file is written when all inputs are of one such format, not {said}"
        raise InputError(reason, path=path)
    prefixes = {adapter.config.get("prefix") for adapter in like}
    if len(prefixes) != 1:
        said = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise InputError(f"the inputs' keys begin differently: with {said}", path=path)


def shared_metadata(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Entries that say what the base model is, where every file has the same text."""
    first = configs[0]["metadata"]
    return {
        key: first[key]
        for key in sorted(first.keys() & _BASE_ENTRIES)
        if all(config["metadata"].get(key) == first[key] for config in configs)
    }


def write_kohya(
    path: str | os.PathLike[str],
    modules: Iterable[WrittenModule],
    *,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    before: BeforePublishing | None = None,
) -> dict[str, RoundedModule]:
    """Write a kohya file and return what was written, to measure the rounding against.

    The scale goes into ``lora_up`` and each ``alpha`` is its module's rank, a float32 whatever the
    ``dtype`` of the factors (bfloat16 cannot hold 257). ``ss_network_dim`` and ``ss_network_alpha``
    are "Dynamic" where ranks differ, as sd-scripts' resize writes them; ``ss_network_module`` is
    "networks.lora" unless ``metadata`` has one; ``sshs_model_hash`` is the SHA-256 of the tensors,
    ``sshs_legacy_hash`` (of 64 KiB at a place that depends on the header) is left out. sd-scripts
    takes alpha / rank by key; diffusers 0.42 gives every attention layer of such a file the most
    common alpha, so it reads files of mixed ranks wrongly.

    Raises:
        InputError: as ``write_adapter``; a module name that is not kohya's, an embedding; a path
            that does not end in .safetensors, exists (without ``overwrite``) or is an input.
    """
    rounded, convs = _rounded(path, modules, dtype, overwrite, inputs)
    tensors: dict[str, safetensors.TensorLike] = {}
    for name, module in rounded.items():
        if "." in name or not kohya.is_key(f"{name}."):
            reason = "is not a module name of kohya's (lora_..., without dots)"
            raise InputError(reason, path=path, key=name)
        tensors.update(_factors(name, STYLES["lora_down"], convs[name], module))
        tensors[f"{name}.alpha"] = _alpha(module)
    ranks = {len(module.raw_a) for module in rounded.values()}
    rank = ranks.pop() if len(ranks) == 1 else None
    texts = {
        "ss_network_module": "networks.lora",
        **(metadata or {}),
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": "Dynamic" if rank is None else str(float(rank)),
        "sshs_model_hash": safetensors.data_sha256(tensors),
    }
    _write(path, tensors, texts, overwrite, inputs, rounded, before)
    return rounded


def write_diffusers(
    path: str | os.PathLike[str],
    modules: Iterable[WrittenModule],
    *,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
    styles: Mapping[str, str] | None = None,
    prefix: str = "",
    alpha: AlphaForm = "none",
    base_model: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    before: BeforePublishing | None = None,
) -> dict[str, RoundedModule]:
    """Write a diffusers file and return what was written, to measure the rounding against.

    The scale goes into B. ``styles`` names the key style (of ``diffusers.STYLES``) of a component,
    "lora_A" where absent; ``prefix`` stands before every module name. ``alpha``: "tensors" writes
    one of the rank per module, "metadata" ``lora_adapter_metadata`` (which has ``base_model``),
    "none" nothing, which means alpha = r. Where ranks differ within diffusers' own components,
    "none" becomes "metadata": diffusers before its PR 14409 takes one alpha for all ranks.

    Raises:
        InputError: as ``write_adapter``; an embedding; a path that does not end in .safetensors,
            exists (without ``overwrite``) or is an input.
    """
    rounded, convs = _rounded(path, modules, dtype, overwrite, inputs)
    ranks: dict[str, dict[str, int]] = {}
    tensors: dict[str, safetensors.TensorLike] = {}
    for name, module in rounded.items():
        if kohya.is_key(f"{name}."):
            raise InputError("is a module name of kohya's", path=path, key=name)
        part = component(name) if "." in name else ""
        style = STYLES[(styles or {}).get(part, "lora_A")]
        tensors.update(_factors(f"{prefix}{name}", style, convs[name], module))
        ranks.setdefault(part, {})[name.removeprefix(f"{part}.")] = len(module.raw_a)
        if alpha == "tensors":
            tensors[f"{prefix}{name}.alpha"] = _alpha(module)
    texts = {"format": "pt", **(metadata or {})}
    mixed = any(len(set(of.values())) > 1 for of in ranks.values())
    if alpha == "metadata" or (alpha == "none" and mixed and ranks.keys() <= COMPONENTS):
        texts[METADATA_KEY] = _adapter_metadata(ranks, base_model)
    _write(path, tensors, texts, overwrite, inputs, rounded, before)
    return rounded


def _adapter_metadata(ranks: dict[str, dict[str, int]], base_model: str | None) -> str:
    """PEFT's config under each component's name, or plain where there are no components."""
    if not ranks.keys() <= COMPONENTS | {COMFYUI}:
        whole = {
            f"{part}.{name}" if part else name: rank
            for part, of in ranks.items()
            for name, rank in of.items()
        }
        config = adapter_config(whole, base_model=base_model)
    else:
        config = {
            f"{part}.{key}": value
            for part, of in ranks.items()
            for key, value in adapter_config(of, base_model=base_model).items()
        }
    return json.dumps(config, indent=2, sort_keys=True)


def _rounded(
    path: str | os.PathLike[str], modules: Iterable[WrittenModule], dtype: str, overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]],
) -> tuple[dict[str, RoundedModule], dict[str, ConvShape]]:  # fmt: skip
    """Round all modules, once the path is known to be good; also each module's conv_shape."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"does not end in {SUFFIX}", path=path)
    if dtype not in FACTOR_DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(FACTOR_DTYPES)}", path=path)
    AtomicFile(path, overwrite, inputs=inputs).check()
    rounded: dict[str, RoundedModule] = {}
    convs: dict[str, ConvShape] = {}
    for module in modules:
        if module.name in rounded:
            raise InputError("module given twice", path=path, key=module.name)
        if module.kind == "embedding" or module.fan_in_fan_out:
            what = "an embedding" if module.kind == "embedding" else "a transposed layer"
            reason = f"{what} has no place in a single file"
            raise InputError(reason, path=path, key=module.name)
        rounded[module.name] = round_module(module, dtype, path)
        convs[module.name] = module.conv_shape
    if not rounded:
        raise InputError("no modules to write", path=path)
    return rounded, convs


def _factors(
    stem: str, ends: tuple[str, str], conv_shape: ConvShape, rounded: RoundedModule
) -> dict[str, safetensors.TensorLike]:
    shapes = full_shapes(rounded.raw_a.shape, rounded.raw_b.shape, conv_shape)
    return {
        stem + end: (rounded.dtype, shape, raw)
        for end, shape, raw in zip(ends, shapes, (rounded.raw_a, rounded.raw_b), strict=True)
    }


def _alpha(module: RoundedModule) -> np.ndarray:
    return np.array(len(module.raw_a), np.float32)


def _write(
    path: str | os.PathLike[str], tensors: Mapping[str, safetensors.TensorLike],
    metadata: Mapping[str, str], overwrite: bool, inputs: Sequence[str | os.PathLike[str]],
    rounded: dict[str, RoundedModule], before: BeforePublishing | None,
) -> None:  # fmt: skip
    with AtomicFile(path, overwrite, inputs=inputs) as temporary:
        safetensors.write(temporary, tensors, metadata)
        if before is not None:
            before(rounded)
