"""The command line. Exit codes: 0 ok, 1 the answer is no, 2 wrong use or bad input."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import mergeprobe_fast
from mergeprobe_fast.commands import (
    calibrate,
    evaluate,
    fit,
    inspect,
    merge,
    merge_peft,
    plan,
    screen,
)
from mergeprobe_fast.commands._common import BAD, complain
from mergeprobe_fast.errors import MergeprobeError


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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _fail(f"out of memory on the device: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written is left", 130)


def _fail(message: str, code: int = BAD) -> int:
    complain(message)
    return code


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

    for part in (screen, plan, merge, calibrate, inspect, fit, evaluate, merge_peft):
        part.add(command)
    return parser
