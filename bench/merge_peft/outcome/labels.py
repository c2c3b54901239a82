"""Labels of a run: what each member of each merge keeps, one row each, with standard errors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile

from ..model.base import WHEEL_NAME
from ..tiers.plan import BASE, Tier, single_key
from .kept import kept
from .scores import Measured, RunScores, read_scores

ROUTING = "routing"  # the study, and the method, of rows that a router made
_FLOATS = (
    "utility_base", "utility_single", "utility_merged", "loglik_base", "loglik_single",
    "loglik_merged", "retention", "retention_se", "accuracy_norm", "accuracy_norm_se", "ll_norm",
    "ll_norm_se", "option_norm", "option_norm_se", "prob_ret", "prob_ret_se", "train_lr",
    "merge_seconds", "parameters_ratio", "seconds_per_prompt", "routed_right",
)  # fmt: skip
_INTEGERS = (
    "seed", "rank", "calibration", "size", "items", "train_rank", "train_steps", "train_seed",
    "train_init_seed", "merged_rank", "resident",
)  # fmt: skip
COLUMNS = (
    "row", "tier", "base", "seed", "operator", "method", "rank", "calibration", "study", "members",
    "weights", "size", "member", "exam", "domain", "twist", "partner", "partner_domain", "items",
    "utility_base", "utility_single", "utility_merged", "loglik_base", "loglik_single",
    "loglik_merged", "retention", "retention_se", "accuracy_norm", "accuracy_norm_se", "ll_norm",
    "ll_norm_se", "option_norm", "option_norm_se", "prob_ret", "prob_ret_se", "train_rank",
    "train_lr", "train_steps", "train_seed", "train_init_seed", "train_layers", "train_variant",
    "merge_seconds", "merged_rank", "parameters_ratio", "resident", "seconds_per_prompt",
    "routed_right", "command",
)  # fmt: skip
# What makes two rows the same one; anything else that was measured may differ a little.
IDENTITY = (
    "tier", "base", "seed", "operator", "method", "rank", "calibration", "study", "members",
    "size", "member", "exam", "domain", "twist", "partner", "partner_domain", "items",
    "train_rank", "train_lr", "train_steps", "train_seed", "train_init_seed", "train_layers",
    "train_variant", "merged_rank", "resident",
)  # fmt: skip


def write_labels(run_dir: str | os.PathLike[str], tier: Tier) -> Path:
    """Write labels.parquet from the journal, sorted by row; what is there already is replaced.

    A member has a row when its base, single and merged scores are all in the journal. The same
    journal gives the same bytes.

    Raises:
        InputError: a journal that cannot be used, or is of another tier.
    """
    import pyarrow
    import pyarrow.parquet

    rows = label_rows(read_scores(run_dir), tier)
    types = (
        dict.fromkeys(COLUMNS, pyarrow.string())
        | dict.fromkeys(_FLOATS, pyarrow.float64())
        | dict.fromkeys(_INTEGERS, pyarrow.int64())
        | {"members": pyarrow.list_(pyarrow.string()), "weights": pyarrow.list_(pyarrow.float64()),
           "train_layers": pyarrow.list_(pyarrow.int64())}
    )  # fmt: skip
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([(c, types[c]) for c in COLUMNS]))
    out = Path(run_dir) / "labels.parquet"
    with AtomicFile(out, overwrite=True) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")
    return out


def read_labels(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a labels.parquet, or of a file that has its columns and more.

    Raises:
        InputError: not such a file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot be read: {str(error).splitlines()[0]}", path=path) from None
    for column in COLUMNS:
        if column not in table.column_names:
            raise InputError("there is no such column", path=path, key=column)
    return table.to_pylist()


def label_rows(run: RunScores, tier: Tier) -> list[dict[str, Any]]:
    """The rows of labels.parquet, sorted by "row".

    Raises:
        InputError: the run is of another tier or seed, or has a member that the tier has not.
    """
    if (run.facts["tier"], run.facts["seed"]) != (tier.name, tier.seed):
        raise InputError(
            f"expected tier {tier.name} with seed {tier.seed}, got {run.facts['tier']} with "
            f"{run.facts['seed']}", key="tier",
        )  # fmt: skip
    rows = [*_merge_rows(run, tier), *_routing_rows(run, tier)]
    rows.sort(key=lambda row: row["row"])
    for one, two in pairwise(rows):
        if one["row"] == two["row"]:
            raise InputError("is there twice", key=one["row"])
    return rows


def _merge_rows(run: RunScores, tier: Tier) -> Iterator[dict[str, Any]]:
    for key, line in run.merged.items():
        if line["operator"] not in tier.operators:
            raise InputError(f"tier {tier.name} has no operator {line['operator']!r}", key=key)
        operator = tier.operators[line["operator"]]
        about = {
            "operator": operator.name, "method": operator.method, "rank": operator.rank,
            "calibration": operator.calibration, "study": line["study"],
            "weights": line["weights"], "merge_seconds": line["seconds"],
            "merged_rank": line["rank"], "resident": 1, "seconds_per_prompt": None,
            "routed_right": None,
        }  # fmt: skip
        for member in line["members"]:
            place = key, _adapter(tier, member, key).exam
            if place in run.scores:
                ratio = _parameters_ratio(run, line["members"], line["parameters"])
                about = {**about, "parameters_ratio": ratio, "only": key}
                yield from _row(run, tier, key, line["members"], member, run.scores[place], about)


def _routing_rows(run: RunScores, tier: Tier) -> Iterator[dict[str, Any]]:
    for line, scores in run.routed:
        key = f"{line['operator']}({'+'.join(line['members'])})"
        held = sum(run.trained[m]["parameters"] for m in line["members"] if m in run.trained)
        about = {
            "operator": line["operator"], "method": ROUTING, "rank": None, "calibration": None,
            "study": ROUTING, "weights": None, "merge_seconds": None, "merged_rank": None,
            "resident": len(line["members"]), "seconds_per_prompt": line["seconds_per_prompt"],
            "routed_right": line["accuracy"], "only": None,
            "parameters_ratio": _parameters_ratio(
                run, line["members"], held + line["parameters"]
            ),
        }  # fmt: skip
        for member in line["members"]:
            if _adapter(tier, member, key).exam == line["exam"]:
                yield from _row(run, tier, key, line["members"], member, scores, about)


def _adapter(tier: Tier, member: str, key: str) -> Any:
    if member not in tier.adapters:
        raise InputError(f"tier {tier.name} has no adapter {member!r}", key=key)
    return tier.adapters[member]


def _parameters_ratio(run: RunScores, members: Sequence[str], held: int) -> float | None:
    """Parameters held, over those of a member on average; None where one's line is missing."""
    if not all(member in run.trained for member in members):
        return None
    return held / float(np.mean([run.trained[member]["parameters"] for member in members]))


