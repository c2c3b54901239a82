"""The arithmetic of PEFT 0.21.2's ``merge_utils`` on tensors in memory, for ``compat="peft"``.

Masks are PEFT's to the bit: ``topk`` breaks ties as it does there, and chance is drawn by the same
call, on a tensor of the same layout, from torch's global generator, one tensor after another. What
follows the masks is done some rows at a time, so that no stack of all tensors is ever made.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_BLOCK = 1 << 22  # entries of one tensor that are combined at once


@dataclass(frozen=True)
class Rule:
    """A combination type without "_svd": how entries are dropped, and whether signs are elected."""

    prune: str | None = None  # "magnitude" or "random"
    elect: bool = False


RULES = {
    "svd": Rule(),
    "linear": Rule(),
    "magnitude_prune": Rule("magnitude"),
    "ties": Rule("magnitude", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
}


def check(rule: Rule, density: float | None, majority_sign_method: str) -> None:
    """Raise and warn what PEFT would for these arguments, in its words, but before any work."""
    if rule.prune:
        if density is None:
            raise TypeError("'>=' not supported between instances of 'NoneType' and 'int'")
        if density >= 1:
            warnings.warn(
                f"The density {density} is greater than or equal to 1, no pruning will be "
                "performed.",
                stacklevel=4,
            )
        elif density < 0:
            raise ValueError(f"Density should be >= 0, got {density}")
    if rule.elect and majority_sign_method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{majority_sign_method}"')


def merged(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    rule: Rule,
    density: float | None,
    majority_sign_method: str,
) -> torch.Tensor:
    """One tensor of the common shape: pruned, elected, weighted and added.

    Args:
        tensors: of equal shape, with one axis or more.
        weights: one for each, rounded to float32 unless all are integers (``torch.tensor``).
    """
    w = torch.tensor(list(weights), device=tensors[0].device)
    kept = [_pruned(t, rule.prune, density) for t in tensors]
    rows = len(tensors[0])
    step = max(1, _BLOCK * rows // max(1, tensors[0].numel()))
    return torch.cat([
        _combined(torch.stack([t[i : i + step] for t in kept]), w, rule, majority_sign_method)
        for i in range(0, rows, step)
    ])  # fmt: skip


def _pruned(tensor: torch.Tensor, prune: str | None, density: float | None) -> torch.Tensor:
    if prune is None or density is None or density >= 1:
        return tensor
    if prune == "magnitude":
        kept = torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices
        mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        mask[kept] = 1
        return tensor * mask.reshape(tensor.shape)
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _combined(
    stack: torch.Tensor, weights: torch.Tensor, rule: Rule, majority_sign_method: str
) -> torch.Tensor:
    weighted = stack * weights.view(-1, *[1] * (stack.dim() - 1))
    if not rule.elect:
        return weighted.sum(0)
    signs = stack.sign()
    total = stack.sum(0) if majority_sign_method == "total" else signs.sum(0)
    agrees = signs == torch.where(total >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
