"""``merge``: adapters into one adapter, or into base weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    OK,
    AddCommand,
    console,
    named_values,
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
    sub = command("merge", run, "Merge adapters into one that loads as it is.")
    sub.add_argument("adapters", nargs="*", metavar="ADAPTER", help="adapters, or folders")
    sub.add_argument("--config", type=Path, metavar="FILE", help="all of this as YAML")
    sub.add_argument(
        "--method", metavar="M", help="default svd; 'mergeprobe-fast methods' lists them"
    )
    sub.add_argument(
        "--weights", metavar="W,W",
        help="one per adapter, in the order given (default: equal)",
    )  # fmt: skip
    sub.add_argument("--rank", type=int, metavar="R", help="rank of the result")
    sub.add_argument(
        "--energy", type=float, metavar="E",
        help="the rank that keeps this share of each module's squared norm, say 0.99",
    )  # fmt: skip
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="arguments",
        help="an argument of the method, say density=0.3",
    )  # fmt: skip
    reads_recorded(sub)
    sub.add_argument(
        "--dtype", metavar="T", help="float32, bfloat16 or float16 (default: as the inputs)"
    )
    sub.add_argument(
        "--into", type=Path, metavar="BASE",
        help="base model folder: write its weights with the update added, not an adapter",
    )  # fmt: skip
    runs_on(sub)
    writes(sub, "folder to write; a .safetensors file for kohya and diffusers adapters")
    opens(sub)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    adapters, into, asked = _asked(options)
    zoo = open_zoo(adapters, options)
    shown = None if options.json else console()
    if into is not None:
        from mergeprobe_fast.merging.into import merge_into

        if asked.pop("dtype") is not None:
            raise InputError("the base model keeps its own dtypes", key="--dtype")
        with progress_of(shown, len(zoo.modules), "modules") as advance:
            report = merge_into(
                zoo, into, options.out, overwrite=options.overwrite, progress=advance,
                threads=options.threads, device=options.device, **asked,
            )  # fmt: skip
        from mergeprobe_fast.report.into import print_into_summary as print_summary
    else:
        from mergeprobe_fast.merging import check_output, merge

        check_output(zoo, options.out, overwrite=options.overwrite)
        with progress_of(shown, len(zoo.modules), "modules") as advance:
            merged = merge(
                zoo, progress=advance, threads=options.threads, device=options.device, **asked
            )
            report = merged.save(options.out, overwrite=options.overwrite)
        from mergeprobe_fast.report.merge import print_merge_summary as print_summary
    if shown is None:
        print_json(report)
        return OK
    print_summary(report, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _asked(options: argparse.Namespace) -> tuple[Sequence[Any], Path | None, dict[str, Any]]:
    """Adapters, base folder, and the arguments of ``merge``; the command line comes first."""
    from mergeprobe_fast.merging.config import dtype_name, load

    said = {
        "method": options.method,
        "weights": _numbers(options.weights),
        "rank": options.rank,
        "energy": options.energy,
        "dtype": dtype_name(options.dtype),
        "calibration": options.calibration,
        "domains": named_values(options.domains, "--domain") or None,
    }
    given = named_values(options.arguments, "--set")
    arguments = {name: _value(text) for name, text in given.items()}
    if options.config is None:
        if not options.adapters:
            raise InputError("none given; name adapters, or a --config", key="ADAPTER")
        said["method"] = said["method"] or "svd"
        return options.adapters, options.into, {**said, **_unmixed(arguments, said)}
    if options.adapters:
        raise InputError("names the adapters itself; give either", path=options.config)
    config = load(options.config)
    asked = {**config.options, **{key: value for key, value in said.items() if value is not None}}
    changed = said["method"] not in (None, config.options["method"])
    known = {} if changed else config.arguments
    into = options.into or config.into
    return config.adapters, into, {**asked, **_unmixed({**known, **arguments}, asked)}


def _unmixed(arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments, once they are the method's: none may pass for one of ``merge`` itself."""
    from mergeprobe_fast.merging.request import check_arguments

    for name in arguments:
        if name in options:
            raise InputError(f"is no parameter of a method but an option of merge: --{name}",
                             key=name)  # fmt: skip
    check_arguments(options["method"], arguments)
    return arguments


def _value(text: str) -> Any:
    """A number, true, false, null, a list, or the text itself."""
    from mergeprobe_fast.io.strict_yaml import parse_yaml

    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(str(error), key="--weights") from None
