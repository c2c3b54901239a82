"""diffusers' single files, and their relatives: which keys are theirs, and metadata with scales.

Keys are module paths with a component in front (``unet.``, ``transformer.``, ``text_encoder.``),
ComfyUI's ``diffusion_model.``, PEFT's ``base_model.model.`` or nothing, and end as ``STYLES`` says.
Scale: ``<module>.alpha`` tensors; else the ``lora_adapter_metadata`` that diffusers 0.34 and later
write (PEFT config keys under the component's name); else alpha = r.
Source: huggingface/diffusers, `loaders/lora_base.py` and `utils/state_dict_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import strict_json
from .layout import PREFIX, Plan, module_names
from .peft_config import Resolution, ScaleRules, read_config, resolve
from .strict_json import Bad

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = frozenset(
    "unet transformer transformer_2 transformer_ref text_encoder text_encoder_2 text_encoder_3 "
    "text_conditioner connectors prior controlnet".split()
)
COMFYUI = "diffusion_model"

# How the keys of A and B end.
STYLES = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def component(name: str) -> str:
    """The first part of a module path."""
    return name.partition(".")[0]


def naming(names: Iterable[str], prefix: str) -> str:
    """Whose names the modules have: "diffusers", "diffusion_model" or "path"."""
    parts = {component(name) for name in names}
    if prefix == PREFIX:
        return "path"
    if COMFYUI in parts:
        return COMFYUI
    return "diffusers" if parts and parts <= COMPONENTS else "path"


@dataclass(frozen=True, slots=True)
class MetadataReading:
    """``lora_adapter_metadata``, checked."""

    rules: tuple[tuple[str, ScaleRules], ...]  # by component, "" when keys have none
    base_model: str | None
    refused: tuple[tuple[str, str], ...]  # (key, reason)
    notes: tuple[str, ...]


def read_metadata(text: str) -> MetadataReading:
    """Check the JSON text: one PEFT config per component; never raises, lists what is wrong."""
    try:
        entries = strict_json.parse(text.encode("utf-8", "surrogatepass"), METADATA_KEY)
    except Bad as bad:
        return MetadataReading((), None, ((METADATA_KEY, bad.reason),), ())
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        owner, _, name = key.rpartition(".")
        configs.setdefault(owner, {"peft_type": "LORA"})[name] = value
    rules, refused, notes, bases = [], [], [], set()
    for owner, config in sorted(configs.items()):
        where = f"{METADATA_KEY}: {owner}." if owner else f"{METADATA_KEY}: "
        reading = read_config(config)
        refused += [(where + key, reason) for key, reason in reading.refused]
        if reading.fan_in_fan_out:
            refused.append((where + "fan_in_fan_out", "transposed layers have no place here"))
        notes += [f"{owner or 'metadata'}: {note}" for note in reading.notes]
        bases.add(reading.base_model)
        if reading.rules:
            rules.append((owner, reading.rules))
    if not configs:
        refused.append((METADATA_KEY, "is empty: it gives no rank and alpha"))
    bases.discard(None)
    base = bases.pop() if len(bases) == 1 else None
    return MetadataReading(tuple(rules), base, tuple(refused), tuple(notes))


@lru_cache(maxsize=256)
def resolve_metadata(plan: Plan, rules: tuple[tuple[str, ScaleRules], ...]) -> Resolution:
    """Scale of each planned module: its component's rules on its path within the component."""
    scales = [1.0] * len(plan.modules)
    conflicts: list[tuple[int, str]] = []
    notes: list[str] = []
    left = dict.fromkeys(range(len(plan.modules)))
    for owner, rule in rules:
        if not owner and len(rules) > 1:
            notes.append(f"{METADATA_KEY} has keys of no component, which no module follows")
            continue
        start = f"{owner}." if owner else ""
        # Keys of no component are read for names of none only: diffusers drops the others.
        mine = [
            position for position in left
            if (plan.modules[position].name.startswith(start) if owner
                else component(plan.modules[position].name) not in (*COMPONENTS, COMFYUI))
        ]  # fmt: skip
        if not mine:
            notes.append(f"{METADATA_KEY} has a component {owner!r} without tensors")
            continue
        modules = tuple(plan.modules[position] for position in mine)
        names = module_names(tuple(module.name[len(start) :] for module in modules))
        found = resolve(Plan(plan.layouts, modules, names, (), (), ()), rule)
        for position, scale in zip(mine, found.scales, strict=True):
            scales[position] = scale
            del left[position]
        conflicts += [(mine[position], reason) for position, reason in found.conflicts]
        notes += found.notes
    silent = f"{METADATA_KEY} says nothing about its component"
    conflicts += [(position, silent) for position in left]
    return Resolution(tuple(scales), tuple(sorted(conflicts)), tuple(notes))


def alpha_note(metadata: Mapping[str, str]) -> str | None:
    """What to say of a file without scales whose free text names an alpha all the same."""
    for key in ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha"):
        if key in metadata:
            return f"metadata {key} is {metadata[key][:40]!r}, which diffusers does not apply"
    return None
