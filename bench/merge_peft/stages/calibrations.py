"""What a run's calibrations are recorded from, and where they lie.

On disk a calibration has 256 tokens of an exam in BF16: of a layer of SmolLM2-135M 1.7 MB, and
with gradients of both kinds of labels 7.1 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.points import has_points, open_points
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.record.calibrate import plan_calibration
from mergeprobe_fast.record.plan import CalibrationPlan
from mergeprobe_fast.zoo import Zoo, open_zoo

from ..model.base import Base
from ..tiers.plan import Tier

What = Literal["inputs", "gradients", "points"]
# Seconds of one core, about, for a text of a layer: forward; and backward, of one kind of labels.
_FORWARD, _BACKWARD = 0.002, 0.006


def calibration_folder(out: Path, sequences: int) -> Path:
    """Where the calibration of so many sequences an exam lies."""
    return out / "calibration" / str(sequences)


def needed(tier: Tier) -> dict[int, What]:
    """Sequences an exam of each calibration, and what is recorded of them.

    The largest one of a tier with ``gradients`` also has points; gradients alone go where an
    operator asks for them.
    """
    found: dict[int, What] = {}
    for operator in tier.operators.values():
        if operator.calibration:
            gradients = "gradients" in MERGE_METHODS[operator.method].data
            if gradients or operator.calibration not in found:
                found[operator.calibration] = "gradients" if gradients else "inputs"
    if tier.gradients:
        found[max([*found, tier.calibration_items])] = "points"
    return dict(sorted(found.items()))


def costs(tier: Tier, layers: int) -> dict[int, float]:
    """Of each, in seconds of one core, about."""
    found = {}
    for count, what in needed(tier).items():
        each = {"inputs": _FORWARD, "gradients": _BACKWARD, "points": 2 * _BACKWARD}[what]
        found[count] = count * len(tier.exams) * layers * each
        if what == "points":  # at the base, and at every adapter on its own domain's texts
            points = len(tier.exams) + len(tier.adapters)
            found[count] += count * points * layers * 2 * _BACKWARD
    return found


def write_texts(tier: Tier, out: Path) -> dict[str, Path]:
    """texts/EXAM.jsonl, a prompt and its completion a line; what is there stays as it is."""
    found = {}
    for name, exam in tier.exams.items():
        items = exam.items("calibration", tier.calibration_items, tier.seed)
        lines = (json.dumps({"prompt": item.prompt, "completion": item.target}) for item in items)
        text = "".join(f"{line}\n" for line in lines)
        found[name] = path = out / "texts" / f"{name}.jsonl"
        if not path.exists():
            with AtomicFile(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise InputError("has other texts than the tier", path=path)
    return found


def calibrate(
    tier: Tier, base: Base, out: Path, sequences: int, *, what: What, threads: int,
    progress: Callable[[CalibrationPlan], Callable[[int], None]] | None = None,
) -> None:  # fmt: skip
    """Record one calibration of all exams, unless it is there.

    That of an exam is the same whichever others the tier has: every draw has the exam's own seed.
    Only modules that an adapter has are recorded. ``progress`` is given the plan, and what it
    returns is called with the texts done since the last call.

    Raises:
        InputError: a folder of something else, what :func:`mergeprobe_fast.record.calibrate` says.
    """
    folder, texts = calibration_folder(out, sequences), write_texts(tier, out)
    zoo = open_zoo([out / "adapters" / name for name in tier.adapters])
    modules = [module.name for module in zoo.modules]
    if folder.exists():
        _check(folder, texts, modules, what, zoo)
        return
    arguments: dict[str, Any] = {}
    if what != "inputs":
        arguments = {"gradients": True, "labels": "model"}
    if what == "points":
        exams = [adapter.exam for adapter in tier.adapters.values()]
        arguments |= {"labels": "both", "adapters": zoo, "domains": exams}
    plan = plan_calibration(
        base.model, texts, tokenizer=_wrapped(base.tokenizer), max_sequences=sequences,
        modules=modules, seed=tier.seed, threads=threads, **arguments,
    )  # fmt: skip
    plan.record(folder, progress=None if progress is None else progress(plan))


def _check(
    folder: Path, texts: Mapping[str, Path], modules: list[str], what: What, zoo: Zoo
) -> None:
    """What is there has all that is needed of it, of these texts and adapters."""
    there = open_calibration(folder)

    def refuse(reason: str, key: str) -> NoReturn:
        raise InputError(f"{reason}; remove it to record it again", path=folder, key=key)

    for key, found in (("domains", there.domains), ("modules", there.modules)):
        missing = sorted({*(texts if key == "domains" else modules)} - {*found})
        if missing:
            refuse(f"has no {missing[0]}", key)
    for name, path in texts.items():
        if there.info.domains[name].sha256 != hashlib.sha256(path.read_bytes()).hexdigest():
            refuse("is of other texts", name)
    if what != "inputs" and not there.has_gradients:
        refuse("has no gradients", "gradients")
    if what == "points":
        known = open_points(folder).fingerprints if has_points(folder) else {}
        for adapter in zoo:
            if known.get(adapter.name) != fingerprint(adapter):
                refuse("has no points of this adapter as it is", adapter.name)


def _wrapped(tokenizer: Any) -> Any:
    """As transformers has it: the calibration wants to know which tokens are of the completion."""
    if not hasattr(tokenizer, "token_to_id"):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
