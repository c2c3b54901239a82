"""Probe runs by name: which there are below a folder, and which snapshot of each to take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import natural, text
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.atomic import is_temporary
from mergeprobe_fast.io.probe import Run, Snapshot, is_run, open_run
from mergeprobe_fast.zoo import Paths, Zoo

__all__ = ["Probes", "find_probes"]


class Probes(Mapping[str, tuple[Snapshot, ...]]):
    """Probe runs: name -> snapshots in the order of steps, in natural order of the names.

    A fraction of training is one that was asked for when the run was recorded; snapshots of
    different runs are compared at the same one only.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = {run.name: run for run in runs}

    def __getitem__(self, name: str) -> tuple[Snapshot, ...]:
        return self.runs[name].snapshots

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"<Probes of {len(self)} runs: {', '.join(list(self)[:5])}>"

    def at(self, fraction: float) -> dict[str, Snapshot]:
        """Every run's snapshot at a fraction; InputError naming a run that has none."""
        return self._at(list(self), fraction)

    def match(
        self, names: Sequence[str], at: float | None = None, *, allow_early: bool = False
    ) -> tuple[Snapshot | None, ...]:
        """The snapshot of each adapter by name; None for those that no run is named like.

        ``at`` is the fraction; by default the largest one that all these runs have and at which
        none of them is too early.

        Raises:
            InputError: naming a run without a snapshot there, or, unless ``allow_early``, one
                whose snapshot is too early (fewer than 5 steps) to say anything.
        """
        chosen = self._choose([name for name in names if name in self.runs], at, allow_early)
        return tuple(chosen.get(name) for name in names)

    def zoo(self, at: float | None = None, *, allow_early: bool = False) -> Zoo:
        """The snapshots of all runs as a zoo, adapters named like the runs.

        Which snapshots, and errors, as in ``match``; and as in ``open_zoo``.
        """
        adapters: list[AdapterRef] = [
            s.adapter for s in self._choose(list(self), at, allow_early).values()
        ]
        return Zoo(adapters)

    def _choose(
        self, names: Sequence[str], at: float | None, allow_early: bool
    ) -> dict[str, Snapshot]:
        fractions = [at] if at is not None else self._common(names)
        worst: Snapshot | None = None
        for fraction in fractions:
            chosen = self._at(names, fraction)
            early = [s for s in chosen.values() if s.too_early and not allow_early]
            if not early:
                return chosen
            worst = worst or early[0]
        if worst is None:  # no run at all
            return {}
        reason = f"{worst.adapter.name}: {worst.steps} steps are too early to say anything"
        raise InputError(reason, path=worst.path)

    def _common(self, names: Sequence[str]) -> list[float]:
        """Fractions that all of these runs have a snapshot at, the largest first."""
        for name in names:
            if not self[name]:
                raise InputError(f"{name} has no snapshot yet", path=self.runs[name].path)
        if not names:
            return []
        known = [f for snapshot in self[names[0]] for f in snapshot.info.fractions]
        common = [f for f in known if all(_find(self[name], f) for name in names)]
        if not common:
            odd = next(name for name in names if not _find(self[name], known[-1]))
            reason = f"{odd} has no snapshot at {known[-1]:g}, and the runs share no other fraction"
            raise InputError(reason, path=self.runs[odd].path)
        return sorted(common, reverse=True)

    def _at(self, names: Sequence[str], fraction: float) -> dict[str, Snapshot]:
        if isinstance(fraction, bool) or not isinstance(fraction, Real):
            raise InputError(f"expected a share of training, got {fraction!r}", key="at")
        chosen = {}
        for name in names:
            found = _find(self[name], fraction)
            if found is None:
                listed = ", ".join(f"{f:g}" for s in self[name] for f in s.info.fractions)
                reason = f"{name} has no snapshot at {fraction:g}, only at {listed or 'none yet'}"
                raise InputError(reason, path=self.runs[name].path)
            chosen[name] = found
        return chosen


def _find(snapshots: Sequence[Snapshot], fraction: float) -> Snapshot | None:
    for snapshot in snapshots:
        if any(math.isclose(f, fraction, rel_tol=1e-9) for f in snapshot.info.fractions):
            return snapshot
    return None


def find_probes(paths: Paths) -> Probes:
    """Open a probe run, a folder of them (searched recursively), or a list of these.

    A run is named as it was when it was recorded, else like its folder: relative to the folder
    that was searched, as adapters of a zoo are.

    Raises:
        InputError: nothing found, two runs of one name, a run that cannot be used.
    """
    listed = [Path(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    found: list[tuple[str | None, Path]] = []
    for path in listed:
        found += [(None, path)] if is_run(path) else _below(path)
    if not found:
        raise InputError("no probe runs given")
    runs: dict[str, Run] = {}
    for name, path in found:
        run = open_run(path, name)
        if run.name in runs:
            reason = f"is called {run.name!r}, and so is {text(runs[run.name].path)}"
            raise InputError(reason, path=path)
        runs[run.name] = run
    return Probes([runs[name] for name in sorted(runs, key=natural)])


def _below(root: Path) -> list[tuple[str | None, Path]]:
    """(relative path, path) of the runs below a folder."""
    inside: list[Path] = []
    try:
        _walk(root, tuple(root.resolve().parents), inside)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be searched: {reason}", path=root) from error
    if not inside:
        raise InputError("no probe runs in this folder (run.json)", path=root)
    return [(text(path.relative_to(root).as_posix()), path) for path in inside]


def _walk(here: Path, above: tuple[Path, ...], inside: list[Path]) -> None:
    """Collect the runs below ``here``; ``above`` are the real paths of the folders it is in."""
    real = here.resolve()
    for path in sorted(here.iterdir()):
        # A link to a folder that it lies in would be walked for ever.
        looped = path.is_symlink() and path.resolve() in (*above, real)
        if is_temporary(path) or looped or not path.is_dir():
            continue
        if is_run(path):
            inside.append(path)
        else:  # a trained adapter's folder too: its probe may lie in it
            _walk(path, (*above, real), inside)
