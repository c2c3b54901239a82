"""Sets of deltas, materialised, and what their merges do to inputs: no Gram matrix anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np


@dataclass
class Sets:
    """Deltas of N adapters in one space, and inputs of D domains, of one module: dense."""

    deltas: np.ndarray  # (N, d_out, d_in)
    inputs: np.ndarray  # (D, T, d_in)
    domain_of: np.ndarray  # (N,)

    @classmethod
    def drawn(cls, rng, n, *, domains=3, samples=40, d_out=6, d_in=11, shared=0.5, spread=0.3):
        own = rng.standard_normal((n, d_out, d_in)) + shared * rng.standard_normal((d_out, d_in))
        own *= 10 ** rng.uniform(-spread, spread, (n, 1, 1))
        mixing = rng.standard_normal((domains, d_in, d_in)) / d_in**0.5
        x = rng.standard_normal((domains, samples, d_in)) @ mixing
        return cls(own, x, rng.integers(0, domains, n))

    @property
    def totals(self):
        """The Gram matrices that the package is given."""
        flat = self.deltas.reshape(len(self.deltas), -1)
        outputs = self.outputs()
        return SimpleNamespace(
            names=[str(i) for i in range(len(flat))], gram=flat @ flat.T,
            domains=tuple(map(str, range(len(self.inputs)))),
            inputs=np.array([o @ o.T for o in outputs]), relative=None,
        )  # fmt: skip

    def outputs(self):
        """Of every domain (N, T d_out): W_i x over the root of T."""
        n, t = len(self.deltas), self.inputs.shape[1]
        return [
            np.einsum("noi,ti->nto", self.deltas, x).reshape(n, -1) / t**0.5 for x in self.inputs
        ]

    def merged(self, members, weights):
        return np.einsum("k,koi->oi", weights, self.deltas[members])

    def errors(self, members, weights):
        """E ||(M - W_i) x||^2 / E ||W_i x||^2, per member."""
        m, found = self.merged(members, weights), []
        for i in members:
            x = self.inputs[self.domain_of[i]]
            off, own = x @ (m - self.deltas[i]).T, x @ self.deltas[i].T
            found.append((off**2).sum() / (own**2).sum())
        return np.array(found)

    def directions(self, members, weights):
        m, found = self.merged(members, weights), []
        for i in members:
            x = self.inputs[self.domain_of[i]]
            one, other = x @ m.T, x @ self.deltas[i].T
            found.append((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
        return np.array(found)

    def design(self, members, lambdas):
        """Least squares of the mean error: rows are outputs, columns members."""
        outputs = self.outputs()
        blocks, targets = [], []
        for lam, i in zip(lambdas, members, strict=True):
            o = outputs[self.domain_of[i]]
            scale = np.sqrt(lam) / np.linalg.norm(o[i])
            blocks.append(o[members].T * scale)
            targets.append(o[i] * scale)
        return np.concatenate(blocks), np.concatenate(targets)

    def leverages(self, members):
        found = []
        flat = self.deltas.reshape(len(self.deltas), -1)
        for k, i in enumerate(members):
            others, own = flat[np.delete(members, k)].T, flat[i]
            left = own - others @ np.linalg.lstsq(others, own, rcond=1e-12)[0]
            found.append(1 - (left @ left) / (own @ own))
        return np.array(found)


def effective_rank(vectors):
    """exp of the entropy of the squared singular values, as shares."""
    share = np.linalg.svd(vectors, compute_uv=False) ** 2
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def dual_value(sets, members, mu):
    """min_w sum_i mu_i e_i(w): below the least worst error, whatever mu in the simplex."""
    rows, target = sets.design(members, mu)
    w = np.linalg.lstsq(rows, target, rcond=None)[0]
    return float(((rows @ w - target) ** 2).sum())
