"""Means over the optimiser steps since the last snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergeprobe_fast.io.probe_json import Clip, Loss
from mergeprobe_fast.io.safetensors import TensorLike

from .probe_adapter import LiveModule
from .probe_backward import Kept, flat_like

_SINGLE = float(np.finfo(np.float32).eps)
_WELL_POSED = 1e-5  # of the Cholesky factor's diagonal: a solve is then good to 1e-6


class Window:
    """Sums over steps: gradients in float32 where the factors are, numbers in float64 here."""

    def __init__(self, modules: Sequence[LiveModule]) -> None:
        self.modules = tuple(modules)
        self._flat, self._sums = flat_like([p for m in modules for p in (m.a, m.b)])
        self.reset()

    def reset(self) -> None:
        """Begin another window."""
        for flat in self._flat:
            flat.zero_()
        self.steps = 0
        self._values = np.zeros((3, len(self.modules)))  # euler_a, euler_b, visible_square
        self._micro_batches = 0
        self._losses: list[torch.Tensor | float | None] = []
        self._clips: list[float | None] = []

    @torch.no_grad()
    def add(self, flat: Sequence[torch.Tensor], raw: Sequence[torch.Tensor]) -> None:
        """Count the gradient of one step, taken at the factors as they are now.

        ``flat`` and ``raw`` are those of ``Backward``: whole, and by parameter.
        """
        for total, one in zip(self._flat, flat, strict=True):
            total.add_(one)
        self._values += _step_values(self.modules, raw)
        self.steps += 1

    def describe(self, kept: Kept, clip: float | None) -> None:
        """What else is known of that step."""
        self._micro_batches += kept.micro_batches
        self._losses.append(kept.loss)
        self._clips.append(clip)

    @property
    def micro_batches(self) -> float:
        """Per step."""
        return self._micro_batches / self.steps

    def loss(self) -> Loss | None:
        """Over the steps whose loss is known; None when the last one's is not."""
        known = [float(x) for x in self._losses if x is not None]
        if not known or self._losses[-1] is None:
            return None
        return Loss(float(np.mean(known)), known[-1], len(known))

    def clip(self) -> Clip | None:
        """None when it is unknown for a step."""
        if None in self._clips:
            return None
        return Clip(float(np.mean(self._clips)), self._clips[-1], min(self._clips))

    @torch.no_grad()
    def tensors(self, raw: Sequence[torch.Tensor]) -> dict[str, TensorLike]:
        """What gradients.safetensors holds, until the next step; ``raw`` is the last gradient."""
        found: dict[str, TensorLike] = {}
        for i, module in enumerate(self.modules):
            for letter, j in (("A", 2 * i), ("B", 2 * i + 1)):
                found[f"last.{letter}.{module.name}"] = _matrix(raw[j])
                found[f"mean.{letter}.{module.name}"] = _matrix(self._sums[j]) / self.steps
        keys = "euler_a", "euler_b", "visible_square"
        return found | dict(zip(keys, self._values / self.steps, strict=True))


def _matrix(tensor: torch.Tensor) -> np.ndarray:
    """float32 (rows, the rest); on a CPU the same memory."""
    return tensor.flatten(1).cpu().numpy()


def _step_values(modules: Sequence[LiveModule], raw: Sequence[torch.Tensor]) -> np.ndarray:
    """euler_a, euler_b and visible_square of one gradient, float64 (3, modules)."""
    numbers: dict[torch.device, list[torch.Tensor]] = {}
    for i, module in enumerate(modules):
        a, b = (_wide(p.detach()).flatten(1) for p in (module.a, module.b))
        da, db = _wide(raw[2 * i]).flatten(1), _wide(raw[2 * i + 1]).flatten(1)
        numbers.setdefault(a.device, []).extend([
            torch.dot(da.flatten(), a.flatten())[None], torch.dot(db.flatten(), b.flatten())[None],
            (a @ a.T).flatten(), (db.T @ db).flatten(),
        ])  # fmt: skip
    # One transfer per device and step.
    arrays = {d: torch.cat(parts).cpu().numpy().astype(np.float64) for d, parts in numbers.items()}
    first = dict.fromkeys(arrays, 0)
    values = np.zeros((3, len(modules)))
    grams: dict[int, list[tuple[int, np.ndarray]]] = {}  # by rank
    for i, module in enumerate(modules):
        device, r = module.a.device, len(module.a)
        start, first[device] = first[device], first[device] + 2 + 2 * r * r
        values[:2, i] = arrays[device][start : start + 2]
        pair = arrays[device][start + 2 : start + 2 + 2 * r * r].reshape(2, r, r)
        grams.setdefault(r, []).append((i, pair))
    for found in grams.values():
        where = [i for i, _ in found]
        pairs = np.stack([pair for _, pair in found])
        scales = np.array([modules[i].scale for i in where])
        values[2, where] = trace_of_solve(pairs[:, 0], pairs[:, 1]) / scales**2
    return values


def trace_of_solve(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """tr(one^+ other) of positive semidefinite float64 (n, r, r): float64 (n,), never negative.

    Directions in which ``one`` is below (r eps)^2 of its largest count as absent, eps of float32:
    there the factor whose Gram matrix it is holds rounding only. NaN where a number is not finite.
    """
    finite = np.isfinite(one).all((1, 2)) & np.isfinite(other).all((1, 2))
    out = np.full(len(one), np.nan)
    one, other = one[finite], other[finite]
    try:
        diagonal = np.diagonal(np.linalg.cholesky(one), axis1=1, axis2=2)
        well_posed = bool((diagonal.min(1) > _WELL_POSED * diagonal.max(1)).all())
    except np.linalg.LinAlgError:
        well_posed = False
    if well_posed:
        found = np.trace(np.linalg.solve(one, other), axis1=1, axis2=2)
    else:
        roots, vectors = np.linalg.eigh(one)
        kept = roots > (one.shape[1] * _SINGLE) ** 2 * roots[:, -1:]
        energy = np.einsum("nik,nij,njk->nk", vectors, other, vectors, optimize=True)
        found = np.where(kept, energy / np.where(kept, roots, 1), 0).sum(1)
    out[finite] = np.maximum(found, 0)
    return out


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, where the device has it: squares of small gradients are smaller still."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
