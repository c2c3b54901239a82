"""Probe runs for tests, written without torch, with the truth (full gradients) beside them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from adapters import DEFAULT_MODULES, MadeAdapter, make_adapter

from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.probe_json import (
    Clip,
    Initial,
    Loss,
    ProbeInfo,
    RunInfo,
    probe_to_json,
    run_to_json,
    snapshot_name,
)

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # module -> (A, B)
Gradients = Mapping[str, Sequence[np.ndarray]]  # module -> one (d_out, d_in) per step


@dataclass(frozen=True)
class MadeSnapshot:
    """A written snapshot and the truth: every step's full gradient, all at its own factors."""

    path: Path
    info: ProbeInfo
    adapter: MadeAdapter
    gradients: dict[str, list[np.ndarray]]  # float64 (d_out, d_in), one per step of the window

    def mean(self, module: str) -> np.ndarray:
        """Mean full gradient of the window, float64 (d_out, d_in)."""
        return np.mean(self.gradients[module], axis=0)


@dataclass(frozen=True)
class MadeRun:
    """A written run folder and its snapshots in the order of steps."""

    path: Path
    info: RunInfo
    snapshots: tuple[MadeSnapshot, ...]


def make_info(steps: int, modules: Sequence[str], **changes: Any) -> ProbeInfo:
    """The description of a plausible snapshot of a run of 100 steps."""
    info = ProbeInfo(
        run=None, base_model="test/base", adapter_name="default", fractions=(steps / 100,),
        steps=steps, total_steps=100, window=1, micro_batches=2.0, loss=Loss(2.5, 2.25, 1),
        learning_rate=1e-3, learning_rate_integral=1e-3 * steps, learning_rate_groups=None,
        clip=Clip(0.75, 0.5, 0.25), loss_scale=None, skipped_steps=0, optimizer="AdamW",
        dtype="F32", modules=tuple(modules), initial=None,
    )  # fmt: skip
    return replace(info, **changes)


def make_snapshot(
    folder: str | Path,
    factors: Factors,
    gradients: Gradients,
    *,
    steps: int = 10,
    alpha: float = 8,
    dtype: str = "F32",
    base_model: str | None = "test/base",
    kinds: Mapping[str, Any] | None = None,
    **changes: Any,
) -> MadeSnapshot:
    """Write a snapshot folder; ``changes`` are fields of ``ProbeInfo``.

    ``kinds`` are the ``embeddings`` and ``convs`` of ``make_adapter``.

    dA = s B^T G and dB = s G A^T of the stored factors, ``last`` of the last gradient, ``mean`` of
    all of them, rounded to float32.
    """
    adapter = make_adapter(
        folder, factors=factors, modules={n: (1, 1, 1) for n in factors}, alpha=alpha, dtype=dtype,
        base_model=base_model, **kinds or {},
    )  # fmt: skip
    window = len(next(iter(gradients.values())))
    changes = {"window": min(window, steps + 1), "dtype": dtype, "base_model": base_model} | changes
    info = make_info(steps, list(factors), **changes)
    tensors: dict[str, np.ndarray] = {}
    values: dict[str, list[float]] = {"euler_a": [], "euler_b": [], "visible_square": []}
    for name in info.modules:
        m, full = adapter.modules[name], np.asarray(gradients[name], np.float64)
        for which, g in (("last", full[-1]), ("mean", full.mean(0))):
            tensors[f"{which}.A.{name}"] = (m.scale * (m.b.T @ g)).astype(np.float32)
            tensors[f"{which}.B.{name}"] = (m.scale * (g @ m.a.T)).astype(np.float32)
        inner = [float((g * m.delta).sum()) for g in full]
        values["euler_a"].append(float(np.mean(inner)))
        values["euler_b"].append(float(np.mean(inner)))
        lengths = np.linalg.norm(m.a, axis=1, keepdims=True)
        rows = m.a / np.where(lengths > 0, lengths, 1.0)
        onto = np.linalg.pinv(rows, rcond=1e-6) @ rows
        values["visible_square"].append(float(np.mean([((g @ onto) ** 2).sum() for g in full])))
    tensors |= {key: np.array(v) for key, v in values.items()}
    path = Path(folder)
    safetensors.write(path / "gradients.safetensors", tensors)
    write_json(path / "probe.json", probe_to_json(info))
    return MadeSnapshot(
        path, info, adapter, {n: list(map(np.asarray, gradients[n])) for n in factors}
    )


def make_run(
    folder: str | Path,
    rng: np.random.Generator,
    modules: Mapping[str, tuple[int, int, int]] | None = None,
    *,
    steps: Sequence[int] = (5, 10),
    window: int = 3,
    rank: int | None = None,
    start: Factors | None = None,
    magnitude: float = 0.1,
    gradient: float = 1e-3,
    name: str | None = None,
    alter: Callable[[Factors], Factors] = lambda factors: factors,
    **arguments: Any,
) -> MadeRun:
    """Write a run whose snapshots lie along a random path; fraction = steps / 100.

    ``modules`` maps a path to (d_out, d_in, rank). A starts at ``start`` (default: random) and
    moves a little, B starts at zero and grows by ``magnitude``; ``gradient`` is the size of the
    entries of G. ``alter`` changes factors before they are written, other arguments go to
    ``make_snapshot``.
    """
    sizes = {n: (o, i, rank or r) for n, (o, i, r) in (modules or DEFAULT_MODULES).items()}
    first = {
        n: (rng.standard_normal((r, d_in)) / math.sqrt(d_in), np.zeros((d_out, r)))
        for n, (d_out, d_in, r) in sizes.items()
    }
    first |= {n: factors for n, factors in (start or {}).items() if n in sizes}
    arguments = {"initial": fingerprints(first), "run": name} | arguments
    made, factors = [], first
    for count in steps:
        factors = {
            n: (a + 0.1 * rng.standard_normal(a.shape) / math.sqrt(a.shape[1]),
                b + magnitude * rng.standard_normal(b.shape))
            for n, (a, b) in factors.items()
        }  # fmt: skip
        gradients = {}
        for n, (d_out, d_in, _) in sizes.items():
            mean = rng.standard_normal((d_out, d_in))
            noise = rng.standard_normal((window, d_out, d_in))
            gradients[n] = list(gradient * (mean + 0.5 * noise))
        into = Path(folder) / snapshot_name(count)
        made.append(make_snapshot(into, alter(factors), gradients, steps=count, **arguments))
    described = RunInfo(
        name, arguments.get("base_model", "test/base"), arguments.get("total_steps", 100),
        tuple(f for m in made for f in m.info.fractions),
        tuple(m.info.steps for m in made for _ in m.info.fractions), arguments["initial"],
    )  # fmt: skip
    write_json(Path(folder) / "run.json", run_to_json(described))
    return MadeRun(Path(folder), described, tuple(made))


def fingerprints(factors: Factors) -> Initial:
    """Of the factors A as float32."""
    raw = {n: np.asarray(a, np.float32).tobytes() for n, (a, _) in factors.items()}
    return Initial(
        hashlib.sha256(b"".join(raw.values())).hexdigest(),
        {n: hashlib.sha256(data).hexdigest()[:16] for n, data in raw.items()},
    )


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
