"""What was recorded from running models, as far as it concerns the adapters of one zoo."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration
    from mergeprobe_fast.io.checkpoint import Checkpoint
    from mergeprobe_fast.io.points import Points
    from mergeprobe_fast.io.probe import Snapshot
    from mergeprobe_fast.probes import Probes

    Folder = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Recorded:
    """Calibration, probes and base weights beside a zoo; what is None was not given."""

    calibration: Calibration | None = None
    domains: tuple[str, ...] = ()  # of the calibration, one per adapter; empty without one
    points: Points | None = None  # what the calibration has of ``--adapters``
    probes: tuple[Snapshot | None, ...] | None = None  # one per adapter, None: it has no probe
    notes: tuple[str, ...] = ()  # for readers of a report
    base: Checkpoint | None = None


NOTHING = Recorded()


def lacks_calibration(recorded: Recorded) -> str | None:
    """What is missing, in a phrase, where there is no calibration."""
    return "a calibration" if recorded.calibration is None else None


def lacks_output_moments(recorded: Recorded) -> str | None:
    """The same where there is none with output moments."""
    if recorded.calibration is None or not recorded.calibration.has_output_moments:
        return "a calibration with output moments"
    return None


def open_recorded(
    zoo: Zoo,
    calibration: Calibration | Folder | None = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    probes: Probes | Folder | None = None,
    at: float | None = None,
    base: Folder | None = None,
) -> Recorded:
    """Open what belongs to a zoo.

    Args:
        calibration: folder that ``calibrate`` wrote, or an opened one.
        domains: of the calibration, per adapter; default: by the adapters' names.
        probes: folder of probe runs named like the adapters, or found ones.
        at: the fraction of training of the snapshots to take; default: the latest one that is not
            too early.
        base: folder of the base model, whose weights the adapters are added to.

    Raises:
        InputError: what cannot be read, an adapter without a domain, no adapter with a probe.
    """
    opened, points, found = None, None, None
    chosen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if calibration is not None:
        from mergeprobe_fast.io.calibration import Calibration, open_calibration
        from mergeprobe_fast.io.points import has_points, open_points

        opened = calibration
        if not isinstance(opened, Calibration):
            opened = open_calibration(opened)
        chosen = assign_domains(zoo.names, list(opened.domains), domains)
        points = open_points(opened.path) if has_points(opened.path) else None
        without = [n for n in zoo.names if points and f"trained:{n}" not in points.points]
        if without:
            notes += (f"calibrated without a point of: {', '.join(without)}",)
        if zoo.base_model is not None and zoo.base_model != opened.base_model:
            notes += (f"calibration of {opened.base_model!r}, taken to be {zoo.base_model!r}",)
        notes += tuple(f"calibration: {note}" for note in opened.notes)
    elif domains is not None:
        raise InputError("given without a calibration", key="domains")
    if probes is not None:
        from mergeprobe_fast.probes import Probes, find_probes

        runs = probes if isinstance(probes, Probes) else find_probes(probes)
        found = runs.match(zoo.names, at)
        if not any(found):
            known = ", ".join(list(runs)[:5])
            raise InputError(f"none is named like an adapter of the zoo; there are: {known}",
                             key="probes")  # fmt: skip
        without = [n for n, s in zip(zoo.names, found, strict=True) if s is None]
        if without:
            notes += (f"no probe of: {', '.join(without)}",)
    elif at is not None:
        raise InputError("given without probes", key="at")
    checkpoint = None
    if base is not None:
        from mergeprobe_fast.io.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(base)
    return Recorded(opened, chosen, points, found, notes, checkpoint)
