"""Calibration folders for tests, written without torch, with the truth beside them.

(Correlated samples for merges, and dense second moments: calibration_samples.py.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.calibration_json import CalibratedModule, CalibrationInfo, Domain
from mergeprobe_fast.io.calibration_writer import CalibrationWriter
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.points import Point, PointsInfo
from mergeprobe_fast.io.points_writer import PointsWriter

SHA = "0" * 64


@dataclass(frozen=True)
class MadeCalibration:
    """A written calibration and what is in it, by (domain, input key) or (domain, module).

    Gradients are of the labels "model" where there are both; ``data_gradients`` are the others.
    """

    path: Path
    info: CalibrationInfo
    inputs: dict[tuple[str, str], np.ndarray]  # float64 (T, d_in), as stored: rounded to BF16
    moments: dict[tuple[str, str], np.ndarray]
    gradients: dict[tuple[str, str], np.ndarray]
    gradient_moments: dict[tuple[str, str], np.ndarray]
    output_moments: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    outputs: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    data_gradients: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    data_gradient_moments: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class MadePoints:
    """Written points and their tensors, by name in the file: ``phi_data.<point>`` and so on."""

    path: Path
    info: PointsInfo
    tensors: dict[str, np.ndarray]


def make_calibration(
    folder: str | Path,
    modules: Mapping[str, tuple[int, int]],
    domains: Mapping[str, int],
    rng: np.random.Generator,
    *,
    shared: Mapping[str, str] | None = None,
    samples: Mapping[tuple[str, str], np.ndarray] | None = None,
    gradients: bool = False,
    labels: str = "model",
    outputs: bool = False,
    output_moments: Mapping[tuple[str, str], np.ndarray] | None = None,
    losses: Mapping[str, str] | None = None,
    sequences: int = 1,
    version: int = 2,
    base_model: str = "test/base",
    shard_nbytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> MadeCalibration:
    """Write a calibration of standard normal samples, or of ``samples`` by (domain, input key).

    ``modules`` maps a path to (d_out, d_in), ``domains`` a name to T, ``shared`` a module to the
    module whose input it shares. The moments are the means over exactly these T samples. Without
    ``outputs``, output moments are ``output_moments`` by (domain, module), or drawn from 0.5 to 2;
    ``losses`` gives a domain's loss, ``labels`` is "model", "data" or "both"; the samples are
    spread over ``sequences`` in turn. Version 1 has no output moments.
    """
    recorded = {
        name: CalibratedModule(name, d_in, d_out, (shared or {}).get(name, name))
        for name, (d_out, d_in) in modules.items()
    }
    described = {
        name: Domain(
            name, f"{name}.jsonl", SHA, min(sequences, count), count, count, (),
            (losses or {}).get(name, "all"),
        )
        for name, count in domains.items()
    }  # fmt: skip
    info = CalibrationInfo(
        base_model, None, SHA, described, recorded, seed=0, samples=max(domains.values()),
        max_length=max(domains.values()) + 1, skip_first=1, labels=labels if gradients else None,
        outputs=outputs, version=version,
    )  # fmt: skip
    made = MadeCalibration(Path(folder), info, {}, {}, {}, {})
    with CalibrationWriter(folder, info, overwrite=overwrite, shard_nbytes=shard_nbytes) as writer:
        for domain, count in domains.items():
            of = np.sort(np.arange(count) % sequences)
            writer.sampled_tokens(domain, of, np.arange(1, count + 1))
            for module in recorded.values():
                key = (domain, module.name)
                if module.input == module.name:
                    rows = (samples or {}).get(key)
                    rows = rng.standard_normal((count, module.d_in)) if rows is None else rows
                    made.inputs[key] = stored(rows)
                    made.moments[key] = (made.inputs[key] ** 2).mean(axis=0)
                    writer.inputs(domain, module.name, made.inputs[key].astype(np.float32))
                    writer.moment(domain, module.name, made.moments[key])
                if outputs:
                    rows = stored(rng.standard_normal((count, module.d_out)))
                    made.outputs[key] = rows
                    writer.outputs(domain, module.name, rows.astype(np.float32))
                if version > 1:
                    moment = (output_moments or {}).get(key)
                    if moment is None:
                        moment = rng.uniform(0.5, 2, module.d_out)
                        moment = (made.outputs[key] ** 2).mean(0) if outputs else moment
                    made.output_moments[key] = moment
                    writer.output_moment(domain, module.name, moment)
                for kind in info.label_kinds:
                    rows = stored(rng.standard_normal((count, module.d_out)) * 1e-6)
                    moment = (rows**2).mean(axis=0)
                    writer.gradients(domain, module.name, rows.astype(np.float32), labels=kind)
                    writer.gradient_moment(domain, module.name, moment, labels=kind)
                    second = kind == "data" and labels == "both"
                    (made.data_gradients if second else made.gradients)[key] = rows
                    moments = made.data_gradient_moments if second else made.gradient_moments
                    moments[key] = moment
    return made


def make_points(
    folder: str | Path,
    adapters: Sequence[AdapterRef],
    domains: Sequence[str],
    rng: np.random.Generator,
    *,
    sequences: int | Mapping[str, int] = 5,
    tensors: Mapping[str, np.ndarray] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    trained: Sequence[str] | None = None,
) -> MadePoints:
    """Put points into a folder, of a calibration if you like: random, or ``tensors`` by name.

    ``domains`` has one per adapter, ``sequences`` S, or one per domain; ``trained`` names the
    adapters that have a trained point (all). Every domain in use has a base point.
    """
    modules = tuple(sorted({name for adapter in adapters for name in adapter.modules}))
    of = dict(zip([a.name for a in adapters], domains, strict=True))
    counts = dict.fromkeys(domains, sequences) if isinstance(sequences, int) else sequences
    points = [Point("base", None, d, counts[d]) for d in dict.fromkeys(domains)]
    points += [
        Point("trained", a, d, counts[d]) for a, d in of.items() if trained is None or a in trained
    ]
    prints = {a.name: fingerprint(a) for a in adapters} | dict(fingerprints or {})
    info = PointsInfo(prints, modules, {p.key: p for p in points})
    drawn = {}
    for name, (dtype, shape) in info.declared().items():
        values = (tensors or {}).get(name)
        if values is None and dtype == "I32":
            values = rng.integers(3, 40, shape)
        elif values is None:
            values = rng.standard_normal(shape) * 0.05
            if name.startswith(("curvature.", "base_loss.", "loss.")):
                values = np.abs(values)
        drawn[name] = np.asarray(values)
    Path(folder).mkdir(exist_ok=True, parents=True)
    with PointsWriter(folder, info) as writer:
        for name, values in drawn.items():
            kind, key = name.split(".", 1)
            writer.write(key, **{kind: values})
    return MadePoints(Path(folder), info, drawn)


def stored(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float64."""
    return bf16_to_f32(f32_to_bf16(np.asarray(values, np.float32))).astype(np.float64)
