"""Merging adapters into the weights of their base model, streamed from folder to folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergeprobe_fast
from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import AtomicFolder
from mergeprobe_fast.io.checkpoint import Checkpoint, CheckpointCopy, open_checkpoint
from mergeprobe_fast.merging.adapter import plain
from mergeprobe_fast.merging.add import Added, Adder
from mergeprobe_fast.merging.merge import open_given, run
from mergeprobe_fast.merging.methods import DenseModule, MergedModule, MergeMethod, MergeRequest
from mergeprobe_fast.merging.output import REPORT_NAME
from mergeprobe_fast.merging.output_error import output_errors
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.merging.targets import Target, find_targets, tied_notes
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo, text

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

# Methods that only truncate the weighted sum, which "cat" holds as it is.
_SUMS = ("svd", "linear")
_NOTED_ROUNDING = 0.05  # of the norm of the update


@_env.one_blas_thread()
def merge_into(
    zoo: Zoo | Paths,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "svd",
    weights: Any = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    calibration: Calibration | Any = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
    **arguments: Any,
) -> dict[str, Any]:
    """Write the base model with the merged update of all adapters added to its weights.

    ``out`` has the files of ``base`` and ``merge.json``: every weight file with the same header and
    layout, adapted tensors as base + delta summed in float64 and rounded once to the tensor's dtype
    (to nearest even; BF16 by way of float32), everything else byte for byte. Weights in other
    formats, sub-folders and hidden files are left out. Neither the base nor the adapters are ever
    in memory as a whole.

    A base takes any rank: without ``rank`` and ``energy``, "svd" and "linear" add the weighted sum
    itself, elementwise methods their exact result, others what they merge to without a rank. With
    either, what is added is what :func:`mergeprobe_fast.merge` would write in float32.

    Args:
        base: folder of the base model in transformers' layout, F32, BF16 or F16 where adapted.
        out: folder to write; appears as a whole at the end, or not at all.
        overwrite: replace ``out`` if it is such a result.
        others: as :func:`mergeprobe_fast.merge` has them.

    Returns:
        The content of ``merge.json``. Per module and in ``total``: "norm" of the added delta,
        "rounding_error_relative" = ||written - (base + delta)|| / ||delta||, "delta_kept" =
        <written - base, delta> / ||delta||^2, and "unchanged": of the entries with an update, the
        share whose weight is the same as before, the update being lost in the rounding.

    Raises:
        InputError: as :func:`mergeprobe_fast.merge`; a base that is quantised, incomplete or does
            not fit the adapters; an update to one of two tied weights; a sum that overflows the
            tensor's dtype; too little room on the disk; a file that changes meanwhile.
    """
    opened = open_device(device)
    zoo = as_zoo(zoo)
    chosen, request = prepare(
        ZooSource(zoo), method, weights=weights, rank=rank, energy=energy,
        calibration=open_given(calibration), domains=domains, threads=threads, progress=progress,
        device=opened, arguments=arguments,
    )  # fmt: skip
    calibrated = request.calibration is not None
    if calibrated and chosen.dense is not None and request.rank is None and request.energy is None:
        if not chosen.data:
            reason = f"output errors need factors, and {chosen.name} is added entry by entry here"
            raise InputError(f"{reason}: leave it out, or give a rank", key="calibration")
        calibrated = False
    checkpoint = open_checkpoint(base)
    targets = find_targets(zoo, checkpoint)
    folder = _output(zoo, checkpoint, Path(out), overwrite)
    replaced = [target.tensor.key for target in targets.values()]
    rows: dict[str, dict[str, Any]] = {}
    factored: list[MergedModule] = []
    sums = Added()
    with folder as temporary:
        with (
            CheckpointCopy(checkpoint, temporary, replaced) as copy,
            Adder(copy, request.threads, request.device) as adder,
            closing(_updates(chosen, request)) as updates,
            computing_on(opened),
        ):
            for m in updates:
                target = targets[m.module.name]
                added = adder.add(target, m)
                rows[m.module.name] = _row(target, m, added)
                sums = sums + added
                if calibrated and isinstance(m, MergedModule):
                    factored.append(m)
            for name in targets.keys() - rows.keys():
                adder.leave(targets[name])
        report = _report(zoo, checkpoint, chosen, request, targets, rows, sums)
        if calibrated:
            report = _with_outputs(report, request, factored)
        content = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (temporary / REPORT_NAME).write_text(content, encoding="utf-8")
    return report


def _with_outputs(
    report: dict[str, Any], request: MergeRequest, modules: Sequence[MergedModule]
) -> dict[str, Any]:
    """The report with the output errors before its modules, as a merged adapter has it."""
    with computing_on(request.device):
        found = output_errors(
            request.source, modules, request.calibration, request.domains, request.threads,
            request.device,
        )  # fmt: skip
    rows = report.pop("modules")
    return {**report, "outputs": found.report(), "modules": rows}


def _updates(
    method: MergeMethod, request: MergeRequest
) -> Iterator[MergedModule] | Iterator[DenseModule]:
    if request.rank is None and request.energy is None:
        if method.dense is not None:
            return method.dense(request)
        if method.name in _SUMS:
            method = MERGE_METHODS["cat"]
    return run(method, request)


def _output(zoo: Zoo, base: Checkpoint, out: Path, overwrite: bool) -> AtomicFolder:
    """The folder to write, checked: a place of its own, with room for the model."""
    inputs = [base.path, *(a.path for a in zoo)]
    folder = AtomicFolder(out, overwrite, inputs=inputs, contents={*base.names, REPORT_NAME})
    folder.check()
    real = out.resolve()
    if base.path.resolve() in real.parents:
        raise InputError(f"lies in the base model {base.path}", path=out)
    existing = next(p for p in (real, *real.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if base.nbytes > free:
        reason = f"needs {base.nbytes / 1e9:.2f} GB on a disk with {free / 1e9:.2f} GB free"
        raise InputError(reason, path=out)
    return folder


def _row(target: Target, m: MergedModule | DenseModule, added: Added) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": target.tensor.key, "dtype": target.tensor.dtype, **added.numbers(),
    }  # fmt: skip
    if isinstance(m, MergedModule):
        row |= {
            "rank": int(m.a.shape[0]),
            "rank_before": m.rank_before,
            "truncation_error": m.truncation_error,
            "truncation_error_relative": m.truncation_error / m.norm if m.norm else 0.0,
            **{key: value for key, value in m.details.items() if key != "outputs"},
        }
    return {**row, "members": list(m.members)}


def _report(
    zoo: Zoo, base: Checkpoint, method: MergeMethod, request: MergeRequest,
    targets: Mapping[str, Target], rows: Mapping[str, dict[str, Any]], sums: Added,
) -> dict[str, Any]:  # fmt: skip
    dtypes = sorted({target.tensor.dtype for target in targets.values()})
    lost = math.hypot(*(row.get("truncation_error", 0.0) for row in rows.values()))
    whole = math.hypot(lost, sums.norm)  # the parts left out are orthogonal to those kept
    adapters = []
    for i, a in enumerate(zoo):
        adapters.append({"name": a.name, "path": text(a.path)})
        adapters[i]["weight"] = plain(request.weights[:, i])
        if request.domains:
            adapters[i]["domain"] = request.domains[i]
    total = sums.numbers() | {
        "truncation_error_relative": lost / whole if whole else 0.0,
        "energy_kept": 1.0 - (lost / whole) ** 2 if whole else 1.0,
        "tensors": len(rows),
    }
    return {
        "tool": f"mergeprobe_fast {mergeprobe_fast.__version__}",
        "method": method.name,
        "rank": request.rank,
        "energy": request.energy,
        "arguments": {k: plain(v) for k, v in request.arguments.items()},
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "base_model": zoo.base_model,
        "base": {"path": text(base.path), "weight_files": len(base.shards), "bytes": base.nbytes},
        "adapters": adapters,
        "notes": [*zoo.notes, *_notes(base, method, request, targets, rows, total)],
        "total": total,
        "modules": rows,
    }


def _notes(
    base: Checkpoint, method: MergeMethod, request: MergeRequest, targets: Mapping[str, Target],
    rows: Mapping[str, Any], total: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    notes = []
    if method.name == "svd" and request.rank is None and request.energy is None:
        notes.append("no rank asked for: the sum itself was added, untruncated")
    moved = [t for name, t in targets.items() if t.tensor.key != f"{name}.weight"]
    if moved:
        notes.append(
            f"{len(moved)} modules have another prefix in the base, such as "
            f"{moved[0].module.name} as {moved[0].tensor.key}"
        )
    unmerged = sorted(targets.keys() - rows.keys())
    if unmerged:
        notes.append(f"{method.name} changes nothing in {len(unmerged)} modules: {unmerged[0]} ...")
    if base.left_out:
        shown = ", ".join(base.left_out[:5]) + (" ..." if len(base.left_out) > 5 else "")
        notes.append(f"not copied from the base ({len(base.left_out)}): {text(shown)}")
    if REPORT_NAME in base.files:
        notes.append(f"the base is itself the result of a merge; its {REPORT_NAME} is replaced")
    notes += tied_notes(targets, base)
    if total["norm"] == 0:
        notes.append("the merged update is zero: the weighted updates cancel, or all are zero")
    elif total["rounding_error_relative"] > _NOTED_ROUNDING:
        notes.append(
            f"rounding to the base's dtype is {total['rounding_error_relative']:.0%} of the "
            f"update, and {total['unchanged']:.0%} of its entries change no weight: "
            "a float32 copy of the base would keep it"
        )
    return notes
