"""Elementwise merges of one layer against PEFT; RegMean of a 7B-size model, files to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import (
    ALPHA_OVER_R,
    adapters,
    llama_7b,
    size_of,
    temporary_folder,
    write_calibration,
    write_zoo,
)
from harness import peak_growth, timed_process

import mergeprobe_fast as mpf
from mergeprobe_fast.ops.tiles import Deltas, ElementwiseRule, magnitude_thresholds, merge_dense
from suites.merge import LAYER, RANK, peft_merge, peft_model

DENSITY = 0.3
SVD, LOWRANK, DENSE = "add_weighted_adapter", "peft.ties + svd_lowrank", "peft.ties, dense"
# PERFORMANCE targets: (combination type, adapters, shape) -> times as fast as PEFT.
CASES = (
    ("ties_svd", 2, (4096, 4096), 150),
    ("ties_svd", 4, (4096, 4096), 80),
    ("ties_svd", 8, (4096, 4096), 50),
    ("ties_svd", 4, (11008, 4096), 80),
    ("dare_ties_svd", 4, (4096, 4096), 70),
)


def cases(quick: bool) -> list[Case]:
    """Single layers on one core, RegMean on all."""
    shapes = [("ties_svd", 4, (768, 768), None), ("dare_ties_svd", 2, (768, 512), None)]
    out = [_layer_case(*c, quick) for c in (shapes if quick else CASES)]
    out += [_dense_case(n, (768, 768) if quick else (4096, 4096), quick) for n in (2, 4, 8)]
    return [*out, _regmean_case(4 if quick else 32, quick)]


def _layer_case(kind: str, count: int, shape: Any, target: float | None, quick: bool) -> Case:
    once = "single run, not warmed up"
    variants = [
        Variant(OURS, note="mpf.merge from files in the page cache, CPU time of all threads"),
        Variant(SVD, "peft", Target(target) if target else None, most=1,
                note=f"as released: full_matrices=True; {once}"),
    ]  # fmt: skip
    if kind == "ties_svd":
        variants.append(
            Variant(LOWRANK, "peft", Target(20) if target else None, most=1,
                    note=f"torch.svd_lowrank(q={2 * RANK}, niter=4) of peft's dense TIES; {once}")
        )  # fmt: skip
    name = f"{kind}, {count} adapters, one {shape[0]}x{shape[1]} layer, r=16, density {DENSITY}"
    return Case("operators", name, 1, "process_cpu", 3 if quick else 5, tuple(variants),
                partial(_layer, kind, count, shape, quick))  # fmt: skip


@contextmanager
def _layer(kind: str, count: int, shape: tuple[int, int], quick: bool) -> Iterator[Work]:
    from peft.utils.merge_utils import ties

    shapes = {LAYER: shape}
    with temporary_folder() as root:
        write_zoo(root, count, shapes, RANK)
        zoo = mpf.open_zoo(root)
        members = list(adapters(count, shapes, RANK))
        weights = [1.0] * count
        peak: dict[str, int] = {}

        def watched(name: str, run: Any) -> Any:
            with peak_growth() as growth:
                result = run()
            peak[name] = growth.bytes
            return result

        def ours() -> Any:
            method = kind.removesuffix("_svd")
            return mpf.merge(zoo, method, weights, RANK, density=DENSITY, threads=1)

        def dense() -> torch.Tensor:
            deltas = [ALPHA_OVER_R * (f[LAYER][1] @ f[LAYER][0]) for f in members]
            return ties(deltas, torch.tensor(weights), DENSITY)

        def lowrank() -> tuple[torch.Tensor, torch.Tensor]:
            u, s, v = torch.svd_lowrank(dense(), q=2 * RANK, niter=4)
            return u[:, :RANK] * s[:RANK], v[:, :RANK].T

        ours()  # what is imported on the first call is not the merge's memory
        watched(OURS, ours)
        model = peft_model(members, shape)
        run = {
            OURS: ours,
            SVD: lambda: watched(
                SVD, lambda: peft_merge(model, weights, kind, density=DENSITY)
            ),
        }
        if kind == "ties_svd":
            run[LOWRANK] = lambda: watched(LOWRANK, lowrank)

        def finish(results, medians) -> list[Fact]:
            (module,) = results[OURS].modules
            facts = []
            if kind == "ties_svd":
                truth = dense().double()
                error = {
                    name: float((truth - b.double() @ a.double()).norm())
                    for name, (b, a) in {
                        OURS: (torch.from_numpy(module.b), torch.from_numpy(module.a)),
                        **{n: results[n] for n in run if n != OURS},
                    }.items()
                }
                # PEFT's is an SVD in float32: exact to 1e-7 of the error.
                for name in (OURS, LOWRANK):
                    excess = error[name] / error[SVD] - 1
                    bound = Target(1e-5, False) if name == OURS else None
                    facts.append(Fact(f"error above the exact SVD's, {name}", excess, "1", bound,
                                      peer=OURS if name == OURS else "peft"))  # fmt: skip
                assert error[OURS] <= error[SVD] * (1 + 1e-3)
            for name, grown in peak.items():
                ratio = grown / max(1, peak[OURS])
                facts.append(Fact(f"peak memory above the start, {name}", grown / 1e6, "MB",
                                  peer=OURS if name == OURS else "peft",
                                  note="" if name == OURS else f"{ratio:.0f} x ours"))  # fmt: skip
            bound = None if quick else Target(100)
            facts.append(Fact("peak memory, PEFT over ours", peak[SVD] / max(1, peak[OURS]), "1",
                              bound, peer="peft"))  # fmt: skip
            return facts

        yield Work(run, finish)


def _dense_case(count: int, shape: tuple[int, int], quick: bool) -> Case:
    target = None if quick else Target(35)
    variants = (
        Variant(OURS, note="thresholds and ops.merge_dense, factors in memory"),
        Variant(DENSE, "peft", target, most=1,
                note="merge_utils.ties on materialised deltas; single run, not warmed up"),
    )  # fmt: skip
    name = f"dense TIES, {count} adapters, {shape[0]}x{shape[1]}, r=16, density {DENSITY}"
    return Case("operators", name, 1, "process_cpu", 5, variants, partial(_dense, count, shape))


@contextmanager
def _dense(count: int, shape: tuple[int, int]) -> Iterator[Work]:
    from peft.utils.merge_utils import ties

    members = list(adapters(count, {LAYER: shape}, RANK))
    factors = [(f[LAYER][1], f[LAYER][0], ALPHA_OVER_R) for f in members]
    weights = [1.0] * count

    def ours() -> np.ndarray:
        deltas = Deltas.of(factors)
        low = magnitude_thresholds(deltas, DENSITY, threads=1)
        rule = ElementwiseRule(keep="magnitude", combine="ties", low=low, divide="count")
        return merge_dense(deltas, weights, rule, threads=1)

    def theirs() -> torch.Tensor:
        return ties([s * (b @ a) for b, a, s in factors], torch.tensor(weights), DENSITY)

    def finish(results, medians) -> list[Fact]:
        mine, peft = torch.from_numpy(results[OURS]), results[DENSE]
        size = float(peft.abs().max())
        other = float(((mine - peft).abs() > 1e-5 * size).double().mean())
        assert other < 1e-4, f"{other:.1e} of the entries differ"
        return [Fact("share of entries that differ from PEFT's", other, "1", Target(1e-6, False))]

    yield Work({OURS: ours, DENSE: theirs}, finish)


def _regmean_case(layers: int, quick: bool) -> Case:
    target = None if quick else Target(60, False)
    note = "mergeprobe-fast merge --method regmean, files to files, interpreter start included"
    variants = (Variant(OURS, time_target=target, note=note),)
    name = f"regmean, 8 adapters, {7 * layers} modules of 7B size, r=16, 256 samples a domain"
    return Case("operators", name, 2, "wall", 1 if quick else 3, variants,
                partial(_regmean, layers))  # fmt: skip


@contextmanager
def _regmean(layers: int) -> Iterator[Work]:
    shapes = llama_7b(layers)
    domains = [f"d{i}" for i in range(8)]
    with temporary_folder() as root:
        paths = write_zoo(root / "zoo", 8, shapes, RANK, torch.bfloat16)
        for path, domain in zip(paths, domains, strict=True):
            path.rename(path.with_name(domain))
        paths = [p.with_name(d) for p, d in zip(paths, domains, strict=True)]
        write_calibration(root / "cal", shapes, domains, 256)
        out = root / "merged"
        command = [sys.executable, "-m", "mergeprobe_fast", "merge", *paths, "--method", "regmean",
                   "--calibration", root / "cal", "--rank", RANK, "--out", out, "--overwrite",
                   "--json"]  # fmt: skip

        def finish(results, medians) -> list[Fact]:
            done = results[OURS]
            report = json.loads(done.stdout)
            assert len(report["modules"]) == len(shapes)
            calibration = sum(f.stat().st_size for f in Path(root / "cal").iterdir())
            return [
                Fact("peak RSS", done.peak_rss / 1e6, "MB", Target(2000, False)),
                Fact("adapters", size_of(paths) / 1e6, "MB"),
                Fact("calibration", calibration / 1e6, "MB"),
                Fact("CPU time, both cores", done.cpu, "s"),
            ]

        yield Work({OURS: lambda: timed_process(command)}, finish)
