"""Peers as their users run them: whole processes from the shell, and adaptersentry's numpy core."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import ALPHA_OVER_R, Shapes, llama_7b, small_model, temporary_folder, write_zoo
from harness import timed_process
from results import PEERS_PYTHON
from safetensors.numpy import load_file

import mergeprobe_fast as mpf
from mergeprobe_fast import engine
from mergeprobe_fast.features import select
from mergeprobe_fast.screening import screen

GRADIENCE = PEERS_PYTHON.with_name("gradience")
AUDIT, AUDIT32 = "gradience merge-audit", "gradience merge-audit --compute-dtype float32"
ALL = "screen --features all"
SENTRY = "adaptersentry compute_core + delta_inner"
ZOO = 25


def cases(quick: bool) -> list[Case]:
    """Without the peers' environment, ours alone: nothing to compare, targets in seconds remain."""
    shapes, size = (llama_7b(4), "4 blocks of a 7B pair") if quick else (llama_7b(), "7B pair")
    repetitions = 1 if quick else 3
    with_gradience = GRADIENCE.exists()
    if not with_gradience:
        print(f"peers: {GRADIENCE} does not exist; gradience is left out", file=sys.stderr)
    pair = [Variant(OURS, time_target=Target(1.5, False), note="mergeprobe-fast screen: every "
                    "default feature, tables, HTML report")]  # fmt: skip
    zoo = [Variant(OURS, time_target=Target(2, False), note=f"mergeprobe-fast screen of {ZOO}")]
    for variants in (pair, zoo):
        variants.append(Variant(ALL, compare=False, note="the same with every statistic"))
    if with_gradience:
        pair.append(Variant(AUDIT, "gradience", note="its default, float64"))
        if not quick:
            pair.append(Variant(AUDIT32, "gradience"))
        pairs = ZOO * (ZOO - 1) // 2
        note = f"one audit timed, times the {pairs} pairs, start-up included"
        zoo.append(Variant(AUDIT, "gradience", factor=pairs, extrapolated=True, note=note))
    out = [
        Case("peers", f"process, {size}, r=16, fp32", 2, "wall", repetitions, tuple(pair),
             lambda: _processes(2, shapes, 16, [v.name for v in pair])),
        Case("peers", f"process, {ZOO} small adapters, r=8, fp32", 2, "wall", repetitions,
             tuple(zoo), lambda: _processes(ZOO, small_model(), 8, [v.name for v in zoo])),
    ]  # fmt: skip
    if _sentry_file() is not None:
        variants = (
            Variant(OURS, note="screen() from files, every feature"),
            Variant(SENTRY, "adaptersentry", note="safetensors.numpy.load_file, then norms, "
                    "spectra and inner products per module (and row and column norms)"),
        )  # fmt: skip
        out.append(
            Case("peers", f"in process, {size}, r=16, fp32", 2, "wall", repetitions, variants,
                 lambda: _in_process(shapes))
        )  # fmt: skip
    return out


@contextmanager
def _processes(count: int, shapes: Shapes, rank: int, names: list[str]) -> Iterator[Work]:
    with temporary_folder() as root:
        paths = write_zoo(root / "zoo", count, shapes, rank)
        out = root / "screened"
        every = root / "screened_all"
        screening, all_of_it = (
            [sys.executable, "-m", "mergeprobe_fast", "screen", root / "zoo", "--out", to,
             "--features", features, "--overwrite", "--json"]
            for to, features in ((out, "default"), (every, "all"))
        )  # fmt: skip
        audit = [GRADIENCE, "merge-audit", "--adapter-a", paths[0], "--adapter-b", paths[1],
                 "--output-dir"]  # fmt: skip
        run: dict[str, Callable[[], object]] = {
            OURS: lambda: timed_process(screening),
            ALL: lambda: timed_process(all_of_it),
        }
        if AUDIT in names:
            run[AUDIT] = lambda: timed_process([*audit, root / "audit"], cwd=root)
        if AUDIT32 in names:
            run[AUDIT32] = lambda: timed_process(
                [*audit, root / "audit32", "--compute-dtype", "float32"], cwd=root
            )

        def finish(results, medians) -> list[Fact]:
            table = pq.read_table(out / "adapters.parquet").to_pydict()
            facts = []
            for folder in (out, every):
                pairs = pq.read_table(folder / "pairs.parquet")
                assert pairs.num_rows == count * (count - 1) // 2
            for name, folder, tolerance in ((AUDIT, "audit", 1e-6), (AUDIT32, "audit32", 1e-4)):
                if name in names:
                    worst = _against_audit(table, root / folder)
                    assert worst < tolerance, f"{name}: {worst:.1e}"
                    facts.append(Fact(f"norms and stable ranks, difference from {name}", worst,
                                      "relative", peer="gradience"))  # fmt: skip
            for name in names:
                ours = name in (OURS, ALL)
                peer, run_of = (OURS, name) if ours else ("gradience", f"{name}, one audit")
                facts += [
                    Fact(f"peak RSS, {run_of}", results[name].peak_rss / 1e6, "MB", peer=peer),
                    Fact(f"CPU time, both cores, {run_of}", results[name].cpu, "s", peer=peer),
                ]
            return facts

        yield Work(run, finish)


