"""Columns from principal angles by their definitions, on materialised deltas in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.linalg import orthogonal_procrustes, subspace_angles

from mergeprobe_fast.engine import angles
from mergeprobe_fast.features.angles import FAMILY

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20, 4),
    "model.layers.0.mlp.down_proj": (20, 31, 4),
    "model.layers.1.self_attn.q_proj": (24, 20, 4),
    "model.layers.2.self_attn.v_proj": (9, 20, 4),
    "model.layers.10.mlp.up_proj": (33, 20, 4),
}
NAMES = list(MODULES)


def spaces(w):
    """(U, sigma, V): left and right singular vectors as columns."""
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    k = int((sigma > 1e-5 * sigma[0]).sum()) if sigma[0] > 0 else 0
    return u[:, :k], sigma[:k], vt[:k].T


def energy(w):
    return float((w**2).sum())


def between(p, q):
    """Distances and cosines of the spaces that orthonormal columns span."""
    small, large = (p, q) if p.shape[1] <= q.shape[1] else (q, p)
    k, more = small.shape[1], large.shape[1] - small.shape[1]
    rest = small - large @ (large.T @ small)
    theta = subspace_angles(p, q)
    within = small.T @ large @ large.T @ small
    logs = -np.log(np.clip(np.linalg.eigvalsh(within), 1e-12, 1.0))
    u, cosines, vt = np.linalg.svd(small.T @ large)
    return {
        "cosine_largest": cosines[0], "cosine_mean": cosines.mean(),
        "cosine_smallest": cosines[-1],
        "geodesic": np.linalg.norm(theta),
        "geodesic_full": math.sqrt((theta**2).sum() + more * math.pi**2 / 4),
        "chordal": np.linalg.norm(rest), "gap": np.linalg.norm(rest, 2),
        "procrustes": np.linalg.norm(small @ u - large @ vt[:k].T),
        "martin": logs.mean(), "binet_cauchy": math.sqrt(-math.expm1(-logs.sum())),
    }  # fmt: skip


def projected(u, w, v):
    return energy(u @ (u.T @ w @ v) @ v.T)


def definitions(a, b):
    """Every column that is a function of two matrices, but overlaps of a few directions."""
    (ua, sa, va), (ub, sb, vb) = spaces(a), spaces(b)
    out = {f"row_{n}": x for n, x in between(va, vb).items()}
    out |= {f"col_{n}": x for n, x in between(ua, ub).items()}
    norms = math.sqrt(energy(a) * energy(b))
    turn, _ = orthogonal_procrustes(b.T, a.T)  # b^T turn is nearest to a^T: outputs turned
    out["row_aligned_cosine"] = float((a * (turn.T @ b)).sum()) / norms
    turn, _ = orthogonal_procrustes(b, a)
    out["col_aligned_cosine"] = float((a * (b @ turn)).sum()) / norms
    rest = {}
    for name, w, u, v in (("a_by_b", a, ub, vb), ("b_by_a", b, ua, va)):
        out[f"two_sided_{name}"] = projected(u, w, v) / energy(w)
        left, right = (np.eye(len(x)) - x @ x.T for x in (u, v))
        out[f"tangent_{name}"] = 1 - energy(left @ w @ right) / energy(w)
        rest[name] = u, v
    u, s, v = np.hstack([ua, ub]), np.concatenate([sa, sb]), np.hstack([va, vb])
    eye = np.eye(len(s))
    interference = (u.T @ u - eye) @ np.diag(s) @ (v.T @ v - eye)
    out["task_interference"] = np.abs(interference).sum() / s.sum()
    out["task_interference_square"] = np.linalg.norm(interference) / np.linalg.norm(s)
    for name, kind in (("spectral", 2), ("nuclear", "nuc")):
        top = max(np.linalg.norm(a, kind), np.linalg.norm(b, kind))
        out[f"{name}_gain"] = np.linalg.norm(a + b, kind) / top
    out["distance"] = np.linalg.norm(a - b)
    out["relative_distance"] = out["distance"] / (np.linalg.norm(a) + np.linalg.norm(b))
    u = np.linalg.svd(a + b)[0]
    products = np.einsum("oi,op,pi->i", u, a @ b.T, u)
    for name, w in (("a", a), ("b", b)):
        out[f"counted_{name}"] = float(((a + b) * w).sum()) / energy(w)
        out[f"over_counted_{name}"] = np.maximum(products, 0).sum() / energy(w)
        out[f"cancelled_{name}"] = np.maximum(-products, 0).sum() / energy(w)
    return out


def ends(a, b):
    """Sums of squared cosines of up to 10 directions at either end, and how many directions."""
    (ua, _, va), (ub, _, vb) = spaces(a), spaces(b)
    k = min(angles.TOP, ua.shape[1], ub.shape[1])
    sums = {
        f"{side}_overlap_{which}": energy(x[:, rows(x)].T @ y[:, rows(y)])
        for side, x, y in (("row", va, vb), ("col", ua, ub))
        for which, rows in (
            ("top", lambda x: slice(k)), ("bottom", lambda x: slice(x.shape[1] - k, None)),
        )
    }  # fmt: skip
    return k, sums


def block_diagonal(made, shapes):
    """The concatenated delta: one diagonal block a module, zero where the adapter lacks it."""
    m = made.modules
    blocks = [m[n].delta if n in m else np.zeros(s) for n, s in shapes.items()]
    out = np.zeros(np.sum([x.shape for x in blocks], axis=0))
    row = column = 0
    for x in blocks:
        out[row : row + x.shape[0], column : column + x.shape[1]] = x
        row, column = row + x.shape[0], column + x.shape[1]
    return out


MEANS = [c.name for c in FAMILY.pairs if c.name.endswith(".mean")]


def expected_pair(a, b, shapes):
    wa, wb = block_diagonal(a, shapes), block_diagonal(b, shapes)
    if not (wa.any() and wb.any()):
        return dict.fromkeys((c.name for c in FAMILY.pairs), math.nan)
    out = definitions(wa, wb)
    pairs = [(a.modules[n].delta, b.modules[n].delta) for n in shapes
             if n in a.modules and n in b.modules]  # fmt: skip
    pairs = [(x, y) for x, y in pairs if x.any() and y.any()]
    local = [definitions(x, y) for x, y in pairs]
    weight = [math.sqrt(energy(x) * energy(y)) for x, y in pairs]
    for name in MEANS:
        values = [x[name.removesuffix(".mean")] for x in local]
        out[name] = np.average(values, weights=weight) if local else math.nan
    counts, sums = zip(*(ends(x, y) for x, y in pairs), strict=True) if pairs else ([], [])
    for name in ("row_overlap_top", "row_overlap_bottom", "col_overlap_top", "col_overlap_bottom"):
        out[name] = sum(x[name] for x in sums) / sum(counts) if pairs else math.nan
    return out


def expected(made):
    shapes = {}
    for x in made:
        shapes |= {n: m.delta.shape for n, m in x.modules.items()}
    rows = [expected_pair(a, b, shapes) for a, b in itertools.combinations(made, 2)]
    return {name: np.array([r[name] for r in rows]) for name in rows[0]}


# Squares of cosines err by this, and a logarithm by that over the square, down to its floor.
_SQUARE, _LEAST = 1e-14, 1e-12


def of_logs(made):
    """How far logarithms of squared cosines may be off, per pair.

    By the smallest squared cosine of a module, on either side.
    """

    def least(a, b):
        found = [1.0]
        for name in set(a.modules) & set(b.modules):
            one, two = (spaces(x.modules[name].delta) for x in (a, b))
            if len(one[1]) and len(two[1]):
                found += [np.linalg.svd(one[k].T @ two[k])[1].min() for k in (0, 2)]
        return min(found) ** 2

    squares = np.array([least(a, b) for a, b in itertools.combinations(made, 2)])
    return 2 * _SQUARE / np.maximum(squares, _LEAST)
