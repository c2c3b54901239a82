"""``screen``: compare every pair of adapters of a zoo."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    OK,
    AddCommand,
    complain,
    console,
    domains_of,
    fraction,
    open_zoo,
    opens,
    print_json,
    progress_of,
    reads_recorded,
    writes,
)
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("screen", run, "Compare every pair of adapters of a zoo.")
    sub.add_argument(
        "zoo", nargs="*", metavar="ZOO",
        help="a folder of adapters, or adapters (default: the adapters in the probes)",
    )  # fmt: skip
    sub.add_argument("--features", default="default", metavar="F,F", help="default, all, or names")
    reads_recorded(sub)
    sub.add_argument(
        "--probes", type=Path, metavar="RUNS",
        help="what the training callback wrote: a run, or a folder of runs named like the adapters",
    )  # fmt: skip
    sub.add_argument(
        "--at", type=fraction, metavar="F",
        help="the probes at this share of training, say 5%% (default: the latest)",
    )  # fmt: skip
    writes(sub)
    opens(sub)


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.engine.passes import steps
    from mergeprobe_fast.features import select
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.report.screen import CONTENTS, screen_report, write_screen
    from mergeprobe_fast.report.terminal import print_screen_summary
    from mergeprobe_fast.screening import screen

    started = time.perf_counter()
    names = options.features.split(",") if "," in options.features else options.features
    probes, zoo = _opened(options)
    recorded = _recorded(zoo, probes, options)
    features = select(names, recorded).features
    shown = None if options.json else console()
    inputs = [a.path for a in zoo]
    inputs += [path for path in (options.calibration, options.probes) if path is not None]
    with AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS) as folder:
        result = None
        while result is None:
            try:
                with progress_of(shown, steps(zoo, features), "modules") as advance:
                    result = screen(
                        zoo, names, recorded=recorded, threads=options.threads, progress=advance
                    )
            except InputError as error:
                # What only the weights themselves show.
                if not options.skip_bad:
                    raise
                zoo = zoo.without(error)
                recorded = _recorded(zoo, probes, options)
                complain(f"left out: {error}")
        report = screen_report(result, options.command_line)
        summary = write_screen(folder, result, report)
    if shown is None:
        print_json({**summary, "out": str(options.out)})
        return OK
    print_screen_summary(report, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _opened(options: argparse.Namespace) -> tuple[Any, Any]:
    """The probes, if any, and the zoo: the one that is named, or the adapters in the probes."""
    probes = None
    if options.probes is not None:
        from mergeprobe_fast.probes import find_probes

        probes = find_probes(options.probes)
    if options.zoo:
        return probes, open_zoo(options.zoo, options)
    if probes is None:
        raise InputError("none given; name a zoo, or --probes", key="ZOO")
    return probes, probes.zoo(options.at)


def _recorded(zoo: Any, probes: Any, options: argparse.Namespace) -> Any:
    from mergeprobe_fast.recorded import open_recorded

    return open_recorded(zoo, options.calibration, domains_of(options, zoo), probes, options.at)