def _against_audit(table: dict[str, list], folder: Path) -> float:
    """Largest relative difference of what both define alike, for the two adapters audited."""
    layers = json.loads((folder / "merge_audit.json").read_text())["per_layer"]
    differences = []
    for side, i in (("a", 0), ("b", 1)):
        norms = np.array([x["metrics"][f"frobenius_norm_{side}"] for x in layers])
        ranks = np.array([x["metrics"][f"stable_rank_{side}"] for x in layers])
        differences += [
            np.sqrt(np.square(norms).sum()) / table["norm"][i] - 1,
            ranks.mean() / table["stable_rank.mean"][i] - 1,
            ranks.max() / table["stable_rank.max"][i] - 1,
        ]
    return float(np.abs(differences).max())


@contextmanager
def _in_process(shapes: Shapes) -> Iterator[Work]:
    sentry = _load_sentry()
    with temporary_folder() as root:
        paths = write_zoo(root, 2, shapes, 16)

        def ours() -> Any:
            return screen(mpf.open_zoo(paths), threads=torch.get_num_threads())

        def theirs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            files = [load_file(p / "adapter_model.safetensors") for p in paths]
            inner, norm, sigma = [], [], []
            for name in shapes:
                key = f"base_model.model.{name}.lora_"
                ab = [(f[f"{key}A.weight"], f[f"{key}B.weight"]) for f in files]
                cores = [sentry.compute_core(a, b, ALPHA_OVER_R) for a, b in ab]
                norm.append([c.fro for c in cores])
                sigma.append([c.sigma for c in cores])
                inner.append(sentry.delta_inner(*ab[0], ALPHA_OVER_R, *ab[1], ALPHA_OVER_R))
            return np.array(inner), np.array(norm), np.array(sigma)

        def finish(results, medians) -> list[Fact]:
            inner, norm, sigma = results[SENTRY]
            found = results[OURS]
            whole = engine.run(mpf.open_zoo(paths), select(["cosine"]).features)
            # Both in the order of the modules: ours sorts naturally, so match by name.
            order = [list(shapes).index(m.name) for m in found.zoo.modules]
            mine = whole.sigma.reshape(len(shapes), 2, -1)
            norms = np.sqrt(np.square(norm).sum(0))
            facts = {
                "norm": np.abs(np.asarray(found.adapters["norm"]) / norms - 1).max(),
                "cosine": abs(found.pairs["cosine"][0] - inner.sum() / norms.prod()),
                "spectrum": (np.abs(mine - sigma[order]) / sigma[order][..., :1]).max(),
            }
            for name, value in facts.items():
                # float32 Grams there: their documentation promises 1e-7 on leading values.
                assert value < 2e-6, f"{name}: {value:.1e}"
            return [
                Fact(f"{name}, difference from adaptersentry", float(value), "1",
                     peer="adaptersentry") for name, value in facts.items()
            ]  # fmt: skip

        yield Work({OURS: ours, SENTRY: theirs}, finish)


def _sentry_file() -> Path | None:
    lib = PEERS_PYTHON.parent.parent / "lib"
    found = list(lib.glob("python*/site-packages/adaptersentry/features/lowrank_core.py"))
    return found[0] if found else None


def _load_sentry() -> ModuleType:
    """The one file, which needs nothing but numpy, without the package around it."""
    spec = importlib.util.spec_from_file_location("adaptersentry_lowrank_core", _sentry_file())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
