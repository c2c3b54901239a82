"""The columns of probes from their definitions: dense, in float64, from full gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
from probes import MadeRun, MadeSnapshot
from tolerances import bound

Q, DOWN = "m.0.q", "m.1.down"
MODULES = {
    Q: (24, 20, 4), "m.0.v": (9, 20, 3), "m.1.q": (24, 31, 5), DOWN: (30, 1, 2),
    "m.1.up": (1, 17, 2),
}  # fmt: skip


def projector(columns: np.ndarray) -> np.ndarray:
    """Onto the span of the columns."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-6 * max(s.max(initial=0), 1e-300)]
    return u @ u.T


def reach(factor: np.ndarray) -> np.ndarray:
    """Onto the span of the columns of A^T or B, however short each of them is."""
    size = np.linalg.norm(factor, axis=0)
    return projector(factor / np.where(size > 0, size, 1.0))


def tangent(snapshot: MadeSnapshot, name: str, gradient: np.ndarray | None = None) -> np.ndarray:
    """P_B G + G P_A - P_B G P_A of the mean gradient, (d_out, d_in)."""
    m = snapshot.adapter.modules[name]
    g = snapshot.mean(name) if gradient is None else gradient
    left, right = reach(m.b), reach(m.a.T)
    return left @ g + g @ right - left @ g @ right


def visible(snapshot: MadeSnapshot, name: str) -> list[np.ndarray]:
    """G_t P_A of every step of the window."""
    onto = reach(snapshot.adapter.modules[name].a.T)
    return [g @ onto for g in snapshot.gradients[name]]


def flat(snapshot: MadeSnapshot, of) -> np.ndarray:
    """All modules of a matrix per module, one after the other; an absent module is zero."""
    parts = (
        of(snapshot, n).ravel() if n in snapshot.adapter.modules else np.zeros(o * i)
        for n, (o, i, _) in MODULES.items()
    )
    return np.concatenate(list(parts))


def delta(snapshot: MadeSnapshot, name: str) -> np.ndarray:
    return snapshot.adapter.modules[name].delta


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / size) if size > 0 else math.nan


def row_overlap(one: MadeSnapshot, other: MadeSnapshot) -> float:
    """As of the zoo's own updates: common over the smaller number of directions."""
    common, directions = 0.0, [0, 0]
    for name in MODULES:
        here = [
            projector(delta(s, name).T) if name in s.adapter.modules else np.zeros((1, 1))
            for s in (one, other)
        ]
        directions = [d + round(np.trace(p)) for d, p in zip(directions, here, strict=True)]
        if here[0].shape == here[1].shape:
            common += float(np.trace(here[0] @ here[1]))
    return common / min(directions) if min(directions) else math.nan


def expected_pair(a: MadeRun, b: MadeRun) -> dict[str, float]:
    one, other = a.snapshots[-1], b.snapshots[-1]
    w, g, moved = {}, {}, {}
    for run, s in ((a, one), (b, other)):
        w[s.path], g[s.path] = flat(s, delta), flat(s, tangent)
        moved[s.path] = w[s.path] - flat(run.snapshots[-2], delta)
    sizes = sorted(float(np.linalg.norm(v)) for v in w.values())
    started = [s.info.initial.modules for s in (one, other)]
    common = started[0].keys() & started[1].keys()
    same = sum(started[0][n] == started[1][n] for n in common)
    p, q = one.path, other.path
    return {
        "probe_cosine": cosine(w[p], w[q]),
        "probe_norm_ratio": sizes[0] / sizes[1] if sizes[1] else math.nan,
        "probe_gradient_cosine": cosine(g[p], g[q]),
        "probe_first_order_a_by_b": cosine(g[p], w[q]),
        "probe_first_order_b_by_a": cosine(g[q], w[p]),
        "probe_displacement_cosine": cosine(moved[p], moved[q]),
        "probe_shared_init": same / len(common) if common else math.nan,
        "probe_row_overlap": row_overlap(one, other),
    }


def expected_adapter(run: MadeRun) -> dict[str, float]:
    here, before = run.snapshots[-1], run.snapshots[-2]
    w, w1 = flat(here, delta), flat(before, delta)
    w2 = flat(run.snapshots[-3], delta) if len(run.snapshots) > 2 else np.zeros_like(w)
    steps = np.array([
        np.concatenate([visible(here, n)[t].ravel() for n in here.adapter.modules])
        for t in range(here.info.window)
    ])  # fmt: skip
    count, mean = len(steps), steps.mean(0)
    covariance = float(np.square(steps - mean).sum()) / (count - 1)
    signal = float(mean @ mean) - covariance / count
    along = np.mean([
        sum(float((here.gradients[n][t] * delta(here, n)).sum()) for n in here.adapter.modules)
        for t in range(count)
    ])  # fmt: skip
    seen = math.sqrt(float(np.square(steps).sum(1).mean()))
    size, size1 = float(np.linalg.norm(w)), float(np.linalg.norm(w1))
    return {
        "probe_steps": here.info.steps,
        "probe_fraction": here.info.fractions[-1],
        "probe_loss": 2.5,
        "probe_learning_rate_integral": 1e-3 * here.info.steps,
        "probe_clip": 0.75,
        "probe_norm": size,
        "probe_euler": along,
        "probe_euler_relative": along / (size * seen) if size else math.nan,
        "probe_gradient_norm": float(np.linalg.norm(flat(here, tangent))),
        "probe_noise_scale": covariance / signal if signal > 0 else math.nan,
        "probe_displacement": float(np.linalg.norm(w - w1)),
        "probe_straightness": cosine(w - w1, w1 - w2),
        "probe_growth": size / size1 if size1 else math.nan,
    }


def differences(found, runs: list[MadeRun], slack: float = 1.0) -> list[str]:
    """Columns that differ from the definitions by more than the bound."""
    pairs, adapters = found
    wrong = []
    for row, (a, b) in enumerate(itertools.combinations(runs, 2)):
        for name, value in expected_pair(a, b).items():
            error = abs(pairs[name][row] - value)
            if math.isnan(pairs[name][row]) != math.isnan(value) or error > slack * bound("probe"):
                wrong.append(f"{name} of {a.path.name}, {b.path.name}: {pairs[name][row]} {value}")
    for row, run in enumerate(runs):
        for name, value in expected_adapter(run).items():
            got = adapters[name][row]
            scale = max(abs(value), 1.0 if name == "probe_straightness" else 0.0)
            if name in ("probe_euler", "probe_euler_relative"):  # of |G P_A| |W|
                want = expected_adapter(run)
                scale = abs(want["probe_euler"] / want["probe_euler_relative"]) if value else 1.0
                scale = scale if name == "probe_euler" else 1.0
            bad = abs(got - value) > slack * bound("probe") * scale
            if math.isnan(got) != math.isnan(value) or bad:
                wrong.append(f"{name} of {run.path.name}: {got} {value}")
    return wrong
