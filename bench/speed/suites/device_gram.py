"""The block Gram on a CUDA device against cuBLAS, torch formulations and quack; whole zoos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import device
import numpy as np
import torch
from cases import CORE, OURS, Case, Fact, Target, Variant, Work
from harness import SelfTimed

from mergeprobe_fast import kernels

COSINE_ERROR = {"bf16": 5e-7, "tf32": 2e-4, "3 x tf32": 5e-7}
PRODUCT = f"cuBLAS product {device.LARGE}^3"
TILE = 4096  # rows of a tile of the torch formulation
LLAMA_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}


def cases(quick: bool) -> list[Case]:
    """One module of each kind of product; the zoo of a 7B model, resident and streamed."""
    few, rank, width = (1000, 16, 4096)
    if quick:
        few, rank, width = (6, 4, 48) if device.INTERPRETED else (50, 8, 512)
    out = [_module_case(few, rank, width, kind) for kind in COSINE_ERROR]
    if not quick:
        out += [_module_case(200, 16, 4096, "bf16"), _module_case(1000, 4, 4096, "bf16"),
                _module_case(250, 64, 4096, "bf16")]  # fmt: skip
    return [*out, _zoo_case(*((2, 2, 2) if quick else (1000, 16, 224)))]


def _flops(rows: int, columns: int) -> float:
    return float(rows) * (rows + 1) * columns


def _module_case(count: int, rank: int, width: int, kind: str) -> Case:
    work = _flops(count * rank, 2 * width)
    variants = [
        Variant(OURS, work=work, note="kernels.block_gram"),
        Variant(PRODUCT, CORE, Target(0.6), work=2.0 * device.LARGE**3,
                note="of the same type; aim 0.75"),
        Variant("torch.mm R x R, reduced", "torch", Target(1.5) if kind == "bf16" else None,
                work=work),
        Variant(f"torch tiles of {TILE}, reduced", "torch",
                Target(1.5) if kind == "bf16" else None, work=work),
    ]  # fmt: skip
    if kind == "bf16" and _quack() is not None:
        variants.append(Variant("quack gemm_symmetric twice, reduced", "quack", Target(1.2),
                                work=work))  # fmt: skip
    name = f"N={count} r={rank} {width}+{width} {kind}"
    prepare = partial(_module, count, rank, width, kind, {v.name for v in variants})
    return Case("device_gram", name, 1, "events", 5, tuple(variants), prepare)


def _quack() -> Any:
    try:
        from quack.gemm_interface import gemm_symmetric
    except ImportError:
        return None
    return gemm_symmetric


@contextmanager
def _module(count: int, rank: int, width: int, kind: str, wanted: set[str]) -> Iterator[Work]:
    generator = torch.Generator(device.WHERE).manual_seed(0)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    u, v = (
        torch.randn(count * rank, width, generator=generator, device=device.WHERE).to(dtype)
        for _ in range(2)
    )
    offsets = torch.arange(0, count * rank + 1, rank)
    precision = "high" if kind == "tf32" else "highest"
    device.allow_tf32(kind == "tf32")

    def reduced(m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        rows, columns = len(m) // rank, m.shape[1] // rank
        return (m * n).view(rows, rank, columns, rank).sum((1, 3), dtype=torch.float32)

    def tiles() -> torch.Tensor:
        out = torch.empty(count, count, device=device.WHERE)
        step = TILE // rank
        for i in range(0, count, step):
            for j in range(i, count, step):
                a, b = (slice(rank * x, rank * (x + step)) for x in (i, j))
                part = reduced(u[a] @ u[b].T, v[a] @ v[b].T)
                out[i : i + step, j : j + step] = part
                out[j : j + step, i : i + step] = part.T
        return out

    run = {
        OURS: lambda: kernels.block_gram(u, v, offsets, precision=precision),
        PRODUCT: device.product(dtype, tf32=kind == "tf32"),
        "torch.mm R x R, reduced": lambda: reduced(u @ u.T, v @ v.T),
        f"torch tiles of {TILE}, reduced": tiles,
    }
    if "quack gemm_symmetric twice, reduced" in wanted:
        symmetric = _quack()
        run["quack gemm_symmetric twice, reduced"] = lambda: reduced(
            symmetric(u, u.T), symmetric(v, v.T)
        )

    def finish(results, medians) -> list[Fact]:
        few = min(count, 100)
        a, b = u[: few * rank].double(), v[: few * rank].double()
        exact = (a @ a.T * (b @ b.T)).view(few, rank, few, rank).sum((1, 3))
        length = exact.diagonal().sqrt()
        outer = length[:, None] * length
        got = results[OURS][:few, :few]
        own = got.diagonal().sqrt()
        error = float((got / (own[:, None] * own) - exact / outer).abs().max())
        assert error < 20 * COSINE_ERROR[kind], f"cosine error {error:.1e}"
        again = kernels.block_gram(u, v, offsets, precision=precision)
        assert torch.equal(again, results[OURS]), "two runs differ"
        bytes_read = 2 * u.numel() * u.element_size() + results[OURS].numel() * 8
        flops = _flops(count * rank, 2 * width)
        return [
            Fact("largest cosine error", error, "1", Target(COSINE_ERROR[kind], False),
                 note="against float64, on the first adapters"),
            Fact("necessary flops over compulsory bytes", flops / bytes_read, "flop/B"),
        ]  # fmt: skip

    yield Work({name: device.timed(call) for name, call in run.items()}, finish)


STREAMED, COPIED = "the same, factors streamed from page-locked memory", "the copies alone"


def _zoo_case(count: int, rank: int, modules: int) -> Case:
    work = _zoo_flops(count, rank, modules)
    variants = (
        Variant(OURS, time_target=Target(3.0, at_least=False) if count == 1000 else None,
                work=work, note="factors on the device; one launch for eight modules"),
        Variant(STREAMED, compare=False, work=work),
        Variant(COPIED, CORE, compare=False),
        Variant(PRODUCT, CORE, work=2.0 * device.LARGE**3, note="bf16"),
    )  # fmt: skip
    name = f"{count} adapters, {modules} modules of a 7B model, r={rank}, bf16, inner products"
    return Case("device_gram", name, 1, "events", 3, variants,
                partial(_zoo, count, rank, modules))  # fmt: skip


def _shapes(modules: int) -> list[tuple[int, int]]:
    """Those of a 7B model, in turns."""
    order = [s for s, n in LLAMA_7B.items() for _ in range(n)]
    return [order[i * len(order) // modules] for i in range(modules)]


def _zoo_flops(count: int, rank: int, modules: int) -> float:
    return sum(_flops(count * rank, p + q) for p, q in _shapes(modules))


@contextmanager
def _zoo(count: int, rank: int, modules: int) -> Iterator[Work]:
    rows, each = count * rank, 8
    shapes = _shapes(modules)
    most = max(p for s in shapes for p in s)
    generator = torch.Generator(device.WHERE).manual_seed(0)
    # Larger than the caches; which numbers a module has does not change the time.
    pool = torch.randn(2 * rows * most, generator=generator, device=device.WHERE).bfloat16()
    bounds = list(range(0, rows + 1, rank))

    def batch(chosen: list[tuple[int, int]], u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        stack = kernels.Rows(
            u, v, [0] * len(chosen), [0] * len(chosen), [p for p, _ in chosen],
            [q for _, q in chosen], [bounds] * len(chosen),
        )  # fmt: skip
        p, q = zip(*chosen, strict=True)
        return kernels.gram_pass(stack, None, list(p), list(q), [(0, -1, -1)])

    batches = [shapes[i : i + each] for i in range(0, modules, each)]
    half = rows * most

    def resident() -> torch.Tensor:
        total = torch.zeros(count * count, dtype=torch.float64, device=device.WHERE)
        for chosen in batches:
            total += batch(chosen, pool[:half], pool[half:])[0].view(len(chosen), -1).sum(0)
        return total

    pinned = not device.INTERPRETED
    host = torch.empty(2 * rows * most, dtype=torch.bfloat16, pin_memory=pinned)
    host.copy_(pool)
    landing = [torch.empty_like(pool) for _ in range(2)]
    copies = device.Copies()

    def streamed(compute: bool = True) -> SelfTimed:
        begin, end, last = device.Event(), device.Event(), device.Event()
        free = [device.Event(), device.Event()]
        total = torch.zeros(count * count, dtype=torch.float64, device=device.WHERE)
        begin.record()
        for i, (p, q) in enumerate(shapes):
            there, arrived = landing[i % 2], device.Event()
            with copies.stream():
                (free[i % 2] if i > 1 else begin).wait()
                there[: rows * p].copy_(host[: rows * p], non_blocking=True)
                there[half : half + rows * q].copy_(host[half : half + rows * q],
                                                    non_blocking=True)  # fmt: skip
                arrived.record()
                last.record()
            if compute:
                arrived.wait()
                total += batch([(p, q)], there[:half], there[half:])[0]
            free[i % 2].record()
        last.wait()
        end.record()
        return SelfTimed(begin.seconds_until(end), total)

    def finish(results, medians) -> list[Fact]:
        same = float((results[OURS] - results[STREAMED]).abs().max() / results[OURS].abs().max())
        assert same < 1e-12, f"streamed and resident differ by {same:.1e}"
        assert np.isfinite(float(results[OURS].sum()))
        moved = sum(rows * (p + q) * 2 for p, q in shapes)
        hidden = max(medians[OURS], medians[COPIED]) / medians[STREAMED]
        return [
            Fact("overlap: the longer of copies and kernels over both", hidden, "1"),
            Fact("rate of the copies", moved / medians[COPIED] / 1e9, "GB/s"),
        ]

    yield Work({
        OURS: device.timed(resident, 1), STREAMED: streamed, COPIED: lambda: streamed(False),
        PRODUCT: device.timed(device.product(torch.bfloat16)),
    }, finish)  # fmt: skip
