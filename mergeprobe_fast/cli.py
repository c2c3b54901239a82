"""The command line. Exit codes: 0 ok, 1 the answer is no, 2 wrong use or bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import mergeprobe_fast
from mergeprobe_fast.errors import InputError, MergeprobeError

OK, NO, BAD = 0, 1, 2
SAME_BASE = "take different base model names for one model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _termination_as_interrupt():
            return _run(arguments)
    except BrokenPipeError:
        # The reader went away: no traceback, and none at shutdown either.
        _drop_stdout()
        return 141
    except OSError as error:  # every file has been dealt with: this is stdout
        _drop_stdout()
        return _fail(f"the output cannot be written: {error.strerror or error}")


def _drop_stdout() -> None:
    """Nothing more goes to stdout, not even at shutdown."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NUMBERS = re.compile(r"[-+\d.eE,]*\d[-+\d.eE,]*")


def _join_weights(arguments: list[str]) -> list[str]:
    """``--weights 0.5 -0.5 a b`` as ``--weights=0.5,-0.5 a b``: paths are no weights."""
    out: list[str] = []
    words = iter(arguments)
    for word in words:
        if word != "--weights":
            out.append(word)
            continue
        numbers = []
        for word in words:
            if not _NUMBERS.fullmatch(word):
                # Not a number: the next argument, or the weights themselves when there are none.
                out += [f"--weights={','.join(numbers)}", word] if numbers else ["--weights", word]
                break
            numbers.append(word)
        else:
            out.append(f"--weights={','.join(numbers)}" if numbers else "--weights")
    return out


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up as Ctrl-C does; a caller's own handlers come back afterwards."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str]) -> int:
    try:
        options = _parser().parse_args(_join_weights(arguments))
    finally:
        if sys.stdout:
            sys.stdout.flush()  # --help, too, may find nobody listening
    options.command_line = shlex.join(["mergeprobe-fast", *arguments])
    try:
        code = options.run(options)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except MergeprobeError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)


def _fail(message: str, code: int = BAD) -> int:
    _complain(message)
    return code


def _complain(message: str) -> None:
    """One line to stderr; a name from a file must not move the cursor or fail to encode."""
    line = " ".join(message.split())
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in line
    )
    encoding = sys.stderr.encoding or "ascii"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(f"mergeprobe-fast: {shown}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message} (see {self.prog} --help)"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mergeprobe-fast",
        description="Which LoRA adapters can live together, and the merge itself.",
    )
    parser.add_argument(
        "--version", action="version", version=f"mergeprobe-fast {mergeprobe_fast.__version__}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
        sub.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
        sub.add_argument("--threads", type=int, metavar="N", help="default: the cores available")
        sub.add_argument("--same-base", action="store_true", help=SAME_BASE)
        sub.add_argument(
            "--skip-bad", action="store_true", help="go on without adapters that cannot be used"
        )

    check = command("check", _check, "Say for every tensor whether it is used, and why not.")
    check.add_argument("paths", nargs="+", metavar="PATH", help="adapters, or folders of them")
    check.add_argument("--same-base", action="store_true", help=SAME_BASE)

    screen = command("screen", _screen, "Compare every pair of adapters of a zoo.")
    screen.add_argument("zoo", nargs="+", metavar="ZOO", help="a folder of adapters, or adapters")
    screen.add_argument(
        "--features", default="default", metavar="F,F", help="default, all, or names"
    )
    writes(screen)

    merge = command("merge", _merge, "Merge adapters into one that PEFT loads as it is.")
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapters, or folders")
    merge.add_argument("--method", default="svd", metavar="M", help="svd (default), linear or cat")
    merge.add_argument(
        "--weights", metavar="W,W",
        help="one per adapter, in the order given (default: 1/N each)",
    )  # fmt: skip
    merge.add_argument("--rank", type=int, metavar="R", help="rank of the result")
    merge.add_argument(
        "--dtype", type=str.upper, choices=("F32", "BF16", "F16"), help="default: as the inputs"
    )
    writes(merge)

    command("doctor", _doctor, "Say what was built, what is active, and why.")
    return parser


def _console() -> Any:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1, which here means "no"
            raise BrokenPipeError

    return Plain(highlight=False)


def _print_json(value: Any) -> None:
    # ASCII: stdout may have any encoding.
    print(json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False))


def _open(paths: Sequence[str], options: argparse.Namespace) -> Any:
    from mergeprobe_fast.zoo import open_zoo

    given: Any = paths[0] if len(paths) == 1 else paths
    zoo = open_zoo(given, same_base=options.same_base, skip_bad=options.skip_bad)
    for skipped in zoo.skipped:
        _complain(f"left out: {skipped.reason}")
    return zoo


def _screen(options: argparse.Namespace) -> int:
    from mergeprobe_fast.engine.passes import steps
    from mergeprobe_fast.features import select
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.report.screen import CONTENTS, screen_report, write_screen
    from mergeprobe_fast.report.terminal import print_screen_summary, progress
    from mergeprobe_fast.screening import screen

    started = time.perf_counter()
    names = options.features.split(",") if "," in options.features else options.features
    features = select(names)
    zoo = _open(options.zoo, options)
    console = None if options.json else _console()
    inputs = [a.path for a in zoo]
    with AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS) as folder:
        result = None
        while result is None:
            try:
                if console is None:
                    result = screen(zoo, features, threads=options.threads)
                else:
                    with progress(console, steps(zoo, features), "modules") as advance:
                        result = screen(zoo, features, threads=options.threads, progress=advance)
            except InputError as error:
                # What only the weights themselves show.
                if not options.skip_bad:
                    raise
                zoo = zoo.without(error)
                _complain(f"left out: {error}")
        report = screen_report(result, options.command_line)
        summary = write_screen(folder, result, report)
    if console is None:
        _print_json({**summary, "out": str(options.out)})
        return OK
    print_screen_summary(report, console, options.out)
    console.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _merge(options: argparse.Namespace) -> int:
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.merging import merge
    from mergeprobe_fast.merging.adapter import CONTENTS
    from mergeprobe_fast.report.merge import print_merge_summary
    from mergeprobe_fast.report.terminal import progress

    started = time.perf_counter()
    weights = _numbers(options.weights)
    zoo = _open(options.adapters, options)
    inputs = [a.path for a in zoo]
    AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS).check()
    arguments = {
        "method": options.method, "weights": weights, "rank": options.rank,
        "dtype": options.dtype, "threads": options.threads,
    }  # fmt: skip
    if options.json:
        _print_json(merge(zoo, **arguments).save(options.out, overwrite=options.overwrite))
        return OK
    console = _console()
    with progress(console, len(zoo.modules), "modules") as advance:
        merged = merge(zoo, progress=advance, **arguments)
        report = merged.save(options.out, overwrite=options.overwrite)
    print_merge_summary(report, console, options.out)
    console.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(str(error), key="--weights") from None


def _check(options: argparse.Namespace) -> int:
    from mergeprobe_fast.report.check import check_paths, print_coverage

    result = check_paths(options.paths, same_base=options.same_base)
    if options.json:
        _print_json(result.to_dict())
    else:
        print_coverage(result, _console())
    return OK if result.ok else NO


def _doctor(options: argparse.Namespace) -> int:
    from mergeprobe_fast.doctor import examine
    from mergeprobe_fast.report.doctor import print_doctor

    facts = examine()
    if options.json:
        _print_json(facts)
    else:
        print_doctor(facts, _console())
    return OK if facts["ok"] else NO
