"""TIES, DARE, pruning, DELLA, breadcrumbs as methods, against dense float64 definitions.

An entry within 1e-5 of a threshold, or whose elected sum is within 1e-5 of zero, may go either way
in float32: these are left out of the comparison, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from adapters import MadeAdapter, make_adapter
from dense_merge import assert_peft_agrees, deltas, merge_json, seed_from, truncated, zoo_of

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.ops.tiles_reference import counter_hash
from mergeprobe_fast.ops.tiles_rule import stream

SHAPES = {"layers.1.q_proj": (40, 33, 4), "layers.1.v_proj": (24, 57, 4), "head": (21, 40, 3)}
RECIPES: tuple[dict[str, Any], ...] = (
    {"modules": SHAPES, "alpha": 3},
    {"modules": SHAPES, "rank": 5, "alpha": 16, "rslora": True, "dtype": "BF16"},
    {"modules": {k: SHAPES[k] for k in ("head", "layers.1.q_proj")}, "magnitude": 2.0},
)
NEAR = 1e-5


def dense_rows(made: list[MadeAdapter], method: str, weights: Any = None, **arguments: Any):
    """What the method says, uncut, by module."""
    source = ZooSource(mpf.open_zoo([m.path for m in made]))
    chosen, request = prepare(source, method, weights=weights, arguments=arguments)
    return {d.module.name: d.rows(0, d.module.d_out).copy() for d in chosen.dense(request)}


class Entries:
    """All deltas of one module, stacked, with the definitions' steps on them."""

    def __init__(self, made: list[MadeAdapter], name: str, weights: list[float]) -> None:
        having = [i for i, m in enumerate(made) if name in m.modules]
        self.name, self.names = name, [made[i].path.name for i in having]
        self.x = np.stack([made[i].modules[name].delta for i in having])
        self.w = np.array([weights[i] for i in having])[:, None, None]
        self.doubtful = np.zeros(self.x.shape[1:], bool)

    def near(self, threshold: np.ndarray) -> None:
        size = np.abs(self.x)
        self.doubtful |= (np.abs(size - threshold) <= NEAR * threshold).any(axis=0)

    def top(self, density: float) -> np.ndarray:
        """Keep int(density * size) entries of the largest magnitude."""
        kept = np.zeros_like(self.x)
        for out, x in zip(kept, self.x, strict=True):
            k = int(density * x.size)
            order = np.argsort(-np.abs(x), axis=None, kind="stable")
            out.flat[order[:k]] = x.flat[order[:k]]
            if 0 < k < x.size:
                self.near(np.abs(x).flat[order[k - 1]])
                self.near(np.abs(x).flat[order[k]])
        return kept

    def chance(self, seed: int) -> np.ndarray:
        """Uniform numbers in [0, 1), as the hash gives them."""
        position = np.arange(self.x[0].size, dtype=np.uint64)
        draws = [counter_hash(seed, stream(self.name, n), position) for n in self.names]
        return np.stack(draws).reshape(self.x.shape) / 2.0**32

    def elect(self, kept: np.ndarray, e: np.ndarray, method: str) -> np.ndarray:
        """Entries of the elected sign."""
        total = (np.sign(e) if method == "frequency" else e).sum(axis=0)
        size = np.abs(e).sum(axis=0)
        if method == "total":
            self.doubtful |= (np.abs(total) <= NEAR * size) & (size > 0)
        return (np.sign(e) == np.where(total >= 0, 1, -1)) & (kept != 0)


def guarded(numerator: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    return numerator / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)


