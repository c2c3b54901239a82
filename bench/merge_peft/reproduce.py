"""Rows of a bank, drawn at random, computed again from nothing:

    python -m mergeprobe_fast.merge_peft.reproduce bank.parquet --rows 3 --budget-seconds 240

trains their members, merges and measures them in a temporary folder, prints what came out beside
what the bank says, and exits with 1 where they differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError

from . import tiers
from .labels import COLUMNS, IDENTITY, Difference, compare_rows, label_rows
from .labels import ROUTING as ROUTED
from .plan import Tier
from .run import check_exams, run
from .scores import read_scores
from .units import plan_run

Rows = list[dict[str, Any]]
SAME, DIFFERENT, REFUSED = 0, 1, 2
# Ten times what came out when ten pairs of five adapters of 32 to 96 steps were trained, summed and
# measured on AVX-512 with oneDNN and again on AVX2 without: loglik_base moved by 2e-6,
# loglik_single by 2e-5, loglik_merged by 3e-4, ll_norm by 2e-4, and no item changed sides. Of the
# 48 items of the smallest tier two may.
TOLERANCE = {
    "loglik_base": 1e-4, "loglik_single": 1e-3, "loglik_merged": 3e-3, "ll_norm": 3e-3,
    "prob_ret": 3e-3, "utility_base": 0.045, "utility_single": 0.045, "utility_merged": 0.045,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Merges of one tier to make again: the rows ``drawn``, and all ``rows`` of these merges."""

    tier: Tier
    drawn: Rows
    rows: Rows
    seconds: float  # of one core, about


def read_bank(path: str | os.PathLike[str]) -> Rows:
    """The rows of a labels.parquet.

    Raises:
        InputError: a file that cannot be read, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot be read: {error}", path=path) from None
    for column in COLUMNS:
        if rows and column not in rows[0]:
            raise InputError("has no such column", path=path, key=column)
    return rows


def draw(bank: Iterable[Mapping[str, Any]], count: int, seed: int, budget: float) -> list[Sample]:
    """``count`` rows at random among those that fit a budget, with the rows of the same merges.

    A row that does not fit beside those drawn before it is passed over, so that cheap members are
    likelier; what a router chose is not drawn.

    Args:
        budget: seconds of one core, as ``units.plan_run`` estimates them.

    Raises:
        InputError: a row of a merge that its tier does not have, or none that fits.
    """
    rows = sorted((row for row in bank if row["method"] != ROUTED), key=lambda row: row["row"])
    random.Random(seed).shuffle(rows)
    whole: dict[tuple[str, int], Tier] = {}
    chosen: dict[tuple[str, int], dict[str, None]] = {}
    spent: dict[tuple[str, int], float] = {}
    drawn: Rows = []
    for row in rows:
        if len(drawn) == count:
            break
        place = row["tier"], row["seed"]
        if place not in whole:
            whole[place] = tiers.tier(row["tier"], seed=row["seed"])
        keys = {**chosen.get(place, {}), merge_key(row): None}
        part = whole[place].only(list(keys))
        others = sum(seconds for other, seconds in spent.items() if other != place)
        if others + _seconds(part, budget - others) <= budget:
            chosen[place], spent[place] = keys, _seconds(part)
            drawn.append(row)
    if not drawn:
        raise InputError(f"none of {len(rows)} rows fits in {budget:g} s", key="budget-seconds")
    return [
        Sample(
            whole[place].only(list(keys)),
            [row for row in drawn if (row["tier"], row["seed"]) == place],
            [r for r in rows if (r["tier"], r["seed"]) == place and merge_key(r) in keys],
            spent[place],
        )
        for place, keys in chosen.items()
    ]  # fmt: skip


def merge_key(row: Mapping[str, Any]) -> str:
    """The key of the merge that a row is of."""
    return f"{row['operator']}({'+'.join(row['members'])})"


def _seconds(part: Tier, enough: float = float("inf")) -> float:
    """An estimate of a part's cost; without its items where trainings alone are ``enough``."""
    trainings = plan_run(part, None, {name: [] for name in part.exams}).seconds()
    return trainings if trainings > enough else plan_run(part, None, check_exams(part)).seconds()


def recompute(
    sample: Sample, out: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> Rows:  # fmt: skip
    """The rows of these merges, made anew in the folder ``out``.

    Raises:
        InputError: as :func:`.run.run`.
    """
    run(sample.tier, out, base=base, jobs=jobs, until="merges")
    return label_rows(read_scores(out), sample.tier)


def table(sample: Rows, again: Rows, wrong: Sequence[Difference]) -> list[str]:
    """Lines that say of each row what the bank has, what came out, and what is allowed."""
    found = {row["row"]: row for row in again}
    lines = []
    for row in sample:
        lines.append(row["row"])
        for column, most in TOLERANCE.items():
            one, two = row[column], found.get(row["row"], {}).get(column)
            apart = "" if one is None or two is None else f"{abs(one - two):12.2e}"
            mark = any((d.row, d.column) == (row["row"], column) for d in wrong)
            lines.append(
                f"  {column:18}{_number(one)}{_number(two)}{apart:>12}  of {most:g}"
                f"{'  DIFFERENT' if mark else ''}"
            )
        lines += [
            f"  {d.column}: recorded {d.recorded!r}, recomputed {d.recomputed!r}  DIFFERENT"
            for d in wrong if d.row == row["row"] and d.column not in TOLERANCE
        ]  # fmt: skip
    return lines


def _number(value: float | None) -> str:
    return f"{'none' if value is None else format(value, '.6f'):>14}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("reproduce", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bank", type=Path, help="a labels.parquet")
    parser.add_argument("--rows", type=int, default=3, help="how many to draw (default 3)")
    parser.add_argument("--seed", type=int, help="of the draw (default: a fresh one, printed)")
    parser.add_argument(
        "--budget-seconds", type=float, default=240,
        help="of one core with AVX-512, estimated; others take a few times as long (default 240)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the wheel)")
    parser.add_argument("--jobs", type=int, help="processes (default: the cores available)")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    try:
        if options.rows < 1:
            raise InputError(f"expected an integer from 1, got {options.rows}", key="rows")
        samples = draw(read_bank(options.bank), options.rows, seed, options.budget_seconds)
        wrong, drawn = 0, sum(len(sample.drawn) for sample in samples)
        print(f"drawn with --seed {seed}: {drawn} of {options.rows} rows fit in "
              f"{options.budget_seconds:g} core seconds")  # fmt: skip
        for sample in samples:
            print(f"{sample.tier.name}: {len(sample.rows)} rows of {len(sample.tier.merges)} "
                  f"merges, about {sample.seconds:.0f} core seconds", flush=True)  # fmt: skip
            with tempfile.TemporaryDirectory() as out:
                again = recompute(sample, out, base=options.base, jobs=options.jobs)
            found = compare_rows(sample.rows, again, TOLERANCE)
            print("\n".join(table(sample.rows, again, found)))
            wrong += len(found)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    compared = len(IDENTITY) + len(TOLERANCE)
    total = sum(len(sample.rows) for sample in samples)
    print(f"{total} rows, {compared} columns each: {wrong or 'no'} differences")
    return DIFFERENT if wrong else SAME


if __name__ == "__main__":
    sys.exit(main())
