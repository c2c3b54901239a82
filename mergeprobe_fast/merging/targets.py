"""Which tensor of a base model each adapted module means, and how its delta lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import FactorRef
from mergeprobe_fast.io.checkpoint import CONFIG_NAME, Checkpoint
from mergeprobe_fast.io.dtypes import FACTOR_DTYPES
from mergeprobe_fast.zoo import Module, Zoo

_SUFFIX = ".weight"
_HEADS = ("lm_head", "embed_out", "output", "output_layer", "decoder", "vocab_projector")
_TABLES = ("embed_tokens", "wte", "shared", "word_embeddings", "embed_in", "tok_embeddings")
_CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt")  # their linear layers are (in, out)
_HAS_HEAD = ("LMHead", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


@dataclass(frozen=True)
class Target:
    """The tensor that a module's delta is added to."""

    module: Module
    tensor: FactorRef
    transposed: bool  # the tensor holds delta^T: embeddings, transformers' Conv1D

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix; a Conv2d weight is (out, in * height * width)."""
        return self.module.d_in if self.transposed else self.module.d_out

    @property
    def cols(self) -> int:
        """Columns of the tensor as a matrix."""
        return self.module.d_out if self.transposed else self.module.d_in


def find_targets(zoo: Zoo, base: Checkpoint) -> dict[str, Target]:
    """The target of every module of the zoo, by the module's name.

    A module is the tensor ``<module>.weight``. Checkpoints and models may differ in a prefix (GPT-2
    is saved without ``transformer.``): otherwise it is the one tensor whose path ends in the
    module's, or which the module's path ends in.

    Raises:
        InputError: no tensor, or several, for a module; two modules for one; shapes or dtypes that
            do not fit; an update to one of two tied weights; adapters that are no PEFT folders.
    """
    for adapter in zoo:
        if adapter.format != "peft":
            reason = (
                f"is a {adapter.format} file: its names are not those of a base model's tensors; "
                "only PEFT adapters can be merged into base weights"
            )
            raise InputError(reason, path=adapter.path)
    lookup = _Lookup(base)
    chosen: dict[str, Module] = {}
    tensors: dict[str, FactorRef] = {}
    for module in zoo.modules:
        tensor = lookup.find(module.name)
        other = chosen.setdefault(tensor.key, module)
        if other is not module:
            reason = f"both {other.name} and this would be added to {tensor.key}"
            raise InputError(reason, path=base.path, key=module.name)
        if tensor.dtype not in FACTOR_DTYPES:
            reason = f"is {tensor.dtype}; an update can be added to {', '.join(FACTOR_DTYPES)}"
            raise InputError(reason, path=tensor.file.path, key=tensor.key)
        _check_shape(module, tensor)
        _refuse_tied(module, tensor, base)
        tensors[module.name] = tensor
    transposed = _transposed(zoo, tensors, base)
    return {m.name: Target(m, tensors[m.name], transposed[m.name]) for m in zoo.modules}


class _Lookup:
    """Tensors by their paths, and by every tail of their paths."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._paths = {
            key.removesuffix(_SUFFIX): ref
            for key, ref in base.tensors.items()
            if key.endswith(_SUFFIX)
        }
        self._tails: dict[str, list[str]] = {}
        for path in self._paths:
            for tail in _tails(path):
                self._tails.setdefault(tail, []).append(path)

    def find(self, module: str) -> FactorRef:
        if module in self._paths:
            return self._paths[module]
        found = [*self._tails.get(module, []), *(t for t in _tails(module) if t in self._paths)]
        if len(found) == 1:
            return self._paths[found[0]]
        if found:
            shown = " and ".join(f"{path}{_SUFFIX}" for path in sorted(found)[:2])
            reason = f"may be any of {len(found)} tensors of the base, such as {shown}"
            raise InputError(reason, path=self._base.path, key=module)
        if module.rpartition(".")[2] in _HEADS and _ties(self._base.config):
            reason = (
                "is tied to the input embedding: the base has no tensor of its own for it, and "
                "changing the shared one would change both; untie them in the base first"
            )
            raise InputError(reason, path=self._base.path, key=module)
        reason = (
            f"the base has no tensor for this module: neither {module}{_SUFFIX}, nor one that "
            "has another prefix"
        )
        raise InputError(reason, path=self._base.path, key=module)


