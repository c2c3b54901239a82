"""Writing a calibration folder row by row, so that the samples are never in memory together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from . import calibration_json, strict_json
from .atomic import AtomicFolder
from .calibration import declared_tensors, gradient_stem, is_calibration
from .calibration_json import CALIBRATION_NAME, CalibrationInfo, Domain
from .dtypes import DTYPE_BITS, bf16_to_f32, f32_to_bf16
from .points import POINTS_NAME, POINTS_TENSORS, PointsInfo, has_points
from .points_writer import PointsWriter
from .safetensors_stream import StreamWriter
from .strict_json import Bad

SHARD_NBYTES = 5 * 10**9  # as the Hugging Face libraries cut large models
_HEADER_NBYTES = 200  # of one tensor, about


def written_nbytes(info: CalibrationInfo, points: PointsInfo | None = None) -> int:
    """Bytes of all tensors and, within some kilobytes, of the headers."""
    total = 0 if points is None else points.nbytes
    for domain in info.domains.values():
        declared = declared_tensors(info, domain)
        total += sum(_nbytes(*tensor) + _HEADER_NBYTES for tensor in declared.values())
    return total + _HEADER_NBYTES * (len(info.modules) + len(info.domains))


class CalibrationWriter:
    """Context manager: the calibration folder ``out`` appears as a whole at the end or not at all.

    ``info`` is what is going to be recorded (``Domain.files`` is filled in here), ``points`` what
    is measured with adapters, if anything: ``writer.points`` takes it. Every row of every declared
    tensor must have been written when the block is left, in any order.

    Raises:
        InputError: on entering, when ``out`` exists (without ``overwrite``), is not a calibration,
            holds one of ``inputs``, or the disk has no room; when a value is not finite in BF16.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        info: CalibrationInfo,
        *,
        points: PointsInfo | None = None,
        overwrite: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        shard_nbytes: int = SHARD_NBYTES,
    ) -> None:
        shards = {d.name: _shards(info, d, shard_nbytes) for d in info.domains.values()}
        domains = {
            name: replace(domain, files=tuple(shards[name]))
            for name, domain in info.domains.items()
        }
        self.info = replace(info, domains=domains)
        files = [file for files in shards.values() for file in files]
        _check(self.info, out)
        if points is not None and POINTS_TENSORS in map(str.casefold, files):
            reason = "is the name of the file of the points; call the domain otherwise"
            raise InputError(reason, path=out, key=Path(POINTS_TENSORS).stem)
        self._shards, self._points_info = shards, points
        self.points: PointsWriter | None = None
        contents = _contents(Path(out)) or [CALIBRATION_NAME, *files]
        self._folder = AtomicFolder(out, overwrite, inputs=inputs, contents=contents)
        self._stack = ExitStack()
        self._writers: dict[tuple[str, str], StreamWriter] = {}

    def check(self) -> None:
        """Raise what entering would refuse, before any work is done; writes nothing."""
        self._folder.check()
        parent = self._folder.out.parent
        while not parent.exists():
            parent = parent.parent
        free, needed = shutil.disk_usage(parent).free, self._nbytes()
        if free < needed:
            reason = f"needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left"
            raise InputError(reason, path=self._folder.out)

    def _nbytes(self) -> int:
        return written_nbytes(self.info, self._points_info)

    def __enter__(self) -> CalibrationWriter:
        self.check()
        with ExitStack() as stack:
            temporary = stack.enter_context(self._folder)
            for domain, files in self._shards.items():
                for file, declared in files.items():
                    writer = StreamWriter(temporary / file, declared, {"domain": domain})
                    stack.enter_context(writer)
                    self._writers |= {(domain, key): writer for key in declared}
            if self._points_info is not None:
                self.points = stack.enter_context(PointsWriter(temporary, self._points_info))
            text = json.dumps(calibration_json.to_json(self.info), indent=2, ensure_ascii=False)
            (temporary / CALIBRATION_NAME).write_bytes((text + "\n").encode("utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._stack.__exit__(*error)

    def sampled_tokens(self, domain: str, sequence: np.ndarray, position: np.ndarray) -> None:
        """The sampled tokens of a domain, sorted: sequence number and position, (T,) each."""
        self._put(domain, "sequence", np.asarray(sequence, "<i4"))
        self._put(domain, "position", np.asarray(position, "<i4"))

    def inputs(self, domain: str, key: str, rows: np.ndarray, first: int = 0) -> None:
        """Rows ``first``, ... of the input samples of a key, float32 (n, d_in)."""
        self._samples(domain, f"input.{key}", rows, first)

    def outputs(self, domain: str, module: str, rows: np.ndarray, first: int = 0) -> None:
        """Rows ``first``, ... of the outputs of a module, float32 (n, d_out)."""
        self._samples(domain, f"output.{module}", rows, first)

    def gradients(
        self, domain: str, module: str, rows: np.ndarray, first: int = 0, labels: str = "model"
    ) -> None:
        """Rows ``first``, ... of the output gradients of a module, float32 (n, d_out)."""
        self._samples(domain, f"{gradient_stem(self.info, labels)}.{module}", rows, first)

    def moment(self, domain: str, key: str, values: np.ndarray) -> None:
        """The mean of the squared inputs of a key, float64 (d_in,)."""
        self._moments(domain, f"moment.{key}", values)

    def output_moment(self, domain: str, module: str, values: np.ndarray) -> None:
        """The mean of the squared outputs of a module, float64 (d_out,)."""
        self._moments(domain, f"output_moment.{module}", values)

    def gradient_moment(
        self, domain: str, module: str, values: np.ndarray, labels: str = "model"
    ) -> None:
        """The mean of the squared output gradients of a module, float64 (d_out,)."""
        self._moments(domain, f"{gradient_stem(self.info, labels)}_moment.{module}", values)

    def _samples(self, domain: str, key: str, rows: np.ndarray, first: int) -> None:
        bits = f32_to_bf16(rows)
        if not np.isfinite(bf16_to_f32(bits)).all():
            raise _not_finite(domain, key)
        self._put(domain, key, bits, first)

    def _moments(self, domain: str, key: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise _not_finite(domain, key)
        self._put(domain, key, np.asarray(values, "<f8"))

    def _put(self, domain: str, key: str, data: np.ndarray, first: int = 0) -> None:
        self._writers[domain, key].write(key, data, first)


def _not_finite(domain: str, key: str) -> InputError:
    kind, module = key.split(".", 1)
    what = next((w for w in ("gradient", "output") if kind.startswith(w)), "input") + "s"
    return InputError(f"{what} in domain {domain!r} are NaN or too large", key=module)


def _check(info: CalibrationInfo, out: str | os.PathLike[str]) -> None:
    """What the reader would refuse is not written."""
    try:
        calibration_json.parse(calibration_json.to_json(info))
    except Bad as bad:
        raise InputError(bad.reason, path=out, key=bad.key) from None


def _contents(out: Path) -> list[str] | None:
    """The files of the calibration that is there already, so that it may be replaced."""
    if not is_calibration(out):
        return None
    try:
        info = calibration_json.parse(strict_json.read(out / CALIBRATION_NAME))
    except (Bad, InputError):
        return None
    points = [POINTS_NAME, POINTS_TENSORS] if has_points(out) else []
    return [CALIBRATION_NAME, *points, *(file for d in info.domains.values() for file in d.files)]


def _shards(
    info: CalibrationInfo, domain: Domain, limit: int
) -> dict[str, Mapping[str, tuple[str, tuple[int, ...]]]]:
    """The domain's tensors by file: in order, a new file when one would grow beyond the limit."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for key, tensor in declared_tensors(info, domain).items():
        size += _nbytes(*tensor)
        if shards[-1] and size > limit:
            shards.append({})
            size = _nbytes(*tensor)
        shards[-1][key] = tensor
    if len(shards) == 1:
        return {f"{domain.name}.safetensors": shards[0]}
    return {
        f"{domain.name}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8
