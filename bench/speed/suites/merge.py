"""Merging: one layer against PEFT and a thin SVD, and a whole 7B-size model through the shell."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import OURS, Case, Fact, Target, Variant, Work
from data import ALPHA_OVER_R, Factors, adapters, llama_7b, size_of, temporary_folder, write_zoo
from harness import peak_growth, timed_process
from safetensors.torch import load_file

import mergeprobe_fast as mpf
from mergeprobe_fast import ops
from mergeprobe_fast.ops import reference

OPERATOR, PEFT, THIN = "ops.canonical, factors in memory", "add_weighted_adapter svd", "thin SVD"
PEERS = {OURS: OURS, PEFT: "peft", THIN: "torch"}
RANK, COUNT = 16, 4
LAYER = "layers.0.proj"


def cases(quick: bool) -> list[Case]:
    """Single layers on one core, the whole model on all."""
    shapes = ((1024, 1024),) if quick else ((4096, 4096), (11008, 4096))
    out = [_layer_case(shape, quick) for shape in shapes]
    layers = 4 if quick else 32
    variants = (Variant(OURS, time_target=Target(6, False), note="mergeprobe-fast merge, files to "
                        "files, interpreter start included"),)  # fmt: skip
    name = f"{COUNT} adapters of {'4 blocks of a' if quick else 'a whole'} 7B model, r=16, bf16"
    return [
        *out,
        Case("merge", name, 2, "wall", 1 if quick else 5, variants, lambda: _whole(layers)),
    ]


def _layer_case(shape: tuple[int, int], quick: bool) -> Case:
    once = "single run, not warmed up"
    target = None if quick else Target(2000)
    variants = (
        Variant(OURS, note="mpf.merge from files in the page cache, CPU time of all threads"),
        Variant(OPERATOR),
        Variant(PEFT, "peft", target, most=1, note=f"as released: full_matrices=True; {once}"),
        Variant(THIN, "torch", most=1, note=f"of the sum, materialised in the call; {once}"),
    )
    name = f"svd, {COUNT} adapters, one {shape[0]}x{shape[1]} layer, r=16"
    return Case("merge", name, 1, "process_cpu", 11, variants, lambda: _layer(shape))


@contextmanager
def _layer(shape: tuple[int, int]) -> Iterator[Work]:
    shapes = {LAYER: shape}
    with temporary_folder() as root:
        write_zoo(root, COUNT, shapes, RANK)
        zoo = mpf.open_zoo(root)
        members = list(adapters(COUNT, shapes, RANK))
        weights = [1.0 / COUNT] * COUNT
        factors = [(f[LAYER][1], f[LAYER][0], ALPHA_OVER_R / COUNT) for f in members]
        peak: dict[str, int] = {}

        def ours() -> Any:
            return mpf.merge(zoo, "svd", rank=RANK, threads=1)

        def watched(name: str, run: Any) -> Any:
            with peak_growth() as growth:
                result = run()
            peak[name] = growth.bytes
            return result

        def thin() -> tuple[torch.Tensor, torch.Tensor]:
            total = sum(s * (b @ a) for b, a, s in factors)
            u, s, vh = torch.linalg.svd(total, full_matrices=False)
            return u[:, :RANK] * s[:RANK], vh[:RANK]

        watched(OURS, ours)
        model = peft_model(members, shape)
        run = {
            OURS: ours,
            OPERATOR: lambda: ops.canonical(factors, max_rank=RANK),
            PEFT: lambda: watched(PEFT, lambda: peft_merge(model, weights)),
            THIN: lambda: watched(THIN, thin),
        }

        def finish(results, medians) -> list[Fact]:
            (module,) = results[OURS].modules
            mine = torch.from_numpy(module.b), torch.from_numpy(module.a)
            form = results[OPERATOR]
            others = {
                OPERATOR: _torch(form.left.T * form.sigma[:RANK], form.right),
                **{n: results[n] for n in run if n not in (OURS, OPERATOR)},
            }
            exact = reference.canonical(factors, max_rank=RANK)
            true = _torch(exact.left.T * exact.sigma[:RANK], exact.right)
            error = _difference(mine, true)
            assert error < 1e-6, f"{error:.1e} from float64"
            facts = [Fact("difference from float64", error, "1")]
            for name, other in others.items():
                difference = _difference(mine, other)
                assert difference < 1e-3, f"{name}: {difference:.1e} from ours"
                target = Target(1e-4, False) if name == PEFT else None
                facts.append(Fact(f"difference from {name}", difference, "1", target))
            for name, grown in peak.items():
                ratio = f"{grown / max(1, peak[OURS]):.0f} x ours" if name != OURS else ""
                facts.append(Fact(f"peak memory above the start, {name}", grown / 1e6, "MB",
                                  peer=PEERS[name], note=ratio))  # fmt: skip
            return facts

        yield Work(run, finish)


def peft_model(members: list[Factors], shape: tuple[int, int]) -> Any:
    """A model of one layer with these adapters, called a0, a1, ..."""
    from peft import LoraConfig, get_peft_model

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(shape[1], shape[0], bias=False)

    config = LoraConfig(r=RANK, lora_alpha=RANK * ALPHA_OVER_R, target_modules=["proj"])
    model = get_peft_model(Block(), config, adapter_name="a0")
    for i in range(1, len(members)):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model.proj
    with torch.no_grad():
        for i, f in enumerate(members):
            layer.lora_A[f"a{i}"].weight.copy_(f[LAYER][0])
            layer.lora_B[f"a{i}"].weight.copy_(f[LAYER][1])
    return model


def peft_merge(
    model: Any, weights: list[float], kind: str = "svd", **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's own merge of all its adapters to rank ``RANK``: B with the scale, and A."""
    names = [f"a{i}" for i in range(len(weights))]
    with torch.no_grad():
        model.add_weighted_adapter(names, weights, "merged", kind, svd_rank=RANK, **options)
    layer = model.base_model.model.proj
    return layer.scaling["merged"] * layer.lora_B["merged"].weight, layer.lora_A["merged"].weight


