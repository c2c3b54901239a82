"""Probe runs: what a training left behind in its first few percent of steps.

``run.json``
    what is being recorded (``RunInfo`` has the fields);
``step-0000012/``
    a snapshot after 12 optimiser steps: a PEFT adapter folder with the factors A and B as they
    were then, ``probe.json`` (``ProbeInfo`` has the fields) and ``gradients.safetensors`` with
    ``last.A.<module>``, ``last.B.<module>``
        F32 (rank, d_in) and (d_out, rank): the gradient of the loss of the next step's batch with
        respect to these very factors, neither clipped nor scaled;
    ``mean.A.<module>``, ``mean.B.<module>``
        its mean over the window of steps since the snapshot before, each at its own factors;
    ``euler_a``, ``euler_b``
        F64, one per module of ``probe.json``: window means of <dA, A> and of <dB, B>, which are
        equal (both are <G, W>, G the gradient with respect to W = s B A);
    ``visible_square``
        F64, one per module: window mean of |G P_A|^2 = tr(dB (A A^T)^+ dB^T) / s^2.

Shapes and orientation are those of ``ModuleRef``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from ..errors import InputError
from . import probe_json, strict_json
from .adapter import AdapterRef, FactorRef
from .declared import read_declared
from .dtypes import to_f32
from .formats import open_adapter
from .probe_json import GRADIENTS_NAME, PROBE_NAME, RUN_NAME, ProbeInfo, RunInfo, snapshot_name
from .read import read_tensor
from .strict_json import Bad

VALUES = ("euler_a", "euler_b", "visible_square")
# Of |dA o A|_F + |dB o B|_F + |<dA, A>|, o by entries: 8 u with u = 2^-8 of bfloat16. Each entry
# and each token's product is rounded a few times on its own, so that errors add up like the root of
# their squares; measured: 0.013 at worst with bfloat16 autocast (2 tokens, rank 1), 1e-6 in
# float32. Gradients of another module are off by about 1.
EULER = 2.0**-5

T = TypeVar("T")


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a probe run; nothing is opened."""
    return os.path.isfile(os.path.join(folder, RUN_NAME))


