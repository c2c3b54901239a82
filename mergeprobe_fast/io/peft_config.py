"""What an ``adapter_config.json`` says: the rules of scale, and what cannot be handled."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .layout import ModuleNames, Plan
from .strict_json import printable

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser  # type: ignore[no-redef]

# PEFT 0.21.2 `tuners/lora/config.py`, and `config.py` for what every method shares.
KNOWN_KEYS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_config megatron_core trainable_token_indices loftq_config eva_config "
    "corda_config lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora "
    "qalora_group_size monteclora_config layer_replication runtime_config lora_bias "
    "target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying".split()
)

# Keys that, when set, say the adapter is more than scale * B @ A.
_REFUSED_WHEN_SET = {
    "use_dora": "DoRA: the update is not scale * B @ A",
    "lora_bias": "a trained bias lies outside scale * B @ A",
    "modules_to_save": "full trained weights lie outside scale * B @ A",
    "target_parameters": "adapters on bare parameters (target_parameters) are not supported",
    "trainable_token_indices": "trained token rows lie outside scale * B @ A",
    "layer_replication": "the adapter belongs to a base model with repeated layers",
    "alora_invocation_tokens": "aLoRA acts on some tokens only and cannot be merged",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes between adapters; it has no fixed update",
    "kasa_config": "KaSA puts a diagonal between A and B and truncates the base",
    "monteclora_config": "MonteCLoRA samples its update",
    "use_qalora": "QA-LoRA pools its inputs: A does not have the layer's width",
    "enable_lora": "merged linear layers of PEFT before 0.3 are not supported",
}

# An initialisation that rewrites the base weights makes B @ A an update of a base that nobody else
# has: PEFT subtracts scale * B0 @ A0 from the base when it loads such an adapter. Converting
# (``path_initial_model_for_weight_conversion``) sets init_lora_weights to true.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class ScaleRules:
    """How PEFT finds a module's rank and scale; hashable, patterns in their order."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class ConfigReading:
    """A config, checked."""

    rules: ScaleRules | None  # None when they cannot be known; then ``refused`` says why
    fan_in_fan_out: bool
    base_model: str | None
    refused: tuple[tuple[str, str], ...]  # (config key, reason)
    notes: tuple[str, ...]


def read_config(config: dict[str, Any]) -> ConfigReading:
    """Check a parsed ``adapter_config.json``; never raises, lists what is wrong."""
    refused: list[tuple[str, str]] = []
    notes: list[str] = []
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        said = "is missing" if "peft_type" not in config else f"is {_show(peft_type)}, not 'LORA'"
        refused.append(("peft_type", said))
    for key, reason in _REFUSED_WHEN_SET.items():
        if config.get(key) not in (None, False, [], {}, ""):
            refused.append((key, f"{_show(config[key])}: {reason}"))
    _check_init(config.get("init_lora_weights", True), refused)
    rules = _rules(config, refused, notes)
    fan_in_fan_out = _boolean(config, "fan_in_fan_out", refused)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        refused.append(("base_model_name_or_path", f"is {_show(base)}, not a string"))
        base = None
    _note_oddities(config, notes)
    return ConfigReading(rules, fan_in_fan_out, base or None, tuple(refused), tuple(notes))


def _check_init(init: Any, refused: list[tuple[str, str]]) -> None:
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(_CHANGES_BASE):
        reason = (
            "the factors are relative to base weights that this initialisation changed; save "
            "with path_initial_model_for_weight_conversion to get an ordinary LoRA"
        )
    elif name in _KEEPS_BASE:
        return
    else:
        reason = "unknown initialisation: it may have changed the base weights"
    refused.append(("init_lora_weights", f"{_show(init)}: {reason}"))


def _rules(
    config: dict[str, Any], refused: list[tuple[str, str]], notes: list[str]
) -> ScaleRules | None:
    before = len(refused)
    for key in ("r", "lora_alpha"):
        if key not in config:
            notes.append(f"{key} is not in the config: PEFT's default 8 applies")
    r = _rank(config.get("r", 8), "r", refused)
    alpha = _alpha(config.get("lora_alpha", 8), "lora_alpha", refused)
    rslora = _boolean(config, "use_rslora", refused)
    ranks = [
        (key, _rank(value, f"rank_pattern[{key!r}]", refused))
        for key, value in _pattern(config, "rank_pattern", refused)
    ]
    alphas = [
        (key, _alpha(value, f"alpha_pattern[{key!r}]", refused))
        for key, value in _pattern(config, "alpha_pattern", refused)
    ]
    if len(refused) > before:
        return None
    return ScaleRules(r, alpha, rslora, tuple(ranks), tuple(alphas))


def _rank(value: Any, key: str, refused: list[tuple[str, str]]) -> int:
    if type(value) is not int or value <= 0:
        refused.append((printable(key), f"rank {_show(value)} is not a positive integer"))
        return 1
    return value


def _alpha(value: Any, key: str, refused: list[tuple[str, str]]) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except OverflowError:
        pass
    refused.append((printable(key), f"alpha {_show(value)} is not a finite number"))
    return 1.0


def _boolean(config: dict[str, Any], key: str, refused: list[tuple[str, str]]) -> bool:
    value = config.get(key, False)
    if value is not None and not isinstance(value, bool):
        refused.append((key, f"is {_show(value)}, not true or false"))
    return value is True


