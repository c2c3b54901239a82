"""What the commands share: exit codes, messages, options, opening a zoo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OK, NO, BAD = 0, 1, 2
SAME_BASE = "take different base model names for one model"

# Adds a command to the parser: name, what runs it, one sentence; returns its parser.
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def complain(message: str) -> None:
    """One line to stderr; a name from a file must not move the cursor or fail to encode."""
    line = " ".join(message.split())
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in line
    )
    encoding = sys.stderr.encoding or "ascii"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(f"mergeprobe-fast: {shown}", file=sys.stderr)


def print_json(value: Any) -> None:
    """To stdout, as ASCII: stdout may have any encoding."""
    print(json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False))


def console() -> Any:
    """A rich console on stdout."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1, which here means "no"
            raise BrokenPipeError

    return Plain(highlight=False)


@contextmanager
def progress_of(shown: Any, total: int, label: str) -> Iterator[Callable[..., None] | None]:
    """A progress bar on ``shown``, a console; nothing when it is None."""
    if shown is None:
        yield None
        return
    from mergeprobe_fast.report.terminal import progress

    with progress(shown, total, label) as advance:
        yield advance


def writes(sub: argparse.ArgumentParser, out: str = "folder to write") -> None:
    """The options of a command that writes."""
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help=out)
    sub.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    sub.add_argument("--threads", type=int, metavar="N", help="default: the cores available")


def opens(sub: argparse.ArgumentParser) -> None:
    """The options of a command that opens a zoo."""
    sub.add_argument("--same-base", action="store_true", help=SAME_BASE)
    sub.add_argument(
        "--skip-bad", action="store_true", help="go on without adapters that cannot be used"
    )


def open_zoo(paths: Sequence[Any], options: argparse.Namespace) -> Any:
    """The zoo of these paths; what was left out is said on stderr."""
    from mergeprobe_fast.zoo import open_zoo

    given: Any = paths[0] if len(paths) == 1 else list(paths)
    zoo = open_zoo(given, same_base=options.same_base, skip_bad=options.skip_bad)
    for skipped in zoo.skipped:
        complain(f"left out: {skipped.reason}")
    return zoo
