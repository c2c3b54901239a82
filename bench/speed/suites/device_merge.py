"""Elementwise and svd merges of one layer on a CUDA device against PEFT's on the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import device
import torch
from cases import CORE, OURS, Case, Fact, Target, Variant, Work

from mergeprobe_fast.kernels.merge_tiles import merge_dense
from mergeprobe_fast.kernels.order_statistics import magnitude_thresholds
from mergeprobe_fast.ops import ElementwiseRule

DENSITY, SCALE = 0.3, 0.5


def cases(quick: bool) -> list[Case]:
    """TIES of 2 and 4 adapters into base weights."""
    width = 4096 if not quick else 48 if device.INTERPRETED else 512
    return [_ties_case(n, width) for n in (2, 4)]


def _ties_case(count: int, width: int) -> Case:
    size = float(width * width)
    moved = 4 * size  # bf16 weights read and written
    variants = (
        Variant(OURS, work=moved, note="thresholds found, TIES, added to bf16 weights in place"),
        Variant("thresholds alone", compare=False),
        Variant("merge alone", compare=False, work=moved),
        Variant("device copy of 1 GiB", CORE, Target(0.6), work=2.0 * (1 << 30)),
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
        "device copy of 1 GiB": device.copy(),
        "materialised, kthvalue, peft.ties": peft,
    }

    def finish(results, medians) -> list[Fact]:
        mine, theirs = results[OURS].float(), results["materialised, kthvalue, peft.ties"].float()
        other = float((mine != theirs).double().mean())
        # The interpreter cuts bf16 off where the device rounds.
        limit = 0.5 if device.INTERPRETED else 2e-3
        assert other < limit, f"{other:.1e} of the entries differ"
        flops = 2.0 * 16 * count * width * width
        return [
            Fact("entries that differ from PEFT's", other, "1",
                 note="thresholds of sums in another order, roundings to bf16"),
            Fact("flops of rebuilding the entries once", flops / medians["merge alone"] / 1e12,
                 "TF/s"),
        ]  # fmt: skip

    yield Work({name: device.timed(call) for name, call in run.items()}, finish)


def _rule(low: object) -> ElementwiseRule:
    return ElementwiseRule(keep="magnitude", low=low, combine="ties", divide="count")
