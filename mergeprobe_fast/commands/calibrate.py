"""``calibrate``: record what the base model's modules see on texts of each domain."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    OK,
    SAME_BASE,
    AddCommand,
    console,
    fraction,
    named_values,
    print_json,
    progress_of,
    runs_on,
    writes,
)
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("calibrate", run, "Record module inputs on a few texts a domain (needs torch).")
    sub.add_argument("base", type=Path, metavar="BASE", help="folder of the base model")
    sub.add_argument(
        "--data", nargs="+", required=True, metavar="DOMAIN=FILE",
        help="texts of each domain: .jsonl, or .txt with blank lines between them",
    )  # fmt: skip
    sub.add_argument(
        "--samples", type=int, default=256, metavar="T",
        help="tokens kept of each domain (default 256)",
    )  # fmt: skip
    sub.add_argument(
        "--max-sequences", type=int, metavar="N", help="texts read of each domain (default all)"
    )
    sub.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="tokens of a text (default 512)"
    )
    sub.add_argument(
        "--skip-first", type=int, default=1, metavar="N",
        help="tokens left out at the start of each text, where activations are massive (default 1)",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    sub.add_argument(
        "--modules", nargs="+", metavar="GLOB",
        help="which modules (default: every linear layer but the output head)",
    )  # fmt: skip
    sub.add_argument(
        "--gradients", action="store_true",
        help="output gradients too, which 'fisher' needs; loads the whole model",
    )  # fmt: skip
    sub.add_argument(
        "--labels", choices=("model", "data", "both"),
        help="of the gradients: drawn from the model (default), the text itself, or both",
    )  # fmt: skip
    sub.add_argument("--outputs", action="store_true", help="keep outputs at the samples too")
    sub.add_argument(
        "--adapters", nargs="+", type=Path, metavar="ZOO",
        help="also how the loss changes along each of these, at the base and with each of them on "
        "its own domain's texts; loads the whole model",
    )  # fmt: skip
    sub.add_argument(
        "--domain", action="append", default=[], metavar="ADAPTER=DOMAIN", dest="domains",
        help="of the adapters (default: the domain that an adapter's name begins with)",
    )  # fmt: skip
    sub.add_argument(
        "--at", type=fraction, metavar="F",
        help="the adapters are probe runs: their snapshots at this share of training, say 5%%",
    )  # fmt: skip
    sub.add_argument("--same-base", action="store_true", help=SAME_BASE)
    sub.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="to compute in (default float32)",
    )  # fmt: skip
    writes(sub)
    runs_on(sub)


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.record import data_arguments, plan_calibration
    from mergeprobe_fast.report.calibrate import describe_calibration, print_calibration, print_plan

    started = time.perf_counter()
    zoo = _adapters(options)
    shown = None if options.json else console()
    plan = plan_calibration(
        options.base, data_arguments(options.data), samples=options.samples,
        max_sequences=options.max_sequences, max_length=options.max_length, seed=options.seed,
        skip_first=options.skip_first, gradients=options.gradients, labels=options.labels,
        outputs=options.outputs, adapters=zoo,
        domains=named_values(options.domains, "--domain") or None,
        modules=options.modules, dtype=options.dtype, threads=options.threads,
        device=options.device,
    )  # fmt: skip
    plan.check_out(options.out, overwrite=options.overwrite)
    if shown is not None:
        print_plan(plan, shown)
    with progress_of(shown, plan.steps, "texts x layers" if plan.streamed else "texts") as advance:
        calibration = plan.record(options.out, overwrite=options.overwrite, progress=advance)
    if shown is None:
        print_json(describe_calibration(calibration, plan))
        return OK
    print_calibration(calibration, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def _adapters(options: argparse.Namespace) -> Any:
    """The zoo of ``--adapters``: adapters, or with ``--at`` the snapshots of probe runs."""
    if options.adapters is None:
        if options.at is not None:
            raise InputError("given without --adapters", key="--at")
        return None
    if options.at is not None:
        from mergeprobe_fast.probes import find_probes

        return find_probes(options.adapters).zoo(options.at)
    from mergeprobe_fast.zoo import open_zoo

    return open_zoo(options.adapters, same_base=options.same_base)
