"""``plan``: which adapters of a zoo to merge, how, and which to route."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    NO,
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

UNDECIDED = 3
_TICKS = 100


def add(command: AddCommand) -> None:
    sub = command("plan", run, "Which adapters of a zoo to merge, how, and which to route.")
    sub.add_argument("zoo", nargs="+", metavar="ZOO", help="a folder of adapters, or adapters")
    reads_recorded(sub)
    sub.add_argument(
        "--probes", type=Path, metavar="RUNS",
        help="judge every adapter by its snapshot: what the training callback wrote",
    )  # fmt: skip
    sub.add_argument(
        "--at", type=fraction, metavar="F",
        help="the probes at this share of training, say 5%% (default: the latest)",
    )  # fmt: skip
    sub.add_argument(
        "--model", type=Path, metavar="FILE", help="a predictor (default: the shipped one)"
    )
    sub.add_argument(
        "--cost", action="append", default=[], metavar="FILE|NAME=VALUE", dest="costs",
        help="costs: a YAML or JSON file, or adapter, request, average, worst, floor_on",
    )  # fmt: skip
    sub.add_argument(
        "--floor", type=float, metavar="R",
        help="what every member of a merged group must keep (default 0.9)",
    )  # fmt: skip
    sub.add_argument(
        "--resident", type=_at_least(1), metavar="K",
        help="at most K adapters resident, merged or not; without --floor, what keeps most so",
    )  # fmt: skip
    sub.add_argument(
        "--actions", metavar="A,A", help="merge, reweight, prune, regmean, route (default: all)"
    )
    sub.add_argument(
        "--costly", type=_at_least(0), metavar="N",
        help="sets that may be pruned or merged by data to see what is left (default: 48)",
    )  # fmt: skip
    sub.add_argument("--apply", action="store_true", help="write the merged adapters, too")
    sub.add_argument(
        "--max-rank", type=_at_least(1), metavar="R",
        help="with --apply: cut what is written to this rank",
    )  # fmt: skip
    sub.add_argument(
        "--calibrate-with", type=_at_least(1), metavar="K",
        help="write the K merges whose evaluation would tell most, as a table to fill in",
    )  # fmt: skip
    sub.add_argument(
        "--measured", type=Path, metavar="FILE", help="that table, filled in: fit to it first"
    )
    writes(sub)
    runs_on(sub)
    opens(sub)


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.planning.measure import measured_file
    from mergeprobe_fast.planning.plan_types import ACTIONS
    from mergeprobe_fast.planning.planner import COSTLY
    from mergeprobe_fast.planning.zoo_plan import plan
    from mergeprobe_fast.report.plan import APPLIED_NAME, MEASURE_NAME, print_plan_summary
    from mergeprobe_fast.report.plan import write_plan as write

    started = time.perf_counter()
    costs = _costs(options)
    if options.max_rank is not None and not options.apply:
        raise InputError("needs --apply: it is of what is written", key="--max-rank")
    if options.apply and options.probes is not None:
        raise InputError("judges unfinished adapters: nothing to merge yet", key="--probes")
    actions = ACTIONS if options.actions is None else tuple(options.actions.split(","))
    zoo = open_zoo(options.zoo, options)
    shown = None if options.json else console()
    given = (options.calibration, options.probes, options.model, options.measured)
    inputs = [a.path for a in zoo] + [path for path in given if path is not None]
    out = AtomicFolder(options.out, options.overwrite, inputs=inputs)
    out.check()
    _check_replaced(options)
    with out as folder:
        found = None
        while found is None:
            try:
                with _reading(shown, zoo) as reading, _planning(shown) as told:
                    found = plan(
                        zoo, calibration=options.calibration, domains=domains_of(options, zoo),
                        probes=options.probes, at=options.at, model=options.model, costs=costs,
                        actions=actions, measured=options.measured, threads=options.threads,
                        costly=COSTLY if options.costly is None else options.costly,
                        resident=options.resident, reading=reading, progress=told,
                        device=options.device,
                    )  # fmt: skip
            except InputError as error:
                if not options.skip_bad:
                    raise
                zoo = zoo.without(error)
                complain(f"left out: {error}")
        report = write(folder, found, options.command_line)
        if options.calibrate_with is not None:
            table = measured_file(found, options.calibrate_with)
            (folder / MEASURE_NAME).write_text(table, encoding="utf-8")
        served = None
        if options.apply and found.decided:
            given = {} if options.calibration is None else {"calibration": options.calibration}
            with progress_of(shown, len(found.groups) + 1, "groups") as advance:
                served = found.apply(
                    folder / APPLIED_NAME, zoo, max_rank=options.max_rank,
                    threads=options.threads, progress=advance, device=options.device, **given,
                )  # fmt: skip
    if served is not None:  # it was written under another name
        served = replace(served, path=options.out / APPLIED_NAME)
    if shown is None:
        applied = None if served is None else {"notes": list(served.notes)}
        print_json({**report, "out": str(options.out), "applied": applied,
                    "vllm": None if served is None else served.vllm_command})  # fmt: skip
    else:
        print_plan_summary(found, shown, options.out)
        if served is not None:
            _print_served(served, shown)
        shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    if not found.decided:
        return UNDECIDED
    return OK if found.merged else NO


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text!r}")
        return value

    return read


def _print_served(served: Any, shown: Any) -> None:
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    for note in served.notes:
        line = Text(View(shown).clean(note), overflow="fold")
        shown.print(Text("note: ", style="yellow") + line)
    if served.vllm_command is not None:
        shown.print("to serve them, as applied/vllm.sh does:", style="dim")
        shown.print(served.vllm_command, markup=False, soft_wrap=True)


def _costs(options: argparse.Namespace) -> Any:
    from mergeprobe_fast.planning.costs import load_costs, parse_cost

    files = [text for text in options.costs if "=" not in text]
    if len(files) > 1:
        raise InputError(f"two files: {files[0]}, {files[1]}", key="--cost")
    given: dict[str, Any] = {}
    for text in options.costs:
        if "=" in text:
            name, value = parse_cost(text)
            if name in given:
                raise InputError(f"{name} is given twice", key="--cost")
            given[name] = value
    if options.floor is not None:
        if "floor" in given:
            raise InputError("is given twice", key="--floor")
        given["floor"] = options.floor
    return load_costs(files[0] if files else None, given)


def _check_replaced(options: argparse.Namespace) -> None:
    """Only what this command wrote, or an empty folder, may be replaced."""
    from mergeprobe_fast.planning.artefacts import CONTENTS as APPLIED
    from mergeprobe_fast.report.plan import APPLIED_NAME, CONTENTS, MEASURE_NAME

    if not options.out.is_dir():
        return
    for folder, known in (
        (options.out, {*CONTENTS, MEASURE_NAME, APPLIED_NAME}),
        (options.out / APPLIED_NAME, {*APPLIED}),
    ):
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        foreign = [name for name in present if name not in known]
        if foreign:
            raise InputError(f"holds {foreign[0]!r}, which this command does not write; "
                             "not overwritten", path=folder)  # fmt: skip
        if folder == options.out and present and CONTENTS[0] not in present:
            raise InputError(f"has no {CONTENTS[0]}: not a result of this command; not overwritten",
                             path=folder)  # fmt: skip


def _reading(shown: Any, zoo: Any) -> Any:
    return progress_of(shown, len(zoo.modules), "modules") if shown else nullcontext()


@contextmanager
def _planning(shown: Any) -> Iterator[Callable[[Any], None] | None]:
    """What is being planned, on one line of a terminal, in place."""
    if shown is None or not shown.is_terminal or shown.is_dumb_terminal:
        yield None
        return
    with shown.status("planning") as status:

        def told(progress: Any) -> None:
            status.update(f"planning: {progress.judged:,} members of sets judged, "
                          f"{progress.resident} adapters resident")  # fmt: skip

        yield told