def is_probe(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a snapshot of a probe run; nothing is opened."""
    return os.path.isfile(os.path.join(folder, PROBE_NAME))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An opened snapshot: headers checked, no number read yet.

    Methods read and keep nothing; a file that changed since, and a number that is not finite, is
    an ``InputError`` naming file and key.
    """

    path: Path
    info: ProbeInfo
    adapter: AdapterRef  # named like the run
    before: Snapshot | None  # the one before it in its run; None: the first, or opened alone
    _tensors: Mapping[str, FactorRef]

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return self.info.steps

    @property
    def fraction(self) -> float:
        """The largest fraction of training that it stands for."""
        return self.info.fractions[-1]

    @property
    def too_early(self) -> bool:
        """Whether fewer than ``probe_json.TOO_EARLY`` steps had been done."""
        return self.info.too_early

    def __repr__(self) -> str:
        name, info = self.adapter.name, self.info
        return f"<Snapshot of {name!r} after {info.steps} of {info.total_steps} steps>"

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A (rank, d_in) and B (d_out, rank) of a module, float32, exactly as stored."""
        ref = self.adapter.modules[self._module(module)]
        return (
            _read(ref.a).reshape(ref.rank, ref.d_in), _read(ref.b).reshape(ref.d_out, ref.rank)
        )  # fmt: skip

    def gradients(
        self, module: str, which: Literal["mean", "last"] = "mean"
    ) -> tuple[np.ndarray, np.ndarray]:
        """dLoss/dA (rank, d_in) and dLoss/dB (d_out, rank) of a module, float32."""
        if which not in ("mean", "last"):
            raise InputError(f"expected 'mean' or 'last', got {which!r}", key="which")
        name = self._module(module)
        return _read(self._tensors[f"{which}.A.{name}"]), _read(self._tensors[f"{which}.B.{name}"])

    def values(self, name: str) -> dict[str, float]:
        """One number per module: "euler_a", "euler_b" or "visible_square"."""
        if name not in VALUES:
            raise InputError(f"expected one of {', '.join(VALUES)}, got {name!r}", key="name")
        ref = self._tensors[name]
        values = _read(ref)
        if name == "visible_square" and values.min() < 0:
            raise InputError("a mean of squares is negative", path=ref.file.path, key=name)
        return dict(zip(self.info.modules, values.tolist(), strict=True))

    def check(self) -> None:
        """Read every number, and test the files with <dA, A> = <dB, B> of the last gradient.

        Raises:
            InputError: naming file and tensor, for a number that is not finite, and for a module
                where the two differ by more than rounding (``EULER``) explains: its gradients are
                damaged, or do not belong to these factors.
        """
        for name in VALUES:
            self.values(name)
        for name in self.info.modules:
            self.gradients(name, "mean")
            pairs = zip(self.gradients(name, "last"), self.factors(name), strict=True)
            products = [g.astype(np.float64) * f for g, f in pairs]
            a, b = (float(p.sum()) for p in products)
            slack = EULER * (sum(float(np.linalg.norm(p)) for p in products) + max(abs(a), abs(b)))
            if abs(a - b) > slack:
                ref = self._tensors[f"last.A.{name}"]
                reason = (
                    f"<dA, A> = {a:.6g} but <dB, B> = {b:.6g}: these are not the gradients at the "
                    "factors beside them"
                )
                raise InputError(reason, path=ref.file.path, key=ref.key)

    def _module(self, module: str) -> str:
        if module not in self.adapter.modules:
            raise InputError("has no such module", path=self.path, key=module)
        return module


@dataclass(frozen=True, eq=False)
class Run:
    """An opened probe run; its snapshots in the order of steps, maybe none yet."""

    name: str
    path: Path
    info: RunInfo
    snapshots: tuple[Snapshot, ...]


def open_probe(folder: str | os.PathLike[str], name: str | None = None) -> Snapshot:
    """Open one snapshot. Headers are read and checked; no number is.

    ``name`` of its adapter defaults to the run's as it was given, else to the run's folder.

    Raises:
        InputError: naming file, key and reason, for anything but a complete snapshot of this
            version: a field that is unknown, missing or impossible, an adapter of other modules,
            tensors that are missing, unknown or of another dtype or shape than the adapter says.
    """
    return _open_probe(Path(folder), name, None)


def open_run(folder: str | os.PathLike[str], name: str | None = None) -> Run:
    """Open a run folder with all its snapshots; ``name`` defaults to the folder's.

    A name that was given to the run when it was recorded goes before both. What is in the folder
    and not called step-0000012, say, is left alone.

    Raises:
        InputError: as ``open_probe``, or when a snapshot does not belong to the run.
    """
    folder = Path(folder)
    if not is_run(_folder(folder)):
        raise InputError(f"has no {RUN_NAME}: not a probe run", path=folder)
    info = _parsed(folder / RUN_NAME, probe_json.parse_run)
    name = info.name or name or _name(folder)
    snapshots: list[Snapshot] = []
    for path in _snapshots(folder):
        snapshot = _open_probe(path, name, snapshots[-1] if snapshots else None)
        _belongs(snapshot, info)
        snapshots.append(snapshot)
    return Run(name, folder, info, tuple(snapshots))


def _snapshots(folder: Path) -> list[Path]:
    try:
        found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{7,}", p.name)]
    except OSError as error:
        raise strict_json.unreadable(folder, error) from error
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _open_probe(folder: Path, name: str | None, before: Snapshot | None) -> Snapshot:
    if not is_probe(_folder(folder)):
        raise InputError(f"has no {PROBE_NAME}: not a snapshot of a probe", path=folder)
    info = _parsed(folder / PROBE_NAME, probe_json.parse_probe)
    adapter = open_adapter(folder, name or info.run or _name(folder.resolve().parent))
    path = folder / PROBE_NAME
    for module in sorted(set(info.modules) ^ set(adapter.modules)):
        what = "not in the adapter" if module in info.modules else "missing, the adapter has it"
        raise InputError(f"a module is {what}: {module}", path=path, key="modules")
    if info.base_model != adapter.base_model:
        reason = f"is {info.base_model!r}, the adapter's is {adapter.base_model!r}"
        raise InputError(reason, path=path, key="base_model")
    for module, ref in adapter.modules.items():
        if info.dtype is not None and {ref.a.dtype, ref.b.dtype} != {info.dtype}:
            raise InputError(f"is {info.dtype}, {module} is not", path=path, key="dtype")
        if ref.scale == 0:
            raise InputError("scale is 0: such a module does not learn", path=folder, key=module)
    return Snapshot(folder, info, adapter, before, _open_tensors(folder, info, adapter))


def _open_tensors(folder: Path, info: ProbeInfo, adapter: AdapterRef) -> dict[str, FactorRef]:
    path = folder / GRADIENTS_NAME
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("F64", (len(info.modules),)) for name in VALUES
    }
    for name in info.modules:
        ref = adapter.modules[name]
        for which in ("last", "mean"):
            expected[f"{which}.A.{name}"] = "F32", (ref.rank, ref.d_in)
            expected[f"{which}.B.{name}"] = "F32", (ref.d_out, ref.rank)
    return read_declared([path], expected, "this snapshot")


def _belongs(snapshot: Snapshot, run: RunInfo) -> None:
    """Refuse a snapshot that its run's description, or the one before it, contradicts."""
    info, path = snapshot.info, snapshot.path / PROBE_NAME
    if snapshot.path.name != snapshot_name(info.steps):
        reason = f"is {info.steps}, but the folder is called {snapshot.path.name}"
        raise InputError(reason, path=path, key="steps")
    for key, here, there in (
        ("run", info.run, run.name),
        ("base_model", info.base_model, run.base_model),
        ("total_steps", info.total_steps, run.total_steps),
        ("initial", info.initial, run.initial),
    ):
        unknown = key == "initial" and None in (here, there)  # since a resume
        if here != there and not unknown:
            raise InputError(f"is not what {RUN_NAME} says", path=path, key=key)
    planned = dict(zip(run.fractions, run.planned, strict=True))
    if any(planned.get(fraction) != info.steps for fraction in info.fractions):
        raise InputError(f"{RUN_NAME} has other steps for them", path=path, key="fractions")
    if snapshot.before is not None:
        one, other = (_shapes(s.adapter) for s in (snapshot, snapshot.before))
        for module in sorted(one.keys() | other.keys()):
            if one.get(module) != other.get(module):
                reason = f"is not as in {snapshot.before.path.name}"
                raise InputError(reason, path=snapshot.path, key=module)


def _shapes(adapter: AdapterRef) -> dict[str, Any]:
    return {n: (m.kind, m.rank, m.d_in, m.d_out, m.scale) for n, m in adapter.modules.items()}


def _folder(path: Path) -> Path:
    try:
        if path.is_dir():
            return path
    except ValueError as error:  # a NUL in the path
        raise strict_json.unreadable(path, error) from error
    raise InputError("is not a folder", path=path)


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


def _parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(strict_json.read(path))
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None


def _read(ref: FactorRef) -> np.ndarray:
    """The numbers of a tensor: float64 of F64, else float32. InputError when one is not finite."""
    raw = read_tensor(ref)
    values = raw if ref.dtype == "F64" else to_f32(raw, ref.dtype)
    if not np.isfinite(values).all():
        raise InputError("has NaN or Inf", path=ref.file.path, key=ref.key)
    return values
