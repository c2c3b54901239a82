"""LoRA files that stand alone: reading kohya's and diffusers' dialects without any weight.

Only the ``.alpha`` scalars are data that opening needs: a few bytes each, read in one call.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import InputError
from . import diffusers, kohya, strict_json
from .dtypes import DTYPE_BITS, STORAGE, to_f32
from .layout import PREFIX, Plan, PlannedModule, module_names, pair_factors
from .peft import SINGLE_NAMES, Examination
from .peft_config import ConfigReading, Resolution
from .read import read_into
from .safetensors import Entry, HeaderLayout, SafetensorsHeader, peek, read_header

SUFFIX = ".safetensors"
MERGE_KEY = "mergeprobe_fast.merge"  # metadata entry of a file that a merge wrote
Dialect = Literal["kohya", "diffusers"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])(?P<infix>\.[^.]+)?"
    r"|(?P<style>lora_linear_layer\.|lora\.|lora_)(?P<way>down|up))\.weight",
    re.DOTALL,
)
_ALPHA = ".alpha"
_STYLE = {"lora_linear_layer.": "lora_linear_layer", "lora.": "lora.down", "lora_": "lora_down"}
_ALPHA_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8".split())
_LONGEST_TEXT = 2000  # characters; tag counts and the like of a training set are not kept

# Why a key that is no factor cannot be used; the first pattern found decides.
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"lora_mid", "Tucker core (lora_mid): the update is not scale * B @ A"),
        (r"\.hada_", "LoHa weight: the update is not scale * B @ A"),
        (r"\.lokr_", "LoKr weight: the update is not scale * B @ A"),
        (r"\.(oft_|boft_)", "OFT weight: the update is not scale * B @ A"),
        (
            r"\.(dora_scale|lora_magnitude_vector)",
            "DoRA magnitude: the update is not scale * B @ A",
        ),
        (r"\.(diff|diff_b)$", "full difference of a weight or bias, not a LoRA"),
        (r"\.(w_norm|b_norm)$", "trained norm layer, not a LoRA"),
        (r"\.(on_input|[ab][12]\.weight)$", "IA3 or GLoRA weight: not scale * B @ A"),
        (r"(lora_(up|down|[AB])|lora(_linear_layer)?\.(up|down))(\.[^.]+)?\.bias$",
         "a trained bias lies outside scale * B @ A"),
        (r"lora_(up|down)\.\d+\.weight$", "factors split over several layers (split_qkv)"),
        (r"lora_embedding_", "embedding factors in a single file are not supported"),
        (r"_lora\.(up|down)\.weight$", "attention processor key of an old diffusers; load it "
         "there and save it again"),
        (r"^bundle_emb\.", "bundled text embedding: not a LoRA"),
        (r"lora", "unknown LoRA key"),
        (r"\.bias$", "trained bias: lies outside scale * B @ A"),
        (r"\.weight$", "full weight, not an update"),
    )
)  # fmt: skip
_ADAPTER_KEY = re.compile(
    r"\.lora_(A|B|down|up|mid|embedding_A|magnitude_vector)\b|\.lora\.(down|up)\.|_lora\.(down|up)\."
    r"|\.lora_linear_layer\.|\.hada_|\.lokr_|\.dora_scale$"
)


@dataclass(frozen=True, slots=True, eq=False)
class FilePlan:
    """What the keys, shapes and dtypes of a single file say, without its metadata and alphas."""

    plan: Plan
    dialect: Dialect
    alphas: tuple[Entry | None, ...]  # by position in the plan
    styles: dict[str, str]  # of ``diffusers.STYLES``, by component
    prefix: str  # what stands before every module name
    naming: str  # adapters of different namings cannot share modules


def is_single_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a safetensors file that does not belong to a PEFT folder by its name."""
    name = os.path.basename(os.fspath(path))
    return name.endswith(SUFFIX) and not SINGLE_NAMES.fullmatch(name) and os.path.isfile(path)


