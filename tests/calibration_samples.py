"""Calibration folders for tests, and the truth about them in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergeprobe_fast.io.calibration import CalibratedModule, CalibrationInfo, Domain
from mergeprobe_fast.io.calibration_writer import CalibrationWriter
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16


@dataclass(frozen=True)
class MadeCalibration:
    """A written calibration: samples as stored, widened, by (domain, module)."""

    path: Path
    samples: dict[tuple[str, str], np.ndarray]
    moments: dict[tuple[str, str], np.ndarray]
    gradients: dict[tuple[str, str], np.ndarray]

    def second_moment(
        self, domain: str, module: str, off: float = 0.9, ridge: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """off X^T X / T + (1 - off) diag(moment) + diag(ridge), dense."""
        x, moment = self.samples[domain, module], self.moments[domain, module]
        diagonal = np.diag((1 - off) * moment + ridge)
        return off * (x.T @ x) / len(x) + diagonal


def stored(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float64."""
    return bf16_to_f32(f32_to_bf16(np.asarray(values, np.float32))).astype(np.float64)


def make_calibration(
    folder: str | Path,
    modules: Mapping[str, tuple[int, ...]],
    domains: Sequence[str] | Mapping[str, int],
    rng: np.random.Generator,
    *,
    samples: int = 9,
    given: Mapping[tuple[str, str], np.ndarray] | None = None,
    shared: Mapping[str, str] | None = None,
    gradients: bool = False,
) -> MadeCalibration:
    """Write a calibration with correlated inputs that differ between domains.

    ``modules`` maps a path to (d_out, d_in, ...); ``domains`` may give T of each; ``given`` sets
    the samples of some (domain, module); ``shared`` says whose input a module shares. Moments are
    those of twice as many tokens as were sampled, where ``samples`` is the limit.
    """
    if not isinstance(domains, Mapping):
        domains = dict.fromkeys(domains, samples)
    most = max(domains.values())
    tokens = {g: 2 * t if t == most else t for g, t in domains.items()}
    source = {name: (shared or {}).get(name, name) for name in modules}
    info = CalibrationInfo(
        base_model="test/base",
        base_path=None,
        config_sha256="0" * 64,
        domains={
            g: Domain(g, f"{g}.jsonl", "0" * 64, t, tokens[g], t, (f"{g}.safetensors",))
            for g, t in domains.items()
        },
        modules={
            name: CalibratedModule(name, sizes[1], sizes[0], source[name])
            for name, sizes in modules.items()
        },
        seed=0,
        samples=most,
        max_length=64,
        skip_first=0,
        labels="model" if gradients else None,
    )
    made = MadeCalibration(Path(folder), {}, {}, {})
    with CalibrationWriter(folder, info) as writer:
        for g, t in domains.items():
            writer.sampled_tokens(g, np.arange(t), np.zeros(t))
            for name, (d_out, d_in, *_) in modules.items():
                if source[name] == name:
                    mixing = rng.standard_normal((d_in, d_in)) / d_in**0.5
                    drawn = rng.standard_normal((tokens[g], d_in)) @ mixing
                    drawn += rng.standard_normal(d_in)
                    x = stored((given or {}).get((g, name), drawn[:t]))
                    moment = (np.concatenate([x, drawn[t:]]) ** 2).mean(axis=0)
                    if given and (g, name) in given:
                        moment = (x**2).mean(axis=0)
                    writer.inputs(g, name, x.astype(np.float32))
                    writer.moment(g, name, moment)
                    made.samples[g, name], made.moments[g, name] = x, moment
                writer.output_moment(g, name, np.ones(d_out))
                if gradients:
                    y = stored(rng.standard_normal((t, d_out)) * 1e-6)
                    writer.gradients(g, name, y.astype(np.float32))
                    writer.gradient_moment(g, name, (y**2).mean(axis=0))
                    made.gradients[g, name] = y
            for name, key in source.items():
                made.samples[g, name] = made.samples[g, key]
                made.moments[g, name] = made.moments[g, key]
    return made
