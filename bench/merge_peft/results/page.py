"""The results page: README.md and pictures, every number read from the folders of finished runs.

    mergeprobe-fast results RUN [RUN ...] --out bench/results/merge_peft

Runs must have their summary.json and labels.parquet; with features.parquet beside them, what can be
foretold is worked out too, which takes minutes and is kept in OUT/analysis-TIER.json until labels,
features or the code of the analysis change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile

from ..options import add_results
from ..outcome.labels import read_labels
from ..study.analysis import FEWEST, analyse
from . import foretold, operators
from .sentences import short, shortfalls

PREDICTED = "sum"  # the operator with the most labels
_INTRODUCTION = """\
# MERGE-PEFT: results

Adapters of one base model were trained, merged and measured on held-out items of their own domains.
Everything below is read from the runs by `mergeprobe-fast results`; the data
behind it is in the runs' `labels.parquet` and `features.parquet`.

- **ll_norm**: (merged - base) / (single - base) of the mean log-likelihood of the right answer's
  tokens. 1: all that the adapter had learned is still there; 0: nothing; below: worse than the
  base. Means clip it to -1 to 1.2. A victim whose gain is within two standard errors of 0 has none.
- **accuracy kept**: utility merged / utility single. Noisier, and not corrected for what the base
  can do: a merge that lost everything keeps base / single. Means clip it to -1 to 2.
- **[ ]**: 95 % intervals over adapters, which rows share: adapters are drawn anew, and a row weighs
  the product of how often its two were drawn.
"""
_EQUAL_COST = "equal-cost.md"  # of mergeprobe_fast.merge_peft.equal_cost, where it was written
_BESIDE = ("What a zoo keeps with K resident adapters, by plans and fixed operators: "
           f"[equal cost]({_EQUAL_COST}).")  # fmt: skip


def write_results(runs: Sequence[Path], out: Path, *, machine: str = "") -> Path:
    """Write README.md and its pictures; what is there already is replaced.

    Args:
        runs: folders of runs, in the order of the page.
        out: the folder; made if need be.
        machine: what the runs took place on, in words.

    Raises:
        InputError: a run without summary or labels, two of one tier.
    """
    summaries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for run in runs:
        summary = _json(run / "summary.json")
        tier = summary["run"]["tier"]
        if tier in summaries:
            raise InputError(f"is the second run of tier {tier}", path=run)
        summaries[tier] = run, summary
    out.mkdir(parents=True, exist_ok=True)
    parts = [_INTRODUCTION, *([_BESIDE] if (out / _EQUAL_COST).is_file() else [])]
    for tier, (run, summary) in summaries.items():
        found = _analysis(run, out / f"analysis-{tier}.json", summary)
        pictures = dict(operators.pictures(summary))
        if found:
            pictures |= foretold.pictures(found)
        names = {}
        for name, svg in pictures.items():
            names[name] = f"{tier}-{name}.svg"
            _write(out / names[name], svg)
        rows = read_labels(run / "labels.parquet")
        parts += [
            f"## Tier {tier}", operators.what_was_run(summary, machine),
            "### In short", short(summary, found),
            operators.section(summary, rows, names),
        ]  # fmt: skip
        if found:
            parts.append(foretold.section(found, names))
        else:
            parts.append(f"What can be foretold is not asked: there are no features, or fewer than "
                         f"{FEWEST} labels of `{PREDICTED}` on pairs.")  # fmt: skip
        parts += ["### What falls short", shortfalls(summary, found)]
    path = out / "README.md"
    _write(path, "\n".join(part.rstrip("\n") + "\n" for part in parts))
    return path


def _analysis(run: Path, kept: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What can be foretold, or None of a run without features or with too few pairs."""
    files = [run / "labels.parquet", run / "features.parquet"]
    if not files[1].is_file():
        return None
    rows = [o["rows"] - o["ll_norm_none"] for s in summary["studies"] if s["study"] == "pairs"
            for o in s["operators"] if o["operator"] == PREDICTED]  # fmt: skip
    if sum(rows) < FEWEST:
        return None
    files += sources()
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    known = _json(kept) if kept.is_file() else {}
    if known.get("of") != digest.hexdigest():
        known = {"of": digest.hexdigest(), **analyse(run, operator=PREDICTED)}
        _write(kept, json.dumps(known, indent=1, allow_nan=False) + "\n")
    return known


def sources() -> list[Path]:
    """What else than the data the analysis follows from."""
    return sorted((Path(__file__).parents[1] / "study").glob("*.py"))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not JSON"
        raise InputError(str(reason), path=path) from None


def _write(path: Path, words: str) -> None:
    with AtomicFile(path, overwrite=True) as partial:
        partial.write_text(words, encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="results", description=__doc__.splitlines()[0]
    )
    add_results(parser)
    options = parser.parse_args(arguments)
    try:
        print(write_results(options.runs, options.out, machine=options.machine))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
