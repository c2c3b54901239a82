"""The best weights of the atoms of several adapters' module: the quadratic of its outputs.

An atom a is a singular triple of one delta, ``W_a = sigma u v^T``. What M = sum_a z_a W_a does to
the outputs of member i, on inputs of second moment C_i, is a quadratic in z:

    |M - W_i|^2_{C_i} = (z - 1_i)^T (K_U o K_V^i) (z - 1_i),    1_i: 1 at the atoms of i, else 0

with K_U the Gram of the sigma u, K_V^i that of the v on those inputs, and o the product of entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergeprobe_fast.engine.sets import RIDGE
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.merging.algebra import dot, gram

# What inputs see of an atom, of their own length: less is what float32 factors leave of nothing.
_BLIND = 2.0**-22
# A weight below this (1: the atom as it was) is what float32 factors leave of 0, where the errors
# would not feel it: they do by its square, which is this square of their own energy at most.
_FAINT = 1e-6


@dataclass(frozen=True, eq=False)
class Scale:
    """How energies of a module on a domain count: 1, or 1 over the base module's own."""

    calibration: Calibration
    relative: bool

    def of(self, domain: str, module: str) -> float:
        """The factor; NaN where the base module's outputs are zero."""
        if not self.relative:
            return 1.0
        base = float(self.calibration.output_moment(domain, module).sum())
        return 1.0 / base if base > 0 else np.nan


def seen_by(
    right: np.ndarray, x: np.ndarray, scale: float, off_diagonal: float = 1.0,
    moment: np.ndarray | None = None, device: Any = None,
) -> np.ndarray:  # fmt: skip
    """Rows whose inner products are those of ``right`` on inputs, times ``scale``; float64.

    On ``C = off X^T X / T + (1 - off) diag(moment)``: right (K, d_in) at the samples x (T, d_in),
    (K, T), and with a moment (d_in,) beside them what the rest of the diagonal sees, (K, T + d_in).
    Rows that no input excites are exactly zero.
    """
    at = right @ x.T.astype(np.float64) if device is None else dot(right, x.T, device)
    parts = [at * np.sqrt(scale * off_diagonal / len(x))]
    size = scale * off_diagonal * float(np.square(x, dtype=np.float64).sum()) / len(x)
    if moment is not None and off_diagonal < 1:
        rest = scale * (1 - off_diagonal) * moment
        parts.append(right * np.sqrt(rest))
        size += float(rest.sum())
    seen = np.concatenate(parts, axis=1)
    seen[np.square(seen).sum(axis=1) <= _BLIND**2 * size] = 0.0
    return seen


class AtomProblem:
    """``min_z sum_i lambda_i |sum_a z_a W_a - W_i|^2_{C_i}`` over the K atoms of one module.

    Args:
        left: ``sigma u`` of each atom, (K, d_out).
        seen: by domain, what :func:`seen_by` says of the atoms' v, (K, anything).
        domains: of each member, keys of ``seen``; also of those without an atom here.
        owner: the place of each atom's owner among the members, (K,).
        lambdas: of each member, not negative.
        ridge: added to the diagonal, of every atom's own. It makes equal atoms share their weight.
        device: of the Gram matrices; what is solved with them, K x K, is solved on the CPU.
    """

    def __init__(
        self, left: np.ndarray, seen: Mapping[object, np.ndarray], domains: Sequence[object],
        owner: np.ndarray, lambdas: np.ndarray, ridge: float = RIDGE, device: Any = None,
    ) -> None:  # fmt: skip
        self.owner, self.lambdas = owner, lambdas
        outer = gram(left, device)
        made = {g: outer * gram(x, device) for g, x in seen.items()}  # one for all of a domain
        self.grams = [made[g] for g in domains]
        h, b = np.zeros_like(outer), np.zeros(len(left))
        for i, (w, q) in enumerate(zip(lambdas, self.grams, strict=True)):
            h += w * q
            b += w * q[:, owner == i].sum(axis=1)
        # In units in which every atom has length 1. One that no input excites gets weight 0.
        diagonal = np.diagonal(h)
        self._length = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        self._h = h / np.multiply.outer(self._length, self._length)
        self._h[np.diag_indices(len(h))] += np.where(diagonal > 0, ridge, 1.0)
        self._b = b / self._length

    def solve(self) -> np.ndarray:
        """The best weight of every atom, (K,)."""
        from scipy.linalg import cho_solve

        return cho_solve((np.linalg.cholesky(self._h), True), self._b) / self._length

    def prune(self, threshold: float = 0.0) -> np.ndarray:
        """The best weights that are not negative, (K,); atoms at 0 are dropped.

        Those that are ``harmful`` at the threshold are dropped before the others get theirs.
        """
        from scipy.linalg import solve_triangular
        from scipy.optimize import nnls

        z = np.zeros(len(self._b))
        left = np.flatnonzero(~self.harmful(threshold))
        if len(left) == 0:
            return z
        factor = np.linalg.cholesky(self._h[np.ix_(left, left)])
        target = solve_triangular(factor, self._b[left], lower=True)
        z[left] = nnls(factor.T, target, maxiter=50 * len(left))[0] / self._length[left]
        faint = np.square(z * self._length) < _FAINT**2 * self.own.sum()
        z[faint & (z < _FAINT)] = 0.0
        return z

    def errors(self, z: np.ndarray) -> np.ndarray:
        """``lambda_i |M - W_i|^2`` of each member: what this module adds to its error."""
        apart = [z - (self.owner == i) for i in range(len(self.grams))]
        return np.array([
            w * max(0.0, float(d @ q @ d))
            for w, q, d in zip(self.lambdas, self.grams, apart, strict=True)
        ])  # fmt: skip

    @cached_property
    def _energies(self) -> tuple[np.ndarray, np.ndarray]:
        each = np.array([w * np.diagonal(q) for w, q in zip(self.lambdas, self.grams, strict=True)])
        own = each[self.owner, np.arange(len(self.owner))]
        return own, each.sum(axis=0) - own

    @property
    def own(self) -> np.ndarray:
        """``lambda |W_a|^2`` of every atom on its owner's inputs, (K,)."""
        return self._energies[0]

    def harmful(self, threshold: float = 1.0) -> np.ndarray:
        """Whether an atom is worth less than ``threshold`` times what it does to the others, (K,).

        Both are energies relative to those of who gains or is harmed (lambda); E10.
        """
        own, others = self._energies
        return own < threshold * others
