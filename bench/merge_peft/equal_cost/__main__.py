"""What is kept at equal numbers of resident adapters: plan, merge, measure, and write the page.

    python -m mergeprobe_fast.merge_peft.equal_cost RUN --work FOLDER --out bench/results/merge_peft

RUN is a finished run of tier capacity. What FOLDER has, calibrations, plans of this model, merges
and scores, is not made again; ``--minutes 0`` writes the page from what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile

from ..tiers.operators import CALIBRATION
from ..tiers.sizes import tier as tier_of
from . import page, rows, summary
from .measure import Bench
from .partitions import ZOOS
from .planned import Planner
from .strategies import by_hand, on_groups_of, urgency
from .strategies import tier_of as tier_with

_STEM = "equal-cost"


def compare(options: argparse.Namespace) -> Path:
    """Do what the options say; the page's path."""
    tier = tier_of("capacity")
    bench = Bench(tier, options.run, options.work)
    zoos = [ZOOS[name] for name in options.zoos]
    tell = partial(print, flush=True)
    if options.minutes > 0:
        base = bench.base(options.base)
        bench.prepare(base, options.threads, tell)
    planner = Planner(tier, options.work, options.model, make=options.minutes > 0,
                      costs={"floor": 0.0})  # fmt: skip
    plans = planner.strategies(zoos, tell) if options.plan else []
    domains = {name: adapter.recipe.domain for name, adapter in tier.adapters.items()}
    asked = [*plans, *chain.from_iterable(map(on_groups_of, plans))]
    asked += chain.from_iterable(by_hand(zoo, domains) for zoo in zoos)
    asked.sort(key=urgency)
    if options.minutes > 0:
        with bench.journal() as journal, _env.one_blas_thread():
            left = bench.measure(asked, base, journal, 60 * options.minutes, tell)
        tell(f"{left} merges are left to measure")
    scores = bench.scores()
    found = rows.collect(asked, tier_with(tier, asked), scores)
    measured = summary.Measured(found)
    routed = rows.routers({zoo.name: zoo.members for zoo in zoos}, scores, tier)
    told = {"base": scores.facts["base"], "items": tier.test_items, "texts": CALIBRATION,
            "model": f"{options.model.name if options.model else 'the shipped one'}, "
                     f"SHA-256 {planner.name}"}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    rows.write(found, options.out / f"{_STEM}.parquet")
    drawn = page.picture(summary.curves(measured))
    if drawn:
        _write(options.out / page.PICTURE, drawn)
    written = options.out / f"{_STEM}.md"
    _write(written, page.page(measured, routed, found.failed, planner.refused, told))
    return written


def _write(path: Path, words: str) -> None:
    with AtomicFile(path, overwrite=True) as partial:
        partial.write_text(words, encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("equal_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of tier capacity")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--model", type=Path, help="a predictor (default: the shipped one)")
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the wheel)")
    parser.add_argument("--zoos", nargs="+", choices=ZOOS, default=list(ZOOS), metavar="ZOO",
                        help=f"of {', '.join(ZOOS)} (default: all)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=40, help="of measuring (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="of calibrating (default: 1)")
    parser.add_argument("--no-plan", dest="plan", action="store_false",
                        help="fixed operators alone")  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        print(compare(options))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
