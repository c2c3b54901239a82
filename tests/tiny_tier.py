"""A tier of MERGE-PEFT that a random base of a few thousand weights runs in seconds."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from tiny_bases import make_base
from tiny_items import character_tokenizer
from transformers import PreTrainedTokenizerFast

from mergeprobe_fast.merge_peft.tiers.plan import AdapterPlan, Exam, MergePlan, Operator, Tier
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe

EXAMS = {
    "math": Exam("math", "math", ("math.one_step",)),
    "case": Exam("case", "instruct", ("instruct.case",)),
    "life": Exam("life", "science", ("science.life",)),
}
OPERATORS = {
    op.name: op
    for op in (
        Operator("sum", "cat"), Operator("mean", "cat", "mean"),
        Operator("reweighted", "cat", "reweighted", calibration=4),
        Operator("minimax", "cat", "minimax", calibration=4),
        Operator("regmean-1", "regmean", calibration=1),
        Operator("regmean-4", "regmean", rank=2, calibration=4),
        Operator("swapped", "regmean", rank=2, calibration=4, swapped=True),
        Operator("fisher", "fisher", calibration=4),
    )
}  # fmt: skip


def make_base_folder(folder: Path) -> Path:
    """A random Llama of three layers that reads characters, as transformers would store it."""
    make_base(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=character_tokenizer(), unk_token=" ")
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter_plan(name: str, exam: str, **recipe: Any) -> AdapterPlan:
    asked = EXAMS[exam]
    given = {"rank": 2, "alpha": 8, "lr": 2e-2, "steps": 6, "batch": 4, "layers": (1, 2)} | recipe
    return AdapterPlan(name, exam, Recipe(asked.domain, asked.tasks, **given), items=12)


def make_tier(*names: str, seed: int = 0, gradients: bool = True) -> Tier:
    """Two adapters of math, one of every other exam; operators on pairs of different exams.

    ``names`` of operators; by default all.
    """
    operators = {name: OPERATORS[name] for name in names or OPERATORS}
    adapters = {
        plan.name: plan
        for plan in (
            make_adapter_plan("math-a", "math"), make_adapter_plan("math-b", "math", init_seed=1),
            make_adapter_plan("case-a", "case", seed=1, layers=(2, 2)),
            make_adapter_plan("life-a", "life", variant="osrm"),
        )
    }  # fmt: skip
    merges = [
        MergePlan(operator, pair) for operator in operators for pair in combinations(adapters, 2)
        if pair[0][:4] != pair[1][:4]
    ]  # fmt: skip
    return Tier(
        "tiny-test", "seconds", seed, EXAMS, adapters, operators, {m.key: m for m in merges},
        crossed=("math-a", "case-a"), test_items=8, calibration_items=6, gradients=gradients,
    )  # fmt: skip
