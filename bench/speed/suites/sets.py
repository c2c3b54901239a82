"""Statistics of many sets of adapters from Gram matrices: against numpy and scipy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from cases import OURS, Case, Fact, Target, Variant, Work
from scipy.optimize import minimize

from mergeprobe_fast.engine.sets import RIDGE, set_statistics

BATCHED, ONE_BY_ONE = "numpy, batched, without minimax", "numpy and SLSQP, set by set"
PARTS = ("geometry", "retention", "reweighted", "minimax")


@dataclass(frozen=True)
class Shape:
    """``sets`` sets of ``size`` out of ``count`` adapters; so many of them for the others."""

    sets: int
    size: int
    count: int = 200
    domains: int = 5
    batched: int = 5000
    single: int = 40


def cases(quick: bool) -> list[Case]:
    """Sets of a few and of many members."""
    shapes = (Shape(4000, 8, 60, batched=500, single=4),) if quick else (
        Shape(100_000, 8), Shape(100_000, 3), Shape(500, 64, batched=100, single=2),
    )  # fmt: skip
    return [_case(s, threads) for s in shapes for threads in (1, 2)]


def _case(shape: Shape, threads: int) -> Case:
    target = Target(1.0, False) if (shape.sets, shape.size, threads) == (100_000, 8, 2) else None
    variants = (
        Variant(OURS, time_target=target),
        *(Variant(part, compare=False) for part in PARTS),
        Variant(BATCHED, "numpy", factor=shape.sets / shape.batched, extrapolated=True,
                note=f"{shape.batched} sets, times {shape.sets / shape.batched:g}"),
        Variant(ONE_BY_ONE, "scipy", factor=shape.sets / shape.single, extrapolated=True, most=2,
                note=f"{shape.single} sets, times {shape.sets / shape.single:g}"),
    )  # fmt: skip
    name = f"{shape.sets} sets of {shape.size} out of {shape.count}"
    clock = "thread_cpu" if threads == 1 else "wall"
    return Case("sets", name, threads, clock, 5, variants, lambda: _prepare(shape, threads))


@contextmanager
def _prepare(shape: Shape, threads: int) -> Iterator[Work]:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((shape.count, 300)) * 10 ** rng.uniform(-0.3, 0.3, (shape.count, 1))
    flat += 0.5 * rng.standard_normal(300)
    metrics = 10 ** rng.uniform(-1, 1, (shape.domains, 300))
    totals = SimpleNamespace(
        names=[str(i) for i in range(shape.count)], gram=flat @ flat.T,
        domains=tuple(map(str, range(shape.domains))),
        inputs=np.array([(flat * c) @ flat.T for c in metrics]), relative=None,
    )  # fmt: skip
    members = rng.random((shape.sets, shape.count)).argpartition(shape.size)[:, : shape.size]
    weights = np.full(members.shape, 1 / shape.size)
    domain_of = rng.integers(0, shape.domains, shape.count)

    def ours(which=PARTS, threads: int = threads) -> dict[str, np.ndarray]:
        return set_statistics(totals, members, weights, domain_of, which=which, threads=threads)

    def other(rows: slice) -> tuple[np.ndarray, ...]:
        who = members[rows]
        gram = totals.gram[who[:, :, None], who[:, None, :]]
        own = totals.inputs[domain_of[who][:, :, None, None], who[:, None, :, None],
                            who[:, None, None, :]]  # fmt: skip
        k = np.arange(shape.size)
        return gram, own / own[:, k, k, k][:, :, None, None], weights[rows]

    run = {
        OURS: ours,
        **{part: lambda part=part: ours([part]) for part in PARTS},
        BATCHED: lambda: batched(*other(slice(shape.batched))),
        ONE_BY_ONE: lambda: [
            one_by_one(*(x[0] for x in other(slice(s, s + 1)))) for s in range(shape.single)
        ],
    }

    def finish(results, medians) -> list[Fact]:
        found, truth = results[OURS], results[BATCHED]
        for name, values in truth.items():
            apart = np.abs(found[name][: shape.batched] - values).max()
            assert apart < 1e-6, f"{name}: {apart:.1e}"
        worst = found["minimax_error"].max(1)[: shape.single]
        apart = np.abs(worst / np.array(results[ONE_BY_ONE]) - 1).max()
        assert apart < 1e-5, f"worst error against SLSQP: {apart:.1e}"
        for name, values in ours(threads=3 - threads).items():
            assert np.array_equal(values, found[name]), "depends on the number of threads"
        gap = (found["minimax_gap"] / found["minimax_error"].max(1)).max()
        return [Fact("largest duality gap, relative", float(gap), "1", Target(1e-6, False))]

    yield Work(run, finish)


def batched(gram: np.ndarray, own: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    """All but minimax, by numpy's linear algebra on stacks of small matrices."""
    eye, square = np.eye(w.shape[1]), np.diagonal(gram, axis1=1, axis2=2)
    length = np.sqrt(square)
    cosines = gram / (length[:, :, None] * length[:, None, :])
    ranks = []
    for matrix in (gram, cosines):
        share = np.maximum(np.linalg.eigvalsh(matrix), 0)
        share /= share.sum(1, keepdims=True)
        ranks.append(np.exp(-(share * np.log(np.maximum(share, 1e-300))).sum(1)))
    merged = (np.matmul(gram, w[..., None])[..., 0] * w).sum(1)
    h = own.sum(1)
    at = np.arange(w.shape[1])
    h[:, at, at] *= 1 + RIDGE
    target = own[:, at, :, at].sum(0)
    best = np.linalg.solve(h, target[..., None])[..., 0]

    def errors(w: np.ndarray) -> np.ndarray:
        d = w[:, None, :] - eye
        return (np.matmul(own, d[..., None])[..., 0] * d).sum(2)

    seen = np.matmul(own, w[:, None, :, None])[..., 0]
    return {
        "merged_norm": np.sqrt(merged), "superposition": merged / (w**2 * square).sum(1),
        "gram_rank": ranks[0], "cosine_rank": ranks[1],
        "leverage": 1 - 1 / np.diagonal(np.linalg.inv(cosines), axis1=1, axis2=2),
        "error": errors(w), "reweighted_weights": best, "reweighted_error": errors(best),
        "direction": seen[:, at, at] / np.sqrt((seen * w[:, None, :]).sum(2)),
    }  # fmt: skip


def one_by_one(gram: np.ndarray, own: np.ndarray, w: np.ndarray) -> float:
    """The same for one set, and minimax by SLSQP; returns the least worst error."""
    batched(gram[None], own[None], w[None])
    k = len(w)
    eye, last = np.eye(k), np.eye(k + 1)[k]

    def slack(x: np.ndarray) -> np.ndarray:
        d = x[:-1] - eye
        return x[-1] - np.einsum("ia,iab,ib->i", d, own, d)

    def slope(x: np.ndarray) -> np.ndarray:
        return np.concatenate([-2 * np.einsum("iab,ib->ia", own, x[:-1] - eye), np.ones((k, 1))], 1)

    start = np.append(w, -slack(np.append(w, 0.0)).min())
    solved = minimize(
        lambda x: x[-1], start, jac=lambda x: last, method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slope},
        options={"ftol": 1e-10, "maxiter": 300},
    )  # fmt: skip
    return float(-slack(np.append(solved.x[:-1], 0.0)).min())
