"""A run of MERGE-PEFT that nobody trained: a tier and a journal, made up from a seed."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.merge_peft.tiers.plan import AdapterPlan, Exam, MergePlan, Operator, Tier
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe

DOMAINS = ("math", "code", "science", "instruct", "safety")
OPERATORS = {  # name: (method, rank, calibration, what a partner costs, what the size costs)
    "sum": ("cat", None, 0, 0.20, 0.10), "mean": ("cat", None, 0, 0.15, 0.14),
    "ties": ("ties", None, 0, 0.13, 0.08), "regmean-48": ("regmean", None, 48, 0.02, 0.004),
    "sum-r16": ("svd", 16, 0, 0.24, 0.15), "mean-r16": ("svd", 16, 0, 0.19, 0.17),
    "regmean-48-r16": ("regmean", 16, 48, 0.03, 0.02),
}  # fmt: skip


def make_tier(adapters: int = 35, pairs: int = 60, seed: int = 3, sizes: tuple = (2, 5)) -> Tier:
    """``adapters`` of five exams: every fifth recipe comes again with other seeds."""
    exams = {f"{d}-exam": Exam(f"{d}-exam", d) for d in DOMAINS}
    plans = {}
    for n in range(adapters):
        domain, lap = DOMAINS[n % 5], n // 5
        recipe = Recipe(
            domain, rank=(4, 8, 16)[lap % 3], lr=(5e-4, 2e-3)[lap % 2], steps=48 + 16 * (lap % 6),
            seed=lap // 6, init_seed=lap % 2,
        )  # fmt: skip
        name = f"{domain}-{lap}"
        plans[name] = AdapterPlan(name, f"{domain}-exam", recipe)
    rng = np.random.default_rng(seed)
    all_pairs = list(combinations(plans, 2))
    merges = []
    for k in rng.permutation(len(all_pairs))[:pairs]:
        a, b = all_pairs[k]
        study = "same" if plans[a].exam == plans[b].exam else "pairs"
        merges += [MergePlan(o, (a, b), study) for o in OPERATORS if not o.endswith("-r16")]
    for size in sizes:
        members = tuple(list(plans)[:size])
        merges += [MergePlan(o, members, "capacity") for o in OPERATORS]
    return Tier(
        "made", "made up", seed, exams, plans,
        {name: Operator(name, m, rank=r, calibration=c)
         for name, (m, r, c, _, _) in OPERATORS.items()},
        {merge.key: merge for merge in merges}, test_items=48,
    )  # fmt: skip


def make_journal(folder: Path, tier: Tier, seed: int = 5) -> list[dict[str, Any]]:
    """Write journal.jsonl; its lines come back. One merge failed, and five adapters are routed."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = [
        {"kind": "run", "version": 1, "tier": tier.name, "seed": tier.seed, "digest": tier.digest,
         "base": "made-up-base", "base_fingerprint": "0" * 64, "device": "cpu",
         "versions": {"mergeprobe_fast": "0.1.0", "torch": "2.0"}, "only": None},
    ]  # fmt: skip
    base, gain, hardness = {}, {}, {}
    for name, exam in tier.exams.items():
        n, safety = tier.test_items, exam.domain == "safety"
        keys = [f"task/{k // 2 if safety else k}" for k in range(n)]
        refuse = [k % 2 for k in range(n)] if safety else [-1] * n
        kind = "refusal" if safety else "exact"
        lines.append({"kind": "exam", "exam": name, "domain": exam.domain, "tasks": ["task"],
                      "twist": exam.twist, "item_keys": keys, "kinds": [kind] * n,
                      "refuse": refuse})  # fmt: skip
        base[name] = rng.normal(-3.0, 0.6, n)
        hardness[name] = rng.normal(-1.2, 0.5, n)
        lines.append(_scores("base", name, base[name], hardness[name]))
    for name, plan in tier.adapters.items():
        gain[name] = rng.uniform(1.2, 2.4)
        recipe = {"domain": plan.recipe.domain, "rank": plan.recipe.rank}
        lines.append({"kind": "trained", "adapter": name, "exam": plan.exam, "recipe": recipe,
                      "items": plan.items, "first_loss": 3.0, "loss": 3.0 - gain[name],
                      "seconds": 20.5, "rank": plan.recipe.rank,
                      "parameters": 20_000 * plan.recipe.rank, "note": plan.note})  # fmt: skip
        ll = base[plan.exam] + gain[name] + rng.normal(0, 0.2, tier.test_items)
        lines.append(_scores(f"single({name})", plan.exam, ll, hardness[plan.exam]))
    for key, merge in tier.merges.items():
        method, rank, _, partner, many = OPERATORS[merge.operator]
        if method == "ties" and merge.study == "same":
            lines.append({"kind": "failed", "key": key, "operator": merge.operator,
                          "members": list(merge.members),
                          "reason": "made to <fail> & tell"})  # fmt: skip
            continue
        held = sum(20_000 * tier.adapters[m].recipe.rank for m in merge.members)
        lines.append({"kind": "merged", "key": key, "operator": merge.operator,
                      "members": list(merge.members), "weights": None, "study": merge.study,
                      "rank": rank or 8 * len(merge.members), "parameters": held,
                      "seconds": 0.4})  # fmt: skip
        for exam in {tier.adapters[m].exam: None for m in merge.members}:
            mine = [m for m in merge.members if tier.adapters[m].exam == exam]
            rest = {tier.exams[tier.adapters[m].exam].domain for m in merge.members}
            cost = partner * (1 + ("science" in rest) + rng.exponential(0.8))
            cost += many * np.log2(len(merge.members) / 2)
            ll = base[exam] + gain[mine[0]] * (1 - cost) + rng.normal(0, 0.2, tier.test_items)
            lines.append(_scores(key, exam, ll, hardness[exam]))
    members = list(tier.adapters)[:5]
    for name, right in (("oracle routing", 1.0), ("learned router", 0.97)):
        for member in members:
            exam = tier.adapters[member].exam
            ll = base[exam] + right * gain[member]
            scores = _scores("", exam, ll, hardness[exam])
            del scores["key"], scores["seconds"]
            lines.append({**scores, "kind": "routed", "operator": name, "members": members,
                          "chosen": [0] * tier.test_items, "accuracy": right,
                          "seconds_per_prompt": 0.012, "parameters": 2880})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder, lines)
    return lines


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    """journal.jsonl of these lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "journal.jsonl").write_text(text, encoding="utf-8")


def _scores(key: str, exam: str, loglik: np.ndarray, hardness: np.ndarray) -> dict[str, Any]:
    return {"kind": "scores", "key": key, "exam": exam, "loglik": loglik.tolist(),
            "option_loglik": loglik.tolist(), "correct": (loglik > hardness).astype(int).tolist(),
            "seconds": 1.5}  # fmt: skip
