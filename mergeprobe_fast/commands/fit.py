"""``fit``: learn from labelled merges what a merge leaves of its members."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from mergeprobe_fast.commands._common import (
    OK,
    SAME_BASE,
    AddCommand,
    complain,
    console,
    domains_of,
    fraction,
    named_values,
    print_json,
    progress_of,
    reads_recorded,
)
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("fit", run, "Learn to predict retention from labelled merges.")
    reads_labels(sub)
    sub.add_argument(
        "--evaluate", metavar="SPLIT,SPLIT", type=lambda text: text.split(","), default=[],
        help="put scores into the model: adapter, seed, domain pair, domain, operator, layers",
    )  # fmt: skip
    sub.add_argument("--note", action="append", default=[], help="a line for the model's card")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="MODEL.json",
        help="file to write; its card is MODEL.md beside it",
    )  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace the files if they exist")


def reads_labels(sub: argparse.ArgumentParser) -> None:
    """The options of a command that reads labelled merges."""
    sub.add_argument(
        "labels", type=Path, nargs="+", metavar="LABELS",
        help="parquet or csv, one or more: members, member, ll_norm or retention, and columns",
    )  # fmt: skip
    sub.add_argument("--target", metavar="COLUMN", help="default: ll_norm, retention")
    sub.add_argument(
        "--operators", metavar="O,O", type=lambda text: text.split(","), default=[],
        help="rows of these operators only",
    )  # fmt: skip
    sub.add_argument(
        "--columns", metavar="C,C", type=lambda text: text.split(","), default=[],
        help="columns of your own to predict from, too",
    )  # fmt: skip
    sub.add_argument(
        "--features", type=Path, action="append", default=[], metavar="FILE",
        help="the columns of the same rows: merge-peft's merge-features.parquet; "
        "with several LABELS once for each, in their order",
    )  # fmt: skip
    sub.add_argument(
        "--zoo", type=Path, metavar="ZOO", help="the adapters, to compute the columns from"
    )
    reads_recorded(sub)
    sub.add_argument(
        "--probes", type=Path, metavar="RUNS", help="with --at: columns of unfinished training, too"
    )
    sub.add_argument(
        "--at", type=fraction, metavar="F",
        help="columns at this share of training, say 5%%: of --probes, or in --features",
    )  # fmt: skip
    sub.add_argument("--same-base", action="store_true", help=SAME_BASE)
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="choices",
        help="a choice of the recipe, say boost_rounds=400",
    )  # fmt: skip
    sub.add_argument("--threads", type=int, metavar="N", help="default: the cores available")


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.io.atomic_file import AtomicFile
    from mergeprobe_fast.predict.card import model_card
    from mergeprobe_fast.predict.evaluate import evaluate
    from mergeprobe_fast.predict.evaluate import steps as evaluation_steps
    from mergeprobe_fast.predict.fit import fit, steps
    from mergeprobe_fast.predict.model_json import model_text
    from mergeprobe_fast.predict.splits import SPLITS

    started = time.perf_counter()
    unknown = [s for s in options.evaluate if s not in SPLITS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is none of {', '.join(SPLITS)}", key="--evaluate")
    if options.out.name in ("", ".."):
        raise InputError("is a folder; name a file in it", path=options.out, key="--out")
    card = options.out.with_suffix(".md")
    if card == options.out:
        raise InputError("is the name of the card; give the model another ending", path=card)
    inputs = [*options.labels, *options.features]
    files = [AtomicFile(p, options.overwrite, inputs=inputs) for p in (options.out, card)]
    for file in files:
        file.check()
    recipe = recipe_of(options)
    shown = None if options.json else console()
    labels = labels_of(options, shown)
    with progress_of(shown, steps(labels, recipe, None, options.columns), "fits") as advance:
        model = fit(
            labels, recipe=recipe, own=options.columns, notes=options.note, progress=advance
        )
    if options.evaluate:
        total = evaluation_steps(labels, None, options.columns, options.evaluate)
        with progress_of(shown, total, "folds") as advance:
            found = evaluate(
                labels, recipe=recipe, own=options.columns, splits=options.evaluate,
                progress=advance,
            )  # fmt: skip
        model = dataclasses.replace(model, facts=dataclasses.replace(model.facts, evaluation=found))
    with files[0] as one, files[1] as other:
        one.write_text(model_text(model), encoding="utf-8")
        other.write_text(model_card(model), encoding="utf-8")
    if shown is None:
        print_json({
            "out": str(options.out), "card": str(card), "rows": len(labels),
            "levels": {n: {"rows": m.rows, "columns": list(m.columns)}
                       for n, m in model.models.items()},
        })  # fmt: skip
        return OK
    from mergeprobe_fast.report.evaluate import print_fitted

    print_fitted(model, shown, options.out)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK


def recipe_of(options: argparse.Namespace) -> Any:
    """The default recipe with what ``--set`` says."""
    from mergeprobe_fast.predict.recipe import Recipe

    known = Recipe().to_json()
    given: dict[str, Any] = {}
    for name, text in named_values(options.choices, "--set").items():
        if name not in known:
            raise InputError(f"no choice {name!r}; there are: {', '.join(known)}", key="--set")
        try:
            given[name] = type(known[name])(text)
        except ValueError:
            kind = "an integer" if type(known[name]) is int else "a number"
            raise InputError(f"{name}: expected {kind}, got {text!r}", key="--set") from None
    return Recipe(**given)


def labels_of(options: argparse.Namespace, shown: Any) -> Any:
    """The labels, with columns from the zoo where one is named."""
    from mergeprobe_fast.predict.banks import read_banks

    if options.features and options.zoo is not None:
        raise InputError("says what --zoo is there to work out", key="--features")
    if options.zoo is None:
        for name in ("calibration", "probes"):
            if getattr(options, name) is not None:
                raise InputError("needs --zoo", key=f"--{name}")
        if options.domains:
            raise InputError("needs --zoo", key="--domain")
    if options.at is not None and options.probes is None and not options.features:
        raise InputError("needs --probes or --features", key="--at")
    labels = read_banks(
        options.labels, target=options.target, operators=options.operators,
        features=options.features, at=options.at if options.features else None,
    )  # fmt: skip
    if options.zoo is None:
        return labels
    from mergeprobe_fast.predict.from_zoo import with_columns
    from mergeprobe_fast.probes import find_probes
    from mergeprobe_fast.zoo import Zoo, open_zoo

    zoo = open_zoo(options.zoo, same_base=options.same_base)
    early = None
    if options.probes is not None:
        found = find_probes(options.probes).match(zoo.names, options.at, allow_early=True)
        good = [s.adapter for s in found if s is not None and not s.too_early]
        early = Zoo(good)
        if len(good) < len(zoo):
            complain(f"{len(zoo) - len(good)} of {len(zoo)} adapters have no probe that says much")
    if zoo.base_model is None and not labels.bases:
        complain("no base model is declared: the predictor will not be able to refuse one")
    total = len(zoo.modules) * (1 if early is None else 2)
    with progress_of(shown, total, "modules") as advance:
        return with_columns(
            labels, zoo, calibration=options.calibration, domains=domains_of(options, zoo),
            early=early, threads=options.threads, progress=advance,
        )  # fmt: skip
