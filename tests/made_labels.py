"""Rows of labels that nobody measured."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from made_runs import DOMAINS


def row(members: tuple[str, ...], member: str, ll_norm: float | None, **changes: Any) -> dict:
    """A label of one member; its domain is its name's first letter."""
    operator = changes.get("operator", "sum")
    others = [m for m in members if m != member]
    pair = len(members) == 2
    return {
        "row": f"{operator}({'+'.join(members)})|{member}", "operator": operator, "method": "cat",
        "rank": None, "calibration": 0, "study": "pairs", "members": list(members),
        "size": len(members), "member": member, "exam": member[0], "domain": member[0],
        "partner": others[0] if pair else None, "partner_domain": others[0][0] if pair else None,
        "ll_norm": ll_norm, "ll_norm_se": 0.01, "retention": ll_norm, "retention_se": 0.05,
        "prob_ret": ll_norm, "prob_ret_se": 0.01, "option_norm": None, "option_norm_se": None,
        "accuracy_norm": None, "accuracy_norm_se": None, "resident": 1, "parameters_ratio": 2.0,
        "merged_rank": 16, "merge_seconds": 0.5, "seconds_per_prompt": None, "routed_right": None,
        "train_rank": 8, "train_lr": 1e-3, "train_steps": 50, "train_seed": 0,
        "train_init_seed": 0, "train_layers": [26, 29], "train_variant": "lora",
        "command": "again", **changes,
    }  # fmt: skip


def draw_pairs(rng: np.random.Generator, n: int = 12, share: float = 1.0, **changes: Any) -> list:
    """Both rows of pairs of n adapters: an effect of the victim, one of the partner, and noise."""
    names = [f"{DOMAINS[k % 5]}{k}" for k in range(n)]
    weak, bad = rng.normal(0, 0.1, n) * share, rng.normal(0, 0.1, n) * share
    rows = []
    for i, j in combinations(range(n), 2):
        for a, b in ((i, j), (j, i)):
            value = 0.7 + weak[a] + bad[b] + rng.normal(0, 0.02)
            rows.append(row((names[i], names[j]), names[a], value, **changes))
    return rows