def _pattern(
    config: dict[str, Any], key: str, refused: list[tuple[str, str]]
) -> Iterable[tuple[str, Any]]:
    patterns = config.get(key)
    if patterns is None:
        return ()
    if not isinstance(patterns, dict):
        refused.append((key, f"is {_show(patterns)}, not an object"))
        return ()
    for pattern in patterns:
        try:
            _compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            refused.append((key, f"{_show(pattern)} is not a regular expression: {error}"))
            continue
        if _may_hang(pattern):
            refused.append((key, f"{_show(pattern)} could take for ever to match (nested repeats)"))
    return patterns.items()


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd but valid syntax; PEFT does not mind either
        return re.compile(rf"(.*\.)?({pattern})$")


_MAX_REPEATS = 4  # each open-ended repeat multiplies the steps by the length of a module path


@lru_cache(maxsize=4096)
def _may_hang(pattern: str) -> bool:
    """Whether matching could backtrack exponentially, or as a high power of the path's length.

    Python's matcher has no time limit, and a pattern comes from a file. Patterns of real configs
    have an open-ended repeat or two, side by side.
    """
    repeats = 0

    def nested(items: Any, inside: bool) -> bool:
        nonlocal repeats
        for op, argument in items:
            name = str(op)
            if name in ("MAX_REPEAT", "MIN_REPEAT"):
                _, most, body = argument
                open_ended = most > 64
                repeats += open_ended
                if (open_ended and inside) or nested(body, inside or most > 1):
                    return True
            elif name == "BRANCH":
                if inside or any(nested(branch, inside) for branch in argument[1]):
                    return True
            elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
                body = argument if name == "ATOMIC_GROUP" else argument[-1]
                if nested(body, inside):
                    return True
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nested(_parser.parse(pattern), False) or repeats > _MAX_REPEATS


def _note_oddities(config: dict[str, Any], notes: list[str]) -> None:
    unknown = sorted(
        printable(key) for key in config.keys() - KNOWN_KEYS - _REFUSED_WHEN_SET.keys()
    )
    if unknown:
        notes.append(f"config keys not known to PEFT 0.21.2, not interpreted: {', '.join(unknown)}")
    if config.get("bias", "none") not in ("none", None):
        notes.append(f"bias is {_show(config['bias'])}, but a bias is refused only if saved")
    if config.get("velora_config"):
        notes.append("VeLoRA changes the backward pass only; read as an ordinary LoRA")
    if config.get("megatron_config"):
        notes.append("trained under Megatron; the file must hold the whole, not one rank's share")


def _show(value: Any) -> str:
    return printable(repr(value)[:80])


@lru_cache(maxsize=16384)
def _matches(pattern: str, names: ModuleNames) -> tuple[int, ...]:
    match = _compile(pattern).match
    return tuple(position for position, name in enumerate(names.names) if match(name))


def find_patterns(
    patterns: Sequence[tuple[str, Any]], names: ModuleNames, default: Any
) -> tuple[list[Any], int | None]:
    """For each module the value of the first pattern that matches it, as PEFT 0.21.2 finds it.

    The second result is the position of a module that several patterns give different values, or
    None: there the order of the file decides.

    `get_pattern_key` in PEFT's `utils/other.py`: `re.match(rf"(.*\\.)?({key})$", name)` in the
    order of the dict. When none matches, PEFT looks the name itself up in the dict, which finds a
    name with regex characters that does not match itself.
    """
    literal = dict(patterns)
    values = [literal.get(name, default) for name in names.names]
    matched: set[int] = set()
    ambiguous = None
    for pattern, value in reversed(patterns):
        for position in _matches(pattern, names):
            if position in matched and values[position] != value:
                ambiguous = position
            matched.add(position)
            values[position] = value
    return values, ambiguous


@dataclass(frozen=True, slots=True)
class Resolution:
    """Scale rules applied to a plan."""

    scales: tuple[float, ...]  # by position in the plan
    conflicts: tuple[tuple[int, str], ...]  # (position, reason) where the ranks disagree
    notes: tuple[str, ...]


@lru_cache(maxsize=256)
def resolve(plan: Plan, rules: ScaleRules) -> Resolution:
    """Scale of each planned module. Cached: adapters of one recipe share it."""
    ranks, _ = find_patterns(rules.rank_pattern, plan.names, rules.r)
    alphas, ambiguous = find_patterns(rules.alpha_pattern, plan.names, rules.alpha)
    conflicts = tuple(
        (position, f"the config gives rank {rank}, the tensors have {module.rank}")
        for position, (rank, module) in enumerate(zip(ranks, plan.modules, strict=True))
        if rank != module.rank
    )
    root = math.sqrt if rules.rslora else float
    scales = tuple(alpha / root(rank) for alpha, rank in zip(alphas, ranks, strict=True))
    notes: tuple[str, ...] = ()
    if ambiguous is not None:  # a wrong rank would show in the shapes, a wrong alpha does not
        name = printable(plan.names.names[ambiguous])
        notes = (
            f"several alpha_pattern keys match {name}; the first one is taken, as PEFT loads it, "
            "but PEFT sorts the keys when it saves: training may have used another",
        )
    return Resolution(scales, conflicts, notes)