def _torch(b: np.ndarray, a: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.ascontiguousarray(b)), torch.from_numpy(np.ascontiguousarray(a))


def _difference(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """||B1 A1 - B2 A2||_F / ||B1 A1||_F, from the factors: QR of both sides, no cancellation."""
    b = torch.cat([one[0].double(), -two[0].double()], dim=1)
    a = torch.cat([one[1].double(), two[1].double()])
    r_b, r_a = torch.linalg.qr(b)[1], torch.linalg.qr(a.T)[1]
    k = one[0].shape[1]
    return float((r_b @ r_a.T).norm() / (r_b[:, :k] @ r_a[:, :k].T).norm())


@contextmanager
def _whole(layers: int) -> Iterator[Work]:
    shapes = llama_7b(layers)
    with temporary_folder() as root:
        paths = write_zoo(root / "zoo", COUNT, shapes, RANK, torch.bfloat16)
        out = root / "merged"
        command = [sys.executable, "-m", "mergeprobe_fast", "merge", *paths, "--method", "svd",
                   "--rank", RANK, "--out", out, "--overwrite", "--json"]  # fmt: skip

        def finish(results, medians) -> list[Fact]:
            done = results[OURS]
            report = json.loads(done.stdout)
            difference = _verify(out, paths, next(iter(shapes)))
            kept = report["total"]["energy_kept"]
            return [
                Fact("peak RSS", done.peak_rss / 1e6, "MB", Target(1000, False)),
                Fact("input files", size_of(paths) / 1e6, "MB"),
                Fact("CPU time, both cores", done.cpu, "s"),
                Fact("difference of one module from float64", difference, "1",
                     note=f"bf16 files; the rank keeps {kept:.2f} of the energy"),
            ]  # fmt: skip

        yield Work({OURS: lambda: timed_process(command)}, finish)


def _verify(out: Path, paths: list[Path], module: str) -> float:
    """One module of the merged file against the exact truncation of its inputs."""

    def factors(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = load_file(folder / "adapter_model.safetensors")
        key = f"base_model.model.{module}.lora_"
        return tensors[f"{key}B.weight"], tensors[f"{key}A.weight"]

    config = json.loads((out / "adapter_config.json").read_text())
    b, a = factors(out)
    merged = b * (config["lora_alpha"] / config["r"]), a
    exact = reference.canonical(
        [(*factors(p), ALPHA_OVER_R / COUNT) for p in paths], max_rank=RANK
    )  # fmt: skip
    true = _torch(exact.left.T * exact.sigma[:RANK], exact.right)
    difference = _difference(merged, true)
    # Rounding both factors to bf16 (2^-9 each) is all that may differ.
    assert difference < 1e-2, f"{module}: {difference:.1e}"
    return difference