def holds_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a file's keys are those of a LoRA or a relative of it, complete or not.

    InputError when the header cannot be read.
    """
    return any(_ADAPTER_KEY.search(entry.key) for entry in peek(path).entries)


def examine_file(path: str | os.PathLike[str]) -> Examination:
    """Read header and alphas of a kohya or diffusers file; never raises, collects refusals."""
    path = Path(path)
    try:
        header = read_header(path)
    except InputError as error:
        return Examination(path, {}, None, (), None, None, (error,), ())
    found = plan_file(header.layout)
    plan, metadata = found.plan, header.metadata
    refused = [
        InputError(reason, path=path, key=strict_json.printable(key))
        for key, reason in plan.refused
    ]
    if not plan.modules and not plan.refused:
        refused.append(InputError("holds no LoRA factors", path=path))
    notes = list(plan.notes)
    base = kohya.base_model(metadata)
    reading = None
    if diffusers.METADATA_KEY in metadata and found.dialect == "diffusers":
        reading = diffusers.read_metadata(metadata[diffusers.METADATA_KEY])
        base = base or reading.base_model
        notes += reading.notes
        refused += [InputError(reason, path=path, key=key) for key, reason in reading.refused]
    has_alphas = any(found.alphas)
    resolved = None
    if reading and has_alphas:
        reason = "the file has alpha tensors too, and diffusers takes one or the other"
        refused.append(InputError(reason, path=path, key=diffusers.METADATA_KEY))
    elif reading and not reading.refused:
        resolved = diffusers.resolve_metadata(plan, reading.rules)
    elif not reading:
        try:
            resolved = resolve_alphas(found, _read_alphas(header, found))
        except InputError as error:  # the file changed since its header was read
            refused.append(error)
        said = (kohya if found.dialect == "kohya" else diffusers).alpha_note(metadata)
        if said and not has_alphas:
            notes.append(said)
    if resolved:
        notes += resolved.notes
        for position, reason in resolved.conflicts:
            alpha = found.alphas[position]
            key = alpha.key if alpha else plan.modules[position].name
            refused.append(InputError(reason, path=path, key=strict_json.printable(key)))
    config = {
        "naming": found.naming,
        "prefix": found.prefix,
        "styles": found.styles,
        "alpha": "metadata" if reading else "tensors" if has_alphas else "none",
        "metadata": {k: text for k, text in metadata.items() if len(text) <= _LONGEST_TEXT},
    }
    return Examination(
        path, config, ConfigReading(None, False, base, (), ()), (header,), plan, resolved,
        tuple(refused), tuple(notes), found.dialect, found.alphas,
    )  # fmt: skip


@lru_cache(maxsize=128)
def plan_file(layout: HeaderLayout) -> FilePlan:
    """Pair the factors of one file. Cached: adapters of one recipe share their layout."""
    factors = {e.key: match for e in layout.entries if (match := _FACTOR.fullmatch(e.key))}
    of_kohya = sum(kohya.is_key(key) for key in factors)
    dialect: Dialect = "kohya" if of_kohya * 2 >= max(1, len(factors)) else "diffusers"
    prefixed = sum(key.startswith(PREFIX) for key in factors)
    prefix = PREFIX if dialect == "diffusers" and prefixed * 2 > len(factors) else ""
    halves: dict[str, dict[str, tuple[int, Entry]]] = {}
    styles: dict[str, str] = {}
    alphas: dict[str, Entry] = {}
    refused: list[tuple[str, str]] = []
    notes: dict[str, None] = {}
    for entry in layout.entries:
        reason = _stranger(entry.key, dialect, prefix)
        match = factors.get(entry.key)
        if reason is None and match:
            reason = _file_factor(match, entry, dialect, len(prefix), halves, styles, notes)
        elif reason is None and entry.key.endswith(_ALPHA):
            reason = _scalar(entry)
            if reason is None:
                alphas[entry.key[len(prefix) : -len(_ALPHA)]] = entry
        elif reason is None:
            reason = _why_not(entry.key)
        if reason:
            refused.append((entry.key, reason))
    modules: list[PlannedModule] = []
    for name in sorted(halves):
        down_up = diffusers.STYLES[styles[name]]
        called = tuple(end[1:].removesuffix(".weight") for end in down_up)
        planned = pair_factors(name, halves[name], called)
        if isinstance(planned, PlannedModule):
            modules.append(planned)
        else:
            refused.extend(planned)
    refused += [
        (entry.key, "alpha of a module that has no factors here")
        for name, entry in alphas.items()
        if name not in halves
    ]
    names = module_names(tuple(module.name for module in modules))
    plan = Plan((layout,), tuple(modules), names, tuple(refused), (), tuple(notes))
    naming = "kohya" if dialect == "kohya" else diffusers.naming(halves, prefix)
    found = tuple(alphas.get(module.name) for module in modules)
    return FilePlan(plan, dialect, found, _by_component(styles), prefix, naming)


def _stranger(key: str, dialect: Dialect, prefix: str) -> str | None:
    """Why a key does not belong with the others, if so: two conventions in one file."""
    if not (_FACTOR.fullmatch(key) or key.endswith(_ALPHA)):
        return None  # what it is instead says more
    if kohya.is_key(key) != (dialect == "kohya"):
        other = "diffusers" if dialect == "kohya" else "kohya"
        return f"{other} key in a {dialect} file: the two name modules differently"
    if key.startswith(PREFIX) != bool(prefix):
        said = "without" if prefix else "with"
        return f"key {said} {PREFIX!r} among keys of the other kind"
    return None


def _why_not(key: str) -> str:
    return next((reason for pattern, reason in _REASONS if pattern.search(key)), "unknown key")


def _scalar(entry: Entry) -> str | None:
    if math.prod(entry.shape) != 1 or len(entry.shape) > 1:
        return f"alpha is not a scalar: shape {list(entry.shape)}"
    if entry.dtype not in _ALPHA_DTYPES:
        return f"alpha has dtype {entry.dtype}"
    return None


def _file_factor(
    match: re.Match[str], entry: Entry, dialect: Dialect, skip: int,
    halves: dict[str, dict[str, tuple[int, Entry]]], styles: dict[str, str],
    notes: dict[str, None],
) -> str | None:  # fmt: skip
    """File one factor under its module and role, or say why not."""
    name = match["module"][skip:]
    style = "lora_A" if match["side"] else _STYLE[match["style"]]
    if ".base_layer" in name or _FACTOR.fullmatch(f"{name}.weight"):
        return "nested LoRA"
    if match["infix"] not in (None, ".default"):
        return f"adapter name {match['infix'][1:]!r} inside the key; save the adapter without it"
    if match["infix"]:
        notes["keys carry the adapter name 'default'"] = None
    if dialect == "kohya" and style != "lora_down":
        return "kohya module name with factors of another format"
    role = match["side"] or ("A" if match["way"] == "down" else "B")
    half = halves.setdefault(name, {})
    if role in half:
        return f"second tensor for the same factor as {half[role][1].key!r}"
    if styles.setdefault(name, style) != style:
        return f"one module with both {styles[name]} and {style} keys"
    half[role] = (0, entry)
    return None


def _by_component(styles: dict[str, str]) -> dict[str, str]:
    """The style of each component; where its modules differ, the current one."""
    found: dict[str, set[str]] = {}
    for name, style in styles.items():
        found.setdefault(diffusers.component(name) if "." in name else "", set()).add(style)
    return {part: s.pop() if len(s) == 1 else "lora_A" for part, s in sorted(found.items())}


def _read_alphas(header: SafetensorsHeader, found: FilePlan) -> bytes:
    """The bytes of all alphas of planned modules, one after the other."""
    entries = [entry for entry in found.alphas if entry]
    nbytes = np.array([entry.nbytes for entry in entries], np.int64)
    buffer = np.empty(int(nbytes.sum()), np.uint8)
    if entries:
        targets = buffer.ctypes.data + np.concatenate([[0], np.cumsum(nbytes)[:-1]])
        offsets = np.array([header.data_start + entry.start for entry in entries], np.int64)
        which = np.zeros(len(entries), np.int64)
        read_into([header.stamp], which, offsets, nbytes, targets, threads=1)
    return buffer.tobytes()


@lru_cache(maxsize=256)
def resolve_alphas(found: FilePlan, raw: bytes) -> Resolution:
    """Scale of each planned module, alpha / rank; alpha = rank where there is none."""
    scales, missing, at = [], 0, 0
    conflicts = []
    for position, (module, entry) in enumerate(zip(found.plan.modules, found.alphas, strict=True)):
        alpha = float(module.rank)
        if entry is None:
            missing += 1
        else:
            alpha = _value(raw[at : at + entry.nbytes], entry.dtype)
            at += entry.nbytes
            if not (math.isfinite(alpha) and alpha > 0):
                conflicts.append((position, _bad_alpha(alpha)))
        scales.append(alpha / module.rank)
    notes: tuple[str, ...] = ()
    if missing:
        which = "no alpha in the file" if missing == len(scales) else (
            f"no alpha for {missing} of {len(scales)} modules"
        )  # fmt: skip
        notes = (f"{which}: alpha = rank is taken, scale 1",)
    return Resolution(tuple(scales), tuple(conflicts), notes)


def _value(raw: bytes, dtype: str) -> float:
    stored = np.frombuffer(raw, STORAGE[dtype], count=len(raw) * 8 // DTYPE_BITS[dtype])
    return float((to_f32(stored, dtype) if dtype == "BF16" else stored)[0])


def _bad_alpha(alpha: float) -> str:
    if alpha == 0:
        return "alpha is 0: sd-scripts trains that as alpha = rank and merges it as no update"
    if alpha < 0:
        return f"alpha is {alpha:g}: tools that take its square root cannot read it"
    return f"alpha is {alpha:g}"