def peft_ties(e: Entries, kept: np.ndarray, method: str) -> np.ndarray:
    agree = e.elect(kept, kept, method)
    return (e.w * kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def mergekit_ties(e: Entries, kept: np.ndarray, method: str, normalize: bool) -> np.ndarray:
    agree = e.elect(kept, e.w * kept, method)
    merged = (e.w * kept * agree).sum(axis=0)
    return guarded(merged, (e.w * agree).sum(axis=0)) if normalize else merged


def l1_matched(e: Entries, kept: np.ndarray) -> np.ndarray:
    before, after = np.abs(e.x).sum(axis=(1, 2)), np.abs(kept).sum(axis=(1, 2))
    factor = np.where((before < 1e-7) | (after < 1e-7), 1, before / np.where(after > 0, after, 1))
    return kept * factor[:, None, None]


def della_kept(e: Entries, density: float, epsilon: float, seed: int) -> np.ndarray:
    rank = np.abs(e.x).argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    p = density - epsilon + 2 * epsilon * rank / (e.x.shape[2] - 1)
    return np.where(e.chance(seed) < p, e.x, 0)


def breadcrumbs_kept(e: Entries, density: float, gamma: float) -> np.ndarray:
    kept = np.zeros_like(e.x)
    for out, x in zip(kept, e.x, strict=True):
        size = x.size
        target, top = int(density * size), int(gamma * size)
        bottom = size - target - top
        if bottom < 0:
            top, bottom = top + bottom, 0
        order = np.argsort(np.abs(x), axis=None, kind="stable")
        chosen = order[bottom : size - top]
        out.flat[chosen] = x.flat[chosen]
        for at in (bottom - 1, bottom, size - top - 1, size - top):
            if 0 <= at < size:
                e.near(np.abs(x).flat[order[at]])
    return kept


DEFINITIONS: dict[str, tuple[str, dict[str, Any], Callable[[Entries], np.ndarray]]] = {
    "ties": ("ties", {"density": 0.3}, lambda e: peft_ties(e, e.top(0.3), "total")),
    "ties, frequency": (
        "ties", {"density": 0.6, "majority_sign_method": "frequency"},
        lambda e: peft_ties(e, e.top(0.6), "frequency"),
    ),
    "ties, mergekit": (
        "ties", {"density": 0.4, "dialect": "mergekit"},
        lambda e: mergekit_ties(e, e.top(0.4), "total", True),
    ),
    "ties, mergekit, not normalised": (
        "ties", {"density": 0.4, "dialect": "mergekit", "normalize": False},
        lambda e: mergekit_ties(e, e.top(0.4), "total", False),
    ),
    "magnitude_prune": (
        "magnitude_prune", {"density": 0.25}, lambda e: (e.w * e.top(0.25)).sum(axis=0),
    ),
    "dare_linear": (
        "dare_linear", {"density": 0.4, "seed": 9},
        lambda e: (e.w * np.where(e.chance(9) < 0.4, e.x / 0.4, 0)).sum(axis=0),
    ),
    "dare_linear, mergekit, normalised": (
        "dare_linear", {"density": 0.4, "dialect": "mergekit", "normalize": True},
        lambda e: (e.w * l1_matched(e, np.where(e.chance(0) < 0.4, e.x, 0))).sum(axis=0)
        / e.w.sum(),
    ),
    "dare_ties": (
        "dare_ties", {"density": 0.7},
        lambda e: peft_ties(e, np.where(e.chance(0) < 0.7, e.x / 0.7, 0), "total"),
    ),
    "della": (
        "della", {"density": 0.6, "epsilon": 0.2, "seed": 5},
        lambda e: mergekit_ties(e, l1_matched(e, della_kept(e, 0.6, 0.2, 5)), "total", True),
    ),
    "della_linear": (
        "della_linear", {"density": 0.5},
        lambda e: (e.w * l1_matched(e, della_kept(e, 0.5, 0.1, 0))).sum(axis=0),
    ),
    "breadcrumbs": (
        "breadcrumbs", {"density": 0.8, "gamma": 0.05},
        lambda e: (e.w * breadcrumbs_kept(e, 0.8, 0.05)).sum(axis=0),
    ),
    "breadcrumbs, the top gives way": (
        "breadcrumbs", {"density": 0.97, "gamma": 0.05},
        lambda e: (e.w * breadcrumbs_kept(e, 0.97, 0.05)).sum(axis=0),
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", {"density": 0.7, "gamma": 0.1, "normalize": False},
        lambda e: mergekit_ties(e, breadcrumbs_kept(e, 0.7, 0.1), "total", False),
    ),
}  # fmt: skip
WEIGHTS = [[1.0, 1.0, 1.0], [0.7, -0.4, 1.3]]
METHODS = sorted({method for method, _, _ in DEFINITIONS.values()})


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal weights", "a negative weight"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_entry_is_what_the_definition_says(tmp_path, rng, name, weights):
    made = zoo_of(*RECIPES)(tmp_path, seed_from(rng))
    method, arguments, define = DEFINITIONS[name]
    found = dense_rows(made, method, weights, **arguments)
    assert set(found) == set(SHAPES)
    for module, rows in found.items():
        e = Entries(made, module, weights)
        truth = define(e)
        # Rank + 3 roundings of |B||A| scaled up by at most 1/density, and N of the sum.
        size = np.abs(truth).max() + np.abs(e.w * e.x).sum(axis=0).max() / 0.3
        close = np.abs(rows - truth) <= 2e-6 * size
        assert close[~e.doubtful].all(), module
        assert e.doubtful.mean() < 0.02, "the comparison says nothing"
        assert np.count_nonzero(truth) > 0.1 * truth.size


@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
def test_ties_and_pruning_are_pefts(tmp_path, rng, density):
    torch = pytest.importorskip("torch")
    merge_utils = pytest.importorskip("peft.utils.merge_utils", exc_type=ImportError)
    made = zoo_of(*[{"modules": SHAPES}] * 3)(tmp_path, seed_from(rng))
    weights = [0.5, 1.5, -0.7]
    for method, theirs in (
        ("ties", lambda x, w: merge_utils.ties(x, w, density, "total")),
        ("magnitude_prune", lambda x, w: merge_utils.magnitude_prune(x, w, density)),
    ):
        found = dense_rows(made, method, weights, density=density)
        for module, rows in found.items():
            e = Entries(made, module, weights)
            kept = e.top(density)
            e.elect(kept, kept, "total")
            if density < 1:
                x = [torch.from_numpy(d.astype(np.float32)) for d in e.x]
                truth = theirs(x, torch.tensor(weights)).numpy()
            else:  # PEFT warns that nothing is pruned
                with pytest.warns(UserWarning, match="no pruning"):
                    truth = theirs(list(map(torch.from_numpy, e.x)), torch.tensor(weights)).numpy()
            close = np.abs(rows - truth) <= 1e-6 * np.abs(e.x).sum(axis=0).max()
            assert close[~e.doubtful].all()


def test_the_papers_threshold_spans_all_modules(tmp_path, rng):
    """Yadav's code trims the flattened vector of all layers, not each one."""
    seed = seed_from(rng)
    made = [
        make_adapter(tmp_path / n, SHAPES, seed=seed + i, magnitude=1 + i)
        for i, n in enumerate("ab")
    ]
    made.append(make_adapter(tmp_path / "c", {"head": SHAPES["head"]}, seed=seed + 5))
    found = dense_rows(made, "ties", None, dialect="paper", density=0.3)
    by_module = dense_rows(made, "ties", None, density=0.3)
    thresholds = {}
    for m in made:
        flat = np.sort(np.abs(np.concatenate([d.delta.ravel() for d in m.modules.values()])))[::-1]
        thresholds[m.path.name] = flat[int(0.3 * flat.size) - 1]
    for module, rows in found.items():
        e = Entries(made, module, [1.0] * 3)
        limits = np.array([thresholds[n] for n in e.names])[:, None, None]
        e.near(limits)
        kept = np.where(np.abs(e.x) >= limits * (1 - 1e-9), e.x, 0)
        truth = peft_ties(e, kept, "total")
        close = np.abs(rows - truth) <= 2e-6 * np.abs(e.x).sum(axis=0).max()
        assert close[~e.doubtful].all()
        assert (rows != by_module[module]).any()
    with pytest.raises(InputError, match="density: dialect 'paper' has one threshold per adapter"):
        by_layer = [{"filter": "head", "value": 0.1}, {"value": 0.5}]
        dense_rows(made, "ties", dialect="paper", density=by_layer)


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_is_the_best_cut_of_the_dense_rule(tmp_path, rng, method):
    made = zoo_of(*RECIPES)(tmp_path / "zoo", seed_from(rng))
    arguments = {"density": 0.5}
    weights = [0.8, 1.0, -0.5]
    dense = dense_rows(made, method, weights, **arguments)
    zoo = mpf.open_zoo([m.path for m in made])
    for rank in (None, 2):
        out = tmp_path / f"out{rank}"
        report = mpf.merge(zoo, method, weights, rank, dtype="F32", **arguments).save(out)
        assert_peft_agrees(out)
        for module, written in deltas(out).items():
            whole = dense[module].astype(np.float64)
            row = report["modules"][module]
            assert row["rank"] == (rank or 5)
            best = np.linalg.norm(whole - truncated(whole, row["rank"]))
            error = np.linalg.norm(whole - written)
            # Sketches of these small modules span everything: the exact SVD, in float32.
            assert error <= best * (1 + 1e-5) + 1e-5 * np.linalg.norm(whole)
            assert math.isclose(row["norm"], np.linalg.norm(whole), rel_tol=1e-5)
            assert math.isclose(row["truncation_error"], error, rel_tol=1e-3)
            assert 0 <= row["excess_relative"] < 1e-3
    assert merge_json(out)["arguments"]["density"] == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_and_the_gauge_do_not_matter(tmp_path, rng, method):
    """Also not for chance, which depends on names and positions."""
    made = zoo_of(*[{"modules": SHAPES}] * 3)(tmp_path, seed_from(rng))
    weights = [0.5, 1.0, 2.0]
    found = dense_rows(made, method, weights, density=0.5)
    turned = dense_rows(made[::-1], method, weights[::-1], density=0.5)
    moved = []
    for m in made:
        factors = {}
        for name, module in m.modules.items():
            g = np.diag(rng.uniform(1, 2, len(module.a))) + 0.1  # well conditioned
            factors[name] = (g @ module.a, module.b @ np.linalg.inv(g))
        folder = tmp_path / "moved" / m.path.name
        moved.append(make_adapter(folder, factors=factors, modules=SHAPES))
    gauged = dense_rows(moved, method, weights, density=0.5)
    for module, rows in found.items():
        e = Entries(made, module, weights)
        size = 1e-5 * np.abs(e.x).sum(axis=0).max()
        for other in (turned[module], gauged[module]):
            flipped = np.abs(rows - other) > size
            assert flipped.mean() < 0.01, "more than entries at a threshold"


def test_dare_keeps_the_expectation(tmp_path, rng):
    made = zoo_of({"modules": SHAPES}, {"modules": SHAPES})(tmp_path, seed_from(rng))
    n, p = 300, 0.3
    sums = {name: np.zeros(shape[:2]) for name, shape in SHAPES.items()}
    for seed in range(n):
        for name, rows in dense_rows(made, "dare_linear", [1, -2], density=p, seed=seed).items():
            sums[name] += rows / n
    for name, mean in sums.items():
        e = Entries(made, name, [1, -2])
        sd = np.sqrt(((e.w * e.x) ** 2).sum(axis=0) * (1 - p) / p / n)
        z = (mean - (e.w * e.x).sum(axis=0)) / sd
        assert abs(z.mean()) < 5 / math.sqrt(z.size) and 0.8 < z.std() < 1.2
        assert np.abs(z).max() < 6.5


def test_rules_that_average_do_not_shrink_with_equal_weights(tmp_path):
    """TIES of N copies of one adapter is that adapter, trimmed: weights of 1, not 1/N."""
    made = zoo_of(*[{"modules": SHAPES, "seed": 4}] * 3)(tmp_path, 0)
    for method in ("ties", "della", "breadcrumbs_ties"):
        found = dense_rows(made, method, density=1 if method == "ties" else 0.5, **(
            {"epsilon": 0.5} if method == "della" else {}))  # fmt: skip
        truth = made[0].modules["head"].delta
        kept = found["head"] != 0
        assert kept.mean() > 0.4
        if method != "della":
            assert np.abs(found["head"] - truth)[kept].max() < 1e-5
    peft = dense_rows(made, "magnitude_prune", density=1)["head"]
    assert np.abs(peft - truth).max() < 1e-5, "1/N each where the rule adds"


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_that_is_not_finite_is_named(tmp_path, method):
    factors = {"head": (np.full((3, 40), np.nan), np.ones((21, 3)))}
    made = zoo_of({"modules": SHAPES}, {"modules": SHAPES, "factors": factors})(tmp_path, 1)
    for run in (
        lambda: dense_rows(made, method),
        lambda: mpf.merge([m.path for m in made], method),
    ):
        with pytest.raises(InputError, match=r"head\.lora_A\.weight: holds NaN") as caught:
            run()
        assert str(made[1].path) in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_zero_deltas_and_a_single_adapter(tmp_path, method):
    zero = zoo_of(*[{"modules": SHAPES, "zero_b": True}] * 2)(tmp_path / "zero", 2)
    merged = mpf.merge([m.path for m in zero], method)
    merged.save(tmp_path / "out")
    assert all(not d.any() for d in deltas(tmp_path / "out").values())
    one = zoo_of({"modules": SHAPES, "rank": 2})(tmp_path / "one", 3)
    report = mpf.merge([one[0].path], method, density=0.5, dtype="F32").save(tmp_path / "out1")
    assert {m["rank"] for m in report["modules"].values()} == {2}
    assert_peft_agrees(tmp_path / "out1")