def _tails(path: str) -> list[str]:
    """What follows each dot."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _check_shape(module: Module, tensor: FactorRef) -> None:
    plain, swapped = (module.d_out, module.d_in), (module.d_in, module.d_out)
    fitting = {
        "linear": (plain, swapped),
        "embedding": (swapped,),
        "conv2d": ((module.d_out, *(module.conv_shape or ())),),
    }[module.kind]
    if tensor.shape not in fitting:
        size = " x ".join(map(str, tensor.shape))
        reason = (
            f"is {size}, the update of {module.name} is {module.d_out} x {module.d_in}: "
            "not the same base model"
        )
        raise InputError(reason, path=tensor.file.path, key=tensor.key)


def _transposed(
    zoo: Zoo, tensors: Mapping[str, FactorRef], base: Checkpoint
) -> dict[str, bool]:
    """Whether each tensor holds delta^T.

    Of a linear layer the shape says it. Only a square one needs the adapters' fan_in_fan_out, and
    that is not reliable (PEFT 0.21 corrects it for the first adapter of a model, and for the last
    layer it sees): where other layers, or the kind of model, show how the base lies, that counts.
    """
    found = {m.name: m.kind == "embedding" for m in zoo.modules}
    square = []
    evidence = {True} if base.config.get("model_type") in _CONV1D_MODELS else set()
    for m in zoo.modules:
        if m.kind == "linear" and m.d_out == m.d_in:
            square.append(m.name)
        elif m.kind == "linear":
            found[m.name] = tensors[m.name].shape == (m.d_in, m.d_out)
            if m.name.rpartition(".")[2] not in _HEADS:  # a Linear even where others are not
                evidence.add(found[m.name])
    for name in square:
        said = {a.modules[name].fan_in_fan_out for a in zoo if name in a.modules}
        agreed = evidence or said
        if len(agreed) > 1 or (agreed == {False} and True in said):
            reason = (
                "is square, and the other layers and the adapters' fan_in_fan_out do not agree on "
                "whether the base stores it as (in, out)"
            )
            raise InputError(reason, path=tensors[name].file.path, key=tensors[name].key)
        found[name] = True in agreed
    return found


def _refuse_tied(module: Module, tensor: FactorRef, base: Checkpoint) -> None:
    """Refuse one of two tied weights: the adapter changes one of them, a merge both."""
    if not _ties(base.config) or not _may_be_tied(module, tensor, base):
        return
    other = "output head" if module.kind == "embedding" else "input embedding"
    if not _partner(module, tensor, base):
        reason = (
            f"{module.name} is tied to the {other} ({CONFIG_NAME}: tie_word_embeddings): adding "
            "the update would change both, which the adapters do not; untie them in the base first"
        )
        raise InputError(reason, path=tensor.file.path, key=tensor.key)


def tied_notes(targets: Mapping[str, Target], base: Checkpoint) -> list[str]:
    """What to say where the config ties weights that the checkpoint has apart."""
    if _said(base.config, "tie_word_embeddings") is not True:
        return []
    return [
        f"{t.module.name}: {CONFIG_NAME} ties it to {_partner(t.module, t.tensor, base)}, which "
        "the base has apart; transformers before 5 ties them on loading all the same: "
        "set tie_word_embeddings to false"
        for t in targets.values()
        if _may_be_tied(t.module, t.tensor, base) and _partner(t.module, t.tensor, base)
    ]


def _may_be_tied(module: Module, tensor: FactorRef, base: Checkpoint) -> bool:
    vocabulary = _said(base.config, "vocab_size")
    named = module.kind == "embedding" or module.name.rpartition(".")[2] in _HEADS
    return named and len(tensor.shape) == 2 and vocabulary in (None, tensor.shape[0])


def _partner(module: Module, tensor: FactorRef, base: Checkpoint) -> str | None:
    """The key of the other of two weights that are tied in other models of this kind."""
    names = _HEADS if module.kind == "embedding" else _TABLES
    for key, ref in base.tensors.items():
        last = key.removesuffix(_SUFFIX).rpartition(".")[2]
        if ref.shape == tensor.shape and key != tensor.key and last in names:
            return key
    return None


def _said(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or of its language model's."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, dict) else None)


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config uses its input embedding as output head."""
    ties = _said(config, "tie_word_embeddings")
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return ties is True
    # Left out, it is True for the older architectures, which write no such key.
    return ties is not False and any(part in str(name) for name in names for part in _HAS_HEAD)
