"""The part of the results page that says how far damage can be foretold, and what is noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..report.charts import number
from ..study.analysis import EARLY, FINAL
from ..study.predictors import (
    ALL,
    BOTH,
    MEAN,
    METADATA,
    NAMES,
    PAIR_MEAN,
    PHYSICAL,
    RECIPE,
    WEIGHTS,
)
from ..study.splits import SPLITS
from .operators import markdown, ranged
from .pictures import Mark, dots

_SHOWN = 15
TITLES = {"adapter": "The victim's adapter", "partner": "The partner's adapter",
          "domain pair": "The domain pair", "domain": "The victim's domain",
          "seed": "The victim's seed"}  # fmt: skip
# What rows share and what they differ in where "inside" is asked.
_INSIDE = {
    "adapter": "which partner, of one domain, costs a new victim more",
    "partner": "which victim, of one domain, a new partner costs more",
    "domain pair": "adapters that were all seen, in other domain pairs",
    "domain": "new victims of a new domain, beside partners that were seen",
    "seed": "new victims of a new seed, beside partners of which some were seen",
}
# Of an interval that is above 0, below, or holds it.
_COMPARED = ("do better than", "do worse than", "show no gain over")
_ADDED = ("add to", "take from", "add nothing sure to")
# Shown whatever they are worth: what other tools and papers look at.
NAMED = ("cosine", "norm_b_to_a", "over_amplification", "row_overlap", "col_overlap",
          "row_capture_a_by_b", "cross_to_self_a_by_b", "activation_cosine_a",
          "gradient_cosine_base", "first_order_base_a_by_b", "fisher_cosine_base_a",
          "damage_base_a_by_b", "damage_trained_a_by_b", "curvature_share_trained_a_by_b",
          "probe_gradient_cosine", "probe_first_order_a_by_b")  # fmt: skip


def pictures(found: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name; of ``study.analysis.analyse``."""
    rows = [r for r in found["splits"]["adapter"] if r.get("rho") is not None
            and r["name"] != MEAN]  # fmt: skip
    if not rows:
        return {}
    drawn = {r["name"]: [_mark(r, "rho"), _mark(r, "within")] for r in rows}
    title = "Victims held out: rank correlation with what they keep, 95 % over adapters"
    return {"predictors": dots(title, ["overall", "inside a domain pair"], drawn, at=0.0)}


def _mark(record: Mapping[str, Any], key: str) -> Mark | None:
    """None where the number does not exist."""
    value, interval = record[key], record[f"{key}_interval"]
    return None if value is None else Mark(value, None if None in interval else interval)


