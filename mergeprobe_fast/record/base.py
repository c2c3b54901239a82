"""The base model: its config, tokenizer and weights from a local folder, or a model object."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import BackendError, InputError, MergeprobeError
from mergeprobe_fast.finding import text as valid_text
from mergeprobe_fast.io import safetensors, strict_json
from mergeprobe_fast.io.adapter import FactorRef
from mergeprobe_fast.io.read import read_into

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")


class NotStreamable(Exception):
    """Why a model has to be loaded as a whole; never leaves this package."""


@dataclass(eq=False)
class Base:
    """A base model as it was given: a folder, or an object that is already in memory."""

    name: str  # what the config declares, else the path as it was given
    path: Path | None
    config: PretrainedConfig
    config_sha256: str
    dtype: torch.dtype
    model: PreTrainedModel | None  # the object that was given
    given_tokenizer: Any
    device: Any = None  # from ops.open_device: where a folder's model is put; None: the CPU

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; InputError when there is none."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self.path is None:
            raise InputError("text needs a tokenizer beside the model object; or give input_ids")
        from transformers import AutoTokenizer

        with _loading(self.path, "tokenizer"):
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    def whole(self) -> PreTrainedModel:
        """The model with all its weights, ready to run."""
        if self.model is not None:
            return self.model
        import torch
        from transformers import AutoModelForCausalLM

        # Weights loaded in a caller's inference mode could never be part of a graph.
        normal = torch.inference_mode(False)
        with _loading(self.path, "model"), _without_progress_bars(), normal:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.path, local_files_only=True, use_safetensors=True, output_loading_info=True,
                **{_dtype_word(): self.dtype},
            )  # fmt: skip
        for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
            if report.get(problem):
                # transformers would go on with random numbers there.
                first = sorted(map(str, report[problem]))[0]
                raise InputError(f"the weights do not fit the model: {problem}", path=self.path,
                                 key=first)  # fmt: skip
        if self.device is not None:
            try:
                model = model.to(self.device.torch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                reason = f"the model does not go on {self.device.torch}: {error}".splitlines()[0]
                raise BackendError(reason) from error
        return model.eval()

    def skeleton(self) -> PreTrainedModel:
        """The model with its buffers, but all parameters on the meta device."""
        import torch
        from transformers import AutoModelForCausalLM

        with _loading(self.path, "model"), _parameters_on_meta(torch):
            model = AutoModelForCausalLM.from_config(self.config, **{_dtype_word(): self.dtype})
        return model.eval()


def open_base(base: Any, tokenizer: Any, dtype: str, device: Any = None) -> Base:
    """Open a folder with config.json, safetensors and tokenizer files, or take a model object.

    ``dtype`` is what to compute in. "auto" is float32 for a folder (on a CPU the fastest, and with
    one layer in memory at a time it costs little), and what it is for an object.
    """
    import torch

    if dtype != "auto" and dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}")
    if not isinstance(base, (str, os.PathLike)):
        if device is not None:
            raise InputError("cannot be set for a model object; move it before", key="device")
        return _open_object(base, tokenizer, dtype)
    path = Path(base)
    raw = path / "config.json"
    if not raw.is_file():
        raise InputError("has no config.json: not the folder of a base model", path=path)
    declared = strict_json.read(raw).get("_name_or_path")
    name = declared if isinstance(declared, str) and declared else valid_text(path)
    from transformers import AutoConfig

    with _loading(path, "config"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    digest = hashlib.sha256(raw.read_bytes()).hexdigest()
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return Base(name, path, config, digest, wanted, None, tokenizer, device)


def _open_object(model: Any, tokenizer: Any, dtype: str) -> Base:
    if not hasattr(model, "named_modules") or not hasattr(model, "config"):
        raise InputError(f"base is a {type(model).__name__}: neither a folder nor a model")
    if hasattr(model, "peft_config") or any(".base_layer" in n for n, _ in model.named_modules()):
        raise InputError("the model holds adapters; give the base model itself")
    if dtype != "auto":
        raise InputError("dtype cannot be set for a model object; convert it before")
    text = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return Base(valid_text(name), None, model.config, digest, model.dtype, model, tokenizer)


class Checkpoint:
    """The weights of a folder, tensor by tensor, under the names that the model has for them."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        prefix = model.base_model_prefix + "."
        stored = _stored(folder)
        # Checkpoints of the bare decoder lack the prefix; a head beside it is not ours to judge.
        lead = prefix if any(key.startswith(prefix) for key in stored) else ""
        self._refs: dict[str, FactorRef] = {}
        for name, tensor in model.state_dict().items():
            if not name.startswith(prefix):
                continue
            ref = stored.pop(lead + name.removeprefix(prefix), None)
            if ref is None:
                raise NotStreamable(f"its files do not have {name}")
            if ref.shape != tuple(tensor.shape) or ref.dtype not in ("F32", "BF16", "F16"):
                raise NotStreamable(f"{name} is stored as {ref.dtype} {ref.shape}")
            self._refs[name] = ref
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for key in sorted(stored):
            known = any(re.search(pattern, key) for pattern in ignored)
            if key.startswith(lead) and key not in model.state_dict() and not known:
                raise NotStreamable(f"the model has no place for {key}")

    @contextmanager
    def loaded(
        self, module: torch.nn.Module, name: str, dtype: torch.dtype, skip: str | None = None
    ) -> Iterator[None]:
        """While a part of the skeleton has its weights, but for those under the name ``skip``."""
        import torch

        owners = []
        for key in list(module.state_dict()):
            if skip is not None and f"{name}.{key}".startswith(skip + "."):
                continue
            path, _, leaf = key.rpartition(".")
            at = module.get_submodule(path)
            value = self._read(f"{name}.{key}")
            if leaf in at._parameters:
                value = torch.nn.Parameter(value.to(dtype), requires_grad=False)
                owners.append((at, leaf, at._parameters[leaf]))
                at._parameters[leaf] = value
            else:
                at._buffers[leaf] = value
        try:
            yield
        finally:
            for at, leaf, empty in owners:
                at._parameters[leaf] = empty

    def nbytes(self, name: str, itemsize: int) -> int:
        """Bytes in memory of all tensors of a module."""
        inside = [ref for key, ref in self._refs.items() if key.startswith(name + ".")]
        return sum(math.prod(ref.shape) for ref in inside) * itemsize

    def _read(self, name: str) -> torch.Tensor:
        import torch

        ref = self._refs[name]
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[ref.dtype]
        out = torch.empty(ref.shape, dtype=dtype)
        read_into(
            [ref.file], np.zeros(1, np.int64), np.array([ref.offset]), np.array([ref.nbytes]),
            np.array([out.data_ptr()]),
        )  # fmt: skip
        return out


def _stored(folder: Path) -> dict[str, FactorRef]:
    if (folder / _INDEX).is_file():
        shards = strict_json.read(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise InputError("weight_map is not an object of file names", path=folder / _INDEX)
        files = sorted(set(shards.values()))
        for file in files:
            if file != os.path.basename(file):
                raise InputError(f"{file!r} is not the name of a file", path=folder / _INDEX)
    elif (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        raise InputError(f"has no {_SINGLE} and no {_INDEX}", path=folder)
    found: dict[str, FactorRef] = {}
    for file in files:
        found |= safetensors.read_header(folder / file).tensors
    return found


def _dtype_word() -> str:
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


@contextmanager
def _loading(path: Path | None, what: str) -> Iterator[None]:
    """What transformers raises about a folder becomes one line."""
    try:
        yield
    except MergeprobeError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the {what} cannot be loaded: {lines[0][:300]}", path=path) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While no part of a model is in training mode; each part gets its own back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Parameters that this thread registers go to the meta device; buffers keep their values."""
    register, thread = torch.nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and threading.get_ident() == thread:
            meta = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            module._parameters[name] = meta

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register
