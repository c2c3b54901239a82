"""The results in a few lines, and what falls short: sentences whose numbers are the runs'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..report.charts import number
from ..report.tables import told_apart
from ..study.predictors import ALL, METADATA, NAMES, PAIR_MEAN
from .foretold import TITLES, percent
from .operators import ranged

_SATURATED = 0.95


def short(found: Mapping[str, Any], analysis: Mapping[str, Any] | None) -> str:
    """Markdown: one line a question; of a summary.json and of ``study.analysis.analyse``."""
    told = [*_operators(found), *_routers(found)]
    if analysis:
        told += _foretold(analysis)
    return "\n".join(f"- {line}" for line in told)


def _operators(found: Mapping[str, Any]) -> Iterator[str]:
    largest = max((r["size"] for r in found["capacity"]), default=0)
    for block in found["studies"]:
        pairs = block["study"] == "pairs"
        if not pairs and (block["study"], block["size"]) != ("capacity", largest):
            continue
        what = "Pairs" if pairs else f"{largest} adapters in one"
        few = len(block["dropped"]) * 2 > len(block["operators"])
        if few or not block["comparable"]:
            yield f"{what}: operators were measured on different sets, so that none is the best."
        if few:  # the highest of what is left would say little
            continue
        records = {r["operator"]: r for r in block["common"] or block["operators"]}
        for best in block["highest"]:
            of, kind = records[best["operator"]], best["of"].removeprefix("all ")
            kind = kind if pairs else f"operators of {kind}"
            yield (f"{what}, highest mean of {best['count']} {kind}: {best['operator']}, ll_norm "
                   f"{ranged(of['ll_norm'], of['ll_norm_interval'], 3)}, the worst member "
                   f"{number(of['ll_norm_worst'])}, accuracy kept "
                   f"{ranged(of['retention'], of['retention_interval'])}"
                   f"{told_apart(best)}.")  # fmt: skip
        if block["dropped"]:
            yield (f"{what}: not among these, measured on too few of the same sets: "
                   f"{', '.join(block['dropped'])}.")  # fmt: skip


def _routers(found: Mapping[str, Any]) -> Iterator[str]:
    for block in found["studies"]:
        routed = [r for r in block["operators"] if r["routed_right"] is not None]
        if routed:
            told = "; ".join(f"{r['operator']} {number(r['ll_norm'])}" for r in routed)
            merged = [r for r in block["operators"]
                      if r not in routed and r["ll_norm"] is not None]  # fmt: skip
            if merged:
                best = max(merged, key=lambda r: r["ll_norm"])
                told += f"; the highest merged {number(best['ll_norm'])} ({best['operator']})"
            yield f"{block['size']} adapters side by side, ll_norm: {told}."


def _foretold(analysis: Mapping[str, Any]) -> Iterator[str]:
    noise = analysis["noise"][analysis["target"]]
    yield (f"{analysis['target']} of `{analysis['operator']}` is {percent(noise['reliability'])} "
           f"signal, {percent(noise['reliability_within'])} inside a directed domain pair; which "
           f"two domains meet explains {percent(analysis['domain_share'])} of the variance of its "
           "ranks.")  # fmt: skip
    for split in ("adapter", "domain"):
        by_name = {s["name"]: s for s in analysis["splits"][split] if "rho" in s}
        if {PAIR_MEAN, METADATA, NAMES, ALL} <= by_name.keys():
            told = "; ".join(
                f"{words} {ranged(by_name[n]['rho'], by_name[n]['rho_interval'])} overall, "
                f"{number(by_name[n]['within'], 2)} inside"
                for words, n in (("the domain pair's mean", PAIR_MEAN),
                                 ("training metadata", METADATA),
                                 ("which adapters they are", NAMES), ("all signals", ALL))
            )  # fmt: skip
            yield f"Foretold, {TITLES[split].lower()} held out, rank correlation: {told}."


def shortfalls(found: Mapping[str, Any], analysis: Mapping[str, Any] | None) -> str:
    """Markdown: what the numbers do not say, counted."""
    run, gains = found["run"], found["gains"]
    unsure = [g["adapter"] for g in gains if g["loglik_gain"] <= 2 * g["loglik_gain_se"]]
    full = [g["adapter"] for g in gains if g["utility_single"] >= _SATURATED]
    told = [
        "One base model, one set of test items: intervals are over adapters and say nothing of "
        "other models or tasks.",
        "Calibration texts are other questions in other words, but of the very tasks that are "
        "tested: methods that learn from data know what is coming.",
    ]
    if run["merges"] + len(found["failed"]) < run["merges_planned"]:
        left = run["merges_planned"] - run["merges"] - len(found["failed"])
        told.append(f"{left} of {run['merges_planned']} planned merges were not run.")
    if unsure:
        told.append(f"{len(unsure)} of {len(gains)} adapters have no sure gain alone and no "
                    f"ll_norm: {', '.join(unsure)}.")  # fmt: skip
    if full:
        told.append(f"{len(full)} of {len(gains)} adapters solve {percent(_SATURATED)} of their "
                    f"test items or more: {', '.join(full)}.")  # fmt: skip
    if analysis:
        told.append("What is foretold is foretold of one operator and of pairs; its intervals draw "
                    "adapters anew and keep the fitted models.")  # fmt: skip
        if analysis["without_partner"]:
            told.append(f"{analysis['without_partner']} labels are not foretold: their partner was "
                        "not measured alone.")  # fmt: skip
        for side, s in analysis["seed_noise"].items():
            if not s["groups"]:
                told.append(f"No {side} was trained again with other seeds.")
        told += [f"{sum(counts.values())} adapters have no usable snapshot at "
                 f"{time.removeprefix('at')}: {counts['too_early']} too early, {counts['missing']} "
                 "missing." for time, counts in analysis["left_out"].items()
                 if sum(counts.values())]  # fmt: skip
    return "\n".join(f"- {line}" for line in told)