def section(found: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Markdown; ``names`` are the files of pictures."""
    parts = [
        "### What is noise", *_noise(found),
        "### What can be foretold", *_explained(found, names),
        "### What single signals say", *_signals(found),
    ]  # fmt: skip
    if found["early"]:
        parts += ["### How early", *_early(found)]
    return "\n\n".join(parts)


def _noise(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{found['rows']} directed labels of `{found['operator']}`, pairs of different domains, "
        f"{found['adapters']} adapters. Reliability: the share of the variance that is not the "
        "squared standard error of the test items, over all labels and inside a directed domain "
        "pair, which is what a signal has to explain. On exams without options option_norm is "
        "ll_norm."
    )
    if found["without_partner"]:
        yield (f"{found['without_partner']} more labels are left out: their partner was not "
               "measured alone.")  # fmt: skip
    rows = [[name, n["rows"], number(n["sd"]), number(n["sd_within"]), number(n["se"]),
             number(n["reliability"], 2), number(n["reliability_within"], 2)]
            for name, n in found["noise"].items() if n]  # fmt: skip
    yield markdown(["label", "rows", "sd", "sd inside", "s.e.", "reliability", "inside"], rows)
    told = []
    for side, s in found["seed_noise"].items():
        if s["groups"]:
            told.append(f"the {side}: sd {number(s['sd'])} over {s['groups']} groups, "
                        f"{percent(s['share'])} of the variance inside a domain pair")  # fmt: skip
    if told:
        yield (f"Trained again with other seeds, which is another start, other training items and "
               f"another order or some of these, not told apart, {found['target']} moves with "
               + "; with ".join(told) + ".")  # fmt: skip


def _explained(found: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    yield (
        f"The directed domain pair alone explains {percent(found['domain_share'])} of the "
        f"variance of the ranks of {found['target']} (in the sample, adjusted for the number of "
        "domain pairs). Below, no row that is learned from has what is held out, on either side; "
        "retrainings of an adapter leave with it. Training metadata are rank, learning rate, "
        "steps, layers, variant and, where domains are given too, the exam of both."
    )
    yield (
        "*Inside*: rank correlation inside (fold, directed domain pair), which neither domains can "
        "earn nor a leave-one-out mean lose. It can be earned by recognising an adapter that is "
        f"*not* held out: compare with *{NAMES}*, which knows names and nothing else. A predictor "
        "that knows nothing has an overall correlation *below* 0: the mean of the others is low "
        "where the held-out label is high."
    )
    yield (
        "Intervals draw adapters anew and keep the fitted models; they are not corrected for the "
        "number of predictors compared."
    )
    shares = {s["name"]: s["r2"] for s in found["splits"]["adapter"] if "r2" in s}
    if {PAIR_MEAN, RECIPE, METADATA} <= shares.keys():
        yield (
            f"Share of the variance of {found['target']} that is foretold of victims whose "
            f"adapter is held out: {percent(shares[PAIR_MEAN])} by the two domains alone, "
            f"{percent(shares[RECIPE])} by training metadata without exams and domains, "
            f"{percent(shares[METADATA])} by all of them."
        )
    if "predictors" in names:
        yield f"![Predictors]({names['predictors']})"
    for split in SPLITS:
        scored = found["splits"][split]
        if "rho" not in scored[0]:
            yield f"**{TITLES[split]} held out**: {scored[0]['name']}."
            continue
        yield (f"**{TITLES[split]} held out** ({scored[0]['rows']} rows). "
               f"Inside: {_INSIDE[split]}.")  # fmt: skip
        if split == "seed":
            yield ("Seeds are not drawn at random where they stand for roles: in the tier bank "
                   "seed 3 is that of the cheaply trained adapters.")  # fmt: skip
        yield _scores(scored)
        yield _verdict(scored)


def _scores(scored: Sequence[Mapping[str, Any]]) -> str:
    rows = [[s["name"], ranged(s["rho"], s["rho_interval"]),
             ranged(s["within"], s["within_interval"]), number(s["r2"], 2), number(s["error"]),
             number(s["auc"], 2), ranged(s["over_pair_mean"], s["over_pair_mean_interval"]),
             *(ranged(s[key], s[f"{key}_interval"])
               for key in ("over_metadata", "over_names", "within_over_names"))]
            for s in scored]  # fmt: skip
    return markdown(
        ["predictor", "overall", "inside", "R2", "mean error", "AUC worst quarter",
         "over the pair's mean", "over metadata", "over which adapters",
         "inside, over which adapters"], rows,
    )  # fmt: skip


def _verdict(scored: Sequence[Mapping[str, Any]]) -> str:
    """In words what the intervals say, null results as such."""
    by_name = {s["name"]: s for s in scored}
    told = []
    if METADATA in by_name:
        told.append(_gain("Training metadata and domains", by_name[METADATA], "over_pair_mean",
                          "the domain pair's mean"))  # fmt: skip
    for name, words in ((WEIGHTS, "Weights and domains"), (PHYSICAL, "Physics and domains"),
                        (ALL, "All signals and domains")):  # fmt: skip
        if name in by_name:
            told.append(_gain(words, by_name[name], "over_metadata", "training metadata"))
    told.append(_added("All signals", by_name.get(BOTH)))
    inside = [s for s in scored if s["within"] is not None and s["name"] != NAMES]
    if inside:
        best = max(inside, key=lambda s: s["within"])
        gain = _gain("its predictions", best, "within_over_names", "which adapters they are")
        told.append(f"Highest inside of {len(inside)}: {best['name']}, "
                    f"{ranged(best['within'], best['within_interval'])}; {gain}")  # fmt: skip
    return " ".join(filter(None, told))


def _added(words: str, both: Mapping[str, Any] | None) -> str:
    """What signals and metadata together have over metadata, the one thing that is an addition."""
    if both is None:
        return ""
    return _gain(words, both, "over_metadata", "training metadata", _ADDED)


def _gain(
    words: str, record: Mapping[str, Any], key: str, base: str, verdicts: Sequence[str] = _COMPARED
) -> str:
    better, worse, neither = verdicts
    value, interval = record[key], record[f"{key}_interval"]
    if value is None or None in interval:
        return f"{words}: nothing can be said of {base}."
    if interval[0] > 0:
        verdict = better
    elif interval[1] < 0:
        verdict = worse
    else:
        verdict = neither
    return f"{words} {verdict} {base}: {ranged(value, interval)}."


def _signals(found: Mapping[str, Any]) -> Iterator[str]:
    late = found["signals"][FINAL]
    yield (
        f"Spearman's correlation with {found['target']}, no training. Of {len(late)} signals of "
        f"the trained weights, if none knew anything, the best one would reach "
        f"{number(found['chance'][FINAL], 2)} inside a domain pair once in twenty times; the "
        "intervals are of one signal each. First the strongest, then others that are well known."
    )
    named = [s for s in late[_SHOWN:] if s["name"].partition(":")[2] in NAMED]
    times = [time for time in found["signals"] if time != FINAL]
    early = {time: {s["name"].partition(":")[2]: s for s in found["signals"][time]}
             for time in times}  # fmt: skip
    header = ["signal", "overall", "inside", "rows", *(f"inside, {time}" for time in times)]
    rows = []
    for s in [*late[:_SHOWN], *named]:
        name = s["name"].partition(":")[2]
        rows.append([f"`{name}`", ranged(s["rho"], s["rho_interval"]),
                     ranged(s["within"], s["within_interval"]), s["rows"],
                     *(_inside(early[time].get(name)) for time in times)])  # fmt: skip
    yield markdown(header, rows)


def _inside(signal: Mapping[str, Any] | None) -> str:
    return number(None) if signal is None else ranged(signal["within"], signal["within_interval"])


def _early(found: Mapping[str, Any]) -> Iterator[str]:
    yield ("The same predictors from a snapshot of the training, on the rows where both adapters "
           "have one of at least 5 steps; others are left out.")  # fmt: skip
    for time, block in found["early"].items():
        for split in EARLY:
            scored, title = block[split], f"{time}, {TITLES[split].lower()} held out"
            if "rho" not in scored[0]:
                yield f"**{title}**: {scored[0]['name']}."
                continue
            yield f"**{title}** ({block['rows']} rows)"
            yield _scores(scored)
            by_name = {s["name"]: s for s in scored}
            if f"{time}: {ALL}" in by_name:
                words = f"All signals at {time.removeprefix('at')}"
                told = [_gain(f"{words} and domains", by_name[f"{time}: {ALL}"], "over_metadata",
                              "training metadata"),
                        _added(words, by_name.get(f"{time}: {BOTH}"))]  # fmt: skip
                yield " ".join(filter(None, told))


def percent(share: float | None) -> str:
    """A share of 1."""
    return number(None) if share is None else f"{100 * share:.0f} %"
