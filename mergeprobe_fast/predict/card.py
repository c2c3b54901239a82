"""The model card: written from the model file, so that the two cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergeprobe_fast.predict.columns import EARLY, meaning
from mergeprobe_fast.predict.predictor import RetentionPredictor

_LIMITS = (
    "It answers for the base models named above, and for adapters, merges and texts of the kind "
    "it was fitted on. On another base model a closed form answers, marked uncalibrated, without "
    "an interval.",
    "Intervals are calibrated on adapters of unseen families and on unseen pairs of domains, from "
    "the same kind of zoo. On a domain that is not among those above they cover less: the scores "
    "have it measured, where there are several domains.",
    "Rows unlike those of training are marked as outside: their numbers are not vouched for.",
    "What is predicted is the share of the gain in log-likelihood that is left, where the labels "
    "are that: accuracy follows it loosely.",
)


def model_card(predictor: RetentionPredictor, title: str = "Retention predictor") -> str:
    """Markdown: data, levels, how it was fitted, scores and limits of this model."""
    facts = predictor.facts
    made_by = facts.made_by or "an unknown program"
    lines = [f"# {title}", "", f"Made by {made_by}.", "", "## Data", ""]
    bases = ", ".join(facts.bases) or "not recorded"
    lines += [
        f"- Base models: {bases}",
        f"- {facts.rows} labels of {facts.merges} merges of {facts.adapters} adapters in "
        f"{facts.families} families",
        f"- Members of a merge: {', '.join(map(str, facts.sizes)) or 'not recorded'}",
        f"- Domains: {', '.join(facts.domains) or 'not recorded'}",
        f"- Operators: {', '.join(facts.operators) or 'not recorded'}",
        f"- SHA-256 of the labels: {facts.digest or 'not from a file'}",
        *(f"- {note}" for note in facts.notes),
        "", "## Levels", "",
        "The richest level answers whose columns are there.", "",
        "| level | labels | columns | error above, below |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, model in predictor.models.items():
        kind = "scales" if model.scale is not None else "retention"
        lines.append(f"| {name} | {model.rows} | {len(model.columns)} | "
                     f"{model.above:.3g}, {model.below:.3g} {kind} |")  # fmt: skip
    richest = predictor.models[_richest(predictor)]
    lines += ["", "Columns of the richest level, and where they lie in training:", "",
              "| column | meaning | from | to |", "| --- | --- | --- | --- |"]  # fmt: skip
    for j, name in enumerate(richest.columns):
        low, high = richest.bounds.low[j], richest.bounds.high[j]
        lines.append(f"| `{name}` | {meaning(name)} | {low:.3g} | {high:.3g} |")
    choices = ", ".join(f"`{k}` {v:g}" for k, v in predictor.recipe.to_json().items())
    lines += ["", "## Recipe", "", choices, "", "## Scores", ""]
    if facts.evaluation is None:
        lines += ["Not evaluated."]
    else:
        lines += [evaluation_markdown(facts.evaluation).rstrip("\n")]
    lines += ["", "## Limits", "", *(f"- {text}" for text in _LIMITS),
              f"- Intervals are stated to cover {predictor.coverage:.0%}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _richest(predictor: RetentionPredictor) -> str:
    names = [n for n in predictor.models if not n.startswith(EARLY)] or list(predictor.models)
    return names[-1]


# Key of a score, and its head.
_SCORES = {
    "rho": "rho", "within": "within", "mae": "MAE", "auc": "AUC", "coverage": "coverage",
    "width": "width", "outside": "outside", "regret_worst": "regret, worst",
    "regret_mean": "regret, mean", "over_metadata": "rho - metadata's",
    "within_over_metadata": "within - metadata's",
}  # fmt: skip


def evaluation_markdown(evaluation: Mapping[str, Any]) -> str:
    """Tables of what ``evaluate`` returned: a section per level, a table per split."""
    draws = evaluation["resamples"]
    lines = [
        "rho: Spearman's; within: of ranks inside (fold, directed domain pair or merge size); "
        "AUC: of the worst quarter; outside: share of rows it would not vouch for; regret: what is "
        "lost, in the worst member and in the mean, by choosing a set's operator by predictions. "
        f"Brackets: 95 % over {draws} resamples of adapter families.",
    ]
    for level, found in evaluation["levels"].items():
        ceilings = [_number(found[k]) for k in ("ceiling", "ceiling_within")]
        lines += ["", f"### {level}", "",
                  f"{found['rows']} labels of {found['merges']} merges of {found['adapters']} "
                  f"adapters; {len(found['columns'])} columns. The labels' own noise would leave a "
                  f"correlation of {ceilings[0]}, within {ceilings[1]}."]  # fmt: skip
        for split, scores in found["splits"].items():
            if "reason" in scores:
                lines += ["", f"**{split}**: {scores['reason']}"]
                continue
            keys = [k for k in _SCORES if any(k in p for p in scores["predictors"])]
            counts = f"{scores['rows']} rows in {scores['folds']} folds"
            lines += ["", f"**{_title(split)}**: {counts}", "",
                      "| | " + " | ".join(_SCORES[k] for k in keys) + " |",
                      "| --- |" + " --- |" * len(keys)]  # fmt: skip
            for p in scores["predictors"]:
                cells = " | ".join(_cell(p.get(k)) for k in keys)
                lines.append(f"| {p['name']} | {cells} |")
            lines += _always(scores.get("always", ()))
    return "\n".join(lines) + "\n"


def _always(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is lost by taking one operator always, against choosing by prediction."""
    if not rows:
        return []
    keys = {"worst": "regret, worst", "worst_above": "above choosing",
            "mean": "regret, mean", "mean_above": "above choosing"}  # fmt: skip
    lines = ["", "| always | sets | " + " | ".join(keys.values()) + " |",
             "| --- | --- |" + " --- |" * len(keys)]  # fmt: skip
    for row in rows:
        cells = " | ".join(_cell(row[k]) for k in keys)
        lines.append(f"| {row['name']} | {row['sets']} | {cells} |")
    return lines


def _title(split: str) -> str:
    return split if split == "as it is" else f"leave one {split} out"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    text = f"{score['value']:.3f}"
    if score["interval"] is None:
        return text
    low, high = score["interval"]
    return f"{text} [{low:.3f}, {high:.3f}]"
