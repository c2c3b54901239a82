"""Calibration folders: what the modules of a base model see on a few texts of each domain.

``calibration.json``
    what was recorded, of which base model, from which data (``Calibration`` has the fields);
``<domain>.safetensors``, or ``<domain>-00001-of-00003.safetensors`` and so on, with T tokens drawn
without replacement from the domain, the same ones for every module:
    ``sequence``, ``position``        I32 (T,), where each of them stands in the data
    ``input.<key>``                   BF16 (T, d_in), inputs of the modules that have this key
    ``moment.<key>``                  F64 (d_in,), mean of x^2 over all tokens, not only these
    ``output_moment.<module>``        F64 (d_out,), mean of the squared output over all tokens
    ``output.<module>``               BF16 (T, d_out), outputs of the module, if recorded
    ``gradient.<module>``             BF16 (T, d_out), dLoss/d(module output), if recorded
    ``gradient_moment.<module>``      F64 (d_out,), mean of its square over all tokens
    ``gradient_data.<module>``, ``gradient_data_moment.<module>``, the same of the data's labels
        where there are both: then those above are of labels drawn from the model
``points.json``, ``points.safetensors``, if adapters were given (``io.points`` has them).

Modules that are fed the very same tensor (q, k and v; gate and up) share one key, the name of the
first of them. BF16 has the exponents of float32, so that small gradients keep their 8 bits. Files
of version 1, which have no output moments and one kind of labels, are read too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import InputError
from . import calibration_json, strict_json
from .adapter import FactorRef
from .calibration_json import CALIBRATION_NAME, CalibratedModule, CalibrationInfo, Domain
from .declared import read_declared
from .dtypes import bf16_to_f32
from .read import read_tensor
from .strict_json import Bad

__all__ = [
    "CALIBRATION_NAME",
    "CalibratedModule",
    "Calibration",
    "CalibrationInfo",
    "Domain",
    "declared_tensors",
    "is_calibration",
    "open_calibration",
]


def is_calibration(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a calibration; nothing is opened."""
    return os.path.isfile(os.path.join(folder, CALIBRATION_NAME))


def gradient_stem(info: CalibrationInfo, labels: str) -> str:
    """What the keys of gradients of a kind of labels begin with."""
    return "gradient_data" if (info.labels, labels) == ("both", "data") else "gradient"


