"""The exams of a run: their test items, looked through for leaks, and written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from mergeprobe_fast.errors import InputError

from ..outcome.journal import Journal
from ..stages import routers
from ..tasks.item import Item
from ..tasks.leaks import check_leaks
from ..tasks.words import Split
from ..tiers.plan import Exam, Tier
from .work import osrm_items


def check_exams(tier: Tier) -> dict[str, list[Item]]:
    """The test items of every exam, once no split of any exam leaks into another.

    Exams of one domain are looked at together: they may share tasks, and adapters are measured on
    each other's. What two exams ask alike counts once.
    """
    domains: dict[str, dict[Split, dict[str, Item]]] = {}
    test = {}

    def add(exam: Exam, split: Split, items: Iterable[Item]) -> None:
        kept = domains.setdefault(exam.domain, {"train": {}, "test": {}, "calibration": {}})
        for item in items:
            kept[split].setdefault(item.prompt, item)

    draws = {(a.exam, a.items, a.recipe.seed) for a in tier.adapters.values()}
    draws |= {(name, tier.calibration_items, tier.seed) for name in routers.exams_of(tier)}
    for name, count, seed in sorted(draws):
        add(tier.exams[name], "train", tier.exams[name].items("train", count, seed))
    for name, exam in tier.exams.items():
        test[name] = exam.items("test", tier.test_items, tier.seed)
        add(exam, "test", test[name])
        add(exam, "calibration", exam.items("calibration", tier.calibration_items, tier.seed))
    for plan in tier.adapters.values():
        for item in osrm_items(plan):
            if item.domain in domains:
                domains[item.domain]["train"].setdefault(item.prompt, item)
    for splits in domains.values():
        check_leaks(*(list(splits[split].values()) for split in ("train", "test", "calibration")))
    return test


def write_exams(tier: Tier, journal: Journal, test: dict[str, list[Item]]) -> None:
    """Which items each exam has; the same ones as before where it is there."""
    for name, items in test.items():
        exam = asdict(tier.exams[name])
        if not exam["data"]:
            del exam["data"]
        line = {
            "kind": "exam", "exam": exam.pop("name"), **exam, "tasks": list(exam["tasks"]),
            "item_keys": [f"{item.task}/{item.key}" for item in items],
            "kinds": [item.kind for item in items],
            "refuse": [int(i.check["refuse"]) if i.kind == "refusal" else -1 for i in items],
            "sha256": _sha256(items),
        }  # fmt: skip
        there = journal.exams.get(name)
        # The first runs had no sha256; they go on, with one from now on.
        if there is not None and {**line, **there} != line:
            raise InputError("its items have changed since this run began", path=journal.path,
                             key=name)  # fmt: skip
        if there != line:
            journal.append(line)


def _sha256(items: Sequence[Item]) -> str:
    """Of all that the items say."""
    told = json.dumps([asdict(item) for item in items], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
