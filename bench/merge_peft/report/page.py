"""The sections of the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..outcome.noise import FEWEST_SETS
from .charts import (
    Column,
    gain_strips,
    heat_map,
    number,
    say,
    section,
    table,
    text,
)
from .operator_table import CLIP, CLIP_KEPT, KEEPS
from .page_operators import capacity, operators

_MAPS = 4  # heat maps shown
_FAILED = 60  # reasons of failed merges listed
_MEASURES = {
    "ll_norm": "(merged - base) / (single - base) of the mean log-likelihood of the right "
    "answer's tokens: 1 keeps all that the adapter learned, 0 nothing. Means clip it to "
    f"{CLIP[0]:g} to {CLIP[1]:g}. None where the adapter's gain alone is not above two standard "
    "errors.",
    "option_norm": "The same of the log-probability of the right answer among its options.",
    "prob_ret": "exp(merged - single) of the log-likelihood of a token: its bounded twin.",
    "retention": "Accuracy kept: utility merged / utility single, not corrected for what the base "
    "can do: a merge that lost everything keeps base / single. Means clip it to "
    f"{CLIP_KEPT[0]:g} to {CLIP_KEPT[1]:g}.",
    "accuracy_norm": "(merged - base) / (single - base) of the utility.",
}
_GLOSSARY = {
    "utility": "Share of items that are right: exact match, executed code, choice by likelihood; "
    "of refusal items the balanced accuracy over wrong requests and benign twins.",
    "worst of set": "The member that keeps least, averaged over the merges whose members all have "
    "a value; in brackets of how many, where not of all.",
    "below .8": f"Share of (merge, member) rows with ll_norm below {KEEPS:g}.",
    "against": "Mean difference in ll_norm on the very rows that both operators have.",
    "not distinguishable": "The interval of the difference to the highest has 0 in it.",
    "95 %": "Intervals are over adapters, which rows share: adapters are drawn anew, and a row "
    f"weighs the product of how often its two were drawn. None of fewer than {FEWEST_SETS} sets; "
    "not corrected for the number of things compared.",
    "s.e.": "Standard errors of rows are from a paired bootstrap over test items.",
    "resident": "Adapters held in memory to serve; a merge is one.",
    "size": "Parameters held, over those of one member.",
    **_MEASURES,
}  # fmt: skip


def body(found: Mapping[str, Any], titles: Mapping[tuple[str, int], str]) -> str:
    """The page's body.

    Args:
        found: of ``report.summary``.
        titles: of (study, size).
    """
    sections = (
        _head(found, titles), operators(found, titles), capacity(found), _hurts(found),
        _gains(found), _noise(found), _failed(found), _again(found),
    )  # fmt: skip
    return "\n".join(section for section in sections if section)


def _head(found: Mapping[str, Any], titles: Mapping[tuple[str, int], str]) -> str:
    run = found["run"]
    items = sorted({exam["items"] for exam in run["exams"].values()})
    facts = {
        "base model": run["base"], "seed": run["seed"],
        "adapters": f"{run['adapters']} of {run['adapters_planned']}",
        "exams": f"{len(run['exams'])}, of {'-'.join(map(str, {items[0]: 0, items[-1]: 0}))} items"
        if items else "0",
        "merges": f"{run['merges']} of {run['merges_planned']}", "labels": run["rows"],
        "training": f"{run['training_seconds'] / 60:.1f} min", "device": run["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(run["versions"].items())),
    }  # fmt: skip
    told = "".join(f"<div><dt>{k}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items())
    notes = []
    tried = run["merges"] + len(found["failed"])
    if run["adapters"] < run["adapters_planned"] or tried < run["merges_planned"]:
        notes.append("The run is not complete: the same command goes on where it stopped.")
        notes += [
            f"{s['merges']} of {s['planned']} merges are in: {titles[s['study'], s['size']]}."
            for s in run["studies"]
        ]
    if found["failed"]:
        notes.append(f"{len(found['failed'])} merges failed; they are listed below.")
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        f"<header><h1>MERGE-PEFT, tier {text(run['tier'])}</h1>{say(run['about'])}"
        f'<dl class="facts">{told}</dl>{f"<ul class=notes>{listed}</ul>" if notes else ""}</header>'
    )


def _hurts(found: Mapping[str, Any]) -> str:
    maps = found["hurts"]
    if not maps:
        return ""
    best = max(maps[1:], key=lambda m: _average(m["mean"]), default=None)
    shown = [*maps[: _MAPS - 1], *([best] if best and best not in maps[: _MAPS - 1] else [])]
    figures = "".join(
        f"<figure><figcaption>{text(m['operator'])}</figcaption>{heat_map(m)}</figure>"
        for m in shown
    )
    columns: list[Column] = [
        ("member", lambda r: text(r["member"])),
        ("operator ", lambda r: text(r["operator"])),
        ("ll_norm", lambda r: f"{number(r['ll_norm'], 2)} ± {number(r['ll_norm_se'], 2)}"),
        ("accuracy kept", lambda r: number(r["retention"], 2)),
        ("merged with ", lambda r: text(", ".join(m for m in r["members"] if m != r["member"]))),
    ]
    return section(
        "Who hurts whom",
        say("Mean ll_norm of pairs: what a member of the row's domain keeps when it is merged "
             "with one of the column's. Each operator on the pairs that it merged, which differ; "
             "rows without ll_norm are not in it, nor below."),
        f'<div class="panels">{figures}</div>', "<h3>The rows that keep least</h3>",
        table(found["worst"], columns),
    )  # fmt: skip


def _average(mean: Sequence[Sequence[float | None]]) -> float:
    values = [v for line in mean for v in line if v is not None]
    return sum(values) / len(values) if values else float("-inf")


def _gains(found: Mapping[str, Any]) -> str:
    gains = found["gains"]
    if not gains:
        return ""
    columns: list[Column] = [
        ("adapter", lambda r: text(r["adapter"])), ("exam", lambda r: text(r["exam"])),
        ("rank", lambda r: str(r["rank"])), ("steps", lambda r: str(r["steps"])),
        ("variant", lambda r: text(r["variant"])),
        ("utility, base", lambda r: number(r["utility_base"])),
        ("single", lambda r: number(r["utility_single"])),
        ("gain", lambda r: f"{number(r['utility_gain'])} ± {number(r['utility_gain_se'])}"),
        ("nats a token, base", lambda r: number(r["loglik_base"])),
        ("single", lambda r: number(r["loglik_single"])),
        ("gain", lambda r: f"{number(r['loglik_gain'])} ± {number(r['loglik_gain_se'])}"),
        ("note ", lambda r: text(r["note"])),
    ]  # fmt: skip
    strips = "".join(
        f"<figure><figcaption>{title}</figcaption>{gain_strips(gains, what)}</figure>"
        for title, what in (("Utility", "utility"), ("Log-likelihood, nats a token", "loglik"))
    )
    return section(
        "What single adapters learned",
        say("On the test items of their exam: the base model hollow, each adapter a dot."),
        f'<div class="panels">{strips}</div>',
        f"<details><summary>{len(gains)} adapters</summary>{table(gains, columns)}</details>",
    )


def _noise(found: Mapping[str, Any]) -> str:
    noise = found["noise"]
    if not noise["measures"]:
        return ""
    lines = [{"name": name, **m, "seeds": noise["retrained"].get(name)}
             for name, m in noise["measures"].items()]  # fmt: skip

    def seeds(record: Mapping[str, Any], which: str) -> str:
        of = record["seeds"] and record["seeds"][which]
        return number(None) if not of else f"{number(of['sd'])} ({of['groups']})"

    columns: list[Column] = [
        ("measure", lambda r: text(r["name"])), ("rows", lambda r: str(r["rows"])),
        ("s.d. of rows", lambda r: number(r["sd"])),
        ("s.e. of a row, median", lambda r: number(r["se"])),
        ("reliability", lambda r: number(r["reliability"])),
        ("other data order", lambda r: seeds(r, "order")),
        ("other A0 as well", lambda r: seeds(r, "start")),
        ("what it is ", lambda r: text(_MEASURES[r["name"]])),
    ]  # fmt: skip
    return section(
        "Noise",
        say("The s.e. is over test items. Reliability is the share of the variance inside a pair "
             "of domains, of one operator, that is not that error. The last columns are the "
             "standard deviation between adapters that differ in their seeds alone, merged with "
             "the same others (in brackets how many groups of them)."),
        table(lines, columns),
    )  # fmt: skip


def _failed(found: Mapping[str, Any]) -> str:
    failed: dict[tuple[str, str], list[str]] = {}
    for line in found["failed"]:
        failed.setdefault((line["operator"], line["reason"]), []).append(line["key"])
    if not failed:
        return ""
    lines = [{"operator": o, "reason": r, "keys": keys} for (o, r), keys in failed.items()]
    columns: list[Column] = [
        ("operator", lambda r: text(r["operator"])), ("merges", lambda r: str(len(r["keys"]))),
        ("reason ", lambda r: text(r["reason"])), ("such as ", lambda r: text(r["keys"][0])),
    ]  # fmt: skip
    rest = len(lines) - _FAILED
    more = say(f"And {rest} more reasons, in summary.json.") if rest > 0 else ""
    return section(
        "Merges that failed",
        say("An operator that refuses a set; the next run tries again."),
        table(lines[:_FAILED], columns), more,
    )  # fmt: skip


def _again(found: Mapping[str, Any]) -> str:
    run = found["run"]
    again = f"mergeprobe-fast merge-peft --tier {run['tier']} --seed {run['seed']}"
    one = "".join(f"<p>One row: <code>{text(r['command'])}</code></p>" for r in found["worst"][:1])
    told = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in _GLOSSARY.items())
    return section(
        "Again",
        f"<p>All of it: <code>{text(again)} --out DIR</code></p>", one,
        say("Every row of labels.parquet has its command. The same seed gives the same rows on "
             "the same machine; other processors round differently, and training amplifies it."),
        f'<p class="soft small">Tier digest <code>{text(run["digest"])}</code>, base model '
        f"<code>{text(run['base_fingerprint'])}</code></p>",
        f'<h3>Words</h3><dl class="glossary">{told}</dl>',
    )  # fmt: skip
