"""Merges as plain values, here or in a child whose ``device="cuda"`` is Triton's interpreter.

The child's program is this file too (see triton_child.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from triton_child import child, serve

import mergeprobe_fast as mpf
from mergeprobe_fast.merging import add
from mergeprobe_fast.merging.activation import Metric
from mergeprobe_fast.merging.span import bordered_grams
from mergeprobe_fast.ops.device import open_device

COLUMNS = ("energy", "error", "average", "full")


def merge(paths: list[str], method: str, **options: Any) -> dict[str, Any]:
    """The modules of a merge, and with a calibration its output errors and inner products."""
    try:
        found = mpf.merge(paths, method, threads=2, **options)
        outputs: dict[str, Any] = {}
        if found.request.calibration is not None:
            errors = found.output_errors()
            outputs = {c: getattr(errors, c) for c in COLUMNS if getattr(errors, c) is not None}
            request = found.request
            grams = bordered_grams(found, request.calibration, request.domains, 2)
            outputs["products"] = np.concatenate(grams)
    except (mpf.InputError, mpf.BackendError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    modules = {
        m.module.name: {
            "delta": m.b.astype(np.float64) @ m.a, "rank": len(m.a), "before": m.rank_before,
            "norm": m.norm, "lost": m.truncation_error, "members": m.members,
            "details": {k: v for k, v in m.details.items() if k != "outputs"},
        }
        for m in found.modules
    }  # fmt: skip
    return {"modules": modules, "outputs": outputs}


def into(
    paths: list[str], base: str, out: str, method: str, sizes: tuple[int, int] | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The report of a merge into base weights; ``sizes``: entries of a block, and of a strip."""
    before = add._THERE, add._STRIP_THERE
    add._THERE, add._STRIP_THERE = sizes or before
    try:
        return mpf.merge_into(paths, base, out, method, threads=3, **options)
    except mpf.InputError as error:
        return {"error": str(error)}
    finally:
        add._THERE, add._STRIP_THERE = before


def solve(
    samples: np.ndarray, ridge: float, device: str, again: bool = False
) -> dict[str, Any]:
    """What a metric of these samples alone makes of zeros, and of one on the diagonal.

    ``again``: after it was asked, and refused, once before.
    """
    count, d = samples.shape
    metric = Metric(
        lambda g: samples.astype(np.float32), {"g": count}, {"g": np.ones(d)}, {"g": 1.0}, 1.0,
        ridge, open_device(device),
    )  # fmt: skip
    if again:
        with contextlib.suppress(mpf.InputError):
            metric.solve(np.zeros((1, count)), np.ones((1, d)))
    try:
        x, _ = metric.solve(np.zeros((1, count)), np.ones((1, d)))
    except mpf.InputError as error:
        return {"error": str(error)}
    return {"x": x}


def hashed(seed: int, stream: int, position: np.ndarray, device: str) -> np.ndarray:
    """The random bits of positions."""
    from mergeprobe_fast.kernels.disjoint import hashes
    from mergeprobe_fast.kernels.products import download, upload

    opened = open_device(device)
    return download(opened, hashes(seed, stream, upload(opened, position)))


def rounded(values: np.ndarray, dtype: str, device: str) -> np.ndarray:
    """float64 in the type of a base, as bits."""
    import torch

    from mergeprobe_fast.kernels.base_weights import _rounded
    from mergeprobe_fast.kernels.products import download, upload

    opened = open_device(device)
    made = _rounded(upload(opened, values), dtype)
    bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
    return download(opened, made.view(bits))


TASKS: dict[str, Callable[..., Any]] = {
    "merge": merge, "into": into, "hashed": hashed, "rounded": rounded, "solve": solve,
}  # fmt: skip


@contextlib.contextmanager
def there() -> Iterator[Callable[..., Any]]:
    """``call(task, *arguments, fault=None, **options)`` in the child, on its device."""
    with child(__file__) as ask:

        def call(task: str, *arguments: Any, fault: str | None = None, **options: Any) -> Any:
            return ask({"task": task, "arguments": arguments, "options": options, "fault": fault})

        yield call


def _faults() -> dict[str, tuple[Any, str, Any]]:
    """By name: where, and what is put there instead."""
    import torch

    from mergeprobe_fast.kernels import _canonical_torch, base_weights, factors, products

    cholesky, solve = _canonical_torch.cholesky, torch.linalg.solve_triangular
    wide, rounding = products._wide, base_weights._rounded

    def pivoted(gram: Any) -> Any:
        transform, coordinates, least = cholesky(gram)
        return transform * 1.00001, coordinates, least

    def inverse(*arguments: Any, **options: Any) -> Any:
        return 1.00001 * solve(*arguments, **options)

    canonical = factors.canonical_batch

    def batch(*arguments: Any, **options: Any) -> Any:
        made = canonical(*arguments, **options)
        made.rows.copy_(made.rows.float())
        return made

    def cut(x: Any, dtype: str) -> Any:
        near = rounding(x, dtype)
        return torch.where(near.double().abs() > x.abs(), 0.0 * near, near)

    svd = torch.linalg.svd

    def alone(core: Any) -> Any:
        if len(core) > 1:
            raise torch.linalg.LinAlgError("linalg.svd: (Batch element 0): it did not converge")
        return svd(core)

    def never(core: Any) -> Any:
        raise torch.linalg.LinAlgError("linalg.svd: (Batch element 0): it did not converge")

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return {
        "memory": (products, "upload_all", full), "in a thread": (products, "_wide", full),
        "svd of many": (torch.linalg, "svd", alone), "svd": (torch.linalg, "svd", never),
        "pivoted": (_canonical_torch, "cholesky", pivoted),
        "library": (torch.linalg, "solve_triangular", inverse),
        "short": (factors, "canonical_batch", batch),
        "products": (products, "_wide", lambda device, x: wide(device, x).float().double()),
        "rounding": (base_weights, "_rounded", cut),
    }


def _handle(request: dict[str, Any]) -> Any:
    planted = _faults().get(request["fault"] or "")
    options = {**request["options"], "device": "cuda"}
    if planted is None:
        return TASKS[request["task"]](*request["arguments"], **options)
    where, name, instead = planted
    sound = getattr(where, name)
    setattr(where, name, instead)
    try:
        return TASKS[request["task"]](*request["arguments"], **options)
    finally:
        setattr(where, name, sound)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    serve(_handle)
