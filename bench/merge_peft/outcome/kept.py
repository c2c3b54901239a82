"""What adapters gain alone and keep in a merge, on their own test items, with errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tiers.plan import BASE, Tier, single_key
from .noise import Bootstrap, Estimate
from .scores import Asked, Measured, RunScores


def kept(
    base: Measured, single: Measured, merged: Measured, exam: Asked, member: str, name: str
) -> dict[str, float | None]:
    """What a merge keeps of one member on its own n items, with standard errors.

    Args:
        base, single, merged: scores of the model, of the member and of the merge.
        exam: the items.
        member: the adapter, whose gain alone is judged in the same way in all of its merges.
        name: the seed of the bootstrap of the errors.

    Returns:
        utility and loglik (nats a token) of the three; retention (utility merged/single);
        accuracy_norm, ll_norm and option_norm: (merged - base) / (single - base) of the utility,
        the log-likelihood and that among the options, None where the single adapter's gain is
        not above two standard errors (utility: its loss neither); prob_ret, exp(merged - single)
        of the log-likelihoods. "_se": from a paired bootstrap over items.
    """
    draw = Bootstrap(exam.keys, exam.refuse, name)
    judge = Bootstrap(exam.keys, exam.refuse, single_key(member))
    runs = {"base": base, "single": single, "merged": merged}
    utility = {which: draw.utility(scores.correct) for which, scores in runs.items()}
    loglik = {which: draw.mean(scores.loglik) for which, scores in runs.items()}
    option = {which: draw.mean(scores.option_loglik) for which, scores in runs.items()}
    gain = {
        "utility": judge.utility(single.correct) - judge.utility(base.correct),
        "loglik": judge.mean(single.loglik) - judge.mean(base.loglik),
        "option": judge.mean(single.option_loglik) - judge.mean(base.option_loglik),
    }
    ratios: dict[str, Estimate | None] = {
        "retention": utility["merged"].over(utility["single"]),
        "accuracy_norm": _normalised(utility) if gain["utility"].sure else None,
        "ll_norm": _normalised(loglik) if _gains(gain["loglik"]) else None,
        "option_norm": _normalised(option) if _gains(gain["option"]) else None,
        "prob_ret": (loglik["merged"] - loglik["single"]).exp(),
    }
    found: dict[str, float | None] = {f"utility_{which}": u.value for which, u in utility.items()}
    found |= {f"loglik_{which}": value.value for which, value in loglik.items()}
    for what, estimate in ratios.items():
        found[what] = None if estimate is None else estimate.value
        found[f"{what}_se"] = None if estimate is None else estimate.se
    return found


def _gains(gain: Estimate) -> bool:
    return gain.sure and gain.value > 0


def _normalised(of: Mapping[str, Estimate]) -> Estimate | None:
    return (of["merged"] - of["base"]).over(of["single"] - of["base"])


def single_gains(run: RunScores, tier: Tier) -> list[dict[str, Any]]:
    """What each adapter gains on its own exam over the base model, in the order of the tier.

    Each: adapter, exam, domain, utility_base, utility_single, utility_gain, loglik_base,
    loglik_single, loglik_gain (nats a token), the gains with "_se", and steps, rank, loss.
    """
    found = []
    for name, plan in tier.adapters.items():
        base = run.scores.get((BASE, plan.exam))
        single = run.scores.get((single_key(name), plan.exam))
        if base is None or single is None:
            continue
        exam = run.exams[plan.exam]
        draw = Bootstrap(exam.keys, exam.refuse, single_key(name))
        line = {"adapter": name, "exam": plan.exam, "domain": exam.domain,
                "steps": plan.recipe.steps, "rank": plan.recipe.rank,
                "variant": plan.recipe.variant, "note": plan.note,
                "loss": run.trained.get(name, {}).get("loss")}  # fmt: skip
        for what, measure, of in (
            ("utility", draw.utility, "correct"), ("loglik", draw.mean, "loglik"),
        ):  # fmt: skip
            before, after = measure(getattr(base, of)), measure(getattr(single, of))
            gain = after - before
            line |= {f"{what}_base": before.value, f"{what}_single": after.value,
                     f"{what}_gain": gain.value, f"{what}_gain_se": gain.se}  # fmt: skip
        found.append(line)
    return found
