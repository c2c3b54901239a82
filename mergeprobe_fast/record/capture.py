"""Hooks: which modules are fed the same tensor, and what goes in and out at the sampled tokens."""

from __future__ import annotations

import fnmatch
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration_json import CalibrationInfo
from mergeprobe_fast.io.calibration_writer import CalibrationWriter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Modules = Mapping[str, torch.nn.Module]
    Tokens = Mapping[str, tuple[np.ndarray, np.ndarray]]  # domain -> (sequence, position)


def recordable(model: PreTrainedModel, patterns: Iterable[str] | None) -> dict[str, Any]:
    """Modules to record by path: Linear and Conv1D, all but the output embedding by default.

    ``patterns`` are globs over full paths ("*.q_proj", "lm_head"); one that matches nothing is an
    ``InputError``. Embeddings are never recorded: their input is a one-hot row.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }  # fmt: skip
    if patterns is None:
        head = model.get_output_embeddings()
        return {name: module for name, module in found.items() if module is not head}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in found if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError("matches no Linear or Conv1D module of the base model", key=pattern)
        chosen.update(matched)
    if not chosen:
        raise InputError("modules is empty")
    return {name: module for name, module in found.items() if name in chosen}


def sizes(module: Any) -> tuple[int, int]:
    """(d_in, d_out) of a Linear, or of a Conv1D, which stores its weight the other way round."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    d_in, d_out = module.weight.shape
    return d_in, d_out


