"""Zoos and calibrations for gradient features, and the definitions of these in dense float64.

Deltas and gradients are formed, derivatives are loops over tokens; nothing here uses the engine.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from adapters import make_adapter
from calibrations import make_calibration

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.self_attn.k_proj": (9, 20, 3),
    "model.layers.0.mlp.down_proj": (20, 31, 4),
    "model.layers.2.mlp.up_proj": (33, 20, 4),
}
NAMES = list(MODULES)
SHARED = {NAMES[0]: NAMES[1]}
DOMAINS = {"math": 14, "code": 9, "law": 11, "unused": 5}
OWN = ("math", "code", "math", "law", "code", "law")


def make_zoo(folder, rng):
    """Ragged ranks and dtypes, missing modules, a module with B = 0, an adapter that is all zero,
    and a copy of another adapter."""

    def make(i, names=NAMES, **options):
        sizes = {n: (*MODULES[n][:2], int(rng.integers(1, 7))) for n in names}
        return make_adapter(
            folder / f"adapter_{i}", sizes, alpha=float(rng.uniform(1, 30)),
            seed=int(rng.integers(2**32)), magnitude=float(rng.uniform(0.1, 10)), **options,
        )  # fmt: skip

    first = make(0)
    copy = {n: (m.a, m.b) for n, m in first.modules.items()}
    return [
        first, make(1, NAMES[1:], dtype="BF16"), make(2, NAMES[:3], zero_b=(NAMES[1],)),
        make(3, NAMES[2:], dtype="F16"), make(4, zero_b=True), make(5, list(copy), factors=copy),
    ]  # fmt: skip


def calibrate(folder, rng, labels="both", sequences=4, domains=DOMAINS):
    sizes = {n: shape[:2] for n, shape in MODULES.items()} | {"lm_head": (7, 20)}
    return make_calibration(
        folder / "calibration", sizes, domains, rng, shared=SHARED, gradients=True, labels=labels,
        sequences=sequences,
    )  # fmt: skip


def gradients_of(calibration, labels):
    both = bool(calibration.data_gradients)
    return calibration.data_gradients if both and labels == "data" else calibration.gradients


def phi(made, calibration, domain, labels):
    """(T, N): y_t^T W_i x_t, summed over modules, one token after another."""
    y = gradients_of(calibration, labels)
    out = np.zeros((DOMAINS[domain], len(made)))
    for t, (i, m) in itertools.product(range(len(out)), enumerate(made)):
        for name, module in m.modules.items():
            x = calibration.inputs[domain, SHARED.get(name, name)]
            out[t, i] += y[domain, name][t] @ module.delta @ x[t]
    return out


def token_gradients(calibration, domain, labels="data"):
    """y_t x_t^T of every module as one vector, (T, sizes)."""
    y = gradients_of(calibration, labels)
    return np.array([
        np.concatenate([
            np.outer(y[domain, n][t], calibration.inputs[domain, SHARED.get(n, n)][t]).ravel()
            for n in NAMES
        ])
        for t in range(DOMAINS[domain])
    ])  # fmt: skip


def flat(adapter):
    return np.concatenate([
        (adapter.modules[n].delta if n in adapter.modules else np.zeros(MODULES[n][:2])).ravel()
        for n in NAMES
    ])  # fmt: skip


def texts(count, sequences=4):
    return np.sort(np.arange(count) % sequences)


def variance_of_mean(rows, of):
    """Of the mean of rows that come in texts, summed over columns."""
    mean, total = rows.mean(axis=0), 0.0
    number = len(set(of))
    if number < 2:
        return math.nan
    for s in set(of):
        total += float((((rows[of == s] - mean).sum(axis=0)) ** 2).sum())
    return number / (number - 1) * total / len(rows) ** 2


def divided(x, y):
    return x / y if y > 0 else math.nan


def fisher_definitions(made, calibration, labels, prefix, own=OWN):
    values = {d: phi(made, calibration, d, labels) for d in set(own)}
    out = {}
    for (i, j), side in itertools.product(itertools.combinations(range(len(made)), 2), "ab"):
        victim, partner = (i, j) if side == "a" else (j, i)
        p = values[own[victim]]
        square = (p**2).mean(axis=0)
        dot = float((p[:, i] * p[:, j]).mean())
        out.setdefault(f"{prefix}fisher_cosine_base_{side}", []).append(
            divided(dot, math.sqrt(square[i]) * math.sqrt(square[j]))
        )
        twin = "a_by_b" if side == "a" else "b_by_a"
        out.setdefault(f"{prefix}fisher_cross_to_self_base_{twin}", []).append(
            math.sqrt(divided(square[partner], square[victim]))
        )
    return out


def gradient_definitions(made, calibration, own=OWN, of=texts):
    out = fisher_definitions(made, calibration, "data", "empirical_", own)
    tokens = {d: token_gradients(calibration, d) for d in set(own)}
    mean = {d: g.mean(axis=0) for d, g in tokens.items()}
    length = {d: np.linalg.norm(g) for d, g in mean.items()}
    deltas = [flat(m) for m in made]

    def one(name, value):
        out.setdefault(name, []).append(value)

    for i, j in itertools.combinations(range(len(made)), 2):
        a, b = own[i], own[j]
        one("gradient_cosine_base", mean[a] @ mean[b] / (length[a] * length[b]))
    ordered = [(i, j, "a_by_b") for i, j in itertools.combinations(range(len(made)), 2)]
    ordered += [(j, i, "b_by_a") for i, j, _ in ordered]
    ordered += [(i, i, "self") for i in range(len(made))]
    for victim, partner, end in ordered:
        d, w = own[victim], deltas[partner]
        dot = mean[d] @ w
        one(f"first_order_sampled_base_{end}", dot)
        one(f"gradient_alignment_base_{end}", divided(dot, length[d] * np.linalg.norm(w)))
        if end != "self":
            error = math.sqrt(variance_of_mean(tokens[d] @ w[:, None], of(DOMAINS[d])))
            one(f"gradient_snr_base_{end}", divided(dot, error))
    for d, adapter in zip(own, made, strict=True):
        g = np.abs(atom_sensitivities(adapter, calibration, d))
        one("sensitive_atoms_base", divided(g.sum() ** 2, (g**2).sum()))
        one("top_atom_share_base", divided(g.max(initial=0), g.sum()))
        noise, number = variance_of_mean(tokens[d], of(DOMAINS[d])), len(set(of(DOMAINS[d])))
        one("gradient_variance_base", number * noise)
        one("gradient_noise_scale_base", divided(number * noise, length[d] ** 2 - noise))
    return out


def atom_sensitivities(adapter, calibration, domain):
    """<G, sigma_k u_k v_k^T> of every module, from SVDs of the materialised deltas."""
    found = []
    for name, m in adapter.modules.items():
        x = calibration.inputs[domain, SHARED.get(name, name)]
        g = gradients_of(calibration, "data")[domain, name].T @ x / len(x)
        u, sigma, vt = np.linalg.svd(m.delta, full_matrices=False)
        found += [s * (u[:, k] @ g @ vt[k]) for k, s in enumerate(sigma) if s > 1e-6 * sigma[0]]
    return np.array(found)


def differences(ours, want, allowed):
    """Columns that are off by more than ``allowed`` of their size, or of 1 if that is smaller.

    A first order in nats counts as large as the largest of its column. The inverse of a noise scale
    is a difference of two numbers of order 1.
    """
    off = {}
    for name, values in want.items():
        values, got = np.array(values), ours[name]
        size = np.maximum(np.abs(values), 1.0)
        if name.startswith("first_order"):
            size = np.full(len(values), np.abs(values).max())
        elif name == "gradient_variance_base":
            size = np.abs(values)
        elif name == "gradient_noise_scale_base":
            size = np.maximum(np.abs(values), values**2)
        if (np.isnan(got) != np.isnan(values)).any():
            off[name] = f"NaN at {np.flatnonzero(np.isnan(got) != np.isnan(values))}"
        else:
            error = np.nanmax(np.abs(got - values) / size, initial=0)
            if error > allowed:
                off[name] = float(error)
    return off


def raw_sensitivities(adapter, calibration, domain):
    """<G, s b_k a_k^T>: what a gauge moves."""
    found = []
    for name, m in adapter.modules.items():
        x = calibration.inputs[domain, SHARED.get(name, name)]
        g = gradients_of(calibration, "data")[domain, name].T @ x / len(x)
        found.append(m.scale * np.diagonal(m.b.T @ g @ m.a.T))
    return np.concatenate(found)


def blocks(matrix, starts):
    """The diagonal blocks of a matrix over tokens."""
    return [matrix[s, s] for s in itertools.starmap(slice, itertools.pairwise([*starts, None]))]


def phi_size(made, calibration, domain):
    """sum_k sigma_k (|y| |u_k|) (|x| |v_k|), what roundings are relative to."""
    size = np.zeros((DOMAINS[domain], len(made)))
    for i, m in enumerate(made):
        for name, module in m.modules.items():
            x = np.abs(calibration.inputs[domain, SHARED.get(name, name)])
            y = np.abs(calibration.data_gradients[domain, name])
            u, sigma, vt = np.linalg.svd(module.delta, full_matrices=False)
            size[:, i] += ((y @ np.abs(u)) * (x @ np.abs(vt).T)) @ sigma
    return size