def _row(
    run: RunScores, tier: Tier, key: str, members: Sequence[str], member: str, merged: Measured,
    about: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The row of a member, if its single and base scores are there."""
    plan = tier.adapters[member]
    base = run.scores.get((BASE, plan.exam))
    single = run.scores.get((single_key(member), plan.exam))
    if base is None or single is None:
        return
    exam, name = run.exams[plan.exam], f"{key}|{member}"
    options = "" if about["only"] is None else f" --only {shlex.quote(about['only'])}"
    options += "" if run.facts["base"] == WHEEL_NAME else " --base FOLDER"
    options += " --data FOLDER" if any(e.data for e in tier.exams.values()) else ""
    partner = next(m for m in members if m != member) if len(members) == 2 else None
    found = {
        "row": name, "tier": tier.name, "base": run.facts["base"], "seed": tier.seed,
        "members": list(members), "size": len(members), "member": member,
        "exam": plan.exam, "domain": exam.domain, "twist": exam.twist, "partner": partner,
        "partner_domain": None if partner is None else tier.adapters[partner].recipe.domain,
        "items": len(exam.keys), "train_rank": plan.recipe.rank, "train_lr": plan.recipe.lr,
        "train_steps": plan.recipe.steps, "train_seed": plan.recipe.seed,
        "train_init_seed": plan.recipe.init_seed, "train_layers": list(plan.recipe.layers),
        "train_variant": plan.recipe.variant,
        "command": f"mergeprobe-fast merge-peft --tier {tier.name} --seed {tier.seed}{options} "
        "--out DIR",
        **{c: v for c, v in about.items() if c != "only"},
        **kept(base, single, merged, exam, member, name),
    }  # fmt: skip
    yield {column: found[column] for column in COLUMNS}


Allowed = Callable[[Mapping[str, Any], Mapping[str, Any]], float]


class Difference(NamedTuple):
    """A value that came out differently; ``recomputed`` is None where the whole row is missing."""

    row: str
    column: str
    recorded: Any
    recomputed: Any


def compare_rows(
    recorded: Iterable[Mapping[str, Any]],
    recomputed: Iterable[Mapping[str, Any]],
    tolerance: Mapping[str, float | Allowed],
) -> list[Difference]:
    """What differs between rows of labels and the same rows computed again.

    The columns of ``IDENTITY`` are to be equal.

    Args:
        recorded: rows to look up.
        recomputed: rows, all of the recorded ones among them.
        tolerance: the largest absolute difference of each column to compare, such as
            {"ll_norm": 0.05, "loglik_merged": 0.01}: training and other processors round
            differently; or what says it of a row and the same one again. Lists are compared entry
            by entry. A number against None is always a difference.
    """
    found = {row["row"]: row for row in recomputed}
    wrong = []
    for row in recorded:
        name = row["row"]
        if name not in found:
            wrong.append(Difference(name, "row", name, None))
            continue
        again = found[name]
        for column in IDENTITY:
            if row[column] != again[column]:
                wrong.append(Difference(name, column, row[column], again[column]))
        for column, most in tolerance.items():
            one, two = row[column], again[column]
            if one is None and two is None:
                continue
            gap = apart(one, two)
            if gap is None or not gap <= (most(row, again) if callable(most) else most):
                wrong.append(Difference(name, column, one, two))
    return wrong


def apart(one: Any, two: Any) -> float | None:
    """The largest difference of two numbers, or lists; None where they cannot be compared."""
    if one is None or two is None or np.shape(one) != np.shape(two):
        return None
    return float(np.abs(np.subtract(one, two)).max(initial=0.0))
