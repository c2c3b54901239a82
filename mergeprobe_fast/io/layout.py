"""Which tensors make up which module of a PEFT folder, decided once per key set."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .adapter import FactorRef, ModuleKind, ModuleRef
from .dtypes import FACTOR_DTYPES
from .safetensors import Entry, HeaderLayout, SafetensorsHeader

PREFIX = "base_model.model."

_FACTOR_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<linear>[AB])(?P<infix>\.[^.]+)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?P<embedding_infix>\.[^.]+)?)",
    re.DOTALL,
)

# Why a key that is no factor cannot be used; the first pattern found decides.
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"lora_magnitude_vector", "DoRA magnitude: the update is not scale * B @ A"),
        (r"lora_B(\.[^.]+)?\.bias$", "lora_bias: a trained bias lies outside scale * B @ A"),
        (r"(^|\.)(hada_[tw]|lokr_|oft_|boft_)", "LoHa, LoKr or OFT weight: not a LoRA"),
        (r"lora_mid", "Tucker core (lora_mid): the update is not scale * B @ A"),
        (r"lora_(diag|E|ranknum)\b|(^|\.)ranknum", "diagonal between A and B (KaSA, AdaLoRA)"),
        (r"lora_monteclora", "MonteCLoRA sampler: the update is random"),
        (r"lora_(down|up)\b|\.alpha$|lora_unet|lora_te", "kohya or diffusers key in a PEFT folder"),
        (r"(token_adapter|trainable_tokens_)", "trainable token rows lie outside scale * B @ A"),
        (r"(modules_to_save|original_module)\.", "modules_to_save: a full weight, not an update"),
        (r"\.base_layer\..*lora_", "nested LoRA (MultiheadAttention or target_parameters)"),
        (r"\.base_layer\.", "full base weight saved beside its LoRA (save_embedding_layers)"),
        (r"lora_", "unknown LoRA key"),
        (r"\.bias$", "trained bias (bias is not 'none'): lies outside scale * B @ A"),
        (
            r"^base_model\.model\..+\.weight$",
            "full weight (modules_to_save or save_embedding_layers), not an update",
        ),
    )
)
_IGNORED = re.compile(r"base_model\.model\..+\.lora_velora_embed(\.[^.]+)?")
_IGNORED_REASON = "VeLoRA projection: used by the backward pass only"


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module whose pair of factors was found, and in which of the adapter's files each lies."""

    name: str
    kind: ModuleKind
    rank: int
    d_in: int
    d_out: int
    a: Entry
    b: Entry
    file_a: int
    file_b: int