class Discovery:
    """Runs of a few tokens that show which modules are called and which share their input."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self.keys: dict[str, str] = {}  # module -> key, in the order of calls
        self.left_out: dict[str, str] = {}  # module -> why it has no input of every token

    @contextmanager
    def run(self, tokens: int) -> Iterator[None]:
        """While a sequence of so many tokens goes through."""
        seen: list[tuple[Any, str]] = []
        handles = []

        def hook(name: str, d_in: int) -> Any:
            def record(module: Any, args: tuple, kwargs: dict) -> None:
                x = input_of(args, kwargs)
                if name in self.keys or name in self.left_out:
                    self.keys.pop(name, None)
                    self.left_out[name] = "called more than once for one text"
                elif x.shape[-1] != d_in or x.numel() != tokens * d_in:
                    self.left_out[name] = "not fed every token"
                else:
                    # The tensors are kept alive meanwhile, so that identity means the same one.
                    owner = next((key for tensor, key in seen if tensor is x), name)
                    self.keys[name] = owner
                    seen.append((x, owner))
            return record

        try:
            for name, module in self._modules.items():
                record = hook(name, sizes(module)[0])
                handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, *, strict: bool) -> list[str]:
        """Notes on modules that cannot be recorded; an ``InputError`` when ``strict``."""
        # A key whose first module was left out goes over to the next one.
        heirs: dict[str, str] = {}
        for name, key in self.keys.items():
            self.keys[name] = heirs.setdefault(key, name)
        for name in self._modules:
            if name not in self.keys:
                self.left_out.setdefault(name, "not called for text")
        if strict and self.left_out:
            name, reason = next(iter(self.left_out.items()))
            raise InputError(f"cannot be recorded: {reason}", key=name)
        if not self.keys:
            raise InputError("the base model has no module that can be recorded")
        names: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            names.setdefault(reason, []).append(name)
        return [
            f"{len(left)} modules are not recorded, such as {left[0]}: {reason}"
            for reason, left in names.items()
        ]


@dataclass(eq=False)
class Passage:
    """One sequence on its way through hooked modules."""

    domain: str
    index: int  # of the sequence in its domain
    length: int  # tokens
    first: int  # row of its first sampled token
    positions: np.ndarray  # of its sampled tokens
    live: dict[str, Any] = field(default_factory=dict)  # key -> weak reference to its tensor
    called: set[str] = field(default_factory=set)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    # By what ``_take`` calls it and module, summed over tokens.
    squares: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


class Recorder:
    """Writes what hooked modules see: rows at the sampled tokens, mean squares over all tokens.

    Sequences may go through in several threads, one each. Rows are written at once; the sums are
    taken from each ``Passage`` by ``add``, in an order that the caller keeps.
    """

    def __init__(
        self, writer: CalibrationWriter, info: CalibrationInfo, tokens: Tokens, modules: Modules
    ) -> None:
        self._writer, self._info, self._tokens = writer, info, tokens
        self._modules = modules
        self._sums: dict[tuple[str, str, str], np.ndarray] = {}
        self._here, self._lock = threading.local(), threading.Lock()
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self._modules.items():
            before = self._input_hook(name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._output_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def passage(
        self, domain: str, index: int, length: int, expected: Iterable[str]
    ) -> Iterator[Passage]:
        """While a sequence goes through the modules ``expected`` in this thread."""
        sequence, position = self._tokens[domain]
        first, last = np.searchsorted(sequence, [index, index + 1])
        self._here.passage = Passage(domain, index, length, int(first), position[first:last])
        yield self._here.passage
        for name in expected:
            if name not in self._here.passage.called:
                reason = f"was not called for sequence {index} of domain {domain!r}"
                raise InputError(reason, key=name)

    def gradients(self, labels: str, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take the output gradients of this thread's sequence, by module, of a kind of labels."""
        for name, gradient in gradients.items():
            self._take(labels, name, gradient, self._info.modules[name].d_out)

    def add(self, passage: Passage) -> None:
        """Add the sums of a sequence; the order of these calls is the order of the sums."""
        for (kind, name), squares in passage.squares.items():
            at = kind, passage.domain, name
            self._sums[at] = self._sums[at] + squares if at in self._sums else squares

    def write_moments(self, names: Iterable[str]) -> None:
        """Write the means of these modules; all sequences have gone through them."""
        for name in names:
            for domain in self._info.domains.values():
                if self._info.modules[name].input == name:
                    total = self._sums.pop(("input", domain.name, name))
                    self._writer.moment(domain.name, name, total / domain.tokens)
                total = self._sums.pop(("output", domain.name, name))
                self._writer.output_moment(domain.name, name, total / domain.tokens)
                for kind in self._info.label_kinds:
                    total = self._sums.pop((kind, domain.name, name)) / domain.tokens
                    self._writer.gradient_moment(domain.name, name, total, labels=kind)

    def _input_hook(self, name: str) -> Any:
        module = self._info.modules[name]

        def record(_: Any, args: tuple, kwargs: dict) -> None:
            x, passage = input_of(args, kwargs), self._here.passage
            if name in passage.called:
                reason = f"is called more than once in domain {passage.domain!r}"
                raise InputError(reason, key=name)
            passage.called.add(name)
            if module.input == name:
                passage.live[name] = weakref.ref(x)
                self._take("input", name, x, module.d_in)
                return
            # What the plan saw on a few tokens must hold on all data.
            kept = passage.live.get(module.input)
            if kept is None or kept() is not x:
                raise InputError(f"does not share the input of {module.input} after all", key=name)

        return record

    def _output_hook(self, name: str) -> Any:
        width = self._info.modules[name].d_out

        def record(_: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            self._take("output", name, output, width)
            if self._info.labels is None:
                return None
            self._here.passage.outputs[name] = output
            # What follows may change its input in place; the gradient is for this tensor.
            return output.clone()

        return record

    def _take(self, kind: str, name: str, x: torch.Tensor, width: int) -> None:
        """Of an "input", an "output", or the gradients of a kind of labels."""
        passage = self._here.passage
        if x.shape[-1] != width or x.numel() != passage.length * width:
            what = kind if kind in ("input", "output") else "gradient"
            reason = f"{what} is {tuple(x.shape)} for {passage.length} tokens"
            raise InputError(f"{reason} in domain {passage.domain!r}", key=name)
        rows = x.detach().reshape(passage.length, width)
        squares = rows[self._info.skip_first :].double().square().sum(0)
        passage.squares[kind, name] = squares.cpu().numpy()
        if kind == "output" and not self._info.outputs:
            return
        drawn = rows[passage.positions].float().cpu().numpy()
        at = passage.domain, name, drawn, passage.first
        with self._lock:
            if kind == "input":
                self._writer.inputs(*at)
            elif kind == "output":
                self._writer.outputs(*at)
            else:
                self._writer.gradients(*at, labels=kind)


def input_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """What a Linear or Conv1D is called with."""
    return args[0] if args else kwargs["input"]
