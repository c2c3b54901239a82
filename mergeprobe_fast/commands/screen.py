"""``screen``: compare every pair of adapters of a zoo."""

from __future__ import annotations

import argparse
import time

from mergeprobe_fast.commands._common import (
    OK,
    AddCommand,
    complain,
    console,
    open_zoo,
    opens,
    print_json,
    progress_of,
    writes,
)
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("screen", run, "Compare every pair of adapters of a zoo.")
    sub.add_argument("zoo", nargs="+", metavar="ZOO", help="a folder of adapters, or adapters")
    sub.add_argument("--features", default="default", metavar="F,F", help="default, all, or names")
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
    features = select(names)
    zoo = open_zoo(options.zoo, options)
    shown = None if options.json else console()
    inputs = [a.path for a in zoo]
    with AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS) as folder:
        result = None
        while result is None:
            try:
                with progress_of(shown, steps(zoo, features), "modules") as advance:
                    result = screen(zoo, features, threads=options.threads, progress=advance)
            except InputError as error:
                # What only the weights themselves show.
                if not options.skip_bad:
                    raise
                zoo = zoo.without(error)
                complain(f"left out: {error}")
        report = screen_report(result, options.command_line)
        summary = write_screen(folder, result, report)
    if shown is None:
        print_json({**summary, "out": str(options.out)})
        return OK
    print_screen_summary(report, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK
