"""The report of a run: summary.json, report.html and a table for the terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.io.atomic_file import AtomicFile

from . import page
from .charts import between, number, text
from .kept import single_gains
from .labels import read_labels
from .operator_table import tables
from .plan import Tier
from .scores import RunScores, read_scores

if TYPE_CHECKING:
    from rich.table import Table

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
        run: what was run and how far it came; everything of ``operator_table.tables``; gains:
        ``labels.single_gains``; failed: operator, members and reason of merges that failed.
    """
    merged = Counter(line["operator"] for line in run.merged.values())
    seconds = [line.get("seconds") or 0 for line in run.trained.values()]
    facts = {
        **{k: run.facts[k] for k in ("tier", "seed", "base", "base_fingerprint", "device",
                                     "versions", "digest")},
        "about": tier.about, "adapters": len(run.trained), "adapters_planned": len(tier.adapters),
        "exams": {name: {"domain": exam.domain, "twist": exam.twist, "items": len(exam.keys)}
                  for name, exam in run.exams.items()},
        "merges": len(run.merged), "merges_planned": len(tier.merges), "merges_by": merged,
        "rows": len(rows), "training_seconds": sum(seconds),
    }  # fmt: skip
    failed = [{name: line[name] for name in ("key", "operator", "members", "reason")}
              for line in run.failed.values()]  # fmt: skip
    return {"run": facts, **tables(rows), "gains": single_gains(run, tier), "failed": failed}


def render(found: Mapping[str, Any]) -> str:
    """The page, ASCII only: no script, and nothing is loaded from elsewhere."""
    template = resources.files(__package__).joinpath("data/report.html").read_text("utf-8")
    styles = re.findall(r"<style>(.*?)</style>", template, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(s.encode("ascii")).digest()) for s in styles)
    sources = " ".join(f"'sha256-{digest.decode('ascii')}'" for digest in digests)
    run = found["run"]
    parts = {
        "policy": f"default-src 'none'; style-src {sources}; base-uri 'none'; form-action 'none'",
        "title": text(f"MERGE-PEFT {run['tier']}, {run['base']}"),
        "body": page.body(found, {k: study_title(k[0], k[1]) for k in
                                  ((s["study"], s["size"]) for s in found["studies"])}),
    }  # fmt: skip
    filled = re.sub(r"\{\{(policy|title|body)\}\}", lambda match: parts[match[1]], template)
    return filled.encode("ascii", "xmlcharrefreplace").decode("ascii")


def study_title(study: str, size: int) -> str:
    """What merges of a study and a size are called."""
    return _TITLES.get(study, study + ", sets of {}").format(size)


def terminal_table(found: Mapping[str, Any]) -> Table:
    """Operators by study, for ``rich``; of the capacity study the largest sets.

    Args:
        found: of ``operator_table.tables``, or ``summary``.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("operator")
    for name in ("ll_norm", "95 %", "worst of set", "accuracy kept", "resident", "merges"):
        shown.add_column(name, justify="right")
    largest = max((s["size"] for s in found["studies"] if s["study"] == "capacity"), default=0)
    for block in found["studies"]:
        if block["study"] == "capacity" and block["size"] < largest:
            continue
        title = study_title(block["study"], block["size"])
        shown.add_row(Text(title, style="bold"))
        for record in block["operators"]:
            shown.add_row(
                Text(record["operator"]), number(record["ll_norm"]),
                Text(between(record["ll_norm_interval"], 2), style="dim"),
                number(record["ll_norm_worst"]), number(record["retention"]),
                str(record["resident"]), str(record["merges"]),
            )  # fmt: skip
    return shown
