"""What backward leaves of the factors' gradients, kept before anybody clips or unscales it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

# Of a gradient that is a multiple of another one: the square root of what dot products in float32
# leave of the difference of two equal norms.
_SLACK = 1e-3
_ROUNDING = 1e-5  # a factor nearer to 1 than that is rounding


@dataclass(frozen=True)
class Kept:
    """One optimiser step's gradient."""

    micro_batches: int
    silent: tuple[int, ...]  # positions of parameters that no backward reached: zeros
    unseen: bool  # whether a gradient was put there by other means than backward
    loss: torch.Tensor | float | None  # of the step, as the loop scales it; None: none was seen
    late: bool  # whether a loss was given that belongs to no backward


class Backward:
    """Hooks that copy gradients while backward runs.

    ``raw`` has one float32 tensor per parameter, of its shape: the sum over the micro-batches of
    the step, as scaled for the loss. All of one device lie in one tensor of ``flat``.

    Every time a gradient has been added to a parameter's ``grad`` it is copied, so that after the
    last micro-batch it is complete, and what clipping or ``GradScaler.unscale_`` do to ``grad``
    comes later. ``grad`` counts its own changes: more than one since the last copy means that it
    was made zero (or clipped) meanwhile without a step.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], guard: Callable[..., Callable[..., None]]
    ) -> None:
        self.parameters = tuple(parameters)
        self.flat, self.raw = flat_like(self.parameters)
        self.dropped = 0  # gradients that were thrown away, or changed, without a step
        self._counts = [0] * len(self.parameters)
        self._versions = [0] * len(self.parameters)
        self._losses: list[torch.Tensor] = []  # of each backward: scaled for the loss
        self._given: list[torch.Tensor | float] = []  # by the user
        self._late = False
        self._handles = [
            p.register_post_accumulate_grad_hook(guard(partial(self._accumulated, i)))
            for i, p in enumerate(self.parameters)
        ]

    def remove(self) -> None:
        """Take the hooks away and let the memory go."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.flat, self.raw = [], [], []

    def on_output(self, output: Any, guard: Callable[..., Callable[..., None]]) -> None:
        """Learn the loss from what the model returned, should a backward start there."""
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            # A copy: `loss /= accumulation` would change it, and the gradient tells of that.
            loss.register_hook(guard(partial(self._loss_reached, loss.detach().clone())))

    def given_loss(self, value: torch.Tensor | float) -> None:
        """A loss that the user hands over, of the step that is under way."""
        if not any(self._counts):
            self._late = True
        else:
            given = value.detach().clone() if isinstance(value, torch.Tensor) else float(value)
            self._given.append(given)

    def _loss_reached(self, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        # The gradient here is what the loop makes of this loss: 1 / micro-batches, say.
        self._losses.append((gradient * loss).sum().detach())

    def _accumulated(self, index: int, parameter: torch.nn.Parameter) -> None:
        grad = parameter.grad
        if self._counts[index] and grad._version != self._versions[index] + 1:
            self._begin_again()
        self._counts[index] += 1
        self._versions[index] = grad._version
        self.raw[index].copy_(_dense(grad.detach()))

    def _begin_again(self) -> None:
        self.dropped += 1
        latest = self._losses[-1:]  # of the backward that is running
        self.reset()
        self._losses = latest

    @torch.no_grad()
    def finish(self, scale: float, pending: float, reduced: bool) -> Kept:
        """Make ``raw`` the unscaled gradient of the step that is about to be taken.

        Args:
            scale: what the loss was multiplied with.
            pending: what ``grad`` still has to be divided by: 1, or the scale where the optimiser
                does that itself.
            reduced: take what is in ``grad``, which other processes have been added to.
        """
        for flat in self.flat:
            if scale != 1:
                flat.div_(scale)
        silent, unseen = [], False
        for i, parameter in enumerate(self.parameters):
            if self._counts[i] and not reduced:
                continue
            if parameter.grad is None:
                self.raw[i].zero_()
                silent.append(i)
            else:
                self.raw[i].copy_(_dense(parameter.grad)).div_(pending)
                # Zeros are what zero_grad(set_to_none=False) leaves where no backward came.
                unseen = unseen or (not reduced and bool(self.raw[i].any()))
        if self._given:
            loss: Any = sum(self._given) / len(self._given)
        else:
            loss = sum(self._losses) / scale if self._losses else None
        return Kept(max(1, *self._counts), tuple(silent), unseen, loss, self._late)

    def reset(self) -> None:
        """Forget the step: what comes next begins another one."""
        self._counts = [0] * len(self.parameters)
        self._losses, self._given, self._late = [], [], False


class ForwardHook:
    """A hook that does nothing in a copy of the model, or in a file of it."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = torch.compiler.disable(act)  # a compiler is not to look into it

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self._act(module, args, output)

    def __reduce__(self) -> Any:
        # It takes three arguments and returns None, and no file needs this package to be loaded.
        return getattr, (nullcontext(), "__exit__")


def flat_like(
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Float32 zeros, one tensor per device, and for each parameter its part, in its shape."""
    sizes: dict[torch.device, int] = {}
    for p in parameters:
        sizes[p.device] = sizes.get(p.device, 0) + p.numel()
    flat = {device: torch.zeros(size, device=device) for device, size in sizes.items()}
    parts, first = [], dict.fromkeys(sizes, 0)
    for p in parameters:
        start = first[p.device]
        first[p.device] += p.numel()
        parts.append(flat[p.device][start : start + p.numel()].view(p.shape))
    return list(flat.values()), parts


def clip_factor(
    parameters: Sequence[torch.nn.Parameter], raw: Sequence[torch.Tensor], pending: float
) -> float | None:
    """What clipping has multiplied all of ``grad`` with; 1 where it did nothing.

    Args:
        parameters: with a gradient in ``grad``, or None.
        raw: the gradients as backward left them, unscaled, float32, of the shape of each parameter.
        pending: what ``grad`` is still multiplied with, as in ``Backward.finish``.

    The least squares factor. None where the gradient is no multiple of ``raw`` from 0 to 1: its
    values were clipped one by one, or replaced. A remainder of ``_SLACK`` is allowed, or of 4 units
    of rounding where the dtype of the gradient is coarser.
    """
    sums: dict[torch.device, torch.Tensor] = {}
    slack = _SLACK
    for parameter, kept in zip(parameters, raw, strict=True):
        if parameter.grad is None:
            continue
        slack = max(slack, 4 * torch.finfo(parameter.grad.dtype).eps)
        now, then = _dense(parameter.grad).detach().float().flatten(), kept.flatten()
        found = torch.stack([now.dot(then), now.dot(now), then.dot(then)])
        sums[found.device] = sums[found.device] + found if found.device in sums else found
    every = [s.tolist() for s in sums.values()] or [[0.0] * 3]
    cross, now, then = np.sum(every, axis=0).tolist()
    if then == now == 0:
        return 1.0
    if not (0 < then < math.inf and now - cross**2 / then <= slack**2 * now):
        return None
    factor = cross / then / pending
    if not 0 <= factor <= 1 + slack:
        return None
    return 1.0 if factor > 1 - _ROUNDING else factor


def _dense(grad: torch.Tensor) -> torch.Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()
