"""Why a plan is as it is, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergeprobe_fast.planning.book import Book, Set
from mergeprobe_fast.planning.judging import Judge
from mergeprobe_fast.planning.verdict import Verdict
from mergeprobe_fast.predict.columns import EARLY
from mergeprobe_fast.recorded import Recorded, lacks_output_moments

VERBS = {
    "merge": "merged as they are",
    "reweight": "merged with weights fitted to their inputs",
    "prune": "merged with harmful components left out",
    "regmean": "merged by their inputs (RegMean)",
    "route": "kept as it is",
}


def share(value: float) -> str:
    """0.943 as 94.3 %."""
    return f"{100 * value:.1f} %"


def list_of(names: Sequence[str]) -> str:
    """a, b and c."""
    head, last = names[:-1], names[-1]
    return f"{', '.join(head)} and {last}" if head else last


def refusal(verdict: Verdict, book: Book, names: Sequence[str]) -> str:
    """Why an action is not allowed for a set."""
    if verdict.refused is not None:
        return f"{verdict.action}: not available for this set ({verdict.refused})"
    if verdict.outside.any() and not book.anything:
        hit = [n for n, out in zip(names, verdict.outside, strict=True) if out]
        return f"{verdict.action}: no prediction for {_some(hit)}, outside what the model has seen"
    if not np.isfinite(verdict.retention).all():
        hit = [n for n, r in zip(names, verdict.retention, strict=True) if not np.isfinite(r)]
        return f"{verdict.action}: no prediction for {_some(hit)}, a value it needs is undefined"
    floored, word = verdict.retention, "would keep"
    if book.costs.floor_on == "low":
        floored, word = np.nan_to_num(verdict.low, nan=-np.inf), "might keep as little as"
    at = int(np.argmin(floored))
    if not np.isfinite(floored[at]):
        return f"{verdict.action}: no interval for {names[at]}, and the floor is on its lower end"
    return (f"{verdict.action}: {names[at]} {word} {share(floored[at])} "
            f"(floor {share(book.floor)})")  # fmt: skip


def poorer(judge: Judge, recorded: Recorded, predictor: Any) -> list[str]:
    """Notes where the predictor knows a richer level than answers here, and what would give it."""
    level = judge.level.removeprefix(EARLY)
    known = [n.removeprefix(EARLY) for n in getattr(predictor, "levels", ())
             if n.startswith(EARLY) == judge.level.startswith(EARLY)]  # fmt: skip
    better = known[known.index(level) + 1 :] if level in known else []
    if not better or recorded.calibration is None:
        return []
    lack = lacks_output_moments(recorded)
    if lack is not None and "calibration" in better:
        with_zoo = ", with --adapters ZOO level points" if "points" in better else ""
        return ["predicted from weights alone: the calibration has inputs and no output moments, "
                "as those of older versions; one that 'calibrate' makes now gives level "
                f"calibration{with_zoo}"]  # fmt: skip
    if recorded.points is None and better[-1] == "points":
        return [f"predicted from level {level}: the calibration has no losses at the adapters; "
                "one made with --adapters ZOO gives level points"]  # fmt: skip
    return [f"predicted from level {level} mostly: values that level {better[-1]} needs are "
            "undefined of most merges"]  # fmt: skip


def _some(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return list_of(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def group_reasons(book: Book, ranks: Set, names: Sequence[str]) -> tuple[str, ...]:
    """Why a group is merged as it is; ``names`` by rank."""
    own = [names[i] for i in ranks]
    best = book.best(ranks)
    at = int(np.argmin(best.retention))
    said = [f"{len(own)} adapters {VERBS[best.action]}: {share(best.retention.mean())} kept on "
            f"average, {share(best.worst)} at worst ({own[at]})"]  # fmt: skip
    if np.isfinite(best.low[at]):
        said[0] += f", {share(best.low[at])} to {share(best.high[at])}"
    said += [refusal(v, book, own) for v in book.verdicts(ranks) if not v.allowed]
    for v in book.verdicts(ranks):
        if v.allowed and v.action != best.action:
            said.append(f"{v.action}: allowed too, {share(v.worst)} at worst, and costs no less")
    return tuple(said)


def routed_reasons(
    book: Book, one: Set, groups: Sequence[Set], labels: Sequence[str], names: Sequence[str]
) -> tuple[str, ...]:
    """Why an adapter stays alone: the group it would fit best, and who would be hurt by it."""
    tried = []
    for group, label in zip(groups, labels, strict=True):
        if group == one:
            continue
        union = tuple(sorted((*group, *one)))
        verdict = book.closest(union)
        if verdict is not None:
            tried.append((verdict, union, label, group))
    if not tried:
        return ("it is the only adapter" if len(groups) == 1 else "nothing was judged",)
    known = [t for t in tried if t[0].known]
    if not known:
        return ("no prediction for any group it could join: outside what the model has seen",)
    # The group where most is left, and of equals the first.
    verdict, union, label, group = max(known, key=lambda t: (t[0].allowed, t[0].worst))
    best = book.best(union)
    where = f"fits {label} best"
    if best is not None:
        more = (book.price(union) - book.price(group) - book.price(one)) / 1e9
        return (f"{where}, where {share(best.worst)} would be kept at worst ({best.action}); "
                f"that costs {more:.2f} more than it saves",)  # fmt: skip
    return (f"{where}; {refusal(verdict, book, [names[i] for i in union])}",)
