"""``evaluate``: how well retention is predicted on labelled merges that were held out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mergeprobe_fast.commands._common import OK, AddCommand, console, print_json, progress_of
from mergeprobe_fast.commands.fit import labels_of, reads_labels, recipe_of
from mergeprobe_fast.errors import InputError


def add(command: AddCommand) -> None:
    sub = command("evaluate", run, "Score predictions of retention on labelled merges.")
    reads_labels(sub)
    sub.add_argument(
        "--model", type=Path, metavar="MODEL.json",
        help="a model as it is, on labels that it has not seen (default: fit anew in every fold)",
    )  # fmt: skip
    sub.add_argument(
        "--splits", metavar="SPLIT,SPLIT", type=lambda text: text.split(","),
        help="adapter, seed, domain pair, domain, operator, layers (default: all)",
    )  # fmt: skip
    sub.add_argument(
        "--shown", metavar="C,C", type=lambda text: text.split(","), default=[],
        help="columns that are predictions themselves, to compare with",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to write the tables into")
    sub.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def run(options: argparse.Namespace) -> int:
    from mergeprobe_fast.io.atomic import AtomicFolder
    from mergeprobe_fast.predict.evaluate import evaluate, evaluate_model, steps
    from mergeprobe_fast.predict.predictor import RetentionPredictor
    from mergeprobe_fast.predict.splits import SPLITS
    from mergeprobe_fast.report.evaluate import CONTENTS, print_evaluation, write_evaluation

    started = time.perf_counter()
    splits = SPLITS if options.splits is None else options.splits
    unknown = [s for s in splits if s not in SPLITS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is none of {', '.join(SPLITS)}", key="--splits")
    folder = None
    if options.out is not None:
        given = (*options.labels, *options.features, options.zoo, options.model)
        inputs = [p for p in given if p is not None]
        folder = AtomicFolder(options.out, options.overwrite, inputs=inputs, contents=CONTENTS)
        folder.check()
    shown = None if options.json else console()
    if options.model is not None:
        for name in ("splits", "choices", "columns", "shown"):
            if getattr(options, name):
                option = {"choices": "--set"}.get(name, f"--{name}")
                raise InputError("says how to fit; --model is fitted", key=option)
        model = RetentionPredictor.load(options.model)
        found = evaluate_model(model, labels_of(options, shown))
    else:
        recipe = recipe_of(options)
        labels = labels_of(options, shown)
        total = steps(labels, None, options.columns, splits)
        with progress_of(shown, total, "folds") as advance:
            found = evaluate(
                labels, recipe=recipe, own=options.columns, splits=splits, shown=options.shown,
                progress=advance,
            )  # fmt: skip
    if folder is not None:
        with folder as path:
            write_evaluation(path, found)
    if shown is None:
        print_json(found)
        return OK
    print_evaluation(found, shown)
    if options.out is not None:
        shown.print(f"\n{options.out}", highlight=False, markup=False)
    shown.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return OK
