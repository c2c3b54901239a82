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
    labels: Sequence[str],
    seed: Sequence[int],
    *,
    where: str,
    start: int = 1,
    beyond: bool = True,
) -> Iterator[tuple[str, float, dict[str, torch.Tensor]]]:
    """For each kind of labels: it, the loss, and dLoss/d(output) of every module in ``outputs``.

    The loss is the sum of -log p(label), in nats, over the labels that follow the tokens of ``ids``
    (1, length) from ``start - 1`` on. "data" labels are the tokens from ``start`` on, "model"
    labels are drawn from the model's own distribution: at the same places and, with ``beyond``,
    behind the last token. ``outputs`` is filled by hooks while the model runs here, inside
    ``graph_from_embeddings``; the gradients of its parameters are left alone.

    Raises ``InputError`` for logits that are NaN or too large, with ``where`` to say of which text,
    and for a module whose output the loss does not depend on.
    """
    import torch

    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 :]
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.log_softmax(logits.to(wide), dim=-1)
        if log_p.isnan().any():
            raise InputError(f"the model's logits are NaN or too large for {where}")
        for kind in labels:
            if kind == "data":
                losses = -log_p[:-1].gather(1, ids[0, start:, None])
            else:
                rows = log_p if beyond else log_p[:-1]
                losses = -rows.gather(1, _draw(rows, seed))
            gradients = torch.autograd.grad(
                losses.sum(), list(outputs.values()), allow_unused=True,
                retain_graph=kind != labels[-1],
            )  # fmt: skip
            for name, gradient in zip(outputs, gradients, strict=True):
                if gradient is None:
                    raise InputError("the loss does not depend on its output", key=name)
            value = float(losses.detach().double().sum())
            yield kind, value, dict(zip(outputs, gradients, strict=True))
            del gradients


def _draw(log_p: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
    """One label a token, (length, 1), from the rows of ``log_p``."""
    import torch

    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return drawn.to(log_p.device)
