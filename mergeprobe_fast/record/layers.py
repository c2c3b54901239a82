"""One decoder layer at a time: each is loaded, sees every sequence, and is dropped.

What a layer is called with (masks, rotary angles) is learnt from the model itself: its forward
runs with layers that only note their arguments and hand the hidden states on. That this is all
there is between the layers is checked, and a model where it is not is loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.errors import InputError

from .base import Base, Checkpoint, NotStreamable
from .capture import Discovery

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Hidden = torch.Tensor
    Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer gets beside the hidden states


_ORDER = "its layers are not called in their order, once each"


class _Stop(Exception):
    """The first layer has been reached."""


class LayeredModel:
    """A model whose layers are in memory one at a time. Raises ``NotStreamable`` and says why."""

    def __init__(self, base: Base, model: PreTrainedModel) -> None:
        import torch

        if getattr(base.config, "quantization_config", None) is not None:
            raise NotStreamable("it is quantised")
        prefix = model.base_model_prefix
        if not prefix or model.base_model is model:
            raise NotStreamable("its decoder is not apart from its head")
        lists = [
            (name, module) for name, module in model.base_model.named_modules(prefix=prefix)
            if isinstance(module, torch.nn.ModuleList) and len(module)
        ]  # fmt: skip
        outer = [
            (name, module) for name, module in lists
            if not any(name.startswith(other + ".") for other, _ in lists)
        ]  # fmt: skip
        if len(outer) != 1:
            raise NotStreamable(f"it has {len(outer)} lists of layers, not one")
        self.name, self.layers = outer[0]
        self._decoder, self._prefix = model.base_model, prefix
        self._dtype = base.dtype
        self._checkpoint = Checkpoint(base.path, model)
        self._is_tuple = False

    @property
    def names(self) -> list[str]:
        """The paths of the layers."""
        return [f"{self.name}.{i}" for i in range(len(self.layers))]

    def sizes(self) -> tuple[int, list[int]]:
        """Bytes of the weights outside the layers and of each layer, as they are computed with."""
        width = self._dtype.itemsize
        layers = [self._checkpoint.nbytes(name, width) for name in self.names]
        return self._checkpoint.nbytes(self._prefix, width) - sum(layers), layers

    def discover(self, ids: torch.Tensor, discovery: Discovery) -> None:
        """Run a short sequence through the layers without weights and check that they are a chain.

        ``ids`` is (1, tokens). Only the weights outside the layers are loaded.
        """
        with self._outside():
            self._is_tuple = _run_on_meta(self.layers[0], *self._first_call(ids))
            hidden, calls = self._embed(ids, check=True)
        for layer, call in zip(self.layers, calls, strict=True):
            with discovery.run(ids.shape[1]):
                if _run_on_meta(layer, hidden, call) != self._is_tuple:
                    raise NotStreamable("its layers return different things")

    @contextmanager
    def layer(self, index: int) -> Iterator[Callable[[Hidden, Call], Hidden]]:
        """One layer, with its weights while the block lasts."""
        layer = self.layers[index]

        def run(hidden: Hidden, call: Call) -> Hidden:
            args, kwargs = call
            out = layer(hidden, *args, **kwargs)
            return out[0] if self._is_tuple else out

        with self._checkpoint.loaded(layer, self.names[index], self._dtype):
            yield run

    def embed(self, ids: Sequence[torch.Tensor]) -> list[tuple[Hidden, list[Call]]]:
        """What enters the first layer, and how every layer is called, for each sequence."""
        try:
            with self._outside():
                return [self._embed(one, check=False) for one in ids]
        except NotStreamable as reason:  # not so for the few tokens that were tried
            raise InputError(f"cannot be run layer by layer: {reason}", key=self.name) from None

    def _outside(self) -> AbstractContextManager[None]:
        return self._checkpoint.loaded(self._decoder, self._prefix, self._dtype, skip=self.name)

    def _first_call(self, ids: torch.Tensor) -> tuple[Hidden, Call]:
        found = []

        def stop(index: int, *args: Any, **kwargs: Any) -> None:
            if index:
                raise NotStreamable(_ORDER)
            found.append(_split(args, kwargs))
            raise _Stop

        with self._replaced(stop):
            try:
                self._forward(ids)
            except _Stop:
                return found[0]
        raise NotStreamable("its first layer is not called")

    def _embed(self, ids: torch.Tensor, *, check: bool) -> tuple[Hidden, list[Call]]:
        import torch

        calls: list[Call] = []
        entered: list[Hidden] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if index != len(calls):
                raise NotStreamable(_ORDER)
            if entered and hidden is not entered[0]:
                raise NotStreamable("something stands between its layers")
            if check and any(t.requires_grad for t in _tensors(call)):
                raise NotStreamable("its layers get more than the hidden states from each other")
            entered.append(hidden)
            calls.append(call)
            return (hidden,) if self._is_tuple else hidden

        with self._replaced(note):
            if check:
                # Whatever is computed from weights now says so: an argument must not be.
                weights = [p for p in self._decoder.parameters() if not p.is_meta]
                with torch.enable_grad(), _requiring_grad(weights):
                    self._forward(ids)
            else:
                self._forward(ids)
        if len(calls) != len(self.layers):
            raise NotStreamable(_ORDER)
        return entered[0].detach(), calls

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Layers with another forward, told which it is; everything else about them stays."""
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(forward, index)
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _forward(self, ids: torch.Tensor) -> None:
        self._decoder(input_ids=ids, use_cache=False)


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hidden, Call]:
    if args:
        return args[0], (args[1:], dict(kwargs))
    if "hidden_states" not in kwargs:
        raise NotStreamable("its layers do not take hidden_states")
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


@contextmanager
def _requiring_grad(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _run_on_meta(layer: Any, hidden: Hidden, call: Call) -> bool:
    """Run a layer for its structure alone; whether it returns a tuple."""
    import torch

    buffers = {
        (module, name): buffer for module in layer.modules()
        for name, buffer in module._buffers.items() if buffer is not None
    }  # fmt: skip
    args, kwargs = call
    try:
        for module, name in buffers:
            module._buffers[name] = buffers[module, name].to("meta")
        with torch.no_grad():
            out = layer(hidden.to("meta"), *_to_meta(args), **_to_meta(kwargs))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        reason = f"a layer does not run without weights ({type(error).__name__}: {lines[0][:120]})"
        raise NotStreamable(reason) from error
    finally:
        for (module, name), buffer in buffers.items():
            module._buffers[name] = buffer
    if isinstance(out, torch.Tensor):
        return False
    if isinstance(out, tuple) and not any(isinstance(x, torch.Tensor) for x in out[1:]):
        return True
    raise NotStreamable("its layers return more than the hidden states")


def _to_meta(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_meta(item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
