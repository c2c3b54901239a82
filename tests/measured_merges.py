"""The folder of a run of MERGE-PEFT whose merges have labels, without any training."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from adapters import make_adapter
from calibrations import make_calibration
from probes import make_run

from mergeprobe_fast.merge_peft.outcome.labels import COLUMNS
from mergeprobe_fast.merge_peft.tiers.plan import AdapterPlan, Exam, Operator, Tier
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe

LOW, HIGH = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
SIZES = {LOW: (12, 10, 3), HIGH: (9, 10, 2)}
SHAPES = {m: (o, i) for m, (o, i, _) in SIZES.items()}
ADAPTERS = {
    "a": ("math", (LOW, HIGH)), "b": ("code", (LOW, HIGH)), "c": ("code", (LOW,)),
    "d": ("math", (LOW, HIGH)),
}  # fmt: skip
SNAPSHOTS = {"a": (5, 10), "b": (5, 10), "c": (10,)}  # of 100 steps; "d" has none
OPERATORS = {
    op.name: op
    for op in (
        Operator("sum", "cat"), Operator("mean", "cat", "mean"),
        Operator("reweighted", "cat", "reweighted", calibration=12),
        Operator("cut", "svd", "one", rank=2), Operator("ties", "ties", arguments={"density": 0.5}),
        Operator("regmean-1", "regmean", calibration=1),
        Operator("regmean-12", "regmean", rank=2, calibration=12),
        Operator("swapped", "regmean", rank=2, calibration=12, swapped=True),
    )
}  # fmt: skip
# Operator, members, weights; those of "reweighted" are no optimum, and are to be taken as they are.
MERGES = [
    ("sum", "ab", (1.0, 1.0)), ("sum", "bca", (1.0, 1.0, 1.0)), ("sum", "da", (1.0, 1.0)),
    ("mean", "ca", (0.5, 0.5)), ("reweighted", "ab", (0.7, -0.4)), ("cut", "bda", (1.0, 1.0, 1.0)),
    ("ties", "ab", (1.0, 1.0)), ("regmean-1", "ab", (1.0, 1.0)),
    ("regmean-12", "db", (1.0, 1.0)), ("swapped", "ba", (1.0, 1.0)),
]  # fmt: skip
NOTHING = dict.fromkeys(COLUMNS)
AGAIN = [m for m in MERGES if m[0] not in ("sum", "mean", "reweighted")]


def make_tier(**operators: Operator) -> Tier:
    exams = {name: Exam(name, name) for name in ("math", "code")}
    adapters = {name: AdapterPlan(name, exam, Recipe(exam)) for name, (exam, _) in ADAPTERS.items()}
    return Tier("test", "", 0, exams, adapters, OPERATORS | operators, {})


def key_of(operator, members):
    return f"{operator}({'+'.join(members)})"


def write_labels(folder, merges, **changes):
    rows = []
    for operator, members, weights in merges:
        op = OPERATORS[operator]
        rows += [
            NOTHING | {
                "row": f"{key_of(operator, members)}|{member}", "study": "pairs",
                "operator": operator, "method": op.method, "rank": op.rank,
                "calibration": op.calibration, "members": list(members), "weights": list(weights),
                "member": member,
            } | changes
            for member in members
        ]  # fmt: skip
    routed = {**NOTHING, "row": "classifier(a+b)|a", "study": "routing", "operator": "classifier",
              "method": "routing", "members": ["a", "b"], "member": "a"}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([*rows, routed]), folder / "labels.parquet")


def write_adapter(folder, name, seed):
    modules = {m: SIZES[m] for m in ADAPTERS[name][1]}
    make_adapter(folder / "adapters" / name, modules, seed=seed, rank=2 + seed % 2)


def write_calibration(folder, count, rng):
    make_calibration(folder / "calibration" / str(count), SHAPES,
                     {"math": count + 15, "code": count + 13}, rng, gradients=True, labels="both",
                     sequences=count, overwrite=True)  # fmt: skip


def make_measured_run(folder, rng):
    """Adapters, two calibrations and snapshots, and labels of ``MERGES``."""
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder, name, seed)
    for name, steps in SNAPSHOTS.items():
        sizes = {m: SIZES[m] for m in ADAPTERS[name][1]}
        make_run(folder / "probes" / name, rng, sizes, steps=steps, name=name)
    for count in (1, 12):
        write_calibration(folder, count, rng)
    write_labels(folder, MERGES)
