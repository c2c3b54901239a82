"""Points: what adapters do to the loss of a model, measured with the weights of one of them on it.

``points.json``, ``points.safetensors`` in a calibration folder. A point is "trained:<adapter>",
the base with that adapter's delta on texts of its own domain, or "base:<domain>". At each point,
over S texts, N adapters and M modules, for the loss of a text: the mean over its tokens that have
a label of -log p(label), in nats; "data" labels are the text's own (``Domain.loss`` of the
calibration says which tokens), "model" labels are drawn at the same tokens from the model there:
    ``phi_data.<point>``, ``phi_model.<point>``   F64 (S, N), dLoss/d(eps) along eps W_j
    ``first.<point>``        F64 (M, N), mean over texts of each module's part of it, labels data
    ``curvature.<point>``    F64 (M, N), mean over texts of tokens times that part squared, model
    ``base_loss.<point>``, ``loss.<point>``       F64 (S,), of the base and at the point
    ``tokens.<point>``       I32 (S,), tokens with a label
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import InputError
from . import strict_json
from .adapter import FactorRef
from .declared import read_declared
from .dtypes import DTYPE_BITS
from .json_fields import count, fields, hexadecimal, many, named, nullable, of_format, text
from .read import read_tensor
from .strict_json import Bad

POINTS_NAME, POINTS_TENSORS = "points.json", "points.safetensors"
FORMAT, VERSION = "mergeprobe-points", 1
KINDS = ("trained", "base")
LABELS = ("data", "model")


@dataclass(frozen=True, slots=True)
class Point:
    """Where things were measured: with which adapter on the model, on which texts."""

    kind: str  # "trained" or "base"
    adapter: str | None  # None at the base
    domain: str
    sequences: int  # S

    @property
    def key(self) -> str:
        """Its name: "trained:<adapter>" or "base:<domain>"."""
        return f"{self.kind}:{self.domain if self.adapter is None else self.adapter}"


@dataclass(frozen=True)
class PointsInfo:
    """Everything ``points.json`` says."""

    fingerprints: Mapping[str, str]  # adapter -> SHA-256 of its factors, ``io.fingerprint``
    modules: tuple[str, ...]  # that any of the adapters has
    points: Mapping[str, Point]

    def declared(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor: key -> (dtype name, shape)."""
        n, m = len(self.fingerprints), len(self.modules)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, point in self.points.items():
            s = point.sequences
            tensors |= {f"phi_{labels}.{key}": ("F64", (s, n)) for labels in LABELS}
            tensors |= {f"{name}.{key}": ("F64", (m, n)) for name in ("first", "curvature")}
            tensors |= {f"{name}.{key}": ("F64", (s,)) for name in ("base_loss", "loss")}
            tensors[f"tokens.{key}"] = "I32", (s,)
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of both files, within some kilobytes."""
        tensors = self.declared()
        values = sum(
            int(np.prod(shape)) * DTYPE_BITS[dtype] // 8 for dtype, shape in tensors.values()
        )
        return values + 200 * (len(tensors) + len(self.modules) + len(self.fingerprints))


@dataclass(frozen=True, eq=False)
class Points:
    """Opened points: headers checked, no number read yet. Every method reads, and keeps nothing."""

    path: Path
    info: PointsInfo
    _tensors: Mapping[str, FactorRef]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters along which derivatives were taken, the columns (N)."""
        return tuple(self.info.fingerprints)

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """The SHA-256 of each adapter's factors, as ``io.fingerprint.fingerprint`` gives it."""
        return MappingProxyType(dict(self.info.fingerprints))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that any of the adapters has (M)."""
        return self.info.modules

    @property
    def points(self) -> Mapping[str, Point]:
        """The points by key, "trained:<adapter>" or "base:<domain>"."""
        return MappingProxyType(dict(self.info.points))

    def __repr__(self) -> str:
        return f"<Points: {len(self.points)}, along {len(self.adapters)} adapters>"

    def phi(self, key: str, labels: str) -> np.ndarray:
        """Derivative of each text's loss along each adapter's delta, float64 (S, N).

        d(mean over its label tokens of -log p(label), in nats) / d(eps) with eps W_j added to the
        weights at this point: over all modules and all tokens of the text, exact. ``labels``:
        "data" or "model" (drawn from the model at this point).
        """
        if labels not in LABELS:
            raise InputError(f"labels {labels!r} are none of {', '.join(LABELS)}")
        return self._read(f"phi_{labels}", key)

    def first(self, key: str) -> np.ndarray:
        """Each module's part of ``phi``, labels "data", averaged over texts: float64 (M, N)."""
        return self._read("first", key)

    def curvature(self, key: str) -> np.ndarray:
        """The Fisher's diagonal over modules along each adapter, float64 (M, N), 0 and more.

        Mean over texts of (label tokens) times the square of each module's part of ``phi``, labels
        "model". (The whole Fisher of a mean loss is mean_s tokens_s phi_s phi_s^T.)
        """
        return self._read("curvature", key)

    def losses(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss of each text at the base and at this point, float64 (S,), and its label tokens.

        Losses are means over the label tokens, labels "data", in nats; tokens are int64.
        """
        base, here, tokens = (self._read(n, key) for n in ("base_loss", "loss", "tokens"))
        return base, here, tokens.astype(np.int64)

    def _read(self, name: str, key: str) -> np.ndarray:
        if key not in self.info.points:
            raise InputError("has no such point", path=self.path / POINTS_NAME, key=key)
        ref = self._tensors[f"{name}.{key}"]
        values = read_tensor(ref)
        reason = None
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            reason = "has NaN or Inf"
        elif name in ("base_loss", "loss", "curvature") and values.min(initial=0) < 0:
            reason = "is negative"
        elif name == "tokens" and values.min() < 1:
            reason = "has a text without labels"
        if reason is not None:
            raise InputError(reason, path=ref.file.path, key=ref.key)
        return values


def has_points(folder: str | os.PathLike[str]) -> bool:
    """Whether a calibration folder says that it has points; nothing is opened."""
    return os.path.isfile(os.path.join(folder, POINTS_NAME))


def open_points(folder: str | os.PathLike[str]) -> Points:
    """Open the points of a calibration folder. Headers are read and checked; no number is.

    Raises:
        InputError: naming file, key and reason, for anything but complete points of this version.
    """
    folder = Path(folder)
    path = folder / POINTS_NAME
    if not has_points(folder):
        reason = f"has no {POINTS_NAME}: calibrate --adapters makes it"
        raise InputError(reason, path=folder)
    try:
        info = parse(strict_json.read(path))
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    found = read_declared([folder / POINTS_TENSORS], info.declared(), "these points")
    return Points(folder, info, found)


def to_json(info: PointsInfo) -> dict[str, Any]:
    """The object to write; ``parse`` gives ``info`` back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "adapters": dict(info.fingerprints),
        "modules": list(info.modules),
        "points": {
            key: {"kind": p.kind, "adapter": p.adapter, "domain": p.domain,
                  "sequences": p.sequences}
            for key, p in info.points.items()
        },
    }  # fmt: skip


def parse(value: dict[str, Any]) -> PointsInfo:
    """Check every field; raises ``Bad`` with the field's path as key."""
    of_format(value, FORMAT, VERSION)
    checked = fields(
        value, "", format=text, version=count, adapters=named(hexadecimal(64)),
        modules=many(text, least=1), points=named(_point),
    )  # fmt: skip
    adapters, modules, points = (checked[k] for k in ("adapters", "modules", "points"))
    if not adapters or not points:
        raise Bad("is empty", "points" if adapters else "adapters")
    if len(set(modules)) != len(modules):
        raise Bad("names one twice", "modules")
    for key, point in points.items():
        known = point.adapter in adapters if point.kind == "trained" else point.adapter is None
        if point.kind not in KINDS or not known or point.key != key:
            raise Bad("does not describe that point", f"points.{key}")
    return PointsInfo(adapters, modules, points)


def _point(value: Any, where: str) -> Point:
    return Point(
        **fields(
            value, where, kind=text, adapter=nullable(text), domain=text, sequences=count,
        )
    )  # fmt: skip
