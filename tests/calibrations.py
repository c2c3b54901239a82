"""Calibration folders for tests, written without torch, with the truth beside them.

(Correlated samples for merges, and dense second moments: calibration_samples.py.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergeprobe_fast.io.calibration_json import CalibratedModule, CalibrationInfo, Domain
from mergeprobe_fast.io.calibration_writer import CalibrationWriter
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16

SHA = "0" * 64


@dataclass(frozen=True)
class MadeCalibration:
    """A written calibration and what is in it, by (domain, input key) or (domain, module)."""

    path: Path
    info: CalibrationInfo
    inputs: dict[tuple[str, str], np.ndarray]  # float64 (T, d_in), as stored: rounded to BF16
    moments: dict[tuple[str, str], np.ndarray]
    gradients: dict[tuple[str, str], np.ndarray]
    gradient_moments: dict[tuple[str, str], np.ndarray]


def make_calibration(
    folder: str | Path,
    modules: Mapping[str, tuple[int, int]],
    domains: Mapping[str, int],
    rng: np.random.Generator,
    *,
    shared: Mapping[str, str] | None = None,
    samples: Mapping[tuple[str, str], np.ndarray] | None = None,
    gradients: bool = False,
    base_model: str = "test/base",
    shard_nbytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> MadeCalibration:
    """Write a calibration of standard normal samples, or of ``samples`` by (domain, input key).

    ``modules`` maps a path to (d_out, d_in), ``domains`` a name to T, ``shared`` a module to the
    module whose input it shares. The moments are the means over exactly these T samples.
    """
    recorded = {
        name: CalibratedModule(name, d_in, d_out, (shared or {}).get(name, name))
        for name, (d_out, d_in) in modules.items()
    }
    described = {
        name: Domain(name, f"{name}.jsonl", SHA, 1, count, count, ())
        for name, count in domains.items()
    }
    info = CalibrationInfo(
        base_model, None, SHA, described, recorded, seed=0, samples=max(domains.values()),
        max_length=max(domains.values()) + 1, skip_first=1, labels="model" if gradients else None,
    )  # fmt: skip
    made = MadeCalibration(Path(folder), info, {}, {}, {}, {})
    with CalibrationWriter(folder, info, overwrite=overwrite, shard_nbytes=shard_nbytes) as writer:
        for domain, count in domains.items():
            writer.sampled_tokens(domain, np.zeros(count), np.arange(1, count + 1))
            for module in recorded.values():
                key = (domain, module.name)
                if module.input == module.name:
                    rows = (samples or {}).get(key)
                    rows = rng.standard_normal((count, module.d_in)) if rows is None else rows
                    made.inputs[key] = stored(rows)
                    made.moments[key] = (made.inputs[key] ** 2).mean(axis=0)
                    writer.inputs(domain, module.name, made.inputs[key].astype(np.float32))
                    writer.moment(domain, module.name, made.moments[key])
                if gradients:
                    rows = stored(rng.standard_normal((count, module.d_out)) * 1e-6)
                    made.gradients[key] = rows
                    made.gradient_moments[key] = (rows**2).mean(axis=0)
                    writer.gradients(domain, module.name, rows.astype(np.float32))
                    writer.gradient_moment(domain, module.name, made.gradient_moments[key])
    return made


def stored(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float64."""
    return bf16_to_f32(f32_to_bf16(np.asarray(values, np.float32))).astype(np.float64)
