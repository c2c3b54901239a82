"""The result of a merge, and writing it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import mergeprobe_fast
from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.peft_writer import RoundedModule
from mergeprobe_fast.merging.methods import MergedModule, MergeRequest
from mergeprobe_fast.merging.output import write
from mergeprobe_fast.merging.output_error import OutputErrors, output_errors
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.ops.device import computing_on
from mergeprobe_fast.zoo import Zoo, text


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """One adapter made of several, in memory; ``save`` writes it.

    ``modules`` hold float32 factors with every scale baked in: ``delta = b @ a``.
    """

    zoo: Zoo
    method: str
    request: MergeRequest  # as asked for, defaults filled in
    dtype: str
    modules: tuple[MergedModule, ...]

    def __repr__(self) -> str:
        names = ", ".join(self.zoo.names)
        return f"<MergedAdapter {self.method} of {names}: {len(self.modules)} modules>"

    @_env.one_blas_thread()
    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
        """Write it in the format of the inputs; returns the report that is written beside it.

        A PEFT folder with ``merge.json``; for kohya and diffusers files, one ``.safetensors`` file
        and ``<name>.merge.json``. Each appears as a whole at the end or not at all. Rounding to
        ``dtype`` is measured against the float32 result and reported per module.

        Raises:
            InputError: ``out`` exists (without ``overwrite``), is one of the inputs, is no
                ``.safetensors`` name where a file is to be written, or cannot be written.
        """
        if self.request.calibration is not None:
            self.output_errors()  # whatever can be wrong with it is found before a byte is written
        return write(self.zoo, out, self.modules, self.dtype, self.report, overwrite=overwrite)

    def report(self, written: dict[str, RoundedModule] | None = None) -> dict[str, Any]:
        """What was done, and the exact error of each module, as plain JSON values."""
        rows: dict[str, Any] = {}
        norms, lost, rounded = [], [], []
        for m in self.modules:
            row: dict[str, Any] = {
                "rank": int(m.a.shape[0]),
                "rank_before": m.rank_before,
                "norm": m.norm,
                "truncation_error": m.truncation_error,
                "truncation_error_relative": m.truncation_error / m.norm if m.norm else 0.0,
                "members": list(m.members),
                **{key: value for key, value in m.details.items() if key != "outputs"},
            }
            norms.append(m.norm)
            lost.append(m.truncation_error)
            if written is not None:
                error = _rounding_error(m, written[m.module.name])
                rounded.append(error)
                row["rounding_error_relative"] = error / m.norm if m.norm else 0.0
            rows[m.module.name] = row
        norm = math.hypot(*norms)
        truncated = math.hypot(*lost) / norm if norm else 0.0
        total = {
            "norm": norm,
            "truncation_error_relative": truncated,
            "energy_kept": 1.0 - truncated**2,
        }
        if written is not None:
            total["rounding_error_relative"] = math.hypot(*rounded) / norm if norm else 0.0
        report = {
            "tool": f"mergeprobe_fast {mergeprobe_fast.__version__}",
            "method": self.method,
            "rank": self.request.rank,
            "energy": self.request.energy,
            "arguments": {k: plain(v) for k, v in self.request.arguments.items()},
            "dtype": self.dtype,
            "base_model": self.zoo.base_model,
            "adapters": self._adapters(),
            "notes": [*self.zoo.notes, *self._remarks()],
            "total": total,
        }
        if self.request.calibration is not None:
            report["outputs"] = self._outputs.report()
        return {**report, "modules": rows}

    def output_errors(self) -> OutputErrors:
        """How far the result's outputs are from each adapter's own; needs a calibration.

        Of the float32 result, on the samples of the calibration, which methods that learn from
        them were fitted to.
        """
        return self._outputs

    @cached_property
    def _outputs(self) -> OutputErrors:
        request = self.request
        if request.calibration is None:
            raise InputError("the merge was given none", key="calibration")
        with computing_on(request.device):
            return output_errors(
                request.source, self.modules, request.calibration, request.domains,
                request.threads, request.device,
            )  # fmt: skip

    def _adapters(self) -> list[dict[str, Any]]:
        rows = []
        for i, a in enumerate(self.zoo):
            row = {"name": a.name, "path": text(a.path)}
            row["weight"] = plain(self.request.weights[:, i])
            if self.request.domains:
                row["domain"] = self.request.domains[i]
            rows.append(row)
        return rows

    def _remarks(self) -> list[str]:
        most = max(m.rank_before for m in self.modules)
        if most == 0 or all(m.norm == 0 for m in self.modules):
            return ["the merged update is zero: the weighted updates cancel, or all are zero"]
        written = max(m.a.shape[0] for m in self.modules)
        energy = self.request.energy
        if energy is not None and self.request.rank is None:
            # What float32 leaves out of a full rank is no shortfall.
            short = sum(1 - self._lost(m) ** 2 < energy - 1e-6 for m in self.modules if m.norm)
            if short:
                return [f"{short} modules keep less than {energy:g} of their energy"]
        padding = (m for m in self.modules if m.a.shape[0] == written)
        if written > most and any(not m.b[:, most:].any() for m in padding):
            return [f"the sum has rank {most} at most; padded with zeros to {written}"]
        return []

    def _lost(self, m: MergedModule) -> float:
        """What ``energy`` bounds the square of: a share of the norm, or of the output's."""
        if self.request.arguments.get("truncation") != "plain":
            return m.details.get("activation_error_relative", m.truncation_error / m.norm)
        return m.truncation_error / m.norm


def plain(value: Any) -> Any:
    """An argument as JSON: what is the same for all modules, or all adapters, is one number."""
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 2:
        columns = [plain(value[:, i]) for i in range(value.shape[1])]
        return columns[0] if all(c == columns[0] for c in columns) else columns
    return float(value[0]) if (value == value[0]).all() else value.tolist()


def _rounding_error(m: MergedModule, written: RoundedModule) -> float:
    """||written - exact||_F without cancellation: dB A' + B dA, from each factor's rounding."""
    a, b = written.a, written.b
    db, da = b - m.b, a - m.a  # neighbours: the differences are exact
    if not db.any() and not da.any():
        return 0.0
    left, right = np.concatenate([db, m.b], axis=1), np.concatenate([a, da])
    gram = block_gram(left.T, right, np.array([0, len(right)]), accumulate="fp64", threads=1)
    return float(np.sqrt(max(0.0, gram[0, 0])))

