"""Gradients of the loss by what modules put out, at every token of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError

if TYPE_CHECKING:
    import torch


@contextmanager
def graph_from_embeddings(model: Any) -> Iterator[None]:
    """While the graph of a run starts at the embedded tokens, whatever weights are frozen."""

    def cut(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def output_gradients(
    model: Any,
    ids: torch.Tensor,
    outputs: Mapping[str, torch.Tensor],
    labels: str,
    seed: Sequence[int],
) -> dict[str, torch.Tensor]:
    """dLoss/d(output) of every module in ``outputs``, of the shape of that output.

    The loss is the sum over tokens of -log p(label), in nats. With labels "model" every token of
    ``ids`` (1, length) has one, drawn from the model's own distribution; with "data" it is the next
    token, and the last one has none. ``outputs`` is filled by hooks while the model runs here,
    inside ``graph_from_embeddings``; the gradients of its parameters are left alone.
    """
    import torch

    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.log_softmax(logits.to(wide), dim=-1)
        if labels == "data":
            loss = -log_p[:-1].gather(1, ids[0, 1:, None]).sum()
        else:
            loss = -log_p.gather(1, _draw(log_p, seed)).sum()
        gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    for name, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            raise InputError("the loss does not depend on its output", key=name)
    return dict(zip(outputs, gradients, strict=True))


def _draw(log_p: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
    """One label a token, (length, 1), from the rows of ``log_p``."""
    import torch

    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return drawn.to(log_p.device)
