"""Rows of a bank, drawn at random, computed again from nothing:

    mergeprobe-fast reproduce bank.parquet --rows 3 --budget-seconds 240

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeprobe_fast.errors import InputError, MergeprobeError

from ..options import add_reproduce
from ..outcome.labels import COLUMNS, IDENTITY, Allowed, Difference, apart, compare_rows, label_rows
from ..outcome.labels import ROUTING as ROUTED
from ..outcome.scores import read_scores
from ..tiers import sizes
from ..tiers.plan import Tier
from .exams import check_exams
from .run import run
from .units import plan_run

Rows = list[dict[str, Any]]
SAME, DIFFERENT, REFUSED = 0, 1, 2


def _of_ratio(column: str, measure: str, *, above_base: bool = True) -> Allowed:
    """How far (m - b) / (s - b) moves when these do: (dm - db - ratio (ds - db)) / (s' - b')."""

    def most(row: Mapping[str, Any], again: Mapping[str, Any]) -> float:
        moved = {which: apart(row[f"{measure}_{which}"], again[f"{measure}_{which}"])
                 for which in ("merged", "single", "base")}  # fmt: skip
        if None in moved.values():  # itself a difference
            return 0.0
        under, base = again[f"{measure}_single"], 0.0
        if above_base:
            under, base = under - again[f"{measure}_base"], moved["base"]
        top = moved["merged"] + base + abs(row[column]) * (moved["single"] + base)
        return top / abs(under) + _EXACT

    return most


def _error(column: str) -> Allowed:
    """A twentieth of a standard error; of nearly none, what its likelihoods may move by."""
    return lambda row, again: max(0.05 * abs(row[column]), 3e-4)


def _error_of_utility(column: str) -> Allowed:
    """A twentieth where as many answers are right, and a half where they are not."""

    def most(row: Mapping[str, Any], again: Mapping[str, Any]) -> float:
        share = 0.05 if all(row[name] == again[name] for name in _UTILITIES) else 0.5
        return share * max(row[column], again[column]) + _EXACT

    return most


_EXACT = 1e-9  # of what is computed in float64 from the same numbers
_UTILITIES = ("utility_base", "utility_single", "utility_merged")
# Ten times what came out when ten pairs of five adapters of 32 to 96 steps were trained, summed and
# measured on AVX-512 with oneDNN and again on AVX2 without: loglik_base moved by 2e-6,
# loglik_single by 2e-5, loglik_merged by 3e-4, ll_norm by 2e-4, and no item changed sides. Of the
# 48 items of the smallest tier two may.
TOLERANCE: dict[str, float | Allowed] = {
    "loglik_base": 1e-4, "loglik_single": 1e-3, "loglik_merged": 3e-3, "prob_ret": 3e-3,
    **dict.fromkeys(_UTILITIES, 0.045),
    "retention": _of_ratio("retention", "utility", above_base=False),
    "accuracy_norm": _of_ratio("accuracy_norm", "utility"),
    "ll_norm": _of_ratio("ll_norm", "loglik"),
    # Its three likelihoods are in no column; they move as loglik does, for a gain of 0.1 or more.
    "option_norm": lambda row, again: 0.03 * max(1.0, abs(row["option_norm"])),
    **{name: _error(name) for name in ("ll_norm_se", "option_norm_se", "prob_ret_se")},
    **{name: _error_of_utility(name) for name in ("retention_se", "accuracy_norm_se")},
    "weights": 1e-3, "parameters_ratio": _EXACT,
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
            whole[place] = sizes.tier(row["tier"], seed=row["seed"])
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
        told = set()
        again_row = found.get(row["row"], {})
        for column, most in TOLERANCE.items():
            one, two = row[column], again_row.get(column)
            gap = apart(one, two)
            if gap is None or isinstance(one, list):
                continue
            limit = most(row, again_row) if callable(most) else most
            mark = any((d.row, d.column) == (row["row"], column) for d in wrong)
            lines.append(
                f"  {column:18}{one:14.6f}{two:14.6f}{gap:12.2e}  of {limit:.2g}"
                f"{'  DIFFERENT' if mark else ''}"
            )
            told.add(column)
        lines += [
            f"  {d.column}: recorded {d.recorded!r}, recomputed {d.recomputed!r}  DIFFERENT"
            for d in wrong if d.row == row["row"] and d.column not in told
        ]  # fmt: skip
    return lines


def compare(options: argparse.Namespace, tell: Callable[[str], None] = print) -> list[Difference]:
    """Draw, make anew and compare, as the options say; returns what differs.

    Raises:
        MergeprobeError: a bank that cannot be read or drawn from, a run that fails.
    """
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if options.rows < 1:
        raise InputError(f"expected an integer from 1, got {options.rows}", key="rows")
    samples = draw(read_bank(options.bank), options.rows, seed, options.budget_seconds)
    wrong: list[Difference] = []
    drawn = sum(len(sample.drawn) for sample in samples)
    tell(f"drawn with --seed {seed}: {drawn} of {options.rows} rows fit in "
         f"{options.budget_seconds:g} core seconds")  # fmt: skip
    for sample in samples:
        tell(f"{sample.tier.name}: {len(sample.rows)} rows of {len(sample.tier.merges)} merges, "
             f"about {sample.seconds:.0f} core seconds")  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            again = recompute(sample, out, base=options.base, jobs=options.jobs)
        found = compare_rows(sample.rows, again, TOLERANCE)
        tell("\n".join(table(sample.rows, again, found)))
        wrong += found
    compared = len(IDENTITY) + len(TOLERANCE)
    total = sum(len(sample.rows) for sample in samples)
    tell(f"{total} rows, {compared} columns each: {len(wrong) or 'no'} differences")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("reproduce", description=(__doc__ or "").partition("\n")[0])
    add_reproduce(parser)
    try:
        return DIFFERENT if compare(parser.parse_args(arguments)) else SAME
    except MergeprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
