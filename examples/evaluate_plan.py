"""What each adapter of a plan really keeps, measured, beside what was predicted.

    mergeprobe-fast plan examples/zoo --calibration out/points --out out/plan --apply
    python examples/evaluate_plan.py out/plan

For every adapter of the example zoo the base model, the adapter alone and the adapter that now
serves its requests answer held-out items of its own domain; MERGE-PEFT's code does it. "Kept" is

    (serving - base) / (alone - base)

of the mean log-likelihood of a target token: 1 is all that training gained, 0 nothing. +- is one
standard error over the items. A prediction is marked with ! where what was measured is outside its
interval.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from exams import exam
from tasks import DOMAINS

import mergeprobe_fast as mpf
from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.merge_peft.model.base import Base, load_base
from mergeprobe_fast.merge_peft.outcome.kept import kept
from mergeprobe_fast.merge_peft.outcome.noise import Bootstrap
from mergeprobe_fast.merge_peft.outcome.scores import Asked, Measured
from mergeprobe_fast.merge_peft.stages.evaluate import Evaluation
from mergeprobe_fast.planning import Plan
from mergeprobe_fast.planning.served import Served, read_served
from mergeprobe_fast.report.plan import APPLIED_NAME

ITEMS = 64
RUNS = ("base", "single", "merged")


class Exam:
    """The items of one domain, and everything that was run over them."""

    def __init__(
        self, domain: str, items: int, base: Base, first: int, threads: int | None
    ) -> None:
        asked = exam(domain, items)
        self._evaluation = Evaluation(asked, base, first, threads=threads)
        self._runs: dict[Path | None, Measured] = {}
        refuse = [int(i.check["refuse"]) if i.kind == "refusal" else -1 for i in asked]
        self.asked = Asked(domain, "", tuple(i.key for i in asked), np.array(refuse, np.int8))

    def run(self, adapter: Path | None) -> Measured:
        """The base model with an adapter in its weights; None: without."""
        if adapter not in self._runs:
            scores = self._evaluation.run(adapter)
            self._runs[adapter] = Measured(scores.loglik, scores.option_loglik, scores.correct)
        return self._runs[adapter]


def first_layer(served: Served) -> int:
    """The lowest decoder layer that an original or a serving adapter touches."""
    paths = [Path(m.path) for r in served.residents for m in r.members]
    folders = [served.folder(r.name) for r in served.residents]
    numbers = [int(part) for folder in (*paths, *folders) for m in mpf.open_zoo([folder]).modules
               for part in m.name.split(".") if part.isdigit()]  # fmt: skip
    return min(numbers)


def measure(
    served: Served, domains: Mapping[str, str], base: Base, items: int, threads: int | None = None
) -> list[dict[str, Any]]:
    """One row an adapter, as ``kept`` has it, with what was predicted of it.

    Args:
        served: what ``plan --apply`` wrote.
        domains: of every adapter, one of ``tasks.DOMAINS``.
        items: of each exam.
    """
    first = first_layer(served)
    rows = []
    exams: dict[str, Exam] = {}
    for resident in served.residents:
        for member in resident.members:
            domain = domains[member.name]
            if domain not in exams:
                exams[domain] = Exam(domain, items, base, first, threads)
            own = exams[domain]
            runs = own.run(None), own.run(Path(member.path)), own.run(served.folder(resident.name))
            draw = Bootstrap(own.asked.keys, own.asked.refuse, member.name)
            rows.append({
                "adapter": member.name, "domain": domain, "served_by": resident.name,
                "action": resident.action, "items": items,
                "predicted": member.retention, "low": member.low, "high": member.high,
                **kept(*runs, own.asked, member.name, member.name),
                **{f"utility_{which}_se": draw.utility(scores.correct).se
                   for which, scores in zip(RUNS, runs, strict=True)},
            })  # fmt: skip
    return sorted(rows, key=lambda row: (row["domain"], row["adapter"]))


def is_inside(row: Mapping[str, Any]) -> bool | None:
    """Whether what was measured lies in the interval; None: nothing to compare."""
    if row["action"] == "route" or None in (row["ll_norm"], row["low"], row["high"]):
        return None
    return row["low"] <= row["ll_norm"] <= row["high"]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most 100 columns."""
    lines = [f"{'':24}{'log-likelihood/token':>21}{'right answers, %':>19}{'kept, %':>23}",
             f"{'adapter':14} {'served by':9}{'base':>7}{'alone':>7}{'served':>7}"
             f"{'base':>6}{'alone':>6}{'served':>7}{'measured':>13}{'predicted':>10}"]  # fmt: skip
    for row in rows:
        lines.append(f"{_cut(row['adapter'], 14):14} {_cut(row['served_by'], 9):9}")
        lines[-1] += "".join(f"{row[f'loglik_{which}']:7.2f}" for which in RUNS)
        base, alone, serving = (100 * row[f"utility_{which}"] for which in RUNS)
        lines[-1] += f"{base:6.0f}{alone:6.0f}{serving:7.0f}"
        kept_, error = row["ll_norm"], row["ll_norm_se"]
        found = "no gain" if kept_ is None else f"{100 * kept_:.1f} +- {100 * error:.1f}"
        lines[-1] += f"{found:>13}"
        if row["action"] == "route":
            lines[-1] += f"{'as it is':>10}"
            continue
        lines[-1] += f"{_percent(row['predicted'], 1):>10}"
        if row["low"] is not None and row["high"] is not None:
            mark = " !" if is_inside(row) is False else ""
            lines[-1] += f"  {_percent(row['low'])} to {_percent(row['high'])}{mark}"
    return lines


