"""Writing a probe run: its folder, its snapshots one by one, and ``run.json`` as it goes on."""

from __future__ import annotations

import json
import os
import re
from bisect import insort
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import safetensors, strict_json
from .atomic import AtomicFolder, is_temporary
from .atomic_file import AtomicFile
from .peft import CONFIG_NAME, WEIGHTS_NAME
from .probe_json import (
    GRADIENTS_NAME,
    PROBE_NAME,
    RUN_NAME,
    ProbeInfo,
    RunInfo,
    Saved,
    parse_probe,
    parse_run,
    probe_to_json,
    run_to_json,
    snapshot_name,
)
from .strict_json import Bad

_SNAPSHOT = re.compile(r"step-\d{7,}")
# What a run that is continued must have been started with.
_AGREE = ("name", "base_model", "total_steps", "fractions")


class RunWriter:
    """A run folder. ``start_run`` or ``resume_run`` gives one; ``info`` is what run.json says.

    Every method leaves the folder whole, whenever the process is killed. What the disk refuses is
    an ``InputError``.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info

    def has(self, steps: int) -> bool:
        """Whether the snapshot after that many steps is there."""
        return os.path.exists(self.path / snapshot_name(steps))

    def write_snapshot(
        self,
        info: ProbeInfo,
        config: bytes,
        factors: Mapping[str, safetensors.TensorLike],
        gradients: Mapping[str, safetensors.TensorLike],
    ) -> Path:
        """Write one snapshot, as a whole or not at all; returns its folder.

        ``config`` is the adapter_config.json, ``factors`` the tensors of its weights file,
        ``gradients`` those of gradients.safetensors (:mod:`mergeprobe_fast.io.probe`).
        """
        out = self.path / snapshot_name(info.steps)
        described = _checked(probe_to_json(info), parse_probe, out / PROBE_NAME)
        with AtomicFolder(out) as folder:
            (folder / CONFIG_NAME).write_bytes(config)
            safetensors.write(folder / WEIGHTS_NAME, factors, {"format": "pt"})
            safetensors.write(folder / GRADIENTS_NAME, gradients)
            (folder / PROBE_NAME).write_bytes(described)
        return out

    def saved(self, step: int, learning_rate_integral: float | None) -> None:
        """Note in run.json a step from which training may resume; a later call for it wins."""
        saved = [s for s in self.info.saved if s.step != step]
        insort(saved, Saved(step, learning_rate_integral), key=lambda s: s.step)
        self._rewrite(replace(self.info, saved=tuple(saved)))

    def note(self, text: str) -> None:
        """Add a sentence to run.json, once."""
        if text not in self.info.notes:
            self._rewrite(replace(self.info, notes=(*self.info.notes, text)))

    def _rewrite(self, info: RunInfo) -> None:
        out = self.path / RUN_NAME
        described = _checked(run_to_json(info), parse_run, out)
        with AtomicFile(out, overwrite=True) as file:
            file.write_bytes(described)
        self.info = info


def start_run(out: str | os.PathLike[str], info: RunInfo, *, overwrite: bool = False) -> RunWriter:
    """Make the folder of a new run. A run that is there is replaced with ``overwrite`` only.

    Raises:
        InputError: when something else than a run is there, or the folder cannot be made.
    """
    out = Path(os.path.abspath(out))
    described = _checked(run_to_json(info), parse_run, out / RUN_NAME)
    contents: list[str] | None = None
    if out.is_dir() and not out.is_symlink():
        contents = _contents(out)
        if contents and not overwrite:
            raise InputError("exists; pass overwrite=True to replace a run", path=out)
    with AtomicFolder(out, contents is not None, contents=contents) as folder:
        (folder / RUN_NAME).write_bytes(described)
    return RunWriter(out, info)


def resume_run(out: str | os.PathLike[str], info: RunInfo) -> RunWriter:
    """Go on with the run in ``out``; its notes, its initial factors and its name are kept.

    Raises:
        InputError: when there is no run, or one of another name, base model, number of steps or
            fractions.
    """
    path = Path(os.path.abspath(out))
    try:
        found = parse_run(strict_json.read(path / RUN_NAME))
    except Bad as bad:
        raise InputError(bad.reason, path=path / RUN_NAME, key=bad.key) from None
    for key in _AGREE:
        there, now = getattr(found, key), getattr(info, key)
        if there != now and not (key == "name" and now is None):
            reason = f"is {there!r} in the run that is there, and {now!r} in this one"
            raise InputError(reason, path=path / RUN_NAME, key=key)
    return RunWriter(path, found)


def _contents(out: Path) -> list[str]:
    """What is in the folder; InputError when it is neither empty nor a run."""
    try:
        present = sorted(os.listdir(out))
    except OSError as error:
        raise strict_json.unreadable(out, error) from error
    if present and RUN_NAME not in present:
        raise InputError(f"exists and has no {RUN_NAME}: not a probe run", path=out)
    for name in present:
        snapshot = _SNAPSHOT.fullmatch(name) and (out / name / PROBE_NAME).is_file()
        if not (name == RUN_NAME or snapshot or is_temporary(name)):
            reason = f"holds {name!r}, which is no part of a probe run; not overwritten"
            raise InputError(reason, path=out)
    return present


def _checked(value: dict[str, Any], parse: Any, path: Path) -> bytes:
    """The bytes of a JSON file; what the reader would refuse is not written."""
    try:
        parse(value)
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")
