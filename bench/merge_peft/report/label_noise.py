"""How much of what labels differ by is noise of test items and of training."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .operator_table import Row, clipped, grouped

MEASURES = ("ll_norm", "option_norm", "prob_ret", "retention", "accuracy_norm")


def noise_floor(rows: Sequence[Row]) -> dict[str, Any]:
    """How much of what labels differ by is noise.

    Returns:
        measures: for each of ``MEASURES`` that rows have: rows, sd, se (median), and reliability:
        the share of the variance within (operator, study, domains of victim and partner) that is
        not squared standard error, None without cells of two rows.
        retrained: for ll_norm, prob_ret and retention the standard deviation between adapters
        trained alike but for their seeds, merged with the same others: "order" where they
        started from the same A0, "start" where not, each ``{"sd", "groups"}``.
    """
    measures = {}
    for name in MEASURES:
        have = [r for r in rows if r[name] is not None]
        if len(have) < 2:
            continue
        values = np.array([clipped(r) if name == "ll_norm" else r[name] for r in have])
        errors = np.array([r[f"{name}_se"] for r in have])
        cells = grouped(range(len(have)), lambda n: _cell(have[n]))  # noqa: B023
        inside = [(len(of) - 1, float(values[of].var(ddof=1)), float((errors[of] ** 2).mean()))
                  for of in cells.values() if len(of) > 1]  # fmt: skip
        reliability = None
        if inside:
            freedom, variances, noise = np.array(inside).T
            spread = float(freedom @ variances)
            reliability = 1 - float(freedom @ noise) / spread if spread else None
        measures[name] = {"rows": len(have), "sd": float(values.std(ddof=1)),
                          "se": float(np.median(errors)), "reliability": reliability}  # fmt: skip
    retrained = {
        name: {"order": _between_seeds(rows, name, same_start=True),
               "start": _between_seeds(rows, name, same_start=False)}
        for name in ("ll_norm", "prob_ret", "retention")
    }  # fmt: skip
    return {"measures": measures, "retrained": retrained}


def _between_seeds(rows: Sequence[Row], name: str, *, same_start: bool) -> dict[str, Any]:
    """Pooled over groups of rows that differ in the victim's seeds alone."""

    def alike(row: Row) -> Hashable:
        others = tuple(sorted(m for m in row["members"] if m != row["member"]))
        start = row["train_init_seed"] if same_start else None
        recipe = (row[f"train_{n}"] for n in ("rank", "lr", "steps", "variant"))
        return (row["operator"], others, row["exam"], *recipe, tuple(row["train_layers"]), start)

    squares = freedom = groups = 0
    for mine in grouped([r for r in rows if r[name] is not None], alike).values():
        if not same_start:  # one of each start, so that only different ones are compared
            mine = [*{r["train_init_seed"]: r for r in reversed(mine)}.values()]
        values = np.array([clipped(r) if name == "ll_norm" else r[name] for r in mine])
        if len(values) > 1:
            squares += float(((values - values.mean()) ** 2).sum())
            freedom += len(values) - 1
            groups += 1
    return {"sd": (squares / freedom) ** 0.5 if freedom else None, "groups": groups}


def _cell(row: Row) -> Hashable:
    return row["operator"], row["study"], row["size"], row["domain"], row["partner_domain"]
