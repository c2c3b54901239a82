"""The report of a run: summary.json, report.html and a table for the terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeprobe_fast.io.atomic_file import AtomicFile

from ..outcome.kept import single_gains
from ..outcome.labels import read_labels
from ..outcome.scores import RunScores, read_scores
from ..tiers.plan import Tier
from . import page
from .charts import between, number, text
from .tables import study_order, tables

if TYPE_CHECKING:
    from rich.console import Group

_TITLES = {
    "pairs": "pairs of different domains", "same": "pairs of one domain", "sets": "sets of {}",
    "capacity": "{} in one", "routing": "{} behind a router, or merged",
    "broken": "sets of {} that are meant to fail",
}  # fmt: skip


def write_report(run_dir: str | os.PathLike[str], tier: Tier) -> None:
    """Write summary.json and report.html from the journal and labels.parquet of a run.

    What is there already is replaced; the same run gives the same bytes.

    Raises:
        InputError: a journal or labels that cannot be used, or there are none.
    """
    folder = Path(run_dir)
    found = summary(read_scores(folder), read_labels(folder / "labels.parquet"), tier)
    with AtomicFile(folder / "summary.json", overwrite=True) as partial:
        told = json.dumps(found, indent=1, allow_nan=False) + "\n"
        partial.write_text(told, encoding="utf-8", newline="\n")
    with AtomicFile(folder / "report.html", overwrite=True) as partial:
        partial.write_text(render(found), encoding="ascii", newline="\n")


def summary(run: RunScores, rows: Sequence[Mapping[str, Any]], tier: Tier) -> dict[str, Any]:
    """All that the report shows, as plain values.

    Returns:
        run: what was run and how far it came; everything of ``tables.tables``; gains:
        ``outcome.kept.single_gains``; failed: operator, members and reason of merges that failed.
    """
    merged = Counter(line["operator"] for line in run.merged.values())
    seconds = [line.get("seconds") or 0 for line in run.trained.values()]
    places = {key: (m.study, len(m.members)) for key, m in tier.merges.items()}
    done, refused = (Counter(places[key] for key in lines if key in places)
                     for lines in (run.merged, run.failed))  # fmt: skip
    facts = {
        **{k: run.facts[k] for k in ("tier", "seed", "base", "base_fingerprint", "device",
                                     "versions", "digest")},
        "about": tier.about, "adapters": len(run.trained), "adapters_planned": len(tier.adapters),
        "exams": {name: {"domain": exam.domain, "twist": exam.twist, "items": len(exam.keys)}
                  for name, exam in run.exams.items()},
        "merges": len(run.merged), "merges_planned": len(tier.merges), "merges_by": merged,
        "studies": [{"study": study, "size": size, "merges": done[study, size],
                     "failed": refused[study, size], "planned": planned}
                    for (study, size), planned in sorted(
                        Counter(places.values()).items(), key=lambda item: study_order(item[0]))],
        "rows": len(rows), "training_seconds": sum(seconds),
    }  # fmt: skip
    failed = [{name: line[name] for name in ("key", "operator", "members", "reason")}
              for line in run.failed.values()]  # fmt: skip
    return {"run": facts, **tables(rows), "gains": single_gains(run, tier), "failed": failed}


def render(found: Mapping[str, Any]) -> str:
    """The page, ASCII only: no script, and nothing is loaded from elsewhere."""
    template = resources.files(__package__).joinpath("template.html").read_text("utf-8")
    styles = re.findall(r"<style>(.*?)</style>", template, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(s.encode("ascii")).digest()) for s in styles)
    sources = " ".join(f"'sha256-{digest.decode('ascii')}'" for digest in digests)
    run = found["run"]
    parts = {
        "policy": f"default-src 'none'; style-src {sources}; base-uri 'none'; form-action 'none'",
        "title": text(f"MERGE-PEFT {run['tier']}, {run['base']}"),
        "body": page.body(found, {k: study_title(*k) for k in (
            (s["study"], s["size"]) for s in (*found["studies"], *run["studies"]))}),
    }  # fmt: skip
    filled = re.sub(r"\{\{(policy|title|body)\}\}", lambda match: parts[match[1]], template)
    return filled.encode("ascii", "xmlcharrefreplace").decode("ascii")


def study_title(study: str, size: int) -> str:
    """What merges of a study and a size are called."""
    return _TITLES.get(study, study + ", sets of {}").format(size)


def terminal_table(found: Mapping[str, Any], width: int = 80) -> Group:
    """Operators by study, for ``rich``; of the capacity study the largest sets.

    Where operators were measured on different sets, those sets that several have in common are
    shown, or else all, in order of the difference to one operator on the rows both have.

    Args:
        found: of ``tables.tables``, or ``summary``.
        width: columns of the terminal; where it is narrow fewer columns are shown.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    largest = max((s["size"] for s in found["studies"] if s["study"] == "capacity"), default=0)
    blocks = [s for s in found["studies"] if s["study"] != "capacity" or s["size"] == largest]
    names = [len(r["operator"]) for s in blocks for r in s["operators"]]
    left = width - max(names, default=0)
    columns = []
    for column in sorted(_TERMINAL, key=lambda c: c.importance):
        left -= column.width + 2
        columns += [column] if left >= 0 else []
    columns = [column for column in _TERMINAL if column in columns]
    parts: list[Text | Table] = []
    for block in blocks:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("operator", no_wrap=True, min_width=max(names))
        for column in columns:
            title = column.name.format(reference=block["reference"] or "")
            table.add_column(title, justify="right", no_wrap=True, min_width=column.width)
        for record in block["common"] or block["operators"]:
            table.add_row(Text(record["operator"]), *(Text(c.shown(record)) for c in columns))
        title = study_title(block["study"], block["size"])
        parts += [Text(f"{title}: {_which_sets(block)}", style="bold"), table]
        if block["dropped"]:
            parts.append(Text(f"not in it: {', '.join(block['dropped'])}", style="dim"))
    return Group(*(parts or ["Nothing is measured yet."]))


def _which_sets(block: Mapping[str, Any]) -> str:
    if block["common"]:
        return f"{block['common_sets']} sets that {len(block['common'])} operators have in common"
    count = f"{block['sets']} {'set' if block['sets'] == 1 else 'sets'}"
    return count if block["comparable"] else f"{count} (different sets)"


class _TerminalColumn(NamedTuple):
    name: str
    width: int
    importance: int
    shown: Callable[[Mapping[str, Any]], str]


def _versus(record: Mapping[str, Any]) -> str:
    return "" if record["versus"] is None else f"{record['versus']:+.3f}"


_TERMINAL = (
    _TerminalColumn("ll_norm", 7, 0, lambda r: number(r["ll_norm"])),
    _TerminalColumn("95 %", 14, 2, lambda r: between(r["ll_norm_interval"], 2)),
    _TerminalColumn("worst", 6, 4, lambda r: number(r["ll_norm_worst"])),
    _TerminalColumn("vs {reference}", 7, 1, _versus),
    _TerminalColumn("accuracy", 8, 5, lambda r: number(r["retention"])),
    _TerminalColumn("merges", 6, 3, lambda r: str(r["merges"])),
    _TerminalColumn("resident", 8, 6, lambda r: str(r["resident"])),
)
