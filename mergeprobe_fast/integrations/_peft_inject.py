"""A new adapter in a live PEFT model, and nothing else changed, whether it works out or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.record.peft_layers import has


def check_name(name: Any) -> None:
    """Refuse what torch cannot use as the name of a submodule."""
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(f"must be a text without dots, got {name!r}", key="adapter_name")


def plain_config(
    tuner: LoraModel, adapters: Sequence[str], paths: Sequence[str], rank: int
) -> LoraConfig:
    """The config of a merged adapter on exactly these layers: one rank, scaling 1, no patterns."""
    first = tuner.peft_config[adapters[0]]
    layers = dict(tuner.model.named_modules())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(tuner, adapters, paths),
        # A Conv1D has it set, whatever the config said; PEFT warns where the config disagrees.
        fan_in_fan_out=any(getattr(layers[p], "fan_in_fan_out", False) for p in paths),
        lora_dropout=first.lora_dropout,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        auto_mapping=first.auto_mapping,
        inference_mode=first.inference_mode,
    )


def _targets(tuner: LoraModel, adapters: Sequence[str], paths: Sequence[str]) -> set[str] | str:
    """What selects these layers and no others: the adapters' own words, paths, or an expression."""
    inside = tuple(n + "." for n, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer))
    every = [n for n, _ in tuner.model.named_modules() if n and not n.startswith(inside)]
    given = [tuner.peft_config[a].target_modules for a in adapters]
    choices = [set(paths)]
    if all(isinstance(g, set | list) for g in given):
        choices.insert(0, {t for g in given for t in g})
    for targets in choices:
        ends = tuple(f".{t}" for t in targets)
        if {n for n in every if n in targets or n.endswith(ends)} == set(paths):
            return targets
    return "|".join(re.escape(p) for p in sorted(paths))


@contextmanager
def injected(
    tuner: LoraModel, name: str, config: LoraConfig, *, empty: bool
) -> Iterator[list[tuple[str, LoraLayer]]]:
    """Inject an adapter; yield the paths and layers that have it, for the caller to fill.

    ``empty``: weights on the meta device, and random numbers are left alone; otherwise PEFT's own
    initialisation. When the body or the injection raises, the model is as it was before. Either way
    nothing that was there before changes: active adapters, merged adapters, requires_grad.
    """
    state = _State(tuner)
    try:
        with state.kept():
            tuner.peft_config[name] = config
            with torch.random.fork_rng(devices=[]) if empty else nullcontext():
                tuner.inject_adapter(tuner.model, name, low_cpu_mem_usage=empty)
            layers = [
                (path, m) for path, m in tuner.model.named_modules()
                if isinstance(m, LoraLayer) and has(m, name)
            ]  # fmt: skip
            yield layers
            for _, layer in layers:
                _finish(layer, name)
    except BaseException:
        state.roll_back(name)
        raise


def _finish(layer: LoraLayer, name: str) -> None:
    """Freeze the adapter; its modules (dropout) are in the mode that the layer is in."""
    for attribute in layer.adapter_layer_names:
        holder = getattr(layer, attribute)
        if name not in holder:
            continue
        held = holder[name]
        held.requires_grad_(False)
        if isinstance(held, torch.nn.Module):
            held.train(layer.training)
    if name in layer.lora_dropout:
        layer.lora_dropout[name].train(layer.training)


class _State:
    """What injection may change in passing, and how to put it back."""

    def __init__(self, tuner: LoraModel) -> None:
        self._tuner = tuner
        self._modules = dict(tuner.model.named_modules())
        self._lists = [list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)]
        self._grads = [(p, p.requires_grad) for p in tuner.parameters()]
        holders = [
            m for m in self._modules.values()
            if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]  # fmt: skip
        self._active = [(m, m._active_adapter) for m in holders]
        self._merged = [(m, m.merged_adapters) for m in holders if m.merged_adapters]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put back what was set, at the end of the block."""
        for module, _ in self._merged:
            module.merged_adapters = []  # or PEFT takes them out of the base weights
        try:
            yield
        finally:
            for module, merged in self._merged:
                module.merged_adapters = merged
            for module, active in self._active:
                module._active_adapter = active
            for parameter, value in self._grads:
                parameter.requires_grad_(value)

    def roll_back(self, name: str) -> None:
        """Remove every trace of the adapter."""
        tuner = self._tuner
        tuner.peft_config.pop(name, None)
        tuner.targeted_module_names[:], tuner.targeted_parameter_names[:] = self._lists
        # Parents come first: layers that were wrapped are unwrapped from the outside.
        for path, module in self._modules.items():
            if path and tuner.model.get_submodule(path) is not module:
                parent, _, child = path.rpartition(".")
                setattr(tuner.model.get_submodule(parent), child, module)
        for module in self._modules.values():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(name)
            elif isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
                module.delete_adapter(name, None)
        with self.kept():
            pass
