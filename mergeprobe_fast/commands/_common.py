"""What the commands share: exit codes, messages, options, opening a zoo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError

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


def runs_on(sub: argparse.ArgumentParser, *, precision: bool = False) -> None:
    """The options of a command that can use a GPU."""
    sub.add_argument(
        "--device", default="cpu", metavar="D",
        help="cpu (default), cuda, cuda:1, or auto: a GPU if one can be used",
    )  # fmt: skip
    if precision:
        sub.add_argument(
            "--precision", default="highest", choices=("highest", "high"),
            help="of float32 products on a GPU: high rounds them to tf32 (default: highest)",
        )  # fmt: skip


def opens(sub: argparse.ArgumentParser) -> None:
    """The options of a command that opens a zoo."""
    sub.add_argument("--same-base", action="store_true", help=SAME_BASE)
    sub.add_argument(
        "--skip-bad", action="store_true", help="go on without adapters that cannot be used"
    )


def reads_recorded(sub: argparse.ArgumentParser) -> None:
    """The options of a command that reads what was recorded beside a zoo."""
    sub.add_argument(
        "--calibration", type=Path, metavar="CAL", help="what 'mergeprobe-fast calibrate' wrote"
    )
    sub.add_argument(
        "--domain", action="append", default=[], metavar="ADAPTER=DOMAIN", dest="domains",
        help="of the calibration (default: the domain that the adapter's name begins with)",
    )  # fmt: skip


def domains_of(options: argparse.Namespace, zoo: Any) -> dict[str, str] | None:
    """What ``--domain`` says, less what it says of adapters that ``--skip-bad`` left out."""
    given = named_values(options.domains, "--domain")
    ends = [(s.path.parts, s.path.with_suffix("").parts) for s in zoo.skipped]

    def left_out(name: str) -> bool:
        parts = Path(name).parts
        return any(parts == end[-len(parts) :] for both in ends for end in both)

    return {n: d for n, d in given.items() if n in zoo.names or not left_out(n)} or None


def fraction(text: str) -> float:
    """``5%`` or ``0.05``."""
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if number != text else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 5% or 0.05, got {text!r}") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return value


def open_zoo(paths: Sequence[Any], options: argparse.Namespace) -> Any:
    """The zoo of these paths; what was left out is said on stderr."""
    from mergeprobe_fast.zoo import open_zoo

    given: Any = paths[0] if len(paths) == 1 else list(paths)
    zoo = open_zoo(given, same_base=options.same_base, skip_bad=options.skip_bad)
    for skipped in zoo.skipped:
        complain(f"left out: {skipped.reason}")
    return zoo


def named_values(given: Sequence[str], option: str) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a dictionary; an adapter's name may have a = of its own."""
    pairs = {}
    for text in given:
        name, equals, value = text.rpartition("=") if option == "--domain" else text.partition("=")
        if not equals or not name or not value:
            raise InputError(f"expected NAME=VALUE, got {text!r}", key=option)
        if name in pairs:
            raise InputError(f"{name} is given twice", key=option)
        pairs[name] = value
    return pairs
