"""Elementwise and svd merges of one layer on a CUDA device against PEFT's on the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import device
import numpy as np
import torch
from cases import CORE, OURS, Case, Fact, Target, Variant, Work
from data import adapters

from mergeprobe_fast import ops
from mergeprobe_fast.kernels.device import Device
from mergeprobe_fast.kernels.merge_tiles import merge_dense
from mergeprobe_fast.kernels.order_statistics import magnitude_thresholds
from mergeprobe_fast.ops import Deltas, ElementwiseRule

DENSITY, SCALE, RANK = 0.3, 0.5, 16
COPY = "a large copy on the device"
PEFT = "materialised, peft, torch.linalg.svd"
TARGETS = {"ties_svd": 20.0, "svd": 200.0}  # against PEFT on the same device


def cases(quick: bool) -> list[Case]:
    """TIES of 2 and 4 adapters into base weights; TIES and the plain sum to rank 16."""
    width = 4096 if not quick else 48 if device.INTERPRETED else 512
    out = [_ties_case(n, width) for n in (2, 4)]
    return [*out, *(_cut_case(method, 4, width) for method in TARGETS)]


def _ties_case(count: int, width: int) -> Case:
    variants = (
        Variant(OURS, note="thresholds found, TIES, added to bf16 weights"),
        Variant("thresholds alone", compare=False),
        Variant("merge alone", compare=False),
        Variant(COPY, CORE, compare=False),
        Variant("materialised, kthvalue, peft.ties", "peft", most=3),
    )
    name = f"TIES of {count} into {width}x{width} bf16 weights, r=16, density {DENSITY}"
    return Case("device_merge", name, 1, "events", 5, variants, partial(_ties, count, width))


@contextmanager
def _ties(count: int, width: int) -> Iterator[Work]:
    generator = torch.Generator(device.WHERE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device.WHERE)

    factors = [(draw(width, 16) / 10, draw(16, width) / width**0.5, SCALE) for _ in range(count)]
    base = draw(width, width).bfloat16()
    weights = [1.0] * count

    def ours() -> torch.Tensor:
        rule = _rule(magnitude_thresholds(factors, DENSITY))
        return merge_dense(factors, weights, rule, base=base, out=out)

    out, found = torch.empty_like(base), magnitude_thresholds(factors, DENSITY)

    def peft() -> torch.Tensor:
        from peft.utils.merge_utils import ties

        deltas = [s * (b @ a) for b, a, s in factors]
        merged = ties(deltas, torch.ones(count, device=device.WHERE), DENSITY)
        return (base.float() + merged).bfloat16()

    run = {
        OURS: ours,
        "thresholds alone": lambda: magnitude_thresholds(factors, DENSITY),
        "merge alone": lambda: merge_dense(factors, weights, _rule(found), base=base, out=out),
        COPY: device.copy(),
        "materialised, kthvalue, peft.ties": peft,
    }

    def finish(results, medians) -> list[Fact]:
        mine, theirs = results[OURS].float(), results["materialised, kthvalue, peft.ties"].float()
        other = float((mine != theirs).double().mean())
        # The interpreter cuts bf16 off where the device rounds.
        limit = 0.5 if device.INTERPRETED else 2e-3
        assert other < limit, f"{other:.1e} of the entries differ"
        flops = 2.0 * 16 * count * width * width
        copied = 2.0 * device.COPIED / medians[COPY]
        return [
            Fact("bandwidth over that of the copy", 4.0 * width**2 / medians[OURS] / copied, "1",
                 Target(0.6), note="bf16 weights read and written once"),
            Fact("entries that differ from PEFT's", other, "1",
                 note="thresholds of sums in another order, roundings to bf16"),
            Fact("flops of rebuilding the entries once", flops / medians["merge alone"] / 1e12,
                 "TF/s"),
        ]  # fmt: skip

    yield Work({name: device.timed(call) for name, call in run.items()}, finish)


def _cut_case(method: str, count: int, width: int) -> Case:
    variants = (
        Variant(OURS, note="factors in host memory to factors in host memory, on the device"),
        *((Variant("on the CPU", OURS, compare=False),) if method == "svd" else ()),
        Variant(PEFT, "peft", Target(TARGETS[method]), most=2, note="on the device throughout"),
    )
    name = f"{method} of {count} adapters, one {width}x{width} layer, r={RANK} to rank {RANK}"
    return Case("device_merge", name, 1, "wall", 5, variants,
                partial(_cut, method, count, width))  # fmt: skip


@contextmanager
def _cut(method: str, count: int, width: int) -> Iterator[Work]:
    made = [
        (b.numpy(), a.numpy(), SCALE)
        for a, b in (f["m"] for f in adapters(count, {"m": (width, width)}, RANK))
    ]
    gpu = Device()
    weights = [1.0 / count] * count if method == "svd" else [1.0] * count

    def cut(factors: list, backend: str) -> tuple[np.ndarray, np.ndarray]:
        form = ops.canonical([(b, a, SCALE / count) for b, a in factors], max_rank=RANK,
                             backend=backend)  # fmt: skip
        k = form.rank
        return (form.left[:k].T * form.sigma[:k]).astype(np.float32), form.right[:k]

    def ours() -> tuple[np.ndarray, np.ndarray]:
        if method == "svd":
            return cut([tuple(torch.from_numpy(x).to(device.WHERE) for x in f[:2]) for f in made],
                       backend="triton")  # fmt: skip
        host, there = Deltas.of(made), gpu.deltas([((b, "F32"), (a, "F32"), s) for b, a, s in made])
        deltas = Deltas(host.segments, width, width, host, there)
        rule = _rule(ops.magnitude_thresholds(deltas, DENSITY))
        found = ops.merge_low_rank(deltas, weights, rule, RANK)
        return found.b, found.a

    def peft() -> tuple[torch.Tensor, torch.Tensor]:
        from peft.utils.merge_utils import task_arithmetic, ties

        factors = [[torch.from_numpy(x).to(device.WHERE) for x in f[:2]] for f in made]
        deltas = [SCALE * (b @ a) for b, a in factors]
        w = torch.tensor(weights, device=device.WHERE)
        merged = ties(deltas, w, DENSITY) if method == "ties_svd" else task_arithmetic(deltas, w)
        u, s, v = torch.linalg.svd(merged)
        return (u[:, :RANK] * s[:RANK]).cpu(), v[:RANK].cpu()

    def finish(results, medians) -> list[Fact]:
        (b, a), (d, c) = ([np.asarray(x) for x in results[n]] for n in (OURS, PEFT))
        x = made[0][1].T  # what the merged update does to some inputs
        one, two = b @ (a @ x), d @ (c @ x)
        off = float(np.linalg.norm(one - two) / np.linalg.norm(two))
        assert off < 1e-2, f"{off:.1e} of the merged update"
        return [Fact("difference from PEFT's", off, "of the norm")]

    run = {OURS: device.walled(ours), PEFT: device.walled(peft)}
    if method == "svd":
        run["on the CPU"] = device.walled(lambda: cut([f[:2] for f in made], "cpu"))
    yield Work(run, finish)


def _rule(low: object) -> ElementwiseRule:
    return ElementwiseRule(keep="magnitude", low=low, combine="ties", divide="count")
