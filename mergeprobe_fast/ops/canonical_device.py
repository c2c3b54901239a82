"""P3 on a CUDA device: checks, and the batch of one that a sum of deltas is."""

from __future__ import annotations

import math
from typing import Any

from mergeprobe_fast.errors import BackendError, InputError
from mergeprobe_fast.ops.reference import Canonical


def canonical_on_device(
    factors: Any, relative: float, noise: float, max_rank: int | None
) -> Canonical:
    """As ``ops.canonical``, where the torch tensors lie; the result comes to the host."""
    try:
        import torch

        from mergeprobe_fast.kernels.canonical import canonical_batch
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"backend 'triton' is not available: {error}") from error
    checked = _checked(factors)
    scale = [s for *_, s in checked]
    # One entry: the rows of all, scales in those of B, float64 where there is something to bake in.
    plain = len(checked) == 1
    rows_u = [b.T if plain else b.T.double() * s for b, _, s in checked]
    rows_v = [a if plain else a.double() for _, a, _ in checked]
    found = canonical_batch(
        [torch.cat(rows_u)], [torch.cat(rows_v)], scale=scale if plain else None,
        relative=relative, noise=noise, dtype=torch.float64,
    )  # fmt: skip
    failed = found.first_failure()
    if failed is not None:
        for i, (b, a, _) in enumerate(checked):
            for name, x in (("B", b), ("A", a)):
                if not bool(x.isfinite().all()):
                    raise InputError(f"{name} holds NaN or infinite values", key=f"factors[{i}]")
        raise InputError(failed[1], key="factors")
    (d_out, _), (_, d_in) = checked[0][0].shape, checked[0][1].shape
    rank = int(found.rank[0])
    kept = rank if max_rank is None else min(rank, max_rank)
    left, right = (
        found.view(0, side)[:kept, :d].cpu().numpy() for side, d in (("u", d_out), ("v", d_in))
    )
    full = min(sum(len(a) for _, a, _ in checked), d_out, d_in)
    return Canonical(left, found.sigma[0, :full].cpu().numpy(), right, kept)


def _checked(factors: Any) -> list[tuple[Any, Any, float]]:
    if not factors:
        raise InputError("expected at least one (B, A, scale)", key="factors")
    checked: list[tuple[Any, Any, float]] = []
    for i, item in enumerate(factors):
        key = f"factors[{i}]"
        try:
            b, a, scale = item
            b, a, scale = b.detach(), a.detach(), float(scale)
        except (AttributeError, TypeError, ValueError):
            reason = "expected (B, A, scale), torch tensors and a number"
            raise InputError(reason, key=key) from None
        if not math.isfinite(scale):
            raise InputError(f"scale is {scale}", key=key)
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            shapes = f"B {tuple(b.shape)} and A {tuple(a.shape)}"
            raise InputError(f"{shapes} do not chain", key=key)
        if not (b.is_floating_point() and a.is_floating_point()):
            raise InputError(f"expected floats, got {b.dtype} and {a.dtype}", key=key)
        first = checked[0] if checked else (b, a, scale)
        want, got = ((x.shape[0], y.shape[1]) for x, y in (first[:2], (b, a)))
        if got != want:
            reason = f"delta is {got[0]} x {got[1]}, expected {want[0]} x {want[1]}"
            raise InputError(reason, key=key)
        if {b.device, a.device} != {first[0].device}:
            raise InputError(f"is not on {first[0].device}, where the first is", key=key)
        checked.append((b, a, scale))
    return checked
