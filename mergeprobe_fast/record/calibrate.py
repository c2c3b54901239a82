"""The calibration pass: what a base model's modules see on a few texts of each domain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeprobe_fast import _env
from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import text as valid_text
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.io.calibration_json import LABELS, CalibratedModule, CalibrationInfo
from mergeprobe_fast.ops.device import open_device
from mergeprobe_fast.zoo import Paths, Zoo, as_zoo

from .base import Base, NotStreamable, evaluating, open_base
from .capture import Discovery, recordable, sizes
from .layers import LayeredModel
from .plan import CalibrationPlan
from .points import plan_points
from .texts import Texts, check_domains, read_texts
from .tokens import describe, draw_tokens
from .workers import one_thread_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PROBE = 7  # tokens that show which modules share an input


def plan_calibration(
    base: str | os.PathLike[str] | Any,
    data: Mapping[str, str | os.PathLike[str]],
    *,
    tokenizer: Any = None,
    samples: int = 256,
    max_sequences: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    skip_first: int = 1,
    gradients: bool = False,
    labels: str | None = None,
    outputs: bool = False,
    adapters: Zoo | Paths | None = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    modules: Iterable[str] | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
) -> CalibrationPlan:
    """Everything of :func:`calibrate` (which has the arguments) up to the work itself."""
    _check_numbers(
        samples=(samples, 1), max_length=(max_length, 1), seed=(seed, 0), skip_first=(skip_first, 0)
    )
    if max_sequences is not None:
        _check_numbers(max_sequences=(max_sequences, 1))
    if labels is not None and labels not in LABELS:
        raise InputError(f"labels {labels!r} are none of {', '.join(LABELS)}")
    if labels is not None and not gradients:
        raise InputError("given without gradients", key="labels")
    if isinstance(modules, str):
        raise InputError("modules is a list of globs, not one text")
    if adapters is None and domains is not None:
        raise InputError("given without adapters", key="domains")
    check_domains(data)
    there = open_device(device)
    zoo = None if adapters is None else as_zoo(adapters)
    chosen = () if zoo is None else assign_domains(zoo.names, list(data), domains)
    opened = open_base(base, tokenizer, dtype, there)
    notes: list[str] = []
    limit = _limit(opened.config, max_length, notes)
    if limit <= skip_first:
        raise InputError(f"sequences of {limit} tokens have none behind the first {skip_first}")
    texts = {
        name: read_texts(
            name, path, lambda: opened.tokenizer, opened.config.get_text_config().vocab_size,
            max_length=limit, max_sequences=max_sequences, least=skip_first + 1, seed=seed,
            labelled=gradients or zoo is not None,
        )
        for name, path in data.items()
    }  # fmt: skip
    tokens = {name: draw_tokens(texts[name], samples, skip_first, seed) for name in texts}
    count = _env.threads_or_default(threads)
    with one_thread_each(1):
        why = _why_whole(gradients, zoo, there)
        model, layers, keys = _modules(opened, modules, why, texts, notes)
    if zoo is not None and zoo.base_model not in (None, opened.name):
        notes.append(f"the adapters declare the base model {zoo.base_model}, this is {opened.name}")
    recorded = {
        name: CalibratedModule(name, *sizes(model.get_submodule(name)), key)
        for name, key in keys.items()
    }
    described = {
        name: describe(text, tokens[name][0], samples, skip_first, notes)
        for name, text in texts.items()
    }
    info = CalibrationInfo(
        opened.name, None if opened.path is None else valid_text(opened.path), opened.config_sha256,
        described, recorded, seed=seed, samples=samples, max_length=limit, skip_first=skip_first,
        labels=(labels or "model") if gradients else None, notes=tuple(notes), outputs=outputs,
    )  # fmt: skip
    points = None if zoo is None else plan_points(zoo, chosen, texts, model, seed, count)
    return CalibrationPlan(info, texts, tokens, opened, model, layers, count, points)


def _why_whole(gradients: bool, zoo: Zoo | None, device: Any) -> str | None:
    """Why the whole model is needed, if it is."""
    if gradients:
        return "gradients need all of it"
    if device is not None:
        return f"it runs on {device.torch}"
    return None if zoo is None else "points of adapters need all of it"


def calibrate(
    base: str | os.PathLike[str] | Any,
    data: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    announce: Callable[[CalibrationPlan], None] | None = None,
    progress: Callable[[int], None] | None = None,
    **arguments: Any,
) -> Calibration:
    """Record a calibration of a base model: a few input rows of every module, for each domain.

    Args:
        base: a local folder with config.json, safetensors and tokenizer files; it is run one
            decoder layer at a time where the model allows that (else the notes say why not). Or a
            transformers model object, in which case ``tokenizer`` is needed for text.
        data: domain -> file. ``.jsonl`` with {"text"}, {"prompt", "completion"}, {"messages"} or
            {"input_ids"} a line, or ``.txt`` with blank lines between texts.
        out: the folder to write, ``mergeprobe_fast.io.calibration`` has the format.
        announce: called with the plan (its ``summary`` states the size) before the work.
        progress: called with the steps done since the last call; ``plan.steps`` in all.
        samples: T, tokens drawn for each domain, uniformly and without replacement, the same for
            every module; a domain with fewer has all of them, and a note.
        max_sequences: a domain with more has so many, drawn with the seed; None: all.
        max_length: tokens after which a sequence is cut.
        seed: of every draw. The same input and seed give the same bytes for any ``threads``.
        skip_first: tokens at the start of each sequence that are left out of samples and means.
        gradients: also record dLoss/d(module output); loads the whole model.
        labels: of that loss: "model" (the default), drawn from the model's own distribution at
            each token (the true Fisher), "data", the next token (the empirical one), or "both".
            Where every line of a domain has a prompt and a completion, only completions have them.
        outputs: also keep the modules' outputs at the sampled tokens.
        adapters: a zoo: measure at the base and at each adapter, on texts of its own domain, how
            the loss changes along every adapter (``mergeprobe_fast.io.points`` has what is
            written); loads the whole model.
        domains: of the adapters, in order or by name; default: by their names.
        modules: globs over module paths; default: every Linear and Conv1D but the output head.
        dtype: to compute in: "auto" (float32 for a folder), "float32", "bfloat16", "float16".
        threads: sequences at a time, each on one core; default: the cores this process may use.
        device: "cpu", "cuda", "cuda:1" or "auto", a CUDA device if one can be used: where a
            folder's model runs, as a whole. An object runs where it is.

    Raises:
        InputError: naming the file, line, module or argument and what is wrong with it.
        BackendError: the device cannot be used here, or has no room for the model.
    """
    plan = plan_calibration(base, data, **arguments)
    plan.check_out(out, overwrite=overwrite)
    if announce is not None:
        announce(plan)
    return plan.record(out, overwrite=overwrite, progress=progress)


def _modules(
    base: Base,
    patterns: Iterable[str] | None,
    why_whole: str | None,
    texts: Mapping[str, Texts],
    notes: list[str],
) -> tuple[PreTrainedModel, LayeredModel | None, dict[str, str]]:
    """The model to run, its layers if they are streamed, and module -> input key."""
    import torch

    patterns = None if patterns is None else list(patterns)
    longest = max((ids for text in texts.values() for ids in text.sequences), key=len)
    probe = torch.from_numpy(longest[:_PROBE])[None]
    reason = None
    if base.model is None:
        try:
            if why_whole is not None:
                raise NotStreamable(why_whole)
            return _layers(base, patterns, probe, notes)
        except NotStreamable as caught:
            reason = caught
    model = base.whole()
    discovery = Discovery(recordable(model, patterns))
    with evaluating(model), torch.inference_mode(), discovery.run(probe.shape[1]):
        model(input_ids=probe.to(model.device), use_cache=False)
    notes += discovery.finish(strict=patterns is not None)
    if reason is not None:
        notes.append(f"the whole model was loaded, not layer by layer: {reason}")
    return model, None, discovery.keys


def _layers(
    base: Base, patterns: list[str] | None, probe: torch.Tensor, notes: list[str]
) -> tuple[PreTrainedModel, LayeredModel, dict[str, str]]:
    """As ``_modules``; NotStreamable says why a model has to be loaded as a whole."""
    skeleton = base.skeleton()
    chosen = recordable(skeleton, patterns)
    layers = LayeredModel(base, skeleton)
    for name in chosen:
        if not name.startswith(layers.name + "."):
            raise NotStreamable(f"{name} is outside its layers")
    discovery = Discovery(chosen)
    layers.discover(probe, discovery)
    notes += discovery.finish(strict=patterns is not None)
    return skeleton, layers, discovery.keys


def _limit(config: Any, max_length: int, notes: list[str]) -> int:
    """Tokens of a sequence: as asked for, or what the model has positions for."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < max_length:
        notes.append(f"max_length {max_length} is beyond the model's {most} positions")
        return most
    return max_length


def _check_numbers(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if type(value) is not int or not least <= value < 2**31:
            raise InputError(f"{name} is {value!r}, not an integer of {least} or more")
