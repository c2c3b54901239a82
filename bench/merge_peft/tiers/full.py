"""The full size: public data of one's own, and any base model. Hours on a GPU; not measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json

from ..public import hub
from .bank import shuffled
from .operators import OPERATORS
from .plan import AdapterPlan, Exam, MergePlan, Operator, Tier
from .recipe import Recipe

# What a domain trains and is tested on: sets that belong together; the first that are there.
CHOICES: dict[str, tuple[tuple[str, ...], ...]] = {
    "math": (("gsm8k",),),
    "code": (("mbpp", "humaneval"), ("mbpp",)),
    "science": (("sciq", "arc"), ("sciq",), ("arc",)),
    "instruct": (("dolly", "alpaca"), ("dolly",), ("alpaca",)),
    "safety": (("saferlhf", "xstest"),),
}
_ROLES = {
    "mid": Recipe("", lr=5e-4, steps=400), "seed": Recipe("", lr=5e-4, steps=400, seed=1),
    "small": Recipe("", rank=4, lr=3e-4, steps=400, seed=2, init_seed=1),
    "long": Recipe("", rank=16, lr=5e-4, steps=1200, seed=3),
}  # fmt: skip
_SEVERAL = ("mean", "ties", "tsv_m")
_PAIRS = 40  # with each of these, and RegMean with all calibration texts there are
_ITEMS, _TEST_ITEMS, _CALIBRATION_ITEMS = 5000, 256, 48  # at most, where the sets have as many
_WHEEL_LAYERS = 30


def tier(
    data: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, seed: int = 0
) -> Tier:
    """Four adapters a domain in all layers of the base model, on the sets that a folder has.

    Pairs of all domains with the sum, forty of them and sets of all domains with others.

    Args:
        data: a folder as ``public.hub`` describes it, with sets for two domains at least;
            ``Tier.about`` says which were found.
        base: as ``load_base`` takes it; only its config is read here.
        seed: of test items and calibration texts.

    Raises:
        InputError: fewer than two domains, files that are wrong, a base model without layers.
    """
    folder = os.path.abspath(os.fspath(data))
    exams = _exams(folder)
    have = {name: hub.read(folder, exam.tasks) for name, exam in exams.items()}
    layers = 0, _layers(base) - 1
    adapters = {}
    for domain, exam in exams.items():
        items = min(_ITEMS, have[domain].count("train"))
        for role, recipe in _ROLES.items():
            recipe = replace(recipe, domain=domain, tasks=exam.tasks, layers=layers)
            name = f"{domain}-{role}"
            adapters[name] = AdapterPlan(name, domain, recipe, items)
    pairs = shuffled([
        (a.name, b.name) for a, b in combinations(adapters.values(), 2) if a.exam != b.exam
    ])  # fmt: skip
    sets = [tuple(f"{domain}-{role}" for domain in exams) for role in _ROLES]
    texts = min(_CALIBRATION_ITEMS, *(h.count("calibration") for h in have.values()))
    regmean = Operator(f"regmean-{texts}", "regmean", calibration=texts)
    operators = {name: OPERATORS[name] for name in ("sum", *_SEVERAL)} | {regmean.name: regmean}
    several = (*_SEVERAL, regmean.name)
    merges = [
        *_plans(["sum"], pairs, "pairs"), *_plans(several, pairs[:_PAIRS], "pairs"),
        *(_plans([*operators], sets, "sets") if len(exams) > 2 else ()),
    ]  # fmt: skip
    found = ", ".join(name for exam in exams.values() for name in exam.tasks)
    return Tier(
        "full", f"hours on one GPU (not measured); {found}", seed,
        exams=exams, adapters=adapters,
        operators=operators,
        merges={merge.key: merge for merge in merges}, crossed=sets[0],
        test_items=min(_TEST_ITEMS, *(h.count("test") for h in have.values())),
        calibration_items=texts,
    )  # fmt: skip


def left_out(tier: Tier) -> dict[str, dict[str, int]]:
    """By exam and reason, how many rows of its sets are no items."""
    found = {}
    for name, exam in tier.exams.items():
        if exam.data:
            reasons = hub.read(exam.data, exam.tasks).left_out
            found[name] = {reason: len(places) for reason, places in reasons.items()}
    return found


def _exams(folder: str) -> dict[str, Exam]:
    exams = {}
    for domain, choices in CHOICES.items():
        for names in choices:
            if all(hub.find(folder, name) for name in names):
                exams[domain] = Exam(domain, domain, names, data=folder)
                break
    if len(exams) < 2:
        wanted = "; ".join(f"{domain}: {' + '.join(c[0])}" for domain, c in CHOICES.items())
        raise InputError(f"has sets for fewer than two domains of {wanted}", path=folder)
    return exams


def _plans(
    operators: Sequence[str], members: Sequence[tuple[str, ...]], study: str
) -> list[MergePlan]:
    return [MergePlan(operator, names, study) for names in members for operator in operators]


def _layers(base: str | os.PathLike[str] | None) -> int:
    if base is None:
        return _WHEEL_LAYERS
    path = Path(base) / "config.json"
    if not path.is_file():
        raise InputError("has no config.json: not the folder of a base model", path=base)
    config = strict_json.read(path)
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if type(count) is not int or count < 1:
        raise InputError(f"is {count!r}: how many layers?", path=path, key="num_hidden_layers")
    return count