def declared_tensors(
    info: CalibrationInfo, domain: Domain
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor that a domain's files hold together: key -> (dtype name, shape)."""
    rows = domain.samples
    declared: dict[str, tuple[str, tuple[int, ...]]] = {
        "sequence": ("I32", (rows,)), "position": ("I32", (rows,)),
    }  # fmt: skip
    for name, module in info.modules.items():
        if module.input == name:
            declared[f"input.{name}"] = "BF16", (rows, module.d_in)
            declared[f"moment.{name}"] = "F64", (module.d_in,)
        if info.output_moments:
            declared[f"output_moment.{name}"] = "F64", (module.d_out,)
        if info.outputs:
            declared[f"output.{name}"] = "BF16", (rows, module.d_out)
        for kind in info.label_kinds:
            stem = gradient_stem(info, kind)
            declared[f"{stem}.{name}"] = "BF16", (rows, module.d_out)
            declared[f"{stem}_moment.{name}"] = "F64", (module.d_out,)
    return declared


@dataclass(frozen=True, eq=False)
class Calibration:
    """An opened calibration: headers checked, no sample read yet.

    Every method reads one tensor and keeps nothing; a file that changed since it was opened, and a
    number that is not finite, is an ``InputError`` naming file and key.
    """

    path: Path
    info: CalibrationInfo
    _tensors: Mapping[str, Mapping[str, FactorRef]]  # domain -> key -> where

    @property
    def base_model(self) -> str:
        """The base model's name: what its config declares, else its path as it was given."""
        return self.info.base_model

    @property
    def point(self) -> str:
        """The weights at which things were recorded: always "base" in this version."""
        return self.info.point

    @property
    def domains(self) -> Mapping[str, Domain]:
        """The domains by name, in the order in which they were given."""
        return MappingProxyType(self.info.domains)

    @property
    def modules(self) -> Mapping[str, CalibratedModule]:
        """The recorded modules by their full path in the base model, in the order of calls."""
        return MappingProxyType(self.info.modules)

    @property
    def has_gradients(self) -> bool:
        """Whether output gradients were recorded."""
        return self.info.labels is not None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that gradients were recorded of: "model", "data", both or none."""
        return self.info.label_kinds

    @property
    def has_output_moments(self) -> bool:
        """Whether mean squares of outputs are there: not in files of version 1."""
        return self.info.output_moments

    @property
    def has_outputs(self) -> bool:
        """Whether outputs were kept at the sampled tokens."""
        return self.info.outputs

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a report should know about the recording."""
        return self.info.notes

    def __repr__(self) -> str:
        domains = ", ".join(f"{d.name} {d.samples}" for d in self.info.domains.values())
        return f"<Calibration of {self.base_model}: {len(self.modules)} modules, {domains}>"

    def input_key(self, module: str) -> str:
        """The name of the first module that is fed the same tensor as this one."""
        return self._module(module).input

    def inputs(self, domain: str, module: str) -> np.ndarray:
        """The inputs of a module at the sampled tokens, float32 (T, d_in)."""
        return self._read(domain, f"input.{self.input_key(module)}")

    def moment(self, domain: str, module: str) -> np.ndarray:
        """Mean of the squared inputs over all tokens of the domain, float64 (d_in,)."""
        return self._read(domain, f"moment.{self.input_key(module)}")

    def output_moment(self, domain: str, module: str) -> np.ndarray:
        """Mean of the squared outputs (with bias) over all tokens of the domain, float64 (d_out,).

        Of the base model's module. Files of version 1 have none: ``InputError``.
        """
        if not self.has_output_moments:
            raise InputError("was recorded without output moments: calibrate anew", path=self.path)
        return self._read(domain, f"output_moment.{self._module(module).name}")

    def outputs(self, domain: str, module: str) -> np.ndarray:
        """The outputs of the base model's module at the sampled tokens, float32 (T, d_out)."""
        if not self.has_outputs:
            raise InputError("was recorded without outputs: calibrate --outputs", path=self.path)
        return self._read(domain, f"output.{self._module(module).name}")

    def gradients(self, domain: str, module: str, labels: str | None = None) -> np.ndarray:
        """dLoss/d(output of the module) at the sampled tokens, float32 (T, d_out).

        The loss is the sum of -log p(label) over the tokens of the sequence that have a label
        (``Domain.loss``), in nats. ``labels``: "model", drawn from the model itself (its Fisher),
        or "data", the text's own; None: the ones that there are, the model's of both.
        """
        stem = self._gradients_of(labels)
        return self._read(domain, f"{stem}.{self._module(module).name}")

    def gradient_moment(self, domain: str, module: str, labels: str | None = None) -> np.ndarray:
        """Mean of the squared output gradients over all tokens of the domain, float64 (d_out,)."""
        stem = self._gradients_of(labels)
        return self._read(domain, f"{stem}_moment.{self._module(module).name}")

    def sampled_tokens(self, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """Sequence number and position of each sampled token, int32 (T,) each, both from 0.

        Sorted by sequence and then by position; no token is there twice.
        """
        sequence, position = (self._read(domain, key) for key in ("sequence", "position"))
        if sequence.min() < 0 or sequence.max() >= self._domain(domain).sequences:
            raise self._bad(domain, "sequence", "has a number that is none of a sequence")
        if position.min() < self.info.skip_first or position.max() >= self.info.max_length:
            raise self._bad(domain, "position", "has a position that is not sampled")
        if (np.diff(sequence.astype(np.int64) << 32 | position) <= 0).any():
            raise self._bad(domain, "position", "tokens are not in order, or one is there twice")
        return sequence, position

    def _module(self, module: str) -> CalibratedModule:
        try:
            return self.info.modules[module]
        except KeyError:
            raise InputError("has no such module", path=self.path, key=module) from None

    def _gradients_of(self, labels: str | None) -> str:
        if not self.has_gradients:
            raise InputError("was recorded without gradients", path=self.path)
        labels = self.labels[0] if labels is None else labels
        if labels not in self.labels:
            reason = f"has no gradients of labels {labels!r}, only {', '.join(self.labels)}"
            raise InputError(reason, path=self.path)
        return gradient_stem(self.info, labels)

    def _domain(self, domain: str) -> Domain:
        try:
            return self.info.domains[domain]
        except KeyError:
            known = ", ".join(self.info.domains)
            reason = f"has no such domain, only {known}"
            raise InputError(reason, path=self.path, key=domain) from None

    def _bad(self, domain: str, key: str, reason: str) -> InputError:
        return InputError(reason, path=self._tensors[domain][key].file.path, key=key)

    def _read(self, domain: str, key: str) -> np.ndarray:
        self._domain(domain)
        ref = self._tensors[domain][key]
        raw = read_tensor(ref)
        values = bf16_to_f32(raw) if ref.dtype == "BF16" else raw
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self._bad(domain, key, "has NaN or Inf")
        if ref.dtype == "F64" and values.min() < 0:
            raise self._bad(domain, key, "a mean of squares is negative")
        return values


def open_calibration(folder: str | os.PathLike[str]) -> Calibration:
    """Open a calibration folder. Headers are read and checked; no sample is.

    Raises:
        InputError: naming file, key and reason, for anything but a complete calibration of this
            version: unknown or missing keys, tensors that are missing, unknown, twice there or of
            another dtype or shape than ``calibration.json`` says.
    """
    folder = Path(folder)
    path = folder / CALIBRATION_NAME
    try:
        present, complete = folder.is_dir(), is_calibration(folder)
    except ValueError as error:  # a NUL in the path
        raise strict_json.unreadable(folder, error) from error
    if not present:
        raise InputError("is not a calibration folder", path=folder)
    if not complete:
        raise InputError(f"has no {CALIBRATION_NAME}: not a calibration", path=folder)
    try:
        info = calibration_json.parse(strict_json.read(path))
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    tensors = {name: _open_domain(folder, info, domain) for name, domain in info.domains.items()}
    return Calibration(folder, info, tensors)


def _open_domain(folder: Path, info: CalibrationInfo, domain: Domain) -> dict[str, FactorRef]:
    files = [folder / name for name in domain.files]
    return read_declared(files, declared_tensors(info, domain), "this calibration")