def _percent(value: float | None, digits: int = 0) -> str:
    return "unknown" if value is None else f"{100 * value:.{digits}f}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def summary(rows: Sequence[Mapping[str, Any]], coverage: float | None) -> dict[str, Any]:
    """Of all adapters, those that stay as they are included: what is kept and was predicted."""
    known = [row for row in rows if row["ll_norm"] is not None and row["predicted"] is not None]
    inside = [found for found in map(is_inside, rows) if found is not None]
    out: dict[str, Any] = {"adapters": len(rows), "resident": len({r["served_by"] for r in rows}),
                           "intervals": len(inside), "inside": sum(inside), "coverage": coverage}
    for key, name in (("measured", "ll_norm"), ("predicted", "predicted")):
        values = [row[name] for row in known]
        out[key] = {"average": float(np.mean(values)), "worst": min(values)} if values else None
    return out


def in_words(told: Mapping[str, Any]) -> str:
    """A summary as lines of text."""
    lines = [f"{told['adapters']} adapters, {told['resident']} resident."]
    for key in ("measured", "predicted"):
        if told[key] is not None:
            average, worst = 100 * told[key]["average"], 100 * told[key]["worst"]
            lines.append(f"{key}: {average:.1f} % kept on average, {worst:.1f} % at worst")
    if told["intervals"]:
        line = f"{told['inside']} of {told['intervals']} merged adapters are in their interval"
        if told["coverage"] is not None:
            line += f", which is to hold {100 * told['coverage']:.0f} %"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="folder that 'plan --apply' wrote")
    parser.add_argument("--items", type=int, default=ITEMS, metavar="N",
                        help=f"of each domain (default: {ITEMS})")  # fmt: skip
    parser.add_argument("--base", type=Path, help="folder of the base (default: SmolLM2's wheel)")
    parser.add_argument("--json", action="store_true", help="rows and summary as JSON")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as many as torch takes")
    options = parser.parse_args()
    if options.items < 1:
        parser.error(f"--items must be at least 1, got {options.items}")
    try:
        plan = Plan.load(options.plan)
        if not (options.plan / APPLIED_NAME).is_dir():
            parser.error(f"{options.plan} has no merged adapters: plan with --apply")
        served = read_served(options.plan / APPLIED_NAME)
        names = [adapter.name for adapter in plan.adapters]
        given = {a.name: a.domain for a in plan.adapters if a.domain is not None}
        domains = dict(zip(names, assign_domains(names, tuple(DOMAINS), given), strict=True))
        rows = measure(served, domains, load_base(options.base), options.items, options.threads)
    except (mpf.InputError, ValueError) as error:
        print(f"evaluate_plan.py: {error}", file=sys.stderr)
        return 2
    told = summary(rows, plan.coverage)
    if options.json:
        print(json.dumps({"rows": rows, "summary": told}, indent=1))
    else:
        print(*table(rows), "", in_words(told), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
