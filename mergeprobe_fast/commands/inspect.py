"""``check``, ``doctor``, ``features`` and ``methods``: what is here, and whether it can be used."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mergeprobe_fast.commands._common import (
    NO,
    OK,
    SAME_BASE,
    AddCommand,
    console,
    print_json,
)


def add(command: AddCommand) -> None:
    check = command("check", run_check, "Say for every tensor whether it is used, and why not.")
    check.add_argument("paths", nargs="+", metavar="PATH", help="adapters, or folders of them")
    check.add_argument("--same-base", action="store_true", help=SAME_BASE)
    methods = command("methods", run_methods, "List the merge methods, or explain one.")
    methods.add_argument("name", nargs="?", metavar="METHOD")
    features = command("features", run_features, "List the statistics, or explain one.")
    features.add_argument(
        "name", nargs="?", metavar="NAME",
        help="a statistic, or 2601.22285 or gradience: where the metrics of those are",
    )  # fmt: skip
    features.add_argument(
        "--zoo", type=Path, metavar="ZOO", help="say what each costs on these adapters"
    )
    features.add_argument(
        "--markdown", action="store_true", help="print the page docs/features.md"
    )
    command("doctor", run_doctor, "Say what was built, what is active, and why.")


def run_check(options: argparse.Namespace) -> int:
    from mergeprobe_fast.report.check import check_paths, print_coverage

    result = check_paths(options.paths, same_base=options.same_base)
    if options.json:
        print_json(result.to_dict())
    else:
        print_coverage(result, console())
    return OK if result.ok else NO


def run_methods(options: argparse.Namespace) -> int:
    from mergeprobe_fast.report.methods import describe_methods, print_methods

    described = describe_methods(options.name)
    if options.json:
        print_json(described)
    else:
        print_methods(described, console(), whole=options.name is not None)
    return OK


def run_features(options: argparse.Namespace) -> int:
    from mergeprobe_fast.errors import InputError
    from mergeprobe_fast.report.features import describe_features, print_features

    if options.markdown:
        from mergeprobe_fast.report.feature_page import feature_page

        if options.name or options.zoo or options.json:
            raise InputError("is the whole page, and nothing else", key="--markdown")
        sys.stdout.buffer.write(feature_page().encode())
        return OK
    zoo = None
    if options.zoo is not None:
        from mergeprobe_fast.zoo import open_zoo

        zoo = open_zoo(options.zoo)
    described = describe_features(options.name, zoo)
    if options.json:
        print_json(described)
    else:
        print_features(described, console(), whole=options.name is not None)
    return OK


def run_doctor(options: argparse.Namespace) -> int:
    from mergeprobe_fast.doctor import examine
    from mergeprobe_fast.report.doctor import print_doctor

    facts = examine()
    if options.json:
        print_json(facts)
    else:
        print_doctor(facts, console())
    return OK if facts["ok"] else NO
