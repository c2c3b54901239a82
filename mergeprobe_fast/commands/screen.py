"""``screen``: compare every pair of adapters of a zoo."""

from __future__ import annotations

import argparse
import os
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
    runs_on,
    writes,
)
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("screen", run, "Compare every pair of adapters of a zoo.")
    sub.add_argument(
        "zoo", nargs="*", metavar="ZOO",
        help="a folder of adapters, or adapters (default: the adapters in the probes)",
    )  # fmt: skip
    sub.add_argument(
        "--features", default="default", metavar="F,F",
        help="default, all, 2601.22285, gradience, or names ('mergeprobe-fast features' has them)",
    )  # fmt: skip
    sub.add_argument(
        "--entries", type=_entries, metavar="N|exact",
        help="statistics of entries too, from so many of each adapter, or from all (all has them "
        "from 4 million)",
    )  # fmt: skip
    reads_recorded(sub)
    sub.add_argument(
        "--probes", type=Path, metavar="RUNS",
        help="what the training callback wrote: a run, or a folder of runs named like the adapters",
    )  # fmt: skip
    sub.add_argument(
        "--at", type=fraction, metavar="F",
        help="the probes at this share of training, say 5%% (default: the latest)",
    )  # fmt: skip
    sub.add_argument(
        "--base", type=Path, metavar="BASE",
        help="folder of the base model: say how large updates are beside its weights",
    )  # fmt: skip
    runs_on(sub, precision=True)
    writes(sub)
    opens(sub)


def _entries(text: str) -> str | int:
    if text == "exact":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected exact or how many, got {text!r}")


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.commands._kept import LeftOut, alone_in
    from mergeprobe_fast.engine.kept import kept_in, remove_blocks
    from mergeprobe_fast.features import select
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.ops.device import open_device
    from mergeprobe_fast.report.screen import CONTENTS, screen_report, write_screen
    from mergeprobe_fast.report.terminal import print_screen_summary
    from mergeprobe_fast.screening import screen, steps

    started = time.perf_counter()
    names: list[Any] = options.features.split(",")
    if options.entries is not None:
        from mergeprobe_fast.features.entries import entry_features

        names.append(entry_features(options.entries))
    probes, zoo = _opened(options)
    recorded = _recorded(zoo, probes, options)
    chosen = select(names, recorded)
    shown = None if options.json else console()
    if shown is not None and "all" in options.features.split(","):
        shown.print(_costs(zoo, chosen, recorded, options.threads), style="dim")
    device = open_device(options.device, options.precision)
    inputs = [a.path for a in zoo]
    beside = (options.calibration, options.probes, options.base)
    inputs += [path for path in beside if path is not None]
    out = Path(os.path.abspath(options.out))
    # File names are limited to 255 bytes.
    stem = os.fsencode(out.name)[:200].decode("utf-8", "ignore")
    blocks = out.with_name(f".{stem}.blocks")
    replaced = AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS)
    with replaced as folder, alone_in(blocks):
        result, left_out = None, LeftOut(blocks, zoo) if options.skip_bad else None
        for error in left_out.errors if left_out else ():
            zoo = _without(zoo, error)
            recorded = _recorded(zoo, probes, options)
        while result is None:
            try:
                with progress_of(shown, steps(zoo, chosen, device), "modules") as advance:
                    result = screen(
                        zoo, names, recorded=recorded, threads=options.threads, progress=advance,
                        keep=blocks, device=device,
                    )  # fmt: skip
            except KeyboardInterrupt:
                if kept := kept_in(blocks):
                    complain(f"{kept} are kept in {blocks}; the same command goes on from there")
                raise
            except InputError as error:
                # What only the weights themselves show.
                if left_out is None:
                    raise
                zoo = _without(zoo, error)
                recorded = _recorded(zoo, probes, options)
                left_out.add(error)
        report = screen_report(result, options.command_line)
        summary = write_screen(folder, result, report)
    remove_blocks(blocks)
    if shown is None:
        print_json({**summary, "out": str(options.out)})
        return OK
    print_screen_summary(report, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _without(zoo: Any, error: InputError) -> Any:
    """The zoo less the adapter that an error names, and says so."""
    zoo = zoo.without(error)
    complain(f"left out: {error}")
    return zoo


def _costs(zoo: Any, chosen: Any, recorded: Any, threads: int | None) -> str:
    """What all of it will cost, in one line."""
    from mergeprobe_fast.features.cost import cost, measured_rate, roughly

    expected = cost(zoo, chosen, recorded)
    seconds = roughly(expected.seconds(measured_rate(threads)))
    columns = len(chosen.features) + len(chosen.columns)
    pairs = len(zoo) * (len(zoo) - 1) // 2
    largest = sorted(expected.parts, key=lambda part: -expected.parts[part])[:2]
    said = f"{columns} statistics of {pairs} pairs: {seconds}, most of it {' and '.join(largest)}"
    if recorded.calibration is not None or recorded.probes is not None:
        said += "; what was recorded comes on top"
    return said


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

    return open_recorded(
        zoo, options.calibration, domains_of(options, zoo), probes, options.at, options.base
    )