@dataclass(frozen=True, slots=True, eq=False)
class ModuleNames:
    """Sorted module names and their positions; adapters of the same modules share one object."""

    names: tuple[str, ...]
    index: dict[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the keys, shapes and dtypes of an adapter's files say, without its config."""

    layouts: tuple[HeaderLayout, ...]
    modules: tuple[PlannedModule, ...]  # sorted by name
    names: ModuleNames
    refused: tuple[tuple[str, str], ...]  # (key, reason)
    ignored: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@lru_cache(maxsize=64)
def plan_modules(layouts: tuple[HeaderLayout, ...]) -> Plan:
    """Pair the factors of all files. Cached: adapters of one recipe share their layouts."""
    refused: list[tuple[str, str]] = []
    ignored: list[tuple[str, str]] = []
    notes: list[str] = []
    halves: dict[str, dict[str, tuple[int, Entry]]] = {}
    for number, layout in enumerate(layouts):
        for entry in layout.entries:
            match = _FACTOR_KEY.fullmatch(entry.key)
            if match is None or ".base_layer." in entry.key:
                if _IGNORED.fullmatch(entry.key):
                    ignored.append((entry.key, _IGNORED_REASON))
                else:
                    refused.append((entry.key, _why_not(entry.key)))
                continue
            reason = _file_factor(match, number, entry, halves, notes)
            if reason:
                refused.append((entry.key, reason))
    modules: list[PlannedModule] = []
    for name in sorted(halves):
        planned = pair_factors(name, halves[name])
        if isinstance(planned, PlannedModule):
            modules.append(planned)
        else:
            refused.extend(planned)
    names = module_names(tuple(module.name for module in modules))
    return Plan(layouts, tuple(modules), names, tuple(refused), tuple(ignored), tuple(notes))


@lru_cache(maxsize=64)
def module_names(names: tuple[str, ...]) -> ModuleNames:
    """The object that all adapters of these modules share."""
    return ModuleNames(names, {name: position for position, name in enumerate(names)})


def _why_not(key: str) -> str:
    for pattern, reason in _REASONS:
        if pattern.search(key):
            return reason
    if not key.startswith(PREFIX):
        return f"unknown key: does not start with {PREFIX!r}"
    return "unknown key"


def _file_factor(
    match: re.Match[str],
    number: int,
    entry: Entry,
    halves: dict[str, dict[str, tuple[int, Entry]]],
    notes: list[str],
) -> str | None:
    """File one factor under its module and role, or say why not."""
    infix = match["infix"] or match["embedding_infix"]
    if infix not in (None, ".default"):
        return (
            f"adapter name {infix[1:]!r} inside the key: PEFT loads it only under that name; "
            "save the adapter with save_pretrained"
        )
    if infix:
        note = "keys carry the adapter name 'default', as PEFT 0.21 loads but does not write"
        if note not in notes:
            notes.append(note)
    role = match["linear"] or f"embedding_{match['embedding']}"
    module = halves.setdefault(sys.intern(match["module"]), {})
    if role in module:
        return f"second tensor for the same factor as {module[role][1].key!r}"
    module[role] = (number, entry)
    return None


def pair_factors(
    name: str, half: dict[str, tuple[int, Entry]], called: tuple[str, str] = ("lora_A", "lora_B")
) -> PlannedModule | list[tuple[str, str]]:
    """Check one module's tensors against each other: the module, or (key, reason) refusals.

    ``half`` maps a role ("A", "B", "embedding_A", "embedding_B") to (file number, tensor);
    ``called`` is what the format calls A and B of a linear layer.
    """
    keys = [entry.key for _, entry in half.values()]
    roles = set(half)
    embedding = any(role.startswith("embedding") for role in roles)
    if embedding and not all(role.startswith("embedding") for role in roles):
        return [(key, "module has linear and embedding factors") for key in keys]
    wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for role, said in zip(wanted, called, strict=True):
        if role not in roles:
            said = f"lora_{role}" if embedding else said
            return [(keys[0], f"half a pair: the module has no {said}")]
    a, b = half[wanted[0]], half[wanted[1]]
    for _, entry in (a, b):
        if entry.dtype not in FACTOR_DTYPES:
            return [(entry.key, f"dtype {entry.dtype}: factors must be F32, BF16 or F16")]
        if entry.nbytes == 0:
            reason = f"rank 0 or no weights (shape {list(entry.shape)})"
            return [(entry.key, f"{reason}: a sharded model saved without gathering?")]
    return _match_shapes(name, embedding, a, b)


def _match_shapes(
    name: str, embedding: bool, a: tuple[int, Entry], b: tuple[int, Entry]
) -> PlannedModule | list[tuple[str, str]]:
    shape_a, shape_b = a[1].shape, b[1].shape
    said = f"A is {list(shape_a)}, B is {list(shape_b)}"
    kind: ModuleKind
    if len(shape_a) == len(shape_b) == 2:
        kind = "embedding" if embedding else "linear"
    elif len(shape_a) == len(shape_b) == 4 and not embedding:
        kind = "conv2d"
        if shape_b[2:] != (1, 1):
            return [(b[1].key, f"Conv2d B must be (out, rank, 1, 1): {said}")]
    elif len(shape_a) in (3, 5) and not embedding:
        which = "Conv1d" if len(shape_a) == 3 else "Conv3d"
        return [(a[1].key, f"{which} is not supported: {said}")]
    else:
        return [(a[1].key, f"shapes fit no linear, embedding or Conv2d layer: {said}")]
    if shape_a[0] != shape_b[1]:
        hint = "; grouped convolutions are not supported" if kind == "conv2d" else ""
        return [(a[1].key, f"ranks of A and B differ: {said}{hint}")]
    rank = shape_a[0]
    return PlannedModule(
        name, kind, rank, math.prod(shape_a[1:]), shape_b[0], a[1], b[1], a[0], b[0]
    )


class ModuleTable(Mapping[str, ModuleRef]):
    """Read-only mapping of module name to ``ModuleRef``; a ref is made each time it is asked for.

    An adapter then costs its scales and file stamps, not some hundred objects: 50,000 open
    adapters fit in memory. The plan and the scales are shared by adapters of one recipe.
    """

    __slots__ = ("_fan_in_fan_out", "_plan", "_scales", "_stamps", "_starts")

    def __init__(
        self,
        plan: Plan,
        headers: tuple[SafetensorsHeader, ...],
        scales: tuple[float, ...],
        fan_in_fan_out: bool,
    ) -> None:
        self._plan = plan
        self._stamps = tuple(header.stamp for header in headers)
        self._starts = tuple(header.data_start for header in headers)
        self._scales = scales
        self._fan_in_fan_out = fan_in_fan_out

    @property
    def plan(self) -> Plan:
        """Names, shapes and dtypes; adapters of one recipe share the object."""
        return self._plan

    def __getitem__(self, name: str) -> ModuleRef:
        return self._ref(self._plan.names.index[name])

    def __contains__(self, name: object) -> bool:
        return name in self._plan.names.index

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.names.index)

    def __len__(self) -> int:
        return len(self._plan.modules)

    def __repr__(self) -> str:
        return f"<{len(self)} modules>"

    def _ref(self, position: int) -> ModuleRef:
        planned = self._plan.modules[position]
        return ModuleRef(
            name=planned.name,
            kind=planned.kind,
            rank=planned.rank,
            d_in=planned.d_in,
            d_out=planned.d_out,
            scale=self._scales[position],
            a=self._factor(planned.a, planned.file_a),
            b=self._factor(planned.b, planned.file_b),
            fan_in_fan_out=self._fan_in_fan_out and planned.kind == "linear",
        )

    def _factor(self, entry: Entry, number: int) -> FactorRef:
        start = self._starts[number] + entry.start
        stamp = self._stamps[number]
        return FactorRef(stamp, entry.key, entry.dtype, entry.shape, start, entry.nbytes)


def full_shapes(
    a: tuple[int, ...], b: tuple[int, ...], conv_shape: tuple[int, int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes on disk of flattened factors (rank, d_in) and (d_out, rank)."""
    return (a, b) if conv_shape is None else ((a[0], *conv_shape), (b[0], b[1], 1, 1))
